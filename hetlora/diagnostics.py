"""What averaging A and B apart does to the bank, from Gram matrices alone: energy per rank row, effective rank, and the error of the average."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk


def _grams(rows: Mapping[str, Tensor], bank: hk.AdapterBank) -> list[Tensor]:
    """rows rows^T of a bank of one client, one [R, R] float64 per module."""
    layouts = list(bank.layouts.values())
    packed = hk.gram([tensor.detach() for tensor in rows.values()], layouts, exact=True)
    return [hk.unpack_gram(g, layout)[0].cpu() for g, layout in zip(packed, layouts, strict=True)]


def row_energy(bank: hk.AdapterBank) -> list[float]:
    """Energy of rank row i of a bank of one client: sum over modules of ||b_i||^2 ||a_i||^2, the squared norm of the piece b_i a_i of B A."""
    pairs = zip(_grams(bank.a, bank), _grams(bank.bt, bank), strict=True)
    return sum((a.diagonal() * b.diagonal() for a, b in pairs), torch.zeros((), dtype=torch.float64)).tolist()


def effective_rank(bank: hk.AdapterBank) -> float:
    """Mean over modules of exp(H(sigma / sum sigma)), H the entropy, sigma the singular values of B A (Roy and Vetterli 2007); modules with B A = 0 count 0.

    sigma^2 are the eigenvalues of Ga^(1/2) Gb Ga^(1/2), with Ga = A A^T and Gb = B^T B, so that B A is never formed.
    """
    ranks = []
    for a, b in zip(_grams(bank.a, bank), _grams(bank.bt, bank), strict=True):
        values, vectors = torch.linalg.eigh(a)
        root = (vectors * values.clamp_min(0).sqrt()) @ vectors.t()
        sigma = torch.linalg.eigvalsh(root @ b @ root).clamp_min(0).sqrt()
        # eigenvalues below rounding of the largest are noise, whose roots would count as rank
        sigma = sigma[sigma > sigma.max() * 1e-6]
        share = sigma / sigma.sum()
        ranks.append(float(torch.exp(-(share * share.log()).sum())) if len(sigma) else 0.0)
    return sum(ranks) / len(ranks)


def merge_error(
    merged: hk.AdapterBank, uploads: hk.AdapterBank, weights: Tensor, rows: int | None = None, added_to: hk.AdapterBank | None = None
) -> float | None:
    """||sum_k p_k B_k A_k - B A||_F / ||sum_k p_k B_k A_k||_F over all modules; B A: of the leading `rows` of `merged`, all by default.

    added_to: a bank whose B A is part of the sum, where the merge adds the uploads to it. What the error says then is what truncation lost.
    With a server optimiser the error holds the optimiser's step as well: it is how far the bank is from the uploads' own sum.

    For merge = 'factors' this is the cross-term error: (sum p B)(sum p A) is not sum p B A. There `rows` leaves out the rows that no upload owns,
    which the merge does not write. weights: p [K, modules].
    Both norms are those of one stacked adapter, so that nothing of size m x n is formed. None when every update is zero.
    """
    exact = difference = 0.0
    for module, (name, layout) in enumerate(uploads.layouts.items()):
        p = torch.repeat_interleave(weights[:, module].to(uploads.device), torch.tensor(layout.ranks, device=uploads.device))
        a, bt = uploads.a[name].detach().double(), uploads.bt[name].detach().double() * p[:, None]
        if added_to is not None:
            a, bt = torch.cat([a, added_to.a[name].detach().double()]), torch.cat([bt, added_to.bt[name].detach().double()])
        both_a = torch.cat([a, merged.a[name].detach()[:rows].double()])
        both_bt = torch.cat([bt, -merged.bt[name].detach()[:rows].double()])
        exact += float(hk.delta_norms(a, bt, hk.RankLayout([len(a)]), exact=True)) ** 2
        difference += float(hk.delta_norms(both_a, both_bt, hk.RankLayout([len(both_a)]), exact=True)) ** 2
    return (difference / exact) ** 0.5 if exact else None


def describe(
    merged: hk.AdapterBank, uploads: hk.AdapterBank, weights: Tensor, rows: int | None = None, added_to: hk.AdapterBank | None = None
) -> dict[str, Any]:
    """{"row_energy", "effective_rank", "merge_error"} of a round. rows, added_to: as in `merge_error`."""
    error = merge_error(merged, uploads, weights, rows, added_to)
    return {"row_energy": row_energy(merged), "effective_rank": effective_rank(merged), "merge_error": error}
