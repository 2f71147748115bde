// gram, delta_norms and tail_norms: checks and tables; the kernels are in gram.cu and norms.cuh.
#include "calls.h"

namespace {

// Queues the Gram matrices of every module; the result is one tensor per module. `after` runs on the same table.
template <class After>
Tensors launch_gram(const Tensors& rows, const Integers& ranks, Type result, const char* op, After after) {
    const int clients = clients_of(ranks, rows.size());
    check_rows(rows, rows[0], "rows");
    Launch launch(rows[0], clients, op);
    Tensors out;
    int64_t planes = 0;
    int splits = 1;
    for (size_t m = 0; m < rows.size(); ++m) {
        const int64_t width = rows[m].size(1);
        const int own = std::max(1, hetlora::divide_up(width, hetlora_gram_split()));
        const std::vector<int> offsets = checked_offsets(ranks, m, clients, rows[m].size(0));
        const hetlora::GramLayout layout = hetlora::gram_layout(offsets, hetlora::gram_unit(type_of(rows[m]), result));
        STD_TORCH_CHECK(layout.result < INT32_MAX && layout.plane < INT32_MAX, "ranks: expected a sum of squares below 2^31");
        out.push_back(torch::stable::new_empty(rows[m], {layout.result}, scalar_of(result)));
        launch.module({{rows[m].const_data_ptr(), out[m].mutable_data_ptr(), nullptr, nullptr},
                       planes,
                       static_cast<int>(width),
                       static_cast<int>(layout.plane),
                       launch.layout(layout.values),
                       aligned(type_of(rows[m]), width, rows[m])},
                      layout.tiles);
        planes += own > 1 ? int64_t(own) * layout.plane : 0;
        splits = std::max(splits, own);
    }
    const Tensor workspace = launch.workspace(planes, scalar_of(result));
    const HetloraCall* call = launch.start();
    check(hetlora_gram(call, type_of(rows[0]), result, splits, workspace.mutable_data_ptr()), op);
    after(call, clients);
    return out;
}

Tensors gram(const Tensors& rows_in, const Integers& rank_list, bool exact) {
    const Tensors rows = contiguous(rows_in);
    return launch_gram(rows, hetlora::expanded("ranks", rank_list, rows.size()), exact ? Type::f64 : sums_of(type_of(rows[0])), "gram",
                       [](const HetloraCall*, int) {});
}

Tensor delta_norms(const Tensors& a, const Tensors& bt, const Integers& rank_list, bool exact) {
    check_count(bt.size(), a.size(), "bt");
    const int64_t modules = static_cast<int64_t>(a.size());
    Tensors rows = contiguous(a);
    for (const Tensor& t : bt) rows.push_back(torch::stable::contiguous(t));
    const Integers ranks = hetlora::expanded("ranks", rank_list, a.size());
    Integers twice(ranks);
    twice.insert(twice.end(), ranks.begin(), ranks.end());
    const Type result = exact ? Type::f64 : sums_of(type_of(rows[0]));
    std::optional<Tensor> out;
    const Tensors grams = launch_gram(rows, twice, result, "delta_norms", [&](const HetloraCall* call, int clients) {
        out = torch::stable::new_empty(rows[0], {clients, modules}, scalar_of(result));
        check(hetlora_delta_norms(call, result, out->mutable_data_ptr()), "delta_norms");
    });
    return *out;
}

Tensor tail_norms(const Tensors& rows_in, const Integers& rank_list, const Integers& keep_list) {
    const Tensors rows = contiguous(rows_in);
    const Integers ranks = hetlora::expanded("ranks", rank_list, rows.size()), keep = hetlora::expanded("keep", keep_list, rows.size());
    const int clients = clients_of(ranks, rows.size());
    check_count(keep.size(), ranks.size(), "keep");
    check_rows(rows, rows[0], "rows");
    const Type type = type_of(rows[0]);
    Launch launch(rows[0], clients, "tail_norms");
    int64_t count = 0;
    for (size_t m = 0; m < rows.size(); ++m) {
        const int64_t width = rows[m].size(1), items = items_of(rows[m].size(0), width, type);
        launch.module({{rows[m].const_data_ptr(), nullptr, nullptr, nullptr},
                       count,
                       static_cast<int>(width),
                       static_cast<int>(rows[m].size(0)),
                       launch.layout(cut_layout(ranks, keep, m, clients, rows[m].size(0))),
                       aligned(type, width, rows[m])},
                      items);
        count += items;
    }
    const Tensor partials = launch.workspace(count, ScalarType::Double);
    const Tensor out = torch::stable::new_empty(rows[0], {clients, static_cast<int64_t>(rows.size())}, scalar_of(sums_of(type)));
    auto* sums = static_cast<double*>(partials.mutable_data_ptr());
    const HetloraCall* call = launch.start();
    check(hetlora_squares(call, type, false, sums, count), "tail_norms");
    check(hetlora_tail_norms(call, type, sums, out.mutable_data_ptr()), "tail_norms");
    return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) {
    m.impl("gram", TORCH_BOX(&gram));
    m.impl("delta_norms", TORCH_BOX(&delta_norms));
    m.impl("tail_norms", TORCH_BOX(&tail_norms));
}
