"""Many clients in one batch: local training of all sampled clients, of whatever ranks, on one copy of the base model."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.batches import batches
from hetlora.client import LocalResult, dropout_seed, make_optimizer, step_batches, token_losses, train_client, training_scale
from hetlora.config import Config
from hetlora.data import ClientData
from hetlora.loss_scale import LossScale
from hetlora.packing import batching_of
from hetlora.recorded import RecordedSteps, StepRows, step_rows
from hetlora_kernels.peft import attach, client_segments, detach
from hetlora_kernels.peft.graphs import Record


def train_cohort(
    model: torch.nn.Module,
    bank: hk.AdapterBank,
    clients: Sequence[ClientData],
    cfg: Config,
    round_number: int,
    lr: float,
    keep: Mapping[str, Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
    record: Record | None = None,
) -> list[LocalResult]:
    """Train client k's factors of `bank` on clients[k], all k in one forward and backward per step; the same adapters as one at a time.

    Each step's batch holds the sequences of every client that still has steps to do; clients may differ in rank, steps and data size.
    Batches above cfg.max_tokens_per_step are split: gradients add up to the same sums. keep: {module: first tail row per client}.
    With cfg.cuda_graph steps that repeat clients are recorded (`RecordedSteps`).   record: as in `StepGraph`, for tests without a device.
    """
    drawn = [step_batches(data, cfg, round_number) for data in clients]
    seeds = torch.tensor([dropout_seed(data.name, cfg, round_number) for data in clients], dtype=torch.int64)
    optimizer = make_optimizer(bank, cfg, lr, keep, model)
    steps = max(len(own) for own in drawn)
    means: list[Tensor] = []  # [K] per step, fetched once at the end so that a step waits for nothing
    scaling, trained = LossScale(model), list(bank.parameters())
    batching_of(model, cfg)  # before a bank is attached
    attach(model, bank, scale=training_scale(bank, cfg), dropout=cfg.dropout)
    try:
        work = [step_rows(clients, drawn, step) for step in range(steps)]
        recorded = RecordedSteps(model, bank, optimizer, work, seeds, cfg, record) if cfg.cuda_graph else None
        for step in range(steps):
            losses = None if recorded is None else recorded.run(work[step], step)
            if losses is None:
                losses = scaling.gradients(partial(_backward, model, bank, work[step], step, seeds, cfg), trained, optimizer.zero_grad)
                optimizer.step(work[step].active)
            means.append(losses)
            if progress:
                progress(step + 1, steps)
    finally:
        detach(model)
    history = torch.stack(means).tolist()
    return [
        LocalResult(len(own), sum(map(len, own)), sum(len(data.train[i]) for batch in own for i in batch), history[0][k], history[len(own) - 1][k])
        for k, (own, data) in enumerate(zip(drawn, clients, strict=True))
    ]


def _backward(model: torch.nn.Module, bank: hk.AdapterBank, work: StepRows, step: int, seeds: Tensor, cfg: Config, scale: float) -> Tensor:
    """Gradients of `scale` times the sum over clients of their mean token loss in this step; returns the means [K]."""
    clients = bank.num_clients
    tokens = torch.tensor(work.predicted, dtype=torch.float64, device=bank.device)
    means = torch.zeros(clients, dtype=torch.float64, device=bank.device)
    for part in batches(work.rows, cfg.max_tokens_per_step, bank.device, batching_of(model, cfg)):
        with client_segments(model, part.owner, seeds=seeds, step=step, sequence_index=part.index, positions=part.positions):
            sums = token_losses(model, part.ids, part.labels, part.owner, clients, part.positions)
            losses = sums / tokens.to(sums.dtype)
            (losses.sum() if scale == 1 else losses.sum() * scale).backward()
        means += losses.detach()
    return means


def moved(bank: hk.AdapterBank, device: torch.device) -> hk.AdapterBank:
    """The bank on that device, itself where it is there; factors that are frozen stay so."""
    if bank.device == device:
        return bank
    copy = bank.to(device)
    for own, parameter in zip(copy.parameters(), bank.parameters(), strict=True):
        own.requires_grad_(parameter.requires_grad)
    return copy


def groups_of(clients: int, cfg: Config) -> list[range]:
    """A round's clients in as few groups of at most cfg.clients_at_once as there must be, of about the same size; one group where that is 0."""
    most = cfg.clients_at_once or clients
    count = max(1, -(-clients // most))
    return [range(i * clients // count, (i + 1) * clients // count) for i in range(count)]


def train_groups(
    model: torch.nn.Module,
    start: hk.AdapterBank,
    clients: Sequence[ClientData],
    cfg: Config,
    round_number: int,
    lr: float,
    keeps: Mapping[str, Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
    inside: Callable[[hk.AdapterBank, range], AbstractContextManager[Any]] = lambda bank, group: nullcontext(),
) -> tuple[hk.AdapterBank, list[LocalResult]]:
    """Train the clients as cohorts of `groups_of`, one after another; returns the trained bank, where `start` is.

    A group's adapters are brought to the model's device for its turn, with gradients and moments of its clients alone. What a client trains has the bits of a
    round of its group; it is that of all clients in one batch to rounding.   inside(bank, group): context of a group's training.
    """
    device = next(model.parameters()).device
    groups = groups_of(len(clients), cfg)
    lengths = [max(len(step_batches(clients[k], cfg, round_number)) for k in group) for group in groups]
    trained, results, before = start.select(range(len(clients))), [], 0
    for group, length in zip(groups, lengths, strict=True):
        own = moved(trained.select(group), device)
        keep = {module: [cut[k] for k in group] for module, cut in keeps.items()}

        def step(done: int, _: int, before: int = before) -> None:
            if progress:
                progress(before + done, sum(lengths))

        with inside(own, group):
            results += train_cohort(model, own, [clients[k] for k in group], cfg, round_number, lr, keep, step)
        for there, here in ((trained.a, own.a), (trained.bt, own.bt)):
            for name, layout in trained.layouts.items():
                there[name].detach()[layout.rows(group[0]).start : layout.rows(group[-1]).stop].copy_(here[name].detach())
        before += length
    return trained, results


def train_one_by_one(
    model: torch.nn.Module,
    bank: hk.AdapterBank,
    clients: Sequence[ClientData],
    cfg: Config,
    round_number: int,
    lr: float,
    keeps: Mapping[str, Sequence[int]],
    progress: Callable[[int, int], None] | None = None,
) -> tuple[hk.AdapterBank, list[LocalResult]]:
    """The same round through `client.train_client`, one client after another; returns the trained bank."""
    trained, results = [], []
    for k, data in enumerate(clients):
        own = bank.select([k])
        results.append(train_client(model, own, data, cfg, round_number, lr, {module: [cut[k]] for module, cut in keeps.items()}))
        trained.append(own)
        if progress:
            progress(k + 1, len(clients))
    return hk.AdapterBank.concat(trained), results
