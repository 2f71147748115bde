// Loads, stores, warp sums and item numbering shared by the kernels. The kernels of aggregation, truncation, dequantising, the optimisers' updates and the
// first pass of norms give one warp one item: a row of one module and CHUNK columns of it. They have no barriers and no shared memory. shrink, expand,
// grouped_gram, gram, cross_entropy_ and the optimisers' `prepare` work by the block. In the other kernels a warp owns a whole row, or a client and module. Their
// files say so. No kernel of this library has atomics. What a warp
// adds, it adds in a fixed order.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <type_traits>

#include "table.h"

namespace hetlora {

constexpr int WARP = 32;
constexpr int WARPS = 8;  // per block
constexpr unsigned ALL_LANES = 0xffffffffu;

template <class T>
struct Accumulator {
    using type = float;
};
template <>
struct Accumulator<double> {
    using type = double;
};

template <class To, class From>
__device__ __forceinline__ To convert(From value) {
    if constexpr (std::is_same_v<From, __nv_bfloat16>) return static_cast<To>(__bfloat162float(value));
    else if constexpr (std::is_same_v<From, __half>) return static_cast<To>(__half2float(value));
    else if constexpr (std::is_same_v<To, __nv_bfloat16>) return __float2bfloat16(static_cast<float>(value));
    else if constexpr (std::is_same_v<To, __half>) return __float2half(static_cast<float>(value));
    else return static_cast<To>(value);
}

template <class T, int N>
struct alignas(sizeof(T) * N > 16 ? 16 : sizeof(T) * N) Pack {
    T v[N];
};

// Elements of one 16-byte access, and columns of one item: one or two such accesses per lane.
template <class T>
constexpr int VECTOR = 16 / sizeof(T);
template <class T>
constexpr int CHUNK = 1024 / (sizeof(T) < 4 ? 4 : sizeof(T));

template <class T>
constexpr Type TYPE = sizeof(T) == 8              ? Type::f64
                      : sizeof(T) == 4            ? Type::f32
                      : std::is_same_v<T, __half> ? Type::f16
                                                  : Type::bf16;

__device__ __forceinline__ int lane_id() { return threadIdx.x % WARP; }

// ALIGNED is a template argument throughout: a branch around each load would keep the loads of an unrolled loop from being in flight together.

// Column of element e of a lane's access at `base`: neighbours when rows are aligned, else one column per lane so that scalar accesses coalesce.
template <bool ALIGNED, int V>
__device__ __forceinline__ int column_of(int base, int e) {
    return ALIGNED ? base + lane_id() * V + e : base + e * WARP + lane_id();
}

// V elements of a row; columns at or past `width` read as zero.
template <bool ALIGNED, class Acc, int V, class T>
__device__ __forceinline__ void load(Acc (&out)[V], const T* row, int base, int width) {
    if constexpr (ALIGNED) {
        Pack<T, V> pack{};
        const int column = column_of<true, V>(base, 0);
        if (column < width) pack = *reinterpret_cast<const Pack<T, V>*>(row + column);
#pragma unroll
        for (int e = 0; e < V; ++e) out[e] = convert<Acc>(pack.v[e]);
    } else {
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const int column = column_of<false, V>(base, e);
            out[e] = column < width ? convert<Acc>(row[column]) : Acc(0);
        }
    }
}

template <bool ALIGNED, int V, class T, class Acc>
__device__ __forceinline__ void store(T* row, const Acc (&value)[V], int base, int width) {
    if constexpr (ALIGNED) {
        const int column = column_of<true, V>(base, 0);
        if (column >= width) return;
        Pack<T, V> pack;
#pragma unroll
        for (int e = 0; e < V; ++e) pack.v[e] = convert<T>(value[e]);
        *reinterpret_cast<Pack<T, V>*>(row + column) = pack;
    } else {
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const int column = column_of<false, V>(base, e);
            if (column < width) row[column] = convert<T>(value[e]);
        }
    }
}

// The same with the type known at run time only: the branch is uniform and the rest of the kernel is compiled once.
template <bool ALIGNED, int V, class Acc>
__device__ __forceinline__ void store_as(Type type, const void* out, int64_t start, const Acc (&value)[V], int base, int width) {
    void* target = const_cast<void*>(out);
    switch (type) {
        case Type::f32: return store<ALIGNED>(static_cast<float*>(target) + start, value, base, width);
        case Type::bf16: return store<ALIGNED>(static_cast<__nv_bfloat16*>(target) + start, value, base, width);
        case Type::f16: return store<ALIGNED>(static_cast<__half*>(target) + start, value, base, width);
        case Type::f64: return store<ALIGNED>(static_cast<double*>(target) + start, value, base, width);
    }
}

// Rare operand (`keep`): one column per lane whatever the alignment.
template <class Acc>
__device__ __forceinline__ Acc load_one_as(Type type, const void* pointer, int64_t index) {
    switch (type) {
        case Type::f32: return convert<Acc>(static_cast<const float*>(pointer)[index]);
        case Type::bf16: return convert<Acc>(static_cast<const __nv_bfloat16*>(pointer)[index]);
        case Type::f16: return convert<Acc>(static_cast<const __half*>(pointer)[index]);
        default: return convert<Acc>(static_cast<const double*>(pointer)[index]);
    }
}

// Sum over the warp in a fixed order; every lane gets it.
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) value += __shfl_xor_sync(ALL_LANES, value, distance);
    return value;
}

// values[first] + ... + values[last - 1], lane by lane and then over the warp.
__device__ __forceinline__ double warp_sum_range(const double* values, int64_t first, int64_t last) {
    double total = 0;
    for (int64_t i = first + lane_id(); i < last; i += WARP) total += values[i];
    return warp_sum(total);
}

// One warp's item in module blockIdx.y: a row and the first of its columns. False when the module has fewer.
struct Item {
    Module module;
    const int* layout;
    int64_t index;
    int row, column;
};

__device__ __forceinline__ bool find_item(Item& item, const Table& table, int chunk) {
    item.module = table.modules[blockIdx.y];
    item.layout = table.layouts + static_cast<int64_t>(item.module.layout) * table.stride;
    item.index = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    const int chunks = (item.module.width + chunk - 1) / chunk;
    if (item.index >= static_cast<int64_t>(item.module.rows) * chunks) return false;
    item.row = static_cast<int>(item.index / chunks);
    item.column = static_cast<int>(item.index % chunks) * chunk;
    return true;
}

// The client that owns packed row `row`: the last k with offsets[k] <= row.
__device__ __forceinline__ int owner_of(const int* offsets, int clients, int row) {
    int low = 0, high = clients - 1;
    while (low < high) {
        const int middle = (low + high + 1) / 2;
        if (offsets[middle] <= row) low = middle;
        else high = middle - 1;
    }
    return low;
}

}  // namespace hetlora
