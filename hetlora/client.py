"""One client: which sequences it trains on in each step, its local steps on a model of its own, and its decision to prune."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.batches import Batch, batches
from hetlora.config import Config
from hetlora.data import ClientData, predicted
from hetlora.loss_scale import LossScale
from hetlora.packing import batching_of
from hetlora.ranks import ClientRanks, Scope
from hetlora.seeds import derive_seed, host_generator
from hetlora_kernels.peft import HeadError, attach, client_losses, client_segments, detach, hidden_states
from hetlora_kernels.peft.ids import KnownClients


@dataclass(frozen=True)
class LocalResult:
    """Mean loss per token of a client's first and last local step, and how much it trained on."""

    steps: int
    sequences: int
    tokens: int
    loss_first: float
    loss_last: float


def step_batches(data: ClientData, cfg: Config, round_number: int) -> list[list[int]]:
    """Indices into `data.train` for each local step of the round: shuffled passes, cut into batches; a small client repeats its data.

    cfg.local_steps batches, or cfg.local_epochs full passes where that is given. A batch never holds a sequence twice.
    """
    count = len(data.train)
    size = min(cfg.batch_size, count)
    shuffle = host_generator(cfg.seed, "batches", round_number, data.name)
    per_pass = math.ceil(count / size)
    steps = per_pass * cfg.local_epochs or cfg.local_steps
    drawn: list[list[int]] = []
    while len(drawn) < steps:
        order = list(range(count))
        shuffle.shuffle(order)
        drawn += [order[i : i + size] for i in range(0, count, size)]
    return drawn[:steps]


def dropout_seed(name: str, cfg: Config, round_number: int) -> int:
    return derive_seed(cfg.seed, "dropout", round_number, name)


def make_optimizer(bank: hk.AdapterBank, cfg: Config, lr: float, keep: Any, model: torch.nn.Module) -> hk.AdamW | hk.SGD:
    """The local optimiser with the pruning regulariser lambda * sum ||B[:, q:]|| ||A[q:, :]|| on rows q = keep and up; without it where keep is empty.

    On a GPU it keeps the factors in the type of a 16-bit `model` too, for the layers to multiply with.
    """
    base = next((p.dtype for p in model.parameters() if p.dtype in (torch.bfloat16, torch.float16)), None)
    cast = None if bank.device.type == "cpu" else base
    penalty = (cfg.prune_lambda, keep) if cfg.prune_lambda > 0 and keep else None
    moments = None if cfg.moments_dtype == "same" else getattr(torch, cfg.moments_dtype)
    settings: dict[str, Any] = {"lr": lr, "weight_decay": cfg.weight_decay, "clip_norm": cfg.clip_norm or None, "tail_penalty": penalty, "cast": cast}
    if cfg.optimizer == "adamw":
        return hk.AdamW(bank, moments_dtype=moments, **settings)
    return hk.SGD(bank, momentum=cfg.momentum, moments_dtype=moments, **settings)


def tail_scores(bank: hk.AdapterBank, keep: Any) -> Tensor:
    """||B_k[:, q:]||_F ||A_k[q:, :]||_F per client and module, float64 [K, modules] (HETLORA section 3.2)."""
    norms_a, norms_b = bank.tail_norms(keep)
    return (norms_a.double() * norms_b.double()).cpu()


def prune_decision(ranks: ClientRanks, keep: ClientRanks, before: Tensor, after: Tensor, scope: Scope) -> ClientRanks:
    """The ranks after the round: q where the tail score fell strictly, else unchanged. Ranks never grow.

    ranks, keep: the client's ranks and tail starts, {module: number} in the bank's order.   before, after: [modules] scores T0 as received, T1 as
    trained.   scope: 'client': the scores are summed over modules and decide for all of them; 'module': each module decides for itself.
    """
    fell = [bool(after.sum() < before.sum())] * len(ranks) if scope == "client" else (after < before).tolist()
    return {module: keep[module] if fell[i] else rank for i, (module, rank) in enumerate(ranks.items())}


_takes_logits: WeakSet[torch.nn.Module] = WeakSet()


def token_losses(
    model: torch.nn.Module, ids: Tensor, labels: Tensor, owner: Sequence[int] | Tensor | KnownClients, num_clients: int, positions: Tensor | None = None
) -> Tensor:
    """[K] summed token losses of each client in one batch, in one forward of the model.

    ids, labels: [batch, seq].   owner: client of each sequence, [batch], or token, [batch, seq].   positions: [batch, seq] where rows hold several sequences.
    Logits are made for a few rows at a time. A model that does more with its logits than `hidden_states` can follow makes all of them, and a warning says so.
    """
    given = {"input_ids": ids, "use_cache": False} | ({} if positions is None else {"position_ids": positions})
    if model not in _takes_logits:
        try:
            with hidden_states(model) as hidden:
                model(**given)
            return client_losses(hidden.states, labels, owner, num_clients, reduction="sum", head=hidden.head)
        except HeadError as error:
            _takes_logits.add(model)
            warnings.warn(f"losses are made from all logits of a batch, which take more memory: {error}", stacklevel=2)
    return client_losses(model(**given).logits, labels, owner, num_clients, reduction="sum")


def training_scale(bank: hk.AdapterBank, cfg: Config) -> float | tuple[float, ...]:
    """s of the clients of `bank` while they train: one for all, or, with scale_rule = 'rslora', scale / sqrt(r_k) of each (arXiv 2312.03732)."""
    if cfg.scale_rule == "constant":
        return cfg.scale
    assert isinstance(bank.ranks, tuple)  # `Config.check`: no ranks by module
    return tuple(map(cfg.scale_at, bank.ranks))


class LocalOptimizer(Protocol):
    """What local training needs of an optimiser."""

    def zero_grad(self) -> None: ...

    def step(self) -> None: ...


def local_steps(
    model: torch.nn.Module,
    data: ClientData,
    cfg: Config,
    round_number: int,
    optimizer: LocalOptimizer,
    device: torch.device,
    segments: Callable[[Batch, int], AbstractContextManager[Any]],
    trained: Sequence[Tensor] = (),
) -> LocalResult:
    """The client's steps of the round on whatever `optimizer` steps.

    segments(batch, step): context of one forward and backward over a batch of the step.   trained: what `optimizer` steps, for the
    loss scaling of a float16 base.
    """
    drawn, batching = step_batches(data, cfg, round_number), batching_of(model, cfg)
    losses, tokens = [], 0
    scaling = LossScale(model)
    for step, batch in enumerate(drawn):
        sequences = [data.train[i] for i in batch]
        count = sum(map(predicted, sequences))
        tokens += sum(len(s) for s in sequences)

        def backward(scale: float, step: int = step, sequences: list[Tensor] = sequences, count: int = count) -> Tensor:
            loss = 0.0
            for part in batches([(0, i, s) for i, s in enumerate(sequences)], cfg.max_tokens_per_step, device, batching):
                with segments(part, step):
                    part_loss = token_losses(model, part.ids, part.labels, part.owner, 1, part.positions)[0] / count
                    (part_loss if scale == 1 else part_loss * scale).backward()
                loss += float(part_loss.detach())
            return torch.tensor(loss, dtype=torch.float64)

        losses.append(float(scaling.gradients(backward, trained, optimizer.zero_grad)))
        optimizer.step()
    return LocalResult(len(drawn), sum(len(b) for b in drawn), tokens, losses[0], losses[-1])


def train_client(model: torch.nn.Module, bank: hk.AdapterBank, data: ClientData, cfg: Config, round_number: int, lr: float, keep: Any) -> LocalResult:
    """Local training of one client on its own: what a device does. Trains the factors of `bank` (one client) in place.

    `cohort.train_cohort` gives the same adapters for many clients at once.
    """
    seeds = torch.tensor([dropout_seed(data.name, cfg, round_number)], dtype=torch.int64)

    def segments(batch: Batch, step: int) -> AbstractContextManager[Any]:
        return client_segments(model, batch.owner, seeds=seeds, step=step, sequence_index=batch.index, positions=batch.positions)

    batching_of(model, cfg)  # before a bank is attached
    attach(model, bank, scale=training_scale(bank, cfg), dropout=cfg.dropout)
    try:
        optimizer = make_optimizer(bank, cfg, lr, keep, model)
        return local_steps(model, data, cfg, round_number, optimizer, bank.device, segments, list(bank.parameters()))
    finally:
        detach(model)
