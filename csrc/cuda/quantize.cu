// Rank rows in 8 or 4 bits with one float32 scale a row.
//
// Quantising: one warp owns a row, which it reads twice (the second time from L2), for its largest magnitude and for its codes. The maximum is taken of the
// bits of |x|, which order as the numbers do, with NaN on top. Back: one warp owns CHUNK columns of a row. Bytes: rows once, codes and scales once.
// Divisions are IEEE's and nothing is multiplied by an inverse, so that codes have the bits of every other rung.
#include <cstring>

#include "dispatch.cuh"

namespace hetlora {

template <class Acc>
struct Rounding;
template <>
struct Rounding<float> {
    using Bits = unsigned;
    static constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: adding it rounds to the nearest integer, ties to even, which is then in the lowest bits
    static constexpr Bits MAGIC_BITS = 0x4B400000u;
};
template <>
struct Rounding<double> {
    using Bits = unsigned long long;
    static constexpr double MAGIC = 6755399441055744.0;
    static constexpr Bits MAGIC_BITS = 0x4338000000000000ull;
};

template <class To, class From>
__device__ __forceinline__ To bits_as(From from) {
    static_assert(sizeof(To) == sizeof(From));
    To to;
    memcpy(&to, &from, sizeof to);
    return to;
}

template <class Acc>
__device__ __forceinline__ int rounded(Acc quotient) {
    using R = Rounding<Acc>;
    return static_cast<int>(bits_as<typename R::Bits>(quotient + R::MAGIC) - R::MAGIC_BITS);
}

// Every lane gets the largest magnitude of a row.
template <bool ALIGNED, class Acc, class T>
__device__ __forceinline__ Acc largest_magnitude(const T* row, int width) {
    using Bits = typename Rounding<Acc>::Bits;
    constexpr int V = VECTOR<T>;
    Bits most = 0;
    for (int base = 0; base < width; base += WARP * V) {
        Acc value[V];
        load<ALIGNED>(value, row, base, width);
#pragma unroll
        for (int e = 0; e < V; ++e) most = max(most, bits_as<Bits>(value[e]) & (~Bits(0) >> 1));
    }
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2) most = max(most, __shfl_xor_sync(ALL_LANES, most, distance));
    return bits_as<Acc>(most);
}

template <bool ALIGNED, class T>
__device__ __forceinline__ void quantize_item(const Module& module, int row, int bits) {
    using Acc = typename Accumulator<T>::type;
    constexpr int V = VECTOR<T>;
    const int width = module.width, stored = bits == 8 ? width : (width + 1) / 2;
    const T* source = static_cast<const T*>(module.p[0]) + static_cast<int64_t>(row) * width;
    auto* codes = static_cast<uint8_t*>(const_cast<void*>(module.p[1])) + static_cast<int64_t>(row) * stored;
    float scale = static_cast<float>(largest_magnitude<ALIGNED, Acc>(source, width) / static_cast<Acc>(bits == 8 ? 127 : 7));
    if (scale < 1.17549435e-38f) scale = 0;
    if (lane_id() == 0) static_cast<float*>(const_cast<void*>(module.p[2]))[row] = scale;
    const bool usable = scale > 0 && (bits_as<unsigned>(scale) & 0x7F800000u) != 0x7F800000u;
    const Acc divisor = usable ? scale : 1;
    const auto code = [&](Acc value) { return usable ? rounded(value / divisor) : 0; };
    if (ALIGNED) {
        for (int base = 0; base < width; base += WARP * V) {
            Acc value[V];
            load<true>(value, source, base, width);
            const int column = column_of<true, V>(base, 0);
            if (column >= width) break;
            Pack<uint8_t, V> whole;
            Pack<uint8_t, V / 2> halves;
#pragma unroll
            for (int e = 0; e < V; ++e) whole.v[e] = static_cast<uint8_t>(code(value[e]));
#pragma unroll
            for (int e = 0; e < V / 2; ++e) halves.v[e] = static_cast<uint8_t>((whole.v[2 * e] & 15) | (whole.v[2 * e + 1] & 15) << 4);
            if (bits == 8) *reinterpret_cast<Pack<uint8_t, V>*>(codes + column) = whole;
            else *reinterpret_cast<Pack<uint8_t, V / 2>*>(codes + column / 2) = halves;
        }
    } else {
        for (int at = lane_id(); at < stored; at += WARP) {
            if (bits == 8) {
                codes[at] = static_cast<uint8_t>(code(convert<Acc>(source[at])));
                continue;
            }
            const int low = code(convert<Acc>(source[2 * at])), high = 2 * at + 1 < width ? code(convert<Acc>(source[2 * at + 1])) : 0;
            codes[at] = static_cast<uint8_t>((low & 15) | (high & 15) << 4);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(WARP* WARPS, 4) quantize_kernel(Table table, int bits) {
    const Module& module = table.modules[blockIdx.y];
    const int64_t row = static_cast<int64_t>(blockIdx.x) * WARPS + threadIdx.x / WARP;
    if (row >= module.rows) return;
    if (module.aligned) quantize_item<true, T>(module, static_cast<int>(row), bits);
    else quantize_item<false, T>(module, static_cast<int>(row), bits);
}

// The number in half `high` of a byte.
__device__ __forceinline__ int half_of(uint8_t byte, int high) { return static_cast<int>(((byte >> (4 * high)) & 15) ^ 8) - 8; }

template <bool ALIGNED, class T>
__device__ __forceinline__ void dequantize_item(const Item& item, int bits) {
    using Acc = typename Accumulator<T>::type;
    constexpr int V = VECTOR<T>, PARTS = CHUNK<T> / (WARP * V);
    const Module& module = item.module;
    const int width = module.width, stored = bits == 8 ? width : (width + 1) / 2;
    T* target = static_cast<T*>(const_cast<void*>(module.p[0])) + static_cast<int64_t>(item.row) * width;
    const auto* codes = static_cast<const uint8_t*>(module.p[1]) + static_cast<int64_t>(item.row) * stored;
    const Acc scale = static_cast<const float*>(module.p[2])[item.row];
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int base = item.column + part * WARP * V;
        Acc value[V] = {};
        const int first = column_of<ALIGNED, V>(base, 0);
        if (ALIGNED && first < width) {
            Pack<uint8_t, V> whole{};
            Pack<uint8_t, V / 2> halves{};
            if (bits == 8) whole = *reinterpret_cast<const Pack<uint8_t, V>*>(codes + first);
            else halves = *reinterpret_cast<const Pack<uint8_t, V / 2>*>(codes + first / 2);
#pragma unroll
            for (int e = 0; e < V; ++e) value[e] = scale * static_cast<Acc>(bits == 8 ? static_cast<int8_t>(whole.v[e]) : half_of(halves.v[e / 2], e % 2));
        } else if (!ALIGNED) {
#pragma unroll
            for (int e = 0; e < V; ++e) {
                const int column = column_of<false, V>(base, e);
                if (column >= width) continue;
                value[e] = scale * static_cast<Acc>(bits == 8 ? static_cast<int8_t>(codes[column]) : half_of(codes[column / 2], column % 2));
            }
        }
        store<ALIGNED>(target, value, base, width);
    }
}

template <class T>
__global__ void __launch_bounds__(WARP* WARPS) dequantize_kernel(Table table, int bits) {
    Item item;
    if (!find_item(item, table, CHUNK<T>)) return;
    if (item.module.aligned) dequantize_item<true, T>(item, bits);
    else dequantize_item<false, T>(item, bits);
}

}  // namespace hetlora

cudaError_t hetlora_quantize(const HetloraCall* call, hetlora::Type in, int bits) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_type(in, [&](auto type) {
        HETLORA_LAUNCH((quantize_kernel<decltype(type)>), grid, dim3(WARP * WARPS), call->stream, call->table, bits);
        return cudaGetLastError();
    });
}

cudaError_t hetlora_dequantize(const HetloraCall* call, hetlora::Type out, int bits) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_type(out, [&](auto type) {
        HETLORA_LAUNCH((dequantize_kernel<decltype(type)>), grid, dim3(WARP * WARPS), call->stream, call->table, bits);
        return cudaGetLastError();
    });
}
