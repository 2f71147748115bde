// dS = scale_k dY B, out += S F, S^T x from bfloat16 numbers, two products an instruction, for clients whose S is rounded.
//
// All three are one form: a left operand whose pairs of addends are broadcast, and a right operand whose addends lie in pairs column by column, in strips of 64
// columns. A tile is 6 x 4 vectors of sums; its strip, kChunk addends deep, stays in L1 while the left passes. A pair is two columns of d_y where they lie, two
// ranks of S, or two rows of S beside two of x; an odd one has a zero partner. S is rounded while its pairs are made. An element is a chain of kChunk addends,
// such parts in order, whichever tile it falls into. Subnormal numbers count as zero. Dropout masks x, or the product that is added to dx.
// Bytes: x, S and the factors once, paired ones again from L2, the result once. B is read, and its gradient written, as PEFT keeps it: transposing them whole took
// a tenth of the layer's time at 64 rows of 4096 columns.
#include "lora_rounded.h"

#include "pairs.h"

#if defined(HETLORA_PAIRS)
#include <immintrin.h>

#include <iterator>
#endif

namespace hetlora {

#if defined(HETLORA_PAIRS)

namespace {

typedef VectorOf<float, 16>::type Sums;
typedef uint32_t Pair __attribute__((aligned(2), may_alias));  // two bfloat16 numbers, where they lie

constexpr int kTileRows = 6;
constexpr int64_t kRows = 24;  // rows of a product that is added to the result together
constexpr int64_t kStrip = 64;  // columns of a strip of the right operand, and of a block of draws
constexpr int64_t kChunk = 128;  // addends of a chain
constexpr int64_t kPacked = 256;  // columns of a factor that are paired together
constexpr int64_t kBlock = 48;  // ranks of a gradient that are made beside their place

HETLORA_AVX512 HETLORA_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }

// 16 floats rounded to bfloat16, each in the low half of a lane.
HETLORA_AVX512 HETLORA_INLINE __m512i rounded(__mmask16 inside, const float* from) {
    const __m512 x = _mm512_maskz_loadu_ps(inside, from);
    const __m512i bits = _mm512_castps_si512(x), odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i nearest = _mm512_srli_epi32(_mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), odd), 16);
    return _mm512_mask_mov_epi32(nearest, _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q), _mm512_set1_epi32(0x7FC0));
}

// A row of n floats as bfloat16, and a zero after an odd number.
HETLORA_AVX512 void round_row(const float* from, int64_t n, uint16_t* to) {
    for (int64_t j = 0; j < n; j += 16) {
        _mm512_mask_cvtepi32_storeu_epi16(to + j, first(n + (n & 1) - j), rounded(first(n - j), from + j));
    }
}

// A strip of two rows of floats as pairs of bfloat16; no odd row, and columns from n on: zeros.
HETLORA_AVX512 void round_rows(const float* even, const float* odd, int64_t n, uint32_t* to) {
    for (int64_t c = 0; c < kStrip; c += 16) {
        const __mmask16 inside = first(n - c);
        const __m512i low = rounded(inside, even + c), high = odd == nullptr ? _mm512_setzero_si512() : rounded(inside, odd + c);
        _mm512_store_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// The same of bfloat16 rows.
HETLORA_AVX512 void pair_rows(const uint16_t* even, const uint16_t* odd, int64_t width, uint32_t* to) {
    for (int64_t c = 0; c < kStrip; c += 16) {
        const __mmask16 inside = first(width - c);
        const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, even + c));
        const __m512i high = odd == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, odd + c));
        _mm512_store_si512(to + c, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
    }
}

// Rank rows as pairs, one strip of their columns after another.
HETLORA_AVX512 void pair_rank_rows(const uint16_t* from, int64_t ld, int64_t rank, int64_t width, uint32_t* to) {
    const int64_t depth = (rank + 1) / 2;
    for (int64_t d = 0; d < depth; ++d) {
        const uint16_t* even = from + 2 * d * ld;
        for (int64_t c = 0; c < width; c += kStrip) {
            pair_rows(even + c, 2 * d + 1 < rank ? even + ld + c : nullptr, width - c, to + c * depth + d * kStrip);
        }
    }
}

// A strip of a factor that lies column by column: to[j * kStrip + c] = (from[c * ld + 2 j], from[c * ld + 2 j + 1]), with zeros beside the numbers that are.
void pair_transposed(const uint16_t* from, int64_t ld, int64_t width, int64_t rank, uint32_t* room, uint32_t* to) {
    const int64_t pairs = (rank + 1) / 2;
    if (ld == rank && rank % 2 == 0 && width >= kStrip) {
        transpose_block(4, from, kStrip, pairs, to);
        return;
    }
    for (int64_t c = 0; c < kStrip; ++c) {
        auto* row = reinterpret_cast<uint16_t*>(room + c * pairs);
        row[2 * pairs - 1] = 0;
        c < width ? std::copy_n(from + c * ld, rank, row) : std::fill_n(row, rank, uint16_t{0});
    }
    transpose_block(4, room, kStrip, pairs, to);
}

// out[i * ld_out + c] (+)= sum over d of the pairs left[i * left_row + d * left_step] . right[d * kStrip + c], for a strip. An element is one chain over d,
// whichever tile it falls into.
template <int I>
HETLORA_AVX512 HETLORA_INLINE void outer_tile(const Pair* left, int64_t left_row, int64_t left_step, const uint32_t* right, int64_t depth, float* out,
                                              int64_t ld_out, bool add) {
    constexpr int J = kStrip / 16;
    Sums sums[I][J] = {};
    for (int64_t d = 0; d < depth; ++d) {
        Sums values[J];
        for (int j = 0; j < J; ++j) {
            values[j] = reinterpret_cast<Sums>(_mm512_load_si512(right + d * kStrip + 16 * j));
        }
        for (int i = 0; i < I; ++i) {
            const Sums factor = reinterpret_cast<Sums>(_mm512_set1_epi32(static_cast<int>(left[i * left_row + d * left_step])));
            for (int j = 0; j < J; ++j) {
                add_pairs(sums[i][j], factor, values[j]);
            }
        }
    }
    for (int i = 0; i < I; ++i) {
        for (int j = 0; j < J; ++j) {
            Sums* to = reinterpret_cast<Sums*>(out + i * ld_out + 16 * j);
            *to = add ? *to + sums[i][j] : sums[i][j];
        }
    }
}

HETLORA_AVX512 void outer_pairs(const Pair* left, int64_t left_row, int64_t left_step, const uint32_t* right, int64_t depth, int64_t rows, float* out,
                                int64_t ld_out, bool add) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows) {
        outer_tile<kTileRows>(left + i * left_row, left_row, left_step, right, depth, out + i * ld_out, ld_out, add);
    }
    for (; i + 2 <= rows; i += 2) {
        outer_tile<2>(left + i * left_row, left_row, left_step, right, depth, out + i * ld_out, ld_out, add);
    }
    for (; i < rows; ++i) {
        outer_tile<1>(left + i * left_row, left_row, left_step, right, depth, out + i * ld_out, ld_out, add);
    }
}

// to[c] = scale * from[c]
HETLORA_AVX512 void scaled(const float* from, int64_t n, float scale, float* to) {
    for (int64_t c = 0; c < n; ++c) {
        to[c] = scale * from[c];
    }
}

const uint16_t* numbers(const Matrix& matrix, int64_t i) { return reinterpret_cast<const uint16_t*>(matrix.at(i)); }

// Every `step` of what `extent` counts in each segment, and where in memory of `size(segment)` numbers each segment begins.
struct Work {
    template <class Extent, class Size>
    Work(const std::vector<Segment>& segments, int64_t step, const Extent& extent, const Size& size) {
        for (const Segment& segment : segments) {
            for (int64_t first = 0; first < extent(segment); first += step) {
                pieces.push_back({&segment, first, room});
            }
            room += size(segment);
        }
    }

    struct Piece {
        const Segment* segment;
        int64_t first, place;
    };
    int64_t count() const { return static_cast<int64_t>(pieces.size()); }
    std::vector<Piece> pieces;
    int64_t room = 0;
};

std::vector<Segment> rounded_segments(const RowWalk& walk) {
    std::vector<Segment> out;
    std::copy_if(walk.segments.begin(), walk.segments.end(), std::back_inserter(out), [](const Segment& segment) { return is_rounded(true, segment.rank); });
    return out;
}

int64_t halves(int64_t n) { return (n + 1) / 2; }

}  // namespace

// The factor is paired once; a task is kRows rows of d_y where they lie, multiplied by a strip of ranks in parts of kChunk columns.
void shrink_rounded(const RowWalk& walk, const Matrix& d_y, const Matrix& factor, bool lies_transposed, const std::vector<double>& scale, float* out) {
    const std::vector<Segment> segments = rounded_segments(walk);
    const int64_t m = d_y.width, depth = halves(m), bytes = walk.active_rows * m * size_of(d_y.type);
    if (m == 0) {
        for (const Segment& segment : segments) {
            std::fill_n(out + segment.flat, segment.length * segment.rank, 0.0f);
        }
        return;
    }
    const auto size = [&](const Segment& segment) { return (segment.rank + kStrip - 1) / kStrip * kStrip * depth; };
    const Work packing(segments, kStrip, [](const Segment& segment) { return segment.rank; }, size);
    const Aligned<uint32_t> right(packing.room);
    const int64_t packers = part_count(packing.count(), bytes), copy_size = lies_transposed ? 0 : kStrip * depth;
    const Aligned<uint32_t> copies(packers * copy_size);
    for_tasks(packers, packing.count(), [&](int64_t part, int64_t task) {
        const auto [segment, j, place] = packing.pieces[static_cast<size_t>(task)];
        uint32_t* to = right.data() + place + j * depth;
        if (!lies_transposed) {
            pair_transposed(numbers(factor, (segment->row + j) * m), m, segment->rank - j, m, copies.data() + part * copy_size, to);
            return;
        }
        const uint16_t* from = numbers(factor, segment->row + j);
        for (int64_t c = 0; c < m; c += 2) {
            const uint16_t* even = from + c * factor.width;
            pair_rows(even, c + 1 < m ? even + factor.width : nullptr, segment->rank - j, to + c / 2 * kStrip);
        }
    });
    const Work blocks(segments, kRows, [](const Segment& segment) { return segment.length; }, size);
    const bool moves = walk.gathers() || m % 2 == 1;
    const int64_t parts = part_count(blocks.count(), bytes), left_size = moves ? kRows * 2 * depth : 0, block_size = kRows * kStrip;
    const Aligned<uint16_t> lefts(parts * left_size);
    const Aligned<float> sums(parts * block_size);
    for_tasks(parts, blocks.count(), [&](int64_t part, int64_t task) {
        const auto [segment, t, place] = blocks.pieces[static_cast<size_t>(task)];
        const int64_t rank = segment->rank, height = std::min(kRows, segment->length - t);
        const uint16_t* left = numbers(d_y, walk.source(*segment, t) * m);
        if (moves) {
            uint16_t* to = lefts.data() + part * left_size;
            left = to;
            for (int64_t i = 0; i < height; ++i, to += 2 * depth) {
                to[2 * depth - 1] = 0;
                std::copy_n(numbers(d_y, walk.source(*segment, t + i) * m), m, to);
            }
        }
        float* block = sums.data() + part * block_size;
        for (int64_t j = 0; j < rank; j += kStrip) {
            for (int64_t d = 0; d < depth; d += kChunk / 2) {
                outer_pairs(reinterpret_cast<const Pair*>(left) + d, depth, 1, right.data() + place + j * depth + d * kStrip, std::min(kChunk / 2, depth - d),
                            height, block, kStrip, d > 0);
            }
            for (int64_t i = 0; i < height; ++i) {
                scaled(block + i * kStrip, std::min(kStrip, rank - j), static_cast<float>(scale[segment->client]), out + segment->flat + (t + i) * rank + j);
            }
        }
    });
}

// A task is kPacked columns of one client: its part of the factor is paired, and multiplied by the client's rows, kRows at a time.
void expand_rounded(const RowWalk& walk, const Matrix& out, const float* s, const Matrix& factor, bool lies_transposed) {
    const std::vector<Segment> segments = rounded_segments(walk);
    const int64_t m = out.width, bytes = 2 * walk.active_rows * m * size_of(out.type);
    const auto size = [](const Segment& segment) { return segment.length * halves(segment.rank); };
    const Work rows(segments, kRows, [](const Segment& segment) { return segment.length; }, size);
    const Aligned<uint32_t> left(rows.room);
    for_tasks(part_count(rows.count(), bytes), rows.count(), [&](int64_t, int64_t task) {
        const auto [segment, first, place] = rows.pieces[static_cast<size_t>(task)];
        const int64_t rank = segment->rank;
        for (int64_t t = first; t < std::min(segment->length, first + kRows); ++t) {
            round_row(s + segment->flat + t * rank, rank, reinterpret_cast<uint16_t*>(left.data() + place + t * halves(rank)));
        }
    });
    int64_t widest = 0;
    for (const Segment& segment : segments) {
        widest = std::max(widest, segment.rank);
    }
    const Work columns(segments, kPacked, [&](const Segment&) { return m; }, size);
    constexpr int64_t ld = kPacked + 16, product_size = kRows * ld;
    const int64_t parts = part_count(columns.count(), bytes), right_size = kPacked * halves(widest), copy_size = kStrip * halves(widest);
    const Aligned<uint32_t> rights(parts * (right_size + copy_size));
    const Aligned<float> products(parts * product_size);
    for_tasks(parts, columns.count(), [&](int64_t part, int64_t task) {
        const auto [segment, c, place] = columns.pieces[static_cast<size_t>(task)];
        const int64_t rank = segment->rank, depth = halves(rank), width = std::min(kPacked, m - c);
        uint32_t *right = rights.data() + part * (right_size + copy_size), *copy = right + right_size;
        if (lies_transposed) {
            for (int64_t i = 0; i < width; i += kStrip) {
                pair_transposed(numbers(factor, (c + i) * factor.width + segment->row), factor.width, width - i, rank, copy, right + i * depth);
            }
        } else {
            pair_rank_rows(numbers(factor, segment->row * m + c), m, rank, width, right);
        }
        float* product = products.data() + part * product_size;
        for (int64_t t = 0; t < segment->length; t += kRows) {
            const int64_t height = std::min(kRows, segment->length - t);
            for (int64_t i = 0; i < width; i += kStrip) {
                for (int64_t d = 0; d < depth; d += kChunk / 2) {
                    outer_pairs(left.data() + place + t * depth + d, depth, 1, right + i * depth + d * kStrip, std::min(kChunk / 2, depth - d), height,
                                product + i, ld, d > 0);
                }
            }
            for (int64_t i = 0; i < height; ++i) {
                float* own = product + i * ld;
                if (walk.drops()) {
                    lora_kernels<float>().drop(walk.drop_row(*segment, t + i, c), own, width, static_cast<float>(walk.inverse()), own);
                }
                add_block(out.type, out.at(walk.source(*segment, t + i) * m + c), own, width);
            }
        }
    });
}

// S is paired by rows once; a task is a strip of columns of one client, whose rows are paired too, and kBlock ranks after another.
void gram_rounded(const RowWalk& walk, const Matrix& x, const float* s, bool lies_transposed, const Tensor& out_tensor) {
    const std::vector<Segment> segments = rounded_segments(walk);
    const int64_t n = x.width, bytes = walk.active_rows * n * size_of(x.type);
    // An odd number of cache lines from one pair of rows to the next: a column of them does not fall into a few sets of the cache.
    const auto stride = [](const Segment& segment) { return (segment.rank + kStrip - 1) / kStrip * kStrip + 16; };
    const auto size = [&](const Segment& segment) { return halves(segment.length) * stride(segment); };
    const Work rows(segments, kChunk, [](const Segment& segment) { return segment.length; }, size);
    const Aligned<uint32_t> left(rows.room);
    for_tasks(part_count(rows.count(), bytes), rows.count(), [&](int64_t, int64_t task) {
        const auto [segment, first, place] = rows.pieces[static_cast<size_t>(task)];
        for (int64_t t = first; t < std::min(segment->length, first + kChunk); t += 2) {
            const float* even = s + segment->flat + t * segment->rank;
            const float* odd = t + 1 < segment->length ? even + segment->rank : nullptr;
            for (int64_t j = 0; j < segment->rank; j += kStrip) {
                round_rows(even + j, odd == nullptr ? nullptr : odd + j, segment->rank - j, left.data() + place + t / 2 * stride(*segment) + j);
            }
        }
    });
    int64_t longest = 0;
    for (const Segment& segment : segments) {
        longest = std::max(longest, segment.length);
    }
    const Work strips(segments, kStrip, [&](const Segment&) { return n; }, size);
    const int64_t parts = part_count(strips.count(), bytes), right_size = halves(longest) * kStrip, block_size = kBlock * kStrip;
    const Aligned<uint32_t> rights(parts * right_size);
    const Aligned<float> blocks(parts * 5 * block_size);  // sums, and twice of any type
    const Type type = type_of("out", out_tensor);
    const float inverse = walk.drops() ? static_cast<float>(walk.inverse()) : 1;
    auto* out = static_cast<char*>(const_cast<void*>(out_tensor.const_data_ptr()));
    for_tasks(parts, strips.count(), [&](int64_t part, int64_t task) {
        const auto [segment, c, place] = strips.pieces[static_cast<size_t>(task)];
        const int64_t width = std::min(kStrip, n - c);
        uint32_t* right = rights.data() + part * right_size;
        for (int64_t t = 0; t < segment->length; t += 2) {
            uint16_t room[2 * kStrip];
            const auto row = [&, segment = segment, c = c](int64_t of, uint16_t* kept) -> const uint16_t* {
                const uint16_t* from = numbers(x, walk.source(*segment, of) * n + c);
                if (!walk.drops()) {
                    return from;
                }
                mask_row(walk.drop_row(*segment, of, c), from, width, kept);
                return kept;
            };
            pair_rows(row(t, room), t + 1 < segment->length ? row(t + 1, room + kStrip) : nullptr, width, right + t / 2 * kStrip);
        }
        float* block = blocks.data() + part * 5 * block_size;
        char *stored = reinterpret_cast<char*>(block + block_size), *by_columns = reinterpret_cast<char*>(block + 3 * block_size);
        for (int64_t i = 0; i < segment->rank; i += kBlock) {
            const int64_t height = std::min(kBlock, segment->rank - i), step = size_of(type);
            for (int64_t t = 0; t < segment->length; t += kChunk) {
                outer_pairs(left.data() + place + t / 2 * stride(*segment) + i, 1, stride(*segment), right + t / 2 * kStrip,
                            halves(std::min(kChunk, segment->length - t)), height, block, kStrip, t > 0);
            }
            if (walk.drops()) {
                scaled(block, height * kStrip, inverse, block);
            }
            store_block(type, stored, block, height * kStrip);
            if (lies_transposed) {
                transpose_block(step, stored, height, kStrip, by_columns);
                for (int64_t j = 0; j < width; ++j) {
                    std::copy_n(by_columns + j * height * step, height * step, out + ((c + j) * walk.rank_rows + segment->row + i) * step);
                }
            } else {
                for (int64_t j = 0; j < height; ++j) {
                    std::copy_n(stored + j * kStrip * step, width * step, out + ((segment->row + i + j) * n + c) * step);
                }
            }
        }
    });
}

#else

void shrink_rounded(const RowWalk&, const Matrix&, const Matrix&, bool, const std::vector<double>&, float*) {}
void expand_rounded(const RowWalk&, const Matrix&, const float*, const Matrix&, bool) {}
void gram_rounded(const RowWalk&, const Matrix&, const float*, bool, const Tensor&) {}

#endif

}  // namespace hetlora
