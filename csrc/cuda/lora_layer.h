// One call of a LoRA op: its segments as a table that all its launches share, and the three launches that the ops are made of.
#pragma once
#include "../segments.h"
#include "calls.h"

namespace {

using hetlora::LoraCall;
using hetlora::LoraClient;
using hetlora::Segment;
using hetlora::Segments;
using hetlora::Walk;

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

// S [flat], or what there is of it until expand has run: planes of partial sums, and what their sums are multiplied by.
struct Shrunk {
    Tensor s;
    MaybeTensor planes, scale;
    int splits = 0;  // planes that are still to be added
    double inverse = 1;
};

// A gradient [S, width], and the partial sums of clients with many rows until they are added.
struct Gram {
    Tensor out;
    ScalarType dtype;
    Type type;  // of x
    MaybeTensor planes;
};

#ifndef HETLORA_EXPAND_BLOCKS  // fewer where the tests run small shapes
#define HETLORA_EXPAND_BLOCKS 256
#endif
constexpr int WIDEST = 256, BLOCKS = HETLORA_EXPAND_BLOCKS;  // columns of a block of expand at most; blocks that are to be left when they are made wide
constexpr int64_t EXPAND_PLANES = 16 << 20;  // bytes of planes that expand reads in all rather than leave them to a launch: 3 us of an H100's L2

// One call of an op: its segments as a table that all its launches share, uploaded only where it does not fit into kernel arguments.
class Layer : Walk {
  public:
    // `whole`: its launches follow one another, so that S may be kept a second time with rows that start at multiples of 16 bytes.
    Layer(const Tensor& like, const Segments& given, int64_t rows, const char* op, bool whole = true)
        : Walk(given, rows), op_(op), device_(like), given_(given), x_rows_(rows), whole_(whole) {
        const std::vector<LoraClient> clients = clients_of_launch();
        set_dropout();
        if (given.index) call_.index = integers("index", *given.index, last);
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

    // S [flat] of x in x's type. `then`: columns of the expand that follows. That expand may be left to add the planes of partial sums. 0: no expand follows.
    Shrunk shrink(const Rows& x, const Tensor& factor, const Tensor& scale, bool drop, int64_t then) const {
        STD_TORCH_CHECK(x.rows() == x_rows_, "x: expected ", x_rows_, " rows, got ", x.rows());
        LoraCall call = with_dropout(drop);
        const Tensor rows = set_factor(call, factor, x.dense, x.width());
        const Tensor scales = torch::stable::contiguous(scale);
        STD_TORCH_CHECK(scales.scalar_type() == scalar_of(sums_of(x.type)) && scales.numel() == static_cast<int64_t>(given_.ranks.size),
                        "scale: expected one entry per client in the type of the sums");
        Shrunk out{torch::stable::new_empty(x.dense, {flat})};
        call.splits = hetlora::shrink_splits(static_cast<int>(x.width()));
        call.pitch = pitch();
        call.plane_size = last * call.pitch;
        if (call.splits > 1) {
            out.planes = torch::stable::new_empty(x.dense, {call.splits * call.plane_size}, scalar_of(sums_of(x.type)));
            call.planes = out.planes->mutable_data_ptr();
        }
        add_wide(call, out.s, false);
        call.x = x.dense.const_data_ptr();
        call.s = out.s.mutable_data_ptr();
        call.scale = scales.const_data_ptr();
        call.width = static_cast<int>(x.width());
        call.aligned = aligned(x.type, x.width(), x.dense);
        check(hetlora_shrink(&call, x.type, tiles_, device_.stream), op_);
        if (!out.planes) return out;
        out.splits = call.splits;
        out.scale = scales;
        out.inverse = call.shrink_inverse;
        if (!expand_adds(x.type, call, then)) {
            check(hetlora_shrink_sum(&call, x.type, tiles_, device_.stream), op_);
            out.splits = 0;
        }
        return out;
    }

    // out = before + S factor, on the rows of clients. `before` is out itself, a matrix of its shape, or one row for all rows (a bias), in out's type. Without
    // `before` the sum starts from zero.
    // Writes S, too, where shrink has left it in planes.
    void expand(const Rows& out, const Shrunk& shrunk, const Tensor& factor, bool drop, const MaybeTensor& before) const {
        const Tensor& s = shrunk.s;
        STD_TORCH_CHECK(out.rows() == x_rows_, "out: expected ", x_rows_, " rows, got ", out.rows());
        check_shrunk(s);
        LoraCall call = with_dropout(drop);
        const Type type = type_of(s);
        const Tensor rows = set_factor(call, factor, s, out.width());
        STD_TORCH_CHECK(!before || (type_of(*before) == out.type && before->is_contiguous() && before->size(before->dim() - 1) == out.width() &&
                                    (before->dim() == 1 || before->size(0) == x_rows_)),
                        "base, bias: expected the type of the result and its shape, or one entry per column");
        call.s = const_cast<void*>(s.const_data_ptr());
        call.splits = shrunk.splits;
        call.pitch = pitch();
        if (shrunk.splits) {
            call.planes = const_cast<void*>(shrunk.planes->const_data_ptr());
            call.plane_size = last * call.pitch;
            call.scale = shrunk.scale->const_data_ptr();
            call.shrink_inverse = shrunk.inverse;
        }
        add_wide(call, s, !shrunk.splits);
        call.columns = columns_of_a_block(out.width());
        call.out = out.dense.mutable_data_ptr();
        call.out_type = out.type;
        call.before = before ? before->const_data_ptr() : nullptr;
        call.before_row = before && before->dim() == 2 ? out.width() : 0;
        call.width = static_cast<int>(out.width());
        call.aligned = aligned(out.type, out.width(), out.dense) && (!before || aligned(out.type, out.width(), *before));
        check(hetlora_expand(&call, type, tiles_, device_.stream), op_);
    }

    // [S, width]: S_k^T drop(x_k), exactly zero where a client has no rows.
    // Not whole before `sum_grams`.
    Gram grouped_gram(const Tensor& s, const Rows& x, bool drop, ScalarType dtype) const {
        STD_TORCH_CHECK(x.rows() == x_rows_ && s.scalar_type() == x.dense.scalar_type(), "s, x: expected one type and ", x_rows_, " rows, got ", x.rows());
        check_shrunk(s);
        const ScalarType sums = scalar_of(sums_of(x.type));
        const bool direct = dtype == sums || dtype == x.dense.scalar_type();  // a third type is converted afterwards
        const Tensor out = active_ranks != rank_rows ? torch::stable::new_zeros(x.dense, {rank_rows, x.width()}, direct ? dtype : sums)
                                                     : torch::stable::new_empty(x.dense, {rank_rows, x.width()}, direct ? dtype : sums);
        LoraCall call = with_dropout(drop);
        Gram gram{out, dtype, x.type, std::nullopt};
        if (planes_) gram.planes = torch::stable::new_empty(x.dense, {planes_ * x.width()}, sums);
        call.planes = gram.planes ? gram.planes->mutable_data_ptr() : nullptr;
        call.x = x.dense.const_data_ptr();
        call.s = const_cast<void*>(s.const_data_ptr());
        add_wide(call, s, true);
        call.out = out.mutable_data_ptr();
        call.out_type = type_of(out);
        call.width = static_cast<int>(x.width());
        call.aligned = aligned(x.type, x.width(), x.dense);
        check(hetlora_grouped_gram(&call, x.type, chunks_, device_.stream), op_);
        return gram;
    }

    // Adds the partial sums of one or both gradients, in one launch, and converts what has a third type.
    void sum_grams(std::initializer_list<Gram*> grams) const {
        hetlora::GramSums sums{};
        sums.table = call_.table;
        for (Gram* gram : grams) {
            if (!gram->planes) continue;
            sums.planes[sums.count] = gram->planes->const_data_ptr();
            sums.out[sums.count] = gram->out.mutable_data_ptr();
            sums.type[sums.count] = type_of(gram->out);
            sums.width[sums.count++] = static_cast<int>(gram->out.size(1));
        }
        if (sums.count) check(hetlora_grouped_gram_sum(&sums, (*grams.begin())->type, rank_, device_.stream), op_);
        for (Gram* gram : grams)
            if (gram->out.scalar_type() != gram->dtype) gram->out = torch::stable::to(gram->out, gram->dtype);
    }

    // Every row of x belongs to a client with rank: the layer may start from its LoRA term.
    bool covers_all() const { return active_rows == x_rows_; }

  private:
    // The segments as the kernels see them, with the tiles and chunks that they are cut into.
    std::vector<LoraClient> clients_of_launch() {
        STD_TORCH_CHECK(rank_rows < INT32_MAX && last < INT32_MAX && given_.ranks.size < INT32_MAX, "ranks, lengths: expected sums below 2^31");
        std::vector<LoraClient> out;
        out.reserve(segments.size());
        for (const Segment& own : segments) {
            const int rank = static_cast<int>(own.rank), length = static_cast<int>(own.length), chunks = hetlora::divide_up(length, hetlora::GRAM_ROWS);
            out.push_back({own.flat, chunks > 1 ? planes_ : -1, static_cast<int>(own.client), static_cast<int>(own.row), rank, static_cast<int>(own.start),
                           length, static_cast<int>(tiles_), static_cast<int>(chunks_)});
            tiles_ += hetlora::divide_up(length, hetlora::LORA_ROWS);
            STD_TORCH_CHECK(tiles_ < INT32_MAX, "lengths: expected sums below 2^31");
            chunks_ += chunks;
            planes_ += chunks > 1 ? int64_t{chunks} * rank : 0;
            rank_ = std::max(rank_, rank);
        }
        return out;
    }

    static const int64_t* integers(const char* name, const Tensor& t, int64_t at_least) {
        STD_TORCH_CHECK(t.scalar_type() == ScalarType::Long && t.is_contiguous() && t.numel() >= at_least, name, ": expected at least ", at_least,
                        " contiguous int64, got ", t.numel());
        return static_cast<const int64_t*>(t.const_data_ptr());
    }

    void set_dropout() {
        const hetlora::Dropout dropout = dropout_of(given_);
        call_.threshold = dropout.threshold;
        call_.inverse = call_.shrink_inverse = dropout.inverse;
        if (!given_.seeds) return;
        call_.seeds = integers("seeds", *given_.seeds, static_cast<int64_t>(given_.lengths.size));
        call_.keys = integers("row_keys", *given_.row_keys, last);
    }

    LoraCall with_dropout(bool drop) const {
        LoraCall call = call_;
        if (!drop) {
            call.seeds = nullptr;
            call.inverse = call.shrink_inverse = 1;
        }
        return call;
    }

    // Rank rows in the type of x, with whatever strides they have: only a cast, of float32 masters over a 16-bit base, makes a copy. Keep what it returns.
    Tensor set_factor(LoraCall& call, const Tensor& given, const Tensor& like, int64_t width) const {
        STD_TORCH_CHECK(given.dim() == 2 && given.size(0) == rank_rows && given.size(1) == width, "rows: expected [", rank_rows, ", ", width, "], got [",
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

    // The copy of S whose rows start at multiples of 16 bytes. It is made only where some rank's rows would not. `filled`: S is there already and is copied
    // now. Otherwise shrink will write both.
    void add_wide(LoraCall& call, const Tensor& s, bool filled) const {
        const Type type = type_of(s);
        const int unit = static_cast<int>(16 / hetlora::size_of(type));
        if (!whole_ || !odd(unit)) return;
        const auto known = std::find_if(wide_.begin(), wide_.end(), [&](const auto& own) { return own.first == s.const_data_ptr(); });
        const bool made = known == wide_.end();
        if (made) wide_.emplace_back(s.const_data_ptr(), torch::stable::new_empty(s, {last * pitch()}));
        call.wide = made ? wide_.back().second.mutable_data_ptr() : known->second.mutable_data_ptr();
        call.pitch = pitch();
        if (made && filled) check(hetlora_widen(&call, type, tiles_, device_.stream), op_);
    }

    // Elements of a row of S that starts at a multiple of 16 bytes in every type.
    int pitch() const { return hetlora::divide_up(rank_, 8) * 8; }

    // As many columns as leave blocks for a whole device.
    int columns_of_a_block(int64_t width) const {
        int columns = WIDEST;
        while (columns > hetlora::LORA_COLUMNS && tiles_ * hetlora::divide_up(width, columns) < BLOCKS) columns /= 2;
        return columns;
    }

    // Whether expand adds the planes: S has to fit into its two stages. Each block of expand reads the planes of its own rows. That costs no more than a launch
    // of its own in two cases: a block reads no more bytes of planes than it writes of the result, or all blocks together read at most EXPAND_PLANES bytes. Who
    // adds the planes changes no bit.
    bool expand_adds(Type type, const LoraCall& call, int64_t width) const {
        const int size = static_cast<int>(hetlora::size_of(type)), columns = columns_of_a_block(width);
        if (width == 0 || rank_ > 2 * hetlora::LORA_DEPTH / size) return false;
        const int64_t plane_row = call.splits * rank_ * static_cast<int64_t>(hetlora::size_of(sums_of(type)));
        return plane_row <= columns * size || plane_row * last * hetlora::divide_up(width, columns) <= EXPAND_PLANES;
    }

    bool odd(int unit) const {
        return std::any_of(given_.ranks.begin(), given_.ranks.end(), [&](int64_t rank) { return rank % unit != 0; });
    }

    void check_shrunk(const Tensor& s) const {
        STD_TORCH_CHECK(s.is_contiguous() && s.numel() == flat, "s: expected ", flat, " contiguous elements, got ", s.numel());
    }

    const char* op_;
    OnDevice device_;
    const Segments& given_;
    int64_t x_rows_, tiles_ = 0, chunks_ = 0, planes_ = 0;
    int rank_ = 0;
    bool whole_;
    mutable std::vector<std::pair<const void*, Tensor>> wide_;  // by the S they are copies of, which outlives them
    MaybeTensor far_;
    LoraCall call_{};
};

}  // namespace
