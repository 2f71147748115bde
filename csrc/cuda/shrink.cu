// shrink: S_k = scale_k drop(x_k) A_k^T, [T_k, r_k] packed.
//
// One block owns 64 rows of one client and all its ranks: x passes through shared memory once (again for every further 128 ranks), A_k comes from L2 once per
// block. 2 to 4 stages of 128 bytes a row, filled by cp.async up to 3 ahead. The thread that copied eight columns drops them, one Philox counter for all eight,
// and only then the block's barrier lets the others see them; 1 / (1 - p) is part of the scale, so that what is multiplied is x itself.
// Bytes: T n in, S r / rank in, T r out. Tiles are of a client's own rows: nothing is padded, and its S does not depend on who else is in the call.
// No split of n over blocks: at 8 K rows there are 128 of them, and partial sums would cost a second launch.
#include "dispatch.cuh"
#include "lora.cuh"

namespace hetlora {

// Rows from `top`, ranks from `first`.
template <class T, bool DROP>
__device__ __forceinline__ void shrink_tile(const LoraCall& call, const LoraClient& client, int top, int first, T* shared) {
    using Acc = typename Accumulator<T>::type;
    constexpr int FACTOR = LORA_ROWS * DEPTH<T>, UNITS = DEPTH<T> / DRAWS, STRIDE = LORA_THREADS / UNITS, PARTS = LORA_ROWS / STRIDE;
    const int row = threadIdx.x / UNITS, column = threadIdx.x % UNITS * DRAWS, own = threadIdx.x / WARP * WARP_ROWS;
    const int steps = (call.width + DEPTH<T> - 1) / DEPTH<T>, ranks = min(PASS, round_up(client.rank - first, SLICE));
    const T* source[PARTS];  // null past the client's rows
    int64_t key[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int t = top + row + part * STRIDE;
        source[part] = t < client.length ? static_cast<const T*>(call.x) + row_of(call, client, t) * call.width + column : nullptr;
        if (DROP) key[part] = t < client.length ? call.keys[client.start + t] : 0;
    }
    const int64_t seed = DROP ? call.seeds[client.client] : 0;
    const uint32_t limit = drop_limit(call.threshold);
    Acc c[PASS / 8][4] = {};
    Ring ring = Ring::of<T>((LORA_ROWS + ranks) * DEPTH<T>);
#pragma unroll 1
    for (int step = 1 - ring.stages; step < steps; ++step) {
        T* stage = shared + ring.use * ring.elements;
        if (step >= 0) {
            ring.await();
            if (DROP) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    drop_unit(stage, DEPTH<T>, row + part * STRIDE, column, draws(seed, key[part], step * DEPTH<T> + column), limit);
            }
            __syncthreads();  // the stage is whole, and the one before it is free
        }
        const int k = (step + ring.stages - 1) * DEPTH<T>;
        if (k < call.width) {
            T* next = shared + ring.fill * ring.elements;
#pragma unroll
            for (int part = 0; part < PARTS; ++part)
                copy_unit(next, DEPTH<T>, row + part * STRIDE, column, source[part] + k, 1, source[part] ? call.width - k - column : 0, call.aligned);
            copy_factor(next + FACTOR, DEPTH<T>, call, client, first, ranks, k, UNITS);
        }
        close_copies();
        ring.fill = ring.next(ring.fill);
        if (step < 0) continue;
        multiply(c, Operand<T, false>{stage, DEPTH<T>}, own, Operand<T, false>{stage + FACTOR, DEPTH<T>}, ranks, DEPTH<T>);
        ring.use = ring.next(ring.use);
    }
    const Acc scale = static_cast<const Acc*>(call.scale)[client.client] * (DROP ? static_cast<Acc>(call.inverse) : Acc(1));
    T* s = static_cast<T*>(call.s) + client.flat;
#pragma unroll
    for (int j = 0; j < PASS / 8; ++j) {
        if (8 * j >= ranks) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int t = top + own + sum_row(i), rank = first + 8 * j + sum_column(i);
            if (t < client.length && rank < client.rank) s[static_cast<int64_t>(t) * client.rank + rank] = convert<T>(c[j][i] * scale);
        }
    }
}

template <class T, bool DROP>
__global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS<T>) shrink_kernel(const __grid_constant__ LoraCall call) {
    alignas(128) __shared__ unsigned char shared[LORA_POOL];
    const LoraClient client = find_client(call.table, &LoraClient::tiles, blockIdx.x);
    const int top = (static_cast<int>(blockIdx.x) - client.tiles) * LORA_ROWS;
#pragma unroll 1
    for (int first = 0; first < client.rank; first += PASS) {
        if (first) __syncthreads();
        shrink_tile<T, DROP>(call, client, top, first, reinterpret_cast<T*>(shared));
    }
}

}  // namespace hetlora

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
