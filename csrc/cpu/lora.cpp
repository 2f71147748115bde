// shrink, expand_, grouped_gram: the products of the multi-rank LoRA layer, client by client.
//
// shrink, S_k = scale_k drop(x_k) A_k^T: a task is kRows rows of one client; A_k stays in L2 while x passes once.
// expand_, out_k += S_k B_k: the same rows, or up to kMostRows; out is read and written once. Three cases make the product of kRows rows and kColumns columns in
// a buffer first, and then add it to out: dropout (as in the pass of dx), rows gathered through an index, and an out that is not in the type of the arithmetic.
// grouped_gram, S_k^T drop(x_k): a task owns a span of columns of one client's result. It walks the client's rows in chunks of kChunk. A chunk's sums are made
// in registers and added to the result in order, so there are no planes and no atomics. Its span depends on the number of threads, an element's sum does not.
// Dropout is regenerated while a panel is made. bfloat16 and float16 are converted panel by panel, which the products repay from rank 4 on.
// Bytes: x, S and the factors once each, the result once (out: twice). Against the framework's GEMMs at rank 16 these win by what they do not write: no
// drop(x), no mask, no scaled or converted copy.
#include "lora_rounded.h"
#include "lora_tiles.h"

namespace hetlora {

constexpr int64_t kRows = 24, kMostRows = 96, kColumns = 512, kChunk = 64, kSpan = 64;

Layer::Layer(const Tensor& x_tensor, const MaybeTensor& weight, const Tensor& a_tensor, const Tensor& bt_tensor, const Tensor& scales, const MaybeTensor& seeds,
             const MaybeTensor& row_keys, const MaybeTensor& index, const Integers& segments, double dropout, bool transposed)
    : x(Matrix::flat("x", x_tensor)),
      a("a", a_tensor),
      lies_transposed(transposed || is_transposed(bt_tensor)),
      bt("bt", bt_tensor, lies_transposed && !transposed),
      total(a.rows),
      m(lies_transposed ? bt.rows : bt.width),
      given(segments_of(seeds, row_keys, index, segments, dropout)),
      scale(numbers("scale", scales, static_cast<int64_t>(given.ranks.size))),
      walk(given, x.rows, total),
      weight(weight) {
    STD_TORCH_CHECK(segments[0] == (x.width == 0 ? 0 : x.rows), "segments: expected the ", x.rows, " rows of x, got ", segments[0]);
    STD_TORCH_CHECK(a_tensor.dim() == 2 && a.width == x.width, "a: expected a width of ", x.width, ", got ", a.width);
    STD_TORCH_CHECK(bt_tensor.dim() == 2 && (lies_transposed ? bt.width : bt.rows) == total, "bt: expected ", total, " rank rows");
    STD_TORCH_CHECK(
        !weight || (weight->is_cpu() && weight->dim() == 2 && weight->size(0) == m && weight->size(1) == x.width && type_of("weight", *weight) == x.type),
        "weight: expected [", m, ", ", x.width, "] of the type of x");
    for (const Segment& segment : walk.segments) {
        longest = std::max(longest, segment.length);
        widest = std::max(widest, segment.rank);
    }
    const bool may_round = rounds(x.type, a.type, bt.type);
    int64_t of_rounded = 0;
    for (const Segment& segment : walk.segments) {
        of_rounded += is_rounded(may_round, segment.rank) ? segment.rank : 0;
    }
    rounded = of_rounded > 0;
    others = !rounded || of_rounded < total;
}

Tensor Layer::rank_rows() const {
    if (!lies_transposed) {
        return bt.tensor();
    }
    const Tensor out = empty({total, m}, bt.tensor().scalar_type());
    transpose_block(size_of(bt.type), bt.data, m, total, const_cast<void*>(out.const_data_ptr()));
    return out;
}

const int64_t* RowWalk::integers(const char* name, const MaybeTensor& tensor, int64_t at_least, MaybeTensor* held) {
    if (!tensor.has_value()) {
        return nullptr;
    }
    STD_TORCH_CHECK(tensor->is_cpu() && tensor->scalar_type() == ScalarType::Long, name, ": expected int64 on the CPU");
    STD_TORCH_CHECK(tensor->numel() >= at_least, name, ": expected at least ", at_least, " integers, got ", tensor->numel());
    *held = tensor->is_contiguous() ? *tensor : torch::stable::contiguous(*tensor);
    return static_cast<const int64_t*>((*held)->const_data_ptr());
}

RowWalk::RowWalk(const Segments& given, int64_t rows, int64_t factor_rows) : Walk(given, rows), dropout_(dropout_of(given)) {
    STD_TORCH_CHECK(factor_rows < 0 || rank_rows == factor_rows, "ranks: expected a sum of ", factor_rows, " (the rows of the factor), got ", rank_rows);
    index_ = integers("index", given.index, last, &index_held_);
    for (int64_t i = 0; index_ && i < given.index->numel(); ++i) {
        STD_TORCH_CHECK(index_[i] >= 0 && index_[i] < rows, "index: expected rows of x below ", rows, ", got ", index_[i]);
    }
    if (given.seeds) {
        seeds_ = integers("seeds", given.seeds, static_cast<int64_t>(given.lengths.size), &seeds_held_);
        keys_ = integers("row_keys", given.row_keys, last, &keys_held_);
    }
}

namespace {

struct Block {
    const Segment* segment;
    int64_t t, rows;
};

// Blocks of at most so many rows, of the clients whose products are not made `elsewhere(rank)`.
template <class Elsewhere>
std::vector<Block> row_blocks(const RowWalk& walk, int64_t most, const Elsewhere& elsewhere) {
    std::vector<Block> out;
    out.reserve(static_cast<size_t>(walk.active_rows / most) + walk.segments.size());
    for (const Segment& segment : walk.segments) {
        for (int64_t t = elsewhere(segment.rank) ? segment.length : 0; t < segment.length; t += most) {
            out.push_back({&segment, t, std::min(most, segment.length - t)});
        }
    }
    return out;
}

template <class E>
void shrink_as(const RowWalk& walk, const Matrix& x, const Matrix& factor, const std::vector<double>& scale, E* out) {
    const std::vector<Block> blocks = row_blocks(walk, kRows, [&](int64_t rank) { return on_tiles(x.type, rank) || by_pairs(x.type, factor.type, rank); });
    if (blocks.empty()) {
        return;
    }
    const Operand<E> rows(factor.type, factor.data, factor.rows * factor.width);
    const int64_t count = static_cast<int64_t>(blocks.size()), n = x.width, parts = part_count(count, walk.active_rows * n * size_of(x.type));
    const bool moves = x.type != type_for<E>() || walk.gathers() || walk.drops();
    std::vector<E> panels(static_cast<size_t>(moves ? parts * kRows * n : 0));
    for_tasks(parts, count, [&](int64_t part, int64_t b) {
        const auto [segment, t, height] = blocks[b];
        const int64_t rank = segment->rank;
        int64_t ld = 0;
        const E* own = panel<E>(walk, x, *segment, t, height, 0, n, panels.data() + (moves ? part * kRows * n : 0), &ld);
        E* to = out + segment->flat + t * rank;
        lora_kernels<E>().dots(own, ld, height, rows + segment->row * n, n, rank, n, static_cast<E>(scale[segment->client]), to, rank);
    });
}

// Rows of a block where `outer` copies strips of the factor: each further row repays the copy. Every thread keeps two blocks.
int64_t long_block(const RowWalk& walk) {
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads()), share = threads == 1 ? kMostRows : walk.active_rows / (2 * threads);
    return std::clamp(share / kRows * kRows, kRows, kMostRows);
}

template <class E>
void expand_as(const RowWalk& walk, const Matrix& out, Type s_type, const void* s, const Matrix& factor, bool rounded) {
    const LoraKernels<E>& kernels = lora_kernels<E>();
    const bool direct = out.type == type_for<E>() && !walk.gathers() && !walk.drops();
    const std::vector<Block> blocks = row_blocks(walk, direct && kernels.copies ? long_block(walk) : kRows,
                                                 [&](int64_t rank) { return on_tiles(out.type, rank) || is_rounded(rounded, rank); });
    if (blocks.empty()) {
        return;
    }
    const Operand<E> rows(factor.type, factor.data, factor.rows * factor.width), shrunk(s_type, s, walk.flat);
    const int64_t count = static_cast<int64_t>(blocks.size()), m = out.width, parts = part_count(count, 2 * walk.active_rows * m * size_of(out.type));
    std::vector<E> products(static_cast<size_t>(direct ? 0 : parts * kRows * kColumns));
    for_tasks(parts, count, [&](int64_t part, int64_t b) {
        const auto [segment, t, height] = blocks[b];
        const int64_t rank = segment->rank;
        const E* left = shrunk + (segment->flat + t * rank);
        if (direct) {
            E* to = reinterpret_cast<E*>(out.at((segment->start + t) * m));
            kernels.outer(left, rank, 1, rows + segment->row * m, m, rank, height, m, to, m, true);
            return;
        }
        E* product = products.data() + part * kRows * kColumns;
        for (int64_t c = 0; c < m; c += kColumns) {
            const int64_t width = std::min(kColumns, m - c);
            kernels.outer(left, rank, 1, rows + (segment->row * m + c), m, rank, height, width, product, kColumns, false);
            for (int64_t i = 0; i < height; ++i) {
                E* own = product + i * kColumns;
                if (walk.drops()) {
                    kernels.drop(walk.drop_row(*segment, t + i, c), own, width, static_cast<E>(walk.inverse()), own);
                }
                add_block(out.type, out.at(walk.source(*segment, t + i) * m + c), own, width);
            }
        }
    });
}

template <class E>
void gram_as(const RowWalk& walk, const Matrix& x, Type s_type, const void* s, Type out_type, void* out, int64_t total, bool rounded) {
    const Operand<E> shrunk(s_type, s, walk.flat);
    const int64_t width = x.width, segments = static_cast<int64_t>(walk.segments.size());
    const int64_t parts = part_count(std::max<int64_t>(1, segments * (width / kSpan)), walk.active_rows * width * size_of(x.type));
    const int64_t span = std::max<int64_t>(kSpan, (width + parts * kSpan - 1) / (parts * kSpan) * kSpan), spans = width == 0 ? 0 : (width + span - 1) / span;
    const bool moves = x.type != type_for<E>() || walk.gathers() || walk.drops(), convert = out_type != type_for<E>();
    std::vector<E> panels(static_cast<size_t>(moves ? parts * kChunk * kColumns : 0)), sums(static_cast<size_t>(convert ? total * width : 0));
    E* result = convert ? sums.data() : static_cast<E*>(out);
    for_tasks(parts, segments * spans, [&](int64_t part, int64_t task) {
        const Segment& segment = walk.segments[task / spans];
        if (on_tiles(x.type, segment.rank) || is_rounded(rounded, segment.rank)) {
            return;
        }
        const int64_t first = task % spans * span, end = std::min(width, first + span), rank = segment.rank;
        for (int64_t t = 0; t < segment.length; t += kChunk) {
            const int64_t depth = std::min(kChunk, segment.length - t);
            for (int64_t c = first; c < end; c += kColumns) {
                const int64_t columns = std::min(kColumns, end - c);
                int64_t ld = 0;
                const E* own = panel<E>(walk, x, segment, t, depth, c, columns, panels.data() + (moves ? part * kChunk * kColumns : 0), &ld);
                lora_kernels<E>().outer(shrunk + (segment.flat + t * rank), 1, rank, own, ld, depth, rank, columns, result + segment.row * width + c, width,
                                        t > 0);
            }
        }
    });
    if constexpr (sizeof(E) == 4) {
        if (any_on_tiles(walk, x.type)) {
            gram_on_tiles(walk, x, shrunk + 0, result);
        }
    }
    if (convert) {
        store_block(out_type, out, result, total * width);
    }
}

}  // namespace

void shrink(const RowWalk& walk, const Matrix& x, const Matrix& rows, const std::vector<double>& scale, void* out, bool rounded) {
    STD_TORCH_CHECK(rows.width == x.width, "rows: expected a width of ", x.width, ", got ", rows.width);
    x.type == Type::f64 ? shrink_as(walk, x, rows, scale, static_cast<double*>(out)) : shrink_as(walk, x, rows, scale, static_cast<float*>(out));
    if (any_on_tiles(walk, x.type)) {
        shrink_on_tiles(walk, x, rows, scale, static_cast<float*>(out));
    }
    if (!rounded && any_by_pairs(walk, x.type, rows.type)) {
        shrink_by_pairs(walk, x, rows, scale, static_cast<float*>(out));
    }
}

void expand(const RowWalk& walk, const Matrix& out, const Shrunk& s, const Matrix& rows, bool rounded) {
    STD_TORCH_CHECK(rows.width == out.width, "rows: expected a width of ", out.width, ", got ", rows.width);
    STD_TORCH_CHECK(s.count == walk.flat, "s: expected ", walk.flat, " elements, got ", s.count);
    s.type == Type::f64 ? expand_as<double>(walk, out, s.type, s.data, rows, rounded) : expand_as<float>(walk, out, s.type, s.data, rows, rounded);
    if (any_on_tiles(walk, out.type)) {
        expand_on_tiles(walk, out, s.type, s.data, rows);
    }
}

Tensor grouped_gram(const RowWalk& walk, const Shrunk& s, const Matrix& x, ScalarType dtype, bool rounded) {
    STD_TORCH_CHECK(s.count == walk.flat, "s: expected ", walk.flat, " elements, got ", s.count);
    STD_TORCH_CHECK((s.type == Type::f64) == (x.type == Type::f64), "s: expected float64 exactly where x is");
    const int64_t total = walk.rank_rows;
    const Tensor out = empty({total, x.width}, dtype);
    const Type out_type = type_of("dtype", out);
    void* data = const_cast<void*>(out.const_data_ptr());
    if (walk.active_ranks != total) {
        std::memset(data, 0, static_cast<size_t>(total * x.width * size_of(out_type)));
    }
    s.type == Type::f64 ? gram_as<double>(walk, x, s.type, s.data, out_type, data, total, rounded)
                        : gram_as<float>(walk, x, s.type, s.data, out_type, data, total, rounded);
    return out;
}

}  // namespace hetlora
