// A product left [M, K] right [K, N] on AMX: a tile of 16 x 16 sums in float32 takes 16 x 32 bfloat16 numbers of the left and 32 x 16 of the right at a time.
//
// Exactness: float32 operands (S, and factors that are no bfloat16) are split into three bfloat16 numbers whose sum they are, and every product of two parts
// that reaches the 24th bit is made. So a sum is one of products of float32, as in lora_kernels.cpp, but for two things: its order, and numbers below 2^-126 (of
// a part as well), which the tiles take for zero. Dropout masks the rows and scales the sums.
//
// An element's bits depend on its own row, column, and the number of addends: each of its sums is one chain over blocks of 32 addends, in parts of kPart.
#include "lora_tiles.h"

#include <iterator>
#include <memory>

#if defined(HETLORA_TILES)
#include <sys/syscall.h>
#include <unistd.h>

#include "philox.h"
#endif

namespace hetlora {

#if defined(HETLORA_TILES)

namespace {

constexpr int64_t kSide = 16, kDepth = 32, kTile = kSide * kDepth;  // rows or columns, addends, and numbers of a tile
constexpr int64_t kBlock = 2 * kSide;  // rows and columns of a block of sums: four tiles
constexpr int64_t kPart = 1024;  // addends of a chain
constexpr int64_t kColumns = 512;  // columns of a product made beside the result

int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

bool permitted() {
    constexpr long kRequest = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, for all threads of the process
    return syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
}

struct alignas(64) TileShapes {
    uint8_t palette = 1, start = 0, reserved[14] = {};
    uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// The tiles of one thread, for the time of a task.
class Tiles {
  public:
    HETLORA_AMX Tiles() {
        static constexpr TileShapes shapes;
        _tile_loadconfig(&shapes);
    }
    HETLORA_AMX ~Tiles() { _tile_release(); }
    Tiles(const Tiles&) = delete;
    Tiles& operator=(const Tiles&) = delete;
};

// One operand in tiles: of each 16 rows (or columns), of each 32 addends, of each part, 512 numbers.
struct Packed {
    Packed(int64_t sides, int64_t depth, int64_t parts) : depths(up(depth, kDepth) / kDepth), parts(parts), size(up(sides, kBlock) * depths * kDepth * parts) {}
    uint16_t* tile(uint16_t* data, int64_t side, int64_t d) const { return data + (side / kSide * depths + d) * parts * kTile; }
    const uint16_t* tile(const uint16_t* data, int64_t side, int64_t d) const { return data + (side / kSide * depths + d) * parts * kTile; }

    int64_t depths, parts, size;
};

// Memory on a cache line's border, uninitialised.
class Room {
  public:
    explicit Room(int64_t count) : held_(new char[static_cast<size_t>(2 * count + 64)]) {}
    uint16_t* data() const { return reinterpret_cast<uint16_t*>((reinterpret_cast<uintptr_t>(held_.get()) + 63) & ~uintptr_t{63}); }

  private:
    std::unique_ptr<char[]> held_;
};

// Sixteen floats as three bfloat16 numbers each, in the upper halves: their sum is the float, whose 24 bits they share. What is not finite stays in the first.
HETLORA_AMX HETLORA_INLINE void split(__m512 value, __m512i (&parts)[3]) {
    const __m512i upper = _mm512_set1_epi32(static_cast<int>(0xFFFF0000u));
    const __mmask16 finite =
        _mm512_cmplt_epu32_mask(_mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7FFFFFFF)), _mm512_set1_epi32(0x7F800000));
    const __mmask16 nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
    parts[0] = _mm512_and_si512(_mm512_castps_si512(value), upper);
    parts[0] = _mm512_mask_or_epi32(parts[0], nan, parts[0], _mm512_set1_epi32(0x00400000));
    const __m512 rest = _mm512_maskz_sub_ps(finite, value, _mm512_castsi512_ps(parts[0]));
    parts[1] = _mm512_and_si512(_mm512_castps_si512(rest), upper);
    parts[2] = _mm512_castps_si512(_mm512_sub_ps(rest, _mm512_castsi512_ps(parts[1])));
}

HETLORA_AMX HETLORA_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }
HETLORA_AMX HETLORA_INLINE __mmask32 first32(int64_t n) { return n >= 32 ? 0xFFFFFFFFu : n <= 0 ? 0 : static_cast<__mmask32>((1u << n) - 1); }

// The tile's 16 x 16 pairs turned: between the left's form [row][pair of addends] and the right's [pair of addends][column].
HETLORA_AMX void turn(uint16_t* tile) {
    auto* pairs = reinterpret_cast<uint32_t*>(tile);
    __m512i rows[16], other[16];
    for (int i = 0; i < 16; ++i) {
        rows[i] = _mm512_load_si512(pairs + 16 * i);
    }
    for (int i = 0; i < 8; ++i) {
        other[2 * i] = _mm512_unpacklo_epi32(rows[2 * i], rows[2 * i + 1]);
        other[2 * i + 1] = _mm512_unpackhi_epi32(rows[2 * i], rows[2 * i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
        rows[4 * i] = _mm512_unpacklo_epi64(other[4 * i], other[4 * i + 2]);
        rows[4 * i + 1] = _mm512_unpackhi_epi64(other[4 * i], other[4 * i + 2]);
        rows[4 * i + 2] = _mm512_unpacklo_epi64(other[4 * i + 1], other[4 * i + 3]);
        rows[4 * i + 3] = _mm512_unpackhi_epi64(other[4 * i + 1], other[4 * i + 3]);
    }
    for (int i = 0; i < 4; ++i) {
        const __m512i low = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0x88), high = _mm512_shuffle_i32x4(rows[i], rows[4 + i], 0xDD);
        const __m512i low2 = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0x88), high2 = _mm512_shuffle_i32x4(rows[8 + i], rows[12 + i], 0xDD);
        other[i] = _mm512_shuffle_i32x4(low, low2, 0x88);
        other[8 + i] = _mm512_shuffle_i32x4(low, low2, 0xDD);
        other[4 + i] = _mm512_shuffle_i32x4(high, high2, 0x88);
        other[12 + i] = _mm512_shuffle_i32x4(high, high2, 0xDD);
    }
    for (int i = 0; i < 16; ++i) {
        _mm512_store_si512(pairs + 16 * i, other[i]);
    }
}

// Rows `side`, ... of a matrix whose addends lie side by side, in the left's form: `row` of the tiles from n numbers of one row.
HETLORA_AMX void pack_row(const Packed& to, uint16_t* data, int64_t side, const void* from, int64_t n) {
    for (int64_t d = 0; d < to.depths; ++d) {
        const int64_t left = n - d * kDepth;
        uint16_t* row = to.tile(data, side, d) + side % kSide * kDepth;
        if (to.parts == 1) {
            _mm512_store_si512(row, _mm512_maskz_loadu_epi16(first32(left), static_cast<const uint16_t*>(from) + d * kDepth));
            continue;
        }
        for (int64_t half = 0; half < 2; ++half) {
            __m512i parts[3];
            split(_mm512_maskz_loadu_ps(first(left - 16 * half), static_cast<const float*>(from) + d * kDepth + 16 * half), parts);
            for (int p = 0; p < 3; ++p) {
                _mm256_store_si256(reinterpret_cast<__m256i*>(row + p * kTile + 16 * half), _mm512_cvtepi32_epi16(_mm512_srli_epi32(parts[p], 16)));
            }
        }
    }
}

// The same for a matrix whose addends lie one below another, in the right's form: addends 2 pair and 2 pair + 1 (or none) of `width` columns.
HETLORA_AMX void pack_pair(const Packed& to, uint16_t* data, int64_t pair, const void* even, const void* odd, int64_t width) {
    for (int64_t side = 0; side < width; side += kSide) {
        const __mmask16 inside = first(width - side);
        uint16_t* row = to.tile(data, side, pair / 16) + pair % 16 * kDepth;
        if (to.parts == 1) {
            const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(even) + side));
            const __m512i high =
                odd == nullptr ? _mm512_setzero_si512() : _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(inside, static_cast<const uint16_t*>(odd) + side));
            _mm512_store_si512(row, _mm512_or_si512(low, _mm512_slli_epi32(high, 16)));
            continue;
        }
        __m512i low[3], high[3];
        split(_mm512_maskz_loadu_ps(inside, static_cast<const float*>(even) + side), low);
        split(odd == nullptr ? _mm512_setzero_ps() : _mm512_maskz_loadu_ps(inside, static_cast<const float*>(odd) + side), high);
        for (int p = 0; p < 3; ++p) {
            _mm512_store_si512(row + p * kTile,
                               _mm512_or_si512(_mm512_srli_epi32(low[p], 16), _mm512_and_si512(high[p], _mm512_set1_epi32(static_cast<int>(0xFFFF0000u)))));
        }
    }
}

// What no row fills: rows from `side` to a multiple of 16, left's form.
void clear_rows(const Packed& to, uint16_t* data, int64_t side) {
    for (; side % kBlock != 0; ++side) {
        for (int64_t d = 0; d < to.depths; ++d) {
            for (int64_t p = 0; p < to.parts; ++p) {
                std::memset(to.tile(data, side, d) + p * kTile + side % kSide * kDepth, 0, 2 * kDepth);
            }
        }
    }
}

// The same for addends: pairs from `pair` on, right's form.
void clear_pairs(const Packed& to, uint16_t* data, int64_t pair, int64_t width) {
    for (; pair < 16 * to.depths; ++pair) {
        for (int64_t side = 0; side < width; side += kSide) {
            for (int64_t p = 0; p < to.parts; ++p) {
                std::memset(to.tile(data, side, pair / 16) + p * kTile + pair % 16 * kDepth, 0, 2 * kDepth);
            }
        }
    }
}

void turn_all(const Packed& of, uint16_t* data, int64_t side) {
    for (int64_t i = 0; i < of.depths * of.parts; ++i) {
        turn(of.tile(data, side, 0) + i * kTile);
    }
}

// sums [32, 32] (+)= the addends of blocks [begin, end): J tiles of columns. The smallest products come first.
template <int I, int J>
HETLORA_AMX void multiply(const Packed& left, const uint16_t* l, const Packed& right, const uint16_t* r, int64_t begin, int64_t end, float* sums) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
    const int64_t most = std::max(left.parts, right.parts) - 1, next_l = left.depths * left.parts * kTile, next_r = right.depths * right.parts * kTile;
    for (int64_t order = most; order >= 0; --order) {
        for (int64_t p = std::max<int64_t>(0, order - right.parts + 1); p <= std::min(order, left.parts - 1); ++p) {
            const uint16_t *own_l = l + (begin * left.parts + p) * kTile, *own_r = r + (begin * right.parts + order - p) * kTile;
            for (int64_t d = begin; d < end; ++d, own_l += left.parts * kTile, own_r += right.parts * kTile) {
                _tile_loadd(4, own_l, 64);
                _tile_loadd(6, own_r, 64);
                _tile_dpbf16ps(0, 4, 6);
                if constexpr (J == 2) {
                    _tile_loadd(7, own_r + next_r, 64);
                    _tile_dpbf16ps(1, 4, 7);
                }
                if constexpr (I == 2) {
                    _tile_loadd(5, own_l + next_l, 64);
                    _tile_dpbf16ps(2, 5, 6);
                    if constexpr (J == 2) {
                        _tile_dpbf16ps(3, 5, 7);
                    }
                }
            }
        }
    }
    _tile_stored(0, sums, kBlock * 4);
    _tile_stored(1, sums + kSide, kBlock * 4);
    _tile_stored(2, sums + kSide * kBlock, kBlock * 4);
    _tile_stored(3, sums + kSide * kBlock + kSide, kBlock * 4);
}

// sums [32, 32] of rows `row`.. and columns `column`.. of the two operands.
HETLORA_AMX void block(const Packed& left, const uint16_t* l, int64_t row, int64_t rows, const Packed& right, const uint16_t* r, int64_t column,
                       int64_t columns, float* sums) {
    constexpr int64_t chain = kPart / kDepth;
    const uint16_t *own_l = left.tile(l, row, 0), *own_r = right.tile(r, column, 0);
    alignas(64) float more[kBlock * kBlock];
    for (int64_t d = 0; d < left.depths; d += chain) {
        const int64_t end = std::min(d + chain, left.depths);
        float* to = d == 0 ? sums : more;
        const bool both_rows = rows > kSide, both_columns = columns > kSide;
        both_rows      ? both_columns ? multiply<2, 2>(left, own_l, right, own_r, d, end, to) : multiply<2, 1>(left, own_l, right, own_r, d, end, to)
        : both_columns ? multiply<1, 2>(left, own_l, right, own_r, d, end, to)
                       : multiply<1, 1>(left, own_l, right, own_r, d, end, to);
        for (int64_t i = 0; d > 0 && i < kBlock * kBlock; ++i) {
            sums[i] += more[i];
        }
    }
}

// Row t of a segment from `column` on: where it lies, or what dropout leaves of it, not scaled, in `room`.
HETLORA_AMX const uint16_t* own_row(const Plan& plan, const Matrix& x, const Segment& segment, int64_t t, int64_t column, int64_t columns, uint16_t* room) {
    const auto* from = reinterpret_cast<const uint16_t*>(x.at(plan.source(segment, t) * x.width + column));
    if (!plan.drops()) {
        return from;
    }
    const DropRow row = plan.drop_row(segment, t, column);
    const __m512i threshold = _mm512_set1_epi16(static_cast<short>(row.threshold));
    for (int64_t c = 0; c < columns; c += 64) {
        const uint64_t keep = philox_keep_avx512(row.seed, row.key, static_cast<uint32_t>((column + c) / 8), threshold);
        for (int64_t half = 0; half < 64 && c + half < columns; half += 32) {
            const __mmask32 inside = first32(columns - c - half);
            const __m512i kept = _mm512_maskz_loadu_epi16(inside & static_cast<__mmask32>(keep >> half), from + c + half);
            _mm512_mask_storeu_epi16(room + c + half, inside, kept);
        }
    }
    return room;
}

std::vector<Segment> tiled(const Plan& plan) {
    std::vector<Segment> out;
    for (const Segment& segment : plan.segments) {
        if (segment.rank >= kTiledRank) {
            out.push_back(segment);
        }
    }
    return out;
}

struct Work {
    const Segment* segment;
    int64_t first;
};

// Every `step` of what `extent` counts in each segment.
template <class Extent>
std::vector<Work> pieces(const std::vector<Segment>& segments, int64_t step, const Extent& extent) {
    std::vector<Work> out;
    for (const Segment& segment : segments) {
        for (int64_t first = 0; first < extent(segment); first += step) {
            out.push_back({&segment, first});
        }
    }
    return out;
}

// A factor as bfloat16 where it is so, else as float32.
class Numbers {
  public:
    Numbers(Type type, const void* data, int64_t count) : parts(type == Type::bf16 ? 1 : 3), data_(static_cast<const char*>(data)) {
        if (type != Type::bf16) {
            floats_.emplace(type, data, count);
            data_ = reinterpret_cast<const char*>(*floats_ + 0);
        }
    }
    const void* at(int64_t i) const { return data_ + i * (parts == 1 ? 2 : 4); }

    int64_t parts;

  private:
    std::optional<Operand<float>> floats_;
    const char* data_;
};

int64_t workers(const Plan& plan, size_t tasks, int64_t width) { return part_count(static_cast<int64_t>(tasks), 2 * plan.active_rows * width); }

// The sums over rows [begin, begin + kPart) of each segment that has such, added to those before: what of S is packed stays in L2.
void gram_of_rows(const Plan& plan, const std::vector<Segment>& all, const Matrix& x, const float* s, int64_t begin, float* out) {
    std::vector<Segment> segments;
    std::copy_if(all.begin(), all.end(), std::back_inserter(segments), [&](const Segment& segment) { return segment.length > begin; });
    const int64_t n = x.width;
    Integers places;
    int64_t size = 0, longest = 0;
    for (const Segment& segment : segments) {
        const int64_t length = std::min(kPart, segment.length - begin);
        places.push_back(size);
        size += Packed(segment.rank, length, 3).size;
        longest = std::max(longest, length);
    }
    const Room packed(size);
    const auto place = [&](const Segment* segment) { return packed.data() + places[static_cast<size_t>(segment - segments.data())]; };
    const std::vector<Work> ranks = pieces(segments, kBlock, [](const Segment& segment) { return segment.rank; });
    for_tasks(workers(plan, ranks.size(), n), static_cast<int64_t>(ranks.size()), [&](int64_t, int64_t task) {
        const auto [segment, first] = ranks[task];
        const int64_t rank = segment->rank, length = std::min(kPart, segment->length - begin), width = std::min(kBlock, rank - first);
        const Packed left(rank, length, 3);
        uint16_t* own = left.tile(place(segment), first, 0);
        for (int64_t t = 0; t < length; t += 2) {
            const float* even = s + segment->flat + (begin + t) * rank + first;
            pack_pair(left, own, t / 2, even, t + 1 < length ? even + rank : nullptr, width);
        }
        clear_pairs(left, own, (length + 1) / 2, width);
        for (int64_t j = 0; j < width; j += kSide) {
            turn_all(left, own, j);
        }
    });
    constexpr int64_t kStrip = 64;  // columns of one block of draws
    const std::vector<Work> strips = pieces(segments, kStrip, [&](const Segment&) { return n; });
    const int64_t parts = workers(plan, strips.size(), n), right_size = Packed(kStrip, longest, 1).size;
    const Room rows(parts * (right_size + 2 * kStrip));
    for_tasks(parts, static_cast<int64_t>(strips.size()), [&](int64_t part, int64_t task) {
        const auto [segment, first] = strips[task];
        const int64_t rank = segment->rank, length = std::min(kPart, segment->length - begin), width = std::min(kStrip, n - first);
        const Packed left(rank, length, 3), right(kStrip, length, 1);
        uint16_t *own = rows.data() + part * (right_size + 2 * kStrip), *room = own + right_size;
        for (int64_t t = 0; t < length; t += 2) {
            const uint16_t* even = own_row(plan, x, *segment, begin + t, first, width, room);
            pack_pair(right, own, t / 2, even, t + 1 < length ? own_row(plan, x, *segment, begin + t + 1, first, width, room + kStrip) : nullptr, width);
        }
        clear_pairs(right, own, (length + 1) / 2, width);
        const float inverse = plan.drops() ? static_cast<float>(plan.inverse()) : 1;
        const Tiles tiles;
        alignas(64) float sums[kBlock * kBlock];
        for (int64_t i = 0; i < rank; i += kBlock) {
            for (int64_t j = 0; j < width; j += kBlock) {
                block(left, place(segment), i, rank - i, right, own, j, width - j, sums);
                for (int64_t row = 0; row < std::min(kBlock, rank - i); ++row) {
                    float* to = out + (segment->row + i + row) * n + first + j;
                    for (int64_t c = 0; c < std::min(kBlock, width - j); ++c) {
                        to[c] = begin == 0 ? inverse * sums[row * kBlock + c] : to[c] + inverse * sums[row * kBlock + c];
                    }
                }
            }
        }
    });
}

}  // namespace

bool on_tiles(Type rows, int64_t rank) {
    static const bool usable = instruction_set() == InstructionSet::amx && permitted();
    return rows == Type::bf16 && rank >= kTiledRank && usable;
}

void shrink_on_tiles(const Plan& plan, const Matrix& x, const Matrix& factor, const std::vector<double>& scale, float* out) {
    const std::vector<Segment> segments = tiled(plan);
    const int64_t n = x.width;
    const Numbers numbers(factor.type, factor.data, factor.rows * n);
    const Packed right(0, n, numbers.parts), left(kBlock, n, 1);
    Integers places;
    int64_t size = 0;
    for (const Segment& segment : segments) {
        places.push_back(size);
        size += Packed(segment.rank, n, numbers.parts).size;
    }
    const Room packed(size);
    const auto place = [&](const Segment* segment) { return packed.data() + places[static_cast<size_t>(segment - segments.data())]; };
    const std::vector<Work> columns = pieces(segments, kBlock, [](const Segment& segment) { return segment.rank; });
    for_tasks(workers(plan, columns.size(), n), static_cast<int64_t>(columns.size()), [&](int64_t, int64_t task) {
        const auto [segment, first] = columns[task];
        const int64_t end = std::min(segment->rank, first + kBlock);
        for (int64_t j = first; j < end; ++j) {
            pack_row(right, place(segment), j, numbers.at((segment->row + j) * n), n);
        }
        clear_rows(right, place(segment), end);
        for (int64_t j = first; j < first + kBlock; j += kSide) {
            turn_all(right, place(segment), j);
        }
    });
    const std::vector<Work> blocks = pieces(segments, kBlock, [](const Segment& segment) { return segment.length; });
    const int64_t parts = workers(plan, blocks.size(), n), row_size = up(n, 64);
    const Room rows(parts * (left.size + row_size));
    for_tasks(parts, static_cast<int64_t>(blocks.size()), [&](int64_t part, int64_t task) {
        const auto [segment, first] = blocks[task];
        const int64_t height = std::min(kBlock, segment->length - first), rank = segment->rank;
        uint16_t *own = rows.data() + part * (left.size + row_size), *row = own + left.size;
        for (int64_t t = 0; t < height; ++t) {
            pack_row(left, own, t, own_row(plan, x, *segment, first + t, 0, n, row), n);
        }
        clear_rows(left, own, height);
        const float factor_of = static_cast<float>(scale[segment->client]), inverse = plan.drops() ? static_cast<float>(plan.inverse()) : 1;
        const Tiles tiles;
        alignas(64) float sums[kBlock * kBlock];
        for (int64_t j = 0; j < rank; j += kBlock) {
            const int64_t width = std::min(kBlock, rank - j);
            block(left, own, 0, height, right, place(segment), j, width, sums);
            for (int64_t t = 0; t < height; ++t) {
                float* to = out + segment->flat + (first + t) * rank + j;
                for (int64_t c = 0; c < width; ++c) {
                    to[c] = factor_of * (inverse * sums[t * kBlock + c]);
                }
            }
        }
    });
}

void expand_on_tiles(const Plan& plan, const Matrix& out, Type s_type, const void* s_data, const Matrix& factor) {
    const std::vector<Segment> segments = tiled(plan);
    const int64_t m = out.width;
    const Numbers numbers(factor.type, factor.data, factor.rows * m);
    const Operand<float> s(s_type, s_data, plan.flat);
    Integers places;
    int64_t size = 0, widest = 0;
    for (const Segment& segment : segments) {
        places.push_back(size);
        size += Packed(m, segment.rank, numbers.parts).size;
        widest = std::max(widest, segment.rank);
    }
    const Room packed(size);
    const auto place = [&](const Segment* segment) { return packed.data() + places[static_cast<size_t>(segment - segments.data())]; };
    constexpr int64_t kStrip = 128;
    const std::vector<Work> strips = pieces(segments, kStrip, [&](const Segment&) { return m; });
    for_tasks(workers(plan, strips.size(), m), static_cast<int64_t>(strips.size()), [&](int64_t, int64_t task) {
        const auto [segment, first] = strips[task];
        const int64_t rank = segment->rank, width = std::min(kStrip, m - first);
        const Packed right(m, rank, numbers.parts);
        uint16_t* own = right.tile(place(segment), first, 0);
        for (int64_t j = 0; j < rank; j += 2) {
            pack_pair(right, own, j / 2, numbers.at((segment->row + j) * m + first), j + 1 < rank ? numbers.at((segment->row + j + 1) * m + first) : nullptr,
                      width);
        }
        clear_pairs(right, own, (rank + 1) / 2, width);
    });
    const std::vector<Work> blocks = pieces(segments, kBlock, [](const Segment& segment) { return segment.length; });
    const int64_t parts = workers(plan, blocks.size(), m), left_size = Packed(kBlock, widest, 3).size, product_size = 2 * kBlock * kColumns;
    const Room rows(parts * (left_size + product_size));
    for_tasks(parts, static_cast<int64_t>(blocks.size()), [&](int64_t part, int64_t task) {
        const auto [segment, first] = blocks[task];
        const int64_t height = std::min(kBlock, segment->length - first), rank = segment->rank;
        const Packed left(kBlock, rank, 3), right(m, rank, numbers.parts);
        uint16_t* own = rows.data() + part * (left_size + product_size);
        auto* product = reinterpret_cast<float*>(own + left_size);
        for (int64_t t = 0; t < height; ++t) {
            pack_row(left, own, t, s + (segment->flat + (first + t) * rank), rank);
        }
        clear_rows(left, own, height);
        const Tiles tiles;
        alignas(64) float sums[kBlock * kBlock];
        for (int64_t c = 0; c < m; c += kColumns) {
            const int64_t width = std::min(kColumns, m - c);
            for (int64_t j = 0; j < width; j += kBlock) {
                block(left, own, 0, height, right, place(segment), c + j, width - j, sums);
                for (int64_t t = 0; t < height; ++t) {
                    std::copy_n(sums + t * kBlock, std::min(kBlock, width - j), product + t * kColumns + j);
                }
            }
            for (int64_t t = 0; t < height; ++t) {
                float* row = product + t * kColumns;
                if (plan.drops()) {
                    lora_kernels<float>().drop(plan.drop_row(*segment, first + t, c), row, width, static_cast<float>(plan.inverse()), row);
                }
                add_block(out.type, out.at(plan.source(*segment, first + t) * m + c), row, width);
            }
        }
    });
}

void gram_on_tiles(const Plan& plan, const Matrix& x, const float* s, float* out) {
    const std::vector<Segment> segments = tiled(plan);
    int64_t longest = 0;
    for (const Segment& segment : segments) {
        longest = std::max(longest, segment.length);
    }
    for (int64_t t = 0; t < longest; t += kPart) {
        gram_of_rows(plan, segments, x, s, t, out);
    }
}

#else

bool on_tiles(Type, int64_t) { return false; }
void shrink_on_tiles(const Plan&, const Matrix&, const Matrix&, const std::vector<double>&, float*) {}
void expand_on_tiles(const Plan&, const Matrix&, Type, const void*, const Matrix&) {}
void gram_on_tiles(const Plan&, const Matrix&, const float*, float*) {}

#endif

}  // namespace hetlora
