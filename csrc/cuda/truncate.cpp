// truncate_: checks and table; the kernel is in truncate.cu.
#include "calls.h"

namespace {

void truncate_(const Tensors& out, const Tensors& bank_in, const Integers& rank_list, bool dense) {
    const Integers ranks = hetlora::expanded("ranks", rank_list, out.size());
    const Tensors bank = contiguous(bank_in);
    const int clients = clients_of(ranks, bank.size());
    check_count(out.size(), bank.size(), "out");
    check_rows(bank, bank[0], "bank");
    const Type type = type_of(bank[0]), out_type = type_of(out[0]);
    Launch launch(bank[0], clients, "truncate_");
    for (size_t m = 0; m < bank.size(); ++m) {
        const int64_t width = bank[m].size(1), most = largest(ranks, m, clients), rows = dense ? bank[m].size(0) : most;
        const std::vector<int> offsets = checked_offsets(ranks, m, clients, -1);
        STD_TORCH_CHECK(most <= bank[m].size(0), "ranks: expected at most ", bank[m].size(0));
        STD_TORCH_CHECK(out[m].is_contiguous() && type_of(out[m]) == out_type && out[m].numel() == (dense ? clients * rows : offsets.back()) * width,
                        "out: expected contiguous tensors of the packed or dense shape");
        launch.module({{bank[m].const_data_ptr(), out[m].mutable_data_ptr(), nullptr, nullptr},
                       0,
                       static_cast<int>(width),
                       static_cast<int>(rows),
                       launch.layout(offsets),
                       aligned(type, width, bank[m], out[m])},
                      items_of(rows, width, type));
    }
    check(hetlora_truncate(launch.start(), type, out_type, dense), "truncate_");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) { m.impl("truncate_", TORCH_BOX(&truncate_)); }
