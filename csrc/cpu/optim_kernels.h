// The arithmetic of a step on one block of one client's one factor, compiled for several instruction sets.
#pragma once

#include "simd.h"

namespace hetlora {

// Per client and step, in the type of the arithmetic.
template <class Sum>
struct Step {
    Sum clip, decay, rate;                      // gradient factor; 1 - lr wd (AdamW) or wd (SGD); lr, bias-corrected for AdamW
    Sum one_minus_beta1, beta2, one_minus_beta2, eps, denominator;  // AdamW; denominator = 1 / sqrt(1 - beta2^t)
    Sum momentum;                               // SGD
};

// The block of a job that a call works on; `state` is m and v, or SGD's buffer, or nothing.
struct Span {
    void *p, *g, *state[2];
    int64_t n;
    double pull;
    bool tail;
};

// Parameters and gradients have `type`. The first state, m or SGD's buffer, has type `state`: the same, or bfloat16 beside float32.
void adamw_block(Type type, Type state, const Span& span, const Step<float>& step);
void adamw_block(Type type, Type state, const Span& span, const Step<double>& step);
void sgd_block(Type type, Type state, const Span& span, const Step<float>& step);
void sgd_block(Type type, Type state, const Span& span, const Step<double>& step);

// out = the gradients g + pull p of a tail, unclipped.
void penalise_block(Type type, const void* p, const void* g, float* out, int64_t n, double pull);
void penalise_block(Type type, const void* p, const void* g, double* out, int64_t n, double pull);

}  // namespace hetlora
