#include "truncate.cuh"

#include "dispatch.cuh"

cudaError_t hetlora_truncate(const HetloraCall* call, hetlora::Type in, hetlora::Type out, bool dense) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call, divide_up(call->table.clients, WARP));
    if (is_empty(grid)) return cudaSuccess;
    return with_type(in, [&](auto type) {
        HETLORA_LAUNCH((truncate_kernel<decltype(type)>), grid, dim3(WARP * WARPS), call->stream, call->table, out, dense);
        return cudaGetLastError();
    });
}
