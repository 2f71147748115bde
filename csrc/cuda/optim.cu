// Fused AdamW and SGD over every client of a bank: one warp owns one rank row x CHUNK columns of one factor, so that client and tail are the same for the
// whole warp. Bytes: parameters, gradients and states once, parameters and states written once; see norms.cuh for the pass before.
//
// Before the update, after the pass of norms.cuh over gradients and tail rows:
// prepare, one block per client, with sums in float64. For each module it makes c_A = lam |B_tail| / |A_tail|, c_B = lam |A_tail| / |B_tail| (zero at a zero
// norm) and the squared norm of g + c p. For the client it makes the clipping factor, the step count and the optimiser's own numbers. No atomics, no host
// synchronisation.
#include "dispatch.cuh"
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

// Modules 0 .. M - 1 of the table are A, M .. 2 M - 1 are Bt. One warp: the regulariser's coefficients of a client in module `module`, and its squared norm.
template <class Acc>
__device__ __forceinline__ void combine(const Table& table, const HetloraStep& each, int module, int modules, int k, int chunk) {
    const Range a = range_of(table, module, k, chunk), b = range_of(table, module + modules, k, chunk);
    const double pp_a = warp_sum_range(each.partials, a.tail, a.end), pp_b = warp_sum_range(each.partials, b.tail, b.end);
    double c_a = 0, c_b = 0;
    if (each.lam) {
        const double norm_a = sqrt(pp_a), norm_b = sqrt(pp_b);
        c_a = norm_a > 0 ? each.lam[k] * norm_b / norm_a : 0;
        c_b = norm_b > 0 ? each.lam[k] * norm_a / norm_b : 0;
        if (lane_id() == 0) {
            Acc* coefficients = static_cast<Acc*>(each.coefficients);
            coefficients[static_cast<int64_t>(module) * table.clients + k] = static_cast<Acc>(c_a);
            coefficients[static_cast<int64_t>(module + modules) * table.clients + k] = static_cast<Acc>(c_b);
        }
    }
    if (!each.clip) return;
    const double *gg = each.partials + each.count, *gp = gg + each.count;
    double total = warp_sum_range(gg, a.start, a.end) + warp_sum_range(gg, b.start, b.end);
    if (each.lam) {
        const double gp_a = warp_sum_range(gp, a.tail, a.end), gp_b = warp_sum_range(gp, b.tail, b.end);
        total += 2 * (c_a * gp_a + c_b * gp_b) + c_a * c_a * pp_a + c_b * c_b * pp_b;
    }
    if (lane_id() == 0) each.squares[static_cast<int64_t>(module) * table.clients + k] = total;
}

// A block is a client. With clipping or the regulariser its warps take the modules in turn; the first warp then adds them up in order.
template <class Acc>
__global__ void __launch_bounds__(WARP* WARPS)
    prepare_kernel(Table table, HetloraStep each, int modules, int chunk, double beta1, double beta2, double weight_decay) {
    const int k = blockIdx.x, clients = table.clients;
    if (each.clip || each.lam) {
        for (int m = threadIdx.x / WARP; m < modules; m += WARPS) combine<Acc>(table, each, m, modules, k, chunk);
        __syncthreads();  // every module's squared norm is there
    }
    if (threadIdx.x >= WARP) return;
    double factor = 1;
    if (each.clip) {
        double total = 0;
        for (int m = lane_id(); m < modules; m += WARP) total += each.squares[static_cast<int64_t>(m) * clients + k];
        total = warp_sum(total);
        // Rounding can leave a tiny negative sum where the regulariser cancels the gradient. NaN passes through both selections.
        const double ratio = each.clip[k] / (sqrt(total < 0 ? 0 : total) + 1e-6);
        factor = each.clip[k] > 0 ? (ratio > 1 ? 1 : ratio) : 1;
    }
    if (lane_id()) return;
    const double rate = each.lr[k];
    ClientStep<Acc> result{static_cast<Acc>(factor), Acc(1), static_cast<Acc>(rate), Acc(1)};
    if (each.step) {
        const int64_t steps = each.step[k] + each.active[k];
        each.step[k] = steps;
        const double count = static_cast<double>(steps);
        result.decay = static_cast<Acc>(1 - rate * weight_decay);
        result.rate = static_cast<Acc>(rate / (1 - pow(beta1, count)));
        result.root = static_cast<Acc>(sqrt(1 - pow(beta2, count)));
    }
    static_cast<ClientStep<Acc>*>(each.steps)[k] = result;
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

// As it is stored: a copy in another type is that of the stored value.
template <class T, class Acc>
__device__ __forceinline__ Acc rounded(Acc value) {
    return convert<Acc>(convert<T>(value));
}

template <class Acc>
struct AdamW {
    Acc one_minus_beta1, beta2, one_minus_beta2, eps;
};

// M: of the first state, m or SGD's buffer.
template <bool ALIGNED, class T, class M, class Acc>
__device__ __forceinline__ void adamw_item(const Item& item, const AdamW<Acc>& rule, const ClientStep<Acc>& client, const GradientRule<Acc>& gradient,
                                           Type cast) {
    constexpr int V = VECTOR<T>, PARTS = CHUNK<T> / (WARP * V);
    const Module& module = item.module;
    const int64_t start = static_cast<int64_t>(item.row) * module.width;
    T* at[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) at[i] = static_cast<T*>(const_cast<void*>(module.p[i])) + start;
    M* mean = static_cast<M*>(const_cast<void*>(module.p[2])) + start;
#pragma unroll
    for (int part = 0; part < PARTS; ++part) {
        const int base = item.column + part * WARP * V;
        Acc p[V], g[V], m[V], v[V];
        load<ALIGNED>(p, at[0], base, module.width);
        load<ALIGNED>(g, at[1], base, module.width);
        load<ALIGNED>(m, mean, base, module.width);
        load<ALIGNED>(v, at[3], base, module.width);
#pragma unroll
        for (int e = 0; e < V; ++e) {
            const Acc d = gradient(g[e], p[e]);
            m[e] += (d - m[e]) * rule.one_minus_beta1;
            v[e] = v[e] * rule.beta2 + d * d * rule.one_minus_beta2;
            p[e] = rounded<T>(p[e] * client.decay - client.rate * (m[e] / (sqrt(v[e]) / client.root + rule.eps)));
        }
        store<ALIGNED>(at[0], p, base, module.width);
        if (module.p[4]) store_as<ALIGNED>(cast, module.p[4], start, p, base, module.width);
        store<ALIGNED>(mean, m, base, module.width);
        store<ALIGNED>(at[3], v, base, module.width);
    }
}

// p of a module: parameter, gradient, exp_avg, exp_avg_sq, and null or a copy of the parameter in the type `cast`.
template <class T, class M, class Acc>
__global__ void __launch_bounds__(WARP* WARPS)
    adamw_kernel(Table table, const ClientStep<Acc>* steps, const Acc* coefficients, const bool* active, AdamW<Acc> rule, Type cast) {
    Item item;
    ClientStep<Acc> client;
    GradientRule<Acc> gradient;
    if (!find_item(item, table, CHUNK<T>) || !client_of(item, table, steps, coefficients, active, client, gradient)) return;
    if (item.module.aligned) adamw_item<true, T, M>(item, rule, client, gradient, cast);
    else adamw_item<false, T, M>(item, rule, client, gradient, cast);
}

template <bool ALIGNED, class T, class M, class Acc>
__device__ __forceinline__ void sgd_item(const Item& item, Acc momentum, Acc weight_decay, Acc rate, const GradientRule<Acc>& gradient, Type cast) {
    constexpr int V = VECTOR<T>, PARTS = CHUNK<T> / (WARP * V);
    const Module& module = item.module;
    const int64_t start = static_cast<int64_t>(item.row) * module.width;
    T* target = static_cast<T*>(const_cast<void*>(module.p[0])) + start;
    M* buffer = static_cast<M*>(const_cast<void*>(module.p[2]));
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
            p[e] = rounded<T>(p[e] - rate * b[e]);
        }
        if (buffer) store<ALIGNED>(buffer + start, b, base, module.width);
        store<ALIGNED>(target, p, base, module.width);
        if (module.p[4]) store_as<ALIGNED>(cast, module.p[4], start, p, base, module.width);
    }
}

// p of a module: parameter, gradient, buffer or null, -, cast or null.
template <class T, class M, class Acc>
__global__ void __launch_bounds__(WARP* WARPS)
    sgd_kernel(Table table, const ClientStep<Acc>* steps, const Acc* coefficients, const bool* active, Acc momentum, Acc weight_decay, Type cast) {
    Item item;
    ClientStep<Acc> client;
    GradientRule<Acc> gradient;
    if (!find_item(item, table, CHUNK<T>) || !client_of(item, table, steps, coefficients, active, client, gradient)) return;
    if (item.module.aligned) sgd_item<true, T, M>(item, momentum, weight_decay, client.rate, gradient, cast);
    else sgd_item<false, T, M>(item, momentum, weight_decay, client.rate, gradient, cast);
}

template <class Acc>
static cudaError_t prepare(const HetloraCall& call, const HetloraStep& step, int chunk, double beta1, double beta2, double weight_decay) {
    const dim3 clients(call.table.clients);
    if (clients.x == 0) return cudaSuccess;
    const dim3 threads(step.clip || step.lam ? WARP * WARPS : WARP);
    HETLORA_LAUNCH((prepare_kernel<Acc>), clients, threads, call.stream, call.table, step, call.modules / 2, chunk, beta1, beta2, weight_decay);
    return cudaGetLastError();
}

// The coefficients, or null without a regulariser.
template <class Acc>
static const Acc* coefficients_of(const HetloraStep& step) {
    return step.lam ? static_cast<const Acc*>(step.coefficients) : nullptr;
}

// body(T{}, M{}) for parameters of `type` and a first state of `state`.
template <class Body>
static cudaError_t with_state(Type type, Type state, Body body) {
    if (state == type) return with_type(type, [&](auto of) { return body(of, of); });
    return type == Type::f32 && state == Type::bf16 ? body(float{}, __nv_bfloat16{}) : cudaErrorInvalidValue;
}

}  // namespace hetlora

cudaError_t hetlora_prepare(const HetloraCall* call, hetlora::Type type, const HetloraStep* step, double beta1, double beta2, double weight_decay) {
    using namespace hetlora;
    const int chunk = hetlora_chunk(type);
    return type == Type::f64 ? prepare<double>(*call, *step, chunk, beta1, beta2, weight_decay)
                             : prepare<float>(*call, *step, chunk, beta1, beta2, weight_decay);
}

cudaError_t hetlora_adamw(const HetloraCall* call, hetlora::Type type, const HetloraStep* step, double beta1, double beta2, double eps) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_state(type, step->state, [&](auto of, auto state) {
        using T = decltype(of);
        using M = decltype(state);
        using Acc = typename Accumulator<T>::type;
        const AdamW<Acc> rule{static_cast<Acc>(1 - beta1), static_cast<Acc>(beta2), static_cast<Acc>(1 - beta2), static_cast<Acc>(eps)};
        HETLORA_LAUNCH((adamw_kernel<T, M, Acc>), grid, dim3(WARP * WARPS), call->stream, call->table, static_cast<const ClientStep<Acc>*>(step->steps),
                       coefficients_of<Acc>(*step), step->active, rule, step->cast);
        return cudaGetLastError();
    });
}

cudaError_t hetlora_sgd(const HetloraCall* call, hetlora::Type type, const HetloraStep* step, double momentum, double weight_decay) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_state(type, step->state, [&](auto of, auto state) {
        using T = decltype(of);
        using M = decltype(state);
        using Acc = typename Accumulator<T>::type;
        HETLORA_LAUNCH((sgd_kernel<T, M, Acc>), grid, dim3(WARP * WARPS), call->stream, call->table, static_cast<const ClientStep<Acc>*>(step->steps),
                       coefficients_of<Acc>(*step), step->active, static_cast<Acc>(momentum), static_cast<Acc>(weight_decay), step->cast);
        return cudaGetLastError();
    });
}
