"""The best approximation of low rank of a sum of low-rank products, without forming the sum: what a server computes when it merges exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CUTOFF = 1e-12
"""Singular values below this share of the largest are roundings of float64, not parts of the sum."""


@torch.no_grad()
def best_rank(stacks: Sequence[tuple[Tensor, Tensor]], rank: int) -> list[tuple[Tensor, Tensor]]:
    """(B^T [R, m], A [R, n]) of each module, with B A the best approximation of rank R of sum_j x_j y_j^T in the Frobenius norm.

    stacks: for each module (x [S, m], y [S, n]): row j of both is one rank-1 part of the sum; weights are in x, in y or, as their roots, in both.
    rank: R.

    QR of both stacks, X^T = Q_x R_x and Y^T = Q_y R_y, then the SVD of the core R_x R_y^T = U diag(s) V^T, which has min(S, m) x min(S, n) elements:
    B = Q_x U sqrt(s), A = sqrt(s) V^T Q_y^T, so that both factors have the rows' norms sqrt(s_i), in falling order (Eckart and Young 1936). The m x n sum is
    never formed where S is below one of the widths; a side with S above its own is its core as it is (Q = 1).
    Rows past the rank of the sum are zero. The signs are such that the entry of A's row with the largest magnitude is positive.
    Arithmetic is float64 whatever the rows' type, and results are rounded to it once. Modules with equal shapes go through the factorisations in one
    batch. `ValueError` when x and y have different numbers of rows.
    """
    groups: dict[tuple[int, int, int], list[int]] = {}
    for position, (x, y) in enumerate(stacks):
        if len(x) != len(y):
            raise ValueError(f"stacks[{position}]: expected as many rows on both sides, got {len(x)} and {len(y)}")
        groups.setdefault((len(x), x.shape[1], y.shape[1]), []).append(position)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for members in groups.values():
        x, y = (torch.stack([stacks[i][side].detach() for i in members]) for side in (0, 1))
        results |= {i: (bt, a) for i, bt, a in zip(members, *_factors(x, y, rank), strict=True)}
    return [results[i] for i in range(len(stacks))]


def _factors(x: Tensor, y: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The same for modules of one shape, [modules, S, m] and [modules, S, n]."""
    (q_x, r_x), (q_y, r_y) = _compact(x.double().mT), _compact(y.double().mT)
    u, s, vh = torch.linalg.svd(r_x @ r_y.mT, full_matrices=False)
    u, s, vh = u[..., :rank], s[:, :rank], vh[:, :rank]
    root = torch.where(s > CUTOFF * s[:, :1], s, 0.0).sqrt()[..., None]
    a, bt = vh if q_y is None else vh @ q_y.mT, u.mT if q_x is None else (q_x @ u).mT
    signs = torch.where(a.gather(-1, a.abs().argmax(-1, keepdim=True)) < 0, -1.0, 1.0)
    missing = rank - s.shape[1]  # fewer rank-1 parts than rows asked for
    bt, a = (torch.nn.functional.pad(side * root * signs, (0, 0, 0, missing)) for side in (bt, a))
    return bt.to(x.dtype), a.to(y.dtype)


def _compact(rows: Tensor) -> tuple[Tensor | None, Tensor]:
    """(Q, R) with rows = Q R, Q orthonormal; (None, rows) where R would be no smaller."""
    if rows.shape[-1] >= rows.shape[-2]:
        return None, rows
    q, r = torch.linalg.qr(rows)
    return q, r
