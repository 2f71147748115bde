// Between torch's tensors and the kernels: checks of memory safety (meaning is checked in Python), packed rows, and the split of work over threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <initializer_list>
#include <optional>
#include <vector>

#include "../types_torch.h"
#include "simd.h"

namespace hetlora {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Uninitialised, on the CPU; `lies_transposed`: a matrix that lies column by column. Not through the dispatcher, as torch::stable::new_empty goes: 1 us less.
inline Tensor empty(torch::headeronly::IntHeaderOnlyArrayRef sizes, ScalarType dtype, bool lies_transposed = false) {
    std::array<int64_t, 64> strides;
    STD_TORCH_CHECK(sizes.size() <= strides.size(), "hetlora: expected at most 64 dimensions, got ", sizes.size());
    int64_t stride = 1;
    for (size_t i = sizes.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= std::max<int64_t>(1, sizes[i]);
    }
    if (lies_transposed) {
        strides[0] = 1;
        strides[1] = std::max<int64_t>(1, sizes[0]);
    }
    AtenTensorHandle handle = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), static_cast<int32_t>(dtype),
                                                    aoti_torch_device_type_cpu(), 0, &handle));
    return Tensor(handle);
}

// Whether a matrix is the transpose of a dense one, as PEFT's lora_B.weight.t() is.
inline bool is_transposed(const Tensor& tensor) {
    return tensor.dim() == 2 && tensor.size(0) > 1 && tensor.size(1) > 1 && tensor.stride(0) == 1 && tensor.stride(1) == tensor.size(0);
}

// The tensor itself where it is contiguous, else a copy that is; the framework transposes several times slower than `transpose_block`.
inline Tensor dense(const char* name, const Tensor& tensor) {
    if (tensor.is_contiguous()) {
        return tensor;
    }
    STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
    if (!is_transposed(tensor)) {
        return torch::stable::contiguous(tensor);
    }
    const Tensor out = empty({tensor.size(0), tensor.size(1)}, tensor.scalar_type());
    transpose_block(size_of(type_of(name, tensor)), tensor.const_data_ptr(), tensor.size(1), tensor.size(0), const_cast<void*>(out.const_data_ptr()));
    return out;
}

// A dense [rows, width] matrix. `write_back` ends an op that wrote to a tensor which was not contiguous.
class Matrix {
  public:
    // lies_transposed: that of a matrix which is the transpose of a dense one (`is_transposed`), in memory [width, rows].
    Matrix(const char* name, const Tensor& tensor, bool lies_transposed = false) : Matrix(name, tensor, lies_transposed ? tensor : dense(name, tensor)) {
        STD_TORCH_CHECK(tensor.dim() >= 2, name, ": expected 2 dimensions, got ", tensor.dim());
        rows = tensor.size(tensor.dim() - 2);
        if (lies_transposed) {
            std::swap(rows, width);
        }
    }

    // A tensor of any leading shape.
    static Matrix flat(const char* name, const Tensor& tensor) {
        STD_TORCH_CHECK(tensor.dim() >= 1, name, ": expected a last dimension");
        Matrix out(name, tensor, tensor.is_contiguous() || !tensor.is_cpu() ? tensor : torch::stable::contiguous(tensor));
        out.rows = 1;
        for (int64_t i = 0; i + 1 < tensor.dim(); ++i) {
            out.rows *= tensor.size(i);
        }
        return out;
    }

    // Element i of the matrix read as one row after another.
    char* at(int64_t i) const { return data + i * size_of(type); }
    void write_back() {
        if (!tensor_.is_contiguous()) {
            torch::stable::copy_(tensor_, dense_);
        }
    }
    const Tensor& tensor() const { return dense_; }
    int64_t planes() const { return tensor_.dim() == 3 ? tensor_.size(0) : 1; }
    int64_t dim() const { return tensor_.dim(); }

    Type type;
    int64_t rows, width;
    char* data;

  private:
    Matrix(const char* name, const Tensor& tensor, const Tensor& dense) : tensor_(tensor), dense_(dense) {
        STD_TORCH_CHECK(tensor.is_cpu(), name, ": expected a CPU tensor");
        type = type_of(name, tensor);
        width = tensor.size(tensor.dim() - 1);
        data = static_cast<char*>(const_cast<void*>(dense_.const_data_ptr()));
    }

    Tensor tensor_, dense_;
};

inline std::vector<Matrix> matrices(const char* name, const Tensors& tensors, size_t expected, int64_t dim = 2) {
    STD_TORCH_CHECK(tensors.size() == expected, name, ": expected ", expected, " tensors, got ", tensors.size());
    std::vector<Matrix> out;
    out.reserve(tensors.size());
    for (const Tensor& tensor : tensors) {
        out.emplace_back(name, tensor);
        STD_TORCH_CHECK(tensor.dim() == dim, name, ": expected ", dim, " dimensions, got ", tensor.dim());
        STD_TORCH_CHECK(out.back().type == out.front().type, name, ": expected one element type");
    }
    return out;
}

// Ranks and first rows of K clients in M modules, from the flat list of the schemas. `rows[m]` is what the ranks of module m must sum to; -1: not known.
class Layout {
  public:
    Layout(const Integers& ranks, size_t modules, const Integers& rows) : modules_(static_cast<int64_t>(modules)), ranks_(ranks) {
        STD_TORCH_CHECK(modules == 0 ? ranks.empty() : ranks.size() % modules == 0, "ranks: expected a multiple of ", modules, " integers, got ", ranks.size());
        clients_ = modules == 0 ? 0 : static_cast<int64_t>(ranks.size() / modules);
        first_.resize(ranks.size());
        for (int64_t m = 0; m < modules_; ++m) {
            int64_t row = 0;
            for (int64_t k = 0; k < clients_; ++k) {
                const int64_t rank = this->rank(m, k);
                STD_TORCH_CHECK(rank >= 0 && rank < (int64_t{1} << 40), "ranks: expected integers >= 0, got ", rank);
                first_[m * clients_ + k] = row;
                row += rank;
            }
            STD_TORCH_CHECK(rows[m] < 0 || row == rows[m], "ranks: expected a sum of ", rows[m], " (the rows of module ", m, "), got ", row);
        }
    }

    int64_t modules() const { return modules_; }
    int64_t clients() const { return clients_; }
    int64_t rank(int64_t module, int64_t client) const { return ranks_[module * clients_ + client]; }
    int64_t first_row(int64_t module, int64_t client) const { return first_[module * clients_ + client]; }
    int64_t largest(int64_t module) const {
        int64_t out = 0;
        for (int64_t k = 0; k < clients_; ++k) {
            out = std::max(out, rank(module, k));
        }
        return out;
    }

  private:
    int64_t modules_, clients_;
    const Integers& ranks_;
    Integers first_;
};

inline Integers rows_of(const std::vector<Matrix>& list) {
    Integers out;
    for (const Matrix& each : list) {
        out.push_back(each.rows);
    }
    return out;
}

// `expected` numbers of any type as double.
inline std::vector<double> numbers(const char* name, const Tensor& tensor, int64_t expected) {
    STD_TORCH_CHECK(tensor.is_cpu() && tensor.numel() == expected, name, ": expected ", expected, " numbers on the CPU, got ", tensor.numel());
    const Tensor dense = tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor);
    std::vector<double> out(static_cast<size_t>(expected));
    const void* data = dense.const_data_ptr();
    const auto read = [&](auto* typed) { std::copy(typed, typed + expected, out.begin()); };
    switch (tensor.scalar_type()) {
        case ScalarType::Long: read(static_cast<const int64_t*>(data)); break;
        case ScalarType::Int: read(static_cast<const int32_t*>(data)); break;
        case ScalarType::Bool: read(static_cast<const bool*>(data)); break;
        default: load_block(type_of(name, tensor), data, out.data(), expected);
    }
    return out;
}

// Work below this many bytes for each thread is not worth waking it for.
constexpr int64_t kBytesPerThread = 64 * 1024;

inline int64_t part_count(int64_t tasks, int64_t bytes) {
    const int64_t threads = static_cast<int64_t>(torch::stable::get_num_threads());
    return std::max<int64_t>(1, std::min({threads, tasks, bytes / kBytesPerThread}));
}

// body(part, task) for every task, part p taking tasks p, p + parts, ...: neighbours cost about the same, so the parts do too. What a task computes must
// not depend on its part. The body must not throw: below torch 2.13 an exception in here reaches Python without its message.
template <class Body>
void for_tasks(int64_t parts, int64_t tasks, const Body& body) {
    if (parts == 1) {
        for (int64_t task = 0; task < tasks; ++task) {
            body(0, task);
        }
        return;
    }
    torch::stable::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
        for (int64_t part = begin; part < end; ++part) {
            for (int64_t task = part; task < tasks; task += parts) {
                body(part, task);
            }
        }
    });
}

}  // namespace hetlora
