// gram, delta_norms, tail_norms: norms of low-rank updates from products of rank rows, for all modules and clients in one call.
//
// One client of one module is a unit of work; the most expensive units are handed out first, each to the part with the least so far. A unit walks its
// columns in panels of about 512: the panel stays in L2 while every pair of row groups is multiplied from it, so the rows are read from memory once. A group by
// itself is a triangle, two groups a rectangle of dot products held in registers as vectors along the columns: exactly r (r + 1) / 2 of them, no rank is
// padded; the panel's sums leave the registers in double. float16 rows (and others when exact) are converted into the panel first; bfloat16 rows are too
// where the processor has no AVX512-BF16. Bytes: the rows once; operations: r (r + 1) / 2 multiply-adds a column, more than the time of the read from about
// r = 16 on.
#include <cmath>
#include <cstdlib>
#include <numeric>

#include "tensors.h"

namespace hetlora {
namespace {

constexpr int64_t kPanel = 768;         // most columns of a panel
constexpr int64_t kLine = 64;           // bytes of a cache line
constexpr int64_t kLead = 192 * 1024;  // bytes fetched ahead, a part of L2

template <class E, int W>
struct VectorOf {
    typedef E type __attribute__((vector_size(W * sizeof(E)), aligned(sizeof(E)), may_alias));
};

#if defined(__clang__)
#define HETLORA_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#define HETLORA_UNROLL _Pragma("unroll")
#else
#define HETLORA_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, decltype((a) < (b)){__VA_ARGS__})
// Sums that an index reaches stay in registers only where their loops are unrolled, which GCC does by itself up to 16 times.
#define HETLORA_UNROLL _Pragma("GCC unroll 16")
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

// The lanes of 16 vectors of 16 added up, as vector j's sum in lane j: 15 additions of 30 shuffled halves.
template <class V>
HETLORA_INLINE V sixteen_sums(const V* sums) {
    V v[16];
    HETLORA_UNROLL
    for (int j = 0; j < 16; ++j) {  // lane j of the result comes from the place whose bits are those of j in another order
        v[(j >> 2 & 1) * 8 + (j >> 3) * 4 + (j & 1) * 2 + (j >> 1 & 1)] = sums[j];
    }
    HETLORA_UNROLL
    for (int k = 0; k < 8; ++k) {
        v[k] = HETLORA_SHUFFLE(v[k], v[k + 8], 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +
               HETLORA_SHUFFLE(v[k], v[k + 8], 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31);
    }
    HETLORA_UNROLL
    for (int k = 0; k < 4; ++k) {
        v[k] = HETLORA_SHUFFLE(v[k], v[k + 4], 0, 1, 2, 3, 8, 9, 10, 11, 16, 17, 18, 19, 24, 25, 26, 27) +
               HETLORA_SHUFFLE(v[k], v[k + 4], 4, 5, 6, 7, 12, 13, 14, 15, 20, 21, 22, 23, 28, 29, 30, 31);
    }
    HETLORA_UNROLL
    for (int k = 0; k < 2; ++k) {
        v[k] = HETLORA_SHUFFLE(v[k], v[k + 2], 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +
               HETLORA_SHUFFLE(v[k], v[k + 2], 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31);
    }
    return HETLORA_SHUFFLE(v[0], v[1], 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30) +
           HETLORA_SHUFFLE(v[0], v[1], 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

// out[j] += the sum of the lanes of sums[j], in double, for N vectors, a multiple of 4 (16 where W is): as columns of a transposed block, since lane by lane
// took longer than the products at widths below 600.
template <class E, int W, int N>
HETLORA_INLINE void add_lanes(const typename VectorOf<E, W>::type* sums, double* out) {
    if constexpr (W == 16) {
        HETLORA_UNROLL
        for (int at = 0; at < N; at += 16) {
            const typename VectorOf<E, 16>::type all = sixteen_sums(sums + at);
            HETLORA_UNROLL
            for (int j = 0; j < 16; ++j) {
                out[at + j] += static_cast<double>(all[j]);
            }
        }
    } else {
        typedef typename VectorOf<E, 4>::type Four;
        HETLORA_UNROLL
        for (int at = 0; at < N; at += 4) {
            const Four a = four_lanes<E, W>(sums[at]), b = four_lanes<E, W>(sums[at + 1]);
            const Four c = four_lanes<E, W>(sums[at + 2]), d = four_lanes<E, W>(sums[at + 3]);
            const Four low = HETLORA_SHUFFLE(a, b, 0, 4, 2, 6) + HETLORA_SHUFFLE(a, b, 1, 5, 3, 7);
            const Four high = HETLORA_SHUFFLE(c, d, 0, 4, 2, 6) + HETLORA_SHUFFLE(c, d, 1, 5, 3, 7);
            const Four all = HETLORA_SHUFFLE(low, high, 0, 1, 4, 5) + HETLORA_SHUFFLE(low, high, 2, 3, 6, 7);
            for (int j = 0; j < 4; ++j) {
                out[at + j] += static_cast<double>(all[j]);
            }
        }
    }
}

// How a vector of columns of two rows is multiplied and added: W elements of E a step into vectors of Sum.
template <class E, int W>
struct Plain {
    typedef E Element;
    typedef E Sum;
    typedef typename VectorOf<E, W>::type Vector;
    static constexpr int kStep = W, kSums = W;
    static HETLORA_INLINE void multiply_add(Vector& sum, const Vector& left, const Vector& right) { sum += left * right; }
};

// bfloat16 pairs (AVX512-BF16): products are exact in float32; subnormal operands and products count as zero.
struct Pairs {
    typedef bf16 Element;
    typedef float Sum;
    typedef VectorOf<float, 16>::type Vector;
    static constexpr int kStep = 32, kSums = 16;
#if defined(__x86_64__) && defined(__GNUC__)
    static HETLORA_INLINE void multiply_add(Vector& sum, const Vector& left, const Vector& right) {
        __asm__("vdpbf16ps %2, %1, %0" : "+v"(sum) : "v"(left), "v"(right));
    }
#endif
};

constexpr int tile_sums(int rows, int columns, bool triangle, int lanes) {
    const int count = triangle ? rows * (rows + 1) / 2 : rows * columns, whole = lanes == 16 ? 16 : 4;
    return (count + whole - 1) / whole * whole;
}

// What is fetched from memory while tiles are multiplied: two lines a step from `at` on, as long as it is before `end`. Units lie one after another, so
// a unit that is all arithmetic fetches for the next ones, which are all memory.
struct Stream {
    const char *at, *end;
};

// The next tile_sums of out += x_i . y_j over n columns (a multiple of the step), rows `ld` apart, row by row. `triangle`: y is x and only j >= i is wanted;
// then x's rows are fetched `ahead` columns on, unless that is 0. Returns where the next tile's sums begin.
template <class P, int I, int J, bool triangle>
HETLORA_INLINE double* products(const typename P::Element* x, const typename P::Element* y, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {
    typedef typename P::Vector V;
    constexpr int kCount = tile_sums(I, J, triangle, P::kSums);
    V sums[kCount] = {};
    const int64_t lines = stream.at < stream.end ? 2 * kLine : 0;
    const char* fetch = stream.at;
    for (int64_t c = 0; c < n; c += P::kStep) {
        __builtin_prefetch(fetch, 0, 2);
        __builtin_prefetch(fetch + kLine, 0, 2);
        fetch += lines;
        if (triangle && ahead != 0) {
            HETLORA_UNROLL
            for (int i = 0; i < I; ++i) {
                __builtin_prefetch(x + i * ld + c + ahead, 0, 2);
            }
        }
        V right[J];
        HETLORA_UNROLL
        for (int j = 0; j < J; ++j) {
            right[j] = *reinterpret_cast<const V*>(y + j * ld + c);
        }
        int at = 0;
        HETLORA_UNROLL
        for (int i = 0; i < I; ++i) {
            const V left = triangle ? right[i] : *reinterpret_cast<const V*>(x + i * ld + c);
            HETLORA_UNROLL
            for (int j = triangle ? i : 0; j < J; ++j) {
                P::multiply_add(sums[at++], left, right[j]);
            }
        }
    }
    stream.at = fetch;
    add_lanes<typename P::Sum, P::kSums, kCount>(sums, out);
    return out + kCount;
}

template <class P, int I>
HETLORA_INLINE double* triangle(int64_t count, const typename P::Element* x, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {
    if constexpr (I > 1) {
        if (count < I) {
            return triangle<P, I - 1>(count, x, ld, n, ahead, stream, out);
        }
    }
    return products<P, I, I, true>(x, x, ld, n, ahead, stream, out);
}

template <class P, int I, int J>
HETLORA_INLINE double* rectangle(int64_t rows, int64_t columns, const typename P::Element* x, const typename P::Element* y, int64_t ld, int64_t n, Stream& stream, double* out) {
    if constexpr (I > 1) {
        if (rows < I) {
            return rectangle<P, I - 1, J>(rows, columns, x, y, ld, n, stream, out);
        }
    }
    if constexpr (J > 1) {
        if (columns < J) {
            return rectangle<P, I, J - 1>(rows, columns, x, y, ld, n, stream, out);
        }
    }
    return products<P, I, J, false>(x, y, ld, n, 0, stream, out);
}

// The rows of a rank in groups: one of all for a rank of at most T, else equal ones of at most G.
struct Groups {
    int64_t count, size, larger;
    Groups(int64_t rank, int g, int t) : count(rank <= t ? 1 : (rank + g - 1) / g), size(rank / count), larger(rank % count) {}
    int64_t start(int64_t g) const { return g * size + (g < larger ? g : larger); }
};

// The upper triangle of rows rows^T over one panel, tile by tile: a group by itself, then with every later one.
template <class P, int G, int T>
HETLORA_INLINE void panel_products(const typename P::Element* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {
    const Groups groups(rank, G, T);
    for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t i = groups.start(g), height = groups.start(g + 1) - i;
        out = triangle<P, T>(height, rows + i * ld, ld, n, ahead, stream, out);
        for (int64_t h = g + 1; h < groups.count; ++h) {
            const int64_t j = groups.start(h);
            out = rectangle<P, G, G>(height, groups.start(h + 1) - j, rows + i * ld, rows + j * ld, ld, n, stream, out);
        }
    }
}

// gram [rank, rank], both triangles, from the sums of `panel_products`.
void from_tiles(const double* sums, int64_t rank, const Groups& groups, int lanes, double* gram) {
    for (int64_t g = 0; g < groups.count; ++g) {
        const int64_t first = groups.start(g), last = groups.start(g + 1);
        for (int64_t h = g; h < groups.count; ++h) {
            const int64_t begin = groups.start(h), end = groups.start(h + 1);
            const double* own = sums;
            for (int64_t i = first; i < last; ++i) {
                for (int64_t j = h == g ? i : begin; j < end; ++j) {
                    gram[i * rank + j] = gram[j * rank + i] = *own++;
                }
            }
            sums += tile_sums(static_cast<int>(last - first), static_cast<int>(end - begin), h == g, lanes);
        }
    }
}

// One function per instruction set rather than clones, because the number of registers decides the groups: 5 x 5 sums, 5 + 1 rows fill AVX-512's 32.
constexpr int kLanes = 16;  // columns a panel is a multiple of, whatever the instruction set; 32 for pairs
#define HETLORA_PANEL(name, target, width, group, most)                                                              \
    target void name(const float* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {           \
        panel_products<Plain<float, width>, group, most>(rows, rank, ld, n, ahead, stream, out);                             \
    }                                                                                                                \
    target void name(const double* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead, Stream& stream, double* out) {          \
        panel_products<Plain<double, (width > 4 ? width / 2 : 4)>, group, most>(rows, rank, ld, n, ahead, stream, out);      \
    }
HETLORA_PANEL(panel_base, , 4, 3, 4)
#if defined(__x86_64__) && defined(__GNUC__)
HETLORA_PANEL(panel_avx2, __attribute__((target("avx2,fma"))), 8, 3, 4)
HETLORA_PANEL(panel_avx512, __attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))), 16, 5, 6)
__attribute__((target("avx512f,avx512vl,avx512dq,avx512bw,avx2,fma"))) void panel_pairs(const bf16* rows, int64_t rank, int64_t ld, int64_t n, int64_t ahead,
                                                                                       Stream& stream, double* out) {
    panel_products<Pairs, 5, 6>(rows, rank, ld, n, ahead, stream, out);
}
#endif

// A function made by HETLORA_PANEL, or panel_pairs, and how it groups rows and lays out sums.
template <class E>
struct PanelKernel {
    void (*run)(const E*, int64_t, int64_t, int64_t, int64_t, Stream&, double*);
    int group, most, lanes;

    Groups groups(int64_t rank) const { return {rank, group, most}; }
    // At least as many sums as the tiles of a rank have.
    int64_t room(int64_t rank) const { return rank == 0 ? 0 : groups(rank).count * (groups(rank).count + 1) / 2 * 32; }
};

template <class E>
PanelKernel<E> panel_kernel() {
    constexpr int kPart = sizeof(E) == 8 ? 2 : 1;
#if defined(__x86_64__) && defined(__GNUC__)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512bw")) {
        return {panel_avx512, 5, 6, 16 / kPart};
    }
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
        return {panel_avx2, 3, 4, 8 / kPart};
    }
#endif
    return {panel_base, 3, 4, 4};
}

// Whether bfloat16 rows are multiplied as they are.
bool has_pairs() {
#if defined(__x86_64__) && defined(__GNUC__)
    return panel_kernel<float>().lanes == 16 && __builtin_cpu_supports("avx512bf16");
#else
    return false;
#endif
}

// Columns of one panel: equal parts of about 512, so that none is so short that adding up its registers takes longer than filling them.
int64_t panel_columns(int64_t width) {
    const int64_t parts = std::max<int64_t>(1, (width + 256) / 512), lanes = 2 * kLanes;
    return std::min(kPanel, ((width + parts - 1) / parts + lanes - 1) / lanes * lanes);
}

// Products of the panels of `rows` from `first` on, each row as T: where it lies, or, where the columns are no multiple of the vectors or `convert`, from
// `panel`, which holds rank x kPanel elements.
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
    static const bool pairs = sizeof(E) == 4 && has_pairs();
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
#if defined(__x86_64__) && defined(__GNUC__)
    if (pairs && matrix.type == Type::bf16) {
        for_panels(matrix, first, rank, 2 * kLanes, false, reinterpret_cast<bf16*>(room.panel),
                   [&](const bf16* rows, int64_t ld, int64_t n, int64_t ahead) { panel_pairs(rows, rank, ld, n, ahead, stream, room.sums); });
        return from_tiles(room.sums, rank, kernel.groups(rank), kernel.lanes, gram);
    }
#endif
    for_panels(matrix, first, rank, kLanes, size_of(matrix.type) != static_cast<int64_t>(sizeof(E)), room.panel,
               [&](const E* rows, int64_t ld, int64_t n, int64_t ahead) { kernel.run(rows, rank, ld, n, ahead, stream, room.sums); });
    from_tiles(room.sums, rank, kernel.groups(rank), kernel.lanes, gram);
}

struct Unit {
    int64_t module, client, rank, first;
    double cost;   // of this unit and those before it
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
    std::vector<int64_t> begins{0};
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
    std::vector<int64_t> first(static_cast<size_t>(layout.modules() * layout.clients()));
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
