// The products of rank rows over a panel of columns, compiled for several instruction sets, and the order of their sums.
//
// Rows are taken in groups: a group by itself is a triangle, two groups a rectangle of dot products held in registers as vectors along the columns: exactly
// r (r + 1) / 2 of them, no rank is padded. The sums of a panel leave the registers in double, tile by tile; `from_tiles` puts them where they belong.
#pragma once

#include "simd.h"

namespace hetlora {

constexpr int64_t kLine = 64;  // bytes of a cache line
constexpr int kLanes = 16;     // columns a panel is a multiple of, whatever the instruction set; 32 for bfloat16

// What is fetched from memory while tiles are multiplied: lines from `at` on, as long as it is before `end`. Units lie one after another, so a unit that is all
// arithmetic fetches for the next ones, which are all memory.
struct Stream {
    const char *at, *end;
};

// The rows of a rank in groups: one of all for a rank of at most T, else equal ones of at most G.
struct Groups {
    int64_t count, size, larger;
    Groups(int64_t rank, int g, int t) : count(rank <= t ? 1 : (rank + g - 1) / g), size(rank / count), larger(rank % count) {}
    int64_t start(int64_t g) const { return g * size + (g < larger ? g : larger); }
};

// products(rows, rank, ld, n, ahead, stream, sums): the upper triangle of rows rows^T over n columns (a multiple of kLanes), rows `ld` apart, added to the
// sums tile by tile. `ahead`: columns on which the same rows are fetched for the next panel; 0: none.
template <class E>
struct PanelKernel {
    void (*products)(const E*, int64_t, int64_t, int64_t, int64_t, Stream&, double*);
    int group, most, lanes;

    Groups groups(int64_t rank) const { return {rank, group, most}; }
    // At least as many sums as the tiles of a rank have.
    int64_t room(int64_t rank) const { return rank == 0 ? 0 : groups(rank).count * (groups(rank).count + 1) / 2 * 32; }
};

// For float or double rows, which are multiplied in their own type, and for bfloat16 rows as they lie, whose sums are float and n a multiple of 2 kLanes.
template <class E>
PanelKernel<E> panel_kernel();

// gram [rank, rank], both triangles, from the sums of a kernel's products.
void from_tiles(const double* sums, int64_t rank, const Groups& groups, int lanes, double* gram);

}  // namespace hetlora
