#include "simd.h"

#include <cstdlib>
#include <utility>

#if defined(__SSE2__)
#include <emmintrin.h>
#endif

namespace hetlora {
namespace {

template <class T, class Sum>
HETLORA_INLINE void load(const T* __restrict from, Sum* __restrict to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        to[i] = widen<Sum>(from[i]);
    }
}

template <class T, class Sum>
HETLORA_INLINE void store(T* __restrict to, const Sum* __restrict from, int64_t n) {
    for (int64_t i = 0; i < n; ++i) {
        narrow(from[i], to + i);
    }
}

// Sixteen running sums hide the latency of the additions and fix their order. Four vectors of 32 bytes hold them: GCC keeps vectors of 64 bytes in memory
// where the registers are shorter, which took three to six times as long. 16-bit elements are converted first, a block in L1 at a time; a shorter block
// would be unrolled as a whole, which spills.
constexpr int64_t kSums = 16, kConverted = 1024;
typedef VectorOf<double, 4>::type Doubles;

template <class T>
HETLORA_INLINE void add_squares(const T* from, int64_t n, Doubles (&sums)[4]) {
    typedef typename VectorOf<T, 4>::type Elements;
    Doubles s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
    for (int64_t i = 0; i < n; i += kSums) {
        const auto* at = reinterpret_cast<const Elements*>(from + i);
        const Doubles x0 = __builtin_convertvector(at[0], Doubles), x1 = __builtin_convertvector(at[1], Doubles);
        const Doubles x2 = __builtin_convertvector(at[2], Doubles), x3 = __builtin_convertvector(at[3], Doubles);
        s0 += x0 * x0;
        s1 += x1 * x1;
        s2 += x2 * x2;
        s3 += x3 * x3;
    }
    sums[0] = s0, sums[1] = s1, sums[2] = s2, sums[3] = s3;
}

template <class T>
HETLORA_INLINE double squares(const T* __restrict from, int64_t n) {
    const int64_t whole = n / kSums * kSums;
    Doubles sums[4] = {};
    if constexpr (sizeof(T) == 2) {
        alignas(64) float block[kConverted];
        for (int64_t i = 0; i < whole; i += kConverted) {
            const int64_t size = whole - i < kConverted ? whole - i : kConverted;
            load(from + i, block, size);
            add_squares(block, size, sums);
        }
    } else {
        add_squares(from, whole, sums);
    }
    double sum = 0;
    for (int64_t i = whole; i < n; ++i) {
        const double x = widen<double>(from[i]);
        sum += x * x;
    }
    const Doubles low = sums[0] + sums[2], high = sums[1] + sums[3];
    for (int j = 0; j < 4; ++j) {
        sum += low[j];
    }
    for (int j = 0; j < 4; ++j) {
        sum += high[j];
    }
    return sum;
}

}  // namespace

HETLORA_CLONES void load_block(Type type, const void* from, float* to, int64_t n) { HETLORA_FOR_TYPE(type, T, load(static_cast<const T*>(from), to, n)); }
HETLORA_CLONES void load_block(Type type, const void* from, double* to, int64_t n) { HETLORA_FOR_TYPE(type, T, load(static_cast<const T*>(from), to, n)); }
HETLORA_CLONES void store_block(Type type, void* to, const float* from, int64_t n) { HETLORA_FOR_TYPE(type, T, store(static_cast<T*>(to), from, n)); }
HETLORA_CLONES void store_block(Type type, void* to, const double* from, int64_t n) { HETLORA_FOR_TYPE(type, T, store(static_cast<T*>(to), from, n)); }
HETLORA_CLONES double sum_squares(Type type, const void* from, int64_t n) {
    double sum = 0;
    HETLORA_FOR_TYPE(type, T, sum = squares(static_cast<const T*>(from), n));
    return sum;
}

InstructionSet instruction_set() {
    const char* most = std::getenv("HETLORA_INSTRUCTION_SET");  // one of the names in hetlora_kernels/_native.py, which refuses others
    if (most != nullptr && std::strcmp(most, "base") == 0) {
        return InstructionSet::base;
    }
#if defined(HETLORA_X86)
    const bool up_to_avx2 = most != nullptr && std::strcmp(most, "avx2") == 0;
    if (!up_to_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512bw")) {
#if defined(HETLORA_TILES)
        const bool up_to_avx512 = most != nullptr && std::strcmp(most, "avx512") == 0;
        if (!up_to_avx512 && __builtin_cpu_supports("amx-tile") && __builtin_cpu_supports("amx-bf16")) {
            return InstructionSet::amx;
        }
#endif
        return InstructionSet::avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return InstructionSet::avx2;
    }
#endif
    return InstructionSet::base;
}

void copy_block(void* to, const void* from, int64_t bytes, bool stream) {
#if defined(__SSE2__)
    if (stream) {
        auto* target = static_cast<char*>(to);
        const auto* source = static_cast<const char*>(from);
        // Whole cache lines only: a partly streamed line costs a read of memory after all.
        const int64_t head = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & 63);
        int64_t i = head < bytes ? head : bytes;
        std::memcpy(target, source, static_cast<size_t>(i));
        for (; i + 64 <= bytes; i += 64) {
            for (int j = 0; j < 64; j += 16) {
                _mm_stream_si128(reinterpret_cast<__m128i*>(target + i + j), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i + j)));
            }
        }
        std::memcpy(target + i, source + i, static_cast<size_t>(bytes - i));
        return;
    }
#endif
    (void)stream;
    std::memcpy(to, from, static_cast<size_t>(bytes));
}

void stream_fence() {
#if defined(__SSE2__)
    _mm_sfence();
#endif
}

namespace {

// Lanes 0, 1, ... (High: the upper half) of a and b in turn.
template <bool High, class V, size_t... I>
HETLORA_INLINE V interleave(const V& a, const V& b, std::index_sequence<I...>) {
    return HETLORA_SHUFFLE(a, b, ((I % 2 ? sizeof...(I) : 0) + (High ? sizeof...(I) / 2 : 0) + I / 2)...);
}

// N x N elements in N vectors: row i meets row i + N / 2 lane by lane, and again, until each vector holds a column.
template <class T, int N>
HETLORA_INLINE void transpose_tile(const T* from, int64_t ld_from, T* to, int64_t ld_to) {
    typedef typename VectorOf<T, N>::type V;
    V now[N], next[N];
    HETLORA_UNROLL
    for (int i = 0; i < N; ++i) {
        now[i] = *reinterpret_cast<const V*>(from + i * ld_from);
    }
    HETLORA_UNROLL
    for (int step = 1; step < N; step *= 2) {
        HETLORA_UNROLL
        for (int i = 0; i < N / 2; ++i) {
            next[2 * i] = interleave<false>(now[i], now[i + N / 2], std::make_index_sequence<N>{});
            next[2 * i + 1] = interleave<true>(now[i], now[i + N / 2], std::make_index_sequence<N>{});
        }
        HETLORA_UNROLL
        for (int i = 0; i < N; ++i) {
            now[i] = next[i];
        }
    }
    HETLORA_UNROLL
    for (int i = 0; i < N; ++i) {
        *reinterpret_cast<V*>(to + i * ld_to) = now[i];
    }
}

// In tiles of 16 bytes x 16 bytes, a line of the target after another: vectors of 64 bytes were no faster. The rest one by one.
template <class T>
HETLORA_INLINE void transpose_as(const T* from, int64_t rows, int64_t columns, T* to) {
    constexpr int64_t kTile = 16 / sizeof(T), kLine = 64 / sizeof(T);
    const int64_t whole_rows = rows / kTile * kTile, whole_columns = columns / kTile * kTile;
    for (int64_t line = 0; line < whole_rows; line += kLine) {
        for (int64_t c = 0; c < whole_columns; c += kTile) {
            for (int64_t r = line; r < whole_rows && r < line + kLine; r += kTile) {
                transpose_tile<T, kTile>(from + r * columns + c, columns, to + c * rows + r, rows);
            }
        }
    }
    for (int64_t r = 0; r < rows; ++r) {
        for (int64_t c = r < whole_rows ? whole_columns : 0; c < columns; ++c) {
            to[c * rows + r] = from[r * columns + c];
        }
    }
}

}  // namespace

void transpose_block(int64_t size, const void* from, int64_t rows, int64_t columns, void* to) {
    switch (size) {
        case 2: return transpose_as(static_cast<const uint16_t*>(from), rows, columns, static_cast<uint16_t*>(to));
        case 4: return transpose_as(static_cast<const uint32_t*>(from), rows, columns, static_cast<uint32_t*>(to));
        default: return transpose_as(static_cast<const uint64_t*>(from), rows, columns, static_cast<uint64_t*>(to));
    }
}

}  // namespace hetlora
