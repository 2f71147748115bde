"""Steps of a cohort that are recorded and replayed. With a stand-in for the CUDA graph, which does the recorded step again on the same memory, a run has the
bits of one that records nothing. On the meta device a step copies nothing and reads nothing back. What cannot be recorded is refused."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from tiny import tiny_clients, tiny_config, tiny_federation, tiny_model, trained_bank
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import masking_utils

import hetlora_kernels as hk
from hetlora.client import make_optimizer, step_batches
from hetlora.cohort import train_cohort
from hetlora.config import Config
from hetlora.data import ClientData
from hetlora.errors import ConfigError
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.recorded import FEWEST, RecordedSteps, step_rows
from hetlora_kernels.ops import lora
from hetlora_kernels.peft import attach
from hetlora_kernels.peft.attached import attachment

RANKS = [2, 5, 3]
LR = 0.05


class Graph:
    """In place of a CUDA graph: a replay does the step that was recorded again, with nothing but what lies in its memory, as one on a device does."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model, self.recorded, self.replays = model, 0, 0

    def __call__(self, step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], None]]:
        self.recorded += 1
        shared = attachment(self.model)
        batch, result = shared.batch, torch.full((len(RANKS),), float("nan"), dtype=torch.float64)

        def again() -> None:
            self.replays += 1
            before, shared.batch = shared.batch, batch
            try:
                result.copy_(step())
            finally:
                shared.batch = before

        return result, again


def cohort(cfg: Config, clients: list[ClientData], graph: bool) -> tuple[hk.AdapterBank, list, Graph]:
    model = tiny_model(torch.float64)
    bank = trained_bank(target_shapes(model, "attention"), RANKS, torch.float64)
    record = Graph(model)
    keep = {name: [1, 3, 2] for name in bank.shapes}
    results = train_cohort(model, bank, clients, cfg.model_copy(update={"cuda_graph": graph}), 1, LR, keep, record=record)
    return bank, results, record


def settings(tmp_path, **values) -> Config:
    amount = {} if "local_epochs" in values else {"local_steps": 7}
    return tiny_config(tmp_path / "run", **{**amount, "batch_size": 2, "dropout": 0.3, **values})


def of_one_length(sizes: list[int]) -> list[ClientData]:
    return [ClientData(c.name, [torch.cat([s, s])[:9] for s in c.train], c.test) for c in tiny_clients(sizes)]


@pytest.mark.parametrize(
    "change", [{}, {"optimizer": "sgd", "momentum": 0.9}, {"local_epochs": 3, "local_steps": 5}, {"dropout": 0.0, "batch_size": 1}], ids=str
)
def test_a_recorded_run_has_the_bits_of_the_steps_one_by_one(tmp_path, change):
    """Clients of several sizes: a pass ends in a smaller batch, and with epochs some are done before others, so several steps are recorded."""
    cfg, clients = settings(tmp_path, **change), of_one_length([4, 6, 3])
    plain, expected, nothing = cohort(cfg, clients, graph=False)
    bank, results, graph = cohort(cfg, clients, graph=True)
    assert nothing.recorded == 0 and graph.recorded > 0 and graph.replays >= FEWEST - 1
    assert results == expected
    for name in bank.shapes:
        assert torch.equal(bank.a[name], plain.a[name]) and torch.equal(bank.bt[name], plain.bt[name])


def test_sequences_are_padded_to_the_longest_of_the_round(tmp_path):
    """So that steps whose sequences differ in length have one shape; the padding is nobody's loss."""
    cfg, clients = settings(tmp_path), tiny_clients([4, 6, 4])
    plain, expected, _ = cohort(cfg, clients, graph=False)
    bank, results, graph = cohort(cfg, clients, graph=True)
    assert graph.replays == 7 - graph.recorded
    for one, other in zip(results, expected, strict=True):
        assert (one.steps, one.sequences, one.tokens) == (other.steps, other.sequences, other.tokens)
    for one, other in zip(bank.parameters(), plain.parameters(), strict=True):
        assert float((one - other).detach().abs().max()) < 1e-12, "as co-batched and alone in test_cohort.py"


def test_steps_of_clients_that_come_seldom_are_not_recorded(tmp_path):
    _, _, graph = cohort(settings(tmp_path, local_steps=FEWEST - 1), of_one_length([4, 4, 4]), graph=True)
    assert graph.recorded == 0


def test_step_rows_leave_out_who_is_done():
    clients = of_one_length([2, 1])
    work = step_rows(clients, [[[0, 1], [1]], [[0]]], 1)
    assert work.places == ((0, 0),) and work.active == [True, False] and work.predicted == [8, 1]


def test_a_step_of_several_batches_is_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"cuda_graph = True: a step is one batch, and one of this round has 54 tokens, more than max_tokens_per_step = 20"):
        cohort(settings(tmp_path, max_tokens_per_step=20), of_one_length([4, 6, 4]), graph=True)


def test_a_base_whose_loss_is_scaled_is_refused():
    model = tiny_model(torch.float16)
    bank = trained_bank(target_shapes(model, "attention"), RANKS)
    with pytest.raises(ConfigError, match=r"cuda_graph = True: a base in float16 has its loss scaled .* take a base in bfloat16, or leave cuda_graph out"):
        RecordedSteps(model, bank, hk.SGD(bank), [step_rows(of_one_length([2]), [[[0]]], 0)], torch.arange(3), Config(), None)


def test_a_run_on_a_cpu_is_refused_before_its_folder_is_made(tmp_path):
    cfg = tiny_config(tmp_path / "run", cuda_graph=True)
    with pytest.raises(ConfigError, match="cuda_graph = True: expected a CUDA device, which alone records graphs, got cpu"):
        simulate(cfg, federation=tiny_federation([3, 4]))
    assert not (tmp_path / "run").exists()


class OnDevice(TorchDispatchMode):
    """The ops in which tensors of the host and of the device meet: copies, either way. Values cannot be read back from the meta device at all."""

    def __init__(self) -> None:
        super().__init__()
        self.ops, self.meetings = 0, []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        found = [each.device.type for each in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(each, torch.Tensor)]
        self.ops += "meta" in found
        if {"cpu", "meta"} <= set(found):
            self.meetings.append(str(func))
        return out


def moved(value, device: str):
    """The tensors of an optimiser's settings and state, and lists of them, on another device."""
    if isinstance(value, list):
        return [moved(each, device) for each in value]
    return value.to(device) if isinstance(value, torch.Tensor) else value


@pytest.mark.parametrize("rule", ["adamw", "sgd"])
def test_a_step_copies_nothing_and_reads_nothing_back(tmp_path, monkeypatch, rule):
    """Forward and backward pass of a transformer, losses and optimiser with clipping and regulariser, once a step before has made the tables."""
    cfg, clients, model = settings(tmp_path, optimizer=rule), of_one_length([4, 4, 4]), tiny_model()
    bank = trained_bank(target_shapes(model, "attention"), RANKS)
    optimizer = make_optimizer(bank, cfg, LR, {name: [1, 3, 2] for name in bank.shapes}, model)
    drawn = [step_batches(data, cfg, 1) for data in clients]
    work = [step_rows(clients, drawn, step) for step in range(7)]
    attach(model, bank, dropout=cfg.dropout)
    RecordedSteps(model, bank, optimizer, work, torch.arange(3), cfg, Graph(model)).run(work[0], 0)  # shows which rows go where, with values
    model.to("meta")
    for side in (bank.a, bank.bt):
        for name in side:
            side[name] = torch.nn.Parameter(side[name].detach().to("meta"))
    vars(optimizer).update({name: moved(value, "meta") for name, value in vars(optimizer).items() if name != "_params"}, _params=list(bank.parameters()))
    seen = OnDevice()

    def record(step: Callable[[], Tensor], device: torch.device) -> tuple[Tensor, Callable[[], object]]:
        with seen:
            return step(), lambda: None

    for module in (lora, torch):  # the meta device has no autocast
        monkeypatch.setattr(module, "is_autocast_enabled", lambda kind: False)
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: nullcontext())
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)  # transformers looks into no mask while a stream is captured
    steps = RecordedSteps(model, bank, optimizer, work, torch.arange(3), cfg, record)
    steps.run(work[0], 0)
    slot = steps.slots[work[0].places]
    assert seen.ops > 100 and not seen.meetings, seen.meetings
    assert {slot.ids.device.type, slot.owner_there.device.type, slot.active.device.type} == {"meta"}


def test_the_memory_that_a_recorded_step_reads_stays_where_it_is(tmp_path):
    cfg, clients, model = settings(tmp_path), of_one_length([4, 4, 4]), tiny_model()
    bank = trained_bank(target_shapes(model, "attention"), RANKS)
    optimizer = make_optimizer(bank, cfg, LR, {}, model)
    work = [step_rows(clients, [step_batches(data, cfg, 1) for data in clients], step) for step in range(7)]
    attach(model, bank, dropout=cfg.dropout)
    steps = RecordedSteps(model, bank, optimizer, work, torch.arange(3), cfg, Graph(model))

    def places() -> list[int]:
        slot = steps.slots[work[0].places]
        seeds = slot.graph._batch.seeds.place(bank.device)
        read = [
            slot.ids,
            slot.labels,
            slot.predicted,
            slot.active,
            slot.owner_there,
            seeds,
            optimizer.lr,
            optimizer.step_count,
            *optimizer.exp_avg,
            *bank.parameters(),
        ]
        return [each.data_ptr() for each in read]

    steps.run(work[0], 0)
    before, seeds = places(), steps.slots[work[0].places].graph._batch.seeds.place(bank.device).clone()
    steps.run(work[1], 1)
    assert places() == before and not torch.equal(steps.slots[work[0].places].graph._batch.seeds.place(bank.device), seeds)


@pytest.mark.parametrize("values", [{"cobatch": False}, {"gradient_checkpointing": True}, {"train": "full", "weights": "samples"}], ids=str)
def test_where_no_cohort_trains_it_is_refused(tmp_path, values):
    with pytest.raises(ConfigError, match="cuda_graph = True"):
        Config.create("test", output=str(tmp_path / "run"), cuda_graph=True, **values)
