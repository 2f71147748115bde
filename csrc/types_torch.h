// Between the element types of the kernels and torch's, for the bindings of both libraries.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "types.h"

namespace hetlora {

inline Type type_of(const char* name, const torch::stable::Tensor& tensor) {
    using torch::headeronly::ScalarType;
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Type::f32;
        case ScalarType::BFloat16: return Type::bf16;
        case ScalarType::Half: return Type::f16;
        case ScalarType::Double: return Type::f64;
        default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64");
    }
    return Type::f32;
}

}  // namespace hetlora
