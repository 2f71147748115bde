// Gram matrices of each client's rank rows, and the norms of the updates B A from them.
//
// One block owns a tile of one client's matrix (gram.cuh) over SPLIT columns. 16-bit rows multiply on tensor cores (gram_mma.cuh); float32 rows by FMA, without
// TF32; float64 rows and `exact` in float64. Here a thread holds Q x Q sums of the tile, 8 x 8 in float32: 16 loads of 16 bytes from shared memory for
// 256 products, where 4 x 4 has twice as many and waits for them. The squares on or above the diagonal, 36 at rank 64 instead of 64, are dealt to as many
// groups of threads as there is room for, which share the columns of a stage. A stage is 24 KB whatever the rank: one in use, one on its way. Groups, then
// splits, are added in a fixed order: no atomics, and a client's result does not depend on who else is in the call.
// Bytes: S d in (ranks above the widest tile: again per tile row), sum r^2 out.
#include "dispatch.cuh"
#include "gram_mma.cuh"

namespace hetlora {

constexpr int GRAM_STAGE = 24 << 10, PIECES = 8;  // bytes of a stage; 16-byte pieces of a row that lie together

// What the products of this kernel come in, rows of a tile.
template <class T, class Acc>
constexpr int UNIT = gram_unit(TYPE<T>, TYPE<Acc>);

// A stage: chunks of `rows` x 128 bytes, the eight pieces of a row permuted by its square, so that those of eight squares lie in different banks.
template <int Q, class Acc>
struct GramStage {
    static constexpr int V = VECTOR<Acc>, CHUNK = PIECES * V;  // columns of a piece, of a chunk
    Acc* shared;
    int rows;

    __device__ __forceinline__ int pieces() const { return PIECES * (GRAM_STAGE / (rows * CHUNK * static_cast<int>(sizeof(Acc)))); }
    __device__ __forceinline__ Acc* at(int buffer, int chunk, int row, int piece) const {
        return shared + buffer * (GRAM_STAGE / static_cast<int>(sizeof(Acc))) + (chunk * rows + row) * CHUNK + (piece ^ (row / Q % PIECES)) * V;
    }
};

// `pieces` of the tile's rows from column `start`; zero outside the client's rows and past `last`. COPIED: as they are, asynchronously.
template <bool COPIED, int Q, class T, class Acc>
__device__ __forceinline__ void fill_stage(const GramStage<Q, Acc>& stage, int buffer, const GramTile<T, Acc>& tile, int64_t width, int start, int pieces,
                                           int last) {
    constexpr int V = VECTOR<Acc>;
    const int piece = threadIdx.x % PIECES;
    for (int row = threadIdx.x / PIECES, chunk = 0;; row += GRAM_THREADS / PIECES) {
        for (; row >= stage.rows; row -= stage.rows) ++chunk;
        if (chunk * PIECES >= pieces) break;
        const int own = row < tile.side ? tile.i * tile.side + row : tile.j * tile.side + row - tile.side, column = start + (chunk * PIECES + piece) * V;
        const int valid = own < tile.rank ? min(max(last - column, 0), V) : 0;
        const T* from = tile.rows + own * width + column;
        Acc* to = stage.at(buffer, chunk, row, piece);
        if constexpr (COPIED) {
            copy_async(to, valid ? from : tile.rows, valid * static_cast<int>(sizeof(T)));
        } else {
            Pack<Acc, V> pack{};
#pragma unroll
            for (int e = 0; e < V; ++e)
                if (e < valid) pack.v[e] = convert<Acc>(from[e]);
            *reinterpret_cast<Pack<Acc, V>*>(to) = pack;
        }
    }
}

// sum += the products of a square's Q rows and Q rows in one piece.
template <int Q, class Acc>
__device__ __forceinline__ void multiply_squares(Acc (&sum)[Q][Q], const Acc* left, const Acc* right) {
    constexpr int V = VECTOR<Acc>, CHUNK = PIECES * V;
    Pack<Acc, V> a[Q];
#pragma unroll
    for (int r = 0; r < Q; ++r) a[r] = *reinterpret_cast<const Pack<Acc, V>*>(left + r * CHUNK);
#pragma unroll
    for (int s = 0; s < Q; ++s) {
        const Pack<Acc, V> b = *reinterpret_cast<const Pack<Acc, V>*>(right + s * CHUNK);
#pragma unroll
        for (int e = 0; e < V; ++e)
#pragma unroll
            for (int r = 0; r < Q; ++r) sum[r][s] += a[r].v[e] * b.v[e];
    }
}

template <bool COPIED, int Q, class T, class Acc>
__device__ void gram_tile(const GramTile<T, Acc>& tile, int64_t width, int first, int last, Acc* shared) {
    const bool diagonal = tile.i == tile.j;
    const int across = tile.side / Q, squares = diagonal ? across * (across + 1) / 2 : across * across, groups = GRAM_THREADS / squares;
    const int group = threadIdx.x / squares, place = threadIdx.x % squares;
    int y = 0, x = place;
    for (; x >= (diagonal ? across - y : across); ++y) x -= diagonal ? across - y : across;
    const int right = diagonal ? y + x : across + x;  // the square's rows in the stage, in units of Q
    const GramStage<Q, Acc> stage{shared, (diagonal ? 1 : 2) * tile.side};
    const int depth = stage.pieces() * stage.V, steps = (last - first + depth - 1) / depth;
    const auto pieces_of = [&](int start) { return min(stage.pieces(), (last - start + stage.V - 1) / stage.V); };
    Acc sum[Q][Q] = {};
    if (steps) fill_stage<COPIED, Q>(stage, 0, tile, width, first, pieces_of(first), last);
    close_copies();
    for (int step = 0; step < steps; ++step) {
        const int start = first + step * depth, pieces = pieces_of(start);
        await_copies<0>();
        __syncthreads();  // the stage is whole, and the one before it is free
        if (step + 1 < steps) fill_stage<COPIED, Q>(stage, (step + 1) % 2, tile, width, start + depth, pieces_of(start + depth), last);
        close_copies();
        if (group < groups)
            for (int piece = group; piece < pieces; piece += groups)
                multiply_squares<Q>(sum, stage.at(step % 2, piece / PIECES, y * Q, piece % PIECES),
                                    stage.at(step % 2, piece / PIECES, right * Q, piece % PIECES));
    }
    for (int left = groups; left > 1; left = (left + 1) / 2) {  // the upper half of the groups to the lower
        const int half = (left + 1) / 2, slots = half * squares, slot = (group < half ? group : group - half) * squares + place;
        __syncthreads();  // what was there has been read
        if (group >= half && group < left)
#pragma unroll
            for (int at = 0; at < Q * Q; ++at) shared[at * slots + slot] = sum[at / Q][at % Q];
        __syncthreads();  // the sums of the upper half are there
        if (group + half < left)
#pragma unroll
            for (int at = 0; at < Q * Q; ++at) sum[at / Q][at % Q] += shared[at * slots + slot];
    }
    if (group) return;
#pragma unroll
    for (int at = 0; at < Q * Q; ++at) {
        const int row = y * Q + at / Q, column = (diagonal ? right : x) * Q + at % Q;
        tile.store(row, column, sum[at / Q][at % Q]);
    }
}

template <class T, class Acc>
constexpr int GRAM_SHARED = UNIT<T, Acc> == BAND ? GRAM_EXCHANGE : 2 * GRAM_STAGE / static_cast<int>(sizeof(Acc));

// Blocks per multiprocessor: what shared memory has room for on sm_80. Said outright, because the compiler otherwise aims for more of them and spills.
template <class T, class Acc>
__global__ void __launch_bounds__(GRAM_THREADS, 3) gram_kernel(Table table, Acc* planes) {
    alignas(16) __shared__ Acc shared[GRAM_SHARED<T, Acc>];
    const Module module = table.modules[blockIdx.y];
    GramTile<T, Acc> tile;
    int first, last;
    if (!find_part(tile, first, last, table, module, UNIT<T, Acc>, planes)) return;
    if constexpr (UNIT<T, Acc> == BAND) {
        if (module.aligned) gram_mma_tile<true>(tile, module.width, first, last, shared);
        else gram_mma_tile<false>(tile, module.width, first, last, shared);
    } else if constexpr (std::is_same_v<T, Acc>) {
        if (module.aligned) gram_tile<true, UNIT<T, Acc>>(tile, module.width, first, last, shared);
        else gram_tile<false, UNIT<T, Acc>>(tile, module.width, first, last, shared);
    } else {
        gram_tile<false, UNIT<T, Acc>>(tile, module.width, first, last, shared);
    }
}

// The planes of a module with several splits, added in order.
template <class Acc>
__global__ void __launch_bounds__(GRAM_THREADS) gram_sum_kernel(Table table, int unit, Acc* planes) {
    const Module module = table.modules[blockIdx.y];
    GramTile<Acc, Acc> tile;
    if (module.width <= GRAM_SPLIT || !find_tile(tile, table, module, unit, planes)) return;
    const Acc* plane = tile.plane;
    tile.plane = nullptr;
    const int splits = (module.width + GRAM_SPLIT - 1) / GRAM_SPLIT;
    for (int at = threadIdx.x; at < tile.side * tile.side; at += GRAM_THREADS) {
        if (!tile.has(at / tile.side, at % tile.side)) continue;
        Acc total = 0;
        for (int split = 0; split < splits; ++split) total += plane[static_cast<int64_t>(split) * module.rows + at];
        tile.store(at / tile.side, at % tile.side, total);
    }
}

// out: [K, M], one warp per client and module: sqrt(max(0, sum of the products of both Gram matrices)), combined in float64.
// Modules 0 .. M - 1 of the table are A, M .. 2 M - 1 are Bt.
template <class Acc>
__global__ void delta_norms_kernel(Table table, Acc* out) {
    const int k = blockIdx.x, clients = table.clients;
    const Module &a = table.modules[blockIdx.y], &b = table.modules[blockIdx.y + gridDim.y];
    const int* layout = table.layouts + static_cast<int64_t>(a.layout) * table.stride;
    const int rank = layout[k + 1] - layout[k], first = layout[2 * (clients + 1) + k];
    const Acc *left = static_cast<const Acc*>(a.p[1]) + first, *right = static_cast<const Acc*>(b.p[1]) + first;
    double total = 0;
    for (int i = lane_id(); i < rank * rank; i += WARP) total += static_cast<double>(left[i]) * static_cast<double>(right[i]);
    total = warp_sum(total);
    if (lane_id() == 0) out[static_cast<int64_t>(k) * gridDim.y + blockIdx.y] = static_cast<Acc>(sqrt(total < 0 ? 0 : total));
}

template <class T, class Acc>
static cudaError_t launch_gram(const HetloraCall& call, int splits, Acc* planes) {
    const dim3 grid(static_cast<unsigned>(call.items), call.modules, splits);
    HETLORA_LAUNCH((gram_kernel<T, Acc>), grid, dim3(GRAM_THREADS), call.stream, call.table, planes);
    const cudaError_t error = cudaGetLastError();
    if (error != cudaSuccess || splits == 1) return error;
    HETLORA_LAUNCH((gram_sum_kernel<Acc>), dim3(grid.x, grid.y), dim3(GRAM_THREADS), call.stream, call.table, UNIT<T, Acc>, planes);
    return cudaGetLastError();
}

}  // namespace hetlora

int hetlora_gram_split() { return hetlora::GRAM_SPLIT; }

cudaError_t hetlora_gram(const HetloraCall* call, hetlora::Type in, hetlora::Type result, int splits, void* planes) {
    using namespace hetlora;
    if (call->items == 0 || call->modules == 0) return cudaSuccess;
    return with_type(in, [&](auto type) {
        using T = decltype(type);
        if constexpr (!std::is_same_v<T, double>)
            if (result == Type::f32) return launch_gram<T, float>(*call, splits, static_cast<float*>(planes));
        return launch_gram<T, double>(*call, splits, static_cast<double*>(planes));
    });
}

cudaError_t hetlora_delta_norms(const HetloraCall* call, hetlora::Type result, void* out) {
    using namespace hetlora;
    const dim3 grid(call->table.clients, call->modules / 2);
    if (is_empty(grid)) return cudaSuccess;
    if (result == Type::f64) HETLORA_LAUNCH((delta_norms_kernel<double>), grid, dim3(WARP), call->stream, call->table, static_cast<double*>(out));
    else HETLORA_LAUNCH((delta_norms_kernel<float>), grid, dim3(WARP), call->stream, call->table, static_cast<float*>(out));
    return cudaGetLastError();
}
