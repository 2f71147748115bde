#include "expand.cuh"

#include "dispatch.cuh"

cudaError_t hetlora_expand(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream) {
    using namespace hetlora;
    const int64_t blocks = tiles * divide_up(call->width, LORA_COLUMNS);
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return with_type(type, [&](auto value) {
        using T = decltype(value);
        const dim3 grid(static_cast<unsigned>(blocks)), block(LORA_THREADS);
        if (call->seeds) HETLORA_LAUNCH((expand_kernel<T, true>), grid, block, stream, *call);
        else HETLORA_LAUNCH((expand_kernel<T, false>), grid, block, stream, *call);
        return cudaGetLastError();
    });
}
