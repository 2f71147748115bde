// S of clients of large rank whose rows and factor are both bfloat16, on a processor that multiplies pairs of such numbers (AVX512-BF16).
#pragma once

#include "lora.h"

namespace hetlora {

// From this rank on a client's S is made of pairs (docs/kernels-lora.md). It is asked of the client's own rank alone, so that its bits do not depend on the
// others of the batch.
constexpr int64_t kPairedRank = 32;

// Whether S of a client of this rank is made of pairs.
bool by_pairs(Type rows, Type factor, int64_t rank);

inline bool any_by_pairs(const RowWalk& walk, Type rows, Type factor) {
    return std::any_of(walk.segments.begin(), walk.segments.end(), [&](const Segment& segment) { return by_pairs(rows, factor, segment.rank); });
}

// shrink for these clients; the others are left as they are.
void shrink_by_pairs(const RowWalk& walk, const Matrix& x, const Matrix& factor, const std::vector<double>& scale, float* out);

// What dropout leaves of a bfloat16 row, not scaled; only where `by_pairs` may be.
void mask_row(const DropRow& row, const uint16_t* from, int64_t n, uint16_t* to);

}  // namespace hetlora
