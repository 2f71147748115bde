// Runs unmodified CUDA kernels on the host, to test them where there is no GPU: one fiber per CUDA thread, blocks one after another.
//
// Include it before a kernel's own headers and compile the .cu as C++ (needs the CUDA toolkit's headers, not nvcc). HETLORA_LAUNCH then runs the kernel at
// once. The order in which threads run is set by the environment variable HETLORA_SCHEDULE: fwd, rev, rand, or warp (one warp runs as far ahead as it can);
// none counts the launch and runs nothing.
// Barriers that some threads miss, collectives with lanes that have left, and deadlocks become the error that cudaGetLastError returns. Nothing is said
// about timing, bank conflicts or the memory model.
#pragma once
#include <math.h>
#include <string.h>

#include <algorithm>
#include <cstdint>
#include <functional>

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#undef __global__
#undef __device__
#undef __host__
#undef __shared__
#undef __forceinline__
#undef __launch_bounds__
#undef __grid_constant__
#define __global__ static  // AddressSanitizer guards no array that the linker may merge with another translation unit's
#define __device__
#define __host__
#define __shared__ static  // blocks run one after another, so one copy is enough
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

namespace emulator {

enum class Collective : int { shuffle, ballot, sync, matrices, product };

struct Place {
    dim3 grid, block;
    uint3 block_index, thread_index;
    int lane;
};

// Where the running thread is.
const Place& here();
void run(dim3 grid, dim3 block, const std::function<void()>& body);
void block_barrier(int line);
// Meets the lanes of `mask` at the same kind of collective and returns when all are there.
void meet(unsigned mask, Collective kind);
uint64_t& slot(int lane);  // of the running thread's warp
const void*& offer(int lane);  // the same, an address: valid until the lanes meet again

// Asynchronous copies: what the running thread starts arrives when it waits for it, and is garbage until then.
void start_copy(void* to, const void* from, int bytes);
void close_copies();
void await_copies(int pending);

template <class T>
T exchange(unsigned mask, T value, int from) {
    static_assert(sizeof(T) <= sizeof(uint64_t));
    memcpy(&slot(here().lane), &value, sizeof(T));
    meet(mask, Collective::shuffle);
    T out;
    memcpy(&out, &slot(from & 31), sizeof(T));
    meet(mask, Collective::shuffle);
    return out;
}

}  // namespace emulator

#define gridDim (emulator::here().grid)
#define blockDim (emulator::here().block)
#define blockIdx (emulator::here().block_index)
#define threadIdx (emulator::here().thread_index)
#define __syncthreads() emulator::block_barrier(__LINE__)
#define HETLORA_EMULATOR 1
#define HETLORA_LAUNCH(kernel, grid, threads, stream, ...) emulator::run(grid, threads, [=] { (void)(stream), kernel(__VA_ARGS__); })

using std::max;
using std::min;

inline unsigned __umulhi(unsigned a, unsigned b) { return static_cast<unsigned>(static_cast<uint64_t>(a) * b >> 32); }

inline int __ffs(int value) { return __builtin_ffs(value); }

inline void __syncwarp(unsigned mask = 0xffffffffu) { emulator::meet(mask, emulator::Collective::sync); }

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
    return emulator::exchange(mask, value, from);
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
    return emulator::exchange(mask, value, emulator::here().lane ^ distance);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
    emulator::slot(emulator::here().lane) = predicate != 0;
    emulator::meet(mask, emulator::Collective::ballot);
    unsigned out = 0;
    for (int lane = 0; lane < 32; ++lane)
        if (mask >> lane & 1) out |= static_cast<unsigned>(emulator::slot(lane)) << lane;
    emulator::meet(mask, emulator::Collective::ballot);
    return out;
}
