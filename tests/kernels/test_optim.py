"""AdamW and SGD over a bank against torch.optim client by client, with autograd of loss + penalty and torch's own clipping."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accuracy import assert_as_exact_as
from kernel_cases import drawn, guarded, same_bits, scattered
from torch import Tensor

import hetlora_kernels as hk
from hetlora_kernels import optim

SHAPES = {"q": (6, 5), "mlp.up": (9, 4), "v": (3, 7)}
RANKS = {"q": [4, 1, 3, 0], "mlp.up": [8, 3, 2, 1], "v": [1, 0, 7, 2]}
KEEP = {"q": [3, 1, 1, 0], "mlp.up": [5, 0, 2, 0], "v": [0, 0, 9, 1]}  # part, everything, nothing and more than everything


def make_bank(dtype, device, seed=0) -> hk.AdapterBank:
    g = drawn(seed)
    bank = hk.AdapterBank(SHAPES, RANKS, dtype=dtype, device=device, generator=g)
    for t in bank.bt.values():
        t.data.copy_(torch.randn(t.shape, generator=g) * 0.3)
    return bank


def own_factors(bank: hk.AdapterBank, k: int) -> list[Tensor]:
    """Leaves of client k: all A, then all B^T, as a torch optimiser takes them."""
    rows = {name: layout.rows(k) for name, layout in bank.layouts.items()}
    return [t.detach()[rows[name]].clone().requires_grad_() for side in (bank.a, bank.bt) for name, t in side.items()]


def targets(device, dtype=torch.float64):
    g = drawn(7)
    return [torch.randn(m, n, generator=g, dtype=torch.float64).to(device, dtype) for m, n in SHAPES.values()]


def client_loss(factors: list[Tensor], k: int, step: int, device) -> Tensor:
    half = len(factors) // 2
    pairs = zip(factors[:half], factors[half:], targets(device, factors[0].dtype), strict=True)
    return sum(((bt.t() @ a - (1 + k + 0.1 * step) * target) ** 2).sum() for a, bt, target in pairs)


def penalty(factors: list[Tensor], keep: list[int]) -> Tensor:
    half = len(factors) // 2
    return sum(torch.linalg.norm(a[q:]) * torch.linalg.norm(bt[q:]) for a, bt, q in zip(factors[:half], factors[half:], keep, strict=True))


def train(make, make_torch, steps, device, clip=None, tail=None, active=lambda step: [True] * 4, between=lambda opt, step: None):
    """`steps` steps of the bank's optimiser and of one torch optimiser a client, in float64; returns (bank, factors of each client)."""
    bank = make_bank(torch.float64, device)
    opt = make(bank)
    alone = [own_factors(bank, k) for k in range(4)]
    torch_opts = [make_torch(factors, k) for k, factors in enumerate(alone)]
    for step in range(steps):
        opt.zero_grad()
        mine = [[t[bank.layouts[name].rows(k)] for side in (bank.a, bank.bt) for name, t in side.items()] for k in range(4)]
        sum(client_loss(factors, k, step, device) for k, factors in enumerate(mine)).backward()
        opt.step(active=active(step))
        between(opt, step)
        for k, (factors, torch_opt) in enumerate(zip(alone, torch_opts, strict=True)):
            if not active(step)[k]:
                continue
            torch_opt.zero_grad()
            loss = client_loss(factors, k, step, device)
            if tail is not None:
                loss = loss + tail[0][k] * penalty(factors, [KEEP[name][k] for name in SHAPES])
            loss.backward()
            if clip is not None and clip[k]:
                torch.nn.utils.clip_grad_norm_(factors, clip[k])
            torch_opt.step()
            between(torch_opt, step)
    return bank, alone


def assert_same_factors(bank, alone):
    for k, factors in enumerate(alone):
        for mine, theirs in zip(own_factors(bank, k), factors, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-10, atol=1e-12)


LR = [1e-2, 3e-2, 1e-3, 5e-2]
CLIP = [1.0, 0.0, 50.0, 1e6]  # bites, off, bites, never bites
LAM = [0.5, 0.0, 2.0, 0.1]


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("tail", [None, (LAM, KEEP)])
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_adamw_is_torch_per_client(clip, tail, weight_decay, device):
    bank, alone = train(
        lambda bank: hk.AdamW(bank, lr=LR, weight_decay=weight_decay, clip_norm=clip, tail_penalty=tail, betas=(0.8, 0.95), eps=1e-6),
        lambda factors, k: torch.optim.AdamW(factors, lr=LR[k], weight_decay=weight_decay, betas=(0.8, 0.95), eps=1e-6),
        *(6, device, clip, tail),
    )
    assert_same_factors(bank, alone)


@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("tail", [None, (LAM, KEEP)])
@pytest.mark.parametrize(("momentum", "weight_decay"), [(0.0, 0.0), (0.0, 0.1), (0.9, 0.0), (0.5, 0.2)])
def test_sgd_is_torch_per_client(clip, tail, momentum, weight_decay, device):
    rates = [lr * 0.02 for lr in LR]
    bank, alone = train(
        lambda bank: hk.SGD(bank, lr=rates, momentum=momentum, weight_decay=weight_decay, clip_norm=clip, tail_penalty=tail),
        lambda factors, k: torch.optim.SGD(factors, lr=rates[k], momentum=momentum, weight_decay=weight_decay),
        *(5, device, clip, tail),
    )
    assert_same_factors(bank, alone)


def test_defaults_are_those_of_torch_but_for_the_weight_decay(device):
    bank, alone = train(lambda bank: hk.AdamW(bank), lambda factors, k: torch.optim.AdamW(factors, weight_decay=0.0), 3, device)
    assert_same_factors(bank, alone)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("clip", [None, CLIP])
@pytest.mark.parametrize("frozen", ["a", "b"])
def test_a_frozen_factor_leaves_torch_on_the_other_alone(kind, clip, frozen, device):
    """The other steps as torch steps it with its own gradient clipped; the frozen one keeps its bits, without decay, and has no state."""
    bank = make_bank(torch.float64, device)
    own = [own_factors(bank, k) for k in range(4)]  # A of all modules, then B
    cold, warm = (bank.a, bank.bt) if frozen == "a" else (bank.bt, bank.a)
    assert (bank.freeze_a() if frozen == "a" else bank.freeze_b()) is bank
    before = [t.detach().clone() for t in cold.values()]
    cut = len(SHAPES)
    still, steps = (slice(cut), slice(cut, None)) if frozen == "a" else (slice(cut, None), slice(cut))
    if kind == "adamw":
        opt = hk.AdamW(bank, lr=LR, weight_decay=0.1, clip_norm=clip)
        torch_opts = [torch.optim.AdamW(factors[steps], lr=LR[k], weight_decay=0.1) for k, factors in enumerate(own)]
        state = [*opt.exp_avg, *opt.exp_avg_sq]
    else:
        opt = hk.SGD(bank, lr=LR, weight_decay=0.1, clip_norm=clip, momentum=0.9)
        torch_opts = [torch.optim.SGD(factors[steps], lr=LR[k], weight_decay=0.1, momentum=0.9) for k, factors in enumerate(own)]
        state = opt.buffers
    assert sum(t.numel() for t in state) == sum(t.numel() for t in warm.values()) * (2 if kind == "adamw" else 1)
    for step in range(4):
        opt.zero_grad()
        mine = [[t[bank.layouts[name].rows(k)] for side in (bank.a, bank.bt) for name, t in side.items()] for k in range(4)]
        sum(client_loss(factors, k, step, device) for k, factors in enumerate(mine)).backward()
        assert all(t.grad is None for t in cold.values())
        opt.step()
        for k, (factors, torch_opt) in enumerate(zip(own, torch_opts, strict=True)):
            torch_opt.zero_grad()
            fixed = [t.detach() for t in factors[still]]
            client_loss([*fixed, *factors[steps]] if frozen == "a" else [*factors[steps], *fixed], k, step, device).backward()
            if clip is not None and clip[k]:
                torch.nn.utils.clip_grad_norm_(factors[steps], clip[k])
            torch_opt.step()
    assert all(same_bits(t, old) for t, old in zip(cold.values(), before, strict=True))
    assert_same_factors(bank, own)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_step_counts_of_their_own(kind, device):
    """Client k leaves after k + 1 steps: its bias correction is that of its own count."""

    def active(step):
        return [step <= k for k in range(4)]

    bank, alone = train(
        lambda bank: hk.AdamW(bank, lr=LR) if kind == "adamw" else hk.SGD(bank, lr=[1e-3] * 4, momentum=0.9),
        lambda factors, k: torch.optim.AdamW(factors, lr=LR[k], weight_decay=0.0) if kind == "adamw" else torch.optim.SGD(factors, lr=1e-3, momentum=0.9),
        *(5, device),
        active=active,
    )
    assert_same_factors(bank, alone)


def test_late_starters(device):
    """A client whose first step is the bank's fourth starts at step one."""
    bank, alone = train(
        lambda bank: hk.AdamW(bank, lr=LR),
        lambda factors, k: torch.optim.AdamW(factors, lr=LR[k], weight_decay=0.0),
        *(5, device),
        active=lambda step: [step >= k for k in range(4)],
    )
    assert_same_factors(bank, alone)


def test_learning_rate_may_be_written_between_steps(device):
    def decay(opt, step):
        if isinstance(opt, torch.optim.Optimizer):
            opt.param_groups[0]["lr"] *= 0.5
        else:
            opt.lr.mul_(0.5)

    bank, alone = train(lambda bank: hk.AdamW(bank, lr=LR), lambda f, k: torch.optim.AdamW(f, lr=LR[k], weight_decay=0.0), 4, device, between=decay)
    assert_same_factors(bank, alone)


# ---------------------------------------------------------------- in the types people train in


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_as_exact_as_torch_in_the_same_type(kind, dtype, device):
    """The same rounded gradients for five steps; moments and buffers are kept in the factors' type by both."""
    runs = []
    for seed in range(3):
        bank = make_bank(dtype, device, seed)
        opt = hk.AdamW(bank, lr=LR, weight_decay=0.01, eps=1e-4) if kind == "adamw" else hk.SGD(bank, lr=LR, momentum=0.9, weight_decay=0.01)
        start = [own_factors(bank, k) for k in range(4)]

        def torch_optimiser(factors, k):
            if kind == "adamw":
                return torch.optim.AdamW(factors, lr=LR[k], weight_decay=0.01, eps=1e-4, foreach=False)
            return torch.optim.SGD(factors, lr=LR[k], momentum=0.9, weight_decay=0.01, foreach=False)

        sides = [[[f.detach().cpu().to(kind_) for f in factors] for factors in start] for kind_ in (dtype, torch.float64)]
        opts = [[torch_optimiser(factors, k) for k, factors in enumerate(side)] for side in sides]
        g = drawn(seed)
        for _ in range(5):
            for side in (bank.a, bank.bt):
                for t in side.values():
                    t.grad = torch.randn(t.shape, generator=g).to(device, dtype)
            opt.step()
            for side, side_opts in zip(sides, opts, strict=True):
                for k, (factors, one) in enumerate(zip(side, side_opts, strict=True)):
                    grads = [t.grad[bank.layouts[name].rows(k)] for part in (bank.a, bank.bt) for name, t in part.items()]
                    for factor, grad in zip(factors, grads, strict=True):
                        factor.grad = grad.cpu().to(factor.dtype)
                    one.step()
        flat = [torch.cat([f.flatten() for factors in side for f in factors]) for side in ([own_factors(bank, k) for k in range(4)], *sides)]
        runs.append([side.detach().double() - flat[2].detach() for side in flat[:2]])
    # Element by element in both: no order of sums, so nothing of the processor.
    assert_as_exact_as(*(torch.cat(own) for own in zip(*runs, strict=True)), factor=1, what=kind)
    state = opt.exp_avg + opt.exp_avg_sq if kind == "adamw" else opt.buffers
    assert {t.dtype for t in state} == {dtype} and not any(t.requires_grad for t in state)


# ---------------------------------------------------------------- who is touched


def random_grads(bank, seed=0):
    g = drawn(seed)
    for t in bank.parameters():
        t.grad = torch.randn(t.shape, generator=g).to(t)


def make_optimiser(kind, bank):
    options = {"clip_norm": 1.0, "tail_penalty": (0.3, KEEP), "weight_decay": 0.1}
    return hk.AdamW(bank, lr=0.1, **options) if kind == "adamw" else hk.SGD(bank, lr=0.1, momentum=0.9, **options)


def everything(bank, opt, k):
    """Client k's factors and optimiser state."""
    states = (opt.exp_avg, opt.exp_avg_sq) if isinstance(opt, hk.AdamW) else (opt.buffers,)
    layouts = [*bank.layouts.values()] * 2
    return [t.detach()[own.rows(k)].clone() for group in ([*bank.parameters()], *states) for t, own in zip(group, layouts, strict=True)]


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_inactive_clients_do_not_change_by_a_bit(kind, dtype, device):
    bank = make_bank(dtype, device)
    opt = make_optimiser(kind, bank)
    random_grads(bank)
    opt.step()
    before = [everything(bank, opt, k) for k in range(4)]
    opt.step(active=torch.tensor([True, False, True, False]))
    after = [everything(bank, opt, k) for k in range(4)]
    for k in range(4):
        unchanged = [same_bits(one, other) for one, other in zip(before[k], after[k], strict=True) if one.numel()]
        assert all(unchanged) if k in (1, 3) else not any(unchanged)
    if kind == "adamw":
        assert opt.step_count.tolist() == [2, 1, 2, 1]


@pytest.mark.parametrize("active", [None, [True] * 4, torch.ones(4, dtype=torch.bool)], ids=["default", "list", "tensor"])
def test_a_step_of_everyone_uses_the_mask_made_once(active, device, monkeypatch):
    calls = []
    bank = make_bank(torch.float32, device)
    opt = hk.AdamW(bank)
    random_grads(bank)
    monkeypatch.setattr(optim, "call", lambda name: lambda *args: calls.append(args))
    opt.step(active)
    opt.step(active)
    assert [args[7] is opt._everyone for args in calls] == [True] * 2 and opt._everyone.device == bank.device


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("cast", [torch.bfloat16, torch.float16])
def test_casts_are_the_factors_rounded_once(kind, cast, device):
    """After steps of some clients, and after somebody else wrote a factor: what a layer finds is always the factor as it is."""
    bank, plain = make_bank(torch.float32, device), make_bank(torch.float32, device)
    opt, without = maker(kind)(bank, lr=0.1, cast=cast), maker(kind)(plain, lr=0.1)

    def check():
        for name in bank.shapes:
            for copy, factor in zip(bank.casts.of(name), (bank.a[name], bank.bt[name]), strict=True):
                assert copy.dtype == cast and not copy.requires_grad and torch.equal(copy, factor.detach().to(cast))

    check()
    for active in ([True] * 4, [True, False, True, False]):
        for own, stepper in ((bank, opt), (plain, without)):
            random_grads(own)
            stepper.step(active)
        assert all(copy._version for copy in bank.casts.copies)  # a graph that was recorded before refuses the new values
        check()
    assert all(same_bits(one, other) for one, other in zip(bank.parameters(), plain.parameters(), strict=True))
    with torch.no_grad():
        bank.a["mlp.up"].mul_(2)
    opt.step([False, True, False, False])  # whose rows alone it writes
    check()


def test_a_cast_to_anything_but_the_types_of_a_base_is_refused():
    with pytest.raises(ValueError, match=r"^cast: expected torch.bfloat16 or torch.float16, .* got torch.float64"):
        hk.SGD(make_bank(torch.float32, "cpu"), cast=torch.float64)


def test_a_mask_goes_up_from_pinned_memory_without_a_wait(monkeypatch):
    """With stand-ins for the device: a copy from pageable memory waits for it."""
    copies, device = [], SimpleNamespace(type="cuda")
    opt = hk.SGD(make_bank(torch.float32, "cpu"))
    opt.bank = SimpleNamespace(num_clients=4, device=device)
    pinned = object()
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda mask: SimpleNamespace(to=lambda to, non_blocking: copies.append((to, non_blocking)) or pinned))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert opt._active([True, False, True, True]) is pinned and copies == [(device, True)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert opt._active([True] * 4) is opt._everyone and opt._active(None) is opt._everyone
    with pytest.raises(ValueError, match=r"^active: expected a tensor on .* capture of a CUDA graph"):
        opt._active([True, False, True, True])


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_one_clients_nan_touches_nobody_else(kind, device):
    outcomes = []
    for spoil in (False, True):
        bank = make_bank(torch.float32, device)
        opt = make_optimiser(kind, bank)
        random_grads(bank)
        if spoil:
            bank.bt["mlp.up"].grad[bank.layouts["mlp.up"].rows(1)][0, 0] = float("nan")
        opt.step()
        outcomes.append([everything(bank, opt, k) for k in range(4)])
    for k in range(4):
        equal = all(same_bits(one, other) for one, other in zip(outcomes[0][k], outcomes[1][k], strict=True))
        assert equal == (k != 1)


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_zero_norm_tail_has_the_zero_subgradient(kind, device):
    """B = 0 at the start: the penalty's gradient to A is 0 (its factor is ||B tail||), to B it is the zero sub-gradient; everything finite."""
    bank = hk.AdapterBank(SHAPES, RANKS, device=device)
    twin = hk.AdapterBank(SHAPES, RANKS, device=device)
    for one, other in zip(bank.parameters(), twin.parameters(), strict=True):
        other.data.copy_(one.data)
    with_tail, without = (make(b, lr=0.1, tail_penalty=tail) for b, tail, make in ((bank, (5.0, KEEP), maker(kind)), (twin, None, maker(kind))))
    for b, opt in ((bank, with_tail), (twin, without)):
        random_grads(b)
        opt.step()
    for one, other in zip(bank.parameters(), twin.parameters(), strict=True):
        assert bool(torch.isfinite(one).all()) and same_bits(one, other)


def maker(kind):
    return hk.AdamW if kind == "adamw" else hk.SGD


def test_missing_gradients_are_zero(device):
    bank, twin = make_bank(torch.float64, device), make_bank(torch.float64, device)
    for b in (bank, twin):
        random_grads(b)
    bank.a["q"].grad = None
    twin.a["q"].grad = torch.zeros_like(twin.a["q"])
    for b in (bank, twin):
        make_optimiser("adamw", b).step()
    assert all(same_bits(one, other) for one, other in zip(bank.parameters(), twin.parameters(), strict=True))
    opt = make_optimiser("adamw", bank)
    opt.zero_grad()
    assert all(p.grad is None for p in bank.parameters())


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_memory_around_the_factors_and_layout_of_gradients(kind, device):
    """Nothing outside a factor is written; a non-contiguous gradient counts for what it holds and is not changed."""
    bank, twin = make_bank(torch.float32, device), make_bank(torch.float32, device)
    checks = []
    for t in bank.parameters():
        view, guards_hold = guarded(t.shape, t.dtype, device)
        view.copy_(t.data)
        t.data = view
        checks.append(guards_hold)
    for b in (bank, twin):
        random_grads(b)
    for t in bank.parameters():
        t.grad = scattered(t.grad)
    grads = [t.grad.clone() for t in bank.parameters()]
    for b in (bank, twin):
        make_optimiser(kind, b).step()
    for guards_hold in checks:
        guards_hold()
    assert all(same_bits(one, other) for one, other in zip(bank.parameters(), twin.parameters(), strict=True))
    assert all(same_bits(t.grad, grad) for t, grad in zip(bank.parameters(), grads, strict=True))


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_bitwise_repeatable(kind, device):
    outcomes = []
    for _ in range(2):
        bank = make_bank(torch.float32, device)
        opt = make_optimiser(kind, bank)
        for step in range(3):
            random_grads(bank, step)
            opt.step()
        outcomes.append([p.detach() for p in bank.parameters()])
    assert all(same_bits(one, other) for one, other in zip(*outcomes, strict=True))


# ---------------------------------------------------------------- errors

BAD = [
    (lambda bank: hk.AdamW(bank.to().freeze_a(), tail_penalty=(0.1, KEEP)), ValueError, r"^tail_penalty: expected a bank that trains A and B"),
    (lambda b: hk.AdamW(b, lr=-1.0), ValueError, r"^lr: .*-1\.0"),
    (lambda b: hk.AdamW(b, lr=float("nan")), ValueError, r"^lr: .*nan"),
    (lambda b: hk.AdamW(b, lr=[1.0] * 3), ValueError, r"^lr: expected a number or 4 numbers.*\(3,\)"),
    (lambda b: hk.SGD(b, clip_norm=[1.0]), ValueError, r"^clip_norm: .*\(1,\)"),
    (lambda b: hk.SGD(b, clip_norm=-2.0), ValueError, r"^clip_norm: .*-2\.0"),
    (lambda b: hk.AdamW(b, tail_penalty=0.1), TypeError, r"^tail_penalty: expected a pair"),
    (lambda b: hk.AdamW(b, tail_penalty=(-0.1, [1] * 4)), ValueError, r"^tail_penalty: .*-0\.1"),
    (lambda b: hk.AdamW(b, tail_penalty=(0.1, [1] * 3)), ValueError, r"^tail_penalty: expected 4 integers"),
    (lambda b: hk.AdamW(b, tail_penalty=(0.1, {"q": [1] * 4})), ValueError, r"^tail_penalty: expected keep for the modules"),
    (lambda b: hk.AdamW(b, betas=(1.0, 0.9)), ValueError, r"^betas: "),
    (lambda b: hk.AdamW(b, eps=0.0), ValueError, r"^eps, weight_decay: "),
    (lambda b: hk.AdamW(b, weight_decay=-0.1), ValueError, r"^eps, weight_decay: "),
    (lambda b: hk.SGD(b, momentum=1.0), ValueError, r"^momentum, weight_decay: "),
    (lambda b: hk.SGD(b).step(active=[True] * 3), ValueError, r"^active: expected 4 booleans.*\(3,\)"),
    (lambda b: hk.AdamW(b).step(active=torch.ones(4, 1)), ValueError, r"^active: .*\(4, 1\)"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_errors(call, error, text, device):
    with pytest.raises(error, match=text):
        call(make_bank(torch.float32, device))


@pytest.mark.parametrize("kind", [hk.AdamW, hk.SGD])
def test_a_graph_recorded_before_a_step_is_refused_after_it(kind, device):
    """As with torch's optimisers: its gradients would mix old and new factors."""
    bank = make_bank(torch.float32, device)
    factor = next(iter(bank.parameters()))
    loss = factor.square().sum()
    random_grads(bank)
    kind(bank, lr=0.1).step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
