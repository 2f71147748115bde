// Aggregation: out[i] = sum over the clients k with r_k > i of w_k rows_k[i], in client order.
//
// One warp owns one output row x CHUNK columns, so the order of sums is fixed without atomics. Clients are taken 32 at a time: each lane looks up one
// (offset, weight), a ballot keeps the owners, and their rows are loaded four at a time (up to 128 bytes in flight per lane) before they are added one after
// another. Bytes: S d in, R d out, plus the unowned rows of `keep`: the floor. A table of owners per row would add sum r_k integers to every upload.
//
// accumulate, one upload at a time: total[: r] += w rows. One warp owns CHUNK consecutive elements of one row. Bytes: one client's rows in, the same part of the bank
// in and out: the floor.
#include "dispatch.cuh"

namespace hetlora {

constexpr int TOGETHER = 4;

template <bool ALIGNED, class T, class Acc>
__device__ __forceinline__ void aggregate_item(const Item& item, const Table& table, const Acc* weights, Type out_type, Type keep_type, bool normalize) {
    constexpr int V = VECTOR<T>, PARTS = CHUNK<T> / (WARP * V);
    const Module& module = item.module;
    Acc total[PARTS][V] = {};
    Acc weight_sum = 0;
    bool owned = false;
    const int64_t at = static_cast<int64_t>(item.row) * module.width;
    const T* source = static_cast<const T*>(module.p[0]) + at;
    for (int first = 0; first < table.clients; first += WARP) {
        const int mine = first + lane_id();
        int offset = 0;
        Acc weight = 0;
        bool owns = false;
        if (mine < table.clients) {
            offset = item.layout[mine];
            owns = item.layout[mine + 1] - offset > item.row;
            if (owns) weight = weights[static_cast<int64_t>(mine) * gridDim.y + blockIdx.y];
        }
        unsigned owners = __ballot_sync(ALL_LANES, owns);
        owned = owned || owners;
        while (owners) {
            Acc value[TOGETHER][PARTS][V], scale[TOGETHER];
#pragma unroll
            for (int slot = 0; slot < TOGETHER; ++slot) {
                // A slot without an owner loads nothing and adds 0 * 0, which changes no bit: the sum is never -0.
                const int lane = owners ? __ffs(owners) - 1 : 0, width = owners ? module.width : 0;
                const Acc lane_weight = __shfl_sync(ALL_LANES, weight, lane);
                const int64_t start = static_cast<int64_t>(__shfl_sync(ALL_LANES, offset, lane)) * module.width;
                scale[slot] = owners ? lane_weight : Acc(0);
                owners &= owners - 1;
#pragma unroll
                for (int part = 0; part < PARTS; ++part) load<ALIGNED>(value[slot][part], source + start, item.column + part * WARP * V, width);
            }
#pragma unroll
            for (int slot = 0; slot < TOGETHER; ++slot) {
                weight_sum += scale[slot];
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
#pragma unroll
                    for (int e = 0; e < V; ++e) total[part][e] += value[slot][part][e] * scale[slot];
            }
        }
    }
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int base = item.column + part * WARP * V;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const int column = column_of<ALIGNED, V>(base, e);
            if (!owned && module.p[2] && column < module.width) total[part][e] = load_one_as<Acc>(keep_type, module.p[2], at + column);
            if (owned && normalize) total[part][e] = weight_sum != 0 ? total[part][e] / weight_sum : Acc(0);
        }
        store_as<ALIGNED>(out_type, module.p[1], at, total[part], base, module.width);
    }
}

template <class T, class Acc>
__global__ void __launch_bounds__(WARP* WARPS) aggregate_kernel(Table table, const Acc* weights, Type out_type, Type keep_type, bool normalize) {
    Item item;
    if (!find_item(item, table, CHUNK<T>)) return;
    if (item.module.aligned) aggregate_item<true, T>(item, table, weights, out_type, keep_type, normalize);
    else aggregate_item<false, T>(item, table, weights, out_type, keep_type, normalize);
}

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

cudaError_t hetlora_aggregate(const HetloraCall* call, hetlora::Type in, hetlora::Type out, hetlora::Type keep, const void* weights, bool normalize) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_type(in, [&](auto type) {
        using T = decltype(type);
        using Acc = typename Accumulator<T>::type;
        HETLORA_LAUNCH((aggregate_kernel<T, Acc>), grid, dim3(WARP * WARPS), call->stream, call->table, static_cast<const Acc*>(weights), out, keep, normalize);
        return cudaGetLastError();
    });
}

cudaError_t hetlora_accumulate(const HetloraCall* call, hetlora::Type in, hetlora::Type sums, const void* weights) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_type(in, [&](auto type) {
        using T = decltype(type);
        if (sums == Type::f64)
            HETLORA_LAUNCH((accumulate_kernel<T, double>), grid, dim3(WARP * WARPS), call->stream, call->table, static_cast<const double*>(weights));
        else HETLORA_LAUNCH((accumulate_kernel<T, float>), grid, dim3(WARP * WARPS), call->stream, call->table, static_cast<const float*>(weights));
        return cudaGetLastError();
    });
}
