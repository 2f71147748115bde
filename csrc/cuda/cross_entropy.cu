// Losses of rows of logits, whose slopes take the logits' place.
//
// A block owns a row. Each thread runs through its columns once. It keeps the largest logit so far, and the sum of exponentials relative to it. A warp merges
// the pairs of its lanes by halves. Then every thread merges the pairs of the warps, in order. In a second pass each thread makes the slopes of the columns
// that it read. Bytes: the row in and out, and once more in, from L2 where the rows in flight fit. What a thread adds it adds in a fixed order, so a row has
// the same bits in any chunk.
#include <cmath>

#include "dispatch.cuh"

namespace hetlora {

constexpr int LOSS_THREADS = 512, LOSS_WARPS = LOSS_THREADS / WARP;
constexpr int64_t IGNORED = -100;

// The largest z of some columns, and the sum of exp(z - top).
template <class Acc>
struct Online {
    Acc top, sum;
};

template <class Acc>
__device__ __forceinline__ Acc exponential(Acc x) {
    if constexpr (sizeof(Acc) == 8) return exp(x);
    else return expf(x);
}

// What exponentials are relative to: columns of -inf alone have a sum of zero, not NaN.
template <class Acc>
__device__ __forceinline__ Acc base_of(Acc top) {
    return top == -Acc(INFINITY) ? Acc(0) : top;
}

template <class Acc>
__device__ __forceinline__ Online<Acc> merged(const Online<Acc>& a, const Online<Acc>& b) {
    const Acc top = max(a.top, b.top), base = base_of(top);
    return {top, a.sum * exponential(a.top - base) + b.sum * exponential(b.top - base)};
}

// z of a logit, and dz / dx: the slope of tanh a is 4 e / (1 + e)^2 with e = exp(-2 |a|), which is exact where tanh a is near 1 too.
template <bool CAPPED, class Acc>
__device__ __forceinline__ Acc logit_of(Acc x, const LossForm& form, Acc& steep) {
    const Acc scaled = x * static_cast<Acc>(form.scale);
    steep = static_cast<Acc>(form.scale);
    if constexpr (!CAPPED) return scaled;
    const Acc cap = static_cast<Acc>(form.softcap), inner = scaled / cap, e = exponential(inner < 0 ? 2 * inner : -2 * inner);
    steep *= 4 * e / ((1 + e) * (1 + e));
    if constexpr (sizeof(Acc) == 8) return cap * tanh(inner);
    else return cap * tanhf(inner);
}

// What the second pass of a row needs of the first: a slope is (exp(z - top) factor - constant) dz / dx, that of the label `of_label`.
template <class Acc>
struct RowSlopes {
    Acc top, factor, constant, of_label;
};

// The first pass of the block's row; every thread returns the same.
template <bool ALIGNED, bool CAPPED, class Acc, class T>
__device__ __forceinline__ Online<Acc> sums_of(const T* row, int words, Acc z_label, const LossForm& form, double& sum_off) {
    constexpr int V = VECTOR<T>;
    __shared__ Acc tops[LOSS_WARPS], sums[LOSS_WARPS];
    __shared__ double offs[LOSS_WARPS];
    const int warp = threadIdx.x / WARP;
    const Acc from = isfinite(z_label) ? z_label : Acc(0);  // the mean is taken of differences, which keep their bits where all logits are large
    Online<Acc> own{-Acc(INFINITY), 0};
    Acc off = 0, steep;
    for (int base = warp * WARP * V; base < words; base += LOSS_THREADS * V) {
        Acc x[V];
        load<ALIGNED>(x, row, base, words);
        Acc top = own.top;
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const bool inside = column_of<ALIGNED, V>(base, e) < words;
            x[e] = inside ? logit_of<CAPPED>(x[e], form, steep) : -Acc(INFINITY);
            off += inside ? x[e] - from : Acc(0);
            top = max(top, x[e]);
        }
        const Acc relative = base_of(top);
        own.sum *= exponential(own.top - relative);
        own.top = top;
#pragma unroll
        for (int e = 0; e < V; ++e) own.sum += exponential(x[e] - relative);
    }
#pragma unroll
    for (int distance = WARP / 2; distance; distance /= 2)
        own = merged(own, {__shfl_xor_sync(ALL_LANES, own.top, distance), __shfl_xor_sync(ALL_LANES, own.sum, distance)});
    const double of_warp = warp_sum(static_cast<double>(off));
    if (lane_id() == 0) {
        tops[warp] = own.top;
        sums[warp] = own.sum;
        offs[warp] = of_warp;
    }
    __syncthreads();  // the sums of all warps are there
    own = {tops[0], sums[0]};
    sum_off = offs[0];
    for (int w = 1; w < LOSS_WARPS; ++w) {
        own = merged(own, {tops[w], sums[w]});
        sum_off += offs[w];
    }
    return own;
}

template <bool ALIGNED, bool CAPPED, class Acc, class T>
__device__ __forceinline__ void write_slopes(T* row, int words, int label, const RowSlopes<Acc>& slopes, const LossForm& form) {
    constexpr int V = VECTOR<T>;
    for (int base = threadIdx.x / WARP * WARP * V; base < words; base += LOSS_THREADS * V) {
        Acc x[V];
        load<ALIGNED>(x, row, base, words);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            Acc steep;
            const Acc z = logit_of<CAPPED>(x[e], form, steep);
            x[e] = (exponential(z - slopes.top) * slopes.factor - slopes.constant) * steep;
            if (column_of<ALIGNED, V>(base, e) == label) x[e] = slopes.of_label;
        }
        store<ALIGNED>(row, x, base, words);
    }
}

template <bool ALIGNED, bool CAPPED, class T>
__device__ __forceinline__ void row_loss(T* row, int words, int64_t label, const LossCall& call, int64_t at) {
    using Acc = typename Accumulator<T>::type;
    __shared__ RowSlopes<Acc> slopes;
    auto* losses = static_cast<Acc*>(call.losses);
    const LossForm& form = call.form;
    if (label == IGNORED) {
        if (threadIdx.x == 0) losses[at] = 0;
        constexpr int V = VECTOR<T>;
        const Acc zeros[V] = {};
        for (int base = threadIdx.x / WARP * WARP * V; call.sloped && base < words; base += LOSS_THREADS * V) store<ALIGNED>(row, zeros, base, words);
        return;
    }
    const bool is_word = label >= 0 && label < words;
    Acc steep = 0, z_label = Acc(NAN);  // of a label that is no word: so are the loss and all slopes
    if (is_word) z_label = logit_of<CAPPED>(convert<Acc>(row[label]), form, steep);
    double off;
    const Online<Acc> whole = sums_of<ALIGNED, CAPPED>(row, words, z_label, form, off);
    if (threadIdx.x == 0) {
        const double top = whole.top, z = z_label, exponent = log(static_cast<double>(whole.sum)), total = exponent + top;
        const double weight = call.weights ? static_cast<double>(static_cast<const Acc*>(call.weights)[at]) : 1;
        const double share = (1 + 2 * form.z_loss * total) / static_cast<double>(whole.sum), each = form.smoothing / words;
        double loss = exponent - (1 - form.smoothing) * (z - top) + form.z_loss * total * total;
        if (form.smoothing != 0) loss -= form.smoothing * (off / words + (isfinite(z) ? z : 0) - top);
        losses[at] = static_cast<Acc>(loss);
        const double nothing = is_word ? 0 : static_cast<double>(NAN);
        const double of_label = (exp(z - top) * share - each - (1 - form.smoothing)) * weight * steep;
        slopes = {whole.top, static_cast<Acc>(share * weight + nothing), static_cast<Acc>(each * weight), static_cast<Acc>(of_label)};
    }
    __syncthreads();  // the factors are there, and every thread has seen the label's logit
    if (call.sloped) write_slopes<ALIGNED, CAPPED>(row, words, is_word ? static_cast<int>(label) : -1, slopes, form);
}

template <bool CAPPED, class T>
__global__ void __launch_bounds__(LOSS_THREADS, 1) cross_entropy_kernel(LossCall call) {
    T* row = static_cast<T*>(call.logits) + static_cast<int64_t>(blockIdx.x) * call.words;
    const int64_t label = call.labels[blockIdx.x];
    if (call.aligned) row_loss<true, CAPPED>(row, call.words, label, call, blockIdx.x);
    else row_loss<false, CAPPED>(row, call.words, label, call, blockIdx.x);
}

}  // namespace hetlora

cudaError_t hetlora_cross_entropy(const hetlora::LossCall* call, hetlora::Type type, int64_t rows, cudaStream_t stream) {
    using namespace hetlora;
    if (rows == 0) return cudaSuccess;
    const dim3 grid(static_cast<unsigned>(rows));
    const LossCall own = *call;
    return with_type(type, [&](auto of) {
        if (own.form.softcap != 0) HETLORA_LAUNCH((cross_entropy_kernel<true, decltype(of)>), grid, dim3(LOSS_THREADS), stream, own);
        else HETLORA_LAUNCH((cross_entropy_kernel<false, decltype(of)>), grid, dim3(LOSS_THREADS), stream, own);
        return cudaGetLastError();
    });
}
