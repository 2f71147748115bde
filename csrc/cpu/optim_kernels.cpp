#include "optim_kernels.h"

#include <algorithm>
#include <cmath>

namespace hetlora {
namespace {

// The regulariser's factor lam ||other|| / ||own||, which may leave the range of float where its product with the parameter does not: power (rest p), with a
// power of two near its root. What is between the factors of that product is between p and the product, so it stays in range.
template <class Sum>
struct Pull {
    Sum power, rest;
};

template <class Sum>
HETLORA_INLINE Pull<Sum> split(double pull) {
    int exponent = 0;
    if (std::isfinite(pull)) {
        std::frexp(pull, &exponent);
    }
    const double power = std::ldexp(1.0, std::clamp(exponent / 2, -126, 126));
    return {static_cast<Sum>(power), static_cast<Sum>(pull / power)};
}

template <bool tail, class Sum>
HETLORA_INLINE Sum gradient(Sum g, Sum p, const Pull<Sum>& pull, Sum clip) {
    if constexpr (tail) {
        g += pull.power * (pull.rest * p);
    }
    return g * clip;
}

template <bool tail, class T, class M, class Sum>
HETLORA_INLINE void adamw_elements(T* __restrict p, const T* __restrict g, M* __restrict m, T* __restrict v, int64_t n, const Step<Sum>& s, double pull) {
    const Step<Sum> c = s;
    const Pull<Sum> own = split<Sum>(pull);
    for (int64_t i = 0; i < n; ++i) {
        const Sum value = widen<Sum>(p[i]), old = widen<Sum>(m[i]);
        const Sum grad = gradient<tail>(widen<Sum>(g[i]), value, own, c.clip);
        const Sum mean = old + (grad - old) * c.one_minus_beta1;
        const Sum square = widen<Sum>(v[i]) * c.beta2 + grad * grad * c.one_minus_beta2;
        narrow(mean, m + i);
        narrow(square, v + i);
        // The subtrahend ends in a division. Were it a product too, either could be contracted to an FMA, and GCC takes one in NEON's vectors and the other in
        // the rest of the loop: an element's bits would depend on its place.
        narrow(value * c.decay - c.rate * mean / (std::sqrt(square) * c.denominator + c.eps), p + i);
    }
}

template <bool tail, bool buffered, class T, class M, class Sum>
HETLORA_INLINE void sgd_elements(T* __restrict p, const T* __restrict g, M* __restrict buffer, int64_t n, const Step<Sum>& s, double pull) {
    const Step<Sum> c = s;
    const Pull<Sum> own = split<Sum>(pull);
    for (int64_t i = 0; i < n; ++i) {
        const Sum value = widen<Sum>(p[i]);
        Sum direction = gradient<tail>(widen<Sum>(g[i]), value, own, c.clip) + c.decay * value;
        if constexpr (buffered) {
            direction = widen<Sum>(buffer[i]) * c.momentum + direction;
            narrow(direction, buffer + i);
        }
        narrow(value - c.rate * direction, p + i);
    }
}

// M: of m, or of SGD's buffer.
template <class T, class M, class Sum>
HETLORA_INLINE void adamw_span(const Span& a, const Step<Sum>& s) {
    T *p = static_cast<T*>(a.p), *g = static_cast<T*>(a.g), *v = static_cast<T*>(a.state[1]);
    M* m = static_cast<M*>(a.state[0]);
    a.tail ? adamw_elements<true>(p, g, m, v, a.n, s, a.pull) : adamw_elements<false>(p, g, m, v, a.n, s, a.pull);
}

template <class T, class M, class Sum>
HETLORA_INLINE void sgd_span(const Span& a, const Step<Sum>& s) {
    T *p = static_cast<T*>(a.p), *g = static_cast<T*>(a.g);
    M* buffer = static_cast<M*>(a.state[0]);
    if (buffer != nullptr) {
        a.tail ? sgd_elements<true, true>(p, g, buffer, a.n, s, a.pull) : sgd_elements<false, true>(p, g, buffer, a.n, s, a.pull);
    } else {
        a.tail ? sgd_elements<true, false>(p, g, buffer, a.n, s, a.pull) : sgd_elements<false, false>(p, g, buffer, a.n, s, a.pull);
    }
}

template <class T, class Sum>
HETLORA_INLINE void penalise_span(const T* __restrict p, const T* __restrict g, Sum* __restrict out, int64_t n, double pull) {
    const Pull<Sum> own = split<Sum>(pull);
    for (int64_t i = 0; i < n; ++i) {
        out[i] = gradient<true>(widen<Sum>(g[i]), widen<Sum>(p[i]), own, Sum{1});
    }
}

}  // namespace

// span_kernel for parameters of `type`, with the state in it or in bfloat16.
#define HETLORA_FOR_STATE(span_kernel)                            \
    if (state == type) {                                          \
        HETLORA_FOR_TYPE(type, T, span_kernel<T, T>(span, step)); \
    } else {                                                      \
        span_kernel<float, bf16>(span, step);                     \
    }

#define HETLORA_STEP_KERNELS(Sum)                                                                                                                    \
    HETLORA_CLONES void adamw_block(Type type, Type state, const Span& span, const Step<Sum>& step){                                                 \
        HETLORA_FOR_STATE(adamw_span)} HETLORA_CLONES void sgd_block(Type type, Type state, const Span& span, const Step<Sum>& step){                \
        HETLORA_FOR_STATE(sgd_span)} HETLORA_CLONES void penalise_block(Type type, const void* p, const void* g, Sum* out, int64_t n, double pull) { \
        HETLORA_FOR_TYPE(type, T, penalise_span(static_cast<const T*>(p), static_cast<const T*>(g), out, n, pull));                                  \
    }
HETLORA_STEP_KERNELS(float)
HETLORA_STEP_KERNELS(double)

}  // namespace hetlora
