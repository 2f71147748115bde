// S_k = scale_k drop(x_k) A_k^T from bfloat16 rows and a bfloat16 factor where they lie, two products an instruction.
//
// A task is kRows rows of one client. A tile is 6 x 4 dot products held in registers as vectors along the columns, as in lora_kernels.cpp: an element is one
// chain of kChain steps, such parts in order, then the lanes by halves, whichever tile it falls into. Products are exact in float32, so S is as exact as that
// of float32 rows, but for subnormal numbers, which count as zero. Dropout masks the rows and scales the sums.
#include "lora_pairs.h"

#include "lora_tiles.h"
#include "pairs.h"

#if defined(HETLORA_PAIRS)
#include "philox.h"
#endif

namespace hetlora {

#if defined(HETLORA_PAIRS)

namespace {

typedef VectorOf<float, 16>::type Sums;

constexpr int64_t kRows = 24, kStep = 32;    // columns of a step
constexpr int64_t kPart = 32 * kStep;        // columns of a chain: 64 additions on each lane
constexpr int kTileRows = 6, kTileRanks = 4;

// Columns `inside` of a step, then zeros.
HETLORA_AVX512 HETLORA_INLINE Sums load(const uint16_t* from, __mmask32 inside) { return reinterpret_cast<Sums>(_mm512_maskz_loadu_epi16(inside, from)); }

template <int I, int J>
HETLORA_AVX512 HETLORA_INLINE void add_step(const uint16_t* x, const uint16_t* a, int64_t ld, __mmask32 inside, Sums (&sums)[I][J]) {
    Sums right[J];
    for (int j = 0; j < J; ++j) {
        right[j] = load(a + j * ld, inside);
    }
    for (int i = 0; i < I; ++i) {
        const Sums left = load(x + i * ld, inside);
        for (int j = 0; j < J; ++j) {
            add_pairs(sums[i][j], left, right[j]);
        }
    }
}

// to[i J + j] (+)= the products of n columns.
template <int I, int J>
HETLORA_AVX512 HETLORA_INLINE void part(const uint16_t* x, const uint16_t* a, int64_t ld, int64_t n, bool add, Sums* to) {
    Sums sums[I][J] = {};
    int64_t c = 0;
    for (; c + kStep <= n; c += kStep) {
        add_step<I, J>(x + c, a + c, ld, 0xFFFFFFFFu, sums);
    }
    if (c < n) {
        add_step<I, J>(x + c, a + c, ld, static_cast<__mmask32>((1u << (n - c)) - 1), sums);
    }
    for (int i = 0; i < I; ++i) {
        for (int j = 0; j < J; ++j) {
            to[i * J + j] = add ? to[i * J + j] + sums[i][j] : sums[i][j];
        }
    }
}

template <int I, int J>
HETLORA_AVX512 HETLORA_INLINE void tile(const uint16_t* x, const uint16_t* a, int64_t n, float scale, float inverse, float* out, int64_t ld_out) {
    constexpr int count = (I * J + 15) / 16 * 16;
    Sums sums[count] = {};
    for (int64_t c = 0; c < n; c += kPart) {
        part<I, J>(x + c, a + c, n, std::min(n - c, kPart), c > 0, sums);
    }
    alignas(64) float values[count];
    HETLORA_UNROLL
    for (int k = 0; k < count; k += 16) {
        *reinterpret_cast<Sums*>(values + k) = scale * (inverse * sixteen_sums(sums + k));
    }
    for (int i = 0; i < I; ++i) {
        for (int j = 0; j < J; ++j) {
            out[i * ld_out + j] = values[i * J + j];
        }
    }
}

template <int I>
HETLORA_AVX512 HETLORA_INLINE void tile_rows(const uint16_t* x, const uint16_t* a, int64_t rank, int64_t n, float scale, float inverse, float* out) {
    int64_t j = 0;
    for (; j + kTileRanks <= rank; j += kTileRanks) {
        tile<I, kTileRanks>(x, a + j * n, n, scale, inverse, out + j, rank);
    }
    for (; j < rank; ++j) {
        tile<I, 1>(x, a + j * n, n, scale, inverse, out + j, rank);
    }
}

// out [rows, rank] = scale (inverse x a^T)
HETLORA_AVX512 void pair_dots(const uint16_t* x, int64_t rows, const uint16_t* a, int64_t rank, int64_t n, float scale, float inverse, float* out) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        tile_rows<kTileRows>(x + i * n, a, rank, n, scale, inverse, out + i * rank);
    }
    for (; i + 2 <= rows; i += 2) {
        tile_rows<2>(x + i * n, a, rank, n, scale, inverse, out + i * rank);
    }
    for (; i < rows; ++i) {
        tile_rows<1>(x + i * n, a, rank, n, scale, inverse, out + i * rank);
    }
}

struct Block {
    const Segment* segment;
    int64_t t;
};

}  // namespace

HETLORA_AVX512 void mask_row(const DropRow& row, const uint16_t* from, int64_t n, uint16_t* to) {
    const __m512i threshold = _mm512_set1_epi16(static_cast<short>(row.threshold));
    for (int64_t c = 0; c < n; c += 64) {
        const uint64_t keep = philox_keep_avx512(row.seed, row.key, static_cast<uint32_t>((row.column + c) / 8), threshold);
        for (int64_t half = 0; half < 64 && c + half < n; half += 32) {
            const int64_t left = n - c - half;
            const __mmask32 inside = left >= 32 ? 0xFFFFFFFFu : static_cast<__mmask32>((1u << left) - 1);
            _mm512_mask_storeu_epi16(to + c + half, inside, _mm512_maskz_loadu_epi16(inside & static_cast<__mmask32>(keep >> half), from + c + half));
        }
    }
}

bool by_pairs(Type rows, Type factor, int64_t rank) {
    static const bool usable = has_pairs();
    return usable && rows == Type::bf16 && factor == Type::bf16 && rank >= kPairedRank && !on_tiles(rows, rank);
}

void shrink_by_pairs(const RowWalk& walk, const Matrix& x, const Matrix& factor, const std::vector<double>& scale, float* out) {
    std::vector<Block> blocks;
    for (const Segment& segment : walk.segments) {
        for (int64_t t = by_pairs(x.type, factor.type, segment.rank) ? 0 : segment.length; t < segment.length; t += kRows) {
            blocks.push_back({&segment, t});
        }
    }
    const int64_t count = static_cast<int64_t>(blocks.size()), n = x.width, parts = part_count(count, walk.active_rows * n * size_of(x.type));
    const bool moves = walk.gathers() || walk.drops();
    std::vector<uint16_t> room(static_cast<size_t>(moves ? parts * kRows * n : 0));
    const float inverse = walk.drops() ? static_cast<float>(walk.inverse()) : 1;
    for_tasks(parts, count, [&](int64_t part, int64_t b) {
        const auto [segment, t] = blocks[b];
        const int64_t rank = segment->rank, height = std::min(kRows, segment->length - t);
        const auto at = [&](int64_t i) { return reinterpret_cast<const uint16_t*>(x.at(walk.source(*segment, t + i) * n)); };
        const uint16_t* own = at(0);
        if (moves) {
            uint16_t* to = room.data() + part * kRows * n;
            own = to;
            for (int64_t i = 0; i < height; ++i, to += n) {
                walk.drops() ? mask_row(walk.drop_row(*segment, t + i, 0), at(i), n, to) : static_cast<void>(std::copy_n(at(i), n, to));
            }
        }
        pair_dots(own, height, reinterpret_cast<const uint16_t*>(factor.at(segment->row * n)), rank, n, static_cast<float>(scale[segment->client]), inverse,
                  out + segment->flat + t * rank);
    });
}

#else

void mask_row(const DropRow&, const uint16_t*, int64_t, uint16_t*) {}
bool by_pairs(Type, Type, int64_t) { return false; }
void shrink_by_pairs(const RowWalk&, const Matrix&, const Matrix&, const std::vector<double>&, float*) {}

#endif

}  // namespace hetlora
