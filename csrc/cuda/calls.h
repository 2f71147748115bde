// What the bindings (the .cpp files of csrc/cuda) share: checks that memory safety needs, contiguous copies, and one op's launches on the caller's stream.
// PyTorch's stable ABI, target 2.10: one library for every later release. Meaning is checked in hetlora_kernels/ops.
#pragma once
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <optional>

#include "../types_torch.h"
#include "launch.h"

#ifndef HETLORA_NAMESPACE  // the tests register the same code, run on the host, under another name
#define HETLORA_NAMESPACE hetlora
#define HETLORA_DISPATCH_KEY CUDA
#endif

namespace {

using hetlora::Integers;
using hetlora::MaybeTensor;
using hetlora::Module;
using hetlora::sums_of;
using hetlora::TableBuilder;
using hetlora::Tensors;
using hetlora::Type;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline Type type_of(const Tensor& t) { return hetlora::type_of("hetlora", t); }
inline ScalarType scalar_of(Type type) { return type == Type::f64 ? ScalarType::Double : ScalarType::Float; }

inline void check(cudaError_t error, const char* op) { STD_TORCH_CHECK(error == cudaSuccess, "hetlora::", op, ": ", cudaGetErrorString(error)); }

inline Tensors contiguous(const Tensors& tensors) {
    Tensors out;
    out.reserve(tensors.size());
    for (const Tensor& t : tensors) out.push_back(torch::stable::contiguous(t));
    return out;
}

// Rows [*, d] of one type, contiguous; `like` gives the type.
inline void check_rows(const Tensors& tensors, const Tensor& like, const char* name) {
    for (const Tensor& t : tensors) {
        STD_TORCH_CHECK(t.dim() == 2 && t.is_contiguous() && t.size(1) < INT32_MAX && t.size(0) < INT32_MAX, name, ": expected contiguous matrices");
        STD_TORCH_CHECK(t.scalar_type() == like.scalar_type(), name, ": expected tensors of one type");
    }
}

inline void check_count(size_t got, size_t expected, const char* name) {
    STD_TORCH_CHECK(got == expected, name, ": expected ", expected, " entries, got ", got);
}

inline int clients_of(const Integers& ranks, size_t modules) {
    STD_TORCH_CHECK(modules > 0 && modules <= 65535 && ranks.size() % modules == 0, "ranks: expected one list for each of 1 to 65535 modules");
    return static_cast<int>(ranks.size() / modules);
}

// Whether every row of every one of `tensors` starts at a multiple of 16 bytes, in steps of one access of `type`.
template <class... Rest>
bool aligned(Type type, int64_t width, const Rest&... tensors) {
    const bool bases = ((reinterpret_cast<uintptr_t>(tensors.const_data_ptr()) % 16 == 0) && ...);
    return bases && width % (16 / hetlora::size_of(type)) == 0;
}

#ifdef HETLORA_EMULATOR
struct OnDevice {
    explicit OnDevice(const Tensor&) {}
    cudaStream_t stream = nullptr;
};
#else
struct OnDevice {
    explicit OnDevice(const Tensor& like) : guard(like.get_device_index()) {
        void* current = nullptr;
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &current) == 0, "hetlora: no CUDA stream");
        stream = static_cast<cudaStream_t>(current);
    }
    torch::stable::accelerator::DeviceGuard guard;
    cudaStream_t stream;
};
#endif

// One op's launches: the table is built with `layout` and `module`, then uploaded by `start`.
class Launch {
  public:
    Launch(const Tensor& like, int clients, const char* op) : like_(like), op_(op), device_(like), builder_(clients) {}

    int layout(const std::vector<int>& values) { return builder_.layout(values); }

    // `tiles`: items of this module.
    void module(const Module& module, int64_t tiles) {
        builder_.module(module);
        items_ = std::max(items_, tiles);
    }

    const HetloraCall* start() {
        bytes_ = builder_.bytes();
        table_ = workspace(static_cast<int64_t>(bytes_.size()), ScalarType::Byte);
        void* device = table_->mutable_data_ptr();
        STD_TORCH_CHECK(items_ < int64_t(INT32_MAX) * 8, op_, ": too many rows for one launch");
        call_ = {bytes_.data(), bytes_.size(), device, builder_.at(device), builder_.modules(), items_, device_.stream};
        check(hetlora_upload(&call_), op_);
        return &call_;
    }

    // From torch's allocator, in stream order: it may be released as soon as the launches are queued.
    Tensor workspace(int64_t elements, ScalarType type) const { return torch::stable::new_empty(like_, {std::max<int64_t>(elements, 1)}, type); }

  private:
    const Tensor& like_;
    const char* op_;
    OnDevice device_;
    TableBuilder builder_;
    std::vector<unsigned char> bytes_;
    std::optional<Tensor> table_;
    HetloraCall call_{};
    int64_t items_ = 0;
};

// offsets of one module, checked against its rows.
inline std::vector<int> checked_offsets(const Integers& ranks, size_t module, int clients, int64_t rows) {
    const int64_t* own = ranks.data() + module * clients;
    int64_t total = 0;
    for (int k = 0; k < clients; ++k) {
        STD_TORCH_CHECK(own[k] >= 0 && own[k] < INT32_MAX, "ranks: expected integers >= 0");
        total += own[k];
    }
    STD_TORCH_CHECK(total < INT32_MAX && (rows < 0 || total == rows), "ranks: expected a sum of ", rows, ", got ", total);
    return hetlora::offsets_of(own, clients);
}

// offsets [K + 1], then the first tail row of each client [K]; without cuts nothing is a tail.
inline std::vector<int> cut_layout(const Integers& ranks, const Integers& keep, size_t module, int clients, int64_t rows) {
    std::vector<int> values = checked_offsets(ranks, module, clients, rows);
    for (int k = 0; k < clients; ++k) {
        const int64_t rank = ranks[module * clients + k], cut = keep.empty() ? rank : keep[module * clients + k];
        values.push_back(values[k] + static_cast<int>(std::clamp<int64_t>(cut, 0, rank)));
    }
    return values;
}

inline int64_t largest(const Integers& ranks, size_t module, int clients) {
    int64_t out = 0;
    for (int k = 0; k < clients; ++k) out = std::max(out, ranks[module * clients + k]);
    return out;
}

inline int64_t items_of(int64_t rows, int64_t width, Type type) { return rows * hetlora::divide_up(width, hetlora_chunk(type)); }

}  // namespace
