// gram, delta_norms, tail_norms: norms of low-rank updates from products of rank rows, for all modules and clients in one call.
//
// One client of one module is a unit of work; the most expensive units are handed out first, each to the part with the least so far. A unit walks its
// columns in panels of about 512: the panel stays in L2 while every pair of row groups is multiplied from it, so the rows are read from memory once. A pair of
// groups is I x J dot products held in registers as vectors along the columns (no rank is padded, whatever it is); the panel's sums leave them in double.
// Rows that are not float32 (double when exact) are converted into the panel first. Bytes: the rows once; operations: r (r + 1) / 2 multiply-adds a column,
// which exceeds the time of the read from about r = 16 on (8 bytes of row a multiply-add and rank).
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "tensors.h"

namespace hetlora {
namespace {

constexpr int64_t kPanel = 768;  // most columns of a panel

template <class E, int W>
struct VectorOf {
    typedef E type __attribute__((vector_size(W * sizeof(E)), aligned(sizeof(E)), may_alias));
};

#if defined(__clang__)
#define HETLORA_SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define HETLORA_SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, decltype((a) < (b)){i, j, k, l})
#endif

// The W lanes added down to four, by halves.
template <class E, int W>
HETLORA_INLINE typename VectorOf<E, 4>::type four_lanes(const typename VectorOf<E, W>::type& v) {
    if constexpr (W == 4) {
        return v;
    } else {
        typedef typename VectorOf<E, W / 2>::type Half;
        Half halves[2];
        std::memcpy(halves, &v, sizeof halves);
        const Half sum = halves[0] + halves[1];
        return four_lanes<E, W / 2>(sum);
    }
}

// out[j] += the sum of the lanes of sums[j], in double. All J at once, as columns of a transposed block: lane by lane took longer than the products at
// widths below 600.
template <class E, int W, int J>
HETLORA_INLINE void add_lanes(const typename VectorOf<E, W>::type* sums, double* out) {
    typedef typename VectorOf<E, 4>::type Four;
    Four v[4] = {};
    for (int j = 0; j < J; ++j) {
        v[j] = four_lanes<E, W>(sums[j]);
    }
    const Four low = HETLORA_SHUFFLE(v[0], v[1], 0, 4, 2, 6) + HETLORA_SHUFFLE(v[0], v[1], 1, 5, 3, 7);
    const Four high = HETLORA_SHUFFLE(v[2], v[3], 0, 4, 2, 6) + HETLORA_SHUFFLE(v[2], v[3], 1, 5, 3, 7);
    const Four all = HETLORA_SHUFFLE(low, high, 0, 1, 4, 5) + HETLORA_SHUFFLE(low, high, 2, 3, 6, 7);
    for (int j = 0; j < J; ++j) {
        out[j] += static_cast<double>(all[j]);
    }
}

// out[i * ld_out + j] += x_i . y_j over n columns (a multiple of W), rows `ld` apart; fetches x's rows `ahead` columns on, unless that is 0.
template <class E, int W, int I, int J>
HETLORA_INLINE void products(const E* x, const E* y, int64_t ld, int64_t n, int64_t ahead, double* out, int64_t ld_out) {
    typedef typename VectorOf<E, W>::type V;
    V sums[I][J] = {};
    for (int64_t c = 0; c < n; c += W) {
        if (ahead != 0) {
            for (int i = 0; i < I; ++i) {
                __builtin_prefetch(x + i * ld + c + ahead, 0, 2);
            }
        }
        V right[J];
        for (int j = 0; j < J; ++j) {
            right[j] = *reinterpret_cast<const V*>(y + j * ld + c);
        }
        for (int i = 0; i < I; ++i) {
            const V left = *reinterpret_cast<const V*>(x + i * ld + c);
            for (int j = 0; j < J; ++j) {
                sums[i][j] += left * right[j];
            }
        }
    }
    for (int i = 0; i < I; ++i) {
        add_lanes<E, W, J>(sums[i], out + i * ld_out);
    }
}

// rows i .. i + I of the block row against rows j .. of the panel: whole groups of G, then what is left.
template <class E, int W, int G, int I>
HETLORA_INLINE void block_row(const E* rows, int64_t i, int64_t rank, int64_t ld, int64_t n, int64_t ahead, double* out) {
    int64_t j = i;
    for (; j + G <= rank; j += G) {
        products<E, W, I, G>(rows + i * ld, rows + j * ld, ld, n, j == i ? ahead : 0, out + i * rank + j, rank);
    }
    const E *x = rows + i * ld, *y = rows + j * ld;
    ahead = j == i ? ahead : 0;
    switch (rank - j) {
        case 1:
            return products<E, W, I, 1>(x, y, ld, n, ahead, out + i * rank + j, rank);
        case 2:
            return products<E, W, I, 2>(x, y, ld, n, ahead, out + i * rank + j, rank);
        case 3:
            return products<E, W, I, 3>(x, y, ld, n, ahead, out + i * rank + j, rank);
    }
}

// The upper block triangle of rows rows^T over one panel, in groups of G <= 4 rows.
template <class E, int W, int G>
HETLORA_INLINE void panel_products(const E* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, double* out) {
    int64_t i = 0;
    for (; i + G <= rank; i += G) {
        block_row<E, W, G, G>(rows, i, rank, ld, n, ahead, out);
    }
    switch (rank - i) {
        case 1:
            return block_row<E, W, G, 1>(rows, i, rank, ld, n, ahead, out);
        case 2:
            return block_row<E, W, G, 2>(rows, i, rank, ld, n, ahead, out);
        case 3:
            return block_row<E, W, G, 3>(rows, i, rank, ld, n, ahead, out);
    }
}

// One function per instruction set rather than clones, because the number of registers decides the group: 16 sums need AVX-512's 32 registers.
constexpr int kLanes = 16;  // columns a panel is a multiple of, whatever the instruction set
#define HETLORA_PANEL(name, target, width, group)                                                                    \
    target void name(const float* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, double* out) {                          \
        panel_products<float, width, group>(rows, rank, ld, n, ahead, out);                                                 \
    }                                                                                                                \
    target void name(const double* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, double* out) {                         \
        panel_products<double, (width > 4 ? width / 2 : 4), group>(rows, rank, ld, n, ahead, out);                                            \
    }
HETLORA_PANEL(panel_base, , 4, 3)
#if defined(__x86_64__) && defined(__GNUC__)
HETLORA_PANEL(panel_avx2, __attribute__((target("avx2,fma"))), 8, 3)
HETLORA_PANEL(panel_avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), 16, 4)
#endif

template <class E>
using PanelKernel = void (*)(const E*, int64_t, int64_t, int64_t, int64_t, double*);

template <class E>
PanelKernel<E> panel_kernel() {
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
        return panel_avx512;
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return panel_avx2;
    }
#endif
    return panel_base;
}

// Lower triangle from the upper one.
void mirror(double* gram, int64_t rank) {
    for (int64_t i = 0; i < rank; ++i) {
        for (int64_t j = 0; j < i; ++j) {
            gram[i * rank + j] = gram[j * rank + i];
        }
    }
}

// Columns of one panel: equal parts of about 512, so that none is so short that adding up its registers takes longer than filling them.
int64_t panel_columns(int64_t width) {
    const int64_t parts = std::max<int64_t>(1, (width + 256) / 512);
    return std::min(kPanel, ((width + parts - 1) / parts + kLanes - 1) / kLanes * kLanes);
}

// gram [rank, rank] = rows rows^T of the rows from `first`; fetches those from `next`. `panel` holds rank x kPanel elements.
template <class E>
void gram_of(const Matrix& matrix, int64_t first, int64_t rank, int64_t next, E* panel, double* gram) {
    static const PanelKernel<E> kernel = panel_kernel<E>();
    const bool direct = size_of(matrix.type) == static_cast<int64_t>(sizeof(E));
    std::fill(gram, gram + rank * rank, 0.0);
    const int64_t step = panel_columns(matrix.width);
    for (int64_t begin = 0; begin < matrix.width; begin += step) {
        const int64_t n = std::min(step, matrix.width - begin), whole = n / kLanes * kLanes;
        if (direct && whole == n) {
            const int64_t ahead = begin + 2 * step <= matrix.width ? step : next > first ? (next - first) * matrix.width - begin : 0;
            kernel(reinterpret_cast<const E*>(matrix.at(first * matrix.width + begin)), rank, matrix.width, n, ahead, gram);
            continue;
        }
        const int64_t padded = (n + kLanes - 1) / kLanes * kLanes;
        for (int64_t i = 0; i < rank; ++i) {
            load_block(matrix.type, matrix.at((first + i) * matrix.width + begin), panel + i * kPanel, n);
            std::fill(panel + i * kPanel + n, panel + i * kPanel + padded, E{0});
        }
        kernel(panel, rank, kPanel, padded, 0, gram);
    }
    mirror(gram, rank);
}

struct Unit {
    int64_t module, client, rank, first;
    double cost;
    int64_t next;  // first row of the part's next unit where that is of the same module, else `first`
};

// body(unit, panel, grams) for every unit, with room for a panel and `grams` Gram matrices of its rank.
template <class E, class Body>
void for_units(const std::vector<Matrix>& rows, const Layout& layout, int64_t grams, const Body& body) {
    std::vector<Unit> units;
    int64_t largest = 0, bytes = 0;
    for (int64_t m = 0; m < layout.modules(); ++m) {
        for (int64_t k = 0; k < layout.clients(); ++k) {
            const int64_t rank = layout.rank(m, k);
            const double rank_cost = static_cast<double>(rank) * static_cast<double>(rank + 16);
            units.push_back({m, k, rank, layout.first_row(m, k), rank_cost * static_cast<double>(rows[m].width), 0});
            largest = std::max(largest, rank);
        }
        bytes += rows[m].rows * rows[m].width * size_of(rows[m].type);
    }
    std::stable_sort(units.begin(), units.end(), [](const Unit& a, const Unit& b) { return a.cost > b.cost; });
    const int64_t parts = part_count(static_cast<int64_t>(units.size()), bytes);
    std::vector<std::vector<Unit>> queues(static_cast<size_t>(parts));
    std::vector<double> load(static_cast<size_t>(parts));
    for (const Unit& unit : units) {
        const size_t part = static_cast<size_t>(std::min_element(load.begin(), load.end()) - load.begin());
        queues[part].push_back(unit);
        load[part] += unit.cost;
    }
    for (std::vector<Unit>& queue : queues) {  // in the order of memory, so that the rows of the next unit can be fetched
        std::sort(queue.begin(), queue.end(), [](const Unit& a, const Unit& b) { return a.module != b.module ? a.module < b.module : a.first < b.first; });
        for (size_t i = 0; i < queue.size(); ++i) {
            queue[i].next = i + 1 < queue.size() && queue[i + 1].module == queue[i].module ? queue[i + 1].first : queue[i].first;
        }
    }
    std::vector<E> panels(static_cast<size_t>(parts * largest * kPanel));
    std::vector<double> squares(static_cast<size_t>(parts * grams * largest * largest));
    for_tasks(parts, parts, [&](int64_t part, int64_t) {
        for (const Unit& unit : queues[part]) {
            body(unit, panels.data() + part * largest * kPanel, squares.data() + part * grams * largest * largest);
        }
    });
}

template <class E, class Out>
void gram_as(const std::vector<Matrix>& rows, const Layout& layout, const std::vector<Out*>& out) {
    std::vector<int64_t> first(static_cast<size_t>(layout.modules() * layout.clients()));
    for (int64_t m = 0; m < layout.modules(); ++m) {
        int64_t at = 0;
        for (int64_t k = 0; k < layout.clients(); ++k) {
            first[m * layout.clients() + k] = at;
            at += layout.rank(m, k) * layout.rank(m, k);
        }
    }
    for_units<E>(rows, layout, 1, [&](const Unit& unit, E* panel, double* gram) {
        gram_of(rows[unit.module], unit.first, unit.rank, unit.next, panel, gram);
        std::copy(gram, gram + unit.rank * unit.rank, out[unit.module] + first[unit.module * layout.clients() + unit.client]);
    });
}

std::vector<Tensor> gram(const std::vector<Tensor>& row_list, const std::vector<int64_t>& ranks, bool exact) {
    const std::vector<Matrix> rows = matrices("rows", row_list, row_list.size());
    const Layout layout(ranks, rows.size(), rows_of(rows));
    const bool wide = exact || (!rows.empty() && rows[0].type == Type::f64);
    std::vector<Tensor> out;
    for (int64_t m = 0; m < layout.modules(); ++m) {
        int64_t size = 0;
        for (int64_t k = 0; k < layout.clients(); ++k) {
            size += layout.rank(m, k) * layout.rank(m, k);
        }
        out.push_back(torch::stable::new_empty(row_list[m], {size}, wide ? ScalarType::Double : ScalarType::Float));
    }
    if (wide) {
        std::vector<double*> data;
        for (Tensor& each : out) {
            data.push_back(static_cast<double*>(each.mutable_data_ptr()));
        }
        gram_as<double>(rows, layout, data);
    } else {
        std::vector<float*> data;
        for (Tensor& each : out) {
            data.push_back(static_cast<float*>(each.mutable_data_ptr()));
        }
        gram_as<float>(rows, layout, data);
    }
    return out;
}

// A [K, M] result of double values in float32 or float64.
Tensor table(const Tensor& like, int64_t clients, int64_t modules, bool wide, const std::vector<double>& values) {
    Tensor out = torch::stable::new_empty(like, {clients, modules}, wide ? ScalarType::Double : ScalarType::Float);
    store_block(wide ? Type::f64 : Type::f32, out.mutable_data_ptr(), values.data(), static_cast<int64_t>(values.size()));
    return out;
}

template <class E>
void delta_norms_as(const std::vector<Matrix>& a, const std::vector<Matrix>& bt, const Layout& layout, std::vector<double>& norms) {
    for_units<E>(a, layout, 2, [&](const Unit& unit, E* panel, double* grams) {
        const int64_t size = unit.rank * unit.rank;
        gram_of(a[unit.module], unit.first, unit.rank, unit.next, panel, grams);
        gram_of(bt[unit.module], unit.first, unit.rank, unit.next, panel, grams + size);
        double square = 0;
        for (int64_t i = 0; i < size; i += unit.rank) {  // row by row: one chain of r^2 additions loses bits in double already at r = 128
            square += std::inner_product(grams + i, grams + i + unit.rank, grams + size + i, 0.0);
        }
        // NaN must survive: !(x < 0) holds for it.
        norms[unit.client * layout.modules() + unit.module] = square < 0 ? 0.0 : std::sqrt(square);
    });
}

Tensor delta_norms(const std::vector<Tensor>& a_list, const std::vector<Tensor>& bt_list, const std::vector<int64_t>& ranks, bool exact) {
    STD_TORCH_CHECK(!a_list.empty(), "a: expected at least one module");
    const std::vector<Matrix> a = matrices("a", a_list, a_list.size()), bt = matrices("bt", bt_list, a_list.size());
    const Layout layout(ranks, a.size(), rows_of(a));
    STD_TORCH_CHECK(rows_of(a) == rows_of(bt), "bt: expected as many rows as a in every module");
    STD_TORCH_CHECK((a[0].type == Type::f64) == (bt[0].type == Type::f64), "bt: expected float64 exactly where a is");
    const bool wide = exact || a[0].type == Type::f64;
    std::vector<double> norms(static_cast<size_t>(layout.clients() * layout.modules()));
    if (wide) {
        delta_norms_as<double>(a, bt, layout, norms);
    } else {
        delta_norms_as<float>(a, bt, layout, norms);
    }
    return table(a_list[0], layout.clients(), layout.modules(), wide, norms);
}

Tensor tail_norms(const std::vector<Tensor>& row_list, const std::vector<int64_t>& ranks, const std::vector<int64_t>& keep) {
    constexpr int64_t kChunk = 16384;
    STD_TORCH_CHECK(!row_list.empty(), "rows: expected at least one module");
    const std::vector<Matrix> rows = matrices("rows", row_list, row_list.size());
    const Layout layout(ranks, rows.size(), rows_of(rows));
    STD_TORCH_CHECK(keep.size() == ranks.size(), "keep: expected ", ranks.size(), " integers, got ", keep.size());
    struct Chunk {
        int64_t module, slot, begin, n;
    };
    std::vector<Chunk> chunks;
    int64_t bytes = 0;
    for (int64_t m = 0; m < layout.modules(); ++m) {
        for (int64_t k = 0; k < layout.clients(); ++k) {
            const int64_t cut = keep[m * layout.clients() + k], rank = layout.rank(m, k), row = layout.first_row(m, k), width = rows[m].width;
            STD_TORCH_CHECK(cut >= 0, "keep: expected integers >= 0, got ", cut);
            const int64_t end = (row + rank) * width;
            for (int64_t begin = (row + std::min(cut, rank)) * width; begin < end; begin += kChunk) {
                chunks.push_back({m, k * layout.modules() + m, begin, std::min(kChunk, end - begin)});
                bytes += chunks.back().n * size_of(rows[m].type);
            }
        }
    }
    std::vector<double> partial(chunks.size()), norms(static_cast<size_t>(layout.clients() * layout.modules()));
    const int64_t count = static_cast<int64_t>(chunks.size());
    for_tasks(part_count(count, bytes), count, [&](int64_t, int64_t c) {
        const Matrix& own = rows[chunks[c].module];
        partial[c] = sum_squares(own.type, own.at(chunks[c].begin), chunks[c].n);
    });
    for (size_t c = 0; c < chunks.size(); ++c) {
        norms[chunks[c].slot] += partial[c];
    }
    for (double& norm : norms) {
        norm = std::sqrt(norm);
    }
    return table(row_list[0], layout.clients(), layout.modules(), rows[0].type == Type::f64, norms);
}

}  // namespace
}  // namespace hetlora

STABLE_TORCH_LIBRARY_IMPL(hetlora, CPU, library) {
    library.impl("gram", TORCH_BOX(&hetlora::gram));
    library.impl("delta_norms", TORCH_BOX(&hetlora::delta_norms));
    library.impl("tail_norms", TORCH_BOX(&hetlora::tail_norms));
}
