// What the optimisers share before their update: see norms.cuh for the pass over gradients and tail rows.
//
// combine, one warp per client and module: c_A = lam |B_tail| / |A_tail|, c_B = lam |A_tail| / |B_tail| (zero at a zero norm), squared norm of g + c p.
// prepare, one warp per client: clipping factor and the optimiser's own numbers, in float64. No atomics, no host synchronisation.
#pragma once
#include "norms.cuh"

namespace hetlora {

// One client's numbers for the update kernels.
template <class Acc>
struct ClientStep {
    Acc factor;  // of the gradient: clipping
    Acc decay;   // AdamW: 1 - lr * weight decay
    Acc rate;    // AdamW: lr / (1 - beta1^t); SGD: lr
    Acc root;    // AdamW: sqrt(1 - beta2^t)
};

// Modules 0 .. M - 1 of the table are A, M .. 2 M - 1 are Bt. coefficients: [2 M, K]; squares: [M, K]. lam or clipping may be absent.
template <class Acc>
__global__ void combine_kernel(Table table, const double* partials, int64_t count, const double* lam, bool clip, Acc* coefficients, double* squares, int chunk) {
    const int k = blockIdx.x, module = blockIdx.y, modules = gridDim.y, clients = table.clients;
    const Range a = range_of(table, module, k, chunk), b = range_of(table, module + modules, k, chunk);
    const double pp_a = warp_sum_range(partials, a.tail, a.end), pp_b = warp_sum_range(partials, b.tail, b.end);
    double c_a = 0, c_b = 0;
    if (lam) {
        const double norm_a = sqrt(pp_a), norm_b = sqrt(pp_b);
        c_a = norm_a > 0 ? lam[k] * norm_b / norm_a : 0;
        c_b = norm_b > 0 ? lam[k] * norm_a / norm_b : 0;
        if (lane_id() == 0) {
            coefficients[static_cast<int64_t>(module) * clients + k] = static_cast<Acc>(c_a);
            coefficients[static_cast<int64_t>(module + modules) * clients + k] = static_cast<Acc>(c_b);
        }
    }
    if (!clip) return;
    double total = warp_sum_range(partials + count, a.start, a.end) + warp_sum_range(partials + count, b.start, b.end);
    if (lam) {
        const double gp_a = warp_sum_range(partials + 2 * count, a.tail, a.end), gp_b = warp_sum_range(partials + 2 * count, b.tail, b.end);
        total += 2 * (c_a * gp_a + c_b * gp_b) + c_a * c_a * pp_a + c_b * c_b * pp_b;
    }
    if (lane_id() == 0) squares[static_cast<int64_t>(module) * clients + k] = total;
}

// step: null for SGD.
template <class Acc>
__global__ void prepare_kernel(const double* squares, int modules, const double* clip, const double* lr, const int64_t* step, double beta1, double beta2,
                               double weight_decay, ClientStep<Acc>* out) {
    const int k = blockIdx.x, clients = gridDim.x;
    double factor = 1;
    if (clip) {
        double total = 0;
        for (int m = lane_id(); m < modules; m += WARP) total += squares[static_cast<int64_t>(m) * clients + k];
        total = warp_sum(total);
        // Rounding can leave a tiny negative sum where the regulariser cancels the gradient. NaN passes through both selections.
        const double ratio = clip[k] / (sqrt(total < 0 ? 0 : total) + 1e-6);
        factor = clip[k] > 0 ? (ratio > 1 ? 1 : ratio) : 1;
    }
    if (lane_id()) return;
    ClientStep<Acc> result{static_cast<Acc>(factor), Acc(1), static_cast<Acc>(lr[k]), Acc(1)};
    if (step) {
        const double count = static_cast<double>(step[k]);
        result.decay = static_cast<Acc>(1 - lr[k] * weight_decay);
        result.rate = static_cast<Acc>(lr[k] / (1 - pow(beta1, count)));
        result.root = static_cast<Acc>(sqrt(1 - pow(beta2, count)));
    }
    out[k] = result;
}

// The gradient of an item's elements: regulariser first, then clipping. A zero coefficient adds nothing, not even 0 * inf.
template <class Acc>
struct GradientRule {
    Acc coefficient, factor;
    __device__ __forceinline__ Acc operator()(Acc gradient, Acc value) const { return (coefficient != 0 ? gradient + coefficient * value : gradient) * factor; }
};

// Client of an item and its gradient rule; false when the client is not active. coefficients: null without a regulariser.
template <class Acc>
__device__ __forceinline__ bool client_of(const Item& item, const Table& table, const ClientStep<Acc>* steps, const Acc* coefficients, const bool* active,
                                          ClientStep<Acc>& client, GradientRule<Acc>& rule) {
    const int k = owner_of(item.layout, table.clients, item.row);
    if (!active[k]) return false;
    client = steps[k];
    const bool tail = coefficients && item.row >= item.layout[table.clients + 1 + k];
    rule = {tail ? coefficients[static_cast<int64_t>(blockIdx.y) * table.clients + k] : Acc(0), client.factor};
    return true;
}

}  // namespace hetlora
