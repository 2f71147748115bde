#include "accumulate.cuh"

#include "dispatch.cuh"

cudaError_t hetlora_accumulate(const HetloraCall* call, hetlora::Type in, hetlora::Type sums, const void* weights) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_type(in, [&](auto type) {
        using T = decltype(type);
        if (sums == Type::f64)
            HETLORA_LAUNCH((accumulate_kernel<T, double>), grid, dim3(WARP * WARPS), call->stream, call->table, static_cast<const double*>(weights));
        else
            HETLORA_LAUNCH((accumulate_kernel<T, float>), grid, dim3(WARP * WARPS), call->stream, call->table, static_cast<const float*>(weights));
        return cudaGetLastError();
    });
}
