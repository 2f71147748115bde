#include "grouped_gram.cuh"

#include <algorithm>

#include "dispatch.cuh"

cudaError_t hetlora_grouped_gram(const hetlora::LoraCall* call, hetlora::Type type, int64_t chunks, int rank, cudaStream_t stream) {
    using namespace hetlora;
    const int64_t blocks = chunks * divide_up(call->width, LORA_COLUMNS);
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX || call->table.count > 65535) return cudaErrorInvalidConfiguration;
    return with_type(type, [&](auto value) {
        using T = decltype(value);
        using Acc = typename Accumulator<T>::type;
        const dim3 grid(static_cast<unsigned>(blocks)), block(LORA_THREADS);
        if (call->seeds) HETLORA_LAUNCH((grouped_gram_kernel<T, true>), grid, block, stream, *call);
        else HETLORA_LAUNCH((grouped_gram_kernel<T, false>), grid, block, stream, *call);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess || !call->planes) return error;
        const dim3 sums(divide_up(call->width, SUM_THREADS), call->table.count, std::min(rank, 64));
        HETLORA_LAUNCH((grouped_gram_sum_kernel<Acc>), sums, dim3(SUM_THREADS), stream, *call);
        return cudaGetLastError();
    });
}
