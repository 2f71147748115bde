// The LoRA layer's ops: shrink, expand_ and grouped_gram by themselves, and the whole layer, base product included, in one call each way: on small inputs
// most of a call's time is spent between Python, the dispatcher and back.
#include <memory>

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

Shrunk shrunk(const Tensor& s) {
    STD_TORCH_CHECK(s.is_cpu() && s.is_contiguous(), "s: expected a contiguous CPU tensor");
    return {type_of("s", s), s.const_data_ptr(), s.numel()};
}

std::vector<double> scales(const Tensor& scale, const Integers& ranks) { return numbers("scale", scale, static_cast<int64_t>(ranks.size())); }

Tensor shrink_op(const Tensor& x_tensor, const Tensor& rows_tensor, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys,
                 const MaybeTensor& index, const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    const Matrix x("x", x_tensor), rows("rows", rows_tensor);
    const Plan plan({seeds, row_keys, index, ranks, starts, lengths, dropout}, x.rows, rows.rows);
    Tensor s = torch::stable::new_empty(x_tensor, {plan.flat});
    shrink(plan, x, rows, scales(scale, ranks), s.mutable_data_ptr());
    return s;
}

void expand_op(Tensor out_tensor, const Tensor& s, const Tensor& rows_tensor, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
               const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    Matrix out("out", out_tensor);
    const Matrix rows("rows", rows_tensor);
    expand(Plan({seeds, row_keys, index, ranks, starts, lengths, dropout}, out.rows, rows.rows), out, shrunk(s), rows);
    out.write_back();
}

Tensor grouped_gram_op(const Tensor& s, const Tensor& x_tensor, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
                       const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout, ScalarType dtype) {
    const Matrix x("x", x_tensor);
    return grouped_gram(Plan({seeds, row_keys, index, ranks, starts, lengths, dropout}, x.rows, -1), ranks, shrunk(s), x_tensor, x, dtype);
}

std::tuple<Tensor, Tensor> lora_forward(const Tensor& x_tensor, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& base,
                                        const Tensor& a_tensor, const Tensor& bt_tensor, const Tensor& scale, const MaybeTensor& seeds,
                                        const MaybeTensor& row_keys, const MaybeTensor& index, const Integers& ranks, const Integers& starts,
                                        const Integers& lengths, double dropout) {
    STD_TORCH_CHECK(weight.has_value() != base.has_value(), "weight, base: expected exactly one");
    using torch::stable::detail::from;
    Tensor out_tensor = weight.has_value()      ? call("aten::linear", std::array{from(x_tensor), from(*weight), from(bias)})
                        : base->is_contiguous() ? torch::stable::clone(*base)
                                                : torch::stable::contiguous(*base);
    const Matrix x("x", x_tensor), a("a", a_tensor), bt("bt", bt_tensor);
    Matrix out("out", out_tensor);
    STD_TORCH_CHECK(a.rows == bt.rows && out.rows == x.rows, "bt, out: expected the rows of a and of x, got ", bt.rows, " and ", out.rows);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    const Plan plan(segments, x.rows, a.rows);
    Tensor s = torch::stable::new_empty(x_tensor, {plan.flat});
    shrink(plan, x, a, scales(scale, ranks), s.mutable_data_ptr());
    expand(plan.drops() ? Plan(segments.without_dropout(), x.rows, a.rows) : plan, out, shrunk(s), bt);
    out.write_back();
    return {out_tensor, s};
}

std::vector<Tensor> lora_backward(const Tensor& d_y_tensor, const Tensor& x_tensor, const MaybeTensor& weight, const Tensor& a_tensor, const Tensor& bt_tensor,
                                  const Tensor& s, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
                                  const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout, bool need_x, bool need_a,
                                  bool need_bt) {
    const Matrix d_y("d_y", d_y_tensor), x("x", x_tensor), a("a", a_tensor), bt("bt", bt_tensor);
    STD_TORCH_CHECK(d_y.rows == x.rows && a.rows == bt.rows, "d_y, bt: expected the rows of x and of a, got ", d_y.rows, " and ", bt.rows);
    STD_TORCH_CHECK(d_y.type == x.type, "d_y: expected the type of x");
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    const Plan plan(segments, x.rows, a.rows);
    const Plan without = plan.drops() ? Plan(segments.without_dropout(), x.rows, a.rows) : plan;
    std::vector<Tensor> out;
    // Uninitialised: a vector would be filled with zeros first.
    const std::unique_ptr<char[]> room(need_x || need_a ? new char[static_cast<size_t>(plan.flat * size_of(x.type))] : nullptr);
    const Shrunk d_s{x.type, room.get(), plan.flat};
    if (room) {
        shrink(without, d_y, bt, scales(scale, ranks), room.get());
    }
    if (need_x) {
        using torch::stable::detail::from;
        Tensor d_x = weight.has_value() ? call("aten::mm", std::array{from(d_y_tensor), from(*weight)}) : torch::stable::new_zeros(x_tensor, {x.rows, x.width});
        Matrix target("d_x", d_x);
        expand(plan, target, d_s, a);
        target.write_back();
        out.push_back(d_x);
    }
    if (need_a) {
        out.push_back(grouped_gram(plan, ranks, d_s, x_tensor, x, a_tensor.scalar_type()));
    }
    if (need_bt) {
        out.push_back(grouped_gram(without, ranks, shrunk(s), d_y_tensor, d_y, bt_tensor.scalar_type()));
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
