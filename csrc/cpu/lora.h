// What the LoRA ops share: the arguments of a call checked for memory safety, and panels of rows in the type of the arithmetic.
#pragma once

#include "lora_kernels.h"
#include "tensors.h"

namespace hetlora {

struct Segment {
    int64_t client, row, rank, start, length, flat;  // first rank row; first of the client's rows in x (or in the index); first element of its S
};

// The arguments that every LoRA op takes (`_SEGMENT_ARGS` of the schemas).
struct Segments {
    std::optional<Tensor> seeds, row_keys, index;
    const std::vector<int64_t>& ranks;
    const std::vector<int64_t>& starts;
    const std::vector<int64_t>& lengths;
    double dropout;

    Segments without_dropout() const { return {std::nullopt, std::nullopt, index, ranks, starts, lengths, 0.0}; }
};

// A plan [4, K] as the layer's ops take it: ranks, first rows, rows and scales of the clients.
struct Lists {
    explicit Lists(const Tensor& plan);
    std::vector<int64_t> ranks, starts, lengths;
    std::vector<double> scale;
};

// `Segments` against x with `rows` rows and packed factors with `factor_rows`.
class Plan {
  public:
    Plan(const Segments& given, int64_t rows, int64_t factor_rows);

    // Row of x that holds row t of a segment.
    int64_t source(const Segment& segment, int64_t t) const { return index_ ? index_[segment.start + t] : segment.start + t; }
    bool gathers() const { return index_ != nullptr; }
    bool drops() const { return seeds_ != nullptr; }
    DropRow drop_row(const Segment& segment, int64_t t, int64_t column) const {
        return {static_cast<uint64_t>(seeds_[segment.client]), static_cast<uint64_t>(keys_[segment.start + t]), column, threshold_};
    }
    double inverse() const { return inverse_; }

    std::vector<Segment> segments;  // those with work
    int64_t flat = 0, active_rows = 0;

  private:
    const int64_t* integers(const char* name, const std::optional<Tensor>& tensor, int64_t at_least, std::optional<Tensor>* held);

    std::optional<Tensor> seeds_held_, keys_held_, index_held_;
    const int64_t *seeds_ = nullptr, *keys_ = nullptr, *index_ = nullptr;
    uint32_t threshold_ = 0;
    double inverse_ = 1;
};

template <class E>
constexpr Type type_for() {
    return sizeof(E) == 8 ? Type::f64 : Type::f32;
}

// Rows [t, t + rows) of a segment, columns [column, column + columns), as E with the dropout of `plan` applied: where they lie, or in `room`.
template <class E>
const E* panel(const Plan& plan, const Matrix& x, const Segment& segment, int64_t t, int64_t rows, int64_t column, int64_t columns, E* room, int64_t* ld) {
    const bool direct = x.type == type_for<E>();
    if (direct && !plan.gathers() && !plan.drops()) {
        *ld = x.width;
        return reinterpret_cast<const E*>(x.at((segment.start + t) * x.width + column));
    }
    *ld = columns;
    for (int64_t i = 0; i < rows; ++i) {
        const char* from = x.at(plan.source(segment, t + i) * x.width + column);
        E* to = room + i * columns;
        if (!direct || !plan.drops()) {
            load_block(x.type, from, to, columns);
        }
        if (plan.drops()) {
            lora_kernels<E>().drop(plan.drop_row(segment, t + i, column), direct ? reinterpret_cast<const E*>(from) : to, columns,
                                   static_cast<E>(plan.inverse()), to);
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

// Type of S beside an x of `type`: that of the arithmetic.
inline Type shrunk_type(Type type) { return type == Type::f64 ? Type::f64 : Type::f32; }

// scale [K] -> S in `shrunk_type`, plan.flat elements at `out`.
void shrink(const Plan& plan, const Matrix& x, const Matrix& rows, const std::vector<double>& scale, void* out);
void expand(const Plan& plan, const Matrix& out, const Shrunk& s, const Matrix& rows);
Tensor grouped_gram(const Plan& plan, const std::vector<int64_t>& ranks, const Shrunk& s, const Matrix& x, ScalarType dtype);

}  // namespace hetlora
