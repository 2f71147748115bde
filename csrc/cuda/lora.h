// What a launch of a LoRA kernel is told: plain data, the whole of it kernel arguments. Up to NEAR clients with work travel in the arguments themselves, so
// that a call is one launch; only a larger table is uploaded first.
#pragma once
#include <cstdint>

#include "table.h"

namespace hetlora {

constexpr int LORA_ROWS = 64;     // rows of x in a tile of shrink and expand
constexpr int LORA_COLUMNS = 64;  // columns in a tile of expand and grouped Gram
constexpr int LORA_DEPTH = 128;   // bytes of a row in one stage of a tile
constexpr int SHRINK_COLUMNS = 1024, SHRINK_SPLITS = 8;  // the fewest columns of x in one split of shrink, the most splits
constexpr int GRAM_ROWS = 1024;   // rows of a segment in one split of its grouped Gram: fixed, so that the order of sums is the client's own
constexpr int NEAR = 64;

// Columns of x in one split of shrink: of the width alone, so that the order of sums is the same in every batch. A multiple of 64.
HETLORA_HOST_DEVICE constexpr int shrink_columns(int width) {
    const int own = (width + SHRINK_SPLITS * 64 - 1) / (SHRINK_SPLITS * 64) * 64;
    return own > SHRINK_COLUMNS ? own : SHRINK_COLUMNS;
}
HETLORA_HOST_DEVICE constexpr int shrink_splits(int width) { return width ? (width + shrink_columns(width) - 1) / shrink_columns(width) : 1; }

// A client that has rank and rows.
struct LoraClient {
    int64_t flat;   // first element of its S
    int64_t plane;  // first row of its planes of partial sums; -1: it has one chunk and needs none
    int client, row, rank, start, length;  // first rank row; first of its rows in x, or in the index
    int tiles, chunks;                     // row tiles, and chunks of GRAM_ROWS, of the clients before it
};

static_assert(sizeof(LoraClient) % 16 == 0, "what an upload copies at a time");

struct LoraTable {
    const LoraClient* far;  // null: near
    int count;
    LoraClient near[NEAR];
};

// Null where an op has no such tensor.
struct LoraCall {
    const void *x, *factor;  // x [T, width]; rank rows [S, width] in x's type with these strides
    int64_t factor_row, factor_column;
    void *s, *out;
    void* wide;          // S again, or null: row start + t of `pitch` elements, so that rows of an odd rank start at multiples of 16 bytes, too
    void* planes;        // partial sums of shrink, in rows as those of `wide`, or of grouped Gram
    int64_t plane_size;  // elements of one plane of shrink
    int pitch;           // a multiple of 8
    int splits;          // of shrink; for expand: 0, or how many planes it adds up to the S that it then also writes
    const void* scale;          // [K] in the type of the sums
    const void* before;         // what expand adds to, in out's type: out itself, another matrix, or with before_row = 0 a bias; null: zero
    int64_t before_row;
    const int64_t *seeds, *keys, *index;
    double inverse;        // 1 / (1 - p), of what this launch drops
    double shrink_inverse;  // of the x that S was shrunk from
    unsigned threshold;
    int width;
    int columns;  // of out that a block of expand owns: a multiple of LORA_COLUMNS
    Type out_type;
    bool aligned, factor_aligned;  // rows start at multiples of 16 bytes: of x, out and before; of the factor
    LoraTable table;
};
static_assert(sizeof(LoraCall) <= 4096, "the limit of kernel arguments before CUDA 12.1");

// The gradients of a backward pass whose partial sums are added in one launch: both factors', or one.
struct GramSums {
    const void* planes[2];
    void* out[2];
    Type type[2];
    int width[2];
    int count;
    LoraTable table;
};
static_assert(sizeof(GramSums) <= 4096);

}  // namespace hetlora
