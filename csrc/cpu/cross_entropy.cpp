// cross_entropy_: losses of rows of logits, whose slopes take the logits' place.
//
// A task is one row. Its logits come from memory once, in blocks of 1024. While a block is in L1 its largest logit is found, then the exponentials relative to
// the largest so far, and their sum. Exponentials stay in L2 in the type of the arithmetic. They take the logits' place. With 16-bit logits or a softcap they
// stand in a row beside the logits. Then each becomes a slope, by a factor of its block. Bytes: the logits read once, the slopes written once.
//
// What is one number for a row is kept in double, so that logits of 1e4 lose nothing in their loss. Probabilities below 2^-126 are zero.
#include <algorithm>
#include <cmath>
#include <limits>

#include "tensors.h"

namespace hetlora {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kIgnored = -100;

// What all rows of a call share. With a softcap c the logit z is c tanh(scale x / c), without it scale x.
struct Form {
    double scale, softcap, smoothing, z_loss;
};

template <class E, int W>
using Lanes = typename VectorOf<E, W>::type;

// 2^n and p of x = n ln 2 + r, e^r = 1 + p, for x <= 0 or NaN: e^x is 2^n + 2^n p. 2^n is zero below 2^-126.
template <int W>
HETLORA_INLINE void split_exponential(Lanes<float, W> x, Lanes<float, W>* power, Lanes<float, W>* p) {
    typedef Lanes<float, W> V;
    typedef typename VectorOf<uint32_t, W>::type U;
    constexpr float kMagic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which is then in the lowest bits
    constexpr uint32_t kMagicBits = 0x4B400000u;
    const V lowest = V{} - 88.0f;
    x = x < lowest ? lowest : x;  // NaN stays
    const V shifted = x * 1.44269504f + kMagic, n = shifted - kMagic;
    V r = x - n * 0.693145752f;  // ln 2 in two parts, the first of 16 bits
    r = r - n * 1.42860682e-6f;
    // (e^r - 1 - r) / r^2: the error of e^r is at most 3.8e-9 of it.
    V q = r * 0x1.6a2434p-10f + 0x1.1239e2p-7f;
    q = q * r + 0x1.5558f2p-5f;
    q = q * r + 0x1.555492p-3f;
    q = q * r + 0x1.fffffcp-2f;
    *p = r + r * r * q;
    const U bits = (bit_cast<U>(shifted) + (127u - kMagicBits)) << 23;
    *power = bit_cast<V>(bits);
}

template <int W>
HETLORA_INLINE Lanes<float, W> exponential(Lanes<float, W> x) {
    Lanes<float, W> power, p;
    split_exponential<W>(x, &power, &p);
    return power + power * p;
}

template <int W>
HETLORA_INLINE Lanes<double, W> exponential(Lanes<double, W> x) {
    for (int i = 0; i < W; ++i) {
        x[i] = std::exp(x[i]);
    }
    return x;
}

// tanh a = -t / (2 + t) and its slope 4 e / (2 + t)^2 with e = exp(-2 |a|), t = e - 1 made without a difference of near numbers.
template <int W>
HETLORA_INLINE void hyperbolic(Lanes<float, W> a, Lanes<float, W>* tangent, Lanes<float, W>* slope) {
    typedef Lanes<float, W> V;
    V power, p;
    const V zero{}, positive = a < zero ? -a : a;
    split_exponential<W>(-2.0f * positive, &power, &p);
    const V t = power * p + (power - 1.0f), below = 2.0f + t, e = power + power * p;
    const V size = -t / below;
    *tangent = a < zero ? -size : size;
    *slope = 4.0f * e / (below * below);
}

template <int W>
HETLORA_INLINE void hyperbolic(Lanes<double, W> a, Lanes<double, W>* tangent, Lanes<double, W>* slope) {
    for (int i = 0; i < W; ++i) {
        const double e = std::exp(-2 * std::fabs(a[i])), below = 1 + e;
        (*tangent)[i] = std::tanh(a[i]);
        (*slope)[i] = 4 * e / (below * below);
    }
}

// The first n < W elements, then `rest`.
template <class E, int W>
HETLORA_INLINE Lanes<E, W> leading(const E* from, int64_t n, E rest) {
    Lanes<E, W> v;
    for (int i = 0; i < W; ++i) {
        v[i] = i < n ? from[i] : rest;
    }
    return v;
}

// z of n <= kBlock logits, where they lie if they are that already; the slopes of the softcap beside them.
template <class E, int W, bool Capped, class T>
HETLORA_INLINE const E* block_of(const T* from, int64_t n, const Form& form, E* z, E* steep) {
    typedef Lanes<E, W> V;
    if constexpr (sizeof(T) == sizeof(E)) {
        if (!Capped && form.scale == 1) {
            return from;
        }
    }
    const E scale = static_cast<E>(form.scale);
    if constexpr (!Capped) {
        for (int64_t i = 0; i < n; ++i) {
            z[i] = widen<E>(from[i]) * scale;
        }
        return z;
    }
    const E cap = static_cast<E>(form.softcap);
    for (int64_t i = 0; i < n; ++i) {
        z[i] = widen<E>(from[i]) * scale / cap;
    }
    for (int64_t i = n; i % W; ++i) {
        z[i] = 0;
    }
    for (int64_t i = 0; i < n; i += W) {
        V tangent, slope;
        hyperbolic<W>(*reinterpret_cast<const V*>(z + i), &tangent, &slope);
        *reinterpret_cast<V*>(z + i) = cap * tangent;
        *reinterpret_cast<V*>(steep + i) = slope;
    }
    return z;
}

template <class E, int W>
HETLORA_INLINE E largest(const E* z, int64_t n) {
    typedef Lanes<E, W> V;
    constexpr E kLeast = -std::numeric_limits<E>::infinity();
    V top[4];
    for (V& each : top) {
        each = V{} + kLeast;
    }
    int64_t c = 0;
    for (; c + 4 * W <= n; c += 4 * W) {
        HETLORA_UNROLL
        for (int j = 0; j < 4; ++j) {
            const V v = *reinterpret_cast<const V*>(z + c + j * W);
            top[j] = v > top[j] ? v : top[j];
        }
    }
    E out = kLeast;
    for (const V& each : top) {
        for (int i = 0; i < W; ++i) {
            out = each[i] > out ? each[i] : out;
        }
    }
    for (; c < n; ++c) {
        out = z[c] > out ? z[c] : out;
    }
    return out;
}

// e = exp(z - top) of one block, and its sum and that of z: on each lane a chain of at most kBlock / 2 W, then the lanes in double. e may be z.
template <class E, int W>
HETLORA_INLINE void exponentials_of(const E* z, int64_t n, E top, E* e, double* sum, double* sum_z) {
    typedef Lanes<E, W> V;
    V even{}, odd{}, even_z{}, odd_z{};
    int64_t c = 0;
    for (; c + 2 * W <= n; c += 2 * W) {
        const V a = *reinterpret_cast<const V*>(z + c) - top, b = *reinterpret_cast<const V*>(z + c + W) - top;
        const V of_a = exponential<W>(a), of_b = exponential<W>(b);
        even_z += a;
        odd_z += b;
        even += of_a;
        odd += of_b;
        *reinterpret_cast<V*>(e + c) = of_a;
        *reinterpret_cast<V*>(e + c + W) = of_b;
    }
    double tail = 0, tail_z = 0;
    for (; c < n; c += W) {
        const int64_t left = n - c < W ? n - c : W;
        const V more = exponential<W>(leading<E, W>(z + c, left, top) - top);
        for (int64_t i = 0; i < left; ++i) {
            tail_z += z[c + i] - top;
            tail += more[i];
            e[c + i] = more[i];
        }
    }
    for (int i = 0; i < W; ++i) {
        tail += static_cast<double>(even[i]) + static_cast<double>(odd[i]);
        tail_z += static_cast<double>(even_z[i]) + static_cast<double>(odd_z[i]);
    }
    *sum += tail;
    *sum_z += tail_z + static_cast<double>(n) * top;
}

// kept: the row of exponentials, null where no slopes are wanted. It is the row of logits itself where the logits are not needed again. tops: one number for
// each block of `kept`, the largest logit it is relative to.
template <class E, int W, bool Capped, class T>
HETLORA_INLINE double row_loss(T* row, int64_t words, int64_t label, const double* weight, const Form& form, E* kept, double* tops) {
    typedef Lanes<E, W> V;
    constexpr double kLeast = -std::numeric_limits<double>::infinity();
    alignas(64) E room[kBlock], steep[kBlock];
    const double z_label = *block_of<E, W, Capped>(row + label, 1, form, room, steep), steep_label = Capped ? steep[0] : 1;
    double top = kLeast, sum = 0, sum_z = 0;
    for (int64_t begin = 0; begin < words; begin += kBlock) {
        const int64_t n = words - begin < kBlock ? words - begin : kBlock;
        const E* z = block_of<E, W, Capped>(row + begin, n, form, room, steep);
        const double own = largest<E, W>(z, n);
        if (own > top) {
            sum *= std::exp(top - own);
            top = own;
        }
        exponentials_of<E, W>(z, n, static_cast<E>(top == kLeast ? 0 : top), kept == nullptr ? room : kept + begin, &sum, &sum_z);  // of -inf alone: zeros
        if (kept != nullptr) {
            tops[begin / kBlock] = top;
        }
    }
    const double exponent = std::log(sum), total = exponent + top, count = static_cast<double>(words), each = form.smoothing / count;
    double loss = exponent - (1 - form.smoothing) * (z_label - top) + form.z_loss * total * total;
    if (form.smoothing != 0) {
        loss -= form.smoothing * (sum_z / count - top);
    }
    if (kept == nullptr) {
        return loss;
    }
    const double gain = form.scale * (weight == nullptr ? 1 : *weight), share = (1 + 2 * form.z_loss * total) / sum;
    const double of_label = (std::exp(z_label - top) * share - each - (1 - form.smoothing)) * gain * steep_label;
    const E constant = static_cast<E>(each * gain);
    for (int64_t begin = 0; begin < words; begin += kBlock) {
        const int64_t n = words - begin < kBlock ? words - begin : kBlock;
        const E factor = static_cast<E>(share * gain * std::exp(tops[begin / kBlock] - top));
        if constexpr (Capped) {
            block_of<E, W, Capped>(row + begin, n, form, room, steep);
        }
        E* e = kept + begin;
        int64_t c = 0;
        for (; c + W <= n; c += W) {
            V slope = *reinterpret_cast<const V*>(e + c) * factor - constant;
            if constexpr (Capped) {
                slope *= *reinterpret_cast<const V*>(steep + c);
            }
            *reinterpret_cast<V*>(e + c) = slope;
        }
        for (; c < n; ++c) {
            e[c] = (e[c] * factor - constant) * (Capped ? steep[c] : E{1});
        }
        if (static_cast<void*>(kept) != static_cast<void*>(row)) {
            for (int64_t i = 0; i < n; ++i) {
                narrow(e[i], row + begin + i);
            }
        }
    }
    narrow(of_label, row + label);
    return loss;
}

template <int W>
HETLORA_INLINE double row_loss_as(Type type, void* row, int64_t words, int64_t label, const double* weight, const Form& form, void* kept, double* tops) {
    HETLORA_FOR_TYPE(type, T, {
        using E = std::conditional_t<sizeof(T) == 8, double, float>;
        constexpr int kLanes = W * sizeof(float) / sizeof(E);
        return form.softcap == 0 ? row_loss<E, kLanes, false>(static_cast<T*>(row), words, label, weight, form, static_cast<E*>(kept), tops)
                                 : row_loss<E, kLanes, true>(static_cast<T*>(row), words, label, weight, form, static_cast<E*>(kept), tops);
    });
    return 0;
}

using RowKernel = double (*)(Type type, void* row, int64_t words, int64_t label, const double* weight, const Form& form, void* kept, double* tops);

double row_loss_base(Type type, void* row, int64_t words, int64_t label, const double* weight, const Form& form, void* kept, double* tops) {
    return row_loss_as<4>(type, row, words, label, weight, form, kept, tops);
}
#if defined(HETLORA_X86)
HETLORA_AVX2 double row_loss_avx2(Type type, void* row, int64_t words, int64_t label, const double* weight, const Form& form, void* kept, double* tops) {
    return row_loss_as<8>(type, row, words, label, weight, form, kept, tops);
}
HETLORA_AVX512 double row_loss_avx512(Type type, void* row, int64_t words, int64_t label, const double* weight, const Form& form, void* kept, double* tops) {
    return row_loss_as<16>(type, row, words, label, weight, form, kept, tops);
}
#endif

RowKernel row_kernel() {
    static const InstructionSet set = instruction_set();
#if defined(HETLORA_X86)
    if (set != InstructionSet::base) {
        return set >= InstructionSet::avx512 ? row_loss_avx512 : row_loss_avx2;
    }
#endif
    (void)set;
    return row_loss_base;
}

Tensor cross_entropy(const Tensor& logits, const Tensor& labels, const MaybeTensor& weights, double scale, double softcap, double smoothing, double z_loss,
                     bool slopes) {
    STD_TORCH_CHECK(logits.is_cpu() && logits.dim() == 2 && logits.is_contiguous(), "logits: expected a contiguous matrix on the CPU");
    const Type type = type_of("logits", logits);
    const int64_t rows = logits.size(0), words = logits.size(1), bytes = words * size_of(type);
    STD_TORCH_CHECK(labels.is_cpu() && labels.is_contiguous() && labels.scalar_type() == ScalarType::Long && labels.dim() == 1 && labels.size(0) == rows,
                    "labels: expected int64 [", rows, "] on the CPU");
    const auto* label = static_cast<const int64_t*>(labels.const_data_ptr());
    for (int64_t row = 0; row < rows; ++row) {
        STD_TORCH_CHECK(label[row] == kIgnored || (label[row] >= 0 && label[row] < words), "labels: expected ", kIgnored, " or a word, index ", label[row],
                        " is out of bounds for ", words, " words");
    }
    const std::vector<double> factors = weights ? numbers("weights", *weights, rows) : std::vector<double>{};
    const Tensor losses = empty({rows}, type == Type::f64 ? ScalarType::Double : ScalarType::Float);
    auto* data = static_cast<char*>(const_cast<void*>(logits.const_data_ptr()));
    void* out = const_cast<void*>(losses.const_data_ptr());
    const Form form{scale, softcap, smoothing, z_loss};
    const RowKernel kernel = row_kernel();
    const int64_t parts = part_count(rows, rows * bytes), blocks = (words + kBlock - 1) / kBlock;
    const bool in_place = size_of(type) == size_of(sums_of(type)) && softcap == 0;
    std::vector<double> tops(static_cast<size_t>(slopes ? parts * blocks : 0));
    std::vector<float> room(static_cast<size_t>(slopes && !in_place ? parts * words * size_of(sums_of(type)) / 4 : 0));
    for_tasks(parts, rows, [&](int64_t part, int64_t row) {
        double loss = 0;
        if (label[row] != kIgnored) {
            char* own = data + row * bytes;
            void* kept = !slopes ? nullptr : in_place ? own : static_cast<void*>(room.data() + part * words * size_of(sums_of(type)) / 4);
            loss = kernel(type, own, words, label[row], factors.empty() ? nullptr : &factors[row], form, kept, slopes ? &tops[part * blocks] : nullptr);
        } else if (slopes) {
            std::memset(data + row * bytes, 0, static_cast<size_t>(bytes));
        }
        if (type == Type::f64) {
            static_cast<double*>(out)[row] = loss;
        } else {
            static_cast<float*>(out)[row] = static_cast<float>(loss);
        }
    });
    return losses;
}

}  // namespace
}  // namespace hetlora

STABLE_TORCH_LIBRARY_IMPL(hetlora, CPU, library) { library.impl("cross_entropy_", TORCH_BOX(&hetlora::cross_entropy)); }
