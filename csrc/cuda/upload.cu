// A table travels to the device as kernel arguments. Arguments are copied when the kernel is launched or captured. So the call never waits, it needs no pinned
// host memory that outlives it, and a CUDA graph replays it. A copy from pageable host memory would be captured as a pointer to a dead vector.
#include <cuda_runtime_api.h>

#include <algorithm>

#include "dispatch.cuh"

namespace hetlora {

template <int N>
struct Words {
    uint4 at[N];
};

constexpr int UPLOAD_THREADS = 256, SMALL_UPLOAD = 240;
// Arguments of up to 32764 bytes need CUDA 12.1; before it the limit is 4096.
constexpr int LARGE_UPLOAD = CUDART_VERSION >= 12010 ? 2000 : SMALL_UPLOAD;

template <int N>
__global__ void upload_kernel(const __grid_constant__ Words<N> words, uint4* out, int count) {
    for (int i = threadIdx.x; i < count; i += UPLOAD_THREADS) out[i] = words.at[i];
}

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
        const cudaError_t error =
            count > SMALL_UPLOAD ? upload<LARGE_UPLOAD>(from, to + at, count, call->stream) : upload<SMALL_UPLOAD>(from, to + at, count, call->stream);
        if (error != cudaSuccess) return error;
        at += count;
    }
    return cudaSuccess;
}

int hetlora_chunk(hetlora::Type type) {
    using namespace hetlora;
    return type == Type::f64 ? CHUNK<double> : type == Type::f32 ? CHUNK<float> : CHUNK<__half>;
}
