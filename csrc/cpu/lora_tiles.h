// The products of clients of large rank beside bfloat16 rows, on the matrix tiles of a processor with AMX.
#pragma once

#include "lora.h"

namespace hetlora {

// From this rank on a client's products go to the tiles (docs/kernels-lora.md). It is asked of the client's own rank alone, so that its bits do not depend on
// the others of the batch.
constexpr int64_t kTiledRank = 32;

// Whether the products of a client of this rank with rows of this type go to the tiles.
bool on_tiles(Type rows, int64_t rank);

inline bool any_on_tiles(const RowWalk& walk, Type rows) {
    return std::any_of(walk.segments.begin(), walk.segments.end(), [&](const Segment& segment) { return on_tiles(rows, segment.rank); });
}

// shrink, expand_ and the sums of grouped_gram for the clients on the tiles; the others are left as they are.
void shrink_on_tiles(const RowWalk& walk, const Matrix& x, const Matrix& factor, const std::vector<double>& scale, float* out);
void expand_on_tiles(const RowWalk& walk, const Matrix& out, Type s_type, const void* s, const Matrix& factor);
void gram_on_tiles(const RowWalk& walk, const Matrix& x, const float* s, float* out);

}  // namespace hetlora
