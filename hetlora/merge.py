"""Merging the uploads of a round: their weights, then the merge that `kinds.MERGES` names for the run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora import diagnostics, privacy, server_optimizer
from hetlora.config import Config
from hetlora.federation import base_weights
from hetlora.server import ServerState, fresh_bank


@dataclass(frozen=True)
class MergeCall:
    """What a merge is given. weights: p [K, modules] float64 (what training weighed itself may have other columns), columns sum to 1.

    bank: the server's, of rank `r_max`.   uploads: of the K clients that arrived, weighted like `weights`; an `AdapterBank` where adapters are trained.
    factors: those that were trained and sent, 'a', 'b' or 'ab'.
    rows: {module: of each upload, which rows of the bank its rows are}; None: the leading ones.
    moments: of the server's optimiser, for a merge that steps by itself (`kinds.MergeKind`), which keeps them up to date.
    """

    bank: hk.AdapterBank
    uploads: Any
    weights: Tensor
    r_max: int
    cfg: Config
    model: torch.nn.Module
    factors: str = "ab"
    rows: Mapping[str, Sequence[Sequence[int]]] | None = None
    moments: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class Merged:
    """What a merge returns. bank: the next one, None exactly where its row in `kinds.MERGES` keeps none.

    rows: how many leading rows of the bank the uploads decided; None = all.   added_to: the bank that the uploads were added to, None where they replace it.
    ended_with: for diagnostics, all rows that each client ended the round with, where uploads are some of them; None: the uploads.
    follow_bytes: of what the merge changed in the base model, as it travels: every client downloads it once, when it is here next.
    decided: {module: mask [R] of the rows that the uploads decided}, where the server's optimiser leaves all others as they are; None: it steps every row.
    """

    bank: hk.AdapterBank | None
    rows: int | None = None
    added_to: hk.AdapterBank | None = None
    ended_with: hk.AdapterBank | None = None
    follow_bytes: int = 0
    decided: Mapping[str, Tensor] | None = None


@dataclass(frozen=True)
class Aggregate:
    """A merged round. weights: p [K, modules or 1] float64.   norms: S [K] float64, over all modules, of what was merged.

    weights and norms are of no client (K = 0) where the server saw none's own.
    clips: the factor that each update was scaled by, [K], 1 where it was not; empty where clients train no adapters.
    """

    weights: Tensor
    norms: Tensor
    clips: list[float] = field(default_factory=list)
    diagnostics: dict[str, Any] = field(default_factory=dict)


def aggregate(
    state: ServerState,
    uploads: Any,
    received: Any,
    samples: Sequence[int],
    cfg: Config,
    model: torch.nn.Module,
    weighed: tuple[Tensor, Tensor] | None = None,
    rows: Mapping[str, Sequence[Sequence[int]]] | None = None,
    sampled: Sequence[str] = (),
) -> Aggregate:
    """Merge the uploads that arrived into `state`, and into `model` where the merge changes the base.

    received: what the same clients had received, as `uploads`, by which their updates are measured (`usual_limits`).   samples: training sequences of each.
    weighed: (p, S) where training weighed the uploads already; else they are `client_weights`.   rows: as in `MergeCall`.
    sampled: all clients of the round, by which differential privacy measures it; there uploads may be None, for none.
    With secure aggregation, uploads is one that stands for all (`secure_sum.mean`), or None where the round is given up.
    """
    if cfg.dp_clipping_norm:
        return _privately(state, uploads, received, sampled, cfg, model)
    if cfg.secure_aggregation:
        if uploads is not None:
            _merge_one(state, uploads, cfg, model)
        return Aggregate(torch.zeros(0, len(state.bank.shapes), dtype=torch.float64), torch.zeros(0, dtype=torch.float64))
    clips: list[float] = []
    suspects = None
    if weighed is None and (cfg.clip_update or cfg.clip_median):
        sizes = update_norms(uploads, received)
        usual = usual_limits(sizes, uploads, cfg.clip_median, samples if cfg.local_epochs else None)
        limits = usual.clamp_max(cfg.clip_update or torch.inf)
        if bool((sizes > limits).any()):
            suspects = Suspects(sizes > usual, uploads.delta_norms().cpu() == 0)
            uploads = uploads.select(range(uploads.num_clients))  # the caller's are the clients' own adapters
        clips = clip_updates(uploads, received, limits, sizes)
    weights, norms = weighed or client_weights(uploads, samples, cfg, suspects)
    call = MergeCall(state.bank, uploads, weights, state.r_max, cfg, model, cfg.training_kind.trains(state.round + 1), rows, state.moments)
    merged = _merge(call)
    if cfg.merge_kind.base != "none":
        state.stacked_bytes.append(merged.follow_bytes)
    if merged.bank is None:
        state.bank = fresh_bank(state.bank.shapes, state.r_max, cfg, state.bank.device, state.round + 1)
        return Aggregate(weights, norms, clips)
    state.bank = merged.bank
    compared = uploads if merged.ended_with is None else merged.ended_with
    return Aggregate(weights, norms, clips, diagnostics.describe(state.bank, compared, weights, merged.rows, merged.added_to) if cfg.diagnostics else {})


def _privately(
    state: ServerState, uploads: hk.AdapterBank | None, received: hk.AdapterBank | None, sampled: Sequence[str], cfg: Config, model: torch.nn.Module
) -> Aggregate:
    """The merge of one upload that holds the noised mean of the clients' updates, of weight 1: all that follows from it is post-processing."""
    one, clips = privacy.private_upload(state, uploads, received, sampled, cfg)
    merged = _merge_one(state, one, cfg, model)
    weights = torch.full((len(clips), len(one.shapes)), 1 / privacy.expected_clients(cfg, len(state.ranks)), dtype=torch.float64)
    if uploads is None or not clips:
        return Aggregate(weights, torch.zeros(0, dtype=torch.float64))
    norms = uploads.delta_norms().double().cpu().square().sum(1).sqrt()
    return Aggregate(weights, norms, clips, diagnostics.describe(state.bank, uploads, weights, merged.rows, merged.added_to) if cfg.diagnostics else {})


def _merge_one(state: ServerState, one: hk.AdapterBank, cfg: Config, model: torch.nn.Module) -> Merged:
    """The merge of one upload of weight 1, which stands for all of the round, into `state`."""
    weights = torch.ones(1, len(one.shapes), dtype=torch.float64)
    merged = _merge(MergeCall(state.bank, one, weights, state.r_max, cfg, model, cfg.training_kind.trains(state.round + 1), moments=state.moments))
    assert merged.bank is not None
    state.bank = merged.bank
    return merged


@torch.no_grad()
def _merge(call: MergeCall) -> Merged:
    """The run's merge, and the server optimiser's step on what it changed: the trained factors of a bank that lasts, and weights of the base.

    A merge whose row says so has taken its step on numbers of its own.
    """
    kind = call.cfg.merge_kind
    if call.cfg.server_optimizer == "none" or kind.steps != "factors":
        merged: Merged = kind.load()(call)
        return merged
    weights = base_weights(call.cfg, call.model, call.bank.shapes)
    old = {f"base.{name}": weight.detach().clone() for name, weight in weights.items()}
    merged = kind.load()(call)
    new = {f"base.{name}": weight.detach() for name, weight in weights.items()}
    sides = [side for side, factor in (("a", "a"), ("bt", "b")) if factor in call.factors]
    if merged.bank is not None:
        for bank, found in ((call.bank, old), (merged.bank, new)):
            found |= {f"bank.{key}": rows for key, rows in bank.state_dict().items() if key.partition(".")[0] in sides}
    decided = {f"bank.{side}.{name}": mask for name, mask in (merged.decided or {}).items() for side in sides}
    server_optimizer.step(call.cfg, call.moments, old, new, decided)
    return merged


@dataclass(frozen=True)
class Suspects:
    """What was seen of the uploads before they were clipped. large: [K], updates above `usual_limits`.   silent: [K, modules], where ||B A|| was 0."""

    large: Tensor
    silent: Tensor


def client_scores(uploads: hk.AdapterBank, samples: Sequence[float], cfg: Config) -> tuple[Tensor, Tensor]:
    """(what each client's weight is in proportion to, [K, modules] float64; S [K]): of each client by itself, without the others."""
    norms = uploads.delta_norms().double().cpu()
    total = norms.square().sum(1).sqrt()
    if cfg.weights == "uniform":
        return torch.ones_like(norms), total
    if cfg.weights == "samples":
        return torch.tensor(samples, dtype=torch.float64)[:, None].expand_as(norms), total
    return (norms if cfg.weight_scope == "module" else total[:, None].expand_as(norms)), total


def client_weights(uploads: hk.AdapterBank, samples: Sequence[int], cfg: Config, suspects: Suspects | None = None) -> tuple[Tensor, Tensor]:
    """(p, S): p [K, modules] float64, columns sum to 1 over the uploads that arrived; S [K] float64 = ||B_k A_k||_F over all modules.

    'sparsity': p_k = S_k / sum S per module, or with S over all modules for cfg.weight_scope = 'client' (HETLORA section 3.3); S is clipped at
    cfg.weight_cap times the median of the round's S > 0 where that is given. S = 0 gives p = 0; all S = 0: uniform. 'uniform': 1 / K. 'samples': by
    sequences.

    suspects: under 'sparsity', the S of one that was too large counts as at most the median, and an S that was 0 before the clip stays 0.
    """
    scores, total = client_scores(uploads, samples, cfg)
    clients = len(total)
    if cfg.weights == "sparsity":
        if suspects is not None:
            silent = suspects.silent if cfg.weight_scope == "module" else suspects.silent.all(1, keepdim=True)
            scores = scores.where(~silent, 0.0)
            scores = scores.where(~suspects.large[:, None], scores.minimum(_median_above_zero(scores)))
        if cfg.weight_cap:
            scores = scores.minimum(cfg.weight_cap * _median_above_zero(scores))
    sums = scores.sum(0, keepdim=True)
    return torch.where(sums > 0, scores / sums.clamp_min(torch.finfo(torch.float64).tiny), 1 / clients), total


def _median_above_zero(values: Tensor) -> Tensor:
    """Lower median of the positive values of each column of [K, columns], [1, columns]; 0 where there is none. Half of the round cannot make it 0."""
    return values.where(values > 0, torch.nan).nanmedian(0, keepdim=True).values.nan_to_num(0.0)


@torch.no_grad()
def update_norms(uploads: hk.AdapterBank, received: hk.AdapterBank) -> Tensor:
    """||upload - received||_F of each client over all its factors, [K] float64.   received: what it downloaded, cut to the rank of its upload.

    The differences are held of one module at a time.
    """
    squares = []
    for name, layout in uploads.layouts.items():
        a, bt = ({name: new[name] - old[name]} for new, old in ((uploads.a, received.a), (uploads.bt, received.bt)))
        change = hk.AdapterBank.of({name: uploads.shapes[name]}, {name: layout.ranks}, a, bt)
        norms_a, norms_b = change.tail_norms([0] * uploads.num_clients)
        squares.append(norms_a.double().square() + norms_b.double().square())
    return torch.cat(squares, 1).sum(1).sqrt().cpu()


MEDIAN_OF = 3
"""Uploads that a median needs to say anything."""


def usual_limits(sizes: Tensor, uploads: hk.AdapterBank, multiple: float, steps: Sequence[int] | None = None) -> Tensor:
    """The largest update that passes for usual, of each client, [K] float64, for `sizes` = ||upload - received||_F, [K].

    L_k = multiple * sqrt(r_k) * median_j (sizes_j / sqrt(r_j)), r_k the client's mean rank over modules: under Adam an update grows with the root of the
    number of its entries, so that a large rank is no offence. The median is the lower one, of updates that are not 0, and counts from three uploads on.
    steps: where clients take different numbers of steps, in proportion to these. L_k grows by steps_k / median of steps where that is above 1: it is as far as
    a client can honestly get. Without a median, or with multiple = 0, L = inf.
    """
    if multiple and len(sizes) >= MEDIAN_OF:
        ranks = torch.tensor([layout.ranks for layout in uploads.layouts.values()], dtype=torch.float64).mean(0)  # [K]
        roots = ranks.clamp_min(torch.finfo(torch.float64).tiny).sqrt()
        if median := float(_median_above_zero((sizes / roots)[:, None])):
            longer = torch.ones_like(roots)
            if steps is not None:
                taken = torch.tensor(steps, dtype=torch.float64)
                longer = (taken / taken.median().clamp_min(1)).clamp_min(1)
            return multiple * median * roots * longer
    return torch.full_like(sizes, torch.inf)


def clip_updates(uploads: hk.AdapterBank, received: hk.AdapterBank, limits: Tensor | float, sizes: Tensor | None = None) -> list[float]:
    """Scale each client's update, upload - received over all factors, in place to Frobenius norm <= its limit; the factors used, [K].

    received: what the client downloaded, cut to the rank of its upload.   sizes: `update_norms`, where known.
    An upload within its limit keeps its bits.
    """
    sizes = update_norms(uploads, received) if sizes is None else sizes
    factors: list[float] = (limits / sizes.clamp_min(torch.finfo(torch.float64).tiny)).clamp_max(1).tolist()
    if min(factors, default=1) == 1:
        return factors
    with torch.no_grad():
        for new, old, layout in zip(uploads.parameters(), received.parameters(), [*uploads.layouts.values()] * 2, strict=True):
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
    return Merged(bank, rows=_owned_rows(call.uploads))


def merge_one_factor(call: MergeCall) -> Merged:
    """bank B <- sum p_k B_k where B was trained, A as it is; or bank A <- sum p_k A_k, B as it is. Rows as in `merge_factors`.

    The other factor is the same for all, so the average of this one is that of the products: sum p_k B_k A = (sum p_k B_k) A (FFA-LoRA, arXiv
    2403.12313, section 3; RoLoRA, arXiv 2409.02346).
    """
    merged = merge_factors(call)
    assert merged.bank is not None
    with torch.no_grad():
        for factor, new, old in (("a", merged.bank.a, call.bank.a), ("b", merged.bank.bt, call.bank.bt)):
            if factor not in call.factors:
                for name, rows in new.items():
                    rows.copy_(old[name])
    return merged


@torch.no_grad()
def merge_delta(call: MergeCall) -> Merged:
    """bank row j <- row j + sum_k p_k (row j of client k - row j) over its owners, A and B apart: for all others the row counts as unchanged.

    With one rank for all it is `merge_factors`; a row of weight P in all keeps 1 - P of its old value, where zero-padding fades it to P.
    """
    bank, uploads = call.bank, call.uploads
    changes = uploads.select(range(uploads.num_clients))
    for change, old in zip(changes.parameters(), bank.truncate({name: layout.ranks for name, layout in uploads.layouts.items()}).parameters(), strict=True):
        change.sub_(old)
    merged = changes.aggregate(call.weights.to(uploads.device), call.r_max)
    for new, old in zip(merged.parameters(), bank.parameters(), strict=True):
        new.add_(old)
    return Merged(merged, rows=_owned_rows(uploads))


def _owned_rows(uploads: hk.AdapterBank) -> int:
    return max(layout.max_rank for layout in uploads.layouts.values())
