"""The server's optimiser: a round's change is taken for a gradient, with momentum or with Adam. It follows numbers, whatever merge made the change.

What the numbers are is said by the merge's row in `hetlora.kinds`: those of factors and of the base where they last (`step`), those of the product B A where
all rows are made anew (`nearest`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import EllipsisType

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.config import Config
from hetlora.low_rank import best_rank

LEARNING_RATE = {"fedavgm": 1.0, "fedadam": 0.01}
"""Where `server_lr` is 0. FedAdam's steps have the size of its rate, whatever the change's."""

Rows = Tensor | EllipsisType
ALL = ...  # of a scalar too


@torch.no_grad()
def moved(cfg: Config, moments: dict[str, Tensor], name: str, change: Tensor, rows: Rows = ALL) -> Tensor:
    """How far the optimiser moves the tensor `name` for its change D. `moments` are kept up to date, and made at first use, in D's type.

    'fedavgm': v <- beta v + D; moves by lr v (Hsu et al., arXiv 1909.06335). With beta = 0 and lr = 1 it is the change itself, to rounding.
    'fedadam': m <- beta1 m + (1 - beta1) D; v <- beta2 v + (1 - beta2) D^2; moves by lr m / (sqrt(v) + tau), from m = 0 and v = tau^2 (Reddi et al., arXiv
    2003.00295, algorithm 2: no correction of the moments' start).
    lr, beta or beta1, beta2, tau: the settings server_lr, server_momentum, server_beta2, server_tau.
    rows: which rows of D there are, and the result is of these alone; the moments of all others stay as they are.
    """
    lr, beta = cfg.server_lr or LEARNING_RATE[cfg.server_optimizer], cfg.server_momentum
    momentum = moments.setdefault(f"m.{name}", torch.zeros_like(change))
    m, change = momentum[rows], change[rows]
    if cfg.server_optimizer == "fedavgm":
        momentum[rows] = m.mul_(beta).add_(change)
        return lr * m
    squares = moments.setdefault(f"v.{name}", torch.full_like(momentum, cfg.server_tau**2))
    v = squares[rows]
    momentum[rows] = m.mul_(beta).add_(change, alpha=1 - beta)
    squares[rows] = v.mul_(cfg.server_beta2).addcmul_(change, change, value=1 - cfg.server_beta2)
    return lr * m / (v.sqrt() + cfg.server_tau)


def moment_bytes(cfg: Config, shapes: Mapping[str, tuple[int, int]], r_max: int) -> int:
    """What the moments of a float32 bank and base take on the server, from the first round's merge on."""
    kept = {"none": 0, "fedavgm": 1, "fedadam": 2}[cfg.server_optimizer]
    whole = cfg.merge_kind.steps != "factors" or cfg.merge_kind.base != "none"
    return 4 * kept * sum(m * n if whole else r_max * (m + n) for m, n in shapes.values())


def kind_of(dtype: torch.dtype) -> torch.dtype:
    """The type of moments beside numbers of this one: float64 beside float64, float32 beside all others."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@torch.no_grad()
def step(cfg: Config, moments: dict[str, Tensor], old: Mapping[str, Tensor], new: Mapping[str, Tensor], rows: Mapping[str, Tensor] | None = None) -> None:
    """new <- the optimiser's step from `old`, in place, for the change D = new - old of each tensor.

    rows: of some tensors, a mask of those rows that take a step; all others keep their numbers and moments, as of a lazy Adam.
    """
    for name, after in new.items():
        before = old[name].to(kind_of(after.dtype))
        own = ALL if rows is None or name not in rows else rows[name]
        after[own] = (before[own] + moved(cfg, moments, name, after.to(before.dtype) - before, own)).to(after.dtype)


@torch.no_grad()
def nearest(
    cfg: Config,
    moments: dict[str, Tensor],
    bank: hk.AdapterBank,
    stacks: Sequence[tuple[Tensor, Tensor]],
    weights: Sequence[Tensor],
    rank: int,
    energy: float = 1.0,
) -> list[tuple[Tensor, Tensor]]:
    """`low_rank.best_rank` of the weighted sums of `stacks`, one a module of `bank`; with an optimiser, of what it makes of them.

    M being the sum and B A the product of the old bank, both m x n, the change is D = M - B A of the whole sum, before it is cut. The result is the best
    approximation of B A plus how far D moves it, number by number. What one round cuts stays in the moments, and may come back in the next.
    Moments are dense: one tensor [m, n] for 'fedavgm', two for 'fedadam', float32 (float64 beside a float64 bank). Sums are made in float64, one module
    at a time. Without an optimiser nothing of the size m x n is made.
    """
    if cfg.server_optimizer == "none":
        return best_rank(stacks, rank, weights, energy)
    kind, found = kind_of(bank.dtype), []
    for name, (x, y), p in zip(bank.shapes, stacks, weights, strict=True):
        a = bank.a[name].detach().double()
        old = bank.bt[name].detach().double().t() @ a
        change = (x.detach().double() * p.to(x.device)[:, None]).t() @ y.detach().double() - old
        whole = old + moved(cfg, moments, f"product.{name}", change.to(kind))
        one = torch.eye(min(whole.shape), dtype=whole.dtype, device=whole.device)  # as parts of a sum: its rows, or its columns
        parts = (one, whole) if len(whole) == len(one) else (whole.t(), one)
        bt, a = best_rank([parts], rank, energy=energy, cutoff=4 * torch.finfo(kind).eps)[0]
        found.append((bt.to(bank.dtype), a.to(bank.dtype)))
    return found
