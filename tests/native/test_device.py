"""The command for a GPU's first figures: its dry form runs everything, checks results and gives no figure; clock and capture with stand-ins for a device."""

from __future__ import annotations

import contextlib
import json
from types import SimpleNamespace

import pytest
import torch

from benchmarks import device, lora, model, server
from benchmarks.shapes import TINY

CPU = torch.device("cpu")
H100 = SimpleNamespace(name="NVIDIA H100 80GB HBM3", multi_processor_count=132)


class Event:
    """Of a device that takes 5 us for whatever lies between two events."""

    clock = 0.0

    def __init__(self, enable_timing: bool = False) -> None:
        assert enable_timing

    def record(self) -> None:
        Event.clock += 0.005
        self.at = Event.clock

    def synchronize(self) -> None: ...

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


@pytest.fixture
def clock(monkeypatch):
    """A clock that believes to be an H100's."""
    stream = SimpleNamespace(wait_stream=lambda other: None)
    stand_ins = {"Event": Event, "synchronize": lambda: None, "_sleep": lambda cycles: None, "get_device_properties": lambda which: H100}
    stand_ins |= {"Stream": lambda: stream, "current_stream": lambda: stream, "stream": contextlib.nullcontext, "graph": contextlib.nullcontext}
    for name, one in stand_ins.items():
        monkeypatch.setattr(torch.cuda, name, one)
    own = device.Clock(CPU)
    own.cuda = True
    return own


@pytest.mark.slow
def test_a_dry_run_does_everything_and_measures_nothing(tmp_path, capsys):
    file = tmp_path / "d.json"
    assert device.main(["layer", "server", "host", "step", "--device", "cpu", "--json", str(file)]) == 0
    data = json.loads(file.read_text())
    assert data["measurement"] is False and data["date"] == "dry run: not a measurement" and data["versions"]["torch"] == torch.__version__
    assert {one["section"] for one in data["results"]} == set(device.SECTIONS)
    assert not [one for one in data["results"] for name in ("us", "host_us", "modelled_us", "launches", "peak_gb") if one.get(name) is not None]
    kinds = {one["what"].split(",")[0] for one in data["results"]}
    assert kinds >= {"base product", "shrink x", "expand_ d_x", "expand_ y", "grouped_gram d_a", "forward", "backward", "gram", "adamw", "step"}
    assert [one["same"] for one in data["results"] if "same" in one] == [True, True]
    out = capsys.readouterr().out
    assert out.startswith("dry run: not a measurement") and "us=" not in out and "gb_per_s" not in out


def test_a_time_is_the_median_between_events_beside_the_model(clock, monkeypatch):
    monkeypatch.setattr(device, "CACHE_BYTES", 20_000)
    records = list(device._layer(clock, 48, 40, 64, [16]))
    assert all(one["us"] == pytest.approx(5.0) for one in records)
    modelled = {one["what"]: one["modelled_us"] for one in records}
    assert modelled["shrink x, p=0.1"] == model.shrink(64, 48, 16, True).microseconds(model.GPUS[0])
    assert modelled["forward, p=0.1"] + modelled["backward, p=0.1"] == pytest.approx(model.total(model.layer(64, 48, 40, 16, True), model.GPUS[0]))
    assert "gb_per_s" in device.line(records[0])


def test_calls_take_their_turns(clock):
    turns = []
    clock.device_us([lambda: turns.append(0), lambda: turns.append(1), lambda: turns.append(2)], 7)
    assert turns == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]


def test_server_ops_have_device_and_host_times(clock, monkeypatch):
    monkeypatch.setattr(device, "LLAMA_8B", TINY)
    monkeypatch.setattr(server, "operations", lambda *_, **__: ["gram", "aggregate"])
    records = list(device.server_ops(clock))
    assert [(one["what"], one["dtype"]) for one in records] == [(op, dtype) for dtype in ("float32", "bfloat16") for op in ("gram", "aggregate")]
    assert all(one["us"] == pytest.approx(5.0) and one["host_us"] > 0 for one in records)
    assert [one["modelled_us"] is None for one in records] == [False, False, False, True], "the model knows aggregation in float32 alone"


@pytest.mark.parametrize("right", [True, False])
def test_a_replay_must_give_the_same_bits(clock, monkeypatch, right):
    p = lora.Problem(48, 48, 64, [16], torch.bfloat16, CPU, 0.1)
    call = lora.ours(p, "cpu")[0]
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=call if right else lambda: None))
    assert device._captured(clock, p, call) == {"same": right, "us": pytest.approx(5.0)}


def test_a_wrong_result_is_not_timed(monkeypatch):
    monkeypatch.setattr(device._library, "call", lambda name: lambda rows, ranks, exact: [2 * g for g in device.reference.gram(rows, ranks, exact)])
    with pytest.raises(server.WrongResultError, match=r"^gram: result 0 is off by 1\.00e\+00; nothing is timed"):
        device.check("gram", [torch.ones(3, 4)], [1, 2], False)


def test_what_is_only_written_is_checked_too(monkeypatch):
    monkeypatch.setattr(device._library, "call", lambda name: lambda *args: None)
    args = ([torch.zeros(2, 4)], [torch.ones(2, 4)], [1, 1], False)
    with pytest.raises(server.WrongResultError, match=r"^truncate_: result 0"):
        device.check("truncate_", *args)
    assert float(args[0][0].sum()) == 0, "checked on copies"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_it_says_how_to_run_dry(capsys):
    with pytest.raises(SystemExit) as status:
        device.main(["layer"])
    assert status.value.code == 2 and "--device cpu makes a dry run" in capsys.readouterr().err
