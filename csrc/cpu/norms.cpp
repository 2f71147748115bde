// gram, delta_norms, tail_norms: norms of low-rank updates from products of rank rows, for all modules and clients in one call.
//
// One client of one module is a unit of work; a part is a stretch of units that lie one after another, of about equal cost. A unit walks its columns in panels
// of about 512: the panel stays in L2 while every pair of row groups is multiplied from it (gram_kernels.h), so the rows are read from memory once. float16 rows
// (and others when exact) are converted into the panel first. Bytes: the rows once; operations:
// r (r + 1) / 2 multiply-adds a column, more than the time of the read from about r = 16 on.
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "gram_kernels.h"
#include "tensors.h"

namespace hetlora {
namespace {

constexpr int64_t kPanel = 768;  // most columns of a panel
constexpr int64_t kLead = 192 * 1024;  // bytes fetched ahead, a part of L2

// Columns of one panel: equal parts of about 512, so that none is so short that adding up its registers takes longer than filling them.
int64_t panel_columns(int64_t width) {
    const int64_t parts = std::max<int64_t>(1, (width + 256) / 512), lanes = 2 * kLanes;
    return std::min(kPanel, ((width + parts - 1) / parts + lanes - 1) / lanes * lanes);
}

// Products of the panels of `matrix`, its rows from `first` on, in type T. Rows are read where they lie. With `convert`, and where a panel's columns are no
// multiple of `lanes`, they are first written into `panel`, which holds rank x kPanel elements.
template <class T, class Kernel>
void for_panels(const Matrix& matrix, int64_t first, int64_t rank, int64_t lanes, bool convert, T* panel, const Kernel& kernel) {
    const int64_t width = matrix.width, step = panel_columns(width);
    for (int64_t begin = 0; begin < width; begin += step) {
        const int64_t n = std::min(step, width - begin), padded = (n + lanes - 1) / lanes * lanes;
        if (!convert && padded == n) {
            const int64_t ahead = begin + 2 * step <= width ? step : 0;
            kernel(reinterpret_cast<const T*>(matrix.at(first * width + begin)), width, n, ahead);
            continue;
        }
        for (int64_t i = 0; i < rank; ++i) {
            const char* from = matrix.at((first + i) * width + begin);
            if constexpr (sizeof(T) == 2) {
                std::memcpy(panel + i * kPanel, from, static_cast<size_t>(n) * sizeof(T));
            } else {
                load_block(matrix.type, from, panel + i * kPanel, n);
            }
            std::fill(panel + i * kPanel + n, panel + i * kPanel + padded, T{});
        }
        kernel(panel, kPanel, padded, 0);
    }
}

// What a part needs besides its unit: `panel` holds rank x kPanel elements, `sums` PanelKernel::room, `grams` as many Gram matrices as the op asks for.
template <class E>
struct Room {
    E* panel;
    double *sums, *grams;
    Stream* stream;
};

// gram [rank, rank] = rows rows^T of the rows from `first`; fetches those from `next`.
template <class E>
void gram_of(const Matrix& matrix, int64_t first, int64_t rank, int64_t last, const Room<E>& room, double* gram) {
    static const PanelKernel<E> kernel = panel_kernel<E>();
    static const PanelKernel<bf16> as_it_lies = panel_kernel<bf16>();
    if (rank == 0) {
        return;
    }
    std::fill(room.sums, room.sums + kernel.room(rank), 0.0);
    const char* after = matrix.at((first + rank) * matrix.width);
    Stream& stream = *room.stream;
    stream.end = std::min<const char*>(matrix.at(last * matrix.width), after + kLead);
    if (stream.at < after || stream.at > stream.end) {
        stream.at = after;
    }
    if (sizeof(E) == 4 && matrix.type == Type::bf16) {
        for_panels(matrix, first, rank, 2 * kLanes, false, reinterpret_cast<bf16*>(room.panel),
                   [&](const bf16* rows, int64_t ld, int64_t n, int64_t ahead) { as_it_lies.products(rows, rank, ld, n, ahead, stream, room.sums); });
        return from_tiles(room.sums, rank, as_it_lies.groups(rank), as_it_lies.lanes, gram);
    }
    for_panels(matrix, first, rank, kLanes, size_of(matrix.type) != static_cast<int64_t>(sizeof(E)), room.panel,
               [&](const E* rows, int64_t ld, int64_t n, int64_t ahead) { kernel.products(rows, rank, ld, n, ahead, stream, room.sums); });
    from_tiles(room.sums, rank, kernel.groups(rank), kernel.lanes, gram);
}

struct Unit {
    int64_t module, client, rank, first;
    double cost;  // of this unit and those before it
    int64_t last;  // end of the rows of the same module that its part reads
};

// body(unit, room) for every unit, with room for `grams` Gram matrices of its rank. A part is a stretch of units that lie one after another.
template <class E, class Body>
void for_units(const std::vector<Matrix>& rows, const Layout& layout, int64_t grams, const Body& body) {
    std::vector<Unit> units;
    int64_t largest = 0, bytes = 0;
    double cost = 0;
    for (int64_t m = 0; m < layout.modules(); ++m) {
        for (int64_t k = 0; k < layout.clients(); ++k) {
            const int64_t rank = layout.rank(m, k);
            cost += static_cast<double>(rank) * static_cast<double>(rank + 16) * static_cast<double>(rows[m].width);
            units.push_back({m, k, rank, layout.first_row(m, k), cost, 0});
            largest = std::max(largest, rank);
        }
        bytes += rows[m].rows * rows[m].width * size_of(rows[m].type);
    }
    const int64_t count = static_cast<int64_t>(units.size()), parts = part_count(count, bytes);
    Integers begins{0};
    for (int64_t i = 0; i < count; ++i) {  // a unit belongs to the part that its middle falls into
        const double middle = ((i == 0 ? 0 : units[i - 1].cost) + units[i].cost) / 2;
        while (static_cast<int64_t>(begins.size()) < parts && middle * static_cast<double>(parts) >= cost * static_cast<double>(begins.size())) {
            begins.push_back(i);
        }
    }
    begins.resize(static_cast<size_t>(parts + 1), count);
    const int64_t sums = panel_kernel<E>().room(largest), squares = grams * largest * largest;
    std::vector<E> panels(static_cast<size_t>(parts * largest * kPanel));
    std::vector<double> numbers(static_cast<size_t>(parts * (sums + squares)));
    for_tasks(parts, parts, [&](int64_t part, int64_t) {
        Stream stream{nullptr, nullptr};
        double* own = numbers.data() + part * (sums + squares);
        for (int64_t i = begins[part + 1]; i-- > begins[part];) {
            Unit& unit = units[i];
            unit.last = i + 1 < begins[part + 1] && units[i + 1].module == unit.module ? units[i + 1].last : unit.first + unit.rank;
        }
        for (int64_t i = begins[part]; i < begins[part + 1]; ++i) {
            body(units[i], Room<E>{panels.data() + part * largest * kPanel, own, own + sums, &stream});
        }
    });
}

template <class E, class Out>
void gram_as(const std::vector<Matrix>& rows, const Layout& layout, const std::vector<Out*>& out) {
    Integers first(static_cast<size_t>(layout.modules() * layout.clients()));
    for (int64_t m = 0; m < layout.modules(); ++m) {
        int64_t at = 0;
        for (int64_t k = 0; k < layout.clients(); ++k) {
            first[m * layout.clients() + k] = at;
            at += layout.rank(m, k) * layout.rank(m, k);
        }
    }
    for_units<E>(rows, layout, 1, [&](const Unit& unit, const Room<E>& room) {
        gram_of(rows[unit.module], unit.first, unit.rank, unit.last, room, room.grams);
        std::copy(room.grams, room.grams + unit.rank * unit.rank, out[unit.module] + first[unit.module * layout.clients() + unit.client]);
    });
}

Tensors gram(const Tensors& row_list, const Integers& rank_list, bool exact) {
    const std::vector<Matrix> rows = matrices("rows", row_list, row_list.size());
    const Integers ranks = expanded("ranks", rank_list, rows.size());
    const Layout layout(ranks, rows.size(), rows_of(rows));
    const bool wide = exact || (!rows.empty() && rows[0].type == Type::f64);
    Tensors out;
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
    for_units<E>(a, layout, 2, [&](const Unit& unit, const Room<E>& room) {
        const int64_t size = unit.rank * unit.rank;
        double* grams = room.grams;
        gram_of(a[unit.module], unit.first, unit.rank, unit.last, room, grams);
        gram_of(bt[unit.module], unit.first, unit.rank, unit.last, room, grams + size);
        double square = 0;
        for (int64_t i = 0; i < size; i += unit.rank) {  // row by row: one chain of r^2 additions loses bits in double already at r = 128
            square += std::inner_product(grams + i, grams + i + unit.rank, grams + size + i, 0.0);
        }
        // NaN must survive: !(x < 0) holds for it.
        norms[unit.client * layout.modules() + unit.module] = square < 0 ? 0.0 : std::sqrt(square);
    });
}

Tensor delta_norms(const Tensors& a_list, const Tensors& bt_list, const Integers& rank_list, bool exact) {
    STD_TORCH_CHECK(!a_list.empty(), "a: expected at least one module");
    const std::vector<Matrix> a = matrices("a", a_list, a_list.size()), bt = matrices("bt", bt_list, a_list.size());
    const Integers ranks = expanded("ranks", rank_list, a.size());
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

Tensor tail_norms(const Tensors& row_list, const Integers& rank_list, const Integers& keep_list) {
    constexpr int64_t kChunk = 16384;
    STD_TORCH_CHECK(!row_list.empty(), "rows: expected at least one module");
    const std::vector<Matrix> rows = matrices("rows", row_list, row_list.size());
    const Integers ranks = expanded("ranks", rank_list, rows.size());
    const Layout layout(ranks, rows.size(), rows_of(rows));
    const Integers keep = expanded("keep", keep_list, rows.size());
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
