// Calls the kernels that need no torch once each on fixed input, a function `case_NAME` for each call. test_instruction_counts.py counts their instructions.
// Sizes are odd, so that the ends of rows and tiles count too. No result is looked at here. What a first call looks up once is looked up before.
#include <cstdio>

#include "gram_kernels.h"
#include "lora_kernels.h"
#include "optim_kernels.h"

namespace {

using namespace hetlora;

constexpr int64_t kRows = 33, kRank = 13, kColumns = 333, kPanel = 352, kMany = 5003;

template <class T>
struct alignas(64) Numbers {
    T values[kRows * kPanel];
};
template <class T>
Numbers<T> left;
template <class T>
Numbers<T> right;
template <class T>
Numbers<T> out;
double sums[4096];

template <class T>
void fill(Numbers<T>& numbers, uint32_t state) {
    for (T& value : numbers.values) {
        state = state * 1664525u + 1013904223u;
        narrow(static_cast<float>(state >> 8) * 0x1p-23f - 1.0f, &value);
    }
}

template <class E>
void dots() {
    lora_kernels<E>().dots(left<E>.values, kPanel, kRows, right<E>.values, kPanel, kRank, kColumns, E(0.5), out<E>.values, kRank);
}

template <class E>
void outer(bool add) {
    lora_kernels<E>().outer(left<E>.values, kRank, 1, right<E>.values, kPanel, kRank, kRows, kColumns, out<E>.values, kPanel, add);
}

template <class E>
void drop() {
    lora_kernels<E>().drop({7, 11, 64, 6554}, left<E>.values, kMany, E(1.25), out<E>.values);
}

template <class E>
const PanelKernel<E> panels = panel_kernel<E>();

template <class E>
void panel() {
    Stream stream{nullptr, nullptr};
    panels<E>.products(left<E>.values, kRank, kPanel, kPanel, 0, stream, sums);
}

template <class T>
Numbers<T> means;
template <class T>
Numbers<T> squares;

template <class T>
void adamw(Type type, bool tail) {
    const Span span{out<T>.values, left<T>.values, {means<T>.values, squares<T>.values}, kMany, 0.25, tail};
    adamw_block(type, type, span, Step<float>{1.0f, 0.9f, 1e-3f, 0.1f, 0.999f, 1e-3f, 1e-8f, 1.0f, 0.0f});
}

}  // namespace

#define CASES(CASE)                                                                                                            \
    CASE(dots_float, dots<float>())                                                                                            \
    CASE(dots_double, dots<double>())                                                                                          \
    CASE(outer_float, outer<float>(false))                                                                                     \
    CASE(outer_add_float, outer<float>(true))                                                                                  \
    CASE(outer_double, outer<double>(false))                                                                                   \
    CASE(drop_float, drop<float>())                                                                                            \
    CASE(drop_double, drop<double>())                                                                                          \
    CASE(panel_float, panel<float>())                                                                                          \
    CASE(panel_double, panel<double>())                                                                                        \
    CASE(panel_bfloat16, panel<bf16>())                                                                                        \
    CASE(add_block_bfloat16, add_block(Type::bf16, out<bf16>.values, left<float>.values, kMany))                               \
    CASE(add_block_float16, add_block(Type::f16, out<f16>.values, left<float>.values, kMany))                                  \
    CASE(load_bfloat16, load_block(Type::bf16, left<bf16>.values, out<float>.values, kMany))                                   \
    CASE(load_float16, load_block(Type::f16, left<f16>.values, out<float>.values, kMany))                                      \
    CASE(store_bfloat16, store_block(Type::bf16, out<bf16>.values, left<float>.values, kMany))                                 \
    CASE(store_float16, store_block(Type::f16, out<f16>.values, left<float>.values, kMany))                                    \
    CASE(sum_squares_float, sums[0] = sum_squares(Type::f32, left<float>.values, kMany))                                       \
    CASE(sum_squares_bfloat16, sums[0] = sum_squares(Type::bf16, left<bf16>.values, kMany))                                    \
    CASE(adamw_float, adamw<float>(Type::f32, false))                                                                          \
    CASE(adamw_tail_float, adamw<float>(Type::f32, true))                                                                      \
    CASE(adamw_bfloat16, adamw<bf16>(Type::bf16, false))                                                                       \
    CASE(adamw_tail_bfloat16, adamw<bf16>(Type::bf16, true))                                                                   \
    CASE(penalise_bfloat16, penalise_block(Type::bf16, left<bf16>.values, out<bf16>.values, means<float>.values, kMany, 0.25)) \
    CASE(transpose_2_bytes, transpose_block(2, left<bf16>.values, kRows, kColumns, out<bf16>.values))                          \
    CASE(transpose_4_bytes, transpose_block(4, left<float>.values, kRows, kColumns, out<float>.values))                        \
    CASE(transpose_8_bytes, transpose_block(8, left<double>.values, kRows, kColumns, out<double>.values))

#define DEFINE(name, ...) \
    extern "C" __attribute__((noinline)) void case_##name() { __VA_ARGS__; }
#define CALL(name, ...) case_##name();

CASES(DEFINE)

int main() {
    fill(left<float>, 1), fill(left<double>, 2), fill(left<bf16>, 3), fill(left<f16>, 4);
    fill(right<float>, 5), fill(right<double>, 6);
    lora_kernels<float>(), lora_kernels<double>();
    CASES(CALL)
    std::printf("%d\n", static_cast<int>(instruction_set()));
}
