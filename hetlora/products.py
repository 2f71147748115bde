"""Merges of products: what is summed is B_k A_k, exactly, and then cut to the bank's rank or put into the base."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.low_rank import best_rank
from hetlora.merge import MergeCall, Merged, merge_factors, row_weights
from hetlora.server_optimizer import kind_of, moved, nearest
from hetlora_kernels.linear import linear_weight


def merge_svd(call: MergeCall) -> Merged:
    """The best rank-r_max approximation of sum p_k B_k A_k in the Frobenius norm (FlexLoRA, "Recon+SVD"), without forming it."""
    return Merged(_truncated(call, *_exact_sum(call)))


def _exact_sum(call: MergeCall) -> tuple[list[tuple[Tensor, Tensor]], list[Tensor]]:
    """(stacks, weights) of sum p_k B_k A_k in every module, as `low_rank.best_rank` takes them."""
    uploads = call.uploads
    weights = [row_weights(uploads, call.weights, module, name) for module, name in enumerate(uploads.shapes)]
    return [(uploads.bt[name], uploads.a[name]) for name in uploads.shapes], weights


def merge_energy(call: MergeCall) -> Merged:
    """The best rank-q approximation of sum p_k B_k A_k, without forming it; in each module q is the least number of singular values whose squares sum to
    cfg.energy of those of all, at most r_max (FLoRIST, arXiv 2506.09199). Clients start from the leading rows of it.
    """
    return Merged(_truncated(call, *_exact_sum(call), call.cfg.energy))


@torch.no_grad()
def merge_energy_stack(call: MergeCall) -> Merged:
    """W <- W + s M_q in every target module, M_q as in `merge_energy`, of whatever rank q that takes. Clients download B and A of M_q, q (m + n) numbers."""
    stacks, weights = _exact_sum(call)
    widest = max(map(min, call.uploads.shapes.values()))
    travels = 0
    for name, (bt, a) in zip(call.uploads.shapes, best_rank(stacks, widest, weights, call.cfg.energy), strict=True):
        kept = int(bt.any(1).sum())
        _add_to_base(call, name, bt[:kept], a[:kept], torch.ones(kept, dtype=torch.float64, device=a.device))
        travels += kept * (bt.shape[1] + a.shape[1]) * a.dtype.itemsize
    return Merged(None, follow_bytes=travels)


def merge_owners_svd(call: MergeCall) -> Merged:
    """The best rank-r_max approximation of sum_j M_j, without forming it (raFLoRA, arXiv 2602.13486, section 5; RB-LoRA's rule is the same).

    M_j = sum_k p_k B_k[:, j] A_k[j, :] / P_j over the clients that own rank row j, with P_j the sum of their p_k; where nobody owns it, the old bank's piece
    B[:, j] A[j, :]. An owned row whose owners all have p_k = 0 adds nothing.
    """
    bank, uploads = call.bank, call.uploads
    stacks, weights, kept = [], [], {}
    for module, (name, layout) in enumerate(uploads.layouts.items()):
        p = row_weights(uploads, call.weights, module, name)
        row = torch.cat([torch.arange(rank, device=p.device) for rank in layout.ranks])
        owned = p.new_zeros(layout.max_rank).index_add(0, row, p)
        kept[name] = (bank.bt[name].detach()[layout.max_rank :], bank.a[name].detach()[layout.max_rank :])
        weights.append(torch.cat([p / owned[row].clamp_min(torch.finfo(p.dtype).tiny), p.new_ones(len(kept[name][0]))]))
        stacks.append((torch.cat([uploads.bt[name].detach(), kept[name][0]]), torch.cat([uploads.a[name].detach(), kept[name][1]])))
    ranks = {name: [len(bt)] for name, (bt, _) in kept.items()}
    old = hk.AdapterBank.of(bank.shapes, ranks, {name: a for name, (_, a) in kept.items()}, {name: bt for name, (bt, _) in kept.items()})
    return Merged(_truncated(call, stacks, weights), added_to=old)


@torch.no_grad()
def _truncated(call: MergeCall, stacks: Sequence[tuple[Tensor, Tensor]], weights: Sequence[Tensor], energy: float = 1.0) -> hk.AdapterBank:
    """A bank of the best approximations of the weighted sums of `stacks` (`server_optimizer.nearest`, `energy` as there).

    Rows past the rank of the sum take the old bank's A with B = 0, which training can revive; zeros in both could not.
    """
    merged = call.bank.to()
    for name, (bt, a) in zip(merged.shapes, nearest(call.cfg, call.moments, call.bank, stacks, weights, call.r_max, energy), strict=True):
        merged.bt[name].copy_(bt)
        merged.a[name].copy_(torch.where(bt.any(1, keepdim=True), a, merged.a[name]))
    return merged


@torch.no_grad()
def merge_stack(call: MergeCall) -> Merged:
    """W <- W + s * sum p_k B_k A_k in every target module (FLoRA's stacking): exact, and the base model changes. Clients download the stack."""
    uploads = call.uploads
    for module, name in enumerate(uploads.shapes):
        _add_to_base(call, name, uploads.bt[name], uploads.a[name], row_weights(uploads, call.weights, module, name))
    return Merged(None, follow_bytes=_stack_bytes(uploads))


@torch.no_grad()
def merge_residual(call: MergeCall) -> Merged:
    """Factors as `merge_factors`, and W <- W + s (sum p_k B_k A_k - B A) with B A of the averaged rows: what the average leaves of the exact sum goes into
    the base (FedEx-LoRA, arXiv 2410.09432, section 3). B A is of the rows that a client owns; a row that nobody owns is no part of either.

    With a server optimiser, W + s B A of the whole bank takes its step, number by number, for the change that the merge by itself would make of it. The
    factors are those of `merge_factors` all the same, and W takes what they leave of the step.
    Clients download the stack of the uploads, of which they make the difference: its rank is at most that of the stack.
    """
    uploads, merged = call.uploads, merge_factors(call)
    assert merged.bank is not None
    for module, (name, layout) in enumerate(uploads.layouts.items()):
        p, owned = row_weights(uploads, call.weights, module, name), layout.max_rank
        bt, a = (
            torch.cat([rows.detach(), mean.detach()[:owned]])
            for rows, mean in ((uploads.bt[name], merged.bank.bt[name]), (uploads.a[name], merged.bank.a[name]))
        )
        left = torch.cat([p, p.new_full((owned,), -1.0)])
        if call.cfg.server_optimizer == "none":
            _add_to_base(call, name, bt, a, left)
            continue
        scale = call.cfg.scale_at(call.r_max)
        gained = scale * (_product(merged.bank, name) - _product(call.bank, name))  # by the factors, of the whole bank
        change = scale * (bt.double() * left[:, None]).t() @ a.double() + gained
        kind = kind_of(linear_weight(call.model.get_submodule(name)).dtype)
        _add(call, name, moved(call.cfg, call.moments, f"model.{name}", change.to(kind)).double() - gained)
    return Merged(merged.bank, rows=merged.rows, follow_bytes=_stack_bytes(uploads))


def _product(bank: hk.AdapterBank, name: str) -> Tensor:
    """B A of a bank of one client, [m, n] float64."""
    return bank.bt[name].detach().double().t() @ bank.a[name].detach().double()


def _add_to_base(call: MergeCall, name: str, bt: Tensor, a: Tensor, weights: Tensor) -> None:
    """W <- W + s sum_j weights_j b_j a_j of one module, for rows [S, m] and [S, n]."""
    _add(call, name, call.cfg.scale_at(call.r_max) * (bt.detach() * weights[:, None].to(bt.dtype)).t() @ a.detach())


def _add(call: MergeCall, name: str, change: Tensor) -> None:
    """W <- W + change, [m, n], in the weight's own type."""
    weight = linear_weight(call.model.get_submodule(name))
    weight.add_(change.to(weight.dtype))


def _stack_bytes(uploads: hk.AdapterBank) -> int:
    return sum(uploads.num_bytes(k) for k in range(uploads.num_clients))
