// The LoRA layer's ops: shrink, expand_ and grouped_gram by themselves, and the whole layer, base product included, in one call each way: on small inputs
// most of a call's time is spent between Python, the dispatcher and back.
#include "lora.h"

namespace hetlora {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;

template <size_t N>
Tensor call(const char* name, std::array<StableIValue, N> stack) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor shrink_op(const Tensor& x, const Tensor& rows, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
                 const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    return shrink(x, rows, scale, {seeds, row_keys, index, ranks, starts, lengths, dropout});
}

void expand_op(Tensor out, const Tensor& s, const Tensor& rows, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
               const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    expand(out, s, rows, {seeds, row_keys, index, ranks, starts, lengths, dropout});
}

Tensor grouped_gram_op(const Tensor& s, const Tensor& x, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index, const Integers& ranks,
                       const Integers& starts, const Integers& lengths, double dropout, ScalarType dtype) {
    return grouped_gram(s, x, {seeds, row_keys, index, ranks, starts, lengths, dropout}, dtype);
}

std::tuple<Tensor, Tensor> lora_forward(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& base, const Tensor& a,
                                        const Tensor& bt, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
                                        const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    STD_TORCH_CHECK(weight.has_value() != base.has_value(), "weight, base: expected exactly one");
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    Tensor s = shrink(x, a, scale, segments);
    using torch::stable::detail::from;
    Tensor out = weight.has_value()      ? call("aten::linear", std::array{from(x), from(*weight), from(bias)})
                 : base->is_contiguous() ? torch::stable::clone(*base)
                                         : torch::stable::contiguous(*base);
    expand(out, s, bt, segments.without_dropout());
    return {out, s};
}

std::vector<Tensor> lora_backward(const Tensor& d_y, const Tensor& x, const MaybeTensor& weight, const Tensor& a, const Tensor& bt, const Tensor& s,
                                  const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index, const Integers& ranks,
                                  const Integers& starts, const Integers& lengths, double dropout, bool need_x, bool need_a, bool need_bt) {
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout}, plain = segments.without_dropout();
    std::vector<Tensor> out;
    MaybeTensor d_s;
    if (need_x || need_a) {
        d_s = shrink(d_y, bt, scale, plain);
    }
    if (need_x) {
        using torch::stable::detail::from;
        Tensor d_x = weight.has_value() ? call("aten::mm", std::array{from(d_y), from(*weight)}) : torch::stable::new_zeros(x, {x.size(0), x.size(1)});
        expand(d_x, *d_s, a, segments);
        out.push_back(d_x);
    }
    if (need_a) {
        out.push_back(grouped_gram(*d_s, x, segments, a.scalar_type()));
    }
    if (need_bt) {
        out.push_back(grouped_gram(s, d_y, plain, bt.scalar_type()));
    }
    return out;
}

}  // namespace
}  // namespace hetlora

STABLE_TORCH_LIBRARY_IMPL(hetlora, CPU, library) {
    library.impl("shrink", TORCH_BOX(&hetlora::shrink_op));
    library.impl("expand_", TORCH_BOX(&hetlora::expand_op));
    library.impl("grouped_gram", TORCH_BOX(&hetlora::grouped_gram_op));
    library.impl("lora_forward", TORCH_BOX(&hetlora::lora_forward));
    library.impl("lora_backward", TORCH_BOX(&hetlora::lora_backward));
}
