"""The best approximation of low rank of a sum of low-rank products, without forming the sum: what a server computes when it merges exactly."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CUTOFF = 1e-12
"""Singular values below this share of the largest are roundings of float64, not parts of the sum."""


BATCH_BYTES = 1 << 28
"""Modules of one shape are factorised together up to this much of their stacks in float64, so that a large model's are not all held at once."""


@torch.no_grad()
def best_rank(
    stacks: Sequence[tuple[Tensor, Tensor]], rank: int, weights: Sequence[Tensor] | None = None, energy: float = 1.0, cutoff: float = CUTOFF
) -> list[tuple[Tensor, Tensor]]:
    """(B^T [R, m], A [R, n]) of each module, with B A the best approximation of rank R of sum_j p_j x_j y_j^T in the Frobenius norm.

    stacks: for each module (x [S, m], y [S, n]): row j of both is one rank-1 part of the sum.   rank: R.
    weights: for each module p [S] float64, >= 0; all 1 by default. Both sides take their roots.
    energy: of each module only the first q rows are kept, q the least number with s_1^2 + ... + s_q^2 >= energy (s_1^2 + s_2^2 + ...); 1 = all.
    cutoff: singular values below this share of the largest count as zero.

    QR of both stacks, X^T = Q_x R_x and Y^T = Q_y R_y, then the SVD of the core R_x R_y^T = U diag(s) V^T, which has min(S, m) x min(S, n) elements:
    B = Q_x U sqrt(s), A = sqrt(s) V^T Q_y^T, so that both factors have the rows' norms sqrt(s_i), in falling order (Eckart and Young 1936). The m x n sum is
    never formed where S is below one of the widths; a side with S above its own is its core as it is (Q = 1).
    Rows past the rank of the sum, or past q, are zero. The signs are such that the entry of A's row with the largest magnitude is positive.
    Arithmetic is float64 whatever the rows' type, and results are rounded to it once. Modules with equal shapes go through the factorisations in one
    batch. `ValueError` when x and y have different numbers of rows.
    """
    groups: dict[tuple[int, int, int], list[int]] = {}
    for position, (x, y) in enumerate(stacks):
        if len(x) != len(y):
            raise ValueError(f"stacks[{position}]: expected as many rows on both sides, got {len(x)} and {len(y)}")
        groups.setdefault((len(x), x.shape[1], y.shape[1]), []).append(position)
    results: dict[int, tuple[Tensor, Tensor]] = {}
    for (parts, m, n), members in groups.items():
        step = max(1, BATCH_BYTES // max(1, 8 * parts * (m + n)))
        for batch in (members[i : i + step] for i in range(0, len(members), step)):
            x, y = (torch.stack([stacks[i][side].detach() for i in batch]).double() for side in (0, 1))
            if weights is not None:
                roots = torch.stack([weights[i] for i in batch]).sqrt()[..., None]
                x, y = roots * x, roots * y
            for i, bt, a in zip(batch, *_factors(x, y, rank, energy, cutoff), strict=True):
                results[i] = bt.to(stacks[i][0].dtype), a.to(stacks[i][1].dtype)
    return [results[i] for i in range(len(stacks))]


def _factors(x: Tensor, y: Tensor, rank: int, energy: float, cutoff: float) -> tuple[Tensor, Tensor]:
    """The same for modules of one shape, [modules, S, m] and [modules, S, n], in float64."""
    (q_x, r_x), (q_y, r_y) = _compact(x.mT), _compact(y.mT)
    u, s, vh = torch.linalg.svd(r_x @ r_y.mT, full_matrices=False)
    if energy < 1:
        before = s.square().cumsum(-1) - s.square()  # the energy in front of each
        s = s.where(before < energy * s.square().sum(-1, keepdim=True), 0.0)
    u, s, vh = u[..., :rank], s[:, :rank], vh[:, :rank]
    root = torch.where(s > cutoff * s[:, :1], s, 0.0).sqrt()[..., None]
    a, bt = vh if q_y is None else vh @ q_y.mT, u.mT if q_x is None else (q_x @ u).mT
    signs = torch.where(a.gather(-1, a.abs().argmax(-1, keepdim=True)) < 0, -1.0, 1.0)
    missing = rank - s.shape[1]  # fewer rank-1 parts than rows asked for
    bt, a = (torch.nn.functional.pad(side * root * signs, (0, 0, 0, missing)) for side in (bt, a))
    return bt, a


def _compact(rows: Tensor) -> tuple[Tensor | None, Tensor]:
    """(Q, R) with rows = Q R, Q orthonormal; (None, rows) where R would be no smaller."""
    if rows.shape[-1] >= rows.shape[-2]:
        return None, rows
    q, r = torch.linalg.qr(rows)
    return q, r
