"""Who does one optimiser step of all clients: AdamW with clipping and the tail regulariser or without, SGD with momentum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .providers import Problem, Run, _native

LR, CLIP, LAM, MOMENTUM = 1e-3, 1.0, 1e-2, 0.9


def _tails(p: Problem) -> list[int]:
    return [rank // 2 for rank in p.ranks]


def fused(p: Problem, regularised: bool) -> Run:
    """`adamw_`: one call for all clients and factors."""
    clients, half = len(p.ranks), len(p.shape)
    params, grads = [t.clone() for t in p.rows], p.draw(p.layout.total, 3)
    means, squares = p.like(p.layout.total, 0.0), p.like(p.layout.total, 0.0)
    lr = torch.full((clients,), LR, dtype=torch.float64, device=p.device)
    step, active = torch.zeros(clients, dtype=torch.int64, device=p.device), torch.ones(clients, dtype=torch.bool, device=p.device)
    clip, lam = (torch.full_like(lr, value) if regularised else None for value in (CLIP, LAM))
    keep = _tails(p) * half if regularised else []
    ranks = p.ranks * half

    def run() -> None:
        _native("adamw_", params, grads, means, squares, [], lr, step, active, clip, lam, ranks, keep, 0.9, 0.999, 1e-8, 0.01)

    return run, lambda: [*params, *means, *squares]


def fused_sgd(p: Problem) -> Run:
    """`sgd_` with momentum: one call for all clients and factors."""
    clients = len(p.ranks)
    params, grads, buffers = [t.clone() for t in p.rows], p.draw(p.layout.total, 3), p.like(p.layout.total, 0.0)
    lr, active = torch.full((clients,), LR, dtype=torch.float64, device=p.device), torch.ones(clients, dtype=torch.bool, device=p.device)
    ranks = p.ranks * len(p.shape)
    return lambda: _native("sgd_", params, grads, buffers, [], lr, active, None, None, ranks, [], MOMENTUM, 0.01), lambda: [*params, *buffers]


def torch_sgd(p: Problem, **form: bool) -> Run:
    """`torch.optim.SGD` of each client."""
    params, own = _clients_of(p)
    optimisers = [torch.optim.SGD(values, lr=LR, momentum=MOMENTUM, weight_decay=0.01, **form) for values in own]

    def run() -> None:
        for optimiser in optimisers:
            optimiser.step()

    return run, lambda: [*params, *_state(optimisers, own, "momentum_buffer")]


def _clients_of(p: Problem) -> tuple[list[Tensor], list[list[Tensor]]]:
    """(parameters, each client's own rows of them with their gradients)."""
    params, grads = [t.clone() for t in p.rows], p.draw(p.layout.total, 3)
    own: list[list[Tensor]] = []
    for k in range(len(p.ranks)):
        own.append([p.client(t, k) for t in params])
        for value, gradient in zip(own[-1], grads, strict=True):
            value.grad = p.client(gradient, k)
    return params, own


def _state(optimisers: Sequence[torch.optim.Optimizer], own: list[list[Tensor]], name: str) -> list[Tensor]:
    """What the clients' optimisers keep of each factor, one client below the other: one step changes it more than it changes a parameter."""
    return [torch.cat([optimiser.state[value][name] for optimiser, value in zip(optimisers, values, strict=True)]) for values in zip(*own, strict=True)]


def torch_fused(p: Problem, regularised: bool) -> Run:
    """`torch.optim.AdamW(fused=True)` of each client, after its clipping and the regulariser's gradient in PyTorch's in-place operations.

    The gradients are changed in place and not restored, which costs PyTorch nothing here that training would not.
    """
    half = len(p.shape)
    params, own = _clients_of(p)
    optimisers = [torch.optim.AdamW(values, lr=LR, weight_decay=0.01, fused=True) for values in own]

    def run() -> None:
        for k, values in enumerate(own):
            if regularised:
                add_regulariser(values, half, _tails(p)[k])
                torch.nn.utils.clip_grad_norm_(values, CLIP, foreach=True)
            optimisers[k].step()

    return run, lambda: [*params, *_state(optimisers, own, "exp_avg"), *_state(optimisers, own, "exp_avg_sq")]


def add_regulariser(values: list[Tensor], half: int, keep: int) -> None:
    for a, bt in zip(values[:half], values[half:], strict=True):
        tail_a, tail_bt = a[keep:], bt[keep:]
        norm_a, norm_bt = tail_a.norm(), tail_bt.norm()
        a.grad[keep:].addcmul_(tail_a, LAM * norm_bt / norm_a)  # type: ignore[index]
        bt.grad[keep:].addcmul_(tail_bt, LAM * norm_a / norm_bt)  # type: ignore[index]


def step_bytes(p: Problem, op: str) -> int:
    """Parameters, gradients and state read, all but the gradients written; gradients and tails twice when regularised and clipped."""
    size, arrays, regularised = p.dtype.itemsize, 5 if op == "sgd" else 7, "regularised" in op
    elements = p.layout.total * sum(p.widths)
    tail = sum(rank - cut for rank, cut in zip(p.ranks, _tails(p), strict=True)) * sum(p.widths)
    return (arrays * elements + (elements + 2 * tail if regularised else 0)) * size


STEPS: dict[str, dict[str, Callable[[Problem], Run]]] = {
    "adamw": {"hetlora": lambda p: fused(p, False), "torch fused": lambda p: torch_fused(p, False)},
    "adamw, clipped and regularised": {"hetlora": lambda p: fused(p, True), "torch fused + regulariser": lambda p: torch_fused(p, True)},
    "sgd": {"hetlora": fused_sgd, "torch fused": lambda p: torch_sgd(p, fused=True), "torch foreach": lambda p: torch_sgd(p, foreach=True)},
}
