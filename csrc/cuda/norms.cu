#include "norms.cuh"

#include "dispatch.cuh"

cudaError_t hetlora_squares(const HetloraCall* call, hetlora::Type type, bool grads, double* partials, int64_t count) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_type(type, [&](auto of) {
        HETLORA_LAUNCH((squares_kernel<decltype(of)>), grid, dim3(WARP * WARPS), call->stream, call->table, partials, count, grads);
        return cudaGetLastError();
    });
}

cudaError_t hetlora_tail_norms(const HetloraCall* call, hetlora::Type type, const double* partials, void* out) {
    using namespace hetlora;
    const dim3 grid(call->table.clients, call->modules);
    if (is_empty(grid)) return cudaSuccess;
    const int chunk = hetlora_chunk(type);
    if (type == Type::f64) HETLORA_LAUNCH((tail_norms_kernel<double>), grid, dim3(WARP), call->stream, call->table, partials, static_cast<double*>(out), chunk);
    else HETLORA_LAUNCH((tail_norms_kernel<float>), grid, dim3(WARP), call->stream, call->table, partials, static_cast<float*>(out), chunk);
    return cudaGetLastError();
}
