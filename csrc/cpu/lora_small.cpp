// The small way of a call: base product and all in one pass. Up to eight rows the framework's products and the way to and from them cost more than the
// arithmetic.
//
// base, x W^T: a task is 16 rows of W, its dot products with every row of x. d_y W: a task is so many columns that its part of the result stays in L1. It adds
// eight rows of W at a time to that part. They come from memory as eight streams. Long sums are made in parts, added in order (`kSumOfRows`, `kChain`). The
// LoRA term has the sums of lora.cpp, in the same order. So a client's gradients have the same bits in both ways. Bytes: W once a pass, in its own type;
// everything else stays in L1 or L2.
#include "lora_pairs.h"

namespace hetlora {
namespace {

constexpr int64_t kWeightRows = 16, kSpan = 64, kDepth = 8, kInL1 = 4096;

// Sums over more rows of W are made in such parts, for exactness (`dots` does the like over columns).
constexpr int64_t kSumOfRows = 256;
constexpr int64_t kWeightBytesPerThread = 128 * 1024;

// A result of any type, made as E.
template <class E>
class Result {
  public:
    Result(const Tensor& tensor, bool zero) : type_(type_of("result", tensor)), data_(const_cast<void*>(tensor.const_data_ptr())), count_(tensor.numel()) {
        if (type_ != type_for<E>()) {
            room_.resize(static_cast<size_t>(count_));
        } else if (zero) {
            std::fill_n(static_cast<E*>(data_), count_, E{0});
        }
    }
    E* operator+(int64_t i) { return (type_ == type_for<E>() ? static_cast<E*>(data_) : room_.data()) + i; }
    void store() {
        if (type_ != type_for<E>()) {
            store_block(type_, data_, room_.data(), count_);
        }
    }

  private:
    Type type_;
    void* data_;
    int64_t count_;
    std::vector<E> room_;
};

// Threads for a pass over the weight.
int64_t weight_parts(const Matrix& weight, int64_t tasks) {
    return part_count(tasks, weight.rows * weight.width * size_of(weight.type) * kBytesPerThread / kWeightBytesPerThread);
}

// out [rows, width] += part, or = part
template <class E>
void accumulate(const E* part, int64_t rows, int64_t width, E* out, int64_t ld, bool add) {
    for (int64_t t = 0; t < rows; ++t, part += width, out += ld) {
        add ? add_block(type_for<E>(), out, part, width) : static_cast<void>(std::copy_n(part, width, out));
    }
}

// out [rows, m] = x W^T
template <class E>
void base_product(const E* x, int64_t rows, const Matrix& weight, E* out) {
    const int64_t n = weight.width, m = weight.rows, tasks = (m + kWeightRows - 1) / kWeightRows, parts = weight_parts(weight, tasks);
    const bool converts = weight.type != type_for<E>();
    std::vector<E> room(static_cast<size_t>(converts ? parts * kWeightRows * n : 0));
    for_tasks(parts, tasks, [&](int64_t part, int64_t task) {
        const int64_t row = task * kWeightRows, height = std::min(kWeightRows, m - row);
        const E* own = reinterpret_cast<const E*>(weight.at(row * n));
        if (converts) {
            E* converted = room.data() + part * kWeightRows * n;
            load_block(weight.type, weight.at(row * n), converted, height * n);
            own = converted;
        }
        lora_kernels<E>().dots(x, n, rows, own, n, height, n, E{1}, out + row, m);
    });
}

// out [rows, n] = d_y W
template <class E>
void base_gradient(const E* d_y, int64_t rows, const Matrix& weight, E* out) {
    const int64_t n = weight.width, m = weight.rows, most = (n + kSpan - 1) / kSpan, parts = weight_parts(weight, most);
    const int64_t in_l1 = kInL1 / std::max<int64_t>(1, rows) / kSpan;
    const int64_t columns = kSpan * std::max<int64_t>(1, std::min((most + parts - 1) / parts, in_l1)), tasks = (n + columns - 1) / columns;
    const bool converts = weight.type != type_for<E>(), chunked = m > kSumOfRows;
    const int64_t weights = converts ? kDepth * columns : 0, sums = chunked ? rows * columns : 0;
    std::vector<E> room(static_cast<size_t>(parts * (weights + sums)));
    if (m == 0) {
        std::fill_n(out, rows * n, E{0});
    }
    for_tasks(parts, tasks, [&](int64_t part, int64_t task) {
        const int64_t column = task * columns, width = std::min(columns, n - column);
        E *converted = room.data() + part * (weights + sums), *sum = chunked ? converted + weights : out + column;
        const int64_t ld_sum = chunked ? width : n;
        for (int64_t row = 0; row < m; row += kDepth) {
            const int64_t depth = std::min(kDepth, m - row);
            const E* own = reinterpret_cast<const E*>(weight.at(row * n + column));
            int64_t ld = n;
            if (converts) {
                for (int64_t d = 0; d < depth; ++d) {
                    load_block(weight.type, weight.at((row + d) * n + column), converted + d * width, width);
                }
                own = converted;
                ld = width;
            }
            lora_kernels<E>().outer(d_y + row, m, 1, own, ld, depth, rows, width, sum, ld_sum, row % kSumOfRows > 0);
            if (chunked && (row + kDepth >= m || (row + kDepth) % kSumOfRows == 0)) {
                accumulate(sum, rows, width, out + column, n, row >= kSumOfRows);
            }
        }
    });
}

// The rows of a segment: where they lie, or gathered in `room`.
template <class E>
const E* own_rows(const RowWalk& walk, const Segment& segment, const E* from, int64_t width, E* room) {
    if (!walk.gathers()) {
        return from + segment.start * width;
    }
    for (int64_t t = 0; t < segment.length; ++t) {
        std::copy_n(from + walk.source(segment, t) * width, width, room + t * width);
    }
    return room;
}

// The same with dropout.
template <class E>
const E* dropped_rows(const RowWalk& walk, const Segment& segment, const E* from, int64_t width, E* room) {
    if (!walk.drops()) {
        return own_rows(walk, segment, from, width, room);
    }
    for (int64_t t = 0; t < segment.length; ++t) {
        const E* own = from + walk.source(segment, t) * width;
        lora_kernels<E>().drop(walk.drop_row(segment, t, 0), own, width, static_cast<E>(walk.inverse()), room + t * width);
    }
    return room;
}

// scale * rows F^T of one client, in `room`.
template <class E>
const E* shrunk(const Layer& layer, const Segment& segment, const E* rows, const E* factor, int64_t width, E* room) {
    const E scale = static_cast<E>(layer.scale[segment.client]);
    lora_kernels<E>().dots(rows, width, segment.length, factor + segment.row * width, width, segment.rank, width, scale, room, segment.rank);
    return room;
}

// S of the clients whose S is made of pairs, in `room`; the others' is left as it is.
void shrink_pairs(const RowWalk& walk, const Matrix& x, const Matrix& factor, const std::vector<double>& scale, float* room) {
    if (any_by_pairs(walk, x.type, factor.type)) {
        shrink_by_pairs(walk, x, factor, scale, room);
    }
}
void shrink_pairs(const RowWalk&, const Matrix&, const Matrix&, const std::vector<double>&, double*) {}

// out += S F for one client, dropped as x was where `drops`.
template <class E>
void expand(const RowWalk& walk, const Segment& segment, const E* s, const E* factor, int64_t width, bool drops, E* room, E* out) {
    const LoraKernels<E>& kernels = lora_kernels<E>();
    const E* own = factor + segment.row * width;
    if (!drops && !walk.gathers()) {
        kernels.outer(s, segment.rank, 1, own, width, segment.rank, segment.length, width, out + segment.start * width, width, true);
        return;
    }
    kernels.outer(s, segment.rank, 1, own, width, segment.rank, segment.length, width, room, width, false);
    for (int64_t t = 0; t < segment.length; ++t) {
        E* product = room + t * width;
        if (drops) {
            kernels.drop(walk.drop_row(segment, t, 0), product, width, static_cast<E>(walk.inverse()), product);
        }
        add_block(type_for<E>(), out + walk.source(segment, t) * width, product, width);
    }
}

template <class E>
void forward(const Layer& layer, const Matrix* base, const MaybeTensor& bias, const Tensor& y, const Tensor& s_tensor) {
    const int64_t n = layer.x.width, m = layer.m, rows = layer.x.rows;
    const Tensor factor = layer.rank_rows();
    const Operand<E> x(layer.x.type, layer.x.data, rows * n), a(layer.a.type, layer.a.data, layer.total * n);
    const Operand<E> bt(layer.bt.type, factor.const_data_ptr(), layer.total * m);
    Result<E> out(y, false);
    if (base != nullptr) {
        load_block(base->type, base->data, out + 0, rows * m);
    } else {
        base_product(x + 0, rows, Matrix("weight", *layer.weight), out + 0);
    }
    if (bias) {
        const Tensor dense = bias->is_contiguous() ? *bias : torch::stable::contiguous(*bias);
        const Operand<E> shift(layer.x.type, dense.const_data_ptr(), m);
        for (int64_t t = 0; t < rows; ++t) {
            add_block(type_for<E>(), out + t * m, shift + 0, m);
        }
    }
    E* shrunk_rows = static_cast<E*>(const_cast<void*>(s_tensor.const_data_ptr()));
    shrink_pairs(layer.walk, layer.x, layer.a, layer.scale, shrunk_rows);
    std::vector<E> room(static_cast<size_t>(layer.longest * std::max(n, m)));
    for (const Segment& segment : layer.walk.segments) {
        const E* s = shrunk_rows + segment.flat;
        if (!by_pairs(layer.x.type, layer.a.type, segment.rank)) {
            shrunk(layer, segment, dropped_rows(layer.walk, segment, x + 0, n, room.data()), a + 0, n, shrunk_rows + segment.flat);
        }
        expand(layer.walk, segment, s, bt + 0, m, false, room.data(), out + 0);
    }
    out.store();
}

template <class E>
void backward(const Layer& layer, const Matrix& d_y_matrix, const Shrunk& s_given, const Tensor* d_x_tensor, const Tensor* d_a_tensor,
              const Tensor* d_bt_tensor) {
    const int64_t n = layer.x.width, m = layer.m, rows = layer.x.rows, total = layer.total;
    const RowWalk& walk = layer.walk;
    const Tensor factor = layer.rank_rows();
    const Operand<E> x(layer.x.type, layer.x.data, rows * n), a(layer.a.type, layer.a.data, total * n);
    const Operand<E> bt(layer.bt.type, factor.const_data_ptr(), total * m);
    const Operand<E> d_y(d_y_matrix.type, d_y_matrix.data, rows * m), s(s_given.type, s_given.data, s_given.count);
    int64_t filled = 0;
    for (const Segment& segment : walk.segments) {
        filled += segment.rank;
    }
    std::optional<Result<E>> d_x, d_a, d_bt;
    if (d_x_tensor != nullptr) {
        d_x.emplace(*d_x_tensor, !layer.weight);
        if (layer.weight) {
            base_gradient(d_y + 0, rows, Matrix("weight", *layer.weight), *d_x + 0);
        }
    }
    if (d_a_tensor != nullptr) {
        d_a.emplace(*d_a_tensor, filled != total);
    }
    if (d_bt_tensor != nullptr) {
        d_bt.emplace(*d_bt_tensor, filled != total);
    }
    const LoraKernels<E>& kernels = lora_kernels<E>();
    const bool paired = (d_x || d_a) && any_by_pairs(walk, d_y_matrix.type, layer.bt.type);
    std::vector<E> d_s_pairs(static_cast<size_t>(paired ? walk.flat : 0));
    if (paired) {
        shrink_pairs(walk.without_dropout(), d_y_matrix, Matrix("bt", factor), layer.scale, d_s_pairs.data());
    }
    std::vector<E> room(static_cast<size_t>(layer.longest * (2 * std::max(n, m) + layer.widest)));
    E *x_room = room.data(), *y_room = x_room + layer.longest * std::max(n, m), *s_room = y_room + layer.longest * std::max(n, m);
    for (const Segment& segment : walk.segments) {
        const int64_t rank = segment.rank, length = segment.length;
        const E* own_y = own_rows(walk, segment, d_y + 0, m, y_room);
        if (d_bt) {
            const E* own_s = s + segment.flat;
            if (layer.lies_transposed) {
                kernels.outer(own_y, 1, m, own_s, rank, length, m, rank, *d_bt + segment.row, total, false);
            } else {
                kernels.outer(own_s, 1, rank, own_y, m, length, rank, m, *d_bt + segment.row * m, m, false);
            }
        }
        if (d_x || d_a) {
            const bool own_pairs = by_pairs(d_y_matrix.type, layer.bt.type, rank);
            const E* d_s = own_pairs ? d_s_pairs.data() + segment.flat : shrunk(layer, segment, own_y, bt + 0, m, s_room);
            if (d_a) {
                kernels.outer(d_s, 1, rank, dropped_rows(walk, segment, x + 0, n, x_room), n, length, rank, n, *d_a + segment.row * n, n, false);
            }
            if (d_x) {
                expand(walk, segment, d_s, a + 0, n, walk.drops(), x_room, *d_x + 0);
            }
        }
    }
    for (std::optional<Result<E>>* result : {&d_x, &d_a, &d_bt}) {
        if (*result) {
            (*result)->store();
        }
    }
}

}  // namespace

void small_forward(const Layer& layer, const Matrix* base, const MaybeTensor& bias, const Tensor& y, const Tensor& s) {
    layer.x.type == Type::f64 ? forward<double>(layer, base, bias, y, s) : forward<float>(layer, base, bias, y, s);
}

void small_backward(const Layer& layer, const Matrix& d_y, const Shrunk& s, const Tensor* d_x, const Tensor* d_a, const Tensor* d_bt) {
    layer.x.type == Type::f64 ? backward<double>(layer, d_y, s, d_x, d_a, d_bt) : backward<float>(layer, d_y, s, d_x, d_a, d_bt);
}

}  // namespace hetlora
