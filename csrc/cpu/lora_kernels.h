// The inner loops of the LoRA layer on panels of float (double for float64 tensors), compiled for several instruction sets.
//
// A result is one chain of multiply-adds in an order that depends on its own row and column only, never on the tile it falls into: neither the other rows of
// a batch nor the number of threads can change its bits.
#pragma once

#include "simd.h"

namespace hetlora {

struct DropRow {
    uint64_t seed, key;  // the client's, and the row's (docs: reference.keep_mask)
    int64_t column;      // first column, a multiple of 64
    uint32_t threshold;  // of 65536 draws, how many drop an element
};

template <class E>
struct LoraKernels {
    // out[i * ld_out + j] = scale * sum over n columns of x[i * ld_x + c] * a[j * ld_a + c]
    void (*dots)(const E* x, int64_t ld_x, int64_t rows, const E* a, int64_t ld_a, int64_t rank, int64_t n, E scale, E* out, int64_t ld_out);
    // out[i * ld_out + c] (+)= sum over d of left[i * left_row + d * left_step] * right[d * ld_right + c]
    void (*outer)(const E* left, int64_t left_row, int64_t left_step, const E* right, int64_t ld_right, int64_t depth, int64_t rows, int64_t columns, E* out,
                  int64_t ld_out, bool add);
    // out[j] = x[j] * inverse where kept, else 0, for n columns; out may be x
    void (*drop)(const DropRow& row, const E* x, int64_t n, E inverse, E* out);
    bool copies;  // `outer` copies strips of `right` whose rows alias in L1: the more rows a call has, the better
};

template <class E>
const LoraKernels<E>& lora_kernels();

// out[i] += product[i], the sum in the wider of the two types, rounded once.
void add_block(Type type, void* out, const float* product, int64_t n);
void add_block(Type type, void* out, const double* product, int64_t n);

}  // namespace hetlora
