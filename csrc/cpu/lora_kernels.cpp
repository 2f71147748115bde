// dots, outer and drop (see lora_kernels.h) for SSE2/NEON, AVX2 and AVX-512.
//
// dots: I x J dot products held in registers as vectors along the columns, so both operands are read as they are stored and no rank is padded.
// outer: I rows x J vectors of columns in registers, the left operand broadcast. Tiles of 6 x 4 vectors fill AVX-512's 32 registers, 6 x 2 the 16 of AVX2;
// both do at least two multiply-adds a load.
#include "lora_kernels.h"

#include <algorithm>
#include <type_traits>

#include "philox.h"

namespace hetlora {
namespace {

constexpr int kTileRows = 6;

// dots adds long sums in parts of so many vectors, for exactness: no chain of multiply-adds is longer, on four lanes as on sixteen. It costs at most 3 %.
constexpr int64_t kChain = 64;

// Rows of the right operand of `outer` that lie a multiple of kAliased bytes apart share a few sets of L1, and a strip of more than kAliasedRows of them falls out
// of it before the next six rows of the left one want it again. Up to kStrips strips, kCopied bytes at most, are copied first, so that whole lines of each row are
// read together. Measured under AVX2 alone, and done there alone.
constexpr int64_t kAliased = 1024, kAliasedRows = 32, kCopied = 65536, kStrips = 4;
// Six rows of x and two of the factor, each of kHeldBytes and more, are more than L1 holds: every tile of ranks would read x from L2. From kHeldRanks on the copy
// of x is repaid.
constexpr int64_t kHeld = 128, kHeldRanks = 32, kHeldBytes = 5120;
template <class E, int W>
constexpr bool kCopies = W * sizeof(E) == 32;

// Sum of the lanes, by halves.
template <class E, int W>
HETLORA_INLINE E lanes(const typename VectorOf<E, W>::type& v) {
    if constexpr (W == 1) {
        return v[0];
    } else {
        typedef typename VectorOf<E, W / 2>::type Half;
        const Half* halves = reinterpret_cast<const Half*>(&v);
        const Half sum = halves[0] + halves[1];
        return lanes<E, W / 2>(sum);
    }
}

// The last n < W elements of a row, then zeros: multiplied and added as any others, whichever way a compiler treats numbers one by one.
template <class E, int W>
HETLORA_INLINE typename VectorOf<E, W>::type leading(const E* from, int64_t n) {
    typename VectorOf<E, W>::type v = {};
    for (int i = 0; i < W; ++i) {
        if (i < n) {
            v[i] = from[i];
        }
    }
    return v;
}

// Keeps an operand of J multiply-adds in its register. Where J is 2, GCC reads it from memory each time: under AVX2 14 loads for 12 multiply-adds, and there are two
// loads a clock. clang would refuse the constraint in a function without AVX.
template <class E, int W, int J>
HETLORA_INLINE void hold(typename VectorOf<E, W>::type& operand) {
#if defined(HETLORA_X86) && !defined(__clang__)
    if constexpr (W * sizeof(E) == 32 && J > 1) {
        __asm__("" : "+x"(operand));
    }
#endif
    (void)operand;
}

// sums += the products of n columns.
template <class E, int W, int I, int J>
HETLORA_INLINE void dots_part(const E* x, int64_t ld_x, const E* a, int64_t ld_a, int64_t n, typename VectorOf<E, W>::type (&sums)[I][J]) {
    typedef typename VectorOf<E, W>::type V;
    int64_t c = 0;
    for (; c + W <= n; c += W) {
        V right[J];
        for (int j = 0; j < J; ++j) {
            right[j] = *reinterpret_cast<const V*>(a + j * ld_a + c);
        }
        for (int i = 0; i < I; ++i) {
            V left = *reinterpret_cast<const V*>(x + i * ld_x + c);
            hold<E, W, J>(left);
            for (int j = 0; j < J; ++j) {
                sums[i][j] += left * right[j];
            }
        }
    }
    if (c < n) {
        V right[J];
        for (int j = 0; j < J; ++j) {
            right[j] = leading<E, W>(a + j * ld_a + c, n - c);
        }
        for (int i = 0; i < I; ++i) {
            const V left = leading<E, W>(x + i * ld_x + c, n - c);
            for (int j = 0; j < J; ++j) {
                sums[i][j] += left * right[j];
            }
        }
    }
}

// Zeros, each in its register: `= {}` has GCC fill the array in memory, by `rep stos`.
template <class V, int I, int J>
HETLORA_INLINE void clear(V (&sums)[I][J]) {
    for (int i = 0; i < I; ++i) {
        for (int j = 0; j < J; ++j) {
            sums[i][j] = V{};
        }
    }
}

template <class E, int W, int I, int J>
HETLORA_INLINE void store_lanes(const typename VectorOf<E, W>::type (&sums)[I][J], E scale, E* out, int64_t ld_out) {
    for (int i = 0; i < I; ++i) {
        for (int j = 0; j < J; ++j) {
            out[i * ld_out + j] = scale * lanes<E, W>(sums[i][j]);
        }
    }
}

template <class E, int W, int I, int J>
HETLORA_INLINE void dots_tile(const E* x, int64_t ld_x, const E* a, int64_t ld_a, int64_t n, E scale, E* out, int64_t ld_out) {
    typedef typename VectorOf<E, W>::type V;
    constexpr int64_t part = kChain * W;
    V sums[I][J];
    clear<V, I, J>(sums);
    dots_part<E, W, I, J>(x, ld_x, a, ld_a, n < part ? n : part, sums);
    for (int64_t c = part; c < n; c += part) {
        V more[I][J];
        clear<V, I, J>(more);
        dots_part<E, W, I, J>(x + c, ld_x, a + c, ld_a, n - c < part ? n - c : part, more);
        for (int i = 0; i < I; ++i) {
            for (int j = 0; j < J; ++j) {
                sums[i][j] += more[i][j];
            }
        }
    }
    store_lanes<E, W, I, J>(sums, scale, out, ld_out);
}

template <class E, int W, int I, int JMax>
HETLORA_INLINE void dots_rows(const E* x, int64_t ld_x, const E* a, int64_t ld_a, int64_t rank, int64_t n, E scale, E* out, int64_t ld_out) {
    int64_t j = 0;
    for (; j + JMax <= rank; j += JMax) {
        dots_tile<E, W, I, JMax>(x, ld_x, a + j * ld_a, ld_a, n, scale, out + j, ld_out);
    }
    if constexpr (JMax > 2) {
        for (; j + 2 <= rank; j += 2) {
            dots_tile<E, W, I, 2>(x, ld_x, a + j * ld_a, ld_a, n, scale, out + j, ld_out);
        }
    }
    for (; j < rank; ++j) {
        dots_tile<E, W, I, 1>(x, ld_x, a + j * ld_a, ld_a, n, scale, out + j, ld_out);
    }
}

// The same for kTileRows long rows and many ranks, with the same bits: the copy of a part of x stays in L1 for up to kHeld ranks, whose sums wait in memory.
template <class E, int W, int JMax>
HETLORA_INLINE void dots_held(const E* x, int64_t ld_x, const E* a, int64_t ld_a, int64_t rank, int64_t n, E scale, E* out, int64_t ld_out) {
    typedef typename VectorOf<E, W>::type V;
    constexpr int64_t part = kChain * W, whole = kHeld / JMax;
    alignas(64) E own[kTileRows * part];
    V sums[whole][kTileRows][JMax];
    for (int64_t first = 0; first < rank; first += kHeld) {
        const int64_t tiles = std::min(whole, (rank - first) / JMax);
        for (int64_t c = 0; c < n; c += part) {
            const int64_t width = std::min(part, n - c);
            for (int i = 0; i < kTileRows; ++i) {
                std::memcpy(own + i * part, x + i * ld_x + c, width * sizeof(E));
            }
            for (int64_t tile = 0; tile < tiles; ++tile) {
                V more[kTileRows][JMax];
                clear<V, kTileRows, JMax>(more);
                dots_part<E, W, kTileRows, JMax>(own, part, a + (first + tile * JMax) * ld_a + c, ld_a, width, more);
                for (int i = 0; i < kTileRows; ++i) {
                    for (int j = 0; j < JMax; ++j) {
                        sums[tile][i][j] = c == 0 ? more[i][j] : sums[tile][i][j] + more[i][j];
                    }
                }
            }
        }
        for (int64_t tile = 0; tile < tiles; ++tile) {
            store_lanes<E, W, kTileRows, JMax>(sums[tile], scale, out + first + tile * JMax, ld_out);
        }
    }
    for (int64_t j = rank / JMax * JMax; j < rank; ++j) {
        dots_tile<E, W, kTileRows, 1>(x, ld_x, a + j * ld_a, ld_a, n, scale, out + j, ld_out);
    }
}

template <class E, int W, int JMax>
HETLORA_INLINE void dots(const E* x, int64_t ld_x, int64_t rows, const E* a, int64_t ld_a, int64_t rank, int64_t n, E scale, E* out, int64_t ld_out) {
    int64_t i = 0;
    if constexpr (kCopies<E, W>) {
        if (rank >= kHeldRanks && n * static_cast<int64_t>(sizeof(E)) >= kHeldBytes) {
            for (; i + kTileRows <= rows; i += kTileRows) {
                dots_held<E, W, JMax>(x + i * ld_x, ld_x, a, ld_a, rank, n, scale, out + i * ld_out, ld_out);
            }
        }
    }
    for (; i + kTileRows <= rows; i += kTileRows) {
        dots_rows<E, W, kTileRows, JMax>(x + i * ld_x, ld_x, a, ld_a, rank, n, scale, out + i * ld_out, ld_out);
    }
    for (; i + 2 <= rows; i += 2) {
        dots_rows<E, W, 2, JMax>(x + i * ld_x, ld_x, a, ld_a, rank, n, scale, out + i * ld_out, ld_out);
    }
    for (; i < rows; ++i) {
        dots_rows<E, W, 1, JMax>(x + i * ld_x, ld_x, a, ld_a, rank, n, scale, out + i * ld_out, ld_out);
    }
}

template <class E, int W, int I, int J>
HETLORA_INLINE void outer_tile(const E* left, int64_t left_row, int64_t left_step, const E* right, int64_t ld_right, int64_t depth, E* out, int64_t ld_out,
                               bool add) {
    typedef typename VectorOf<E, W>::type V;
    V sums[I][J] = {};
    for (int64_t d = 0; d < depth; ++d) {
        V values[J];
        for (int j = 0; j < J; ++j) {
            values[j] = *reinterpret_cast<const V*>(right + d * ld_right + j * W);
        }
        for (int i = 0; i < I; ++i) {
            const E factor = left[i * left_row + d * left_step];
            for (int j = 0; j < J; ++j) {
                sums[i][j] += factor * values[j];
            }
        }
    }
    for (int i = 0; i < I; ++i) {
        for (int j = 0; j < J; ++j) {
            V* target = reinterpret_cast<V*>(out + i * ld_out + j * W);
            *target = add ? *target + sums[i][j] : sums[i][j];
        }
    }
}

template <class E, int W, int J>
HETLORA_INLINE void outer_columns(const E* left, int64_t left_row, int64_t left_step, const E* right, int64_t ld_right, int64_t depth, int64_t rows, E* out,
                                  int64_t ld_out, bool add) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        outer_tile<E, W, kTileRows, J>(left + i * left_row, left_row, left_step, right, ld_right, depth, out + i * ld_out, ld_out, add);
    }
    for (; i + 2 <= rows; i += 2) {
        outer_tile<E, W, 2, J>(left + i * left_row, left_row, left_step, right, ld_right, depth, out + i * ld_out, ld_out, add);
    }
    for (; i < rows; ++i) {
        outer_tile<E, W, 1, J>(left + i * left_row, left_row, left_step, right, ld_right, depth, out + i * ld_out, ld_out, add);
    }
}

template <class E, int W, int JMax>
HETLORA_INLINE void outer(const E* left, int64_t left_row, int64_t left_step, const E* right, int64_t ld_right, int64_t depth, int64_t rows, int64_t columns,
                          E* out, int64_t ld_out, bool add) {
    constexpr int kStrip = W * JMax;
    constexpr bool copies = kCopies<E, W>;
    constexpr int64_t kMost = kCopied / (kStrip * sizeof(E));
    alignas(64) E copied[copies ? kMost * kStrip : 1];
    const bool aliased = ld_right * static_cast<int64_t>(sizeof(E)) % kAliased == 0 && depth > kAliasedRows && depth <= kMost;
    int64_t c = 0;
    if constexpr (copies) {
        if (aliased && rows >= 2 * kTileRows) {
            for (; c + kStrip <= columns;) {
                const int64_t strips = std::min<int64_t>({kStrips, kMost / depth, (columns - c) / kStrip});
                for (int64_t d = 0; d < depth; ++d) {
                    for (int64_t strip = 0; strip < strips; ++strip) {
                        std::memcpy(copied + (strip * depth + d) * kStrip, right + d * ld_right + c + strip * kStrip, kStrip * sizeof(E));
                    }
                }
                for (int64_t strip = 0; strip < strips; ++strip, c += kStrip) {
                    outer_columns<E, W, JMax>(left, left_row, left_step, copied + strip * depth * kStrip, kStrip, depth, rows, out + c, ld_out, add);
                }
            }
        }
    }
    for (; c + kStrip <= columns; c += kStrip) {
        outer_columns<E, W, JMax>(left, left_row, left_step, right + c, ld_right, depth, rows, out + c, ld_out, add);
    }
    for (; c + W <= columns; c += W) {
        outer_columns<E, W, 1>(left, left_row, left_step, right + c, ld_right, depth, rows, out + c, ld_out, add);
    }
    for (; c < columns; ++c) {
        outer_columns<E, 1, 1>(left, left_row, left_step, right + c, ld_right, depth, rows, out + c, ld_out, add);
    }
}

template <class E>
HETLORA_INLINE void drop(const DropRow& row, const E* x, int64_t n, E inverse, E* out) {
    uint16_t draws[64];
    for (int64_t c = 0; c < n; c += 64) {
        philox_draws(row.seed, row.key, static_cast<uint32_t>((row.column + c) / 8), draws);
        const int64_t width = n - c < 64 ? n - c : 64;
        for (int64_t j = 0; j < width; ++j) {
            const E value = x[c + j] * inverse;
            out[c + j] = draws[j] >= row.threshold ? value : E{0};
        }
    }
}

#define HETLORA_LORA(suffix, E, target, W, JMax, DROP)                                                                                                      \
    target void dots_##suffix(const E* x, int64_t ld_x, int64_t rows, const E* a, int64_t ld_a, int64_t rank, int64_t n, E scale, E* out, int64_t ld_out) { \
        dots<E, W, JMax>(x, ld_x, rows, a, ld_a, rank, n, scale, out, ld_out);                                                                              \
    }                                                                                                                                                       \
    target void outer_##suffix(const E* left, int64_t left_row, int64_t left_step, const E* right, int64_t ld_right, int64_t depth, int64_t rows,           \
                               int64_t columns, E* out, int64_t ld_out, bool add) {                                                                         \
        outer<E, W, JMax>(left, left_row, left_step, right, ld_right, depth, rows, columns, out, ld_out, add);                                              \
    }                                                                                                                                                       \
    target void drop_##suffix(const DropRow& row, const E* x, int64_t n, E inverse, E* out) { DROP(row, x, n, inverse, out); }                              \
    constexpr LoraKernels<E> kernels_##suffix = {dots_##suffix, outer_##suffix, drop_##suffix, kCopies<E, W>};

HETLORA_LORA(base_float, float, , 4, 2, drop)
HETLORA_LORA(base_double, double, , 2, 2, drop)
#if defined(HETLORA_X86)
HETLORA_AVX512 inline __attribute__((always_inline)) void drop_avx512(const DropRow& row, const float* x, int64_t n, float inverse, float* out) {
    const __m512i threshold = _mm512_set1_epi16(static_cast<short>(row.threshold));
    const __m512 factor = _mm512_set1_ps(inverse);
    for (int64_t c = 0; c < n; c += 64) {
        uint64_t keep = philox_keep_avx512(row.seed, row.key, static_cast<uint32_t>((row.column + c) / 8), threshold);
        for (int64_t j = c; j < n && j < c + 64; j += 16) {
            const __mmask16 inside = static_cast<__mmask16>(n - j >= 16 ? 0xFFFF : (1u << (n - j)) - 1), kept = static_cast<__mmask16>(keep & inside);
            _mm512_mask_storeu_ps(out + j, inside, _mm512_maskz_mul_ps(kept, _mm512_maskz_loadu_ps(inside, x + j), factor));
            keep >>= 16;
        }
    }
}

HETLORA_AVX512 inline __attribute__((always_inline)) void drop_avx512(const DropRow& row, const double* x, int64_t n, double inverse, double* out) {
    const __m512i threshold = _mm512_set1_epi16(static_cast<short>(row.threshold));
    for (int64_t c = 0; c < n; c += 64) {
        const uint64_t keep = philox_keep_avx512(row.seed, row.key, static_cast<uint32_t>((row.column + c) / 8), threshold);
        for (int64_t j = 0; j < 64 && c + j < n; ++j) {
            const double value = x[c + j] * inverse;
            out[c + j] = keep >> j & 1 ? value : 0.0;
        }
    }
}

HETLORA_LORA(avx2_float, float, HETLORA_AVX2, 8, 2, drop)
HETLORA_LORA(avx2_double, double, HETLORA_AVX2, 4, 2, drop)
HETLORA_LORA(avx512_float, float, HETLORA_AVX512, 16, 4, drop_avx512)
HETLORA_LORA(avx512_double, double, HETLORA_AVX512, 8, 4, drop_avx512)
#endif

template <class T, class E>
HETLORA_INLINE void add(T* __restrict out, const E* __restrict product, int64_t n) {
    using Sum = std::conditional_t<std::is_same_v<T, double>, double, E>;
    for (int64_t i = 0; i < n; ++i) {
        narrow(widen<Sum>(out[i]) + static_cast<Sum>(product[i]), out + i);
    }
}

}  // namespace

template <class E>
const LoraKernels<E>& lora_kernels() {
    constexpr bool wide = sizeof(E) == 8;
    static const InstructionSet set = instruction_set();
#if defined(HETLORA_X86)
    if (set != InstructionSet::base) {
        if constexpr (wide) {
            return set >= InstructionSet::avx512 ? kernels_avx512_double : kernels_avx2_double;
        } else {
            return set >= InstructionSet::avx512 ? kernels_avx512_float : kernels_avx2_float;
        }
    }
#endif
    (void)set;
    if constexpr (wide) {
        return kernels_base_double;
    } else {
        return kernels_base_float;
    }
}

template const LoraKernels<float>& lora_kernels<float>();
template const LoraKernels<double>& lora_kernels<double>();

HETLORA_CLONES void add_block(Type type, void* out, const float* product, int64_t n) { HETLORA_FOR_TYPE(type, T, add(static_cast<T*>(out), product, n)); }
HETLORA_CLONES void add_block(Type type, void* out, const double* product, int64_t n) { HETLORA_FOR_TYPE(type, T, add(static_cast<T*>(out), product, n)); }

}  // namespace hetlora
