// One tile of one client's Gram matrix: where it is, where its sums go. What gram.cu (plain products) and gram_mma.cuh (tensor cores) share.
//
// A client of rank r has ceil(r / widest) tiles along a side. All are as wide as its rank needs, rounded up to `unit`, the size in which products come. Only
// tiles on or above the diagonal are made, and in a tile on the diagonal only the elements on or above it. Each is mirrored when it is stored. So a matrix
// equals its transpose bit for bit. A module wider than GRAM_SPLIT columns is cut, each part goes to a plane of its own (grid z), and a second launch adds the
// planes in order.
// Layout: offsets [K + 1], tiles before each client [K + 1], result offsets [K], plane offsets [K].
#pragma once
#include "common.cuh"

namespace hetlora {

constexpr int GRAM_THREADS = 128, GRAM_SPLIT = 2048;

// One tile's place: its client's rows, its matrix in the result, its plane of partial sums (null: straight to the result).
template <class T, class Acc>
struct GramTile {
    const T* rows;
    Acc *out, *plane;
    int rank, side, i, j;

    // Whether the element is the client's, and not the mirror image of another.
    __device__ __forceinline__ bool has(int row, int column) const {
        const int left = i * side + row, right = j * side + column;
        return left <= right && right < rank;
    }
    __device__ __forceinline__ void store(int row, int column, Acc value) const {
        if (!has(row, column)) return;
        if (plane) {
            plane[row * side + column] = value;
            return;
        }
        const int left = i * side + row, right = j * side + column;
        out[static_cast<int64_t>(left) * rank + right] = value;
        if (left != right) out[static_cast<int64_t>(right) * rank + left] = value;
    }
};

// Tile blockIdx.x of a module: false when the module has fewer. `plane` is that of split 0 even where the module has one split.
template <class T, class Acc>
__device__ __forceinline__ bool find_tile(GramTile<T, Acc>& tile, const Table& table, const Module& module, int unit, Acc* planes) {
    const int clients = table.clients, index = blockIdx.x;
    const int* layout = table.layouts + static_cast<int64_t>(module.layout) * table.stride;
    const int *tiles = layout + clients + 1, *squares = tiles + clients + 1, *plane = squares + clients;
    if (index >= tiles[clients]) return false;
    const int k = owner_of(tiles, clients, index);
    tile.rank = layout[k + 1] - layout[k];
    tile.side = gram_side(tile.rank, unit);
    const int count = gram_tiles_per_side(tile.rank, unit);
    int rest = index - tiles[k], i = 0;
    for (; rest >= count - i; ++i) rest -= count - i;
    tile.i = i;
    tile.j = i + rest;
    tile.rows = static_cast<const T*>(module.p[0]) + static_cast<int64_t>(layout[k]) * module.width;
    tile.out = static_cast<Acc*>(const_cast<void*>(module.p[1])) + squares[k];
    tile.plane = planes + module.first + plane[k] + static_cast<int64_t>(index - tiles[k]) * tile.side * tile.side;
    return true;
}

// The block's tile and its columns [first, last): p of a module: rows, result; `rows` of a module: elements of one split's planes.
template <class T, class Acc>
__device__ __forceinline__ bool find_part(GramTile<T, Acc>& tile, int& first, int& last, const Table& table, const Module& module, int unit, Acc* planes) {
    first = blockIdx.z * GRAM_SPLIT;
    last = min(first + GRAM_SPLIT, module.width);
    if ((blockIdx.z && first >= module.width) || !find_tile(tile, table, module, unit, planes)) return false;
    tile.plane = module.width > GRAM_SPLIT ? tile.plane + static_cast<int64_t>(blockIdx.z) * module.rows : nullptr;
    return true;
}

}  // namespace hetlora
