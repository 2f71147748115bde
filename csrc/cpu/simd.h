// Element types, their conversions, and the way a kernel is compiled for several instruction sets.
//
// A function marked HETLORA_CLONES is compiled for x86-64, x86-64-v3 (AVX2, FMA) and x86-64-v4 (AVX-512) and chosen when the library is loaded; what is
// marked HETLORA_INLINE is compiled with it. Elsewhere (NEON; compilers other than GCC from 12) the baseline serves. Such functions take the element type as a value, not as a template
// argument, because the compiler clones plain functions only. Results may differ in the last bit between machines with and without FMA, never between runs.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>

#include "../types.h"

#if defined(__x86_64__) && defined(__GNUC__) && __GNUC__ >= 12 && !defined(__clang__)
#define HETLORA_CLONES __attribute__((target_clones("default", "arch=x86-64-v3", "arch=x86-64-v4")))
#else
#define HETLORA_CLONES
#endif
#define HETLORA_INLINE inline __attribute__((always_inline))

// Lanes of two vectors, chosen by constant indices.
#if defined(__clang__)
#define HETLORA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define HETLORA_UNROLL _Pragma("unroll")
#else
#define HETLORA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
// Vectors that an index reaches stay in registers only where their loops are unrolled, which GCC does by itself up to 16 times.
#define HETLORA_UNROLL _Pragma("GCC unroll 16")
#endif

// Where the number of registers or an intrinsic decides, a kernel is written for each set and chosen by `instruction_set`.
#if defined(__x86_64__) && defined(__GNUC__)
#define HETLORA_X86 1
#define HETLORA_AVX2 __attribute__((target("avx2,fma")))
#define HETLORA_AVX512 __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
// The compilers whose names for AMX were tried; Linux gives its registers on request.
#if defined(__linux__) && __GNUC__ >= 12 && !defined(__clang__)
#define HETLORA_TILES 1
#define HETLORA_AMX __attribute__((target("amx-tile,amx-bf16,avx512f,avx512vl,avx512dq,avx512bw,avx2,fma")))
#endif
#endif

namespace hetlora {

// In order: each contains those before.
enum class InstructionSet { base, avx2, avx512, amx };
InstructionSet instruction_set();

template <class E, int W>
struct VectorOf {
    typedef E type __attribute__((vector_size(W * sizeof(E)), aligned(sizeof(E)), may_alias));
};

struct bf16 {
    uint16_t bits;
};
struct f16 {
    uint16_t bits;
};

// Memory for `count` numbers on a cache line's border, uninitialised.
template <class T>
class Aligned {
  public:
    explicit Aligned(int64_t count) : held_(new char[static_cast<size_t>(count) * sizeof(T) + 64]) {}
    T* data() const { return reinterpret_cast<T*>((reinterpret_cast<uintptr_t>(held_.get()) + 63) & ~uintptr_t{63}); }

  private:
    std::unique_ptr<char[]> held_;
};

template <class To, class From>
HETLORA_INLINE To bit_cast(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    std::memcpy(&to, &from, sizeof to);
    return to;
}

HETLORA_INLINE float to_float(float x) { return x; }
HETLORA_INLINE float to_float(double x) { return static_cast<float>(x); }
HETLORA_INLINE float to_float(bf16 x) { return bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }

// Without branches or the F16C instructions, so that it vectorises everywhere. Normal numbers: move exponent and mantissa into place with an exponent
// offset of 0xE0 and scale by 2^-112, which sends infinity and NaN to themselves. Subnormals: put the mantissa under the exponent of 0.5, subtract 0.5.
HETLORA_INLINE float to_float(f16 x) {
    const uint32_t word = static_cast<uint32_t>(x.bits) << 16, twice = word + word;
    const float normal = bit_cast<float>((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const float subnormal = bit_cast<float>((twice >> 17) | (126u << 23)) - 0.5f;
    const uint32_t magnitude = twice < (1u << 27) ? bit_cast<uint32_t>(subnormal) : bit_cast<uint32_t>(normal);
    return bit_cast<float>((word & 0x80000000u) | magnitude);
}

template <class Sum, class T>
HETLORA_INLINE Sum widen(T x) {
    if constexpr (sizeof(Sum) == 8 && sizeof(T) == 8) {
        return x;
    } else {
        return to_float(x);
    }
}

// Round to nearest, ties to even; NaN stays NaN.
HETLORA_INLINE void narrow(float x, float* to) { *to = x; }
HETLORA_INLINE void narrow(float x, double* to) { *to = x; }
HETLORA_INLINE void narrow(float x, bf16* to) {
    const uint32_t bits = bit_cast<uint32_t>(x);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    to->bits = static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
}

// The inverse of the widening above: scaling up and down overflows to infinity where half precision does, and adding a power of two chosen by the exponent
// lets the float adder do the rounding.
HETLORA_INLINE void narrow(float x, f16* to) {
    const uint32_t bits = bit_cast<uint32_t>(x), twice = bits + bits;
    float base = bit_cast<float>(bits & 0x7FFFFFFFu) * 0x1.0p+112f * 0x1.0p-110f;
    uint32_t bias = twice & 0xFF000000u;
    bias = bias < 0x71000000u ? 0x71000000u : bias;
    base = bit_cast<float>((bias >> 1) + 0x07800000u) + base;
    const uint32_t sum = bit_cast<uint32_t>(base);
    const uint32_t magnitude = ((sum >> 13) & 0x7C00u) + (sum & 0x0FFFu);
    to->bits = static_cast<uint16_t>(((bits >> 16) & 0x8000u) | (twice > 0xFF000000u ? 0x7E00u : magnitude));
}
HETLORA_INLINE void narrow(double x, double* to) { *to = x; }
template <class T>
HETLORA_INLINE void narrow(double x, T* to) {
    narrow(static_cast<float>(x), to);
}

// Calls body(pointer of the element type) for `type`; the body is a macro argument and not a lambda, which would not be cloned.
#define HETLORA_FOR_TYPE(type, T, ...) \
    switch (type) {                    \
        case Type::f32: {              \
            using T = float;           \
            __VA_ARGS__;               \
        } break;                       \
        case Type::bf16: {             \
            using T = bf16;            \
            __VA_ARGS__;               \
        } break;                       \
        case Type::f16: {              \
            using T = f16;             \
            __VA_ARGS__;               \
        } break;                       \
        case Type::f64: {              \
            using T = double;          \
            __VA_ARGS__;               \
        } break;                       \
    }

// to[i] = from[i] for n elements, converted; `Sum` is float, or double where the tensors are.
void load_block(Type type, const void* from, float* to, int64_t n);
void load_block(Type type, const void* from, double* to, int64_t n);
void store_block(Type type, void* to, const float* from, int64_t n);
void store_block(Type type, void* to, const double* from, int64_t n);

// memcpy, or with `stream` past the cache: the target's lines are not read first, which saves a third of the traffic of a copy that is too large to stay
// in the cache. End a thread's streaming with `stream_fence`.
void copy_block(void* to, const void* from, int64_t bytes, bool stream);
void stream_fence();

// to [columns, rows] = the transpose of from [rows, columns], both dense, elements of `size` bytes.
void transpose_block(int64_t size, const void* from, int64_t rows, int64_t columns, void* to);

// Sum of the squares of n elements in double, always in the same order.
double sum_squares(Type type, const void* from, int64_t n);

}  // namespace hetlora
