// adamw_, sgd_: one step of every active client over all its factors, with the tail regulariser's gradient and clipping fused in.
//
// Passes over memory, each only when asked for: the tails of the parameters (regulariser), the gradients (clipping), then parameters, gradients and state
// once. A job is at most kJob elements of one client's one factor, head or tail. Parameters, gradients and state have one type, but m and SGD's buffer may
// be bfloat16 beside float32. Norms are summed in double over jobs of a fixed size in a fixed order: the result does not depend on the number of threads.
// Converting blocks in L1 for one kernel of all types took 1.4 ns an element in bfloat16 where converting in registers takes 0.7.
#include <cmath>

#include "optim_kernels.h"
#include "tensors.h"

namespace hetlora {
namespace {

constexpr int64_t kBlock = 1024;
constexpr int64_t kJob = 16384;

struct Job {
    int64_t factor, client, begin, n;
    bool tail;
};

// The tensors and settings both optimisers share.
struct Bank {
    std::vector<Matrix> params, grads;
    Layout layout;
    std::vector<double> lr, active, clip, lam;
    Integers keep;
    std::vector<Job> jobs;
    std::vector<double> pull, factor;  // [2 M][K] of the regulariser's gradient; [K] of clipping
    int64_t bytes = 0;

    int64_t modules() const { return layout.modules(); }
    int64_t clients() const { return layout.clients(); }
    int64_t threads() const { return part_count(static_cast<int64_t>(jobs.size()), bytes); }
    bool wide() const { return !params.empty() && params[0].type == Type::f64; }
};

Integers module_rows(const std::vector<Matrix>& params) {
    Integers rows = rows_of(params);
    rows.resize(rows.size() / 2);
    return rows;
}

void make_jobs(Bank& bank) {
    for (size_t f = 0; f < bank.params.size(); ++f) {
        const int64_t m = static_cast<int64_t>(f) % bank.modules(), width = bank.params[f].width;
        STD_TORCH_CHECK(bank.params[f].rows == bank.params[m].rows, "params: expected the rows of module ", m, " in both factors");
        STD_TORCH_CHECK(bank.grads[f].rows == bank.params[f].rows && bank.grads[f].width == width, "grads: expected the shapes of params");
        for (int64_t k = 0; k < bank.clients(); ++k) {
            const int64_t rank = bank.layout.rank(m, k), first = bank.layout.first_row(m, k) * width;
            const int64_t head = (bank.lam.empty() ? rank : std::min(rank, bank.keep[m * bank.clients() + k])) * width, end = rank * width;
            for (int64_t begin = 0; begin < end && bank.active[k] != 0;) {
                const bool tail = begin >= head;
                const int64_t n = std::min(kJob, (tail ? end : head) - begin);
                bank.jobs.push_back({static_cast<int64_t>(f), k, first + begin, n, tail});
                begin += n;
                bank.bytes += n * size_of(bank.params[f].type);
            }
        }
    }
}

// body(j, job j) for every job. A thread takes several neighbours: of heads and tails in turn, one of two threads would have all the tails, which cost more.
template <class Body>
void for_jobs(const Bank& bank, const Body& body) {
    const int64_t count = static_cast<int64_t>(bank.jobs.size()), threads = bank.threads(), size = std::clamp<int64_t>(count / (8 * threads), 1, 16);
    for_tasks(threads, (count + size - 1) / size, [&](int64_t, int64_t stretch) {
        for (int64_t j = stretch * size; j < std::min(count, (stretch + 1) * size); ++j) {
            body(j, bank.jobs[j]);
        }
    });
}

Bank make_bank(const Tensors& params, const Tensors& grads, const Tensor& lr, const Tensor& active, const MaybeTensor& clip, const MaybeTensor& lam,
               const Integers& ranks, const Integers& keep) {
    STD_TORCH_CHECK(params.size() % 2 == 0, "params: expected the A factors, then as many B factors, got ", params.size(), " tensors");
    std::vector<Matrix> values = matrices("params", params, params.size()), slopes = matrices("grads", grads, params.size());
    Layout layout(ranks, params.size() / 2, module_rows(values));
    const int64_t clients = layout.clients();
    Bank bank{std::move(values), std::move(slopes), layout, numbers("lr", lr, clients), numbers("active", active, clients), {}, {}, keep, {}, {}, {}};
    STD_TORCH_CHECK(params.empty() || bank.grads[0].type == bank.params[0].type, "grads: expected the type of params");
    if (clip.has_value()) {
        bank.clip = numbers("clip", *clip, clients);
    }
    if (lam.has_value()) {
        STD_TORCH_CHECK(keep.size() == ranks.size(), "keep: expected ", ranks.size(), " integers, got ", keep.size());
        STD_TORCH_CHECK(std::all_of(keep.begin(), keep.end(), [](int64_t q) { return q >= 0; }), "keep: expected integers >= 0");
        bank.lam = numbers("lam", *lam, clients);
    }
    make_jobs(bank);
    return bank;
}

// Sums body(job) over the jobs into slots, in the order of the jobs.
template <class Slot, class Body>
std::vector<double> sum_jobs(const Bank& bank, int64_t slots, const Slot& slot, const Body& body) {
    std::vector<double> partial(bank.jobs.size()), out(static_cast<size_t>(slots));
    for_jobs(bank, [&](int64_t j, const Job& job) { partial[j] = body(job); });
    for (size_t j = 0; j < partial.size(); ++j) {
        out[slot(bank.jobs[j])] += partial[j];
    }
    return out;
}

// pull = lam ||other tail|| / ||own tail||, 0 at a zero norm.
void find_pulls(Bank& bank) {
    const int64_t clients = bank.clients(), modules = bank.modules();
    bank.pull.assign(static_cast<size_t>(2 * modules * clients), 0.0);
    if (bank.lam.empty()) {
        return;
    }
    const std::vector<double> squares = sum_jobs(
        bank, 2 * modules * clients, [&](const Job& job) { return job.factor * clients + job.client; },
        [&](const Job& job) {
            const Matrix& p = bank.params[job.factor];
            return job.tail ? sum_squares(p.type, p.at(job.begin), job.n) : 0.0;
        });
    for (int64_t i = 0; i < modules * clients; ++i) {
        const double a = std::sqrt(squares[i]), b = std::sqrt(squares[modules * clients + i]), lam = bank.lam[i % clients];
        bank.pull[i] = a > 0 ? lam * b / a : 0.0;
        bank.pull[modules * clients + i] = b > 0 ? lam * a / b : 0.0;
    }
}

template <class Sum>
double penalised_squares(const Bank& bank, const Job& job) {
    const Matrix &p = bank.params[job.factor], &g = bank.grads[job.factor];
    if (!job.tail) {
        return sum_squares(g.type, g.at(job.begin), job.n);
    }
    alignas(64) Sum out[kBlock];
    double sum = 0;
    for (int64_t i = 0; i < job.n; i += kBlock) {
        const int64_t n = std::min(kBlock, job.n - i), at = job.begin + i;
        penalise_block(p.type, p.at(at), g.at(at), out, n, bank.pull[job.factor * bank.clients() + job.client]);
        sum += sum_squares(sizeof(Sum) == 8 ? Type::f64 : Type::f32, out, n);
    }
    return sum;
}

template <class Sum>
void find_clip_factors(Bank& bank) {
    bank.factor.assign(static_cast<size_t>(bank.clients()), 1.0);
    if (bank.clip.empty()) {
        return;
    }
    const std::vector<double> squares =
        sum_jobs(bank, bank.clients(), [](const Job& job) { return job.client; }, [&](const Job& job) { return penalised_squares<Sum>(bank, job); });
    for (int64_t k = 0; k < bank.clients(); ++k) {
        const double factor = bank.clip[k] / (std::sqrt(squares[k]) + 1e-6);
        // Written so that a norm of NaN gives a factor of NaN.
        bank.factor[k] = bank.clip[k] > 0 ? (factor > 1 ? 1.0 : factor) : 1.0;
    }
}

// kernel(type, type of the first state, span, step of the client) for every job; `state` has up to two matrices for each factor.
template <class Sum, class Kernel>
void step_jobs(const Bank& bank, const std::vector<const std::vector<Matrix>*>& state, const std::vector<Step<Sum>>& steps, const Kernel& kernel) {
    for_jobs(bank, [&](int64_t, const Job& job) {
        const Matrix &p = bank.params[job.factor], &g = bank.grads[job.factor];
        Span span{p.at(job.begin), g.at(job.begin), {nullptr, nullptr}, job.n, bank.pull[job.factor * bank.clients() + job.client], job.tail};
        for (size_t i = 0; i < state.size(); ++i) {
            span.state[i] = (*state[i])[job.factor].at(job.begin);
        }
        kernel(p.type, state.empty() ? p.type : (*state[0])[job.factor].type, span, steps[job.client]);
    });
}

// first: of m and SGD's buffer.
void check_state(const char* name, const Bank& bank, const std::vector<Matrix>& state, bool first) {
    for (size_t f = 0; f < state.size(); ++f) {
        STD_TORCH_CHECK(state[f].rows == bank.params[f].rows && state[f].width == bank.params[f].width, name, ": expected the shapes of params");
        const bool half = first && bank.params[f].type == Type::f32 && state[f].type == Type::bf16;
        STD_TORCH_CHECK(half || state[f].type == bank.params[f].type, name, ": expected the type of params", first ? ", or bfloat16 beside float32" : "");
    }
}

void write_back(std::vector<Matrix>& list) {
    for (Matrix& each : list) {
        each.write_back();
    }
}

template <class Sum>
std::vector<Step<Sum>> prepare(Bank& bank) {
    find_pulls(bank);
    find_clip_factors<Sum>(bank);
    std::vector<Step<Sum>> steps(static_cast<size_t>(bank.clients()));
    for (int64_t k = 0; k < bank.clients(); ++k) {
        steps[k].clip = static_cast<Sum>(bank.factor[k]);
    }
    return steps;
}

template <class Sum>
void adamw_run(Bank& bank, std::vector<Matrix>& means, std::vector<Matrix>& squares, const std::vector<double>& count, double beta1, double beta2, double eps,
               double weight_decay) {
    std::vector<Step<Sum>> steps = prepare<Sum>(bank);
    for (int64_t k = 0; k < bank.clients(); ++k) {
        Step<Sum>& s = steps[k];
        s.decay = static_cast<Sum>(1 - bank.lr[k] * weight_decay);
        s.rate = static_cast<Sum>(bank.lr[k] / (1 - std::pow(beta1, count[k])));
        s.one_minus_beta1 = static_cast<Sum>(1 - beta1);
        s.beta2 = static_cast<Sum>(beta2);
        s.one_minus_beta2 = static_cast<Sum>(1 - beta2);
        s.eps = static_cast<Sum>(eps);
        s.denominator = static_cast<Sum>(1 / std::sqrt(1 - std::pow(beta2, count[k])));
    }
    step_jobs(bank, {&means, &squares}, steps, [](Type type, Type state, const Span& span, const Step<Sum>& s) { adamw_block(type, state, span, s); });
}

// What was stepped, once more in the type of `copies`, which are like params or none.
template <class Sum>
void cast_jobs(const Bank& bank, std::vector<Matrix>& copies) {
    if (copies.empty()) {
        return;
    }
    for_jobs(bank, [&](int64_t, const Job& job) {
        const Matrix &from = bank.params[job.factor], &to = copies[job.factor];
        alignas(64) Sum values[kBlock];
        for (int64_t i = 0; i < job.n; i += kBlock) {
            const int64_t n = std::min(kBlock, job.n - i);
            load_block(from.type, from.at(job.begin + i), values, n);
            store_block(to.type, to.at(job.begin + i), values, n);
        }
    });
    write_back(copies);
}

std::vector<Matrix> casts_of(const Bank& bank, const Tensors& casts) {
    std::vector<Matrix> copies = matrices("casts", casts, casts.empty() ? 0 : bank.params.size());
    for (size_t f = 0; f < copies.size(); ++f) {
        STD_TORCH_CHECK(copies[f].rows == bank.params[f].rows && copies[f].width == bank.params[f].width, "casts: expected the shapes of params");
    }
    return copies;
}

void adamw(const Tensors& params, const Tensors& grads, const Tensors& exp_avg, const Tensors& exp_avg_sq, const Tensors& casts, const Tensor& lr, Tensor step,
           const Tensor& active, const MaybeTensor& clip, const MaybeTensor& lam, const Integers& rank_list, const Integers& keep_list, double beta1,
           double beta2, double eps, double weight_decay) {
    const Integers ranks = expanded("ranks", rank_list, params.size() / 2), keep = expanded("keep", keep_list, params.size() / 2);
    Bank bank = make_bank(params, grads, lr, active, clip, lam, ranks, keep);
    std::vector<Matrix> means = matrices("exp_avg", exp_avg, params.size()), squares = matrices("exp_avg_sq", exp_avg_sq, params.size());
    check_state("exp_avg", bank, means, true);
    check_state("exp_avg_sq", bank, squares, false);
    std::vector<Matrix> copies = casts_of(bank, casts);
    STD_TORCH_CHECK(step.scalar_type() == ScalarType::Long && step.is_contiguous(), "step: expected contiguous int64");
    std::vector<double> count = numbers("step", step, bank.clients());
    int64_t* counted = static_cast<int64_t*>(step.mutable_data_ptr());
    for (int64_t k = 0; k < bank.clients(); ++k) {
        count[k] += bank.active[k] != 0;
        counted[k] += bank.active[k] != 0;
    }
    if (bank.wide()) {
        adamw_run<double>(bank, means, squares, count, beta1, beta2, eps, weight_decay);
        cast_jobs<double>(bank, copies);
    } else {
        adamw_run<float>(bank, means, squares, count, beta1, beta2, eps, weight_decay);
        cast_jobs<float>(bank, copies);
    }
    write_back(bank.params);
    write_back(means);
    write_back(squares);
}

template <class Sum>
void sgd_run(Bank& bank, std::vector<Matrix>& buffers, double momentum, double weight_decay) {
    std::vector<Step<Sum>> steps = prepare<Sum>(bank);
    for (int64_t k = 0; k < bank.clients(); ++k) {
        steps[k].decay = static_cast<Sum>(weight_decay);
        steps[k].rate = static_cast<Sum>(bank.lr[k]);
        steps[k].momentum = static_cast<Sum>(momentum);
    }
    std::vector<const std::vector<Matrix>*> state(buffers.empty() ? 0 : 1, &buffers);
    step_jobs(bank, state, steps, [](Type type, Type state, const Span& span, const Step<Sum>& s) { sgd_block(type, state, span, s); });
}

void sgd(const Tensors& params, const Tensors& grads, const Tensors& buffer_list, const Tensors& casts, const Tensor& lr, const Tensor& active,
         const MaybeTensor& clip, const MaybeTensor& lam, const Integers& rank_list, const Integers& keep_list, double momentum, double weight_decay) {
    const Integers ranks = expanded("ranks", rank_list, params.size() / 2), keep = expanded("keep", keep_list, params.size() / 2);
    Bank bank = make_bank(params, grads, lr, active, clip, lam, ranks, keep);
    std::vector<Matrix> buffers = matrices("buffers", buffer_list, buffer_list.empty() ? 0 : params.size());
    check_state("buffers", bank, buffers, true);
    std::vector<Matrix> copies = casts_of(bank, casts);
    if (bank.wide()) {
        sgd_run<double>(bank, buffers, momentum, weight_decay);
        cast_jobs<double>(bank, copies);
    } else {
        sgd_run<float>(bank, buffers, momentum, weight_decay);
        cast_jobs<float>(bank, copies);
    }
    write_back(bank.params);
    write_back(buffers);
}

}  // namespace
}  // namespace hetlora

STABLE_TORCH_LIBRARY_IMPL(hetlora, CPU, library) {
    library.impl("adamw_", TORCH_BOX(&hetlora::adamw));
    library.impl("sgd_", TORCH_BOX(&hetlora::sgd));
}
