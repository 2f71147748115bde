"""`pytest benchmarks`: every op of the library on every rung that is here, each checked before it is timed."""

from __future__ import annotations

import pytest
import torch

from benchmarks import micro
from benchmarks.test_micro import test_op as measured
from hetlora_kernels import _library


class Stopwatch:
    """What pytest-benchmark gives a test, without its clock."""

    disabled = True  # tiny shapes

    def __init__(self):
        self.calls = 0

    def __call__(self, work):
        work()
        self.calls += 1


def test_every_op_is_there_on_every_rung_that_is_here(monkeypatch):
    assert set(micro.WORKS) == set(_library.SCHEMAS)
    assert {rung for rungs in micro.DEVICES.values() for rung in rungs} == set(_library.RUNGS)
    of_cpu = {(op, rung, "cpu") for op in _library.SCHEMAS for rung in ("reference", "cpu") if rung in _library.available()}
    assert {case for case in micro.cases() if case[2] == "cpu"} == of_cpu and len(micro.cases()) == len(set(micro.cases()))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(_library, "available", lambda: dict.fromkeys(_library.RUNGS, ""))
    monkeypatch.setattr(_library, "_has", lambda op, rung: rung != "triton" or op != "gram")
    with_gpu = {(op, rung, "cuda") for op in _library.SCHEMAS for rung in ("reference", "cuda", "triton")} - {("gram", "triton", "cuda")}
    assert {case for case in micro.cases() if case[2] == "cuda"} == with_gpu, "what a rung has no kernel for would be the reference a second time"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "rung", "device"), [case for case in micro.cases() if case[2] == "cpu"])
def test_each_is_checked_and_timed_on_its_rung(monkeypatch, op, rung, device, dtype):
    forced, real = [], _library.call

    def seen(name):
        forced.append((name, _library._forced))
        return real(name)

    monkeypatch.setattr(_library, "call", seen)
    watch = Stopwatch()
    measured(watch, op, rung, device, dtype)
    assert watch.calls == 1 and forced[-1] == (op, rung) and (op, "reference") in forced


def test_a_wrong_result_is_not_timed(monkeypatch):
    real = micro.WORKS["gram"]

    def wrong(p):
        work, result = real(p)
        return work, (lambda: [t * 1.01 for t in result()]) if _library._forced != "reference" else result

    if "cpu" not in _library.available():
        pytest.skip("the CPU library is not built, so nothing differs from the reference")
    monkeypatch.setitem(micro.WORKS, "gram", wrong)
    watch = Stopwatch()
    with pytest.raises(AssertionError, match="a wrong result is not timed"):
        measured(watch, "gram", "cpu", "cpu", torch.float32)
    assert watch.calls == 0
