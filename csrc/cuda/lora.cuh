// What shrink, expand and grouped Gram share: tiles in shared memory and how they are filled, a warp's product of two of them, the client of a block.
//
// A block is 4 warps, and each has 16 rows of the block's 64 x N result. Of every 8 columns lane l holds rows l / 4 and l / 4 + 8, and columns 2 (l % 4) and
// the next one. mma.sync m16n8k16 puts them there. 16-bit types multiply on tensor cores with float32 sums. float32 and float64 use the same layout with
// plain FMA, a lane making its own four sums from shared memory: exact, no TF32. A stage is 128 bytes deep in k for every type.
#pragma once
#include <mma.cuh>

#include "common.cuh"
#include "lora.h"
#include "philox.cuh"

namespace hetlora {

constexpr int LORA_THREADS = 128, WARP_ROWS = 16, SLICE = 16;  // SLICE: k of one product
constexpr int LORA_POOL = 48 << 10;                            // bytes of shared memory that need no opt-in on any architecture
constexpr int PASS = 128;                                      // ranks of one pass over the rows; more are a loop

// Blocks per multiprocessor to compile for: with 48 KB each, what sm_80 has room for. Without it ptxas takes 254 registers where it drops 16-bit elements.
template <class T>
constexpr int LORA_BLOCKS = sizeof(T) == 8 ? 2 : 3;

template <class T>
constexpr int DEPTH = LORA_DEPTH / static_cast<int>(sizeof(T));  // k of one stage

HETLORA_HOST_DEVICE constexpr int larger(int a, int b) { return a < b ? b : a; }
HETLORA_HOST_DEVICE constexpr int round_up(int value, int step) { return (value + step - 1) / step * step; }

// ---------------------------------------------------------------- tiles in shared memory

// Element of a tile whose rows are `pitch` elements, a multiple of 128 bytes. The eight 16-byte pieces of 128 bytes are permuted by the row, so that eight rows
// of one column, and eight columns of one row, lie in different banks.
template <class T>
__device__ __forceinline__ T* cell(T* tile, int pitch, int row, int column) {
    const int piece = column / VECTOR<T>;
    return tile + row * pitch + ((piece & ~7) | ((piece ^ row) & 7)) * VECTOR<T> + column % VECTOR<T>;
}

// Eight columns of one row: from[0], from[step], ..., zero from the `valid`th on. `aligned`: step is 1 and `from` a multiple of 16 bytes.
template <class T>
__device__ __forceinline__ void copy_unit(T* tile, int pitch, int row, int column, const T* from, int64_t step, int valid, bool aligned) {
    constexpr int V = VECTOR<T>;
#pragma unroll
    for (int at = 0; at < DRAWS; at += V) {
        T* to = cell(tile, pitch, row, column + at);
        const int own = min(max(valid - at, 0), V);
        if (aligned) {
            copy_async(to, from + at, own * static_cast<int>(sizeof(T)));
        } else {
            Pack<T, V> pack{};
#pragma unroll
            for (int e = 0; e < V; ++e)
                if (e < own) pack.v[e] = from[(at + e) * step];
            *reinterpret_cast<Pack<T, V>*>(to) = pack;
        }
    }
}

// Zeros what is dropped of eight columns. Called by the thread that copied them, after its own wait: no barrier between.
template <class T>
__device__ __forceinline__ void drop_unit(T* tile, int pitch, int row, int column, const Counter& drawn, uint32_t limit) {
    constexpr int V = VECTOR<T>;
#pragma unroll
    for (int at = 0; at < DRAWS; at += V) {
        T* piece = cell(tile, pitch, row, column + at);
        if constexpr (sizeof(T) == 2) {  // two elements and two draws in a word
            auto* words = reinterpret_cast<Pack<uint32_t, 4>*>(piece);
            Pack<uint32_t, 4> pack = *words;
#pragma unroll
            for (int w = 0; w < 4; ++w) {
                if (drawn.drops(2 * w, limit)) pack.v[w] &= 0xffff0000u;
                if (drawn.drops(2 * w + 1, limit)) pack.v[w] &= 0xffffu;
            }
            *words = pack;
        } else {
            auto* elements = reinterpret_cast<Pack<T, V>*>(piece);
            Pack<T, V> pack = *elements;
#pragma unroll
            for (int e = 0; e < V; ++e)
                if (drawn.drops(at + e, limit)) pack.v[e] = T{};
            *elements = pack;
        }
    }
}

// `rows` rank rows from `first` of the client, `units` times eight columns from `left`; zero past its rank and past the width.
template <class T>
__device__ __forceinline__ void copy_factor(T* tile, int pitch, const LoraCall& call, const LoraClient& client, int first, int rows, int left, int units) {
    const bool lies_transposed = call.factor_column != 1;  // a transposed view: its neighbours in memory are rank rows
    const T* factor = static_cast<const T*>(call.factor) + (client.row + first) * call.factor_row + left * call.factor_column;
#pragma unroll 1
    for (int at = threadIdx.x; at < rows * units; at += LORA_THREADS) {
        const int row = lies_transposed ? at % rows : at / units, column = (lies_transposed ? at / rows : at % units) * DRAWS;
        const int valid = first + row < client.rank ? call.width - left - column : 0;
        copy_unit(tile, pitch, row, column, factor + row * call.factor_row + column * call.factor_column, call.factor_column, valid, call.factor_aligned);
    }
}

// S of row t of the client, rank 0, in the copy with a pitch.
template <class T>
__device__ __forceinline__ T* wide_row(const LoraCall& call, const LoraClient& client, int t) {
    return static_cast<T*>(call.wide) + static_cast<int64_t>(client.start + t) * call.pitch;
}

// What the products of a client's row are multiplied by in S; 1 / (1 - p) is 1 without dropout.
template <class Acc>
__device__ __forceinline__ Acc scale_of(const LoraCall& call, const LoraClient& client) {
    return static_cast<const Acc*>(call.scale)[client.client] * static_cast<Acc>(call.shrink_inverse);
}

// Eight ranks of row t of the client's S from the planes of shrink, added in the order of the columns; zero from the client's rank on. The rows of a plane
// start at multiples of 16 bytes.
template <class T>
__device__ __forceinline__ Pack<T, DRAWS> sum_planes(const LoraCall& call, const LoraClient& client, int t, int first) {
    using Acc = typename Accumulator<T>::type;
    const Acc* from = static_cast<const Acc*>(call.planes) + static_cast<int64_t>(client.start + t) * call.pitch + first;
    Pack<Acc, DRAWS> total = *reinterpret_cast<const Pack<Acc, DRAWS>*>(from);
#pragma unroll 4
    for (int split = 1; split < call.splits; ++split) {
        const auto next = *reinterpret_cast<const Pack<Acc, DRAWS>*>(from + split * call.plane_size);
#pragma unroll
        for (int e = 0; e < DRAWS; ++e) total.v[e] += next.v[e];
    }
    const Acc scale = scale_of<Acc>(call, client);
    Pack<T, DRAWS> out;
#pragma unroll
    for (int e = 0; e < DRAWS; ++e) out.v[e] = first + e < client.rank ? convert<T>(total.v[e] * scale) : T{};
    return out;
}

// Those eight ranks in S and in its copy with a pitch.
template <class T>
__device__ __forceinline__ void store_shrunk(const LoraCall& call, const LoraClient& client, int t, int first, const Pack<T, DRAWS>& value) {
    T* s = static_cast<T*>(call.s) + client.flat + static_cast<int64_t>(t) * client.rank + first;
#pragma unroll
    for (int e = 0; e < DRAWS; ++e)
        if (first + e < client.rank) s[e] = value.v[e];
    if (call.wide) *reinterpret_cast<Pack<T, DRAWS>*>(wide_row<T>(call, client, t) + first) = value;
}

// Rows t .. t + rows - 1 of the client's S below `end`, ranks from `first`, `units` times eight of them.
template <class T>
__device__ __forceinline__ void copy_shrunk(T* tile, int pitch, const LoraCall& call, const LoraClient& client, int t, int rows, int end, int first,
                                            int units) {
    const int pitch_of_s = call.wide ? call.pitch : client.rank;
    const T* s = call.wide ? wide_row<const T>(call, client, 0) : static_cast<const T*>(call.s) + client.flat;
    const bool aligned = call.wide || (reinterpret_cast<uintptr_t>(s) | (client.rank * sizeof(T))) % 16 == 0;
#pragma unroll 1
    for (int at = threadIdx.x; at < rows * units; at += LORA_THREADS) {
        const int row = at / units, column = at % units * DRAWS;
        const int valid = t + row < end ? client.rank - first - column : 0;
        copy_unit(tile, pitch, row, column, s + static_cast<int64_t>(t + row) * pitch_of_s + first + column, 1, valid, aligned);
    }
}

// ---------------------------------------------------------------- products

// V values of k .. k + V - 1 of row `index` of an operand stored [row][k], or [k][row] when TRANSPOSED.
template <bool TRANSPOSED, int V, class T>
__device__ __forceinline__ void fetch(T (&out)[V], T* tile, int pitch, int index, int k) {
    if constexpr (TRANSPOSED) {
#pragma unroll
        for (int e = 0; e < V; ++e) out[e] = *cell(tile, pitch, k + e, index);
    } else {
        const auto pack = *reinterpret_cast<const Pack<T, V>*>(cell(tile, pitch, index, k));
#pragma unroll
        for (int e = 0; e < V; ++e) out[e] = pack.v[e];
    }
}

// An operand of a product in shared memory: stored [row][k], or [k][row] when TRANSPOSED.
template <class T, bool TRANSPOSED>
struct Operand {
    T* tile;
    int pitch;
};

// c [16, columns] += a [16 rows from `row`, depth] b [columns, depth]^T; columns and depth are multiples of 16, at most 8 TILES and DEPTH. The loop over
// columns is the outer one, so that the loads of a whole stage are in flight together even for few columns. Each sum is in the order of k.
template <bool A_T, bool B_T, int TILES, class T, class Acc>
__device__ __forceinline__ void multiply(Acc (&c)[TILES][4], Operand<T, A_T> a, int row, Operand<T, B_T> b, int columns, int depth) {
    const int lane = lane_id(), low = lane % 8, middle = lane / 8 % 2 * 8, high = lane / 16 * 8;
    if constexpr (sizeof(T) == 2) {
        constexpr int SLICES = DEPTH<T> / SLICE;
        const auto a_at = [&](int k) {
            return A_T ? cell(a.tile, a.pitch, k + high + low, row + middle) : cell(a.tile, a.pitch, row + middle + low, k + high);
        };
        const auto b_at = [&](int n, int k) {
            return B_T ? cell(b.tile, b.pitch, k + middle + low, n + high) : cell(b.tile, b.pitch, n + high + low, k + middle);
        };
        uint32_t left[SLICES][4], right[4];
#pragma unroll
        for (int s = 0; s < SLICES; ++s)
            if (s * SLICE < depth) load_matrices<A_T>(left[s], a_at(s * SLICE));
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            if (8 * j >= columns) break;
#pragma unroll
            for (int s = 0; s < SLICES; ++s)
                if (s * SLICE < depth) {
                    load_matrices<B_T>(right, b_at(8 * j, s * SLICE));
                    multiply_add<T>(c[j], left[s], right[0], right[1]);
                    multiply_add<T>(c[j + 1], left[s], right[2], right[3]);
                }
        }
    } else {
        constexpr int V = VECTOR<T>;
#pragma unroll
        for (int j = 0; j < TILES; j += 2) {
            if (8 * j >= columns) break;
            Acc sum[2][4] = {};  // of this stage alone: one chain over all of k would lose a digit to PyTorch's blocked sums
#pragma unroll 1
            for (int k = 0; k < depth; k += V) {
                T left[2][V], right[2][V];
#pragma unroll
                for (int p = 0; p < 2; ++p) fetch<A_T>(left[p], a.tile, a.pitch, row + lane / 4 + 8 * p, k);
#pragma unroll
                for (int h = 0; h < 2; ++h) {
#pragma unroll
                    for (int q = 0; q < 2; ++q) fetch<B_T>(right[q], b.tile, b.pitch, 8 * (j + h) + lane % 4 * 2 + q, k);
#pragma unroll
                    for (int e = 0; e < V; ++e)
#pragma unroll
                        for (int i = 0; i < 4; ++i) sum[h][i] += left[i / 2][e] * right[i % 2][e];
                }
            }
#pragma unroll
            for (int h = 0; h < 2; ++h)
#pragma unroll
                for (int i = 0; i < 4; ++i) c[j + h][i] += sum[h][i];
        }
    }
}

// Row and column of the lane's sum i of a tile of 8 columns.
__device__ __forceinline__ int sum_row(int i) { return lane_id() / 4 + i / 2 * 8; }
__device__ __forceinline__ int sum_column(int i) { return lane_id() % 4 * 2 + i % 2; }

// ---------------------------------------------------------------- stages

// A ring of as many stages as shared memory holds, at most 4: one in use, the others on their way.
struct Ring {
    int elements, stages, use = 0, fill = 0;
    template <class T>
    __device__ __forceinline__ static Ring of(int elements) {
        return {elements, min(4, LORA_POOL / (elements * static_cast<int>(sizeof(T))))};
    }
    // Waits for this thread's copies of the stage in use.
    __device__ __forceinline__ void await() const {
        if (stages == 4) await_copies<2>();
        else if (stages == 3) await_copies<1>();
        else await_copies<0>();
    }
    __device__ __forceinline__ int next(int stage) const { return stage + 1 == stages ? 0 : stage + 1; }
};

// ---------------------------------------------------------------- clients and rows

// The last client whose `before` is not above `index`.
__device__ __forceinline__ LoraClient find_client(const LoraTable& table, int LoraClient::* before, int index) {
    const LoraClient* clients = table.far ? table.far : table.near;
    int low = 0, high = table.count - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (clients[middle].*before <= index) low = middle;
        else high = middle - 1;
    }
    return clients[low];
}

// Row of x or out that holds row t of the client.
__device__ __forceinline__ int64_t row_of(const LoraCall& call, const LoraClient& client, int t) {
    return call.index ? call.index[client.start + t] : client.start + t;
}

// For operands whose type is known at run time only.
template <class Acc>
__device__ __forceinline__ void store_one_as(Type type, void* out, int64_t index, Acc value) {
    switch (type) {
        case Type::f32: static_cast<float*>(out)[index] = convert<float>(value); return;
        case Type::bf16: static_cast<__nv_bfloat16*>(out)[index] = convert<__nv_bfloat16>(value); return;
        case Type::f16: static_cast<__half*>(out)[index] = convert<__half>(value); return;
        case Type::f64: static_cast<double*>(out)[index] = convert<double>(value); return;
    }
}

}  // namespace hetlora
