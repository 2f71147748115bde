"""Every kernel test runs once per backend of this process, on the device of HETLORA_TEST_DEVICE (default cpu), with fresh memory full of NaN."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch

import hetlora_kernels as hk
from hetlora_kernels import _library

DEVICE = torch.device(os.environ.get("HETLORA_TEST_DEVICE", "cpu"))
COMPILED_FOR = {"cpu": "cpu", "cuda": "cuda"}  # a compiled library serves one kind of device; the other rungs go where torch goes


def backends_here() -> list[str]:
    return [rung for rung in _library.available() if COMPILED_FOR.get(rung, DEVICE.type) == DEVICE.type]


@pytest.fixture(autouse=True, params=backends_here())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The rung forced on every op of the test; 'auto' = the dispatcher's own choice."""
    with nullcontext() if request.param == "auto" else hk.use_backend(request.param):
        yield request.param


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture(autouse=True)
def _fresh_memory_is_nan() -> Iterator[None]:
    """torch fills what it allocates with NaN (or the largest integer), so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield
    torch.use_deterministic_algorithms(before[0], warn_only=before[1])
