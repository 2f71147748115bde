// The tiles of gram_kernels.h in vectors. Whatever the tile, a sum is one chain over the columns of its panel and lane, then a tree over the lanes.
#include "gram_kernels.h"

#include "pairs.h"

namespace hetlora {
namespace {

// The W lanes added down to four, by halves.
template <class E, int W>
HETLORA_INLINE typename VectorOf<E, 4>::type four_lanes(const typename VectorOf<E, W>::type& v) {
    if constexpr (W == 4) {
        return v;
    } else {
        typedef typename VectorOf<E, W / 2>::type Half;
        Half halves[2];
        std::memcpy(halves, &v, sizeof halves);
        const Half sum = halves[0] + halves[1];
        return four_lanes<E, W / 2>(sum);
    }
}

// out[j] += the sum of the lanes of sums[j], in double, for N vectors, a multiple of 4 (16 where W is): as columns of a transposed block, since lane by lane
// took longer than the products at widths below 600.
template <class E, int W, int N>
HETLORA_INLINE void add_lanes(const typename VectorOf<E, W>::type* sums, double* out) {
    if constexpr (W == 16) {
        HETLORA_UNROLL
        for (int at = 0; at < N; at += 16) {
            const typename VectorOf<E, 16>::type all = sixteen_sums(sums + at);
            HETLORA_UNROLL
            for (int j = 0; j < 16; ++j) {
                out[at + j] += static_cast<double>(all[j]);
            }
        }
    } else {
        typedef typename VectorOf<E, 4>::type Four;
        HETLORA_UNROLL
        for (int at = 0; at < N; at += 4) {
            const Four a = four_lanes<E, W>(sums[at]), b = four_lanes<E, W>(sums[at + 1]);
            const Four c = four_lanes<E, W>(sums[at + 2]), d = four_lanes<E, W>(sums[at + 3]);
            const Four low = HETLORA_SHUFFLE(a, b, 0, 4, 2, 6) + HETLORA_SHUFFLE(a, b, 1, 5, 3, 7);
            const Four high = HETLORA_SHUFFLE(c, d, 0, 4, 2, 6) + HETLORA_SHUFFLE(c, d, 1, 5, 3, 7);
            const Four all = HETLORA_SHUFFLE(low, high, 0, 1, 4, 5) + HETLORA_SHUFFLE(low, high, 2, 3, 6, 7);
            for (int j = 0; j < 4; ++j) {
                out[at + j] += static_cast<double>(all[j]);
            }
        }
    }
}

// How the columns of two rows are multiplied and added, kStep a step into vectors of kSums lanes: kParts vectors of a row, one after another. kLines lines are
// fetched a step.
template <class E, int W>
struct Plain {
    typedef E Element;
    typedef E Sum;
    typedef typename VectorOf<E, W>::type Vector;
    static constexpr int kStep = kLanes, kSums = W, kParts = kStep / W, kLines = W * sizeof(E) == 64 ? 2 * kParts : 1;
    static HETLORA_INLINE Vector load(const E* from, int part) { return *reinterpret_cast<const Vector*>(from + part * W); }
    static HETLORA_INLINE void multiply_add(Vector& sum, const Vector& left, const Vector& right) { sum += left * right; }
};

// bfloat16 rows as they lie: a word of two columns is two floats, its low half shifted up and its high half alone. Products do not ask for the columns' order.
// To convert a panel first took as long again as its products at rank 16.
template <int W>
struct Halves {
    typedef bf16 Element;
    typedef float Sum;
    typedef typename VectorOf<float, W>::type Vector;
    static constexpr int kStep = 2 * kLanes, kSums = W, kParts = kStep / W, kLines = W == 16 ? 2 : 1;
    static HETLORA_INLINE Vector load(const bf16* from, int part) {
        typedef typename VectorOf<uint32_t, W>::type Words;
        const Words words = *reinterpret_cast<const Words*>(from + part / 2 * 2 * W);
        return bit_cast<Vector>(part % 2 == 0 ? words << 16 : words & 0xFFFF0000u);
    }
    static HETLORA_INLINE void multiply_add(Vector& sum, const Vector& left, const Vector& right) { sum += left * right; }
};

#if defined(HETLORA_PAIRS)
// bfloat16 pairs (pairs.h).
struct Pairs {
    typedef bf16 Element;
    typedef float Sum;
    typedef VectorOf<float, 16>::type Vector;
    static constexpr int kStep = 2 * kLanes, kSums = 16, kParts = 1, kLines = 2;
    static HETLORA_INLINE Vector load(const bf16* from, int) { return *reinterpret_cast<const Vector*>(from); }
    static HETLORA_INLINE void multiply_add(Vector& sum, const Vector& left, const Vector& right) { add_pairs(sum, left, right); }
};
#endif

constexpr int tile_sums(int rows, int columns, bool triangle, int lanes) {
    const int count = triangle ? rows * (rows + 1) / 2 : rows * columns, whole = lanes == 16 ? 16 : 4;
    return (count + whole - 1) / whole * whole;
}

// The next tile_sums of out += x_i . y_j over n columns (a multiple of the step), rows `ld` apart, row by row. `triangle`: y is x and only j >= i is wanted;
// then x's rows are fetched `ahead` columns on, unless that is 0. Returns where the next tile's sums begin.
template <class P, int I, int J, bool triangle>
HETLORA_INLINE double* products(const typename P::Element* x, const typename P::Element* y, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {
    typedef typename P::Vector V;
    constexpr int kCount = tile_sums(I, J, triangle, P::kSums);
    V sums[kCount] = {};
    const int64_t lines = stream.at < stream.end ? P::kLines * kLine : 0;
    const char* fetch = stream.at;
    for (int64_t c = 0; c < n; c += P::kStep) {
        HETLORA_UNROLL
        for (int line = 0; line < P::kLines; ++line) {
            __builtin_prefetch(fetch + line * kLine, 0, 2);
        }
        fetch += lines;
        if (triangle && ahead != 0) {
            HETLORA_UNROLL
            for (int i = 0; i < I; ++i) {
                HETLORA_UNROLL
                for (int line = 0; line < static_cast<int>(P::kStep * sizeof(typename P::Element) / kLine); ++line) {
                    __builtin_prefetch(x + i * ld + c + ahead + line * (kLine / sizeof(typename P::Element)), 0, 2);
                }
            }
        }
        HETLORA_UNROLL
        for (int part = 0; part < P::kParts; ++part) {
            V right[J];
            HETLORA_UNROLL
            for (int j = 0; j < J; ++j) {
                right[j] = P::load(y + j * ld + c, part);
            }
            int at = 0;
            HETLORA_UNROLL
            for (int i = 0; i < I; ++i) {
                const V left = triangle ? right[i] : P::load(x + i * ld + c, part);
                HETLORA_UNROLL
                for (int j = triangle ? i : 0; j < J; ++j) {
                    P::multiply_add(sums[at++], left, right[j]);
                }
            }
        }
    }
    stream.at = fetch;
    add_lanes<typename P::Sum, P::kSums, kCount>(sums, out);
    return out + kCount;
}

template <class P, int I>
HETLORA_INLINE double* triangle(int64_t count, const typename P::Element* x, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {
    if constexpr (I > 1) {
        if (count < I) {
            return triangle<P, I - 1>(count, x, ld, n, ahead, stream, out);
        }
    }
    return products<P, I, I, true>(x, x, ld, n, ahead, stream, out);
}

template <class P, int I, int J>
HETLORA_INLINE double* rectangle(int64_t rows, int64_t columns, const typename P::Element* x, const typename P::Element* y, int64_t ld, int64_t n,
                                 Stream& stream, double* out) {
    if constexpr (I > 1) {
        if (rows < I) {
            return rectangle<P, I - 1, J>(rows, columns, x, y, ld, n, stream, out);
        }
    }
    if constexpr (J > 1) {
        if (columns < J) {
            return rectangle<P, I, J - 1>(rows, columns, x, y, ld, n, stream, out);
        }
    }
    return products<P, I, J, false>(x, y, ld, n, 0, stream, out);
}

// The upper triangle of rows rows^T over one panel, tile by tile: a group by itself, then with every later one.
template <class P, int G, int T>
HETLORA_INLINE void panel_products(const typename P::Element* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {
    const Groups groups(rank, G, T);
    for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t i = groups.start(g), height = groups.start(g + 1) - i;
        out = triangle<P, T>(height, rows + i * ld, ld, n, ahead, stream, out);
        for (int64_t h = g + 1; h < groups.count; ++h) {
            const int64_t j = groups.start(h);
            out = rectangle<P, G, G>(height, groups.start(h + 1) - j, rows + i * ld, rows + j * ld, ld, n, stream, out);
        }
    }
}

// One function per instruction set rather than clones, because the number of registers decides the groups: 5 x 5 sums, 5 + 1 rows fill AVX-512's 32.
#define HETLORA_PANEL(name, target, width, group, most)                                                                     \
    target void name(const float* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {  \
        panel_products<Plain<float, width>, group, most>(rows, rank, ld, n, ahead, stream, out);                            \
    }                                                                                                                       \
    target void name(const double* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) { \
        panel_products<Plain<double, (width > 4 ? width / 2 : 4)>, group, most>(rows, rank, ld, n, ahead, stream, out);     \
    }                                                                                                                       \
    target void name(const bf16* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {   \
        panel_products<Halves<width>, group, most>(rows, rank, ld, n, ahead, stream, out);                                  \
    }
HETLORA_PANEL(panel_base, , 4, 3, 4)
#if defined(HETLORA_X86)
HETLORA_PANEL(panel_avx2, HETLORA_AVX2, 8, 3, 4)
HETLORA_PANEL(panel_avx512, HETLORA_AVX512, 16, 5, 6)
#endif
#if defined(HETLORA_PAIRS)
HETLORA_AVX512 void panel_pairs(const bf16* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {
    panel_products<Pairs, 5, 6>(rows, rank, ld, n, ahead, stream, out);
}
#endif

}  // namespace

template <class E>
PanelKernel<E> panel_kernel() {
    constexpr int kPart = sizeof(E) == 8 ? 2 : 1;
#if defined(HETLORA_PAIRS)
    if constexpr (sizeof(E) == 2) {
        if (has_pairs()) {
            return {panel_pairs, 5, 6, 16};
        }
    }
#endif
#if defined(HETLORA_X86)
    const InstructionSet set = instruction_set();
    if (set >= InstructionSet::avx512) {
        return {panel_avx512, 5, 6, 16 / kPart};
    }
    if (set == InstructionSet::avx2) {
        return {panel_avx2, 3, 4, 8 / kPart};
    }
#endif
    return {panel_base, 3, 4, 4};
}

template PanelKernel<float> panel_kernel<float>();
template PanelKernel<double> panel_kernel<double>();
template PanelKernel<bf16> panel_kernel<bf16>();

// gram [rank, rank], both triangles, from the sums of `panel_products`.
void from_tiles(const double* sums, int64_t rank, const Groups& groups, int lanes, double* gram) {
    for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t first = groups.start(g), last = groups.start(g + 1);
        for (int64_t h = g; h < groups.count; ++h) {
            const int64_t begin = groups.start(h), end = groups.start(h + 1);
            const double* own = sums;
            for (int64_t i = first; i < last; ++i) {
                for (int64_t j = h == g ? i : begin; j < end; ++j) {
                    gram[i * rank + j] = gram[j * rank + i] = *own++;
                }
            }
            sums += tile_sums(static_cast<int>(last - first), static_cast<int>(end - begin), h == g, lanes);
        }
    }
}

}  // namespace hetlora
