"""Micro-benchmarks of one call of every op on every rung that is here: `python -m pytest benchmarks`. For comparing revisions by pytest-benchmark's own tools
(`--benchmark-save=NAME`, `--benchmark-compare`); the suites of `hetlora bench` give the figures. What differs from the reference is not timed."""

from __future__ import annotations

import pytest
import torch

import hetlora_kernels as hk

from .micro import WORKS, cases, problem
from .server import TOLERANCE

pytest.importorskip("pytest_benchmark")


def result_of(op: str, rung: str, dtype: torch.dtype, device: torch.device, tiny: bool):
    with hk.use_backend(rung):
        work, result = WORKS[op](problem(dtype, device, tiny))
        work()
    return work, result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize(("op", "rung", "device"), cases())
def test_op(benchmark, op, rung, device, dtype):
    device, tiny = torch.device(device), bool(benchmark.disabled)  # without timing it only shows that everything runs
    work, result = result_of(op, rung, dtype, device, tiny)
    found = [t.double() for t in result()]
    truth = [t.double() for t in result_of(op, "reference", dtype, device, tiny)[1]()]
    for own, true in zip(found, truth, strict=True):
        assert float((own - true).norm() / true.norm().clamp_min(1e-30)) <= TOLERANCE[dtype], "a wrong result is not timed"
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    with hk.use_backend(rung):
        benchmark(lambda: (work(), wait()))
