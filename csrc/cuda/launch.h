// The launchers: plain C functions, no torch headers. Each returns a cudaError_t and neither waits nor allocates; the caller owns table and workspace.
#pragma once
#include <cuda_runtime_api.h>

#include "lora.h"
#include "table.h"

#ifndef HETLORA_LAUNCH
#define HETLORA_LAUNCH(kernel, grid, threads, stream, ...) kernel<<<grid, threads, 0, stream>>>(__VA_ARGS__)
#endif

// What every launch needs. `items`: the most items (rows times chunks, or tiles) that one module has.
struct HetloraCall {
    const unsigned char* host_table;
    size_t table_bytes;
    void* device_table;
    hetlora::Table table;
    int modules;
    int64_t items;
    cudaStream_t stream;
};

extern "C" {
// Columns of one item for rows of this type.
int hetlora_chunk(hetlora::Type type);
// Columns of one split of a Gram matrix.
int hetlora_gram_split();
cudaError_t hetlora_upload(const HetloraCall* call);
cudaError_t hetlora_truncate(const HetloraCall* call, hetlora::Type in, hetlora::Type out, bool dense);
// weights: [K, M] in float64 for float64 rows, else float32.
cudaError_t hetlora_aggregate(const HetloraCall* call, hetlora::Type in, hetlora::Type out, hetlora::Type keep, const void* weights, bool normalize);
// weights: [M] in the type of the sums.
cudaError_t hetlora_accumulate(const HetloraCall* call, hetlora::Type in, hetlora::Type sums, const void* weights);
// Items are rows; p: rows, codes, scales.
cudaError_t hetlora_quantize(const HetloraCall* call, hetlora::Type in, int bits);
// p: out, codes, scales.
cudaError_t hetlora_dequantize(const HetloraCall* call, hetlora::Type out, int bits);
// `splits`: the most column splits that one module has. planes: workspace.
cudaError_t hetlora_gram(const HetloraCall* call, hetlora::Type in, hetlora::Type result, int splits, void* planes);
// After hetlora_gram on the same table, whose modules are A and then Bt. out: [K, M].
cudaError_t hetlora_delta_norms(const HetloraCall* call, hetlora::Type result, void* out);
// partials: float64 [count], or [3, count] with gradients.
cudaError_t hetlora_squares(const HetloraCall* call, hetlora::Type type, bool grads, double* partials, int64_t count);
cudaError_t hetlora_tail_norms(const HetloraCall* call, hetlora::Type type, const double* partials, void* out);
}

// The optimisers: modules 0 .. M - 1 of the table are A, the rest Bt. Optional tensors are null. Workspaces: coefficients [2 M, K] and steps [K, 4] in the
// type of the arithmetic, squares float64 [M, K].
struct HetloraStep {
    const double *lr, *clip, *lam, *partials;
    int64_t* step;
    const bool* active;
    int64_t count;
    void *coefficients, *steps;
    double* squares;
    hetlora::Type cast;   // of the module's fifth pointer, if it has one
    hetlora::Type state;  // of its third, m or SGD's buffer: that of the parameters, or bf16 beside f32
};

extern "C" {
// step->step is null for SGD, else it counts this step afterwards.
cudaError_t hetlora_prepare(const HetloraCall* call, hetlora::Type type, const HetloraStep* step, double beta1, double beta2, double weight_decay);
cudaError_t hetlora_adamw(const HetloraCall* call, hetlora::Type type, const HetloraStep* step, double beta1, double beta2, double eps);
cudaError_t hetlora_sgd(const HetloraCall* call, hetlora::Type type, const HetloraStep* step, double momentum, double weight_decay);
}

// Losses of rows of logits [rows, words]; with a softcap c the logit z is c tanh(scale x / c).
namespace hetlora {
struct LossForm {
    double scale, softcap, smoothing, z_loss;
};
struct LossCall {
    void* logits;
    const int64_t* labels;
    const void* weights;  // null: 1
    void* losses;         // in the type of the arithmetic, as the weights
    int words;
    bool sloped, aligned;
    LossForm form;
};
}  // namespace hetlora

extern "C" {
cudaError_t hetlora_cross_entropy(const hetlora::LossCall* call, hetlora::Type type, int64_t rows, cudaStream_t stream);
}

// The LoRA layer. `type` is that of x and S; `tiles` and `chunks` are the sums over clients, `rank` the largest.
extern "C" {
// Into call->planes where x has several splits of columns, else into call->s.
cudaError_t hetlora_shrink(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream);
// call->s, and call->wide where there is one, from call->planes: unless hetlora_expand does it.
cudaError_t hetlora_shrink_sum(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream);
// call->wide from call->s.
cudaError_t hetlora_widen(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream);
cudaError_t hetlora_expand(const hetlora::LoraCall* call, hetlora::Type type, int64_t tiles, cudaStream_t stream);
// Clients with more than one chunk into call->planes, the others into call->out.
cudaError_t hetlora_grouped_gram(const hetlora::LoraCall* call, hetlora::Type type, int64_t chunks, cudaStream_t stream);
cudaError_t hetlora_grouped_gram_sum(const hetlora::GramSums* sums, hetlora::Type type, int rank, cudaStream_t stream);
}
