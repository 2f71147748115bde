#include "shrink.cuh"

#include "dispatch.cuh"

cudaError_t hetlora_shrink(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream) {
    using namespace hetlora;
    if (tiles == 0) return cudaSuccess;
    return with_type(type, [&](auto value) {
        using T = decltype(value);
        const dim3 grid(static_cast<unsigned>(tiles)), block(LORA_THREADS);
        if (call->seeds) HETLORA_LAUNCH((shrink_kernel<T, true>), grid, block, stream, *call);
        else HETLORA_LAUNCH((shrink_kernel<T, false>), grid, block, stream, *call);
        return cudaGetLastError();
    });
}
