"""Every kernel test runs once per backend of this process, on the device of HETLORA_TEST_DEVICE (default cpu), with fresh memory full of NaN.

A test that does not ask for `device` has CPU tensors, and runs on the backends that serve those.

Those of the layer run on the CPU kernels twice: as they are, and with every call on the large way, for most of theirs are small.
"""

from __future__ import annotations

import os
import platform
import warnings
from collections.abc import Iterator
from contextlib import nullcontext

import pytest
import torch
from kernel_cases import LARGE, going

import hetlora_kernels as hk
from hetlora_kernels import _library

# oneDNN's float32 product with a bias on AArch64 (torch 2.10.0, under qemu) is off by 8 standard deviations of a sum in any order, without oneDNN by at most 4.
# That product is the framework's, and plain PyTorch has the same error.
if platform.machine() == "aarch64":
    torch.backends.mkldnn.set_flags(False)

DEVICE = torch.device(os.environ.get("HETLORA_TEST_DEVICE", "cpu"))


def serves(rung: str, kind: str) -> bool:
    """Whether a rung takes tensors on that kind of device; the reference takes all."""
    if rung == "triton":
        return kind == "cuda" or os.environ.get("TRITON_INTERPRET") == "1"
    return rung in ("reference", kind)


def backends_for(kind: str) -> list[str]:
    return [rung for rung in _library.available() if serves(rung, kind)]


OF_THE_LAYER = ("test_lora", "test_lora_calls", "test_lora_errors", "test_lora_tiles", "test_dropout")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if any(mark.args[0] == "backend" for mark in metafunc.definition.iter_markers("parametrize")):
        return
    ways: list = backends_for(DEVICE.type if "device" in metafunc.fixturenames else "cpu")
    if "cpu" in ways and metafunc.module.__name__ in OF_THE_LAYER:
        ways.append(pytest.param("cpu large way"))
    metafunc.parametrize("backend", ways, indirect=True)


@pytest.fixture(autouse=True)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The rung forced on every op of the test; 'auto' = the dispatcher's own choice."""
    rung, _, way = request.param.partition(" ")
    with nullcontext() if rung == "auto" else hk.use_backend(rung), going(LARGE) if way else nullcontext():
        yield rung


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
