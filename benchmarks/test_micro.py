"""Micro-benchmarks of one call each: `python -m pytest benchmarks/test_micro.py`. For comparing revisions; the suites of `benchmarks.run` give the figures."""

from __future__ import annotations

import pytest
import torch

from .providers import PROVIDERS, Problem
from .shapes import LLAMA_8B_ATTENTION_LAYER, power_law_ranks
from .steps import STEPS

pytest.importorskip("pytest_benchmark")
OWN = {op: next(iter(table.values())) for op, table in {**PROVIDERS, **STEPS}.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("op", OWN)
def test_op(benchmark, op, dtype):
    work, result = OWN[op](Problem(LLAMA_8B_ATTENTION_LAYER, power_law_ranks(8), dtype, torch.device("cpu")))
    benchmark(work)
    assert all(bool(t.isfinite().all()) for t in result())
