"""Merges that a minority of uploads cannot move far: the trimmed mean and the median of each rank row. What they defend against: docs/security.md."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.merge import MergeCall, Merged


def merge_trimmed(call: MergeCall) -> Merged:
    """bank row i <- per coordinate, the mean over the clients that own row i without its t smallest and t largest values, t = floor(trim * owners).

    Of A and of B^T alike; all owners count the same. A row that nobody owns stays. With t = 0 (few owners) nothing is left out. Trimmed mean: Yin et
    al., "Byzantine-Robust Distributed Learning", arXiv 1803.01498, section 4.
    """
    trim = call.cfg.trim
    return _by_rows(call, lambda owners: (owners * trim + 1e-9).floor().long())


def merge_median(call: MergeCall) -> Merged:
    """bank row i <- per coordinate, the median over the clients that own row i (the mean of the middle two where their number is even).

    Else as `merge_trimmed`. A row with one or two owners is their mean: there is no majority to go by.
    """
    return _by_rows(call, lambda owners: (owners - 1).clamp_min(0) // 2)


@torch.no_grad()
def _by_rows(call: MergeCall, left_out: Callable[[Tensor], Tensor]) -> Merged:
    """left_out: number of owners of each row [R] -> how many values go at either end, [R]."""
    bank, uploads = call.bank, call.uploads
    merged = bank.to()
    for name, layout in uploads.layouts.items():
        ranks = torch.tensor(layout.ranks, device=bank.device)
        owners = (ranks[:, None] > torch.arange(call.r_max, device=bank.device)).sum(0)  # [R]
        for target, rows in ((merged.a[name], uploads.a[name]), (merged.bt[name], uploads.bt[name])):
            target.copy_(_trimmed(rows.detach(), layout, owners, left_out(owners), target))
    return Merged(merged, rows=max(layout.max_rank for layout in uploads.layouts.values()))


def _trimmed(rows: Tensor, layout: hk.RankLayout, owners: Tensor, out: Tensor, old: Tensor) -> Tensor:
    """Means [R, n] of the values that are left of `rows` [S, n], in float64; `old` where a row has no owner."""
    stacked = torch.full((layout.num_clients, *old.shape), torch.inf, dtype=torch.float64, device=rows.device)  # [K, R, n]; what is not owned sorts last
    for k, rank in enumerate(layout.ranks):
        stacked[k, :rank] = rows[layout.rows(k)].double()
    values = stacked.sort(0).values
    place = torch.arange(layout.num_clients, device=rows.device)[:, None]
    kept = (place >= out) & (place < owners - out)  # [K, R]
    total = values.where(kept[..., None], 0.0).sum(0)
    return torch.where((owners > 0)[:, None], total / kept.sum(0).clamp_min(1)[:, None], old.double())
