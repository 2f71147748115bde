// A table travels to the device as kernel arguments: they are copied when the kernel is launched or captured, so that the call never waits, needs no pinned
// host memory that has to outlive it, and replays from a CUDA graph. A copy from pageable host memory would be captured as a pointer to a dead vector.
#pragma once
#include <cuda_runtime_api.h>

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

}  // namespace hetlora
