// Streaming aggregation: total[: r] += w rows. One warp owns CHUNK consecutive elements of one row. Bytes: one client's rows in, the same part of the bank
// in and out: the floor.
#pragma once
#include "common.cuh"

namespace hetlora {

template <bool ALIGNED, class T, class Acc>
__device__ __forceinline__ void accumulate_item(const Item& item, Acc weight) {
    constexpr int V = VECTOR<T>, PARTS = CHUNK<T> / (WARP * V);
    const Module& module = item.module;
    const int64_t start = static_cast<int64_t>(item.row) * module.width;
    Acc* target = static_cast<Acc*>(const_cast<void*>(module.p[0])) + start;
    const T* source = static_cast<const T*>(module.p[1]) + start;
    Acc total[PARTS][V], value[PARTS][V];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        load<ALIGNED>(value[part], source, item.column + part * WARP * V, module.width);
        load<ALIGNED>(total[part], target, item.column + part * WARP * V, module.width);
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
#pragma unroll
        for (int e = 0; e < V; ++e) total[part][e] += value[part][e] * weight;
        store<ALIGNED>(target, total[part], item.column + part * WARP * V, module.width);
    }
}

template <class T, class Acc>
__global__ void __launch_bounds__(WARP* WARPS) accumulate_kernel(Table table, const Acc* weights) {
    Item item;
    if (!find_item(item, table, CHUNK<T>)) return;
    if (item.module.aligned) accumulate_item<true, T>(item, weights[blockIdx.y]);
    else accumulate_item<false, T>(item, weights[blockIdx.y]);
}

}  // namespace hetlora
