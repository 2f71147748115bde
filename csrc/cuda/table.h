// The table of one launch: what a kernel needs to know of every module and client, built on the host and uploaded as kernel arguments (upload.cu).
#pragma once
#include <cstdint>
#include <cstring>
#include <vector>

#include "../types.h"

#ifdef __CUDACC__
#define HETLORA_HOST_DEVICE __host__ __device__
#else
#define HETLORA_HOST_DEVICE
#endif

namespace hetlora {

// One module (or one factor of one module). What p holds is the op's business.
struct Module {
    const void* p[5];
    int64_t first;  // index of its first partial sum or plane in the workspace
    int width;      // d, columns
    int rows;       // rows the op visits
    int layout;     // which of the distinct layouts
    int aligned;    // 1: every row of every pointer starts at a multiple of 16 bytes
};

// Device view of a table. A layout is `stride` integers: offsets [K + 1], then whatever the op added for each client.
struct Table {
    const Module* modules;
    const int* layouts;
    int stride;
    int clients;
};

// Host side. Layouts that are equal are stored once: with the same ranks in every module, 1000 clients take 4 KB however many modules there are.
class TableBuilder {
  public:
    explicit TableBuilder(int clients) : clients_(clients) {}

    // Index of the layout with these integers, added when it is new.
    int layout(const std::vector<int>& values) {
        stride_ = static_cast<int>(values.size());
        for (size_t at = 0; at + stride_ <= layouts_.size() && stride_; at += stride_)
            if (std::memcmp(&layouts_[at], values.data(), stride_ * sizeof(int)) == 0) return static_cast<int>(at / stride_);
        layouts_.insert(layouts_.end(), values.begin(), values.end());
        return static_cast<int>(layouts_.size() / stride_) - 1;
    }

    void module(const Module& module) { modules_.push_back(module); }

    int modules() const { return static_cast<int>(modules_.size()); }

    // The bytes to upload: modules, then layouts; a multiple of 16.
    std::vector<unsigned char> bytes() const {
        const size_t head = modules_.size() * sizeof(Module), tail = layouts_.size() * sizeof(int);
        std::vector<unsigned char> out((head + tail + 15) / 16 * 16, 0);
        if (head) std::memcpy(out.data(), modules_.data(), head);
        if (tail) std::memcpy(out.data() + head, layouts_.data(), tail);
        return out;
    }

    Table at(const void* device) const {
        const auto* modules = static_cast<const Module*>(device);
        return {modules, reinterpret_cast<const int*>(modules + modules_.size()), stride_, clients_};
    }

  private:
    static_assert(sizeof(Module) % alignof(int) == 0);
    std::vector<Module> modules_;
    std::vector<int> layouts_;
    int stride_ = 0, clients_;
};

// offsets [K + 1] of one module's ranks.
inline std::vector<int> offsets_of(const int64_t* ranks, int clients) {
    std::vector<int> out(clients + 1, 0);
    for (int k = 0; k < clients; ++k) out[k + 1] = out[k] + static_cast<int>(ranks[k]);
    return out;
}

inline int divide_up(int64_t a, int64_t b) { return static_cast<int>((a + b - 1) / b); }

// What the products of a Gram tile come in, rows: bands of tensor cores for 16-bit rows in float32, else squares of sums that a thread holds.
HETLORA_HOST_DEVICE constexpr int gram_unit(Type rows, Type result) { return result == Type::f64 ? 4 : rows == Type::f32 ? 8 : 16; }
// Rows of the tiles of a client of this rank, and tiles along a side: at most 64 rows, 32 in float64, and no more than its rank needs.
HETLORA_HOST_DEVICE constexpr int gram_tiles_per_side(int rank, int unit) { return unit == 4 ? (rank + 31) / 32 : (rank + 63) / 64; }
HETLORA_HOST_DEVICE constexpr int gram_side(int rank, int unit) {
    const int tiles = gram_tiles_per_side(rank, unit), rows = tiles ? (rank + tiles - 1) / tiles : 0;
    return (rows + unit - 1) / unit * unit;
}

// Layout of the Gram kernels: offsets [K + 1], tiles before each client [K + 1], result offsets [K], plane offsets [K].
struct GramLayout {
    std::vector<int> values;
    int tiles = 0;
    int64_t plane = 0, result = 0;  // elements of one split's planes, of the result
};

inline GramLayout gram_layout(const std::vector<int>& offsets, int unit) {
    GramLayout out;
    const int clients = static_cast<int>(offsets.size()) - 1;
    std::vector<int> tiles(1, 0), results, planes;
    for (int k = 0; k < clients; ++k) {
        const int rank = offsets[k + 1] - offsets[k], across = gram_tiles_per_side(rank, unit), own = across * (across + 1) / 2;
        results.push_back(static_cast<int>(out.result));
        planes.push_back(static_cast<int>(out.plane));
        out.tiles += own;
        out.plane += int64_t(own) * gram_side(rank, unit) * gram_side(rank, unit);
        out.result += int64_t(rank) * rank;
        tiles.push_back(out.tiles);
    }
    out.values = offsets;
    for (const auto* part : {&tiles, &results, &planes}) out.values.insert(out.values.end(), part->begin(), part->end());
    return out;
}

}  // namespace hetlora
