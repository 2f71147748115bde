// Pairs of bfloat16 numbers (AVX512-BF16), and the sums of sixteen vectors' lanes.
#pragma once

#include "simd.h"

#if defined(HETLORA_X86) && (defined(__clang__) || __GNUC__ >= 11)  // those that know the name of the instruction set
#define HETLORA_PAIRS 1
#endif

namespace hetlora {

// The lanes of 16 vectors of 16 added up by halves, as vector j's sum in lane j: 15 additions of 30 shuffled halves.
template <class V>
HETLORA_INLINE V sixteen_sums(const V* sums) {
    V v[16];
    HETLORA_UNROLL
    for (int j = 0; j < 16; ++j) {  // lane j of the result comes from the place whose bits are those of j in another order
        v[(j >> 2 & 1) * 8 + (j >> 3) * 4 + (j & 1) * 2 + (j >> 1 & 1)] = sums[j];
    }
    HETLORA_UNROLL
    for (int k = 0; k < 8; ++k) {
        v[k] = HETLORA_SHUFFLE(v[k], v[k + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               HETLORA_SHUFFLE(v[k], v[k + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    HETLORA_UNROLL
    for (int k = 0; k < 4; ++k) {
        v[k] = HETLORA_SHUFFLE(v[k], v[k + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               HETLORA_SHUFFLE(v[k], v[k + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    HETLORA_UNROLL
    for (int k = 0; k < 2; ++k) {
        v[k] = HETLORA_SHUFFLE(v[k], v[k + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               HETLORA_SHUFFLE(v[k], v[k + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    return HETLORA_SHUFFLE(v[0], v[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           HETLORA_SHUFFLE(v[0], v[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

#if defined(HETLORA_PAIRS)
// sum += the products of 32 columns, two to a lane: they are exact in float32; subnormal operands and products count as zero.
HETLORA_INLINE void add_pairs(VectorOf<float, 16>::type& sum, const VectorOf<float, 16>::type& left, const VectorOf<float, 16>::type& right) {
    VectorOf<float, 16>::type held = sum;  // a sum of an array stays in memory where an asm statement names it
    __asm__("vdpbf16ps %2, %1, %0" : "+v"(held) : "v"(left), "v"(right));
    sum = held;
}

inline bool has_pairs() { return instruction_set() >= InstructionSet::avx512 && __builtin_cpu_supports("avx512bf16"); }
#endif

}  // namespace hetlora
