// Distribution: rows of client k = leading rows of the bank, cast on the way.
//
// One warp owns one bank row x CHUNK columns and 32 clients (grid z): it reads the piece once, keeps it in registers and stores it to each client whose
// rank exceeds the row; the owners come from one ballot. Bytes: R d in (again for every further 32 clients, from L2), S d out; dense: K R d out.
// A warp per output row would read the bank once per client and leave the repeats to L2.
#include "dispatch.cuh"

namespace hetlora {

template <bool ALIGNED, class T>
__device__ __forceinline__ void truncate_item(const Item& item, const Table& table, Type out_type, bool dense) {
    using Acc = typename Accumulator<T>::type;
    constexpr int V = VECTOR<T>, PARTS = CHUNK<T> / (WARP * V);
    const Module& module = item.module;
    const int first = blockIdx.z * WARP, mine = first + lane_id();
    int offset = 0;
    bool owns = false;
    if (mine < table.clients) {
        offset = item.layout[mine];
        owns = item.layout[mine + 1] - offset > item.row;
    }
    const unsigned owners = __ballot_sync(ALL_LANES, owns);
    if (!dense && !owners) return;
    Acc value[PARTS][V];
    const T* source = static_cast<const T*>(module.p[0]) + static_cast<int64_t>(item.row) * module.width;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) load<ALIGNED>(value[part], source, item.column + part * WARP * V, module.width);
    const Acc zero[V] = {};
    const int count = min(WARP, table.clients - first);
    for (int lane = 0; lane < count; ++lane) {
        const bool owned = owners >> lane & 1;
        const int start = __shfl_sync(ALL_LANES, offset, lane);
        if (!dense && !owned) continue;
        const int64_t row = dense ? static_cast<int64_t>(first + lane) * module.rows + item.row : start + item.row;
#pragma unroll
        for (int part = 0; part < PARTS; ++part) {
            const int base = item.column + part * WARP * V;
            if (owned) store_as<ALIGNED>(out_type, module.p[1], row * module.width, value[part], base, module.width);
            else store_as<ALIGNED>(out_type, module.p[1], row * module.width, zero, base, module.width);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(WARP* WARPS) truncate_kernel(Table table, Type out_type, bool dense) {
    Item item;
    if (!find_item(item, table, CHUNK<T>)) return;
    if (item.module.aligned) truncate_item<true, T>(item, table, out_type, dense);
    else truncate_item<false, T>(item, table, out_type, dense);
}

}  // namespace hetlora

cudaError_t hetlora_truncate(const HetloraCall* call, hetlora::Type in, hetlora::Type out, bool dense) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call, divide_up(call->table.clients, WARP));
    if (is_empty(grid)) return cudaSuccess;
    return with_type(in, [&](auto type) {
        HETLORA_LAUNCH((truncate_kernel<decltype(type)>), grid, dim3(WARP * WARPS), call->stream, call->table, out, dense);
        return cudaGetLastError();
    });
}
