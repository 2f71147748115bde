// The layer's products on the tiles of tile_products.h, client by client. Dropout masks the rows and scales the sums.
#include "lora_tiles.h"

#include <iterator>

#include "tile_products.h"

#if defined(HETLORA_TILES)
#include "philox.h"
#endif

namespace hetlora {

#if defined(HETLORA_TILES)

using namespace tiles;

namespace {

constexpr int64_t kColumns = 512;  // columns of a product made beside the result

// Row t of a segment from `column` on: where it lies, or what dropout leaves of it, not scaled, in `room`.
HETLORA_AMX const uint16_t* own_row(const RowWalk& walk, const Matrix& x, const Segment& segment, int64_t t, int64_t column, int64_t columns, uint16_t* room) {
    const auto* from = reinterpret_cast<const uint16_t*>(x.at(walk.source(segment, t) * x.width + column));
    if (!walk.drops()) {
        return from;
    }
    const DropRow row = walk.drop_row(segment, t, column);
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

std::vector<Segment> tiled(const RowWalk& walk) {
    std::vector<Segment> out;
    for (const Segment& segment : walk.segments) {
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

int64_t workers(const RowWalk& walk, size_t tasks, int64_t width) { return part_count(static_cast<int64_t>(tasks), 2 * walk.active_rows * width); }

// The sums over rows [begin, begin + kPart) of each segment that has such, added to those before: what of S is packed stays in L2.
void gram_of_rows(const RowWalk& walk, const std::vector<Segment>& all, const Matrix& x, const float* s, int64_t begin, float* out) {
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
    for_tasks(workers(walk, ranks.size(), n), static_cast<int64_t>(ranks.size()), [&](int64_t, int64_t task) {
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
    const int64_t parts = workers(walk, strips.size(), n), right_size = Packed(kStrip, longest, 1).size;
    const Room rows(parts * (right_size + 2 * kStrip));
    for_tasks(parts, static_cast<int64_t>(strips.size()), [&](int64_t part, int64_t task) {
        const auto [segment, first] = strips[task];
        const int64_t rank = segment->rank, length = std::min(kPart, segment->length - begin), width = std::min(kStrip, n - first);
        const Packed left(rank, length, 3), right(kStrip, length, 1);
        uint16_t *own = rows.data() + part * (right_size + 2 * kStrip), *room = own + right_size;
        for (int64_t t = 0; t < length; t += 2) {
            const uint16_t* even = own_row(walk, x, *segment, begin + t, first, width, room);
            pack_pair(right, own, t / 2, even, t + 1 < length ? own_row(walk, x, *segment, begin + t + 1, first, width, room + kStrip) : nullptr, width);
        }
        clear_pairs(right, own, (length + 1) / 2, width);
        const float inverse = walk.drops() ? static_cast<float>(walk.inverse()) : 1;
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
    static const bool usable = instruction_set() == InstructionSet::amx && tiles::permitted();
    return rows == Type::bf16 && rank >= kTiledRank && usable;
}

void shrink_on_tiles(const RowWalk& walk, const Matrix& x, const Matrix& factor, const std::vector<double>& scale, float* out) {
    const std::vector<Segment> segments = tiled(walk);
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
    for_tasks(workers(walk, columns.size(), n), static_cast<int64_t>(columns.size()), [&](int64_t, int64_t task) {
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
    const int64_t parts = workers(walk, blocks.size(), n), row_size = up(n, 64);
    const Room rows(parts * (left.size + row_size));
    for_tasks(parts, static_cast<int64_t>(blocks.size()), [&](int64_t part, int64_t task) {
        const auto [segment, first] = blocks[task];
        const int64_t height = std::min(kBlock, segment->length - first), rank = segment->rank;
        uint16_t *own = rows.data() + part * (left.size + row_size), *row = own + left.size;
        for (int64_t t = 0; t < height; ++t) {
            pack_row(left, own, t, own_row(walk, x, *segment, first + t, 0, n, row), n);
        }
        clear_rows(left, own, height);
        const float factor_of = static_cast<float>(scale[segment->client]), inverse = walk.drops() ? static_cast<float>(walk.inverse()) : 1;
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

void expand_on_tiles(const RowWalk& walk, const Matrix& out, Type s_type, const void* s_data, const Matrix& factor) {
    const std::vector<Segment> segments = tiled(walk);
    const int64_t m = out.width;
    const Numbers numbers(factor.type, factor.data, factor.rows * m);
    const Operand<float> s(s_type, s_data, walk.flat);
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
    for_tasks(workers(walk, strips.size(), m), static_cast<int64_t>(strips.size()), [&](int64_t, int64_t task) {
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
    const int64_t parts = workers(walk, blocks.size(), m), left_size = Packed(kBlock, widest, 3).size, product_size = 2 * kBlock * kColumns;
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
                if (walk.drops()) {
                    lora_kernels<float>().drop(walk.drop_row(*segment, first + t, c), row, width, static_cast<float>(walk.inverse()), row);
                }
                add_block(out.type, out.at(walk.source(*segment, first + t) * m + c), row, width);
            }
        }
    });
}

void gram_on_tiles(const RowWalk& walk, const Matrix& x, const float* s, float* out) {
    const std::vector<Segment> segments = tiled(walk);
    int64_t longest = 0;
    for (const Segment& segment : segments) {
        longest = std::max(longest, segment.length);
    }
    for (int64_t t = 0; t < longest; t += kPart) {
        gram_of_rows(walk, segments, x, s, t, out);
    }
}

#else

bool on_tiles(Type, int64_t) { return false; }
void shrink_on_tiles(const RowWalk&, const Matrix&, const Matrix&, const std::vector<double>&, float*) {}
void expand_on_tiles(const RowWalk&, const Matrix&, Type, const void*, const Matrix&) {}
void gram_on_tiles(const RowWalk&, const Matrix&, const float*, float*) {}

#endif

}  // namespace hetlora
