#include "upload.cuh"

#include <algorithm>

#include "dispatch.cuh"

namespace hetlora {

template <int N>
static cudaError_t upload(const unsigned char* from, uint4* to, int count, cudaStream_t stream) {
    Words<N> words;
    std::memcpy(words.at, from, count * sizeof(uint4));
    HETLORA_LAUNCH((upload_kernel<N>), dim3(1), dim3(UPLOAD_THREADS), stream, words, to, count);
    return cudaGetLastError();
}

}  // namespace hetlora

cudaError_t hetlora_upload(const HetloraCall* call) {
    using namespace hetlora;
    const int words = static_cast<int>(call->table_bytes / sizeof(uint4));
    auto* to = static_cast<uint4*>(call->device_table);
    for (int at = 0; at < words;) {
        const int rest = words - at, count = std::min(rest, rest > SMALL_UPLOAD ? LARGE_UPLOAD : SMALL_UPLOAD);
        const unsigned char* from = call->host_table + at * sizeof(uint4);
        const cudaError_t error = count > SMALL_UPLOAD ? upload<LARGE_UPLOAD>(from, to + at, count, call->stream)
                                                       : upload<SMALL_UPLOAD>(from, to + at, count, call->stream);
        if (error != cudaSuccess) return error;
        at += count;
    }
    return cudaSuccess;
}

int hetlora_chunk(hetlora::Type type) {
    using namespace hetlora;
    return type == Type::f64 ? CHUNK<double> : type == Type::f32 ? CHUNK<float> : CHUNK<__half>;
}
