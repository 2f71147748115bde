// aggregate_: out[i] = sum over the clients k with r_k > i of weights[k] * rows_k[i], for all modules in one call; and accumulate_, one client at a time.
//
// A task owns kTile consecutive elements of one module's result. It keeps their sums in L1 and sweeps over the clients in order, four at a time: each
// element of each upload is read once from memory, and the sums are read and written in L1 once for four uploads.
// The sum over clients is a plain chain in client order, so the result does not depend on tiles, fours or threads, and
// aggregate_ equals accumulate_ of the same uploads to the bit. Bytes: the uploads once, the result once.
#include "tensors.h"

namespace hetlora {
namespace {

constexpr int64_t kTile = 4096;
constexpr int kFan = 4;

struct Tile {
    int64_t module, begin;
};

constexpr int64_t kStrip = 64;

// sums[i] += weights[0] from[0][i] + ... for `count` sources and n elements.
template <int count, class T, class Sum>
HETLORA_INLINE void add_strip(Sum* __restrict sums, const T* const* from, const Sum* weights, int64_t n) {
    const T* source[count];
    Sum weight[count];
    for (int j = 0; j < count; ++j) {
        source[j] = from[j];
        weight[j] = weights[j];
    }
    for (int64_t i = 0; i < n; ++i) {
        Sum sum = sums[i];
        for (int j = 0; j < count; ++j) {
            sum += weight[j] * widen<Sum>(source[j][i]);
        }
        sums[i] = sum;
    }
}

// What is fetched meanwhile: `count` sources at the places of those that are added.
struct Next {
    const void* from[kFan];
    int count = 0;
};

// The same in strips, while others are fetched: uploads are many short streams, which the processor's own prefetcher does not follow.
template <int count, class T, class Sum>
HETLORA_INLINE void add_count(Sum* sums, const void* const* from, const Sum* weights, const Next& next, int64_t n) {
    const T* source[count];
    for (int j = 0; j < count; ++j) {
        source[j] = static_cast<const T*>(from[j]);
    }
    for (int64_t at = 0; at < n; at += kStrip) {
        for (int j = 0; j < next.count; ++j) {
            for (int64_t line = 0; line < kStrip; line += 64 / static_cast<int64_t>(sizeof(T))) {
                __builtin_prefetch(static_cast<const T*>(next.from[j]) + at + line, 0, 2);
            }
        }
        if (at + kStrip <= n) {
            add_strip<count>(sums + at, source, weights, kStrip);
        } else {
            add_strip<count>(sums + at, source, weights, n - at);
        }
        for (int j = 0; j < count; ++j) {
            source[j] += kStrip;
        }
    }
}

template <class T, class Sum>
HETLORA_INLINE void add(Sum* sums, const void* const* from, const Sum* weights, int count, const Next& next, int64_t n) {
    switch (count) {
        case 1: return add_count<1, T>(sums, from, weights, next, n);
        case 2: return add_count<2, T>(sums, from, weights, next, n);
        case 3: return add_count<3, T>(sums, from, weights, next, n);
        default: return add_count<kFan, T>(sums, from, weights, next, n);
    }
}

HETLORA_CLONES void add_scaled(Type type, float* sums, const void* const* from, const float* weights, int count, const Next& next, int64_t n) {
    HETLORA_FOR_TYPE(type, T, add<T>(sums, from, weights, count, next, n));
}
HETLORA_CLONES void add_scaled(Type type, double* sums, const void* const* from, const double* weights, int count, const Next& next, int64_t n) {
    HETLORA_FOR_TYPE(type, T, add<T>(sums, from, weights, count, next, n));
}

// What a part needs besides the tile: the clients that own some of it.
template <class Sum>
struct Owners {
    std::vector<const void*> from;
    std::vector<Sum> weights;
    Integers counts;
    explicit Owners(int64_t clients) : from(clients), weights(clients), counts(clients) {}
};

template <class Sum>
struct Module {
    const Matrix *out, *rows, *keep;
    const Layout* layout;
    const Sum* weights;                // [K]
    std::vector<Sum> owner_weight;     // [R], total weight of the clients that own a row; empty: do not divide
    int64_t index, owned;              // owned: elements that some client owns
};

// Owners first .. first + size; those that own less of the tile drop out on the way, the order of the others stays.
template <class Sum>
void add_group(Type type, Sum* sums, const Owners<Sum>& owners, int64_t first, int64_t size, int64_t count) {
    for (int64_t at = 0;;) {
        const void* from[kFan];
        Sum weights[kFan];
        int64_t end = kTile;
        int active = 0;
        for (int64_t j = first; j < first + size; ++j) {
            if (owners.counts[j] > at) {
                from[active] = static_cast<const char*>(owners.from[j]) + at * size_of(type);
                weights[active++] = owners.weights[j];
                end = std::min(end, owners.counts[j]);
            }
        }
        if (active == 0) {
            return;
        }
        Next next;
        for (int64_t j = first + size; j < std::min(count, first + size + kFan); ++j) {
            if (owners.counts[j] > at) {
                next.from[next.count++] = static_cast<const char*>(owners.from[j]) + at * size_of(type);
            }
        }
        add_scaled(type, sums + at, from, weights, active, next, end - at);
        at = end;
    }
}

template <class Sum>
void sum_tile(const Module<Sum>& module, int64_t begin, int64_t n, Owners<Sum>& owners, Sum* sums) {
    const int64_t width = module.rows->width;
    int64_t count = 0;
    for (int64_t k = 0; k < module.layout->clients(); ++k) {
        const int64_t have = module.layout->rank(module.index, k) * width - begin;
        if (have > 0) {
            owners.from[count] = module.rows->at(module.layout->first_row(module.index, k) * width + begin);
            owners.weights[count] = module.weights[k];
            owners.counts[count++] = std::min(have, n);
        }
    }
    std::fill(sums, sums + n, Sum{0});
    for (int64_t s = 0; s < count; s += kFan) {
        add_group(module.rows->type, sums, owners, s, std::min<int64_t>(kFan, count - s), count);
    }
}

template <class Sum>
void finish_tile(const Module<Sum>& module, int64_t begin, int64_t n, Sum* sums) {
    const int64_t width = module.rows->width, owned = std::clamp<int64_t>(module.owned - begin, 0, n);
    for (int64_t i = 0; i < owned && !module.owner_weight.empty();) {
        const int64_t row = (begin + i) / width, end = std::min(owned, (row + 1) * width - begin);
        const Sum total = module.owner_weight[row];
        for (; i < end; ++i) {
            sums[i] = total != 0 ? sums[i] / total : Sum{0};
        }
    }
    if (module.keep != nullptr && owned < n) {
        load_block(module.keep->type, module.keep->at(begin + owned), sums + owned, n - owned);
    }
    store_block(module.out->type, module.out->at(begin), sums, n);
}

template <class Sum>
void run(std::vector<Module<Sum>>& modules, const std::vector<Tile>& tiles, int64_t bytes) {
    const int64_t count = static_cast<int64_t>(tiles.size()), parts = part_count(count, bytes);
    std::vector<Owners<Sum>> scratch(static_cast<size_t>(parts), Owners<Sum>(modules.empty() ? 0 : modules[0].layout->clients()));
    for_tasks(parts, count, [&](int64_t part, int64_t task) {
        const Module<Sum>& module = modules[tiles[task].module];
        const int64_t begin = tiles[task].begin, n = std::min(kTile, module.out->rows * module.out->width - begin);
        alignas(64) Sum sums[kTile];
        sum_tile(module, begin, n, scratch[part], sums);
        finish_tile(module, begin, n, sums);
    });
}

template <class Sum>
void aggregate_as(std::vector<Matrix>& outs, std::vector<Matrix>& rows, std::vector<Matrix>& keep, const Layout& layout, const std::vector<double>& weights,
                  bool divide) {
    std::vector<Sum> table(weights.size());  // [M][K]
    std::vector<Module<Sum>> modules;
    std::vector<Tile> tiles;
    int64_t bytes = 0;
    for (int64_t m = 0; m < layout.modules(); ++m) {
        Sum* own = table.data() + m * layout.clients();
        Module<Sum> module{&outs[m], &rows[m], keep.empty() ? nullptr : &keep[m], &layout, own, {}, m, layout.largest(m) * rows[m].width};
        module.owner_weight.resize(divide ? static_cast<size_t>(layout.largest(m)) : 0);
        for (int64_t k = 0; k < layout.clients(); ++k) {
            own[k] = static_cast<Sum>(weights[k * layout.modules() + m]);
            for (int64_t i = 0; divide && i < layout.rank(m, k); ++i) {
                module.owner_weight[i] += own[k];
            }
        }
        modules.push_back(std::move(module));
        for (int64_t begin = 0; begin < outs[m].rows * outs[m].width; begin += kTile) {
            tiles.push_back({m, begin});
        }
        bytes += rows[m].rows * rows[m].width * size_of(rows[m].type) + outs[m].rows * outs[m].width * size_of(outs[m].type);
    }
    run(modules, tiles, bytes);
}

void aggregate(const Tensors& out_list, const Tensors& row_list, const Tensor& weights, const Tensors& keep_list, const Integers& rank_list, bool owners) {
    std::vector<Matrix> rows = matrices("rows", row_list, row_list.size());
    std::vector<Matrix> outs = matrices("out", out_list, rows.size());
    std::vector<Matrix> keep = matrices("keep", keep_list, keep_list.empty() ? 0 : rows.size());
    const Integers ranks = expanded("ranks", rank_list, rows.size());
    const Layout layout(ranks, rows.size(), rows_of(rows));
    for (int64_t m = 0; m < layout.modules(); ++m) {
        STD_TORCH_CHECK(outs[m].width == rows[m].width, "out: expected width ", rows[m].width, ", got ", outs[m].width);
        STD_TORCH_CHECK(outs[m].rows >= layout.largest(m), "out: expected at least ", layout.largest(m), " rows, got ", outs[m].rows);
        STD_TORCH_CHECK(keep.empty() || (keep[m].rows == outs[m].rows && keep[m].width == outs[m].width), "keep: expected the shape of out");
    }
    const std::vector<double> table = numbers("weights", weights, layout.clients() * layout.modules());
    if (!rows.empty() && rows[0].type == Type::f64) {
        aggregate_as<double>(outs, rows, keep, layout, table, owners);
    } else {
        aggregate_as<float>(outs, rows, keep, layout, table, owners);
    }
    for (Matrix& out : outs) {
        out.write_back();
    }
}

template <class Sum>
void accumulate_as(std::vector<Matrix>& totals, const std::vector<Matrix>& rows, const std::vector<double>& weights) {
    std::vector<Tile> tiles;
    int64_t bytes = 0;
    for (size_t m = 0; m < rows.size(); ++m) {
        for (int64_t begin = 0; begin < rows[m].rows * rows[m].width; begin += kTile) {
            tiles.push_back({static_cast<int64_t>(m), begin});
        }
        bytes += rows[m].rows * rows[m].width * (size_of(rows[m].type) + 2 * static_cast<int64_t>(sizeof(Sum)));
    }
    const int64_t count = static_cast<int64_t>(tiles.size());
    for_tasks(part_count(count, bytes), count, [&](int64_t, int64_t task) {
        const Matrix& from = rows[tiles[task].module];
        const int64_t begin = tiles[task].begin, n = std::min(kTile, from.rows * from.width - begin);
        const void* source = from.at(begin);
        const Sum weight = static_cast<Sum>(weights[tiles[task].module]);
        add_scaled(from.type, reinterpret_cast<Sum*>(totals[tiles[task].module].at(begin)), &source, &weight, 1, Next{}, n);
    });
}

void accumulate(const Tensors& total_list, const Tensors& row_list, const Tensor& weights) {
    std::vector<Matrix> rows = matrices("rows", row_list, row_list.size());
    std::vector<Matrix> totals = matrices("total", total_list, rows.size());
    for (size_t m = 0; m < rows.size(); ++m) {
        STD_TORCH_CHECK(totals[m].width == rows[m].width && totals[m].rows >= rows[m].rows, "rows: expected at most ", totals[m].rows, " rows of width ",
                        totals[m].width, ", got ", rows[m].rows, " of ", rows[m].width);
        STD_TORCH_CHECK(totals[m].type == Type::f32 || totals[m].type == Type::f64, "total: expected float32 or float64");
    }
    const std::vector<double> table = numbers("weights", weights, static_cast<int64_t>(rows.size()));
    if (!totals.empty() && totals[0].type == Type::f64) {
        accumulate_as<double>(totals, rows, table);
    } else {
        accumulate_as<float>(totals, rows, table);
    }
    for (Matrix& total : totals) {
        total.write_back();
    }
}

}  // namespace
}  // namespace hetlora

STABLE_TORCH_LIBRARY_IMPL(hetlora, CPU, library) {
    library.impl("aggregate_", TORCH_BOX(&hetlora::aggregate));
    library.impl("accumulate_", TORCH_BOX(&hetlora::accumulate));
}
