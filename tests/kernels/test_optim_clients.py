"""Whom a step of AdamW and SGD touches: the active clients alone, in the memory of their factors, whatever the others hold; and what is refused."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from kernel_cases import drawn, guarded, same_bits, scattered
from optim_cases import KEEP, RANKS, SHAPES, make_bank

import hetlora_kernels as hk
from hetlora_kernels import optim


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


@pytest.mark.parametrize("scales", [(2.0**-80, 2.0**50), (2.0**50, 2.0**-80)])
@pytest.mark.parametrize("kind", ["adamw", "sgd"])
def test_a_factor_of_the_regulariser_outside_the_range_of_float32(kind, scales, backend, device):
    """lam ||other|| / ||own|| is about 2^130 for one side and 2^-130 for the other, the gradients they give are numbers of float32."""
    if backend == "triton" or device.type == "cuda":
        pytest.skip("squares are float32 on a GPU (docs/kernels-gpu.md)")
    gradients = {}
    for dtype in (torch.float32, torch.float64):
        bank, draw = hk.AdapterBank(SHAPES, RANKS, dtype=dtype, device=device), drawn(0)
        for side, scale in zip((bank.a, bank.bt), scales, strict=True):
            for t in side.values():
                t.data.copy_(torch.randn(t.shape, generator=draw) * scale)
                t.grad = torch.zeros_like(t)
        opt = hk.SGD(bank, lr=0.1, momentum=0.9, tail_penalty=(1.0, KEEP)) if kind == "sgd" else hk.AdamW(bank, lr=0.1, tail_penalty=(1.0, KEEP))
        opt.step()
        gradients[dtype] = [t.double() for t in (opt.buffers if kind == "sgd" else opt.exp_avg)]
    for got, expected in zip(gradients[torch.float32], gradients[torch.float64], strict=True):
        size = expected.abs().max()
        assert size > 0 and (got - expected).abs().max() <= 2.0**-21 * size  # four roundings


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
    (lambda b: hk.SGD(b, moments_dtype=torch.bfloat16), ValueError, r"^moments_dtype: of momentum, and there is none; .* got torch\.bfloat16"),
    (lambda b: hk.SGD(b, momentum=0.96, moments_dtype=torch.bfloat16), ValueError, r"^moments_dtype: expected momentum of at most 0\.95 .* got 0\.96"),
    (lambda b: hk.AdamW(b, betas=(0.99, 0.999), moments_dtype=torch.bfloat16), ValueError, r"^moments_dtype: expected betas\[0\] of at most 0\.95"),
    (lambda b: hk.AdamW(b, moments_dtype=torch.float16), ValueError, r"^moments_dtype: expected None or torch\.float32, .* got torch\.float16"),
    (lambda b: hk.SGD(b.to(dtype=torch.float64), moments_dtype=torch.bfloat16), ValueError, r"^moments_dtype: expected None or torch\.float64, "),
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
