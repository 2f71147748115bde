"""The tables of the Triton rung with a stand-in for the CUDA runtime: what is uploaded when, who waits for it, and what a graph reads. No kernel runs."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass, field
from importlib.util import find_spec

import pytest
import torch

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@dataclass
class Event:
    arrived: bool = False

    def query(self) -> bool:
        return self.arrived


@dataclass
class Stream:
    cuda_stream: int
    waited: list[Event] = field(default_factory=list)

    def record_event(self) -> Event:
        return Event()

    def wait_event(self, event: Event) -> None:
        self.waited.append(event)


@dataclass(frozen=True)
class Device:
    type: str = "cuda"


@dataclass
class Runtime:
    """A CUDA runtime on which tensors stay on the host."""

    stream: Stream = field(default_factory=lambda: Stream(1))
    capturing: bool = False
    uploads: int = 0
    copied_in_graph: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)

    def replay(self) -> None:
        for to, pinned in self.copied_in_graph:
            to.copy_(pinned)


@pytest.fixture
def runtime(monkeypatch):
    from hetlora_kernels.triton import _tables

    own = Runtime()
    real = {"empty": torch.empty, "to": torch.Tensor.to, "copy_": torch.Tensor.copy_}

    def to(tensor, device, *rest, **options):
        if not isinstance(device, Device):
            return real["to"](tensor, device, *rest, **options)
        assert not own.capturing, "a table from outside the graph is copied into it"
        own.uploads += 1
        return tensor.clone()

    def empty(*shape, device=None, pin_memory=False, **options):
        assert not (pin_memory and own.capturing), "pinned memory allocated in a capture"
        return real["empty"](*shape, **options)

    def copy_(tensor, source, non_blocking=False):
        if non_blocking:
            own.copied_in_graph.append((tensor, source))  # a graph copies when it is replayed
            return tensor
        return real["copy_"](tensor, source)

    for name, function in {"to": to, "copy_": copy_, "pin_memory": lambda tensor: tensor, "record_stream": lambda tensor, stream: None}.items():
        monkeypatch.setattr(torch.Tensor, name, function)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: own.stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: own.capturing)
    for name, value in {"_uploads": OrderedDict(), "_of_graphs": {}, "_reserve": None, "_used": 0}.items():
        monkeypatch.setattr(_tables, name, value)
    own.tables = _tables
    return own


def _upload(runtime, values):
    return runtime.tables.upload(values, torch.int64, Device())


def test_one_table_serves_every_stream_and_a_second_stream_waits_until_it_has_arrived(runtime):
    first = _upload(runtime, [1, 2])
    assert _upload(runtime, [1, 2]) is first and runtime.uploads == 1 and not runtime.stream.waited
    second = runtime.stream = Stream(2)
    assert _upload(runtime, [1, 2]) is first and runtime.uploads == 1 and len(second.waited) == 1
    second.waited[0].arrived = True
    third = runtime.stream = Stream(3)
    assert _upload(runtime, [1, 2]) is first and not third.waited, "it has arrived"


def test_a_capture_on_another_stream_uses_the_table_of_the_call_before(runtime):
    warm = _upload(runtime, [1, 2])
    runtime.stream, runtime.capturing = Stream(9), True
    assert _upload(runtime, [1, 2]) is warm and not runtime.copied_in_graph and not runtime.stream.waited
    runtime.capturing = False
    for i in range(runtime.tables.KEPT + 1):
        _upload(runtime, [i, i, i])
    assert _upload(runtime, [1, 2]) is not warm, "left the cache"
    assert any(kept is warm for kept in runtime.tables._of_graphs.values()), "the graph still reads it"


def test_a_table_that_is_new_in_a_capture_is_copied_by_every_replay_from_memory_of_its_own(runtime):
    _upload(runtime, [0])
    runtime.capturing = True
    tables = [_upload(runtime, [1, 2, 3]), _upload(runtime, [7])]
    again = _upload(runtime, [7])
    runtime.capturing = False
    assert again is not tables[1], "another graph, or none, does not write this one's memory"
    assert _upload(runtime, [7]) is not tables[1]
    for _ in range(2):
        for t in tables:
            t.fill_(-1)
        runtime.replay()
        assert tables[0].tolist() == [1, 2, 3] and tables[1].tolist() == [7]


def test_a_capture_before_any_call_or_with_too_many_tables_says_what_to_do(runtime):
    runtime.capturing = True
    with pytest.raises(RuntimeError, match="got 0; call the op once before capturing"):
        _upload(runtime, [1])
    runtime.capturing = False
    _upload(runtime, [1])
    runtime.capturing = True
    with pytest.raises(RuntimeError, match=f"expected room for a table of {runtime.tables.RESERVE + 8} bytes"):
        _upload(runtime, range(runtime.tables.RESERVE // 8 + 1))
    _upload(runtime, range(runtime.tables.RESERVE // 16 + 1))
    runtime.capturing = False
    _upload(runtime, [2])  # sets new memory aside
    runtime.capturing = True
    _upload(runtime, range(1, runtime.tables.RESERVE // 8 + 1))
    assert len(runtime.tables._of_graphs) == 2, "the memory of the first graph is kept beside that of the second"


@pytest.mark.parametrize("default", ["meta", "cuda"])
def test_tables_are_built_on_the_host_whatever_the_default_device(default):
    from hetlora_kernels.triton import _tables

    with torch.device(default):
        assert _tables.table(("default", default), lambda: [3, 4], torch.int64, torch.device("cpu")).tolist() == [3, 4]
