// expand: out_k = before + S_k B_k, where `before` is out itself, a base layer's output, or the bias (nothing, for dx) in a layer that starts from its LoRA
// term; with the dropout mask and 1 / (1 - p) on the product in the way of dx.
//
// One block owns 64 rows of one client and 64 columns. What it adds to is requested before anything else and waits in registers; S and B_k pass through two
// stages of 64 ranks (32 in float32, 16 in float64) by cp.async, multiplied in steps of 16 ranks: a rank of 16 costs one. The product goes through shared
// memory once, so that each thread then has eight neighbouring columns: 16-byte accesses, and one Philox counter.
// Bytes: T m in and out (out alone over a bias), T r in; again from L2: S per 64 columns, B_k per 64 rows. Neighbouring blocks write neighbouring columns.
#include "dispatch.cuh"
#include "lora.cuh"

namespace hetlora {

constexpr int EXPAND_PITCH = LORA_COLUMNS + 8;  // rows of the product in shared memory: the eight rows that a warp stores at once lie in different banks

template <class T>
constexpr int EXPAND_STAGE = DEPTH<T> * (LORA_ROWS + LORA_COLUMNS);  // elements
template <class T>
constexpr int EXPAND_SHARED =
    larger(2 * EXPAND_STAGE<T> * static_cast<int>(sizeof(T)), LORA_ROWS * EXPAND_PITCH * static_cast<int>(sizeof(typename Accumulator<T>::type)));

constexpr int EXPAND_UNITS = LORA_COLUMNS / DRAWS, EXPAND_PARTS = WARP_ROWS * EXPAND_UNITS / WARP;  // units in a row; units of a lane

// Where a lane's units are: rows of its own warp, so that no block barrier is needed to read the product.
struct ExpandPlace {
    int64_t row[EXPAND_PARTS];  // of out; -1 past the client's rows
    int local, column;          // its first row in the tile; its column in out
};

// Eight neighbouring columns of out in a type that is not that of S, in accesses of 16 bytes: two for a float32 base under bfloat16 x.
template <class Out, class Acc>
__device__ __forceinline__ void add_wide(const LoraCall& call, int64_t row, int column, const Acc (&value)[DRAWS]) {
    Pack<Out, DRAWS> sum{};
    if (call.before) sum = *reinterpret_cast<const Pack<Out, DRAWS>*>(static_cast<const Out*>(call.before) + row * call.before_row + column);
#pragma unroll
    for (int e = 0; e < DRAWS; ++e) sum.v[e] = convert<Out>(convert<Acc>(sum.v[e]) + value[e]);
    *reinterpret_cast<Pack<Out, DRAWS>*>(static_cast<Out*>(call.out) + row * call.width + column) = sum;
}

// Eight columns of out one by one: a row is not aligned, or it ends here. Their type is known at run time only.
template <class Acc>
__device__ __forceinline__ void add_singly(const LoraCall& call, int64_t row, int column, const Acc (&value)[DRAWS]) {
#pragma unroll
    for (int e = 0; e < DRAWS; ++e) {
        if (column + e >= call.width) return;
        const Acc before = call.before ? load_one_as<Acc>(call.out_type, call.before, row * call.before_row + column + e) : Acc(0);
        store_one_as(call.out_type, call.out, row * call.width + column + e, before + value[e]);
    }
}

template <class T, bool DROP>
__device__ __forceinline__ void add_product(const LoraCall& call, const LoraClient& client, int top, const ExpandPlace& place,
                                            const Pack<T, DRAWS> (&before)[EXPAND_PARTS], const typename Accumulator<T>::type* product) {
    using Acc = typename Accumulator<T>::type;
    const int64_t seed = DROP ? call.seeds[client.client] : 0;
    const uint32_t limit = drop_limit(call.threshold);
#pragma unroll
    for (int part = 0; part < EXPAND_PARTS; ++part) {
        if (place.row[part] < 0 || place.column >= call.width) continue;
        const int local = place.local + part * (WARP / EXPAND_UNITS);
        const Acc* from = product + local * EXPAND_PITCH + place.column % LORA_COLUMNS;
        Acc value[DRAWS];
#pragma unroll
        for (int e = 0; e < DRAWS; ++e) value[e] = from[e];
        if (DROP) {
            const Counter drawn = draws(seed, call.keys[client.start + top + local], place.column);
#pragma unroll
            for (int e = 0; e < DRAWS; ++e) value[e] = drawn.drops(e, limit) ? Acc(0) : value[e] * static_cast<Acc>(call.inverse);
        }
        if (!call.aligned || place.column + DRAWS > call.width) {
            add_singly(call, place.row[part], place.column, value);
        } else if (call.out_type == TYPE<T>) {
            Pack<T, DRAWS> sum;
#pragma unroll
            for (int e = 0; e < DRAWS; ++e) sum.v[e] = convert<T>(convert<Acc>(before[part].v[e]) + value[e]);
            *reinterpret_cast<Pack<T, DRAWS>*>(static_cast<T*>(call.out) + place.row[part] * call.width + place.column) = sum;
        } else {
            switch (call.out_type) {
                case Type::f32: add_wide<float>(call, place.row[part], place.column, value); break;
                case Type::bf16: add_wide<__nv_bfloat16>(call, place.row[part], place.column, value); break;
                case Type::f16: add_wide<__half>(call, place.row[part], place.column, value); break;
                case Type::f64: add_wide<double>(call, place.row[part], place.column, value); break;
            }
        }
    }
}

template <class T, bool DROP>
__global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS<T>) expand_kernel(const __grid_constant__ LoraCall call) {
    using Acc = typename Accumulator<T>::type;
    alignas(128) __shared__ unsigned char shared[EXPAND_SHARED<T>];
    const int across = (call.width + LORA_COLUMNS - 1) / LORA_COLUMNS, tile = blockIdx.x / across, left = blockIdx.x % across * LORA_COLUMNS;
    const LoraClient client = find_client(call.table, &LoraClient::tiles, tile);
    const int top = (tile - client.tiles) * LORA_ROWS, own = threadIdx.x / WARP * WARP_ROWS;

    ExpandPlace place;
    place.local = own + lane_id() / EXPAND_UNITS;
    place.column = left + lane_id() % EXPAND_UNITS * DRAWS;
    Pack<T, DRAWS> before[EXPAND_PARTS] = {};
#pragma unroll
    for (int part = 0; part < EXPAND_PARTS; ++part) {
        const int t = top + place.local + part * (WARP / EXPAND_UNITS);
        place.row[part] = t < client.length ? row_of(call, client, t) : -1;
        if (!call.before || !call.aligned || call.out_type != TYPE<T> || t >= client.length || place.column + DRAWS > call.width) continue;
        before[part] = *reinterpret_cast<const Pack<T, DRAWS>*>(static_cast<const T*>(call.before) + place.row[part] * call.before_row + place.column);
    }

    Acc c[LORA_COLUMNS / 8][4] = {};
#pragma unroll 1
    for (int step = -1; step * DEPTH<T> < client.rank; ++step) {
        if (step >= 0) {
            await_copies<0>();
            __syncthreads();  // the stage is whole, and the other is free
        }
        const int first = (step + 1) * DEPTH<T>;
        if (first < client.rank) {
            T* next = reinterpret_cast<T*>(shared) + (step + 1) % 2 * EXPAND_STAGE<T>;
            const int depth = min(DEPTH<T>, round_up(client.rank - first, SLICE));
            copy_shrunk(next, DEPTH<T>, call, client, top, LORA_ROWS, client.length, first, depth / DRAWS);
            copy_factor(next + LORA_ROWS * DEPTH<T>, LORA_COLUMNS, call, client, first, depth, left, EXPAND_UNITS);
        }
        close_copies();
        if (step < 0) continue;
        T* stage = reinterpret_cast<T*>(shared) + step % 2 * EXPAND_STAGE<T>;
        multiply(c, Operand<T, false>{stage, DEPTH<T>}, own, Operand<T, true>{stage + LORA_ROWS * DEPTH<T>, LORA_COLUMNS}, LORA_COLUMNS,
                 min(DEPTH<T>, round_up(client.rank - step * DEPTH<T>, SLICE)));
    }
    __syncthreads();  // the product takes the stages' place
    Acc* product = reinterpret_cast<Acc*>(shared);
#pragma unroll
    for (int j = 0; j < LORA_COLUMNS / 8; ++j)
#pragma unroll
        for (int i = 0; i < 4; ++i) product[(own + sum_row(i)) * EXPAND_PITCH + 8 * j + sum_column(i)] = c[j][i];
    __syncwarp();
    add_product<T, DROP>(call, client, top, place, before, product);
}

}  // namespace hetlora

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
