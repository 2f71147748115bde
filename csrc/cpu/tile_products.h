// A product left [M, K] right [K, N] on AMX: a tile of 16 x 16 sums in float32 takes 16 x 32 bfloat16 numbers of the left and 32 x 16 of the right at a time.
//
// Exactness: float32 operands (S, and factors that are no bfloat16) are split into three bfloat16 numbers whose sum they are, and every product of two parts
// that reaches the 24th bit is made. So a sum is one of products of float32, as in lora_kernels.cpp, but for two things: its order, and numbers below 2^-126 (of
// a part as well), which the tiles take for zero.
//
// An element's bits depend on its own row, column, and the number of addends: each of its sums is one chain over blocks of 32 addends, in parts of kPart.
#pragma once

#include "simd.h"

#if defined(HETLORA_TILES)

#include <immintrin.h>

namespace hetlora::tiles {

constexpr int64_t kSide = 16, kDepth = 32, kTile = kSide * kDepth;  // rows or columns, addends, and numbers of a tile
constexpr int64_t kBlock = 2 * kSide;  // rows and columns of a block of sums: four tiles
constexpr int64_t kPart = 1024;  // addends of a chain

inline int64_t up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

// Asks the system for the tiles, for all threads of the process.
bool permitted();

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

typedef Aligned<uint16_t> Room;

HETLORA_AMX HETLORA_INLINE __mmask16 first(int64_t n) { return n >= 16 ? 0xFFFF : n <= 0 ? 0 : static_cast<__mmask16>((1u << n) - 1); }
HETLORA_AMX HETLORA_INLINE __mmask32 first32(int64_t n) { return n >= 32 ? 0xFFFFFFFFu : n <= 0 ? 0 : static_cast<__mmask32>((1u << n) - 1); }

// Rows `side`, ... of a matrix whose addends lie side by side, in the left's form: `row` of the tiles from n numbers of one row.
void pack_row(const Packed& to, uint16_t* data, int64_t side, const void* from, int64_t n);
// The same for a matrix whose addends lie one below another, in the right's form: addends 2 pair and 2 pair + 1 (or none) of `width` columns.
void pack_pair(const Packed& to, uint16_t* data, int64_t pair, const void* even, const void* odd, int64_t width);
// What no row fills: rows from `side` to a multiple of 32, left's form.
void clear_rows(const Packed& to, uint16_t* data, int64_t side);
// The same for addends: pairs from `pair` on, right's form.
void clear_pairs(const Packed& to, uint16_t* data, int64_t pair, int64_t width);
// Rows or columns from `side` on, between the left's form and the right's.
void turn_all(const Packed& of, uint16_t* data, int64_t side);
// sums [32, 32] of rows `row`.. and columns `column`.. of the two operands, of which there are `rows` and `columns`.
void block(const Packed& left, const uint16_t* l, int64_t row, int64_t rows, const Packed& right, const uint16_t* r, int64_t column, int64_t columns,
           float* sums);

}  // namespace hetlora::tiles

#endif
