#include "gram.cuh"

#include "dispatch.cuh"

namespace hetlora {

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
