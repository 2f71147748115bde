// Products of clients whose S is made of pairs (lora_pairs.h), where both factors are bfloat16. S and dS are rounded to bfloat16 where they are multiplied, as
// PEFT rounds them. Every product is one of pairs (AVX512-BF16).
#pragma once

#include "lora_pairs.h"

namespace hetlora {

// Whether a call on these types has such clients: all three are bfloat16, and pairs are used.
inline bool rounds(Type rows, Type a, Type bt) { return by_pairs(rows, a, kPairedRank) && by_pairs(rows, bt, kPairedRank); }

// Whether this client is one, in a call that `rounds`.
inline bool is_rounded(bool rounded, int64_t rank) { return rounded && rank >= kPairedRank; }

// shrink of d_y, expand_ and grouped_gram for the rounded clients. Results of other clients stay as they are.
// `lies_transposed`: the memory of `factor`, or of its gradient `out`, is that of its transpose. It changes no bit of a result.
void shrink_rounded(const RowWalk& walk, const Matrix& d_y, const Matrix& factor, bool lies_transposed, const std::vector<double>& scale, float* out);
void expand_rounded(const RowWalk& walk, const Matrix& out, const float* s, const Matrix& factor, bool lies_transposed);
void gram_rounded(const RowWalk& walk, const Matrix& x, const float* s, bool lies_transposed, const Tensor& out);

}  // namespace hetlora
