// quantize_rows_, dequantize_rows_: rank rows as integers of 8 or 4 bits with one float32 scale a row, for all modules in one call.
//
// A task is one row of one module: its largest magnitude first, then its codes, from L1 or L2. Bytes: the rows once, codes and scales once. The maximum is
// taken of the bits of |x|, which order as the numbers do and put NaN on top, so that it is exact and the same in any order. Quotients are divided, not
// multiplied by an inverse: a product could be fused with the addition that rounds it, on some machines and not on others.
#include <limits>

#include "tensors.h"

namespace hetlora {
namespace {

// Adding 1.5 * 2^(mantissa bits) rounds to the nearest integer, ties to even, and leaves it in the lowest bits.
template <class Sum>
struct Rounding;
template <>
struct Rounding<float> {
    using Bits = uint32_t;
    static constexpr float kMagic = 12582912.0f;
};
template <>
struct Rounding<double> {
    using Bits = uint64_t;
    static constexpr double kMagic = 6755399441055744.0;
};

template <class Sum, class T>
HETLORA_INLINE Sum largest(const T* __restrict from, int64_t n) {
    using Bits = typename Rounding<Sum>::Bits;
    constexpr Bits kMagnitude = ~Bits{0} >> 1;
    Bits most = 0;
    for (int64_t i = 0; i < n; ++i) {
        const Bits bits = bit_cast<Bits>(widen<Sum>(from[i])) & kMagnitude;
        most = bits > most ? bits : most;
    }
    return bit_cast<Sum>(most);
}

template <class Sum, class T>
HETLORA_INLINE int rounded(T x, Sum scale) {
    using Bits = typename Rounding<Sum>::Bits;
    const Sum shifted = widen<Sum>(x) / scale + Rounding<Sum>::kMagic;
    return static_cast<int>(static_cast<uint32_t>(bit_cast<Bits>(shifted)) - static_cast<uint32_t>(bit_cast<Bits>(Rounding<Sum>::kMagic)));
}

template <class T>
HETLORA_INLINE void quantize(const T* __restrict from, int64_t n, int64_t bits, uint8_t* __restrict codes, float* scale) {
    using Sum = std::conditional_t<sizeof(T) == 8, double, float>;
    float own = static_cast<float>(largest<Sum>(from, n) / static_cast<Sum>(bits == 8 ? 127 : 7));
    own = own < std::numeric_limits<float>::min() ? 0.0f : own;
    *scale = own;
    if (own == 0 || (bit_cast<uint32_t>(own) & 0x7F800000u) == 0x7F800000u) {
        std::memset(codes, 0, static_cast<size_t>(bits == 8 ? n : (n + 1) / 2));
        return;
    }
    const Sum divisor = own;
    if (bits == 8) {
        for (int64_t i = 0; i < n; ++i) {
            codes[i] = static_cast<uint8_t>(rounded(from[i], divisor));
        }
        return;
    }
    for (int64_t j = 0; j < n / 2; ++j) {
        codes[j] = static_cast<uint8_t>((rounded(from[2 * j], divisor) & 15) | (rounded(from[2 * j + 1], divisor) & 15) << 4);
    }
    if (n % 2) {
        codes[n / 2] = static_cast<uint8_t>(rounded(from[n - 1], divisor) & 15);
    }
}

template <class T>
HETLORA_INLINE void dequantize(const int8_t* __restrict codes, float scale, int64_t n, int64_t bits, T* __restrict to) {
    using Sum = std::conditional_t<sizeof(T) == 8, double, float>;
    const Sum factor = scale;
    if (bits == 8) {
        for (int64_t i = 0; i < n; ++i) {
            narrow(static_cast<Sum>(codes[i]) * factor, to + i);
        }
        return;
    }
    for (int64_t j = 0; j < n / 2; ++j) {
        narrow(static_cast<Sum>(static_cast<int8_t>(static_cast<uint8_t>(codes[j]) << 4) >> 4) * factor, to + 2 * j);
        narrow(static_cast<Sum>(codes[j] >> 4) * factor, to + 2 * j + 1);
    }
    if (n % 2) {
        narrow(static_cast<Sum>(static_cast<int8_t>(static_cast<uint8_t>(codes[n / 2]) << 4) >> 4) * factor, to + n - 1);
    }
}

}  // namespace

HETLORA_CLONES void quantize_row(Type type, const void* from, int64_t n, int64_t bits, uint8_t* codes, float* scale) {
    HETLORA_FOR_TYPE(type, T, quantize(static_cast<const T*>(from), n, bits, codes, scale));
}
HETLORA_CLONES void dequantize_row(Type type, const int8_t* codes, float scale, int64_t n, int64_t bits, void* to) {
    HETLORA_FOR_TYPE(type, T, dequantize(codes, scale, n, bits, static_cast<T*>(to)));
}

namespace {

// Rows one after another, so that two threads do not write into neighbouring lines: a row a task was slower with two threads than with one.
constexpr int64_t kTask = 16384;  // elements
struct Stretch {
    int64_t module, begin, end;
};

// Checks of codes and scales beside the rows of float values; the tasks of one call, and its bytes.
std::vector<Stretch> row_tasks(const std::vector<Matrix>& rows, const Tensors& codes, const Tensors& scales, int64_t bits, int64_t* bytes) {
    STD_TORCH_CHECK(bits == 8 || bits == 4, "bits: expected 8 or 4, got ", bits);
    STD_TORCH_CHECK(codes.size() == rows.size() && scales.size() == rows.size(), "codes, scales: expected ", rows.size(), " tensors each");
    std::vector<Stretch> tasks;
    for (size_t m = 0; m < rows.size(); ++m) {
        const int64_t count = rows[m].rows, width = rows[m].width, stored = bits == 8 ? width : (width + 1) / 2;
        STD_TORCH_CHECK(codes[m].is_cpu() && codes[m].is_contiguous() && codes[m].scalar_type() == (bits == 8 ? ScalarType::Char : ScalarType::Byte) &&
                            codes[m].dim() == 2 && codes[m].size(0) == count && codes[m].size(1) == stored,
                        "codes: expected contiguous ", bits == 8 ? "int8" : "uint8", " [", count, ", ", stored, "] on the CPU");
        STD_TORCH_CHECK(scales[m].is_cpu() && scales[m].is_contiguous() && scales[m].scalar_type() == ScalarType::Float && scales[m].numel() == count,
                        "scales: expected contiguous float32 [", count, "] on the CPU");
        const int64_t step = std::max<int64_t>(1, kTask / std::max<int64_t>(1, width));
        for (int64_t row = 0; row < count; row += step) {
            tasks.push_back({static_cast<int64_t>(m), row, std::min(row + step, count)});
        }
        *bytes += count * (width * size_of(rows[m].type) + stored);
    }
    return tasks;
}

void quantize_rows(const Tensors& codes, const Tensors& scales, const Tensors& row_list, int64_t bits) {
    const std::vector<Matrix> rows = matrices("rows", row_list, row_list.size());
    int64_t bytes = 0;
    const std::vector<Stretch> tasks = row_tasks(rows, codes, scales, bits, &bytes);
    const int64_t count = static_cast<int64_t>(tasks.size());
    for_tasks(part_count(count, bytes), count, [&](int64_t, int64_t task) {
        const auto [m, begin, end] = tasks[task];
        const Matrix& source = rows[m];
        auto* code = static_cast<uint8_t*>(const_cast<void*>(codes[m].const_data_ptr()));
        auto* scale = static_cast<float*>(const_cast<void*>(scales[m].const_data_ptr()));
        const int64_t stored = bits == 8 ? source.width : (source.width + 1) / 2;
        for (int64_t row = begin; row < end; ++row) {
            quantize_row(source.type, source.at(row * source.width), source.width, bits, code + row * stored, scale + row);
        }
    });
}

void dequantize_rows(const Tensors& out_list, const Tensors& codes, const Tensors& scales, int64_t bits) {
    std::vector<Matrix> outs = matrices("out", out_list, out_list.size());
    int64_t bytes = 0;
    const std::vector<Stretch> tasks = row_tasks(outs, codes, scales, bits, &bytes);
    const int64_t count = static_cast<int64_t>(tasks.size());
    for_tasks(part_count(count, bytes), count, [&](int64_t, int64_t task) {
        const auto [m, begin, end] = tasks[task];
        const Matrix& out = outs[m];
        const auto* code = static_cast<const int8_t*>(codes[m].const_data_ptr());
        const auto* scale = static_cast<const float*>(scales[m].const_data_ptr());
        const int64_t stored = bits == 8 ? out.width : (out.width + 1) / 2;
        for (int64_t row = begin; row < end; ++row) {
            dequantize_row(out.type, code + row * stored, scale[row], out.width, bits, out.at(row * out.width));
        }
    });
    for (Matrix& out : outs) {
        out.write_back();
    }
}

}  // namespace
}  // namespace hetlora

STABLE_TORCH_LIBRARY_IMPL(hetlora, CPU, library) {
    library.impl("quantize_rows_", TORCH_BOX(&hetlora::quantize_rows));
    library.impl("dequantize_rows_", TORCH_BOX(&hetlora::dequantize_rows));
}
