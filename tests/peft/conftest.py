"""The tiny models of tests/kernels, and a look at what fused layers call."""

from __future__ import annotations

import os
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1] / "kernels"))  # model_cases

from hetlora_kernels.peft import fused

DEVICE = torch.device(os.environ.get("HETLORA_TEST_DEVICE", "cpu"))


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Counter:
    """How often fused layers called `lora_linear` and `lora_add`."""
    counts: Counter = Counter()

    def counted(name: str) -> None:
        op = getattr(fused, name)

        def counting(*args, **kwargs):
            counts[name] += 1
            return op(*args, **kwargs)

        monkeypatch.setattr(fused, name, counting)

    counted("lora_linear")
    counted("lora_add")
    return counts


@pytest.fixture(autouse=True)
def _reasons_are_told_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "_told", set())
