// Gram matrices of each client's rank rows, and the norms of the updates B A from them.
//
// One block owns a SIDE x SIDE tile of one client's matrix (SIDE = 16, 32 or 64 by rank; tiles on or above the diagonal, mirrored when stored) over SPLIT
// columns (grid z). Each thread holds 4 x 4 sums; the block's 256 threads are 16, 4 or 1 groups that share the columns of a stage in shared memory, so that a
// rank of 5 does not pay for a tile of 64. Groups, then splits, are added in a fixed order: no atomics, and a client's result does not depend on who else is
// in the call. Bytes: S d in (again per tile row for ranks above 64), sum r^2 out. Float32 FMA, no TF32; float64 for float64 and `exact`.
// Layout: offsets [K + 1], tiles before each client [K + 1], result offsets [K], plane offsets [K].
#include "dispatch.cuh"

namespace hetlora {

constexpr int GRAM_THREADS = 256, GRAM_SPLIT = 2048, QUAD = 4;

HETLORA_HOST_DEVICE constexpr int gram_depth(int side) { return 2048 / side; }  // columns of a stage
HETLORA_HOST_DEVICE constexpr int gram_stage(int side, int operands) {
    return operands * side * (gram_depth(side) + QUAD);
}  // elements; rows are padded by a bank group
HETLORA_HOST_DEVICE constexpr int gram_sums() { return GRAM_THREADS * QUAD * QUAD; }  // elements to add the groups
constexpr int GRAM_SHARED = gram_stage(64, 2) > gram_sums() ? gram_stage(64, 2) : gram_sums();               // two operands only where SIDE is 64
static_assert(GRAM_SHARED >= gram_stage(16, 1) && GRAM_SHARED >= gram_stage(32, 1));

// Blocks per multiprocessor: said outright, because the compiler otherwise aims for more of them and spills (8 bytes on sm_110 and 120, 128 on sm_80).
template <class Acc>
constexpr int GRAM_BLOCKS = sizeof(Acc) == 4 ? 2 : 1;

// One tile's place: its client's rows, its matrix in the result, its plane of partial sums (null: straight to the result).
template <class T, class Acc>
struct GramTile {
    const T* rows;
    Acc *out, *plane;
    int rank, i, j;
    __device__ __forceinline__ void store(int row, int column, int side, Acc value) const {
        if (plane) {
            plane[row * side + column] = value;
            return;
        }
        const int left = i * side + row, right = j * side + column;
        if (left >= rank || right >= rank) return;
        out[static_cast<int64_t>(left) * rank + right] = value;
        if (i != j) out[static_cast<int64_t>(right) * rank + left] = value;
    }
};

// SIDE rows from `first_row` x DEPTH columns from `start`, zero outside the client's rows and past `last`, to shared memory.
template <bool ALIGNED, int SIDE, class T, class Acc>
__device__ __forceinline__ void stage_rows(Acc* shared, const T* rows, int first_row, int rank, int64_t width, int start, int last) {
    constexpr int DEPTH = gram_depth(SIDE), PITCH = DEPTH + QUAD, V = VECTOR<T>;
    for (int at = threadIdx.x * V; at < SIDE * DEPTH; at += GRAM_THREADS * V) {
        const int row = at / DEPTH, column = at % DEPTH;
        const T* source = rows + (first_row + row) * width + start + column;
        Pack<T, V> pack{};
        if (first_row + row < rank) {
            if constexpr (ALIGNED) {
                if (start + column < last) pack = *reinterpret_cast<const Pack<T, V>*>(source);
            } else {
#pragma unroll
                for (int e = 0; e < V; ++e)
                    if (start + column + e < last) pack.v[e] = source[e];
            }
        }
        constexpr int WIDE = V < QUAD ? V : QUAD;  // 16-byte stores: one element at a time, the lanes of a warp would meet in the same banks
#pragma unroll
        for (int e = 0; e < V; e += WIDE) {
            Pack<Acc, WIDE> wide;
#pragma unroll
            for (int w = 0; w < WIDE; ++w) wide.v[w] = convert<Acc>(pack.v[e + w]);
            *reinterpret_cast<Pack<Acc, WIDE>*>(shared + row * PITCH + column + e) = wide;
        }
    }
}

template <bool ALIGNED, int SIDE, class T, class Acc>
__device__ void gram_tile(const GramTile<T, Acc>& tile, int64_t width, int first, int last, Acc* shared) {
    constexpr int DEPTH = gram_depth(SIDE), PITCH = DEPTH + QUAD, ACROSS = SIDE / QUAD, GROUPS = GRAM_THREADS / (ACROSS * ACROSS);
    const int group = threadIdx.x / (ACROSS * ACROSS), place = threadIdx.x % (ACROSS * ACROSS), y = place / ACROSS, x = place % ACROSS;
    Acc* left = shared;
    Acc* right = tile.i == tile.j ? shared : shared + SIDE * PITCH;
    Acc sum[QUAD][QUAD] = {};
    for (int start = first; start < last; start += DEPTH) {
        stage_rows<ALIGNED, SIDE>(left, tile.rows, tile.i * SIDE, tile.rank, width, start, last);
        if (tile.i != tile.j) stage_rows<ALIGNED, SIDE>(right, tile.rows, tile.j * SIDE, tile.rank, width, start, last);
        __syncthreads();
        for (int column = group * QUAD; column < DEPTH; column += GROUPS * QUAD) {
            Pack<Acc, QUAD> a[QUAD], b[QUAD];
#pragma unroll
            for (int r = 0; r < QUAD; ++r) {
                a[r] = *reinterpret_cast<const Pack<Acc, QUAD>*>(left + (r * ACROSS + y) * PITCH + column);
                b[r] = *reinterpret_cast<const Pack<Acc, QUAD>*>(right + (r * ACROSS + x) * PITCH + column);
            }
#pragma unroll
            for (int c = 0; c < QUAD; ++c)
#pragma unroll
                for (int r = 0; r < QUAD; ++r)
#pragma unroll
                    for (int s = 0; s < QUAD; ++s) sum[r][s] += a[r].v[c] * b[s].v[c];
        }
        __syncthreads();
    }
    if constexpr (GROUPS > 1) {
#pragma unroll
        for (int r = 0; r < QUAD; ++r)
#pragma unroll
            for (int s = 0; s < QUAD; ++s) shared[(group * SIDE + r * ACROSS + y) * SIDE + s * ACROSS + x] = sum[r][s];
        __syncthreads();
        for (int at = threadIdx.x; at < SIDE * SIDE; at += GRAM_THREADS) {
            Acc total = 0;
#pragma unroll
            for (int g = 0; g < GROUPS; ++g) total += shared[g * SIDE * SIDE + at];
            tile.store(at / SIDE, at % SIDE, SIDE, total);
        }
    } else {
#pragma unroll
        for (int r = 0; r < QUAD; ++r)
#pragma unroll
            for (int s = 0; s < QUAD; ++s) tile.store(r * ACROSS + y, s * ACROSS + x, SIDE, sum[r][s]);
    }
}

// Tile blockIdx.x of a module: false when the module has fewer. `plane` is that of split 0 even where the module has one split.
template <class T, class Acc>
__device__ __forceinline__ bool find_tile(GramTile<T, Acc>& tile, const Table& table, const Module& module, Acc* planes) {
    const int clients = table.clients, index = blockIdx.x;
    const int* layout = table.layouts + static_cast<int64_t>(module.layout) * table.stride;
    const int *tiles = layout + clients + 1, *squares = tiles + clients + 1, *plane = squares + clients;
    if (index >= tiles[clients]) return false;
    const int k = owner_of(tiles, clients, index);
    tile.rank = layout[k + 1] - layout[k];
    const int count = gram_tiles_per_side(tile.rank), side = gram_side(tile.rank);
    int rest = index - tiles[k], i = 0;
    for (; rest >= count - i; ++i) rest -= count - i;
    tile.i = i;
    tile.j = i + rest;
    tile.rows = static_cast<const T*>(module.p[0]) + static_cast<int64_t>(layout[k]) * module.width;
    tile.out = static_cast<Acc*>(const_cast<void*>(module.p[1])) + squares[k];
    tile.plane = planes + module.first + plane[k] + static_cast<int64_t>(index - tiles[k]) * side * side;
    return true;
}

// p of a module: rows, result. `rows` of a module: elements of one split's planes.
template <class T, class Acc>
__global__ void __launch_bounds__(GRAM_THREADS, GRAM_BLOCKS<Acc>) gram_kernel(Table table, Acc* planes) {
    alignas(16) __shared__ Acc shared[GRAM_SHARED];
    const Module module = table.modules[blockIdx.y];
    const int first = blockIdx.z * GRAM_SPLIT, last = min(first + GRAM_SPLIT, module.width);
    GramTile<T, Acc> tile;
    if ((blockIdx.z && first >= module.width) || !find_tile(tile, table, module, planes)) return;
    tile.plane = module.width > GRAM_SPLIT ? tile.plane + static_cast<int64_t>(blockIdx.z) * module.rows : nullptr;
    const int side = gram_side(tile.rank);
    if (module.aligned) {
        if (side == 16) gram_tile<true, 16>(tile, module.width, first, last, shared);
        else if (side == 32) gram_tile<true, 32>(tile, module.width, first, last, shared);
        else gram_tile<true, 64>(tile, module.width, first, last, shared);
    } else {
        if (side == 16) gram_tile<false, 16>(tile, module.width, first, last, shared);
        else if (side == 32) gram_tile<false, 32>(tile, module.width, first, last, shared);
        else gram_tile<false, 64>(tile, module.width, first, last, shared);
    }
}

// The planes of a module with several splits, added in order.
template <class Acc>
__global__ void __launch_bounds__(GRAM_THREADS) gram_sum_kernel(Table table, Acc* planes) {
    const Module module = table.modules[blockIdx.y];
    GramTile<Acc, Acc> tile;
    if (module.width <= GRAM_SPLIT || !find_tile(tile, table, module, planes)) return;
    const Acc* plane = tile.plane;
    tile.plane = nullptr;
    const int side = gram_side(tile.rank), splits = (module.width + GRAM_SPLIT - 1) / GRAM_SPLIT;
    for (int at = threadIdx.x; at < side * side; at += GRAM_THREADS) {
        Acc total = 0;
        for (int split = 0; split < splits; ++split) total += plane[static_cast<int64_t>(split) * module.rows + at];
        tile.store(at / side, at % side, side, total);
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
    HETLORA_LAUNCH((gram_sum_kernel<Acc>), dim3(grid.x, grid.y), dim3(GRAM_THREADS), call.stream, call.table, planes);
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
