// The CUDA kernels behind the ops that hetlora_kernels/_library.py defines. PyTorch's stable ABI, target 2.10: one library for every later release.
// Meaning is checked in hetlora_kernels/ops; here only what memory safety needs.
#include "calls.h"

namespace {

// ---------------------------------------------------------------- server

void truncate_(const Tensors& out, const Tensors& bank_in, const Ints& ranks, bool dense) {
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

void aggregate_(const Tensors& out, const Tensors& rows_in, const Tensor& weights_in, const Tensors& keep_in, const Ints& ranks, bool owners) {
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

// The codes and scales of a module beside its rows of floats; whether every row of all three starts where one access of `type` may.
int check_codes(const Tensor& rows, const Tensor& codes, const Tensor& scales, int64_t bits, Type type) {
    const int64_t width = rows.size(1), stored = bits == 8 ? width : (width + 1) / 2;
    STD_TORCH_CHECK(codes.dim() == 2 && codes.is_contiguous() && codes.scalar_type() == (bits == 8 ? ScalarType::Char : ScalarType::Byte) &&
                        codes.size(0) == rows.size(0) && codes.size(1) == stored,
                    "codes: expected contiguous [rows, bytes] of int8 for 8 bits, uint8 for 4");
    STD_TORCH_CHECK(scales.is_contiguous() && scales.scalar_type() == ScalarType::Float && scales.numel() == rows.size(0), "scales: expected float32 [rows]");
    return aligned(type, width, rows, codes);
}

void quantize_rows_(const Tensors& codes, const Tensors& scales, const Tensors& rows_in, int64_t bits) {
    STD_TORCH_CHECK(bits == 8 || bits == 4, "bits: expected 8 or 4, got ", bits);
    const Tensors rows = contiguous(rows_in);
    clients_of({}, rows.size());
    check_count(codes.size(), rows.size(), "codes");
    check_count(scales.size(), rows.size(), "scales");
    check_rows(rows, rows[0], "rows");
    const Type type = type_of(rows[0]);
    Launch launch(rows[0], 0, "quantize_rows_");
    for (size_t m = 0; m < rows.size(); ++m) {
        const int64_t count = rows[m].size(0), width = rows[m].size(1);
        const int is_aligned = check_codes(rows[m], codes[m], scales[m], bits, type);
        launch.module({{rows[m].const_data_ptr(), codes[m].mutable_data_ptr(), scales[m].mutable_data_ptr(), nullptr},
                       0,
                       static_cast<int>(width),
                       static_cast<int>(count),
                       0,
                       is_aligned},
                      count);
    }
    check(hetlora_quantize(launch.start(), type, static_cast<int>(bits)), "quantize_rows_");
}

void dequantize_rows_(const Tensors& out, const Tensors& codes_in, const Tensors& scales_in, int64_t bits) {
    STD_TORCH_CHECK(bits == 8 || bits == 4, "bits: expected 8 or 4, got ", bits);
    const Tensors codes = contiguous(codes_in), scales = contiguous(scales_in);
    clients_of({}, out.size());
    check_count(codes.size(), out.size(), "codes");
    check_count(scales.size(), out.size(), "scales");
    check_rows(out, out[0], "out");
    const Type type = type_of(out[0]);
    Launch launch(out[0], 0, "dequantize_rows_");
    for (size_t m = 0; m < out.size(); ++m) {
        const int64_t count = out[m].size(0), width = out[m].size(1);
        const int is_aligned = check_codes(out[m], codes[m], scales[m], bits, type);
        launch.module({{out[m].mutable_data_ptr(), codes[m].const_data_ptr(), scales[m].const_data_ptr(), nullptr},
                       0,
                       static_cast<int>(width),
                       static_cast<int>(count),
                       0,
                       is_aligned},
                      items_of(count, width, type));
    }
    check(hetlora_dequantize(launch.start(), type, static_cast<int>(bits)), "dequantize_rows_");
}

// ---------------------------------------------------------------- norms

// Queues the Gram matrices of every module; the result is one tensor per module. `after` runs on the same table.
template <class After>
Tensors launch_gram(const Tensors& rows, const Ints& ranks, Type result, const char* op, After after) {
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
        const hetlora::GramLayout layout = hetlora::gram_layout(offsets);
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

Tensors gram(const Tensors& rows_in, const Ints& ranks, bool exact) {
    const Tensors rows = contiguous(rows_in);
    return launch_gram(rows, ranks, exact ? Type::f64 : sums_of(type_of(rows[0])), "gram", [](const HetloraCall*, int) {});
}

Tensor delta_norms(const Tensors& a, const Tensors& bt, const Ints& ranks, bool exact) {
    check_count(bt.size(), a.size(), "bt");
    const int64_t modules = static_cast<int64_t>(a.size());
    Tensors rows = contiguous(a);
    for (const Tensor& t : bt) rows.push_back(torch::stable::contiguous(t));
    Ints twice(ranks);
    twice.insert(twice.end(), ranks.begin(), ranks.end());
    const Type result = exact ? Type::f64 : sums_of(type_of(rows[0]));
    std::optional<Tensor> out;
    const Tensors grams = launch_gram(rows, twice, result, "delta_norms", [&](const HetloraCall* call, int clients) {
        out = torch::stable::new_empty(rows[0], {clients, modules}, scalar_of(result));
        check(hetlora_delta_norms(call, result, out->mutable_data_ptr()), "delta_norms");
    });
    return *out;
}

// offsets [K + 1], then the first tail row of each client [K]; without cuts nothing is a tail.
std::vector<int> cut_layout(const Ints& ranks, const Ints& keep, size_t module, int clients, int64_t rows) {
    std::vector<int> values = checked_offsets(ranks, module, clients, rows);
    for (int k = 0; k < clients; ++k) {
        const int64_t rank = ranks[module * clients + k], cut = keep.empty() ? rank : keep[module * clients + k];
        values.push_back(values[k] + static_cast<int>(std::clamp<int64_t>(cut, 0, rank)));
    }
    return values;
}

Tensor tail_norms(const Tensors& rows_in, const Ints& ranks, const Ints& keep) {
    const Tensors rows = contiguous(rows_in);
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

// ---------------------------------------------------------------- optimisers

// A per-client tensor of the step, or null.
template <class T>
const T* per_client(const std::optional<Tensor>& t, ScalarType type, int clients, const char* name) {
    if (!t) return nullptr;
    STD_TORCH_CHECK(t->scalar_type() == type && t->numel() == clients && t->is_contiguous(), name, ": expected one contiguous entry per client");
    return static_cast<const T*>(t->const_data_ptr());
}

struct PerClient {
    const Tensor& lr;
    std::optional<Tensor> step, active, clip, lam;
};

// What is common to both: table, norms, combine, prepare. `update` queues the optimiser's own kernel.
template <class Update>
void optimise(const Tensors& params, const Tensors& grads_in, const std::vector<const Tensors*>& states, const PerClient& each, const Ints& ranks, const Ints& keep,
              const double (&rule)[3], const char* op, Update update) {
    const Tensors grads = contiguous(grads_in);
    STD_TORCH_CHECK(params.size() % 2 == 0, "params: expected the A factors and then the Bt factors");
    const size_t modules = params.size() / 2;
    const int clients = clients_of(ranks, modules);
    if (each.lam) check_count(keep.size(), ranks.size(), "keep");
    Launch launch(params[0], clients, op);
    std::vector<const Tensors*> lists = {&params, &grads};
    lists.insert(lists.end(), states.begin(), states.end());
    for (const Tensors* list : lists) {
        check_count(list->size(), params.size(), "grads and states");
        check_rows(*list, params[0], "params, grads and states");
    }
    const Type type = type_of(params[0]);
    int64_t count = 0;
    for (size_t i = 0; i < params.size(); ++i) {
        const int64_t width = params[i].size(1), items = items_of(params[i].size(0), width, type);
        const std::vector<int> layout = cut_layout(ranks, each.lam ? keep : Ints(), i % modules, clients, params[i].size(0));
        Module module{{}, count, static_cast<int>(width), static_cast<int>(params[i].size(0)), launch.layout(layout), 1};
        for (size_t at = 0; at < lists.size(); ++at) {
            const Tensor& t = (*lists[at])[i];
            STD_TORCH_CHECK(t.size(0) == params[i].size(0) && t.size(1) == width, "grads and states: expected the shapes of params");
            module.p[at] = t.const_data_ptr();
            module.aligned = module.aligned && aligned(type, width, t);
        }
        launch.module(module, items);
        count += items;
    }
    const ScalarType sums = scalar_of(sums_of(type));
    const Tensor coefficients = launch.workspace(int64_t(params.size()) * clients, sums), steps = launch.workspace(int64_t(clients) * 4, sums);
    const Tensor squares = launch.workspace(int64_t(modules) * clients, ScalarType::Double);
    const Tensor partials = launch.workspace(each.clip ? 3 * count : each.lam ? count : 0, ScalarType::Double);
    HetloraStep step{per_client<double>(each.lr, ScalarType::Double, clients, "lr"),
                     per_client<double>(each.clip, ScalarType::Double, clients, "clip"),
                     per_client<double>(each.lam, ScalarType::Double, clients, "lam"),
                     static_cast<const double*>(partials.const_data_ptr()),
                     per_client<int64_t>(each.step, ScalarType::Long, clients, "step"),
                     per_client<bool>(each.active, ScalarType::Bool, clients, "active"),
                     count,
                     coefficients.mutable_data_ptr(),
                     steps.mutable_data_ptr(),
                     static_cast<double*>(squares.mutable_data_ptr())};
    const HetloraCall* call = launch.start();
    if (each.clip || each.lam) check(hetlora_squares(call, type, each.clip.has_value(), static_cast<double*>(partials.mutable_data_ptr()), count), op);
    check(hetlora_prepare(call, type, &step, rule[0], rule[1], rule[2]), op);
    check(update(call, type, &step), op);
}

void adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensor& lr, const Tensor& step,
            const Tensor& active, const std::optional<Tensor>& clip, const std::optional<Tensor>& lam, const Ints& ranks, const Ints& keep, double beta1,
            double beta2, double eps, double weight_decay) {
    optimise(params, grads, {&exp_avg, &exp_avg_sq}, {lr, step, active, clip, lam}, ranks, keep, {beta1, beta2, weight_decay}, "adamw_",
             [&](const HetloraCall* call, Type type, const HetloraStep* prepared) { return hetlora_adamw(call, type, prepared, beta1, beta2, eps); });
}

void sgd_(const Tensors& params, const Tensors& grads, const Tensors& buffers, const Tensor& lr, const Tensor& active, const std::optional<Tensor>& clip,
          const std::optional<Tensor>& lam, const Ints& ranks, const Ints& keep, double momentum, double weight_decay) {
    std::vector<const Tensors*> states;
    if (!buffers.empty()) states.push_back(&buffers);
    optimise(params, grads, states, {lr, std::nullopt, active, clip, lam}, ranks, keep, {0, 0, 0}, "sgd_",
             [&](const HetloraCall* call, Type type, const HetloraStep* prepared) { return hetlora_sgd(call, type, prepared, momentum, weight_decay); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) {
    m.impl("truncate_", TORCH_BOX(&truncate_));
    m.impl("aggregate_", TORCH_BOX(&aggregate_));
    m.impl("accumulate_", TORCH_BOX(&accumulate_));
    m.impl("quantize_rows_", TORCH_BOX(&quantize_rows_));
    m.impl("dequantize_rows_", TORCH_BOX(&dequantize_rows_));
    m.impl("gram", TORCH_BOX(&gram));
    m.impl("delta_norms", TORCH_BOX(&delta_norms));
    m.impl("tail_norms", TORCH_BOX(&tail_norms));
    m.impl("adamw_", TORCH_BOX(&adamw_));
    m.impl("sgd_", TORCH_BOX(&sgd_));
}
