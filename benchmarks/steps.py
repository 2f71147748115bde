"""Who does one optimiser step of all clients, with clipping and the tail regulariser or without."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from benchmarks.providers import Problem, Run, _native

LR, CLIP, LAM = 1e-3, 1.0, 1e-2


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

    return run, lambda: params


def torch_fused(p: Problem, regularised: bool) -> Run:
    """`torch.optim.AdamW(fused=True)` of each client, after its clipping and the regulariser's gradient in PyTorch's in-place operations.

    The gradients are changed in place and not restored, which costs PyTorch nothing here that training would not.
    """
    half = len(p.shape)
    params, grads = [t.clone() for t in p.rows], p.draw(p.layout.total, 3)
    own: list[list[Tensor]] = []
    for k in range(len(p.ranks)):
        own.append([p.client(t, k) for t in params])
        for value, gradient in zip(own[-1], grads, strict=True):
            value.grad = p.client(gradient, k)
    optimisers = [torch.optim.AdamW(values, lr=LR, weight_decay=0.01, fused=True) for values in own]

    def run() -> None:
        for k, values in enumerate(own):
            if regularised:
                add_regulariser(values, half, _tails(p)[k])
                torch.nn.utils.clip_grad_norm_(values, CLIP, foreach=True)
            optimisers[k].step()

    return run, lambda: params


def add_regulariser(values: list[Tensor], half: int, keep: int) -> None:
    for a, bt in zip(values[:half], values[half:], strict=True):
        tail_a, tail_bt = a[keep:], bt[keep:]
        norm_a, norm_bt = tail_a.norm(), tail_bt.norm()
        a.grad[keep:].addcmul_(tail_a, LAM * norm_bt / norm_a)  # type: ignore[index]
        bt.grad[keep:].addcmul_(tail_bt, LAM * norm_a / norm_bt)  # type: ignore[index]


def step_bytes(p: Problem, regularised: bool) -> int:
    """Parameters, gradients and both moments read, all but the gradients written; gradients and tails twice when regularised and clipped."""
    size = p.dtype.itemsize
    elements = p.layout.total * sum(p.widths)
    tail = sum(rank - cut for rank, cut in zip(p.ranks, _tails(p), strict=True)) * sum(p.widths)
    return (7 * elements + (elements + 2 * tail if regularised else 0)) * size


STEPS: dict[str, dict[str, Callable[[Problem], Run]]] = {
    "adamw": {"hetlora": lambda p: fused(p, False), "torch fused": lambda p: torch_fused(p, False)},
    "adamw, clipped and regularised": {"hetlora": lambda p: fused(p, True), "torch fused + regulariser": lambda p: torch_fused(p, True)},
}
