// aggregate_ and accumulate_: checks and tables; the kernels are in aggregate.cu.
#include "calls.h"

namespace {

void aggregate_(const Tensors& out, const Tensors& rows_in, const Tensor& weights_in, const Tensors& keep_in, const Integers& rank_list, bool owners) {
    const Integers ranks = hetlora::expanded("ranks", rank_list, out.size());
    const Tensors rows = contiguous(rows_in), keep = contiguous(keep_in);
    const int clients = clients_of(ranks, rows.size());
    check_count(out.size(), rows.size(), "out");
    if (!keep.empty()) check_count(keep.size(), rows.size(), "keep");
    check_rows(rows, rows[0], "rows");
    check_rows(out, out[0], "out");
    if (!keep.empty()) check_rows(keep, keep[0], "keep");
    const Type type = type_of(rows[0]);
    const Tensor weights = torch::stable::contiguous(weights_in);
    STD_TORCH_CHECK(weights.scalar_type() == scalar_of(sums_of(type)) && weights.numel() == static_cast<int64_t>(ranks.size()),
                    "weights: expected [K, M] of the sums' type");
    Launch launch(rows[0], clients, "aggregate_");
    for (size_t m = 0; m < rows.size(); ++m) {
        const int64_t width = rows[m].size(1), count = out[m].size(0);
        STD_TORCH_CHECK(out[m].size(1) == width && largest(ranks, m, clients) <= count, "out: expected the width of rows and at least the largest rank's rows");
        STD_TORCH_CHECK(keep.empty() || (keep[m].size(0) == count && keep[m].size(1) == width), "keep: expected the shape of out");
        launch.module({{rows[m].const_data_ptr(), out[m].mutable_data_ptr(), keep.empty() ? nullptr : keep[m].const_data_ptr(), nullptr},
                       0,
                       static_cast<int>(width),
                       static_cast<int>(count),
                       launch.layout(checked_offsets(ranks, m, clients, rows[m].size(0))),
                       aligned(type, width, rows[m], out[m])},
                      items_of(count, width, type));
    }
    const Type keep_type = keep.empty() ? type : type_of(keep[0]);
    check(hetlora_aggregate(launch.start(), type, type_of(out[0]), keep_type, weights.const_data_ptr(), owners), "aggregate_");
}

void accumulate_(const Tensors& total, const Tensors& rows_in, const Tensor& weights_in) {
    const Tensors rows = contiguous(rows_in);
    clients_of({}, rows.size());
    check_count(total.size(), rows.size(), "total");
    check_rows(rows, rows[0], "rows");
    check_rows(total, total[0], "total");
    const Type type = type_of(rows[0]), sums = type_of(total[0]);
    const Tensor weights = torch::stable::contiguous(weights_in);
    STD_TORCH_CHECK(sums_of(sums) == sums && weights.scalar_type() == scalar_of(sums) && weights.numel() == static_cast<int64_t>(rows.size()),
                    "total, weights: expected float32 or float64 sums and [M] weights of that type");
    Launch launch(rows[0], 0, "accumulate_");
    for (size_t m = 0; m < rows.size(); ++m) {
        const int64_t width = rows[m].size(1);
        STD_TORCH_CHECK(total[m].size(1) == width && total[m].size(0) >= rows[m].size(0), "total: expected the width of rows and at least as many rows");
        launch.module({{total[m].mutable_data_ptr(), rows[m].const_data_ptr(), nullptr, nullptr},
                       0,
                       static_cast<int>(width),
                       static_cast<int>(rows[m].size(0)),
                       0,
                       aligned(type, width, rows[m], total[m])},
                      items_of(rows[m].size(0), width, type));
    }
    check(hetlora_accumulate(launch.start(), type, sums, weights.const_data_ptr()), "accumulate_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) {
    m.impl("aggregate_", TORCH_BOX(&aggregate_));
    m.impl("accumulate_", TORCH_BOX(&accumulate_));
}
