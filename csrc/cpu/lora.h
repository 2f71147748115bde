// What the LoRA ops share: the arguments of a call checked for memory safety, and panels of rows in the type of the arithmetic.
//
// A call goes one of two ways. lora_ops.cpp chooses. The large way is the base product of base_product.cpp beside the kernels of lora.cpp. The small way does
// everything in one pass (lora_small.cpp). Up to eight rows it is the faster one.
#pragma once

#include "../segments.h"
#include "lora_kernels.h"
#include "tensors.h"

namespace hetlora {

// The walk of a call on x with `rows` rows and packed factors with `factor_rows` (-1: not known), with what a row of it needs: its place, its dropout.
class RowWalk : public Walk {
  public:
    RowWalk(const Segments& given, int64_t rows, int64_t factor_rows);

    // Row of x that holds row t of a segment.
    int64_t source(const Segment& segment, int64_t t) const { return index_ ? index_[segment.start + t] : segment.start + t; }
    bool gathers() const { return index_ != nullptr; }
    bool drops() const { return seeds_ != nullptr; }
    DropRow drop_row(const Segment& segment, int64_t t, int64_t column) const {
        return {static_cast<uint64_t>(seeds_[segment.client]), static_cast<uint64_t>(keys_[segment.start + t]), column, dropout_.threshold};
    }
    double inverse() const { return dropout_.inverse; }
    RowWalk without_dropout() const {
        RowWalk out(*this);
        out.seeds_ = nullptr;
        return out;
    }

  private:
    static const int64_t* integers(const char* name, const MaybeTensor& tensor, int64_t at_least, MaybeTensor* held);

    MaybeTensor seeds_held_, keys_held_, index_held_;
    const int64_t *seeds_ = nullptr, *keys_ = nullptr, *index_ = nullptr;
    Dropout dropout_;
};

template <class E>
constexpr Type type_for() {
    return sizeof(E) == 8 ? Type::f64 : Type::f32;
}

// Rows [t, t + rows) of a segment, columns [column, column + columns), as E with the dropout of `walk` applied: where they lie, or in `room`.
template <class E>
const E* panel(const RowWalk& walk, const Matrix& x, const Segment& segment, int64_t t, int64_t rows, int64_t column, int64_t columns, E* room, int64_t* ld) {
    const bool direct = x.type == type_for<E>();
    if (direct && !walk.gathers() && !walk.drops()) {
        *ld = x.width;
        return reinterpret_cast<const E*>(x.at((segment.start + t) * x.width + column));
    }
    *ld = columns;
    for (int64_t i = 0; i < rows; ++i) {
        const char* from = x.at(walk.source(segment, t + i) * x.width + column);
        E* to = room + i * columns;
        if (!direct || !walk.drops()) {
            load_block(x.type, from, to, columns);
        }
        if (walk.drops()) {
            lora_kernels<E>().drop(walk.drop_row(segment, t + i, column), direct ? reinterpret_cast<const E*>(from) : to, columns,
                                   static_cast<E>(walk.inverse()), to);
        }
    }
    return room;
}

// A whole matrix, or packed S, as E: where it lies, or converted. Nothing is rounded to the type of x: E is free here, and as exact as PEFT's float32 branch.
template <class E>
class Operand {
  public:
    Operand(Type type, const void* data, int64_t count) {
        if (type == type_for<E>()) {
            data_ = static_cast<const E*>(data);
            return;
        }
        room_.resize(static_cast<size_t>(count));
        load_block(type, data, room_.data(), count);
        data_ = room_.data();
    }
    const E* operator+(int64_t i) const { return data_ + i; }

  private:
    const E* data_;
    std::vector<E> room_;
};

// Packed S, in an op's result or in memory of the call's own.
struct Shrunk {
    Type type;
    const void* data;
    int64_t count;
};

// A call of `lora_forward` or `lora_backward`. What is unsafe is refused here; Python explains it (`_explain` in ops/lora.py).
struct Layer {
    Layer(const Tensor& x_tensor, const MaybeTensor& weight, const Tensor& a_tensor, const Tensor& bt_tensor, const Tensor& scales, const MaybeTensor& seeds,
          const MaybeTensor& row_keys, const MaybeTensor& index, const Integers& segments, double dropout, bool transposed);

    // bt [S, m], dense.
    Tensor rank_rows() const;

    Matrix x, a;
    bool lies_transposed;  // bt has the memory of a B [m, S], as PEFT keeps its lora_B: it is `transposed`, or a view of such a one
    Matrix bt;             // as it lies
    int64_t total, m;
    Segments given;
    std::vector<double> scale;
    RowWalk walk;
    const MaybeTensor& weight;
    int64_t longest = 0, widest = 0;  // rows and ranks of a client
    bool rounded = false, others = true;  // some clients' S is rounded (lora_rounded.h); some rank rows are of others, or of none
};

// The small way. `base`: y starts from it instead of from x W^T. y, s and the gradients are filled. A null gradient is not wanted.
void small_forward(const Layer& layer, const Matrix* base, const MaybeTensor& bias, const Tensor& y, const Tensor& s);
void small_backward(const Layer& layer, const Matrix& d_y, const Shrunk& s, const Tensor* d_x, const Tensor* d_a, const Tensor* d_bt);

// Type of S beside an x of `type`: that of the arithmetic.
inline Type shrunk_type(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

// scale [K] -> S in `shrunk_type`, walk.flat elements at `out`.
// rounded: clients whose S is rounded are skipped (lora_rounded.h makes theirs). Their part of the result stays as it is.
void shrink(const RowWalk& walk, const Matrix& x, const Matrix& rows, const std::vector<double>& scale, void* out, bool rounded = false);
void expand(const RowWalk& walk, const Matrix& out, const Shrunk& s, const Matrix& rows, bool rounded = false);
Tensor grouped_gram(const RowWalk& walk, const Shrunk& s, const Matrix& x, ScalarType dtype, bool rounded = false);

}  // namespace hetlora
