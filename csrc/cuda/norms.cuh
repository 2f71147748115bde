// Sums of squares over packed rows, in two launches and without atomics: one warp per row and CHUNK columns writes one float64 partial, then one warp per
// client and module adds its partials in order. With gradients the first pass also gives g.g and g.p, so that clipping together with the tail regulariser
// reads gradients and tail rows once before the update: |g + c p|^2 = g.g + 2 c g.p + c^2 p.p, and c is known only after the pass.
//
// Bytes: the tail rows once (tail_norms; the optimisers without clipping), gradients once more with clipping.
// Layout: offsets [K + 1], then the first tail row of each client [K].
#pragma once
#include "common.cuh"

namespace hetlora {

template <bool ALIGNED, class T>
__device__ __forceinline__ void squares_item(const Item& item, bool tail, bool grads, double* partials, int64_t count) {
    using Acc = typename Accumulator<T>::type;
    constexpr int V = VECTOR<T>, PARTS = CHUNK<T> / (WARP * V);
    const Module& module = item.module;
    const int64_t start = static_cast<int64_t>(item.row) * module.width;
    const int width_p = tail ? module.width : 0, width_g = grads ? module.width : 0;
    Acc p[PARTS][V], g[PARTS][V];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        load<ALIGNED>(p[part], static_cast<const T*>(module.p[0]) + start, item.column + part * WARP * V, width_p);
        load<ALIGNED>(g[part], static_cast<const T*>(module.p[1]) + start, item.column + part * WARP * V, width_g);
    }
    Acc pp = 0, gg = 0, gp = 0;
#pragma unroll
    for (int part = 0; part < PARTS; ++part)
#pragma unroll
        for (int e = 0; e < V; ++e) {
            pp += p[part][e] * p[part][e];
            gg += g[part][e] * g[part][e];
            gp += g[part][e] * p[part][e];
        }
    const double sum_pp = warp_sum(static_cast<double>(pp)), sum_gg = warp_sum(static_cast<double>(gg)), sum_gp = warp_sum(static_cast<double>(gp));
    if (lane_id()) return;
    double* target = partials + module.first + item.index;
    target[0] = sum_pp;
    if (grads) {
        target[count] = sum_gg;
        target[2 * count] = sum_gp;
    }
}

// partials: [count], or [3, count] with gradients (p.p, g.g, g.p). Rows before a client's tail have p.p = g.p = 0, and are skipped without gradients.
template <class T>
__global__ void __launch_bounds__(WARP* WARPS) squares_kernel(Table table, double* partials, int64_t count, bool grads) {
    Item item;
    if (!find_item(item, table, CHUNK<T>)) return;
    const bool tail = item.row >= item.layout[table.clients + 1 + owner_of(item.layout, table.clients, item.row)];
    if (!tail && !grads) return;
    if (item.module.aligned) squares_item<true, T>(item, tail, grads, partials, count);
    else squares_item<false, T>(item, tail, grads, partials, count);
}

// Where one client's partials of one module are: all rows from `start`, tail rows from `tail`.
struct Range {
    int64_t start, tail, end;
};

__device__ __forceinline__ Range range_of(const Table& table, int module_index, int k, int chunk) {
    const Module& module = table.modules[module_index];
    const int* layout = table.layouts + static_cast<int64_t>(module.layout) * table.stride;
    const int64_t chunks = (module.width + chunk - 1) / chunk;
    return {module.first + layout[k] * chunks, module.first + layout[table.clients + 1 + k] * chunks, module.first + layout[k + 1] * chunks};
}

// out: [K, M]. One warp per client (grid x) and module (grid y).
template <class Out>
__global__ void tail_norms_kernel(Table table, const double* partials, Out* out, int chunk) {
    const int k = blockIdx.x;
    const Range range = range_of(table, blockIdx.y, k, chunk);
    const double total = warp_sum_range(partials, range.tail, range.end);
    if (lane_id() == 0) out[static_cast<int64_t>(k) * gridDim.y + blockIdx.y] = static_cast<Out>(sqrt(total));
}

}  // namespace hetlora
