#include "optim_kernels.h"

#include <cmath>
#include <limits>
#include <type_traits>

namespace hetlora {
namespace {

// Of elements that the regulariser leaves alone.
struct NoPull {};

// Whether the regulariser's factor lam ||other|| / ||own|| can be used in the type of the arithmetic, which has twice the lanes of double. It may leave the range
// of float where its product with the parameter does not. Then that product is a double's.
template <class Sum>
HETLORA_INLINE bool fits(double pull) {
    using Range = std::numeric_limits<Sum>;
    return pull == 0 || (pull >= Range::min() && pull <= Range::max());
}

// Pull: NoPull, Sum where the factor fits, else double.
template <class Sum, class Pull>
HETLORA_INLINE Sum gradient(Sum g, Sum p, Pull pull, Sum clip) {
    if constexpr (!std::is_same_v<Pull, NoPull>) {
        g += static_cast<Sum>(pull * static_cast<Pull>(p));
    }
    return g * clip;
}

template <class T, class M, class Sum, class Pull>
HETLORA_INLINE void adamw_elements(T* __restrict p, const T* __restrict g, M* __restrict m, T* __restrict v, int64_t n, const Step<Sum>& s, Pull pull) {
    const Step<Sum> c = s;
    for (int64_t i = 0; i < n; ++i) {
        const Sum value = widen<Sum>(p[i]), old = widen<Sum>(m[i]);
        const Sum grad = gradient(widen<Sum>(g[i]), value, pull, c.clip);
        const Sum mean = old + (grad - old) * c.one_minus_beta1;
        const Sum square = widen<Sum>(v[i]) * c.beta2 + grad * grad * c.one_minus_beta2;
        narrow(mean, m + i);
        narrow(square, v + i);
        // The subtrahend ends in a division. Were it a product too, either could be contracted to an FMA, and GCC takes one in NEON's vectors and the other in
        // the rest of the loop: an element's bits would depend on its place.
        narrow(value * c.decay - c.rate * mean / (std::sqrt(square) * c.denominator + c.eps), p + i);
    }
}

template <bool buffered, class T, class M, class Sum, class Pull>
HETLORA_INLINE void sgd_elements(T* __restrict p, const T* __restrict g, M* __restrict buffer, int64_t n, const Step<Sum>& s, Pull pull) {
    const Step<Sum> c = s;
    for (int64_t i = 0; i < n; ++i) {
        const Sum value = widen<Sum>(p[i]);
        Sum direction = gradient(widen<Sum>(g[i]), value, pull, c.clip) + c.decay * value;
        if constexpr (buffered) {
            direction = widen<Sum>(buffer[i]) * c.momentum + direction;
            narrow(direction, buffer + i);
        }
        narrow(value - c.rate * direction, p + i);
    }
}

// A span with one type of the factor. M: of m, or of SGD's buffer.
template <class T, class M, class Sum, class Pull>
HETLORA_INLINE void adamw_pulled(const Span& a, const Step<Sum>& s, Pull pull) {
    adamw_elements(static_cast<T*>(a.p), static_cast<const T*>(a.g), static_cast<M*>(a.state[0]), static_cast<T*>(a.state[1]), a.n, s, pull);
}

template <class T, class M, class Sum, class Pull>
HETLORA_INLINE void sgd_pulled(const Span& a, const Step<Sum>& s, Pull pull) {
    T* p = static_cast<T*>(a.p);
    const T* g = static_cast<const T*>(a.g);
    M* buffer = static_cast<M*>(a.state[0]);
    buffer != nullptr ? sgd_elements<true>(p, g, buffer, a.n, s, pull) : sgd_elements<false>(p, g, buffer, a.n, s, pull);
}

template <class T, class Sum, class Pull>
HETLORA_INLINE void penalised(const T* __restrict p, const T* __restrict g, Sum* __restrict out, int64_t n, Pull pull) {
    for (int64_t i = 0; i < n; ++i) {
        out[i] = gradient(widen<Sum>(g[i]), widen<Sum>(p[i]), pull, Sum{1});
    }
}

template <class T, class M, class Sum>
HETLORA_INLINE void adamw_span(const Span& a, const Step<Sum>& s) {
    if (!a.tail) {
        adamw_pulled<T, M>(a, s, NoPull{});
    } else if (fits<Sum>(a.pull)) {
        adamw_pulled<T, M>(a, s, static_cast<Sum>(a.pull));
    } else {
        adamw_pulled<T, M>(a, s, a.pull);
    }
}

template <class T, class M, class Sum>
HETLORA_INLINE void sgd_span(const Span& a, const Step<Sum>& s) {
    if (!a.tail) {
        sgd_pulled<T, M>(a, s, NoPull{});
    } else if (fits<Sum>(a.pull)) {
        sgd_pulled<T, M>(a, s, static_cast<Sum>(a.pull));
    } else {
        sgd_pulled<T, M>(a, s, a.pull);
    }
}

template <class T, class Sum>
HETLORA_INLINE void penalise_span(const T* p, const T* g, Sum* out, int64_t n, double pull) {
    fits<Sum>(pull) ? penalised(p, g, out, n, static_cast<Sum>(pull)) : penalised(p, g, out, n, pull);
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
