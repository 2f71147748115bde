// shrink: S_k = scale_k drop(x_k) A_k^T, [T_k, r_k] packed.
//
// One block owns 64 rows of one client, all its ranks and one split of the columns: x passes through shared memory once (again for every further 128 ranks),
// A_k comes from L2 once per 64 rows. 2 to 4 stages of 128 bytes a row, filled by cp.async up to 3 ahead. The thread that copied eight columns drops them, one
// Philox counter for all eight, and only then the block's barrier lets the others see them; 1 / (1 - p) is part of the scale, so that what is multiplied is x.
// Splits are of 1024 columns, or an eighth of them if that is more. Each is a plane of float32 sums; expand, or a launch of its own, adds them in the order of
// the columns. Bytes: T n in, S n in, T r out; with p splits p T r of partial sums out and in.
// Tiles are of a client's own rows: nothing is padded, and a client's S does not depend on who else is in the call.
// One block for all of n would be T / 64 blocks in all: at 2048 rows 32 of them, on the 132 multiprocessors of an H100.
#include "dispatch.cuh"
#include "lora.cuh"

namespace hetlora {

// Rows from `top`, ranks from `first`, columns from `left`.
template <class T, bool DROP>
__device__ __forceinline__ void shrink_tile(const LoraCall& call, const LoraClient& client, int top, int first, int left, T* shared) {
    using Acc = typename Accumulator<T>::type;
    constexpr int FACTOR = LORA_ROWS * DEPTH<T>, UNITS = DEPTH<T> / DRAWS, STRIDE = LORA_THREADS / UNITS, PARTS = LORA_ROWS / STRIDE;
    const int row = threadIdx.x / UNITS, column = threadIdx.x % UNITS * DRAWS, own = threadIdx.x / WARP * WARP_ROWS;
    const int width = min(shrink_columns(call.width), call.width - left), steps = (width + DEPTH<T> - 1) / DEPTH<T>,
              ranks = min(PASS, round_up(client.rank - first, SLICE));
    int source[PARTS];  // row of x, -1 past the client's; the 64-bit address is made anew for each stage: registers are what is short
    int64_t key[PARTS];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int t = top + row + part * STRIDE;
        source[part] = t < client.length ? static_cast<int>(row_of(call, client, t)) : -1;
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
                    drop_unit(stage, DEPTH<T>, row + part * STRIDE, column, draws(seed, key[part], left + step * DEPTH<T> + column), limit);
            }
            __syncthreads();  // the stage is whole, and the one before it is free
        }
        const int k = (step + ring.stages - 1) * DEPTH<T>;
        if (k < width) {
            T* next = shared + ring.fill * ring.elements;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const T* from = static_cast<const T*>(call.x) + static_cast<int64_t>(max(source[part], 0)) * call.width + left + k + column;
                copy_unit(next, DEPTH<T>, row + part * STRIDE, column, from, 1, source[part] < 0 ? 0 : width - k - column, call.aligned);
            }
            copy_factor(next + FACTOR, DEPTH<T>, call, client, first, ranks, left + k, UNITS);
        }
        close_copies();
        ring.fill = ring.next(ring.fill);
        if (step < 0) continue;
        multiply(c, Operand<T, false>{stage, DEPTH<T>}, own, Operand<T, false>{stage + FACTOR, DEPTH<T>}, ranks, DEPTH<T>);
        ring.use = ring.next(ring.use);
    }
    const Acc scale = scale_of<Acc>(call, client);
    T* s = static_cast<T*>(call.s) + client.flat;
    Acc* plane = call.planes ? static_cast<Acc*>(call.planes) + left / shrink_columns(call.width) * call.plane_size : nullptr;
#pragma unroll
    for (int j = 0; j < PASS / 8; ++j) {
        if (8 * j >= ranks) break;
#pragma unroll
        for (int i = 0; i < 4; i += 2) {
            const int t = top + own + sum_row(i), rank = first + 8 * j + sum_column(i);
            if (t >= client.length) continue;
            if (plane) {  // what lies past the client's rank is never read
                if (first + 8 * j < client.rank)
                    *reinterpret_cast<Pack<Acc, 2>*>(plane + static_cast<int64_t>(client.start + t) * call.pitch + rank) = {{c[j][i], c[j][i + 1]}};
                continue;
            }
#pragma unroll
            for (int e = 0; e < 2; ++e)
                if (rank + e < client.rank) s[static_cast<int64_t>(t) * client.rank + rank + e] = convert<T>(c[j][i + e] * scale);
        }
    }
}

// The copy with a pitch of 64 rows of S: a warp has one row at a time.
template <class T>
__device__ __forceinline__ void widen_rows(const LoraCall& call, const LoraClient& client, int top) {
    for (int t = top + static_cast<int>(threadIdx.x) / WARP; t < min(client.length, top + LORA_ROWS); t += LORA_THREADS / WARP) {
        const T* s = static_cast<const T*>(call.s) + client.flat + static_cast<int64_t>(t) * client.rank;
        for (int rank = lane_id(); rank < client.rank; rank += WARP) wide_row<T>(call, client, t)[rank] = s[rank];
    }
}

template <class T, bool DROP>
__global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS<T>) shrink_kernel(const __grid_constant__ LoraCall call) {
    alignas(128) __shared__ unsigned char shared[LORA_POOL];
    const int tile = static_cast<int>(blockIdx.x) / call.splits, left = static_cast<int>(blockIdx.x) % call.splits * shrink_columns(call.width);
    const LoraClient client = find_client(call.table, &LoraClient::tiles, tile);
    const int top = (tile - client.tiles) * LORA_ROWS;
#pragma unroll 1
    for (int first = 0; first < client.rank; first += PASS) {
        if (first) __syncthreads();
        shrink_tile<T, DROP>(call, client, top, first, left, reinterpret_cast<T*>(shared));
    }
    if (!call.wide || call.planes) return;
    __syncthreads();  // S is whole
    widen_rows<T>(call, client, top);
}

// Adds the planes: a block has 64 rows of one client.
template <class T>
__global__ void __launch_bounds__(LORA_THREADS, sizeof(T) == 8 ? 4 : 8) shrink_sum_kernel(const __grid_constant__ LoraCall call) {
    const LoraClient client = find_client(call.table, &LoraClient::tiles, blockIdx.x);
    const int top = (static_cast<int>(blockIdx.x) - client.tiles) * LORA_ROWS, rows = min(LORA_ROWS, client.length - top),
              units = (client.rank + DRAWS - 1) / DRAWS;
    for (int at = threadIdx.x; at < rows * units; at += LORA_THREADS) {
        const int t = top + at / units, first = at % units * DRAWS;
        store_shrunk(call, client, t, first, sum_planes<T>(call, client, t, first));
    }
}

// The copy with a pitch of an S that an earlier call has made.
template <class T>
__global__ void __launch_bounds__(LORA_THREADS) widen_kernel(const __grid_constant__ LoraCall call) {
    const LoraClient client = find_client(call.table, &LoraClient::tiles, blockIdx.x);
    widen_rows<T>(call, client, (static_cast<int>(blockIdx.x) - client.tiles) * LORA_ROWS);
}

}  // namespace hetlora

cudaError_t hetlora_shrink(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream) {
    using namespace hetlora;
    const int64_t blocks = tiles * call->splits;
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX) return cudaErrorInvalidConfiguration;
    return with_type(type, [&](auto value) {
        using T = decltype(value);
        const dim3 grid(static_cast<unsigned>(blocks)), block(LORA_THREADS);
        if (call->seeds) HETLORA_LAUNCH((shrink_kernel<T, true>), grid, block, stream, *call);
        else HETLORA_LAUNCH((shrink_kernel<T, false>), grid, block, stream, *call);
        return cudaGetLastError();
    });
}

cudaError_t hetlora_shrink_sum(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream) {
    using namespace hetlora;
    if (tiles == 0) return cudaSuccess;
    return with_type(type, [&](auto value) {
        HETLORA_LAUNCH((shrink_sum_kernel<decltype(value)>), dim3(static_cast<unsigned>(tiles)), dim3(LORA_THREADS), stream, *call);
        return cudaGetLastError();
    });
}

cudaError_t hetlora_widen(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream) {
    using namespace hetlora;
    if (tiles == 0) return cudaSuccess;
    return with_type(type, [&](auto value) {
        HETLORA_LAUNCH((widen_kernel<decltype(value)>), dim3(static_cast<unsigned>(tiles)), dim3(LORA_THREADS), stream, *call);
        return cudaGetLastError();
    });
}
