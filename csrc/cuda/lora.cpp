// The LoRA layer on CUDA tensors: shrink, expand_ and grouped_gram by themselves, and the whole layer, base product included, in one op each way.
// Meaning is checked in hetlora_kernels/ops; here what memory safety needs and the host can know: an index on the device is not read.
#include <initializer_list>

#include <products.h>

#include "lora_layer.h"

namespace {

using hetlora::segments_of;
using hetlora::sizes_of;

// out = left right + beta out, in the product's own epilogue. Not through the dispatcher: its stable form has no Scalar for beta, and autocast, which may be on
// around a backward pass, would change the types.
void product(const Tensor& out, const Tensor& left, const Tensor& right, bool add) {
    const AOTITorchError error =
        add ? HETLORA_ADDMM_OUT(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0) : HETLORA_MM_OUT(out.get(), left.get(), right.get());
    STD_TORCH_CHECK(error == 0, "hetlora: the base product failed");
}

// [T, n] of x [..., n].
Tensor matrix(const Tensor& t) {
    STD_TORCH_CHECK(t.dim() >= 1, "x: expected a last dimension");
    const int64_t width = t.size(t.dim() - 1);
    int64_t rows = 1;
    for (int64_t i = 0; i + 1 < t.dim(); ++i) rows *= t.size(i);
    return t.dim() == 2 ? t : torch::stable::reshape(t, {rows, width});
}

Tensor transpose(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

Tensor shrink(const Tensor& x_in, const Tensor& rows, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
              const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    const Rows x("x", x_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    return Layer(x.dense, segments, x.rows(), "shrink", false).shrink(x, rows, scale, true, 0).s;
}

void expand_(Tensor out_in, const Tensor& s, const Tensor& rows, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
             const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    const Rows out("out", out_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    Layer(out.dense, segments, out.rows(), "expand_", false).expand(out, {s}, rows, true, out.dense);
    if (!out_in.is_contiguous()) torch::stable::copy_(out_in, out.dense);
}

Tensor grouped_gram(const Tensor& s, const Tensor& x_in, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index, const Integers& ranks,
                    const Integers& starts, const Integers& lengths, double dropout, ScalarType dtype) {
    const Rows x("x", x_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    const Layer layer(x.dense, segments, x.rows(), "grouped_gram", false);
    Gram out = layer.grouped_gram(s, x, true, dtype);
    layer.sum_grams({&out});
    return out.out;
}

// One of the layer's ops, checked: all on one device, and shapes that fit together. `rows`: the first integer of `segments`, which the lists were made for.
void check_layer(const Tensor& x, const MaybeTensor& weight, const Tensor& a, const Tensor& bt, int64_t width, int64_t rows,
                 std::initializer_list<const MaybeTensor*> others) {
    const auto beside_x = [&](const char* name, const Tensor& t) {
        STD_TORCH_CHECK(t.is_cpu() == x.is_cpu() && t.get_device_index() == x.get_device_index(), name, ": expected the device of x");
    };
    beside_x("a", a);
    beside_x("bt", bt);
    if (weight) {
        beside_x("weight", *weight);
        STD_TORCH_CHECK(weight->dim() == 2 && weight->size(0) == width && weight->size(1) == x.size(1) && weight->scalar_type() == x.scalar_type(),
                        "weight: expected [", width, ", ", x.size(1), "] in the type of x");
    }
    for (const MaybeTensor* other : others) {
        if (*other) beside_x("bias, base, d_y, s, scale, seeds, row_keys, index", **other);
    }
    STD_TORCH_CHECK(rows == (x.size(1) ? x.size(0) : 0), "segments: expected the ", x.size(0), " rows of x, got ", rows);
}

// Where every row has a LoRA term, expand writes bias + S B first, and the base product accumulates on it. The product's epilogue reads what expand wrote while
// other tiles are multiplied. Otherwise expand adds to the base product. A given base is read once, or copied where some row has no client.
std::tuple<Tensor, Tensor> lora_forward(const Tensor& x_in, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& base, const Tensor& a,
                                        const Tensor& bt_in, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys,
                                        const MaybeTensor& index, const Integers& all, double dropout, bool transposed) {
    STD_TORCH_CHECK(weight.has_value() != base.has_value(), "weight, base: expected exactly one");
    STD_TORCH_CHECK(bt_in.dim() == 2, "bt: expected a matrix");
    const Rows x("x", matrix(x_in));
    const Tensor bt = transposed ? transpose(bt_in) : bt_in;
    const Segments segments = segments_of(seeds, row_keys, index, all, dropout);
    const int64_t width = bt.size(1);
    const MaybeTensor scales = scale;
    check_layer(x.dense, weight, a, bt, width, all[0], {&bias, &base, &scales, &seeds, &row_keys, &index});
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == width && bias->scalar_type() == x.dense.scalar_type()), "bias: expected [", width,
                    "] in the type of x");
    const Layer layer(x.dense, segments, x.rows(), "lora_forward");
    const Shrunk s = layer.shrink(x, a, scale, true, width);
    const Integers sizes = sizes_of(x_in, width);
    if (base) {
        STD_TORCH_CHECK(base->dim() == x_in.dim(), "base: expected the leading shape of x");
        for (size_t i = 0; i < sizes.size(); ++i) STD_TORCH_CHECK(base->size(static_cast<int64_t>(i)) == sizes[i], "base: expected the leading shape of x");
        const Tensor dense = torch::stable::contiguous(*base), out = layer.covers_all() ? torch::stable::empty_like(dense) : torch::stable::clone(dense);
        layer.expand(Rows("base", matrix(out)), s, bt, false, matrix(dense));
        return {out, s.s};
    }
    const Tensor out = torch::stable::new_empty(x.dense, sizes);
    const Rows rows("out", matrix(out));
    const MaybeTensor shift = bias ? MaybeTensor(torch::stable::contiguous(*bias)) : std::nullopt;
    if (layer.covers_all()) {
        layer.expand(rows, s, bt, false, shift);
        product(rows.dense, x.dense, transpose(*weight), true);
    } else {
        if (shift) torch::stable::copy_(const_cast<Tensor&>(rows.dense), *shift);
        product(rows.dense, x.dense, transpose(*weight), shift.has_value());
        layer.expand(rows, s, bt, false, rows.dense);
    }
    return {out, s.s};
}

// (d_x, d_a, d_bt), without elements where not needed; d_bt lies as bt does.
std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor& d_y_in, const Tensor& x_in, const MaybeTensor& weight, const Tensor& a, const Tensor& bt_in,
                                                 const Tensor& s, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys,
                                                 const MaybeTensor& index, const Integers& all, double dropout, bool transposed, bool need_x, bool need_a,
                                                 bool need_bt, ScalarType type_a, ScalarType type_bt) {
    STD_TORCH_CHECK(bt_in.dim() == 2, "bt: expected a matrix");
    const Rows x("x", matrix(x_in));
    const Rows d_y("d_y", matrix(d_y_in.scalar_type() == x_in.scalar_type() ? d_y_in : torch::stable::to(d_y_in, x_in.scalar_type())));
    const Tensor bt = transposed ? transpose(bt_in) : bt_in;
    const Segments segments = segments_of(seeds, row_keys, index, all, dropout);
    const MaybeTensor scales = scale, own_s = s, out_gradient = d_y.dense;
    check_layer(x.dense, weight, a, bt, bt.size(1), all[0], {&own_s, &scales, &seeds, &row_keys, &index, &out_gradient});
    STD_TORCH_CHECK(d_y.rows() == x.rows() && d_y.width() == bt.size(1), "d_y: expected [", x.rows(), ", ", bt.size(1), "]");
    const Layer layer(x.dense, segments, x.rows(), "lora_backward");
    std::optional<Shrunk> d_s;
    if (need_x || need_a) d_s = layer.shrink(d_y, bt, scale, false, need_x ? x.width() : 0);
    Tensor d_x = torch::stable::new_empty(x.dense, need_x ? sizes_of(x_in, x.width()) : Integers{0});
    if (need_x) {
        const Rows rows("d_x", matrix(d_x));
        const bool first = layer.covers_all();
        if (!first && weight) product(rows.dense, d_y.dense, *weight, false);
        if (!first && !weight) torch::stable::zero_(d_x);
        layer.expand(rows, *d_s, a, true, first ? std::nullopt : MaybeTensor(rows.dense));
        if (first && weight) product(rows.dense, d_y.dense, *weight, true);
    }
    Gram d_a{torch::stable::new_empty(a, {0}, type_a), type_a, x.type, std::nullopt},
        d_bt{torch::stable::new_empty(bt, {0}, type_bt), type_bt, x.type, std::nullopt};
    if (need_a) d_a = layer.grouped_gram(d_s->s, x, true, type_a);
    if (need_bt) d_bt = layer.grouped_gram(s, d_y, false, type_bt);
    layer.sum_grams({&d_a, &d_bt});
    if (!need_bt) return {d_x, d_a.out, d_bt.out};
    if (transposed) return {d_x, d_a.out, torch::stable::contiguous(transpose(d_bt.out))};
    const bool lies_transposed = !bt.is_contiguous() && bt.stride(0) == 1 && bt.stride(1) == bt.size(0);
    return {d_x, d_a.out, lies_transposed ? transpose(torch::stable::contiguous(transpose(d_bt.out))) : d_bt.out};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) {
    m.impl("shrink", TORCH_BOX(&shrink));
    m.impl("expand_", TORCH_BOX(&expand_));
    m.impl("grouped_gram", TORCH_BOX(&grouped_gram));
    m.impl("lora_forward", TORCH_BOX(&lora_forward));
    m.impl("lora_backward", TORCH_BOX(&lora_backward));
}
