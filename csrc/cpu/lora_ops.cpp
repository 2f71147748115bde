// The LoRA layer's ops: the whole layer in one op each way, and shrink, expand_ and grouped_gram by themselves for tests. On few rows most of a call's time is
// spent between Python, the dispatcher and back.
#include <atomic>
#include <memory>

#include "base_product.h"
#include "lora_rounded.h"
#include "lora_tiles.h"

namespace hetlora {
namespace {

Shrunk shrunk(const Tensor& s) {
    STD_TORCH_CHECK(s.is_cpu() && s.is_contiguous(), "s: expected a contiguous CPU tensor");
    return {type_of("s", s), s.const_data_ptr(), s.numel()};
}

Tensor empty_s(const Matrix& x, const RowWalk& walk) { return empty({walk.flat}, x.type == Type::f64 ? ScalarType::Double : ScalarType::Float); }

std::vector<double> scales(const Tensor& scale, const Integers& ranks) { return numbers("scale", scale, static_cast<int64_t>(ranks.size())); }

Tensor shrink_op(const Tensor& x_tensor, const Tensor& rows_tensor, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys,
                 const MaybeTensor& index, const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    const Matrix x("x", x_tensor), rows("rows", rows_tensor);
    const RowWalk walk({seeds, row_keys, index, ranks, starts, lengths, dropout}, x.rows, rows.rows);
    const Tensor s = empty_s(x, walk);
    shrink(walk, x, rows, scales(scale, ranks), const_cast<void*>(s.const_data_ptr()));
    return s;
}

void expand_op(Tensor out_tensor, const Tensor& s, const Tensor& rows_tensor, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
               const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout) {
    Matrix out("out", out_tensor);
    const Matrix rows("rows", rows_tensor);
    expand(RowWalk({seeds, row_keys, index, ranks, starts, lengths, dropout}, out.rows, rows.rows), out, shrunk(s), rows);
    out.write_back();
}

Tensor grouped_gram_op(const Tensor& s, const Tensor& x_tensor, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
                       const Integers& ranks, const Integers& starts, const Integers& lengths, double dropout, ScalarType dtype) {
    const Matrix x("x", x_tensor);
    return grouped_gram(RowWalk({seeds, row_keys, index, ranks, starts, lengths, dropout}, x.rows, -1), shrunk(s), x, dtype);
}

// A call goes the small way when three things hold (docs/kernels-lora.md):
// - x has 1 to kFewRows rows.
// - The base product is fast there: the weight has more than 16 bits an element, or the framework does not multiply its 16-bit type fast, or it has at most
//   kSmall16BitWeight elements. With a given base there is none to make.
// - No client is on the tiles or has its S rounded. A call with such a client goes the large way, whatever its size, so that client's bits never depend on it.
// Tests force one way through the op `_lora_way`.
constexpr int64_t kFewRows = 8, kSmall16BitWeight = int64_t{1} << 18;

enum Way : int64_t { by_size, small, large, large_widened };
std::atomic<int64_t> forced_way{by_size};

int64_t lora_way(int64_t way) {
    STD_TORCH_CHECK(by_size <= way && way <= large_widened, "way: expected 0 (by size), 1 (small), 2 (large) or 3 (large, with 16-bit types widened), got ",
                    way);
    return forced_way.exchange(way);
}

bool widens(Type type) { return size_of(type) == 2 && (!multiplies_fast(type) || forced_way.load(std::memory_order_relaxed) == large_widened); }

bool goes_small(const Layer& layer) {
    if (layer.rounded || any_on_tiles(layer.walk, layer.x.type)) {
        return false;
    }
    const int64_t way = forced_way.load(std::memory_order_relaxed);
    if (way != by_size) {
        return way == small;
    }
    const bool any_weight = !layer.weight || size_of(layer.x.type) > 2 || widens(layer.x.type);
    return layer.x.rows > 0 && layer.x.rows <= kFewRows && (any_weight || layer.x.width * layer.m <= kSmall16BitWeight);
}

Tensor packed(const Tensor& tensor) { return tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor); }

// S^T x, the gradient of a factor [S, width]. lies_transposed: in the memory of its transpose; transposed: in its shape too.
Tensor gradient(const Layer& layer, const RowWalk& walk, const Shrunk& s, const Matrix& x, ScalarType dtype, bool lies_transposed, bool transposed) {
    const Tensor rank_rows = layer.others ? grouped_gram(walk, s, x, dtype, layer.rounded) : empty({lies_transposed ? 0 : layer.total, x.width}, dtype);
    const Tensor out = !lies_transposed ? rank_rows : transposed ? empty({x.width, layer.total}, dtype) : empty({layer.total, x.width}, dtype, true);
    if (lies_transposed && layer.others) {
        transpose_block(size_of(type_of("dtype", out)), rank_rows.const_data_ptr(), layer.total, x.width, const_cast<void*>(out.const_data_ptr()));
    }
    if (layer.rounded) {
        gram_rounded(walk, x, static_cast<const float*>(s.data), lies_transposed, out);
    }
    return out;
}

bool fits(const Tensor& tensor, const Integers& sizes) {
    bool same = tensor.is_cpu() && tensor.dim() == static_cast<int64_t>(sizes.size());
    for (size_t i = 0; same && i < sizes.size(); ++i) {
        same = tensor.size(static_cast<int64_t>(i)) == sizes[i];
    }
    return same;
}

std::tuple<Tensor, Tensor> lora_forward(const Tensor& x_given, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& base, const Tensor& a,
                                        const Tensor& bt, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
                                        const Integers& segments, double dropout, bool transposed) {
    const Tensor x = packed(x_given);
    const Layer layer(x, weight, a, bt, scale, seeds, row_keys, index, segments, dropout, transposed);
    const int64_t rows = layer.x.rows, m = layer.m;
    const Integers sizes = sizes_of(x, m);
    STD_TORCH_CHECK(weight.has_value() != base.has_value(), "weight, base: expected one of them");
    STD_TORCH_CHECK(!base || fits(*base, sizes), "base: expected [..., ", m, "] with the leading dimensions of x");
    STD_TORCH_CHECK(!bias || (fits(*bias, {m}) && type_of("bias", *bias) == layer.x.type), "bias: expected [", m, "] of the type of x");
    const Tensor s = empty_s(layer.x, layer.walk);
    if ((!base || type_of("base", *base) == layer.x.type) && goes_small(layer)) {
        const Tensor y = empty(sizes, x.scalar_type());
        const std::optional<Matrix> given = base ? std::optional(Matrix::flat("base", *base)) : std::nullopt;
        small_forward(layer, given ? &*given : nullptr, bias, y, s);
        return {y, s};
    }
    const Tensor y = !base ? empty(sizes, x.scalar_type()) : base->is_contiguous() ? torch::stable::clone(*base) : torch::stable::contiguous(*base);
    if (weight) {
        base_forward(y, x, *weight, bias, rows, widens(layer.x.type));
    }
    shrink(layer.walk, layer.x, layer.a, layer.scale, const_cast<void*>(s.const_data_ptr()));
    const RowWalk without = layer.walk.without_dropout();
    if (layer.others) {
        expand(without, Matrix::flat("y", y), shrunk(s), Matrix("bt", layer.rank_rows()), layer.rounded);
    }
    if (layer.rounded) {
        expand_rounded(without, Matrix::flat("y", y), static_cast<const float*>(s.const_data_ptr()), layer.bt, layer.lies_transposed);
    }
    return {y, s};
}

std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor& d_y_given, const Tensor& x_given, const MaybeTensor& weight, const Tensor& a, const Tensor& bt,
                                                 const Tensor& s, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys,
                                                 const MaybeTensor& index, const Integers& segments, double dropout, bool transposed, bool need_x, bool need_a,
                                                 bool need_bt, ScalarType a_type, ScalarType bt_type) {
    const Tensor x = packed(x_given), d_y = packed(d_y_given.scalar_type() == x.scalar_type() ? d_y_given : torch::stable::to(d_y_given, x.scalar_type()));
    const Layer layer(x, weight, a, bt, scale, seeds, row_keys, index, segments, dropout, transposed);
    const int64_t rows = layer.x.rows, n = layer.x.width, m = layer.m;
    const Matrix d_out = Matrix::flat("d_y", d_y);
    STD_TORCH_CHECK(d_out.rows == rows && d_out.width == m, "d_y: expected [", rows, ", ", m, "]");
    const Shrunk own_s = shrunk(s);
    const Type s_type = shrunk_type(layer.x.type);
    STD_TORCH_CHECK(own_s.count == layer.walk.flat && own_s.type == s_type, "s: expected ", layer.walk.flat, " elements of the type of the arithmetic");
    const Integers sizes = need_x ? sizes_of(x, n) : Integers{0};
    const Tensor d_x = need_x && !weight ? torch::stable::new_zeros(x, sizes) : empty(sizes, x.scalar_type());
    if (goes_small(layer)) {
        const Tensor d_a = need_a ? empty({layer.total, n}, a_type) : empty({0}, a_type);
        const Tensor d_bt = need_bt ? empty({bt.size(0), bt.size(1)}, bt_type, layer.lies_transposed && !transposed) : empty({0}, bt_type);
        small_backward(layer, d_out, own_s, need_x ? &d_x : nullptr, need_a ? &d_a : nullptr, need_bt ? &d_bt : nullptr);
        return {d_x, d_a, d_bt};
    }
    if (need_x && weight) {
        base_backward(d_x, d_y, *weight, rows, widens(layer.x.type));
    }
    const RowWalk without = layer.walk.without_dropout();
    // Uninitialised: a vector would be filled with zeros first.
    const std::unique_ptr<char[]> room(need_x || need_a ? new char[static_cast<size_t>(layer.walk.flat * size_of(s_type))] : nullptr);
    const Shrunk d_s{s_type, room.get(), layer.walk.flat};
    if (room && layer.others) {
        shrink(without, d_out, Matrix("bt", layer.rank_rows()), layer.scale, room.get(), layer.rounded);
    }
    if (room && layer.rounded) {
        shrink_rounded(without, d_out, layer.bt, layer.lies_transposed, layer.scale, reinterpret_cast<float*>(room.get()));
    }
    if (need_x) {
        if (layer.others) {
            expand(layer.walk, Matrix::flat("d_x", d_x), d_s, layer.a, layer.rounded);
        }
        if (layer.rounded) {
            expand_rounded(layer.walk, Matrix::flat("d_x", d_x), static_cast<const float*>(d_s.data), layer.a, false);
        }
    }
    return {d_x, need_a ? gradient(layer, layer.walk, d_s, layer.x, a_type, false, false) : empty({0}, a_type),
            need_bt ? gradient(layer, without, own_s, d_out, bt_type, layer.lies_transposed, transposed) : empty({0}, bt_type)};
}

}  // namespace
}  // namespace hetlora

STABLE_TORCH_LIBRARY_FRAGMENT(hetlora, library) { library.def("_lora_way(int way) -> int"); }
STABLE_TORCH_LIBRARY_IMPL(hetlora, CompositeExplicitAutograd, library) { library.impl("_lora_way", TORCH_BOX(&hetlora::lora_way)); }

STABLE_TORCH_LIBRARY_IMPL(hetlora, CPU, library) {
    library.impl("shrink", TORCH_BOX(&hetlora::shrink_op));
    library.impl("expand_", TORCH_BOX(&hetlora::expand_op));
    library.impl("grouped_gram", TORCH_BOX(&hetlora::grouped_gram_op));
    library.impl("lora_forward", TORCH_BOX(&hetlora::lora_forward));
    library.impl("lora_backward", TORCH_BOX(&hetlora::lora_backward));
}
