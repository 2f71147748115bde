"""Steps of a cohort on a GPU as CUDA graphs: one that comes again with the same clients is recorded, and then one launch for the host."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.batches import collate
from hetlora.client import token_losses
from hetlora.config import Config
from hetlora.data import ClientData, predicted
from hetlora.errors import ConfigError
from hetlora_kernels.peft import StepGraph
from hetlora_kernels.peft.graphs import Record
from hetlora_kernels.peft.ids import KnownClients

FEWEST = 3  # steps of the same clients that are worth a recording, which costs the host one more step


@dataclass
class StepRows:
    """What a step of a cohort trains on.   rows: (client, position in its batch, sequence).   predicted: [K] tokens, 1 for clients without."""

    rows: list[tuple[int, int, Tensor]]
    predicted: list[int]
    active: list[bool]

    @property
    def places(self) -> tuple[tuple[int, int], ...]:
        return tuple((k, position) for k, position, _ in self.rows)


def step_rows(clients: Sequence[ClientData], drawn: Sequence[list[list[int]]], step: int) -> StepRows:
    """The sequences of every client that still has this step to do."""
    rows, counts, active = [], [1] * len(clients), [step < len(own_batches) for own_batches in drawn]
    for k, (data, own_batches) in enumerate(zip(clients, drawn, strict=True)):
        if active[k]:
            own = [data.train[i] for i in own_batches[step]]
            rows += [(k, position, sequence) for position, sequence in enumerate(own)]
            counts[k] = sum(map(predicted, own))
    return StepRows(rows, counts, active)


class _Slot:
    """The memory that the step of one set of clients reads: written before every replay, never moved."""

    def __init__(self, places: Sequence[tuple[int, int]], length: int, clients: int, device: torch.device) -> None:
        self.owner = torch.tensor([k for k, _ in places], dtype=torch.int64)
        self.index = torch.tensor([position for _, position in places], dtype=torch.int64)
        self.owner_there = self.owner.to(device)
        self.ids = torch.zeros(len(places), length, dtype=torch.int64, device=device)
        self.labels = torch.zeros_like(self.ids)
        self.predicted = torch.ones(clients, dtype=torch.float64, device=device)
        self.active = torch.ones(clients, dtype=torch.bool, device=device)
        self.graph: StepGraph | None = None

    def fill(self, work: StepRows) -> None:
        ids, labels = collate([sequence for _, _, sequence in work.rows], torch.device("cpu"), self.ids.shape[1])
        new = (ids, labels, torch.tensor(work.predicted, dtype=torch.float64), torch.tensor(work.active))
        for there, value in zip((self.ids, self.labels, self.predicted, self.active), new, strict=True):
            there.copy_(value.pin_memory() if there.is_cuda else value, non_blocking=True)


class RecordedSteps:
    """The steps of a round's local training, in order. Sequences are padded to the round's longest, so that all steps of the same clients have one shape.

    `ConfigError` where a step is more than one batch, and for a base in float16 (`LossScale`).   record: as in `StepGraph`.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        bank: hk.AdapterBank,
        optimizer: hk.AdamW | hk.SGD,
        work: Sequence[StepRows],
        seeds: Tensor,
        cfg: Config,
        record: Record | None,
    ) -> None:
        self.model, self.bank, self.optimizer, self.seeds, self.record = model, bank, optimizer, seeds, record
        self.length = max(len(sequence) for step in work for _, _, sequence in step.rows)
        most = max(len(step.rows) for step in work) * self.length
        if most > cfg.max_tokens_per_step:
            raise ConfigError(
                f"cuda_graph = True: a step is one batch, and one of this round has {most} tokens, more than max_tokens_per_step = {cfg.max_tokens_per_step}; "
                "raise that, lower batch_size or clients_per_round, or leave cuda_graph out"
            )
        if any(weight.dtype == torch.float16 for weight in model.parameters()):
            raise ConfigError(
                "cuda_graph = True: a base in float16 has its loss scaled by what the gradients are, and a recorded step reads nothing back; take a base in "
                "bfloat16, or leave cuda_graph out"
            )
        self.counts = Counter(step.places for step in work)
        self.slots: dict[tuple[tuple[int, int], ...], _Slot] = {}

    def run(self, work: StepRows, number: int) -> Tensor | None:
        """Do this step; its mean loss per client, float64 [K]. None, and nothing is done, for one whose clients come too seldom."""
        if self.counts[work.places] < FEWEST:
            return None
        slot = self.slots.get(work.places)
        if slot is None:
            slot = self.slots[work.places] = _Slot(work.places, self.length, self.bank.num_clients, self.bank.device)
        slot.fill(work)
        if slot.graph is not None:
            losses = slot.graph.replay(number)
            self.optimizer.stepped()
            return losses.clone()
        slot.graph = StepGraph(self.model, slot.owner, partial(self._step, slot), self.seeds, number, slot.index, self.record)
        self.optimizer.zero_grad()  # of the recording, which computed none
        return slot.graph.first

    def _step(self, slot: _Slot) -> Tensor:
        self.optimizer.zero_grad()
        sums = token_losses(self.model, slot.ids, slot.labels, KnownClients(slot.owner_there), self.bank.num_clients)
        losses = sums / slot.predicted.to(sums.dtype)
        losses.sum().backward()
        self.optimizer.step(slot.active)
        return losses.detach().double()
