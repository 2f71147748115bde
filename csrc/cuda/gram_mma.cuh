// Gram matrices of 16-bit rows on tensor cores: exact products, float32 sums.
//
// A block is four warps that take turns at 32 columns. Each warp makes the whole tile over its columns. The four tiles are added in a fixed order. In a Gram
// matrix both operands of m16n8k16 are the same rows, and the order of k is free. So one load of a lane, 16 bytes of each of 16 rows, is its part of both
// operands, for two slices of k. So rows go from memory to registers once, without shared memory and without a barrier; twelve warps of a multiprocessor have
// 24 to 48 KB of them on their way, of which 9 would do on an H100. A band is 16 rows; a tile on the diagonal has up to four, and all ten pairs of them in
// registers.
#pragma once
#include <mma.cuh>

#include "gram.cuh"

namespace hetlora {

constexpr int GRAM_WARPS = GRAM_THREADS / WARP, BAND = 16, STEP = 32;  // rows of a band, columns of a load
constexpr int CHAIN = 4;                                               // loads, each two products in one chain of sums: tensor cores cut instead of rounding
constexpr int GRAM_EXCHANGE = GRAM_THREADS * 10 * 8;                   // elements of shared memory: the sums of all warps

// A lane's part of 16 rows x 32 columns: the registers of two slices, for either operand.
struct Band {
    uint32_t slice[2][4];
};

// COUNT bands from row `row` of the client's `rows`, 32 columns from `column`; zero past the rank and past `last`. Which of the 32 a lane gets is the same in
// every row, and else does not matter.
template <bool ALIGNED, int COUNT, class T>
__device__ __forceinline__ void load_bands(Band* band, const T* rows, int row, int rank, int64_t width, int column, int last) {
    const int down = lane_id() / 4, across = lane_id() % 4, valid = last - column - (ALIGNED ? 8 : 1) * across;
    const T* from = rows + (row + down) * width + column + (ALIGNED ? 8 : 1) * across;
#pragma unroll
    for (int half = 0; half < 2 * COUNT; ++half, from += 8 * width) {  // one pointer on its way: a row's own would take 16 registers
        const int inside = row + 8 * half + down < rank ? valid : 0;
        Pack<uint32_t, 4> words{};
        if constexpr (ALIGNED) {
            if (inside > 0) words = *reinterpret_cast<const Pack<uint32_t, 4>*>(from);
        } else {
#pragma unroll
            for (int e = 0; e < 8; ++e)
                if (4 * e < inside) words.v[e / 2] |= static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(from)[4 * e]) << 16 * (e % 2);
        }
#pragma unroll
        for (int w = 0; w < 4; ++w) band[half / 2].slice[w / 2][half % 2 + 2 * (w % 2)] = words.v[w];
    }
}

// sum [16, 16] += left right^T
template <class T>
__device__ __forceinline__ void multiply_bands(float (&sum)[2][4], const Band& left, const Band& right) {
#pragma unroll
    for (int s = 0; s < 2; ++s)
#pragma unroll
        for (int half = 0; half < 2; ++half) multiply_add<T>(sum[half], left.slice[s], right.slice[s][half], right.slice[s][half + 2]);
}

// LEFT bands of tile.i from band `up` against RIGHT bands of tile.j from `along`; the same bands, and each pair once, when SAME.
template <bool ALIGNED, bool SAME, int LEFT, int RIGHT, class T>
__device__ void gram_bands(const GramTile<T, float>& tile, int up, int along, int64_t width, int first, int last, float* shared) {
    constexpr int LOADED = SAME ? LEFT : LEFT + RIGHT, PAIRS = SAME ? LEFT * (LEFT + 1) / 2 : LEFT * RIGHT, SUMS = PAIRS * 8;
    constexpr int AHEAD = ALIGNED && LOADED < 3 ? 8 / LOADED : 1;  // loads of 32 columns in flight: 64 registers, or 24 to 32 beside more sums
    static_assert(GRAM_WARPS * WARP * SUMS <= GRAM_EXCHANGE && (AHEAD == 1 || AHEAD % CHAIN == 0));
    const int warp = threadIdx.x / WARP, top = tile.i * tile.side + up * BAND, left_of = tile.j * tile.side + along * BAND;
    // The compiler keeps the totals in registers where it may, and has no room for them beside 80 sums.
    using Total = std::conditional_t<(PAIRS > 6), volatile float, float>;
    Total* total = shared + warp * WARP * SUMS + lane_id();
    float sum[PAIRS][2][4] = {};
    __syncthreads();  // what was there has been read
#pragma unroll
    for (int at = 0; at < SUMS; ++at) total[at * WARP] = 0;
    const auto close_chain = [&] {
#pragma unroll
        for (int at = 0; at < SUMS; ++at) {
            total[at * WARP] = total[at * WARP] + sum[at / 8][at / 4 % 2][at % 4];
            sum[at / 8][at / 4 % 2][at % 4] = 0;
        }
    };
    int loads = 0;
    for (int column = first + warp * STEP * AHEAD; column < last; column += GRAM_WARPS * STEP * AHEAD) {
        Band band[AHEAD][LOADED];
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            load_bands<ALIGNED, LEFT>(band[a], tile.rows, top, tile.rank, width, column + a * STEP, last);
            if constexpr (!SAME) load_bands<ALIGNED, RIGHT>(band[a] + LEFT, tile.rows, left_of, tile.rank, width, column + a * STEP, last);
        }
#pragma unroll
        for (int a = 0; a < AHEAD; ++a) {
            int pair = 0;
#pragma unroll
            for (int l = 0; l < LEFT; ++l)
#pragma unroll
                for (int r = SAME ? l : 0; r < RIGHT; ++r) multiply_bands<T>(sum[pair++], band[a][l], band[a][SAME ? r : LEFT + r]);
            if (AHEAD > 1 && a % CHAIN == CHAIN - 1) close_chain();
        }
        if (AHEAD == 1 && ++loads % CHAIN == 0) close_chain();
    }
    close_chain();
    __syncthreads();  // the sums of all warps are there
    for (int at = threadIdx.x; at < WARP * SUMS; at += GRAM_THREADS) {
        float whole = shared[at];
#pragma unroll
        for (int w = 1; w < GRAM_WARPS; ++w) whole += shared[w * WARP * SUMS + at];
        const int lane = at % WARP, place = at / WARP % 8;
        int pair = at / (8 * WARP), l = 0;
        for (; pair >= RIGHT - (SAME ? l : 0); ++l) pair -= RIGHT - (SAME ? l : 0);
        const int row = (up + l) * BAND + place / 2 % 2 * 8 + lane / 4,
                  column = (along + (SAME ? l : 0) + pair) * BAND + place / 4 * 8 + lane % 4 * 2 + place % 2;
        if (row < tile.side && column < tile.side) tile.store(row, column, whole);
    }
}

template <bool ALIGNED, class T>
__device__ __forceinline__ void gram_mma_tile(const GramTile<T, float>& tile, int64_t width, int first, int last, float* shared) {
    const int bands = tile.side / BAND;
    const bool diagonal = tile.i == tile.j;
    if constexpr (ALIGNED) {
        if (diagonal && bands == 1) return gram_bands<true, true, 1, 1>(tile, 0, 0, width, first, last, shared);
        if (diagonal && bands == 3) return gram_bands<true, true, 3, 3>(tile, 0, 0, width, first, last, shared);
        if (diagonal && bands == 4) return gram_bands<true, true, 4, 4>(tile, 0, 0, width, first, last, shared);
    }
    // Two bands by two, the rows again from the caches for each: ranks above 64, and rows that are read an element at a time.
    for (int up = 0; up < bands; up += 2)
        for (int along = diagonal ? up : 0; along < bands; along += 2) {
            if (diagonal && up == along) gram_bands<ALIGNED, true, 2, 2>(tile, up, along, width, first, last, shared);
            else gram_bands<ALIGNED, false, 2, 2>(tile, up, along, width, first, last, shared);
        }
}

}  // namespace hetlora
