"""Ranks by what devices measure: the rule, the probe and its cache."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import json
import math
from itertools import pairwise
from types import SimpleNamespace

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import capable, tiny_config, tiny_federation, tiny_model

import hetlora_kernels as hk
from hetlora.config import Config, ConfigError
from hetlora.deployed import device
from hetlora.deployed.local import base_digest
from hetlora.federation import prepare
from hetlora.loop import simulate
from hetlora.memory import step_memory
from hetlora.models import target_shapes
from hetlora.ranks import Device, parse_ranks


def measured(*devices):
    return [SimpleNamespace(name=f"c{k}", capability=None, sequences=1, device=device and Device(*device)) for k, device in enumerate(devices)]


def granted(spec: str, *devices) -> list[int]:
    return list(parse_ranks(spec).assign(measured(*devices), 0).ranks.values())


# ---------------------------------------------------------------- the rule


def test_a_device_twice_as_slow_as_the_median_trains_half_the_rows_and_none_more_than_it_holds():
    assert granted("capability:4:32", (32, 1.0), (32, 2.0), (32, 4.0), (32, 100.0), (32, 0.1)) == [32, 32, 16, 4, 32]
    assert granted("capability:4:32:1", (32, 1.0), (32, 2.0), (32, 4.0), (32, 100.0), (32, 0.1)) == [32, 16, 8, 4, 32]
    assert granted("capability:4:32:1", (5, 1.0), (10, 2.0), (4, 4.0), (10**9, 0.5)) == [5, 10, 4, 32]
    assert granted("capability:4:32", (32, 0.125), (32, 0.1251), (32, 0.1)) == [32, 31, 32]
    assert granted("capability:4:32", (32, 1.0), (32, 2.0), (32, 4.0), (32, 8.0)) == [32, 32, 32, 16]
    assert parse_ranks("capability:4:32").assign(measured((9, 1.0)), 0).r_max == 32


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(st.integers(4, 40), st.floats(1e-300, 1e300)), min_size=1, max_size=7), st.integers(0, 6), st.integers(0, 20), st.floats(0, 1))
def test_a_device_that_holds_more_or_is_faster_never_gets_less(devices, k, more, faster):
    for spec in ("capability:4:32", "capability:4:32:0.5"):
        before = granted(spec, *devices)
        assert all(4 <= rank <= min(32, holds) for rank, (holds, _) in zip(before, devices, strict=True))
        rank, seconds = devices[k := k % len(devices)]
        better = [*devices[:k], (rank + more, max(seconds * faster, 1e-300)), *devices[k + 1 :]]
        assert granted(spec, *better)[k] >= before[k]
        assert granted(spec, *reversed(devices)) == before[::-1]


@pytest.mark.parametrize("others", [[], [1.0], [1.0, 3.0], [1.0, 3.0, 9.0], [1.0, 3.0, 9.0, 27.0]])
@pytest.mark.parametrize("claim", [1e-300, 0.5, 2.0, 5.0, 20.0, 1e300])
def test_the_claim_of_one_client_moves_the_pace_between_the_middle_neighbours_of_the_others(others, claim):
    pace, middle = parse_ranks("capability:4:32").pace(measured(*[(32, seconds) for seconds in others], (32, claim))), (len(others) + 1) // 2
    if len(others) < 2:
        assert pace == max([*others, claim])
        assert granted("capability:4:32", *[(32, seconds) for seconds in others], (32, claim)) == [32] * (len(others) + 1)
    else:
        assert others[middle - 1] <= pace <= others[middle]


@pytest.mark.parametrize("seconds", [0.0, -1.0, math.nan, math.inf])
def test_what_is_no_measure_is_refused_by_name(seconds):
    with pytest.raises(
        ConfigError,
        match=r"client 'c1' says that a step takes .* s; expected a finite number above 0; start its node again",
    ):
        granted("capability:4:32", (32, 1.0), (32, seconds))


def test_a_device_below_the_least_rank_is_refused_by_name():
    with pytest.raises(ConfigError, match=r"client 'c1' holds rank 3, and the least of 'capability:4:32' is 4; lower MIN"):
        granted("capability:4:32", (32, 1.0), (3, 1.0))


@pytest.mark.parametrize(
    ("spec", "text"),
    [
        ("capability", "expected 'capability:MIN:MAX' or 'capability:MIN:MAX:SECONDS'"),
        ("capability:", "expected 'capability:MIN:MAX' or 'capability:MIN:MAX:SECONDS'"),
        ("capability:4", "expected 'capability:MIN:MAX'"),
        ("capability:8:4", "1 <= MIN <= MAX"),
        ("capability:4:8:fast", "expected SECONDS > 0"),
        ("capability:4:8:0", "expected SECONDS > 0"),
        ("capability:4:8:inf", "expected SECONDS > 0"),
    ],
)
def test_a_rule_that_says_nothing_is_named(spec, text):
    with pytest.raises(ConfigError, match=text):
        Config(ranks=spec)


def test_a_simulation_has_no_devices(tmp_path):
    cfg = tiny_config(tmp_path / "run", ranks="capability:4:8")
    for start in (lambda: prepare(cfg), lambda: simulate(cfg, federation=tiny_federation([3, 5]), quiet=True)):
        with pytest.raises(ConfigError, match=r"'capability:4:8' is by what devices measure .* in a simulation use 'column:FIELD:4:8', a list or a file"):
            start()
    assert not (tmp_path / "run").exists()


def test_differential_privacy_takes_ranks_that_follow_from_devices():
    private = {"weights": "uniform", "dp_clipping_norm": 0.5, "dp_noise_multiplier": 1.0, "cobatch": False}
    assert Config(train="fold", ranks="capability:4:8", **private).rank_rule.low == 4


# ---------------------------------------------------------------- the probe


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def probed(cfg: Config, dtype: torch.dtype = torch.float32):
    model = tiny_model(dtype)
    return device.measure(cfg, model, target_shapes(model, cfg.target_modules), base_digest(model))


def forbidden(*args):
    raise AssertionError("measured again")


def test_a_probe_is_kept_with_what_it_was_measured_for(tmp_path, monkeypatch):
    cfg = capable(tmp_path)
    first, line = probed(cfg)
    assert first.rank == 8 and first.seconds > 0
    kept = list((tmp_path / "cache/hetlora").iterdir())
    assert len(kept) == 1 and line.endswith(f"measured now, kept in {kept[0]}")
    there = json.loads(kept[0].read_text())
    assert {"host", "threads", "device", "kernels", "build", "versions", "base", "weights", "seq_len"} <= set(there["measured_for"])

    with monkeypatch.context() as patch:
        patch.setattr(device, "step_seconds", forbidden)
        patch.setattr(device, "step_memory", forbidden)
        again, line = probed(cfg)
        assert again == first and line.endswith(f"measured before, in {kept[0]}")
        patch.setattr(device, "step_memory", step_memory)
        for change in ({"batch_size": 3}, {"seq_len": 8}, {"ranks": "capability:3:8"}, {"gradient_checkpointing": True}):
            with pytest.raises(AssertionError, match="measured again"):
                probed(capable(tmp_path, **change))
        with pytest.raises(AssertionError, match="measured again"):
            probed(cfg, torch.float64)
        patch.setenv("HETLORA_INSTRUCTION_SET", "base")
        with pytest.raises(AssertionError, match="measured again"):
            probed(cfg)
        patch.delenv("HETLORA_INSTRUCTION_SET")
        with hk.use_backend("reference"), pytest.raises(AssertionError, match="measured again"):
            probed(cfg)


@pytest.mark.parametrize("value", ["text", None, True, math.nan, math.inf, -1.0, 10**400], ids=lambda value: str(value)[:9])
@pytest.mark.parametrize("key", ["base", "kept of memory", "kept", "seconds"])
def test_a_measure_on_record_that_is_no_number_is_said_and_taken_anew(tmp_path, key, value):
    cfg = capable(tmp_path)
    first, _ = probed(cfg)
    [kept] = (tmp_path / "cache/hetlora").iterdir()
    there = json.loads(kept.read_text())
    name, _, inside = key.partition(" of ")
    (there["memory"] if inside or key == "base" else there)[name] = value
    kept.write_text(json.dumps(there))
    again, line = probed(cfg)
    assert again.rank == first.rank and 0 < again.seconds < math.inf
    assert line.endswith(f"what is in {kept} cannot be used; measured now, kept in {kept}")
    assert probed(cfg)[1].endswith(f"measured before, in {kept}")


@pytest.mark.parametrize("text", ["", "[]", "null", "{}", "{" * 9999, "[" * 99999])
def test_a_record_of_another_form_is_said_and_taken_anew(tmp_path, text):
    probed(capable(tmp_path))
    [kept] = (tmp_path / "cache/hetlora").iterdir()
    kept.write_text(text)
    assert f"what is in {kept} cannot be used; measured now" in probed(capable(tmp_path))[1]


def test_a_cache_that_cannot_be_written_is_said(tmp_path):
    (tmp_path / "cache").write_text("a file")
    assert "measured now, and not kept: " in probed(capable(tmp_path))[1]


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_memory_of_a_rank_is_that_of_the_memory_model_at_it(tmp_path, checkpointing, dtype):
    cfg, model = capable(tmp_path, ranks="capability:2:40", gradient_checkpointing=checkpointing), tiny_model(dtype)
    shapes = target_shapes(model, cfg.target_modules)
    low = step_memory(model, shapes, 2, 2, cfg)
    probe = device.Probe(low, (step_memory(model, shapes, 18, 18, cfg).kept - low.kept) / 16, 1.0)
    for rank in (2, 3, 16, 40):
        there = step_memory(model, shapes, rank, rank, cfg)
        assert probe.bytes_at(rank, 32, cfg, shapes, 2) == pytest.approx(there.of(32) - there.base, rel=1e-9)


def test_what_a_device_holds_follows_from_the_memory_that_is_free(tmp_path, monkeypatch):
    """Also with a probe from the cache: memory is looked up at every start."""
    cfg, model = capable(tmp_path), tiny_model()
    shapes = target_shapes(model, cfg.target_modules)
    needed = {rank: (memory := step_memory(model, shapes, rank, rank, cfg)).of(32) - memory.base for rank in range(1, 9)}
    assert all(less < more for less, more in pairwise(needed.values()))
    for rank in (8, 5, 2):
        monkeypatch.setattr(device, "free_memory", lambda _, rank=rank: (math.ceil((needed[rank] + 1) / device.SHARE), "told"))
        assert probed(cfg)[0].rank == rank
    monkeypatch.setattr(device, "free_memory", lambda _: (int(needed[1] / device.SHARE), "told"))
    with pytest.raises(ConfigError, match=r"this device does not hold rank 2, the least of 'capability:2:8': .* GiB that are free \(told\)"):
        probed(cfg)


@pytest.mark.parametrize("where", ["step_memory", "step_seconds"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("DefaultCPUAllocator: can't allocate memory")])
def test_a_probe_that_finds_no_memory_says_what_to_do(tmp_path, monkeypatch, where, error):
    def out_of_memory(*given):
        raise error

    monkeypatch.setattr(device, where, out_of_memory)
    line = "this device does not hold rank 2, the least of 'capability:2:8': its probe at that rank found no memory; set gradient-checkpointing, max-tokens-"
    with pytest.raises(ConfigError, match=line):
        probed(capable(tmp_path))


def test_another_error_of_the_probe_is_not_taken_for_want_of_memory(tmp_path, monkeypatch):
    def broken(*given):
        raise RuntimeError("something else")

    monkeypatch.setattr(device, "step_seconds", broken)
    with pytest.raises(RuntimeError, match="something else"):
        probed(capable(tmp_path))
