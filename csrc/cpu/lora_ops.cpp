// The LoRA layer's ops: shrink, expand_ and grouped_gram by themselves, and all that a layer adds to its base product in one call each way: on small inputs
// most of a call's time is spent between Python, the dispatcher and back.
#include <memory>

#include "lora.h"

namespace hetlora {
namespace {

using MaybeTensor = std::optional<Tensor>;
using Integers = std::vector<int64_t>;

Shrunk shrunk(const Tensor& s) {
    STD_TORCH_CHECK(s.is_cpu() && s.is_contiguous(), "s: expected a contiguous CPU tensor");
    return {type_of("s", s), s.const_data_ptr(), s.numel()};
}

Tensor empty_s(const Matrix& x, const Plan& plan) { return empty({plan.flat}, x.type == Type::f64 ? ScalarType::Double : ScalarType::Float); }

std::vector<double> scales(const Tensor& scale, const Integers& ranks) { return numbers("scale", scale, static_cast<int64_t>(ranks.size())); }

Tensor shrink_op(const Tensor& x_tensor, const Tensor& rows_tensor, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys,
                 const MaybeTensor& index, const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    const Matrix x("x", x_tensor), rows("rows", rows_tensor);
    const Plan plan({seeds, row_keys, index, ranks, starts, lengths, dropout}, x.rows, rows.rows);
    const Tensor s = empty_s(x, plan);
    shrink(plan, x, rows, scales(scale, ranks), const_cast<void*>(s.const_data_ptr()));
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
    return grouped_gram(Plan({seeds, row_keys, index, ranks, starts, lengths, dropout}, x.rows, -1), ranks, shrunk(s), x, dtype);
}

Tensor lora_add(Tensor out_tensor, const Tensor& x_tensor, const Tensor& a_tensor, const Tensor& bt_tensor, const MaybeTensor& seeds,
                const MaybeTensor& row_keys, const MaybeTensor& index, const Tensor& plan_tensor, int64_t elements, double dropout) {
    const Matrix x("x", x_tensor), a("a", a_tensor);
    Matrix out("out", out_tensor);
    STD_TORCH_CHECK(bt_tensor.dim() == 2 && a.rows == bt_tensor.size(0) && out.rows == x.rows, "bt, out: expected the rows of a and of x");
    const Lists lists(plan_tensor);
    const Segments segments{seeds, row_keys, index, lists.ranks, lists.starts, lists.lengths, dropout};
    const Plan plan(segments, x.rows, a.rows), without = plan.drops() ? Plan(segments.without_dropout(), x.rows, a.rows) : plan;
    STD_TORCH_CHECK(elements == plan.flat, "elements: expected ", plan.flat, ", got ", elements);
    const Tensor s = empty_s(x, plan);
    shrink(plan, x, a, lists.scale, const_cast<void*>(s.const_data_ptr()));
    expand(without, out, shrunk(s), Matrix("bt", bt_tensor));
    out.write_back();
    return s;
}

std::tuple<Tensor, Tensor> lora_grads(const MaybeTensor& d_x_tensor, const Tensor& d_y_tensor, const Tensor& x_tensor, const Tensor& a_tensor,
                                      const Tensor& bt_tensor, const Tensor& s, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
                                      const Tensor& plan_tensor, double dropout, bool need_a, bool need_bt, bool as_b) {
    const Matrix d_y("d_y", d_y_tensor), x("x", x_tensor), a("a", a_tensor);
    STD_TORCH_CHECK(bt_tensor.dim() == 2 && d_y.rows == x.rows && a.rows == bt_tensor.size(0), "d_y, bt: expected the rows of x and of a");
    STD_TORCH_CHECK(d_y.type == x.type, "d_y: expected the type of x");
    const Lists lists(plan_tensor);
    const Segments segments{seeds, row_keys, index, lists.ranks, lists.starts, lists.lengths, dropout};
    const Plan plan(segments, x.rows, a.rows), without = plan.drops() ? Plan(segments.without_dropout(), x.rows, a.rows) : plan;
    // Uninitialised: a vector would be filled with zeros first.
    const std::unique_ptr<char[]> room(d_x_tensor || need_a ? new char[static_cast<size_t>(plan.flat * size_of(shrunk_type(x.type)))] : nullptr);
    const Shrunk d_s{shrunk_type(x.type), room.get(), plan.flat};
    if (room) {
        shrink(without, d_y, Matrix("bt", bt_tensor), lists.scale, room.get());
    }
    if (d_x_tensor) {
        Matrix d_x("d_x", *d_x_tensor);
        STD_TORCH_CHECK(d_x.rows == x.rows, "d_x: expected the rows of x, got ", d_x.rows);
        expand(plan, d_x, d_s, a);
        d_x.write_back();
    }
    const ScalarType a_type = a_tensor.scalar_type(), bt_type = bt_tensor.scalar_type();
    const Tensor d_a = need_a ? grouped_gram(plan, lists.ranks, d_s, x, a_type) : empty({0}, a_type);
    if (!need_bt) {
        return {d_a, empty({0}, bt_type)};
    }
    const Tensor d_bt = grouped_gram(without, lists.ranks, shrunk(s), d_y, bt_type);
    if (!as_b) {
        return {d_a, d_bt};
    }
    const Tensor d_b = empty({d_bt.size(1), d_bt.size(0)}, bt_type);
    transpose_block(size_of(type_of("bt", d_bt)), d_bt.const_data_ptr(), d_bt.size(0), d_bt.size(1), const_cast<void*>(d_b.const_data_ptr()));
    return {d_a, d_b};
}

}  // namespace
}  // namespace hetlora

STABLE_TORCH_LIBRARY_IMPL(hetlora, CPU, library) {
    library.impl("shrink", TORCH_BOX(&hetlora::shrink_op));
    library.impl("expand_", TORCH_BOX(&hetlora::expand_op));
    library.impl("grouped_gram", TORCH_BOX(&hetlora::grouped_gram_op));
    library.impl("lora_add_", TORCH_BOX(&hetlora::lora_add));
    library.impl("lora_grads_", TORCH_BOX(&hetlora::lora_grads));
}
