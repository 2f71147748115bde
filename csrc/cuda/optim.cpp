// adamw_ and sgd_: checks and table; the kernels are in optim.cu.
#include "calls.h"

namespace {

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

// What is common to both: table, norms, prepare. `update` queues the optimiser's own kernel.
template <class Update>
void optimise(const Tensors& params, const Tensors& grads_in, const std::vector<const Tensors*>& states, const Tensors& casts, const PerClient& each,
              const Integers& rank_list, const Integers& keep_list, const double (&rule)[3], const char* op, Update update) {
    const Tensors grads = contiguous(grads_in);
    STD_TORCH_CHECK(params.size() % 2 == 0, "params: expected the A factors and then the Bt factors");
    const size_t modules = params.size() / 2;
    const Integers ranks = hetlora::expanded("ranks", rank_list, modules), keep = hetlora::expanded("keep", keep_list, modules);
    const int clients = clients_of(ranks, modules);
    if (each.lam) check_count(keep.size(), ranks.size(), "keep");
    Launch launch(params[0], clients, op);
    std::vector<const Tensors*> lists = {&params, &grads};
    lists.insert(lists.end(), states.begin(), states.end());
    const Type type = type_of(params[0]), state = states.empty() || states[0]->empty() ? type : type_of((*states[0])[0]);
    STD_TORCH_CHECK(state == type || (type == Type::f32 && state == Type::bf16), op, ": expected moments of the type of params, or bfloat16 beside float32");
    for (const Tensors* list : lists) {
        check_count(list->size(), params.size(), "grads and states");
        check_rows(*list, !states.empty() && list == states[0] ? (*list)[0] : params[0], "params, grads and states");
    }
    if (!casts.empty()) {
        check_count(casts.size(), params.size(), "casts");
        check_rows(casts, casts[0], "casts");
    }
    int64_t count = 0;
    for (size_t i = 0; i < params.size(); ++i) {
        const int64_t width = params[i].size(1), items = items_of(params[i].size(0), width, type);
        const std::vector<int> layout = cut_layout(ranks, each.lam ? keep : Integers(), i % modules, clients, params[i].size(0));
        Module module{{}, count, static_cast<int>(width), static_cast<int>(params[i].size(0)), launch.layout(layout), 1};
        for (size_t at = 0; at < lists.size(); ++at) {
            const Tensor& t = (*lists[at])[i];
            STD_TORCH_CHECK(t.size(0) == params[i].size(0) && t.size(1) == width, "grads and states: expected the shapes of params");
            module.p[at] = t.const_data_ptr();
            module.aligned = module.aligned && aligned(type, width, t);
        }
        if (!casts.empty()) {
            STD_TORCH_CHECK(casts[i].size(0) == params[i].size(0) && casts[i].size(1) == width, "casts: expected the shapes of params");
            module.p[4] = casts[i].const_data_ptr();
            module.aligned = module.aligned && aligned(type, width, casts[i]);
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
                     const_cast<int64_t*>(per_client<int64_t>(each.step, ScalarType::Long, clients, "step")),
                     per_client<bool>(each.active, ScalarType::Bool, clients, "active"),
                     count,
                     coefficients.mutable_data_ptr(),
                     steps.mutable_data_ptr(),
                     static_cast<double*>(squares.mutable_data_ptr()),
                     casts.empty() ? type : type_of(casts[0]),
                     state};
    const HetloraCall* call = launch.start();
    if (each.clip || each.lam) check(hetlora_squares(call, type, each.clip.has_value(), static_cast<double*>(partials.mutable_data_ptr()), count), op);
    check(hetlora_prepare(call, type, &step, rule[0], rule[1], rule[2]), op);
    check(update(call, type, &step), op);
}

void adamw_(const Tensors& params, const Tensors& grads, const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensors& casts, const Tensor& lr,
            const Tensor& step, const Tensor& active, const std::optional<Tensor>& clip, const std::optional<Tensor>& lam, const Integers& ranks,
            const Integers& keep, double beta1, double beta2, double eps, double weight_decay) {
    optimise(params, grads, {&exp_avg, &exp_avg_sq}, casts, {lr, step, active, clip, lam}, ranks, keep, {beta1, beta2, weight_decay}, "adamw_",
             [&](const HetloraCall* call, Type type, const HetloraStep* prepared) { return hetlora_adamw(call, type, prepared, beta1, beta2, eps); });
}

void sgd_(const Tensors& params, const Tensors& grads, const Tensors& buffers, const Tensors& casts, const Tensor& lr, const Tensor& active,
          const std::optional<Tensor>& clip, const std::optional<Tensor>& lam, const Integers& ranks, const Integers& keep, double momentum,
          double weight_decay) {
    std::vector<const Tensors*> states;
    if (!buffers.empty()) states.push_back(&buffers);
    optimise(params, grads, states, casts, {lr, std::nullopt, active, clip, lam}, ranks, keep, {0, 0, 0}, "sgd_",
             [&](const HetloraCall* call, Type type, const HetloraStep* prepared) { return hetlora_sgd(call, type, prepared, momentum, weight_decay); });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(HETLORA_NAMESPACE, HETLORA_DISPATCH_KEY, m) {
    m.impl("adamw_", TORCH_BOX(&adamw_));
    m.impl("sgd_", TORCH_BOX(&sgd_));
}
