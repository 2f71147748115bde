"""Settings every test relies on: no network, one torch thread per worker, fixed seeds (HETLORA_TEST_SEED chooses others)."""

from __future__ import annotations

import os

# Read at import time by the libraries, hence set before any of them is loaded; subprocesses of tests inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random

import pytest
import torch

SEED = int(os.environ.get("HETLORA_TEST_SEED", "0"))


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out by `make test-fast`")
    config.addinivalue_line("markers", "matrix: the numeric tests with further instruction sets and seeds; `make matrix`")
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


@pytest.fixture(autouse=True)
def _fixed_seeds() -> None:
    random.seed(SEED)
    torch.manual_seed(SEED)
    try:
        import numpy
    except ImportError:
        return
    numpy.random.seed(SEED)
