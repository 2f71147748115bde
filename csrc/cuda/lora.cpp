// The LoRA layer on CUDA tensors: shrink, expand_ and grouped_gram by themselves, and the whole layer, base product included, in one op each way.
// Meaning is checked in hetlora_kernels/ops; here what memory safety needs and the host can know: an index on the device is not read.
#include <array>
#include <cmath>

#include "calls.h"

#ifdef HETLORA_EMULATOR
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#define HETLORA_ADDMM_OUT aoti_torch_cpu_addmm_out
#else
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#define HETLORA_ADDMM_OUT aoti_torch_cuda_addmm_out
#endif

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
    Layer(const Tensor& like, const Segments& given, int64_t rows, const char* op) : op_(op), device_(like), given_(given), x_rows_(rows) {
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
        call.out = out.dense.mutable_data_ptr();
        call.out_type = out.type;
        call.before = before ? before->const_data_ptr() : nullptr;
        call.before_row = before && before->dim() == 2 ? out.width() : 0;
        call.width = static_cast<int>(out.width());
        call.aligned = out.type == type && aligned(out.type, out.width(), out.dense) && (!before || aligned(out.type, out.width(), *before));
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
        STD_TORCH_CHECK(starts.size() == lengths.size() && lengths.size() <= ranks.size() && ranks.size() < INT32_MAX,
                        "starts, lengths: expected at most ", ranks.size(), " integers each, got ", starts.size(), " and ", lengths.size());
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

    void check_shrunk(const Tensor& s) const {
        STD_TORCH_CHECK(s.is_contiguous() && s.numel() == flat_, "s: expected ", flat_, " contiguous elements, got ", s.numel());
    }

    const char* op_;
    OnDevice device_;
    const Segments& given_;
    int64_t x_rows_, flat_ = 0, total_ = 0, tiles_ = 0, chunks_ = 0, planes_ = 0, covered_ = 0, last_ = 0;
    int rank_ = 0;
    bool idle_ = false;  // a client with rank rows but no rows of x
    MaybeTensor far_;
    LoraCall call_{};
};

template <size_t N>
Tensor call_aten(const char* name, std::array<StableIValue, N> stack) {
    TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
    return torch::stable::detail::to<Tensor>(stack[0]);
}

// out += left right, in the product's own epilogue. Not through the dispatcher, whose stable form has no Scalar for beta.
void add_product(const Tensor& out, const Tensor& left, const Tensor& right) {
    STD_TORCH_CHECK(HETLORA_ADDMM_OUT(out.get(), out.get(), left.get(), right.get(), 1.0, 1.0) == 0, "hetlora: addmm failed");
}

Tensor shrink(const Tensor& x_in, const Tensor& rows, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
              const Ints& ranks, const Ints& starts, const Ints& lengths, double dropout) {
    const Rows x("x", x_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    return Layer(x.dense, segments, x.rows(), "shrink").shrink(x, rows, scale, true);
}

void expand_(Tensor out_in, const Tensor& s, const Tensor& rows, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index,
             const Ints& ranks, const Ints& starts, const Ints& lengths, double dropout) {
    const Rows out("out", out_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    Layer(out.dense, segments, out.rows(), "expand_").expand(out, s, rows, true, out.dense);
    if (!out_in.is_contiguous()) torch::stable::copy_(out_in, out.dense);
}

Tensor grouped_gram(const Tensor& s, const Tensor& x_in, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index, const Ints& ranks,
                    const Ints& starts, const Ints& lengths, double dropout, ScalarType dtype) {
    const Rows x("x", x_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    return Layer(x.dense, segments, x.rows(), "grouped_gram").grouped_gram(s, x, true, dtype);
}

// Where every row has a LoRA term the layer starts from it, bias + S B, and the base product adds itself: its epilogue reads what expand wrote while other
// tiles are multiplied. Otherwise expand adds to the base product. A given base is read once, or copied where some row has no client.
std::tuple<Tensor, Tensor> lora_forward(const Tensor& x_in, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& base, const Tensor& a,
                                        const Tensor& bt, const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys,
                                        const MaybeTensor& index, const Ints& ranks, const Ints& starts, const Ints& lengths, double dropout) {
    STD_TORCH_CHECK(weight.has_value() != base.has_value(), "weight, base: expected exactly one");
    using torch::stable::detail::from;
    const Rows x("x", x_in);
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    const Layer layer(x.dense, segments, x.rows(), "lora_forward");
    const Tensor s = layer.shrink(x, a, scale, true);
    if (weight && layer.covers_all()) {
        STD_TORCH_CHECK(weight->dim() == 2 && weight->scalar_type() == x.dense.scalar_type(), "weight: expected a matrix in the type of x");
        const Tensor out = torch::stable::new_empty(x.dense, {x.rows(), weight->size(0)});
        layer.expand(Rows("out", out), s, bt, false, bias ? MaybeTensor(torch::stable::contiguous(*bias)) : std::nullopt);
        add_product(out, x.dense, torch::stable::transpose(*weight, 0, 1));
        return {out, s};
    }
    if (weight) {
        const Tensor out = call_aten("aten::linear", std::array{from(x.dense), from(*weight), from(bias)});
        layer.expand(Rows("out", out), s, bt, false, out);
        return {out, s};
    }
    const Tensor dense = torch::stable::contiguous(*base), out = layer.covers_all() ? torch::stable::empty_like(dense) : torch::stable::clone(dense);
    layer.expand(Rows("base", out), s, bt, false, dense);
    return {out, s};
}

std::vector<Tensor> lora_backward(const Tensor& d_y_in, const Tensor& x_in, const MaybeTensor& weight, const Tensor& a, const Tensor& bt, const Tensor& s,
                                  const Tensor& scale, const MaybeTensor& seeds, const MaybeTensor& row_keys, const MaybeTensor& index, const Ints& ranks,
                                  const Ints& starts, const Ints& lengths, double dropout, bool need_x, bool need_a, bool need_bt) {
    using torch::stable::detail::from;
    const Rows d_y("d_y", d_y_in), x("x", x_in);
    STD_TORCH_CHECK(d_y.type == x.type, "d_y: expected the type of x");
    const Segments segments{seeds, row_keys, index, ranks, starts, lengths, dropout};
    const Layer layer(x.dense, segments, x.rows(), "lora_backward");
    MaybeTensor d_s;
    if (need_x || need_a) d_s = layer.shrink(d_y, bt, scale, false);
    Tensors out;
    if (need_x) {
        const bool first = layer.covers_all();
        const Tensor d_x = first    ? torch::stable::new_empty(x.dense, {x.rows(), x.width()})
                           : weight ? call_aten("aten::mm", std::array{from(d_y.dense), from(*weight)})
                                    : torch::stable::new_zeros(x.dense, {x.rows(), x.width()});
        layer.expand(Rows("d_x", d_x), *d_s, a, true, first ? std::nullopt : MaybeTensor(d_x));
        if (first && weight) add_product(d_x, d_y.dense, *weight);
        out.push_back(d_x);
    }
    if (need_a) out.push_back(layer.grouped_gram(*d_s, x, true, a.scalar_type()));
    if (need_bt) out.push_back(layer.grouped_gram(s, d_y, false, bt.scalar_type()));
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) {
    m.impl("shrink", TORCH_BOX(&shrink));
    m.impl("expand_", TORCH_BOX(&expand_));
    m.impl("grouped_gram", TORCH_BOX(&grouped_gram));
    m.impl("lora_forward", TORCH_BOX(&lora_forward));
    m.impl("lora_backward", TORCH_BOX(&lora_backward));
}
