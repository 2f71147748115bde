// The LoRA layer on CUDA tensors: shrink, expand_ and grouped_gram by themselves, and the whole layer, base product included, in one op each way.
// Meaning is checked in hetlora_kernels/ops; here what memory safety needs and the host can know: an index on the device is not read.
#include <cmath>
#include <initializer_list>

#include <products.h>

#include "calls.h"

namespace {

using hetlora::LoraCall;
using hetlora::LoraClient;
using MaybeTensor = std::optional<Tensor>;

// The arguments that every LoRA op takes (`_SEGMENT_ARGS` of the schemas).
struct Segments {
    const MaybeTensor &seeds, &row_keys, &index;
    const Ints &ranks, &starts, &lengths;
    double dropout;
};

// A matrix whose rows are next to each other, and whether 16 bytes at a time can be read.
struct Rows {
    Rows(const char* name, const Tensor& t) : dense(torch::stable::contiguous(t)), type(type_of(t)) {
        STD_TORCH_CHECK(t.dim() == 2 && t.size(0) < INT32_MAX && t.size(1) < INT32_MAX, name, ": expected a matrix with fewer than 2^31 rows and columns");
    }
    int64_t rows() const { return dense.size(0); }
    int64_t width() const { return dense.size(1); }
    Tensor dense;
    Type type;
};

// One call of an op: its segments as a table that all its launches share, uploaded only where it does not fit into kernel arguments.
class Layer {
  public:
    // `whole`: its launches follow one another, so that S may be kept a second time with rows that start at multiples of 16 bytes.
    Layer(const Tensor& like, const Segments& given, int64_t rows, const char* op, bool whole = true)
        : op_(op), device_(like), given_(given), x_rows_(rows), whole_(whole) {
        std::vector<LoraClient> clients = find_clients();
        call_.inverse = 1;
        if (given.seeds) set_dropout();
        if (given.index) call_.index = integers("index", *given.index);
        call_.table.count = static_cast<int>(clients.size());
        if (clients.size() <= hetlora::NEAR) {
            std::copy(clients.begin(), clients.end(), call_.table.near);
        } else {
            const size_t bytes = clients.size() * sizeof(LoraClient);
            far_ = torch::stable::new_empty(like, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
            HetloraCall upload{};
            upload.host_table = reinterpret_cast<const unsigned char*>(clients.data());
            upload.table_bytes = bytes;
            upload.device_table = far_->mutable_data_ptr();
            upload.stream = device_.stream;
            check(hetlora_upload(&upload), op);
            call_.table.far = static_cast<const LoraClient*>(far_->const_data_ptr());
        }
    }

    // S [flat] of x in x's type.
    Tensor shrink(const Rows& x, const Tensor& factor, const Tensor& scale, bool drop) const {
        STD_TORCH_CHECK(x.rows() == x_rows_, "x: expected ", x_rows_, " rows, got ", x.rows());
        LoraCall call = with_dropout(drop);
        const Tensor rows = set_factor(call, factor, x.dense, x.width());
        const Tensor scales = torch::stable::contiguous(scale);
        STD_TORCH_CHECK(scales.scalar_type() == scalar_of(sums_of(x.type)) && scales.numel() == static_cast<int64_t>(given_.ranks.size()),
                        "scale: expected one entry per client in the type of the sums");
        const Tensor s = torch::stable::new_empty(x.dense, {flat_});
        const int splits = hetlora::divide_up(x.width(), hetlora::SHRINK_COLUMNS);
        MaybeTensor planes;
        if (splits > 1) planes = torch::stable::new_empty(x.dense, {splits * flat_}, scalar_of(sums_of(x.type)));
        call.planes = planes ? planes->mutable_data_ptr() : nullptr;
        call.flat = flat_;
        add_wide(call, s, false);
        call.x = x.dense.const_data_ptr();
        call.s = s.mutable_data_ptr();
        call.scale = scales.const_data_ptr();
        call.width = static_cast<int>(x.width());
        call.aligned = aligned(x.type, x.width(), x.dense);
        check(hetlora_shrink(&call, x.type, tiles_, device_.stream), op_);
        return s;
    }

    // out = before + S factor on the rows of clients; before: out, a matrix like it, or one row for all (a bias), in out's type; zero without one.
    void expand(const Rows& out, const Tensor& s, const Tensor& factor, bool drop, const MaybeTensor& before) const {
        STD_TORCH_CHECK(out.rows() == x_rows_, "out: expected ", x_rows_, " rows, got ", out.rows());
        check_shrunk(s);
        LoraCall call = with_dropout(drop);
        const Type type = type_of(s);
        const Tensor rows = set_factor(call, factor, s, out.width());
        STD_TORCH_CHECK(!before || (type_of(*before) == out.type && before->is_contiguous() && before->size(before->dim() - 1) == out.width() &&
                                    (before->dim() == 1 || before->size(0) == x_rows_)),
                        "base, bias: expected the type of the result and its shape, or one entry per column");
        call.s = const_cast<void*>(s.const_data_ptr());
        add_wide(call, s, true);
        call.out = out.dense.mutable_data_ptr();
        call.out_type = out.type;
        call.before = before ? before->const_data_ptr() : nullptr;
        call.before_row = before && before->dim() == 2 ? out.width() : 0;
        call.width = static_cast<int>(out.width());
        call.aligned = aligned(out.type, out.width(), out.dense) && (!before || aligned(out.type, out.width(), *before));
        check(hetlora_expand(&call, type, tiles_, device_.stream), op_);
    }

    // [S, width]: S_k^T drop(x_k), exactly zero where a client has no rows.
    Tensor grouped_gram(const Tensor& s, const Rows& x, bool drop, ScalarType dtype) const {
        STD_TORCH_CHECK(x.rows() == x_rows_ && s.scalar_type() == x.dense.scalar_type(), "s, x: expected one type and ", x_rows_, " rows, got ", x.rows());
        check_shrunk(s);
        const ScalarType sums = scalar_of(sums_of(x.type));
        const bool direct = dtype == sums || dtype == x.dense.scalar_type();  // a third type is converted afterwards
        const Tensor out = idle_ ? torch::stable::new_zeros(x.dense, {total_, x.width()}, direct ? dtype : sums)
                                 : torch::stable::new_empty(x.dense, {total_, x.width()}, direct ? dtype : sums);
        LoraCall call = with_dropout(drop);
        MaybeTensor planes;
        if (planes_) planes = torch::stable::new_empty(x.dense, {planes_ * x.width()}, sums);
        call.planes = planes ? planes->mutable_data_ptr() : nullptr;
        call.x = x.dense.const_data_ptr();
        call.s = const_cast<void*>(s.const_data_ptr());
        add_wide(call, s, true);
        call.out = out.mutable_data_ptr();
        call.out_type = type_of(out);
        call.width = static_cast<int>(x.width());
        call.aligned = aligned(x.type, x.width(), x.dense);
        check(hetlora_grouped_gram(&call, x.type, chunks_, rank_, device_.stream), op_);
        return direct ? out : torch::stable::to(out, dtype);
    }

    // Every row of x belongs to a client with rank: the layer may start from its LoRA term.
    bool covers_all() const { return covered_ == x_rows_; }

  private:
    std::vector<LoraClient> find_clients() {
        const Ints &ranks = given_.ranks, &starts = given_.starts, &lengths = given_.lengths;
        STD_TORCH_CHECK(starts.size() == lengths.size() && lengths.size() <= ranks.size() && ranks.size() < INT32_MAX, "starts, lengths: expected at most ",
                        ranks.size(), " integers each, got ", starts.size(), " and ", lengths.size());
        std::vector<LoraClient> out;
        const int64_t limit = given_.index ? given_.index->numel() : x_rows_;
        for (size_t k = 0; k < ranks.size(); ++k) {
            const int64_t rank = ranks[k], length = k < lengths.size() ? lengths[k] : 0, start = length ? starts[k] : 0;
            STD_TORCH_CHECK(rank >= 0 && rank < INT32_MAX && length >= 0, "ranks, lengths: expected integers >= 0, got ", rank, " and ", length);
            STD_TORCH_CHECK(start >= 0 && start <= limit - length, "starts: expected segments within ", limit, " rows, got ", start, " + ", length);
            if (rank && length) {
                const int chunks = hetlora::divide_up(length, hetlora::GRAM_ROWS), own = static_cast<int>(rank);
                out.push_back({flat_, chunks > 1 ? planes_ : -1, static_cast<int>(k), static_cast<int>(total_), own, static_cast<int>(start),
                               static_cast<int>(length), static_cast<int>(tiles_), static_cast<int>(chunks_)});
                tiles_ += hetlora::divide_up(length, hetlora::LORA_ROWS);
                chunks_ += chunks;
                planes_ += chunks > 1 ? chunks * rank : 0;
                covered_ += length;
                last_ = std::max(last_, start + length);
                rank_ = std::max(rank_, own);
            } else {
                idle_ = idle_ || rank;
            }
            flat_ += rank * length;
            total_ += rank;
            STD_TORCH_CHECK(total_ < INT32_MAX && tiles_ < INT32_MAX, "ranks, lengths: expected sums below 2^31");
        }
        return out;
    }

    const int64_t* integers(const char* name, const Tensor& t) const {
        STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() >= last_, name, ": expected at least ", last_,
                        " contiguous int64, got ", t.numel());
        return static_cast<const int64_t*>(t.const_data_ptr());
    }

    void set_dropout() {
        STD_TORCH_CHECK(given_.row_keys.has_value(), "row_keys: expected a tensor beside seeds");
        STD_TORCH_CHECK(given_.dropout >= 0 && given_.dropout < 1, "dropout: expected a probability in [0, 1), got ", given_.dropout);
        STD_TORCH_CHECK(given_.seeds->scalar_type() == ScalarType::Long && given_.seeds->is_contiguous() &&
                            given_.seeds->numel() >= static_cast<int64_t>(given_.lengths.size()),
                        "seeds: expected one contiguous int64 per client");
        call_.seeds = static_cast<const int64_t*>(given_.seeds->const_data_ptr());
        call_.keys = integers("row_keys", *given_.row_keys);
        call_.threshold = static_cast<unsigned>(std::nearbyint(65536 * given_.dropout));  // ties to even, as Python rounds
        call_.inverse = 1 / (1 - call_.threshold / 65536.0);
    }

    LoraCall with_dropout(bool drop) const {
        LoraCall call = call_;
        if (!drop) {
            call.seeds = nullptr;
            call.inverse = 1;
        }
        return call;
    }

    // Rank rows in the type of x, with whatever strides they have: only a cast, of float32 masters over a 16-bit base, makes a copy. Keep what it returns.
    Tensor set_factor(LoraCall& call, const Tensor& given, const Tensor& like, int64_t width) const {
        STD_TORCH_CHECK(given.dim() == 2 && given.size(0) == total_ && given.size(1) == width, "rows: expected [", total_, ", ", width, "], got [",
                        given.size(0), ", ", given.size(1), "]");
        const Type type = type_of(like);
        const Tensor rows = type_of(given) == type ? given
                                                   : torch::stable::to(given, like.scalar_type(), std::nullopt, std::nullopt, std::nullopt, false, false,
                                                                       torch::headeronly::MemoryFormat::Contiguous);
        call.factor = rows.const_data_ptr();
        call.factor_row = rows.stride(0);
        call.factor_column = width == 1 ? 1 : rows.stride(1);
        call.factor_aligned = call.factor_column == 1 && call.factor_row % (16 / hetlora::size_of(type)) == 0 && aligned(type, width, rows);
        return rows;
    }

    // The copy of S with a pitch, where some rank's rows would not start at multiples of 16 bytes: one that shrink is about to write, or that of an S there is.
    void add_wide(LoraCall& call, const Tensor& s, bool filled) const {
        const Type type = type_of(s);
        const int unit = static_cast<int>(16 / hetlora::size_of(type));
        if (!whole_ || !odd(unit)) return;
        const auto known = std::find_if(wide_.begin(), wide_.end(), [&](const auto& own) { return own.first == s.const_data_ptr(); });
        const int pitch = hetlora::divide_up(rank_, unit) * unit;
        const bool made = known == wide_.end();
        if (made) wide_.emplace_back(s.const_data_ptr(), torch::stable::new_empty(s, {last_ * pitch}));
        call.wide = made ? wide_.back().second.mutable_data_ptr() : known->second.mutable_data_ptr();
        call.pitch = pitch;
        if (made && filled) check(hetlora_widen(&call, type, tiles_, device_.stream), op_);
    }

    bool odd(int unit) const {
        return std::any_of(given_.ranks.begin(), given_.ranks.end(), [&](int64_t rank) { return rank % unit != 0; });
    }

    void check_shrunk(const Tensor& s) const {
        STD_TORCH_CHECK(s.is_contiguous() && s.numel() == flat_, "s: expected ", flat_, " contiguous elements, got ", s.numel());
    }

    const char* op_;
    OnDevice device_;
    const Segments& given_;
    int64_t x_rows_, flat_ = 0, total_ = 0, tiles_ = 0, chunks_ = 0, planes_ = 0, covered_ = 0, last_ = 0;
    int rank_ = 0;
    bool whole_;
    mutable std::vector<std::pair<const void*, Tensor>> wide_;  // by the S they are copies of, which outlives them
    bool idle_ = false;  // a client with rank rows but no rows of x
    MaybeTensor far_;
    LoraCall call_{};
};

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

// Sizes of x with another last one.
Ints sizes_of(const Tensor& x, int64_t last) {
    Ints out(static_cast<size_t>(x.dim()), last);
    for (size_t i = 0; i + 1 < out.size(); ++i) out[i] = x.size(static_cast<int64_t>(i));
    return out;
}

Tensor transpose(const Tensor& t) { return torch::stable::transpose(t, 0, 1); }

// The lists of the segments, from the one that the layer's ops take: the rows of x, then ranks, starts and lengths of the clients.
struct Lists {
    explicit Lists(const Ints& all) {
        STD_TORCH_CHECK(all.size() % 3 == 1, "segments: expected the rows of x and three integers for each client, got ", all.size());
        const auto third = static_cast<std::ptrdiff_t>(all.size() / 3);
        rows = all[0];
        ranks.assign(all.begin() + 1, all.begin() + 1 + third);
        starts.assign(all.begin() + 1 + third, all.end() - third);
        lengths.assign(all.end() - third, all.end());
    }
    int64_t rows;
    Ints ranks, starts, lengths;
};

Tensor shrink(const Tensor& x_in, const Tensor& rows, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
              const Ints& ranks, const Ints& starts, const Ints& lengths, double dropout) {
    const Rows x("x", x_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    return Layer(x.dense, segments, x.rows(), "shrink", false).shrink(x, rows, scale, true);
}

void expand_(Tensor out_in, const Tensor& s, const Tensor& rows, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
             const Ints& ranks, const Ints& starts, const Ints& lengths, double dropout) {
    const Rows out("out", out_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    Layer(out.dense, segments, out.rows(), "expand_", false).expand(out, s, rows, true, out.dense);
    if (!out_in.is_contiguous()) torch::stable::copy_(out_in, out.dense);
}

Tensor grouped_gram(const Tensor& s, const Tensor& x_in, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index, const Ints& ranks,
                    const Ints& starts, const Ints& lengths, double dropout, ScalarType dtype) {
    const Rows x("x", x_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    return Layer(x.dense, segments, x.rows(), "grouped_gram", false).grouped_gram(s, x, true, dtype);
}

// One of the layer's ops, checked: all on one device, and shapes that fit together.
void check_layer(const Tensor& x, const MaybeTensor& weight, const Tensor& a, const Tensor& bt, int64_t width, const Lists& lists,
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
    STD_TORCH_CHECK(lists.rows == (x.size(1) ? x.size(0) : 0), "segments: expected the ", x.size(0), " rows of x, got ", lists.rows);
}

// Where every row has a LoRA term the layer starts from it, bias + S B, and the base product adds itself: its epilogue reads what expand wrote while other
// tiles are multiplied. Otherwise expand adds to the base product. A given base is read once, or copied where some row has no client.
std::tuple<Tensor, Tensor> lora_forward(const Tensor& x_in, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& base, const Tensor& a,
                                        const Tensor& bt_in, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys,
                                        const MaybeTensor& index, const Ints& all, double dropout, bool transposed) {
    STD_TORCH_CHECK(weight.has_value() != base.has_value(), "weight, base: expected exactly one");
    STD_TORCH_CHECK(bt_in.dim() == 2, "bt: expected a matrix");
    const Rows x("x", matrix(x_in));
    const Tensor bt = transposed ? transpose(bt_in) : bt_in;
    const Lists lists(all);
    const int64_t width = bt.size(1);
    const MaybeTensor scales = scale;
    check_layer(x.dense, weight, a, bt, width, lists, {&bias, &base, &scales, &seeds, &row_keys, &index});
    STD_TORCH_CHECK(!bias || (bias->dim() == 1 && bias->size(0) == width && bias->scalar_type() == x.dense.scalar_type()), "bias: expected [", width,
                    "] in the type of x");
    const Segments segments{seeds, row_keys, index, lists.ranks, lists.starts, lists.lengths, dropout};
    const Layer layer(x.dense, segments, x.rows(), "lora_forward");
    const Tensor s = layer.shrink(x, a, scale, true);
    const Ints sizes = sizes_of(x_in, width);
    if (base) {
        STD_TORCH_CHECK(base->dim() == x_in.dim(), "base: expected the leading shape of x");
        for (size_t i = 0; i < sizes.size(); ++i) STD_TORCH_CHECK(base->size(static_cast<int64_t>(i)) == sizes[i], "base: expected the leading shape of x");
        const Tensor dense = torch::stable::contiguous(*base), out = layer.covers_all() ? torch::stable::empty_like(dense) : torch::stable::clone(dense);
        layer.expand(Rows("base", matrix(out)), s, bt, false, matrix(dense));
        return {out, s};
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
    return {out, s};
}

// (d_x, d_a, d_bt), without elements where not needed; d_bt lies as bt does.
std::tuple<Tensor, Tensor, Tensor> lora_backward(const Tensor& d_y_in, const Tensor& x_in, const MaybeTensor& weight, const Tensor& a, const Tensor& bt_in,
                                                 const Tensor& s, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys,
                                                 const MaybeTensor& index, const Ints& all, double dropout, bool transposed, bool need_x, bool need_a,
                                                 bool need_bt, ScalarType type_a, ScalarType type_bt) {
    STD_TORCH_CHECK(bt_in.dim() == 2, "bt: expected a matrix");
    const Rows x("x", matrix(x_in));
    const Rows d_y("d_y", matrix(d_y_in.scalar_type() == x_in.scalar_type() ? d_y_in : torch::stable::to(d_y_in, x_in.scalar_type())));
    const Tensor bt = transposed ? transpose(bt_in) : bt_in;
    const Lists lists(all);
    const MaybeTensor scales = scale, own_s = s, out_gradient = d_y.dense;
    check_layer(x.dense, weight, a, bt, bt.size(1), lists, {&own_s, &scales, &seeds, &row_keys, &index, &out_gradient});
    STD_TORCH_CHECK(d_y.rows() == x.rows() && d_y.width() == bt.size(1), "d_y: expected [", x.rows(), ", ", bt.size(1), "]");
    const Segments segments{seeds, row_keys, index, lists.ranks, lists.starts, lists.lengths, dropout};
    const Layer layer(x.dense, segments, x.rows(), "lora_backward");
    MaybeTensor d_s;
    if (need_x || need_a) d_s = layer.shrink(d_y, bt, scale, false);
    Tensor d_x = torch::stable::new_empty(x.dense, need_x ? sizes_of(x_in, x.width()) : Ints{0});
    if (need_x) {
        const Rows rows("d_x", matrix(d_x));
        const bool first = layer.covers_all();
        if (!first && weight) product(rows.dense, d_y.dense, *weight, false);
        if (!first && !weight) torch::stable::zero_(d_x);
        layer.expand(rows, *d_s, a, true, first ? std::nullopt : MaybeTensor(rows.dense));
        if (first && weight) product(rows.dense, d_y.dense, *weight, true);
    }
    const Tensor d_a = need_a ? layer.grouped_gram(*d_s, x, true, type_a) : torch::stable::new_empty(a, {0}, type_a);
    if (!need_bt) return {d_x, d_a, torch::stable::new_empty(bt, {0}, type_bt)};
    const Tensor d_bt = layer.grouped_gram(s, d_y, false, type_bt);
    if (transposed) return {d_x, d_a, torch::stable::contiguous(transpose(d_bt))};
    const bool lies_transposed = !bt.is_contiguous() && bt.stride(0) == 1 && bt.stride(1) == bt.size(0);
    return {d_x, d_a, lies_transposed ? transpose(torch::stable::contiguous(transpose(d_bt))) : d_bt};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) {
    m.impl("shrink", TORCH_BOX(&shrink));
    m.impl("expand_", TORCH_BOX(&expand_));
    m.impl("grouped_gram", TORCH_BOX(&grouped_gram));
    m.impl("lora_forward", TORCH_BOX(&lora_forward));
    m.impl("lora_backward", TORCH_BOX(&lora_backward));
}
