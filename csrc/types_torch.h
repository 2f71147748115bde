// What the bindings of both libraries take from torch: names, element types, sizes, lists.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <vector>

#include "types.h"

namespace hetlora {

using MaybeTensor = std::optional<torch::stable::Tensor>;
using Tensors = std::vector<torch::stable::Tensor>;
using Integers = std::vector<int64_t>;

inline Type type_of(const char* name, const torch::stable::Tensor& tensor) {
    using torch::headeronly::ScalarType;
    switch (tensor.scalar_type()) {
        case ScalarType::Float: return Type::f32;
        case ScalarType::BFloat16: return Type::bf16;
        case ScalarType::Half: return Type::f16;
        case ScalarType::Double: return Type::f64;
        default: STD_TORCH_CHECK(false, name, ": expected float32, bfloat16, float16 or float64");
    }
    return Type::f32;
}

// Sizes of a tensor with another last one.
inline Integers sizes_of(const torch::stable::Tensor& tensor, int64_t last) {
    Integers out(static_cast<size_t>(tensor.dim()), last);
    for (size_t i = 0; i + 1 < out.size(); ++i) out[i] = tensor.size(static_cast<int64_t>(i));
    return out;
}

// The K integers of each module, module by module, from a list that `joined` of hetlora_kernels/layout.py made: these, or where modules share lists -K, which
// of the distinct lists is each module's, and the lists.
inline Integers expanded(const char* name, const Integers& list, size_t modules) {
    if (list.empty() || list[0] >= 0) return list;
    const uint64_t clients = uint64_t{0} - static_cast<uint64_t>(list[0]), head = 1 + modules;
    STD_TORCH_CHECK(list.size() >= head && clients <= list.size() && (list.size() - head) % clients == 0, name, ": expected ", clients,
                    " integers for each distinct list");
    Integers out;
    out.reserve(modules * clients);
    for (size_t m = 0; m < modules; ++m) {
        const uint64_t place = static_cast<uint64_t>(list[1 + m]);
        STD_TORCH_CHECK(place < (list.size() - head) / clients, name, ": expected a place below the number of distinct lists, got ", list[1 + m]);
        const auto first = list.begin() + static_cast<std::ptrdiff_t>(head + place * clients);
        out.insert(out.end(), first, first + static_cast<std::ptrdiff_t>(clients));
    }
    return out;
}

}  // namespace hetlora
