#include "optim.cuh"

#include "dispatch.cuh"

namespace hetlora {

template <class Acc>
static cudaError_t prepare(const HetloraCall& call, const HetloraStep& step, int chunk, double beta1, double beta2, double weight_decay) {
    const int modules = call.modules / 2;
    const dim3 clients(call.table.clients);
    if (clients.x == 0) return cudaSuccess;
    if (step.clip || step.lam) {
        HETLORA_LAUNCH((combine_kernel<Acc>), dim3(clients.x, modules), dim3(WARP), call.stream, call.table, step.partials, step.count, step.lam,
                       step.clip != nullptr, static_cast<Acc*>(step.coefficients), step.squares, chunk);
        const cudaError_t error = cudaGetLastError();
        if (error != cudaSuccess) return error;
    }
    HETLORA_LAUNCH((prepare_kernel<Acc>), clients, dim3(WARP), call.stream, step.squares, modules, step.clip, step.lr, step.step, beta1, beta2, weight_decay,
                   static_cast<ClientStep<Acc>*>(step.steps));
    return cudaGetLastError();
}

// The coefficients, or null without a regulariser.
template <class Acc>
static const Acc* coefficients_of(const HetloraStep& step) {
    return step.lam ? static_cast<const Acc*>(step.coefficients) : nullptr;
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
    return with_type(type, [&](auto of) {
        using T = decltype(of);
        using Acc = typename Accumulator<T>::type;
        const AdamW<Acc> rule{static_cast<Acc>(1 - beta1), static_cast<Acc>(beta2), static_cast<Acc>(1 - beta2), static_cast<Acc>(eps)};
        HETLORA_LAUNCH((adamw_kernel<T, Acc>), grid, dim3(WARP * WARPS), call->stream, call->table, static_cast<const ClientStep<Acc>*>(step->steps),
                       coefficients_of<Acc>(*step), step->active, rule);
        return cudaGetLastError();
    });
}

cudaError_t hetlora_sgd(const HetloraCall* call, hetlora::Type type, const HetloraStep* step, double momentum, double weight_decay) {
    using namespace hetlora;
    const dim3 grid = item_grid(*call);
    if (is_empty(grid)) return cudaSuccess;
    return with_type(type, [&](auto of) {
        using T = decltype(of);
        using Acc = typename Accumulator<T>::type;
        HETLORA_LAUNCH((sgd_kernel<T, Acc>), grid, dim3(WARP * WARPS), call->stream, call->table, static_cast<const ClientStep<Acc>*>(step->steps),
                       coefficients_of<Acc>(*step), step->active, static_cast<Acc>(momentum), static_cast<Acc>(weight_decay));
        return cudaGetLastError();
    });
}
