"""The server's side of a round: sample, distribute by truncation, refuse bad uploads, aggregate."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora import diagnostics, full, merge
from hetlora.config import Config
from hetlora.ranks import ClientRank, bank_ranks
from hetlora.seeds import host_generator, torch_generator


@dataclass
class ServerState:
    """Everything a round changes. `bank`: the global factors at rank r_max; `ranks`: each client's present rank."""

    bank: hk.AdapterBank
    ranks: dict[str, ClientRank]
    r_min: int
    r_max: int
    round: int = 0
    rounds_trained: dict[str, int] = field(default_factory=dict)
    perplexity_before: dict[str, float] = field(default_factory=dict)
    ranks_start: dict[str, int] = field(default_factory=dict)
    stacked_bytes: int = 0  # merge = 'stack': what every client must download to follow the base model


def sample(names: Sequence[str], count: int, seed: int, round_number: int) -> list[str]:
    """`count` clients (all, if there are fewer), uniformly without replacement, in name order."""
    chosen = host_generator(seed, "sample", round_number).sample(range(len(names)), min(count, len(names)))
    return [names[i] for i in sorted(chosen)]


def distribute(state: ServerState, names: Sequence[str]) -> hk.AdapterBank:
    """Each client's download: the leading rank rows of the bank, nothing reordered (HETLORA section 3.1)."""
    return state.bank.truncate(bank_ranks([state.ranks[name] for name in names], state.bank.shapes))


def refused(bank: hk.AdapterBank, names: Sequence[str]) -> dict[int, str]:
    """{client: reason} for uploads that hold a NaN or an infinity, or whose norm overflows."""
    norms_a, norms_b = bank.tail_norms([0] * bank.num_clients)
    # ||B A|| too: its float32 products overflow where a rung's tail norms, summed in float64, do not
    finite = torch.isfinite(norms_a + norms_b + bank.delta_norms()).cpu()
    modules = list(bank.shapes)
    return {k: f"update has non-finite values in {modules[int((~finite[k]).nonzero()[0])]}" for k in range(len(names)) if not bool(finite[k].all())}


@dataclass(frozen=True)
class Aggregate:
    weights: Tensor  # [K, modules] float64
    norms: Tensor  # [K] float64, ||B_k A_k||_F over all modules
    diagnostics: dict[str, Any] = field(default_factory=dict)


def aggregate(state: ServerState, uploads: hk.AdapterBank, received: hk.AdapterBank, samples: Sequence[int], cfg: Config, model: torch.nn.Module) -> Aggregate:
    """Merge the uploads that arrived into `state.bank` (merge = 'stack': into the weights of `model`, with a fresh bank)."""
    if cfg.clip_update:
        uploads = uploads.select(range(uploads.num_clients))  # the caller's are the clients' own adapters
        merge.clip_updates(uploads, received, cfg.clip_update)
    weights, norms = merge.client_weights(uploads, samples, cfg)
    if cfg.merge == "factors":
        state.bank = merge.merge_factors(state.bank, uploads, weights, state.r_max, cfg)
    elif cfg.merge == "svd":
        state.bank = merge.merge_svd(state.bank, uploads, weights, state.r_max)
    else:
        merge.fold_stack(model, uploads, weights, cfg.scale)
        state.bank = fresh_bank(state.bank.shapes, state.r_max, cfg, state.bank.device, state.round + 1)
        state.stacked_bytes = sum(uploads.num_bytes(k) for k in range(uploads.num_clients))
    return Aggregate(weights, norms, diagnostics.describe(state.bank, uploads, weights, cfg) if cfg.diagnostics else {})


def aggregate_full(update: full.FullUpdate, model: torch.nn.Module) -> Aggregate:
    """train = 'full': the mean of the clients' models becomes the base model."""
    full.install(model, update)
    columns = ([values[k] for k in update.weights] for values in (update.weights, update.norms))
    weights, norms = (torch.tensor(column, dtype=torch.float64) for column in columns)
    return Aggregate(weights[:, None], norms)


def fresh_bank(shapes: Mapping[str, tuple[int, int]], r_max: int, cfg: Config, device: torch.device, round_number: int = 0) -> hk.AdapterBank:
    """The bank a federation starts from: A Kaiming-uniform from the run's seed, B = 0."""
    dtype: torch.dtype = getattr(torch, cfg.adapter_dtype)
    return hk.AdapterBank(shapes, [r_max], dtype=dtype, generator=torch_generator(cfg.seed, "bank", round_number)).to(device)


def traffic(
    state: ServerState, received: hk.AdapterBank, uploads: hk.AdapterBank, arrived: Sequence[int], cfg: Config, model: torch.nn.Module
) -> dict[str, Any]:
    """Bytes and trained parameters of the round: per client, in all, and what the same clients would move as HomLoRA at r_max."""
    clients = range(received.num_clients)
    homlora = state.bank.num_bytes(0)
    if cfg.train == "full":
        down, up = [full.num_bytes(model)] * len(clients), dict.fromkeys(arrived, full.num_bytes(model))
        trained = len(clients) * sum(parameter.numel() for parameter in model.parameters())
    else:
        down = [state.stacked_bytes if cfg.merge == "stack" else received.num_bytes(k) for k in clients]
        up = {k: uploads.num_bytes(i) for i, k in enumerate(arrived)}
        trained = sum(received.num_bytes(k) for k in clients) // received.dtype.itemsize
    return {
        "down": down,
        "up": up,
        "bytes_down": sum(down),
        "bytes_up": sum(up.values()),
        "bytes_down_homlora": homlora * len(down),
        "bytes_up_homlora": homlora * len(up),
        "trained_parameters": trained,
    }
