#include "quantize.cuh"

#include "dispatch.cuh"

cudaError_t hetlora_quantize(const HetloraCall* call, hetlora::Type in, int bits) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_type(in, [&](auto type) {
        HETLORA_LAUNCH((quantize_kernel<decltype(type)>), grid, dim3(WARP * WARPS), call->stream, call->table, bits);
        return cudaGetLastError();
    });
}

cudaError_t hetlora_dequantize(const HetloraCall* call, hetlora::Type out, int bits) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_type(out, [&](auto type) {
        HETLORA_LAUNCH((dequantize_kernel<decltype(type)>), grid, dim3(WARP * WARPS), call->stream, call->table, bits);
        return cudaGetLastError();
    });
}
