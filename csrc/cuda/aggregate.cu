#include "aggregate.cuh"

#include "dispatch.cuh"

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
