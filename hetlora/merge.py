"""Merging the uploads of a round: their weights, then the merge that `kinds.MERGES` names for the run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora import diagnostics
from hetlora.config import Config
from hetlora.low_rank import best_rank
from hetlora.server import ServerState, fresh_bank
from hetlora_kernels.linear import linear_weight


@dataclass(frozen=True)
class MergeCall:
    """What a merge is given. weights: p [K, modules] float64 (what training weighed itself may have other columns), columns sum to 1.

    bank: the server's, of rank `r_max`.   uploads: of the K clients that arrived, weighted like `weights`; an `AdapterBank` where adapters are trained.
    """

    bank: hk.AdapterBank
    uploads: Any
    weights: Tensor
    r_max: int
    cfg: Config
    model: torch.nn.Module


@dataclass(frozen=True)
class Merged:
    """What a merge returns. bank: the next one, None exactly where its row in `kinds.MERGES` keeps none.

    rows: how many leading rows of the bank the uploads decided; None = all.   added_to: the bank that the uploads were added to, None where they replace it.
    follow_bytes: `ServerState.stacked_bytes` from now on.
    """

    bank: hk.AdapterBank | None
    rows: int | None = None
    added_to: hk.AdapterBank | None = None
    follow_bytes: int = 0


@dataclass(frozen=True)
class Aggregate:
    """A merged round. weights: p [K, modules or 1] float64.   norms: S [K] float64, over all modules."""

    weights: Tensor
    norms: Tensor
    diagnostics: dict[str, Any] = field(default_factory=dict)


def aggregate(
    state: ServerState,
    uploads: Any,
    received: Any,
    samples: Sequence[int],
    cfg: Config,
    model: torch.nn.Module,
    weighed: tuple[Tensor, Tensor] | None = None,
) -> Aggregate:
    """Merge the uploads that arrived into `state`, and into `model` where the merge changes the base.

    received: what the same clients had received, as `uploads` (for cfg.clip_update).   samples: training sequences of each.
    weighed: (p, S) where training weighed the uploads already; else they are `client_weights`.
    """
    if cfg.clip_update:
        uploads = uploads.select(range(uploads.num_clients))  # the caller's are the clients' own adapters
        clip_updates(uploads, received, cfg.clip_update)
    weights, norms = weighed or client_weights(uploads, samples, cfg)
    merged = cfg.merge_kind.load()(MergeCall(state.bank, uploads, weights, state.r_max, cfg, model))
    state.stacked_bytes = merged.follow_bytes
    if merged.bank is None:
        state.bank = fresh_bank(state.bank.shapes, state.r_max, cfg, state.bank.device, state.round + 1)
        return Aggregate(weights, norms)
    state.bank = merged.bank
    return Aggregate(weights, norms, diagnostics.describe(state.bank, uploads, weights, merged.rows, merged.added_to) if cfg.diagnostics else {})


def client_weights(uploads: hk.AdapterBank, samples: Sequence[int], cfg: Config) -> tuple[Tensor, Tensor]:
    """(p, S): p [K, modules] float64, columns sum to 1 over the uploads that arrived; S [K] float64 = ||B_k A_k||_F over all modules.

    'sparsity': p_k = S_k / sum S per module, or with S over all modules for cfg.weight_scope = 'client' (HETLORA section 3.3); S is clipped at
    cfg.weight_cap times the median of the round's S where that is given. All S = 0: uniform. 'uniform': 1 / K. 'samples': by sequences.
    """
    norms = uploads.delta_norms().double().cpu()
    total = norms.square().sum(1).sqrt()
    clients, modules = norms.shape
    if cfg.weights == "uniform":
        scores = torch.ones(clients, modules, dtype=torch.float64)
    elif cfg.weights == "samples":
        scores = torch.tensor(samples, dtype=torch.float64)[:, None].expand(clients, modules)
    else:
        scores = norms if cfg.weight_scope == "module" else total[:, None].expand(clients, modules)
        if cfg.weight_cap:
            scores = scores.minimum(cfg.weight_cap * scores.median(0, keepdim=True).values)
    sums = scores.sum(0, keepdim=True)
    return torch.where(sums > 0, scores / sums.clamp_min(torch.finfo(torch.float64).tiny), 1 / clients), total


def clip_updates(uploads: hk.AdapterBank, received: hk.AdapterBank, limit: float) -> list[float]:
    """Scale each client's update, upload - received over all factors, in place to Frobenius norm <= limit; the factors used, [K].

    received: what the client downloaded, cut to the rank of its upload.
    """
    with torch.no_grad():
        squares = torch.zeros(uploads.num_clients, dtype=torch.float64)
        pairs = list(zip(uploads.parameters(), received.parameters(), [*uploads.layouts.values()] * 2, strict=True))
        for new, old, layout in pairs:
            for k in range(layout.num_clients):
                squares[k] += (new[layout.rows(k)].double() - old[layout.rows(k)].double()).square().sum().cpu()
        factors = (limit / squares.sqrt().clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1).tolist()
        for new, old, layout in pairs:
            for k, factor in enumerate(factors):
                if factor < 1:
                    rows = layout.rows(k)
                    new[rows] = old[rows] + factor * (new[rows] - old[rows])
    return factors


def row_weights(uploads: hk.AdapterBank, weights: Tensor, module: int, name: str) -> Tensor:
    """p of the client that owns each rank row of the `module`-th module, [S] float64."""
    ranks = torch.tensor(uploads.layouts[name].ranks, device=uploads.device)
    return torch.repeat_interleave(weights[:, module].to(uploads.device), ranks)


def merge_factors(call: MergeCall) -> Merged:
    """bank A <- sum p_k A_k, bank B <- sum p_k B_k, zero-padded to r_max (HETLORA section 3.3), with the choices for unowned and shared rows."""
    keep = call.bank if call.cfg.unowned_rows == "keep" else None
    bank = call.uploads.aggregate(call.weights.to(call.uploads.device), call.r_max, normalize=call.cfg.shared_rows, keep=keep)
    return Merged(bank, rows=max(layout.max_rank for layout in call.uploads.layouts.values()))


def merge_svd(call: MergeCall) -> Merged:
    """The best rank-r_max approximation of sum p_k B_k A_k in the Frobenius norm (FlexLoRA, "Recon+SVD"), without forming it (`low_rank.best_rank`).

    Rows past the rank of the sum take the old bank's A with B = 0, which training can revive; zeros in both could not.
    """
    bank, uploads = call.bank, call.uploads
    merged = bank.to()
    weights = [row_weights(uploads, call.weights, module, name) for module, name in enumerate(bank.shapes)]
    stacks = [(uploads.bt[name], uploads.a[name]) for name in bank.shapes]
    with torch.no_grad():
        for name, (bt, a) in zip(bank.shapes, best_rank(stacks, call.r_max, weights), strict=True):
            merged.bt[name].copy_(bt)
            merged.a[name].copy_(torch.where(bt.any(1, keepdim=True), a, merged.a[name]))
    return Merged(merged)


@torch.no_grad()
def merge_stack(call: MergeCall) -> Merged:
    """W <- W + s * sum p_k B_k A_k in every target module (FLoRA's stacking): exact, and the base model changes. Clients download the stack."""
    uploads, cfg = call.uploads, call.cfg
    for module, name in enumerate(uploads.shapes):
        p = row_weights(uploads, call.weights, module, name)
        a, bt = uploads.a[name].detach(), uploads.bt[name].detach()
        weight = linear_weight(call.model.get_submodule(name))
        weight.add_((cfg.scale * (bt * p[:, None].to(bt.dtype)).t() @ a).to(weight.dtype))
    return Merged(None, follow_bytes=sum(uploads.num_bytes(k) for k in range(uploads.num_clients)))
