"""AdamW and SGD over a bank against torch.optim client by client, with autograd of loss + penalty and torch's own clipping."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from accuracy import assert_as_exact_as
from kernel_cases import drawn, same_bits
from optim_cases import KEEP, SHAPES, make_bank, own_factors
from torch import Tensor

import hetlora_kernels as hk


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


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_moments_in_bfloat16_are_rounded_once_a_step(kind, device):
    """To the bit a step in float32 whose first moment, or momentum, is rounded after each step; AdamW's second moment stays in float32."""
    half, wide = (make_bank(torch.float32, device) for _ in range(2))
    settings = {"lr": LR, "clip_norm": CLIP, "tail_penalty": (LAM, KEEP), "weight_decay": 0.1}
    make = hk.AdamW if kind == "adamw" else partial(hk.SGD, momentum=0.9)
    opt, other = make(half, moments_dtype=torch.bfloat16, **settings), make(wide, **settings)
    first, rounded = (own.exp_avg if kind == "adamw" else own.buffers for own in (opt, other))
    g = drawn(3)
    for active in ([True] * 4, [True, False, True, True], [True] * 4):
        for one, two in zip(half.parameters(), wide.parameters(), strict=True):
            one.grad = torch.randn(one.shape, generator=g).to(device)
            two.grad = one.grad.clone()
        opt.step(active)
        other.step(active)
        for moment in rounded:
            moment.copy_(moment.bfloat16())
        assert {t.dtype for t in first} == {torch.bfloat16}
        assert all(same_bits(one.float(), two) for one, two in zip(first, rounded, strict=True))
        assert all(same_bits(one, two) for one, two in zip(half.parameters(), wide.parameters(), strict=True))
    if kind == "adamw":
        assert {t.dtype for t in opt.exp_avg_sq} == {torch.float32}
        assert all(same_bits(one, two) for one, two in zip(opt.exp_avg_sq, other.exp_avg_sq, strict=True))


@pytest.mark.parametrize(("dtype", "moments"), [(torch.float32, None), (torch.float32, torch.bfloat16), (torch.bfloat16, None), (torch.float64, None)])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_an_elements_bits_do_not_depend_on_its_place(kind, dtype, moments, device):
    """One number in all places of rows of 1 to 40 columns: vectors and what is left of a row take the same roundings."""
    found = {}
    for columns in range(1, 41):
        bank = hk.AdapterBank({"m": (columns, columns)}, [1], dtype=dtype, device=device)
        make = hk.AdamW if kind == "adamw" else partial(hk.SGD, momentum=0.9)
        opt = make(bank, lr=0.013, weight_decay=0.07, moments_dtype=moments)
        for factor in bank.parameters():
            factor.data.fill_(0.3713)
        for step in range(3):
            for factor in bank.parameters():
                factor.grad = torch.full_like(factor, 0.171 + 0.39 * step)
            opt.step()
        for factor in bank.parameters():
            values = factor.detach().flatten().unique()
            assert len(values) == 1, f"{columns} columns: {values.tolist()}"
            found[columns] = float(values)
    assert len(set(found.values())) == 1 and found[1] != 0.3713


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
