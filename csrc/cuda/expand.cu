// expand: out_k = before + S_k B_k. `before` is one of three: out itself, a base layer's output, or the bias in a layer that starts from its LoRA term (for dx:
// nothing). In the pass of dx the product has the dropout mask and 1 / (1 - p).
//
// One block owns 64 rows of one client and 64 to 256 columns, 64 at a time. S passes through two stages of 64 ranks (32 in float32, 16 in float64) by cp.async;
// where these hold all of a client's ranks they are filled once for all columns. B_k has two stages of its own, the next on its way during a product, in steps
// of 16 ranks: a rank of 16 costs one. What is added to is requested before the product and waits in registers (16-bit types). The product goes through shared
// memory once, in the place of the B_k just used, so that each thread then has eight neighbouring columns: 16-byte accesses, and one Philox counter.
// Where shrink left planes of partial sums, each block adds those of its rows into its stages of S, in the order of the columns, and the block of the first
// columns writes S: no launch in between.
// Bytes: T m in and out (out alone over a bias), T r in; again from L2: S, or its planes, per 256 columns, B_k per 64 rows.
#include "dispatch.cuh"
#include "lora.cuh"

namespace hetlora {

template <class T>
constexpr int EXPAND_STAGE = DEPTH<T> * LORA_ROWS;  // elements of one stage of S, and of one of B_k
static_assert(LORA_ROWS == LORA_COLUMNS);

constexpr int EXPAND_UNITS = LORA_COLUMNS / DRAWS, EXPAND_PARTS = WARP_ROWS * EXPAND_UNITS / WARP;  // units in a row; units of a lane
constexpr int HALF = WARP_ROWS / 2;  // rows of a warp's product that are in shared memory at a time

// Elements of the products of all warps; they take the place of a stage of B_k where they fit.
constexpr int EXPAND_PRODUCT = LORA_THREADS / WARP * HALF * LORA_COLUMNS;
template <class T>
constexpr bool PRODUCT_IN_STAGE = EXPAND_PRODUCT * sizeof(typename Accumulator<T>::type) <= EXPAND_STAGE<T> * sizeof(T);
template <class T>
constexpr int EXPAND_SHARED = 4 * EXPAND_STAGE<T> * static_cast<int>(sizeof(T)) + (PRODUCT_IN_STAGE<T> ? 0 : EXPAND_PRODUCT * static_cast<int>(sizeof(T)));

// Where a lane's units are: rows of its own warp, so that no block barrier is needed to read the product.
struct ExpandPlace {
    int row[EXPAND_PARTS];  // of out; -1 past the client's rows
    int local, column;  // its first row in the tile; its column in the tile
};

// Eight columns of a row of a warp's product: the groups are permuted by the row, so that the eight rows that a warp stores at once lie in different banks.
template <class Acc>
__device__ __forceinline__ Acc* product_unit(Acc* product, int row, int unit) {
    return product + row * LORA_COLUMNS + (unit ^ row % EXPAND_UNITS) * DRAWS;
}

// Eight neighbouring columns of out in a type that is not that of S, in accesses of 16 bytes: two for a float32 base under bfloat16 x.
template <class Out, class Acc>
__device__ __forceinline__ void add_other(const LoraCall& call, int64_t row, int column, const Acc (&value)[DRAWS]) {
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

// Eight columns of what the product is added to; zero where `add_product` reads them one by one or in another type.
template <class T>
__device__ __forceinline__ Pack<T, DRAWS> what_was_there(const LoraCall& call, int row, int column) {
    if (!call.before || !call.aligned || call.out_type != TYPE<T> || row < 0 || column + DRAWS > call.width) return {};
    return *reinterpret_cast<const Pack<T, DRAWS>*>(static_cast<const T*>(call.before) + row * call.before_row + column);
}

// Whether that is requested before the product: in wider types there are no registers for it.
template <class T>
constexpr bool AHEAD = sizeof(T) == 2;

// Half of a warp's rows: adds their products to what was there. `left`: the tile's first column.
template <class T, bool DROP>
__device__ __forceinline__ void add_product(const LoraCall& call, const LoraClient& client, int top, int left, int half, const ExpandPlace& place,
                                            const Pack<T, DRAWS> (&before)[EXPAND_PARTS], typename Accumulator<T>::type* product) {
    using Acc = typename Accumulator<T>::type;
    const int64_t seed = DROP ? call.seeds[client.client] : 0;
    const uint32_t limit = drop_limit(call.threshold);
    const int column = left + place.column;
#pragma unroll
    for (int part = half * EXPAND_PARTS / 2; part < (half + 1) * EXPAND_PARTS / 2; ++part) {
        if (place.row[part] < 0 || column >= call.width) continue;
        const int local = place.local + part * (WARP / EXPAND_UNITS);
        const Acc* from = product_unit(product, local % HALF, place.column / DRAWS);
        Acc value[DRAWS];
#pragma unroll
        for (int e = 0; e < DRAWS; ++e) value[e] = from[e];
        if (DROP) {
            const Counter drawn = draws(seed, call.keys[client.start + top + local], column);
#pragma unroll
            for (int e = 0; e < DRAWS; ++e) value[e] = drawn.drops(e, limit) ? Acc(0) : value[e] * static_cast<Acc>(call.inverse);
        }
        const int64_t row = place.row[part];
        if (!call.aligned || column + DRAWS > call.width) {
            add_singly(call, row, column, value);
        } else if (call.out_type == TYPE<T>) {
            Pack<T, DRAWS> sum = AHEAD<T> ? before[part] : what_was_there<T>(call, place.row[part], column);
#pragma unroll
            for (int e = 0; e < DRAWS; ++e) sum.v[e] = convert<T>(convert<Acc>(sum.v[e]) + value[e]);
            *reinterpret_cast<Pack<T, DRAWS>*>(static_cast<T*>(call.out) + row * call.width + column) = sum;
        } else {
            switch (call.out_type) {
                case Type::f32: add_other<float>(call, row, column, value); break;
                case Type::bf16: add_other<__nv_bfloat16>(call, row, column, value); break;
                case Type::f16: add_other<__half>(call, row, column, value); break;
                case Type::f64: add_other<double>(call, row, column, value); break;
            }
        }
    }
}

// The client's ranks from `first` of 64 rows of S, from the planes of shrink; `keep`: into S itself, too.
template <class T>
__device__ __forceinline__ void add_planes(T* tile, const LoraCall& call, const LoraClient& client, int top, int first, int units, bool keep) {
#pragma unroll 1
    for (int at = threadIdx.x; at < LORA_ROWS * units; at += LORA_THREADS) {
        const int row = at / units, column = at % units * DRAWS;
        const bool own = top + row < client.length && first + column < client.rank;
        const Pack<T, DRAWS> value = own ? sum_planes<T>(call, client, top + row, first + column) : Pack<T, DRAWS>{};
        if (own && keep) store_shrunk(call, client, top + row, first + column, value);
#pragma unroll
        for (int e = 0; e < DRAWS; e += VECTOR<T>)
            *reinterpret_cast<Pack<T, VECTOR<T>>*>(cell(tile, DEPTH<T>, row, column + e)) = reinterpret_cast<const Pack<T, VECTOR<T>>&>(value.v[e]);
    }
}

template <class T, bool DROP>
__global__ void __launch_bounds__(LORA_THREADS, LORA_BLOCKS<T>) expand_kernel(const __grid_constant__ LoraCall call) {
    using Acc = typename Accumulator<T>::type;
    alignas(128) __shared__ unsigned char shared[EXPAND_SHARED<T>];
    T* stages_of_s = reinterpret_cast<T*>(shared);
    T* stages_of_b = stages_of_s + 2 * EXPAND_STAGE<T>;
    const int across = (call.width + call.columns - 1) / call.columns, tile = blockIdx.x / across, left = blockIdx.x % across * call.columns,
              right = min(call.width, left + call.columns);
    const LoraClient client = find_client(call.table, &LoraClient::tiles, tile);
    const int top = (tile - client.tiles) * LORA_ROWS, own = threadIdx.x / WARP * WARP_ROWS, stages = (client.rank + DEPTH<T> - 1) / DEPTH<T>;
    const bool kept = stages <= 2;  // S is in shared memory from the first columns on

    ExpandPlace place;
    place.local = own + lane_id() / EXPAND_UNITS;
    place.column = lane_id() % EXPAND_UNITS * DRAWS;
#pragma unroll
    for (int part = 0; part < EXPAND_PARTS; ++part) {
        const int t = top + place.local + part * (WARP / EXPAND_UNITS);
        place.row[part] = t < client.length ? static_cast<int>(row_of(call, client, t)) : -1;
    }

    Acc c[LORA_COLUMNS / 8][4] = {};
    Pack<T, DRAWS> before[EXPAND_PARTS] = {};
    int stage = stages - 1, column = left - LORA_COLUMNS;  // of the step in use: ranks from stage DEPTH, 64 columns; the first step only fills
#pragma unroll 1
    for (int step = -1;; ++step) {
        if (step >= 0) {
            await_copies<0>();
            __syncthreads();  // the stages are whole, and the others are free
        }
        const bool last = stage + 1 == stages;
        const int next = last ? 0 : stage + 1, next_column = last ? column + LORA_COLUMNS : column, first = next * DEPTH<T>;
        if (next_column < right) {
            const int slot = (step + 1) % 2, depth = min(DEPTH<T>, round_up(client.rank - first, SLICE));
            if (!kept || next_column == left) {
                T* s = stages_of_s + (kept ? next : slot) * EXPAND_STAGE<T>;
                if (call.splits) add_planes(s, call, client, top, first, depth / DRAWS, left == 0);
                else copy_shrunk(s, DEPTH<T>, call, client, top, LORA_ROWS, client.length, first, depth / DRAWS);
            }
            copy_factor(stages_of_b + slot * EXPAND_STAGE<T>, LORA_COLUMNS, call, client, first, depth, next_column, EXPAND_UNITS);
        }
        close_copies();
        if (step >= 0) {
            if (AHEAD<T> && stage == 0) {
#pragma unroll
                for (int part = 0; part < EXPAND_PARTS; ++part) before[part] = what_was_there<T>(call, place.row[part], column + place.column);
            }
            T* factor = stages_of_b + step % 2 * EXPAND_STAGE<T>;
            multiply(c, Operand<T, false>{stages_of_s + (kept ? stage : step % 2) * EXPAND_STAGE<T>, DEPTH<T>}, own, Operand<T, true>{factor, LORA_COLUMNS},
                     LORA_COLUMNS, min(DEPTH<T>, round_up(client.rank - stage * DEPTH<T>, SLICE)));
            if (last) {
                Acc* product = reinterpret_cast<Acc*>(PRODUCT_IN_STAGE<T> ? factor : stages_of_b + 2 * EXPAND_STAGE<T>) + own / 2 * LORA_COLUMNS;
                if (PRODUCT_IN_STAGE<T>) __syncthreads();  // the product takes the stage's place
#pragma unroll
                for (int half = 0; half < 2; ++half) {
                    __syncwarp();  // the half before has been read
#pragma unroll
                    for (int j = 0; j < LORA_COLUMNS / 8; ++j)
                        *reinterpret_cast<Pack<Acc, 2>*>(product_unit(product, sum_row(0), j) + sum_column(0)) = {{c[j][2 * half], c[j][2 * half + 1]}};
                    __syncwarp();  // the half is whole
                    add_product<T, DROP>(call, client, top, column, half, place, before, product);
                }
#pragma unroll
                for (int j = 0; j < LORA_COLUMNS / 8; ++j)
#pragma unroll
                    for (int i = 0; i < 4; ++i) c[j][i] = 0;
                if (next_column >= right) return;
            }
        }
        stage = next;
        column = next_column;
    }
}

}  // namespace hetlora

cudaError_t hetlora_expand(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream) {
    using namespace hetlora;
    const int64_t blocks = tiles * divide_up(call->width, call->columns);
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
