// The base product of a layer's large calls: y = x W^T + bias and d_x = d_y W.
#pragma once

#include "tensors.h"

namespace hetlora {

// Whether the framework multiplies matrices of this type fast on this processor. Where it does not, `base_forward` and `base_backward` are to widen them.
bool multiplies_fast(Type type);

// y [rows, m] = x [rows, n] weight [m, n]^T (+ bias [m]), in memory given. x and y are dense, of any leading shape; weight has any strides.
// widened: 16-bit operands are converted to float32, a part at a time, and multiplied in float32. Not widened: the product has the bits of the framework's
// F.linear.
void base_forward(const Tensor& y, const Tensor& x, const Tensor& weight, const MaybeTensor& bias, int64_t rows, bool widened);

// d_x [rows, n] = d_y [rows, m] weight. widened: as above; else with the bits of the framework's mm.
void base_backward(const Tensor& d_x, const Tensor& d_y, const Tensor& weight, int64_t rows, bool widened);

}  // namespace hetlora
