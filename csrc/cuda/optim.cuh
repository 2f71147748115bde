// Fused AdamW and SGD over every client of a bank: one warp owns one rank row x CHUNK columns of one factor, so that client and tail are the same for the
// whole warp. Bytes: parameters, gradients and states once, parameters and states written once; see norms.cuh for the pass before.
#pragma once
#include "step.cuh"

namespace hetlora {

template <class Acc>
struct AdamW {
    Acc one_minus_beta1, beta2, one_minus_beta2, eps;
};

template <bool ALIGNED, class T, class Acc>
__device__ __forceinline__ void adamw_item(const Item& item, const AdamW<Acc>& rule, const ClientStep<Acc>& client, const GradientRule<Acc>& gradient) {
    constexpr int V = VECTOR<T>, PARTS = CHUNK<T> / (WARP * V);
    const Module& module = item.module;
    const int64_t start = static_cast<int64_t>(item.row) * module.width;
    T* at[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] = static_cast<T*>(const_cast<void*>(module.p[i])) + start;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int base = item.column + part * WARP * V;
        Acc p[V], g[V], m[V], v[V];
        load<ALIGNED>(p, at[0], base, module.width);
        load<ALIGNED>(g, at[1], base, module.width);
        load<ALIGNED>(m, at[2], base, module.width);
        load<ALIGNED>(v, at[3], base, module.width);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const Acc d = gradient(g[e], p[e]);
            m[e] += (d - m[e]) * rule.one_minus_beta1;
            v[e] = v[e] * rule.beta2 + d * d * rule.one_minus_beta2;
            p[e] = p[e] * client.decay - client.rate * (m[e] / (sqrt(v[e]) / client.root + rule.eps));
        }
        store<ALIGNED>(at[0], p, base, module.width);
        store<ALIGNED>(at[2], m, base, module.width);
        store<ALIGNED>(at[3], v, base, module.width);
    }
}

// p of a module: parameter, gradient, exp_avg, exp_avg_sq.
template <class T, class Acc>
__global__ void __launch_bounds__(WARP* WARPS)
    adamw_kernel(Table table, const ClientStep<Acc>* steps, const Acc* coefficients, const bool* active, AdamW<Acc> rule) {
    Item item;
    ClientStep<Acc> client;
    GradientRule<Acc> gradient;
    if (!find_item(item, table, CHUNK<T>) || !client_of(item, table, steps, coefficients, active, client, gradient)) return;
    if (item.module.aligned) adamw_item<true, T>(item, rule, client, gradient);
    else adamw_item<false, T>(item, rule, client, gradient);
}

template <bool ALIGNED, class T, class Acc>
__device__ __forceinline__ void sgd_item(const Item& item, Acc momentum, Acc weight_decay, Acc rate, const GradientRule<Acc>& gradient) {
    constexpr int V = VECTOR<T>, PARTS = CHUNK<T> / (WARP * V);
    const Module& module = item.module;
    const int64_t start = static_cast<int64_t>(item.row) * module.width;
    T* target = static_cast<T*>(const_cast<void*>(module.p[0])) + start;
    T* buffer = static_cast<T*>(const_cast<void*>(module.p[2]));
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int base = item.column + part * WARP * V;
        Acc p[V], g[V], b[V] = {};
        load<ALIGNED>(p, target, base, module.width);
        load<ALIGNED>(g, static_cast<const T*>(module.p[1]) + start, base, module.width);
        if (buffer) load<ALIGNED>(b, buffer + start, base, module.width);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            b[e] = b[e] * momentum + (gradient(g[e], p[e]) + weight_decay * p[e]);
            p[e] -= rate * b[e];
        }
        if (buffer) store<ALIGNED>(buffer + start, b, base, module.width);
        store<ALIGNED>(target, p, base, module.width);
    }
}

// p of a module: parameter, gradient, buffer or null.
template <class T, class Acc>
__global__ void __launch_bounds__(WARP* WARPS)
    sgd_kernel(Table table, const ClientStep<Acc>* steps, const Acc* coefficients, const bool* active, Acc momentum, Acc weight_decay) {
    Item item;
    ClientStep<Acc> client;
    GradientRule<Acc> gradient;
    if (!find_item(item, table, CHUNK<T>) || !client_of(item, table, steps, coefficients, active, client, gradient)) return;
    if (item.module.aligned) sgd_item<true, T>(item, momentum, weight_decay, client.rate, gradient);
    else sgd_item<false, T>(item, momentum, weight_decay, client.rate, gradient);
}

}  // namespace hetlora
