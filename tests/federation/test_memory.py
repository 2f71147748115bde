"""The model of a step's memory: it is what a step takes, and `--max-tokens-per-step auto` is the most that it lets in."""

from __future__ import annotations

import pytest
import torch
from click.testing import CliRunner
from tiny import lines, same_bits, tiny_config, tiny_federation, tiny_model
from torch.multiprocessing.reductions import StorageWeakRef

import hetlora_kernels as hk
from benchmarks import memory as bench_memory
from hetlora import memory, spread
from hetlora.cli import cli
from hetlora.client import make_optimizer
from hetlora.config import Config, ConfigError
from hetlora.loop import simulate
from hetlora.memory import StepMemory, adapter_bytes, free_memory, step_memory, with_step_tokens
from hetlora.models import target_shapes
from hetlora.observer import Observer
from hetlora_kernels.peft import attach


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(memory.ctypes.CDLL(None), "mallopt"), reason="glibc's allocator: others keep freed memory")
@pytest.mark.parametrize("case", bench_memory.CASES[1:3], ids=str)  # a layer that checkpoints, and many words
def test_the_peak_of_a_process_is_within_a_tenth_of_the_model(case):
    found = bench_memory.in_a_process(*case)
    assert found["measured"] > 100, "MiB, or a tenth of it is little beside what a library loads late"
    assert 0.9 <= found["modelled"] / found["measured"] <= 1.1


def test_the_most_tokens_are_the_last_that_fit():
    sizes = StepMemory(base=1000, adapters=100, kept=7.5, moved=2.0, words=10, most_logits=400, logit_bytes=12)
    assert [sizes.of(tokens) for tokens in (1, 1000)] == [1100 + 7.5 + 120, 1100 + 7500 + 4800]
    assert sizes.of(10_000) == 1100 + 75_000 + 20_000, "gradients are more than a chunk of logits now"
    for free in (1227, 1228, 5000, 12_345, 10**6):
        tokens = sizes.tokens(free)
        assert tokens == 0 or sizes.of(tokens) <= free
        assert sizes.of(tokens + 1) > free
    assert sizes.tokens(1227) == 0


@pytest.mark.parametrize(
    "settings",
    [{}, {"moments_dtype": "bfloat16"}, *({"optimizer": "sgd", **own} for own in ({}, {"momentum": 0.9}, {"momentum": 0.9, "moments_dtype": "bfloat16"}))],
    ids=str,
)
def test_adapters_take_their_factors_gradients_and_moments(tmp_path, settings):
    cfg = tiny_config(tmp_path, **settings)
    model = tiny_model()
    shapes, ranks = target_shapes(model, "attention"), [3, 5]
    bank = hk.AdapterBank(shapes, ranks)
    for factor in bank.parameters():
        factor.grad = torch.ones_like(factor)
    step = make_optimizer(bank, cfg, 0.1, {}, model)
    step.step()
    moments = [tensor for own in vars(step).values() if isinstance(own, list) for tensor in own if isinstance(tensor, torch.Tensor) and tensor.dim() == 2]
    moments = [tensor for tensor in moments if all(tensor.data_ptr() != factor.data_ptr() for factor in bank.parameters())]
    held = [*bank.parameters(), *(factor.grad for factor in bank.parameters()), *moments]
    assert adapter_bytes(shapes, sum(ranks), cfg) == sum(tensor.numel() * tensor.element_size() for tensor in held)


def test_checkpointing_keeps_the_inputs_of_layers_and_one_layer(tmp_path):
    model = tiny_model()
    shapes = target_shapes(model, "attention")
    plain, checkpointed = (step_memory(model, shapes, 8, 4, tiny_config(tmp_path, seq_len=16, gradient_checkpointing=own)) for own in (False, True))
    assert checkpointed.kept == 2 * 16 * 4 + plain.kept / 2
    four = step_memory(model, shapes, 8, 4, tiny_config(tmp_path, seq_len=16), layers=4)
    assert four.kept == 2 * plain.kept
    assert all(parameter.grad is None for parameter in model.parameters())


def test_the_probe_counts_what_a_step_keeps_and_keeps_none_of_it(tmp_path, monkeypatch):
    """Its number is that of two graphs that are held whole, and what the first layer left is gone when the last one ends."""
    model, cfg = tiny_model(), tiny_config(tmp_path, seq_len=16)
    shapes, probed, held = target_shapes(model, "attention"), memory.token_losses, []
    act = next(module for name, module in model.named_modules() if name.endswith("act_fn") or name.endswith(".act"))
    seen, alive = [], []

    def look(model, *arguments):
        hook = act.register_forward_hook(lambda module, inputs, output: seen.append(StorageWeakRef(output.untyped_storage())))
        try:
            losses = probed(model, *arguments)
        finally:
            hook.remove()
        alive.append(not seen[-1].expired())
        return losses

    monkeypatch.setattr(memory, "token_losses", look)
    found = step_memory(model, shapes, 8, 4, cfg).kept
    assert len(seen) == 3 and alive == [False] * 3

    bank = hk.AdapterBank(shapes, [4])
    own = {tensor.data_ptr() for tensor in (*model.parameters(), *model.buffers(), *bank.parameters())}
    attach(model, bank)
    for rows in (1, 2):
        ids, kept = torch.ones(rows, 16, dtype=torch.int64), []
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor, kept=kept: kept.append(tensor) or tensor, lambda tensor: tensor):
            losses = probed(model, ids, ids, torch.zeros(rows, dtype=torch.int64), 1)
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
        held.append(sum(size for at, size in storages.items() if at not in own))
        assert losses.requires_grad
    assert found == (held[1] - held[0]) / 16 > 0


@pytest.mark.filterwarnings("ignore:losses are made from all logits")
def test_a_model_whose_head_is_refused_after_its_first_call_is_counted_once(tmp_path):
    model, cfg = tiny_model(), tiny_config(tmp_path, seq_len=16)

    class More(type(model)):
        def forward(self, *args, **kwargs):
            out = super().forward(*args, **kwargs)
            out.logits = out.logits + 1
            return out

    model.__class__ = More
    first, again = (step_memory(model, target_shapes(model, "attention"), 8, 4, cfg).kept for _ in range(2))
    assert first == again > 0


def test_free_memory_is_the_least_of_what_the_system_and_the_container_leave(tmp_path, monkeypatch):
    none = tmp_path / "none"
    (tmp_path / "meminfo").write_text("MemTotal: 9000 kB\nMemAvailable:   4000 kB\n")
    assert memory._available(tmp_path / "meminfo") == 4000 * 1024 and memory._available(tmp_path / "none") is None
    assert memory._group_left(tmp_path, none) is None
    (tmp_path / "memory.max").write_text("max\n")
    (tmp_path / "memory.current").write_text("1000\n")
    assert memory._group_left(tmp_path, none) is None
    (tmp_path / "memory.max").write_text("5000\n")
    assert memory._group_left(tmp_path, none) == 4000
    old = tmp_path / "old" / "memory"
    old.mkdir(parents=True)
    (old / "memory.limit_in_bytes").write_text("7000")
    (old / "memory.usage_in_bytes").write_text("8000")
    assert memory._group_left(tmp_path / "old", none) == 0
    cpu = torch.device("cpu")
    monkeypatch.setattr(memory, "_available", lambda: 300)
    monkeypatch.setattr(memory, "_group_left", lambda: 200)
    assert free_memory(cpu) == (200, "the control group's limit")
    monkeypatch.setattr(memory, "_group_left", lambda: None)
    assert free_memory(cpu) == (300, "MemAvailable")
    monkeypatch.setattr(memory, "_available", lambda: None)
    with pytest.raises(ConfigError, match="max_tokens_per_step = 'auto': this system does not say how much memory is free; give a number"):
        free_memory(cpu)


@pytest.mark.parametrize(
    ("line", "folder", "limit", "used", "files"),
    [
        ("0::/a/b", "", "memory.max", "memory.current", "inactive_file"),
        ("4:cpu,memory:/a/b", "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
    ],
)
def test_a_process_has_what_its_own_group_and_those_around_it_leave(tmp_path, line, folder, limit, used, files):
    own = tmp_path / "cgroup"
    own.write_text(f"9:name=systemd:/elsewhere\n{line}\n")
    inner = tmp_path / folder / "a" / "b"
    inner.mkdir(parents=True)
    for group, most, now, unused in ((inner, 5000, 3000, 500), (inner.parent, 9000, 4000, 0), (tmp_path / folder, 2**62, 8000, 0)):
        (group / limit).write_text(f"{most}\n")
        (group / used).write_text(f"{now}\n")
        (group / "memory.stat").write_text(f"active_file 70\n{files} {unused}\n")
    assert memory._group_left(tmp_path, own) == 2500
    (inner.parent / limit).write_text("6000\n")
    assert memory._group_left(tmp_path, own) == 2000, "the group around it has less left"
    own.write_text("9:name=systemd:/a/b\n")
    assert memory._group_left(tmp_path, own) is None, "no limit at the root"


def enough_for(tokens, ranks, cfg):
    """Free bytes of which nine tenths hold a step of so many tokens and no more, beside the base."""
    model = tiny_model()
    sizes = step_memory(model, target_shapes(model, "attention"), sum(ranks), round(sum(ranks) / len(ranks)), cfg)
    rows = 4 * sum(ranks) * sum(m + n for m, n in target_shapes(model, "attention").values())  # as received
    return (sizes.of(tokens) - sizes.base + rows) / 0.9 + 1


class Told(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def test_a_run_says_the_number_and_is_the_run_of_that_number(tmp_path, monkeypatch):
    settings = {"rounds": 1, "ranks": "2,2,6", "seq_len": 12, "batch_size": 8}
    free = int(enough_for(50, [2, 2, 6], tiny_config(tmp_path, **settings)))
    monkeypatch.setattr(memory, "free_memory", lambda device: (free, "MemAvailable"))
    seen = Told()
    auto = simulate(tiny_config(tmp_path / "a", max_tokens_per_step="auto", **settings), observer=seen, federation=tiny_federation([6, 7, 8]))
    (line,) = [line for line in seen.lines if line.startswith("max_tokens_per_step: ")]
    tokens = int(line.split()[1])
    assert tokens == 50 and "(auto), modelled: " in line and line.endswith("GiB are free (MemAvailable)")
    same = simulate(tiny_config(tmp_path / "b", max_tokens_per_step=tokens, **settings), federation=tiny_federation([6, 7, 8]), quiet=True)
    assert same_bits(auto.bank, same.bank) and lines(tmp_path / "a") == lines(tmp_path / "b")
    assert Config.from_file(tmp_path / "a" / "config.json").max_tokens_per_step == 0, "what was asked for, for a machine with other memory"


def test_more_memory_lets_in_more_tokens_up_to_a_step(tmp_path, monkeypatch):
    model, cfg = tiny_model(), tiny_config(tmp_path, max_tokens_per_step="auto", seq_len=16, batch_size=4)
    shapes, found = target_shapes(model, "attention"), []
    for free in (1000, enough_for(60, [2, 4, 4], cfg), enough_for(90, [2, 4, 4], cfg), 10**12):
        monkeypatch.setattr(memory, "free_memory", lambda device, free=free: (free, "MemAvailable"))
        own, said = with_step_tokens(cfg, model, shapes, [2, 4, 4])
        found.append(own.max_tokens_per_step)
        assert ("may not fit" in said[-1]) == (free == 1000)
    assert found == [16, 60, 90, 16 * 4 * 3]
    own, said = with_step_tokens(cfg.model_copy(update={"max_tokens_per_step": 7}), model, shapes, [2])
    assert own.max_tokens_per_step == 7 and not said


def test_clients_train_in_turn_where_their_adapters_would_take_the_memory(tmp_path, monkeypatch):
    """All together while they leave half of it, or the whole step fits; else the most that do, in groups of about that size."""
    model, cfg = tiny_model(), tiny_config(tmp_path, max_tokens_per_step="auto", seq_len=16, batch_size=4, clients_per_round=6)
    shapes, ranks = target_shapes(model, "attention"), [2, 4, 4, 8, 8, 4]
    numbers = sum(m + n for m, n in shapes.values())
    all_of, sizes = 16 * sum(ranks) * numbers, step_memory(model, shapes, 30, 5, cfg)

    def found(free, **settings):
        monkeypatch.setattr(memory, "free_memory", lambda device: (free, "MemAvailable"))
        own, said = with_step_tokens(cfg.model_copy(update=settings), model, shapes, ranks)
        return own.clients_at_once, own.max_tokens_per_step, said

    rows = 4 * sum(ranks) * numbers
    plenty = (2 * all_of + rows) / 0.9 + 1
    assert found(10**12)[:2] == (0, 16 * 4 * 6)
    assert found(plenty)[0] == 0 and len(found(plenty)[2]) == 1
    few, tokens, said = found(plenty - 200)
    assert 1 < few < 6 and said[0].startswith(f"clients_at_once: {few} of a round's 6 (auto), modelled: ")
    largest = 16 * sum(sorted(ranks)[-few:]) * numbers
    left = 0.9 * (plenty - 200) - 2 * rows  # received and trained ones of all clients
    assert largest <= left / 2 < largest + 16 * numbers * sorted(ranks)[-few - 1], "one more client does not fit in half of it"
    assert sizes.of(tokens) - sizes.base - all_of + largest <= left, "what is left to tokens"
    assert found(1000)[:2] == (1, 16)
    assert found(plenty - 200, clients_at_once=5)[0] == 5, "as asked for"
    assert found(plenty - 200, clients_at_once=6)[0] == 6, "all of them too"
    for name, kept in (("fedavgm", 1), ("fedadam", 2)):  # moments of the server, which are made after the first round
        moments = 4 * kept * 8 * numbers / 0.9
        assert found(plenty + moments, server_optimizer=name)[:2] == found(plenty)[:2], name
        assert found(plenty - 200 + moments, server_optimizer=name)[0] == few, name
    assert found(plenty - 200, cobatch=False)[0] == 0


def test_full_fine_tuning_asks_for_a_number(tmp_path):
    cfg = Config.create("test", train="full", weights="samples", max_tokens_per_step="auto", output=str(tmp_path))
    with pytest.raises(ConfigError, match="max_tokens_per_step = 'auto': its model of memory is that of adapters, and train = 'full' trains none"):
        with_step_tokens(cfg, tiny_model(), {}, [1])


def test_several_processes_ask_for_a_number(tmp_path):
    """They share out the batches of an evaluation, which must be the same ones for all."""
    with pytest.raises(ConfigError, match="max_tokens_per_step = 'auto': several processes cut batches in the same places, and their free memory differs"):
        spread.lead(tiny_config(tmp_path, max_tokens_per_step="auto"))


@pytest.mark.parametrize(("given", "fault"), [("auto", None), ("12", None), ("some", "--max-tokens-per-step"), ("-1", "max_tokens_per_step")])
def test_the_command_line_takes_auto_and_numbers(tmp_path, given, fault):
    found = CliRunner().invoke(cli, ["run", "--model", str(tmp_path / "none"), "--max-tokens-per-step", given, "--output", str(tmp_path / "run")])
    assert found.exit_code == 2 and (fault or "no such folder") in found.output
