// grouped_gram: S_k^T drop(x_k), [r_k, d] for each client: the gradients of both factors.
//
// One block owns 64 columns, all ranks of one client and one chunk of GRAM_ROWS of its rows; x and S pass through 2 to 4 stages by cp.async, both read from
// shared memory transposed (ldmatrix.trans). A client with one chunk is stored at once; the planes of the others are added in the order of the rows by a
// second launch, one for both factors. Chunks are counted from the client's own first row and there are no atomics: its gradient has the same bits alone and
// beside others.
// Bytes: T d in, S r d out; S again from L2 for every 64 columns, x again for every further 128 ranks; planes: T / GRAM_ROWS r d twice.
#include <algorithm>

#include "dispatch.cuh"
#include "lora.cuh"

namespace hetlora {

// Where a block's result goes: straight to the gradient, or to a plane of partial sums.
struct GramPlace {
    int64_t plane_row;  // -1: to the gradient
    int left, first;
};

template <class T, int TILES, class Acc>
__device__ __forceinline__ void store_gram(const LoraCall& call, const LoraClient& client, const GramPlace& place, const Acc (&c)[TILES][4]) {
    const Acc scale = static_cast<Acc>(call.inverse);
    const bool sums = place.plane_row >= 0 || call.out_type == TYPE<Acc>;
    const int64_t row = (place.plane_row >= 0 ? place.plane_row : client.row) + place.first;
    void* out = place.plane_row >= 0 ? call.planes : call.out;
#pragma unroll
    for (int j = 0; j < TILES; ++j) {
        if (place.first + 8 * j >= client.rank) break;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int column = place.left + threadIdx.x / WARP * WARP_ROWS + sum_row(i), rank = 8 * j + sum_column(i);
            if (column >= call.width || place.first + rank >= client.rank) continue;
            const int64_t at = (row + rank) * call.width + column;
            if (sums) static_cast<Acc*>(out)[at] = c[j][i] * scale;
            else static_cast<T*>(out)[at] = convert<T>(c[j][i] * scale);
        }
    }
}

// Rows top .. end - 1 of the client, ranks from place.first.
template <class T, bool DROP>
__device__ __forceinline__ void gram_rows(const LoraCall& call, const LoraClient& client, int top, int end, const GramPlace& place, T* shared) {
    using Acc = typename Accumulator<T>::type;
    constexpr int S = DEPTH<T> * LORA_COLUMNS, UNITS = LORA_COLUMNS / DRAWS, STRIDE = LORA_THREADS / UNITS, PARTS = DEPTH<T> / STRIDE;
    const int row = threadIdx.x / UNITS, column = threadIdx.x % UNITS * DRAWS, own = threadIdx.x / WARP * WARP_ROWS;
    const int ranks = min(PASS, round_up(client.rank - place.first, SLICE)), pitch = round_up(ranks, DEPTH<T>);
    const int64_t seed = DROP ? call.seeds[client.client] : 0;
    const uint32_t limit = drop_limit(call.threshold);
    int64_t key[PARTS];
    Acc c[PASS / 8][4] = {};
    Ring ring = Ring::of<T>(DEPTH<T> * (LORA_COLUMNS + pitch));
#pragma unroll 1
    for (int step = 1 - ring.stages; top + step * DEPTH<T> < end; ++step) {
        T* stage = shared + ring.use * ring.elements;
        if (step >= 0) {
            ring.await();
            if (DROP) {
#pragma unroll
                for (int part = 0; part < PARTS; ++part)
                    drop_unit(stage, LORA_COLUMNS, row + part * STRIDE, column, draws(seed, key[part], place.left + column), limit);
            }
            __syncthreads();  // the stage is whole, and the one before it is free
        }
        const int t = top + (step + ring.stages - 1) * DEPTH<T>;
        if (t < end) {
            T* next = shared + ring.fill * ring.elements;
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int at = t + row + part * STRIDE;
                const T* from = at < end ? static_cast<const T*>(call.x) + row_of(call, client, at) * call.width + place.left + column : nullptr;
                copy_unit(next, LORA_COLUMNS, row + part * STRIDE, column, from, 1, from ? call.width - place.left - column : 0, call.aligned);
            }
            copy_shrunk(next + S, pitch, call, client, t, DEPTH<T>, end, place.first, ranks / DRAWS);
        }
        close_copies();
        ring.fill = ring.next(ring.fill);
        if (DROP) {  // the keys of the next step: they arrive during the product
#pragma unroll
            for (int part = 0; part < PARTS; ++part) {
                const int at = top + (step + 1) * DEPTH<T> + row + part * STRIDE;
                key[part] = step >= -1 && at < end ? call.keys[client.start + at] : 0;
            }
        }
        if (step < 0) continue;
        multiply(c, Operand<T, true>{stage, LORA_COLUMNS}, own, Operand<T, true>{stage + S, pitch}, ranks, DEPTH<T>);
        ring.use = ring.next(ring.use);
    }
    store_gram<T>(call, client, place, c);
}

template <class T, bool DROP>
__global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS<T>) grouped_gram_kernel(const __grid_constant__ LoraCall call) {
    alignas(128) __shared__ unsigned char shared[LORA_POOL];
    const int across = (call.width + LORA_COLUMNS - 1) / LORA_COLUMNS, index = blockIdx.x / across;
    const LoraClient client = find_client(call.table, &LoraClient::chunks, index);
    const int chunk = index - client.chunks, top = chunk * GRAM_ROWS, end = min(client.length, top + GRAM_ROWS);
    GramPlace place{client.plane < 0 ? -1 : client.plane + static_cast<int64_t>(chunk) * client.rank, static_cast<int>(blockIdx.x % across) * LORA_COLUMNS, 0};
#pragma unroll 1
    for (; place.first < client.rank; place.first += PASS) {
        if (place.first) __syncthreads();
        gram_rows<T, DROP>(call, client, top, end, place, reinterpret_cast<T*>(shared));
    }
}

constexpr int SUM_THREADS = 256;

// Grid: columns, clients, rank rows of both gradients in turn.
template <class Acc>
__global__ void __launch_bounds__(SUM_THREADS) grouped_gram_sum_kernel(const __grid_constant__ GramSums sums) {
    const LoraClient& client = (sums.table.far ? sums.table.far : sums.table.near)[blockIdx.y];
    const int which = blockIdx.z % sums.count, width = sums.width[which];
    const int column = blockIdx.x * SUM_THREADS + threadIdx.x, chunks = (client.length + GRAM_ROWS - 1) / GRAM_ROWS;
    if (client.plane < 0 || column >= width) return;
    const Acc* planes = static_cast<const Acc*>(sums.planes[which]) + column;
    for (int rank = blockIdx.z / sums.count; rank < client.rank; rank += gridDim.z / sums.count) {
        Acc total = 0;
        for (int chunk = 0; chunk < chunks; ++chunk) total += planes[(client.plane + static_cast<int64_t>(chunk) * client.rank + rank) * width];
        store_one_as(sums.type[which], sums.out[which], static_cast<int64_t>(client.row + rank) * width + column, total);
    }
}

}  // namespace hetlora

cudaError_t hetlora_grouped_gram(const hetlora::LoraCall* call, hetlora::Type type, int64_t chunks, cudaStream_t stream) {
    using namespace hetlora;
    const int64_t blocks = chunks * divide_up(call->width, LORA_COLUMNS);
    if (blocks == 0) return cudaSuccess;
    if (blocks > INT32_MAX || call->table.count > 65535) return cudaErrorInvalidConfiguration;
    return with_type(type, [&](auto value) {
        using T = decltype(value);
        const dim3 grid(static_cast<unsigned>(blocks)), block(LORA_THREADS);
        if (call->seeds) HETLORA_LAUNCH((grouped_gram_kernel<T, true>), grid, block, stream, *call);
        else HETLORA_LAUNCH((grouped_gram_kernel<T, false>), grid, block, stream, *call);
        return cudaGetLastError();
    });
}

cudaError_t hetlora_grouped_gram_sum(const hetlora::GramSums* sums, hetlora::Type type, int rank, cudaStream_t stream) {
    using namespace hetlora;
    const int width = std::max(sums->width[0], sums->count == 2 ? sums->width[1] : 0);
    if (width == 0 || sums->table.count == 0) return cudaSuccess;
    return with_type(type, [&](auto value) {
        using Acc = typename Accumulator<decltype(value)>::type;
        const dim3 grid(divide_up(width, SUM_THREADS), sums->table.count, std::min(rank, 64) * sums->count);
        HETLORA_LAUNCH((grouped_gram_sum_kernel<Acc>), grid, dim3(SUM_THREADS), stream, *sums);
        return cudaGetLastError();
    });
}
