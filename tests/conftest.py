"""Settings every test relies on: no network, one torch thread per worker, fixed seeds (HETLORA_TEST_SEED chooses others)."""

from __future__ import annotations

import gc
import os
import shutil

# Read at import time by the libraries, hence set before any of them is loaded; subprocesses of tests inherit them.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("MPLBACKEND", "Agg")

import random
from zlib import crc32

import pytest
import torch

SEED = int(os.environ.get("HETLORA_TEST_SEED", "0"))


def _in_memory(folder: str) -> bool:
    """Whether tests can keep their files there: there is room, and programs that they build may run there."""
    return os.path.isdir(folder) and shutil.disk_usage(folder).free > 8 << 30 and os.access(folder, os.W_OK) and not os.statvfs(folder).f_flag & os.ST_NOEXEC


# A run waits for the disk whenever it has written a file: a fifth of the time of tests of runs, by the clock.
if _in_memory("/dev/shm"):
    os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", "/dev/shm")


@pytest.hookimpl(trylast=True)  # after -k and -m
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """HETLORA_TEST_SHARE=1/3 runs the second third of the tests: a test's name says which it is in, and the first has one of each function."""
    part, _, parts = os.environ.get("HETLORA_TEST_SHARE", "0/1").partition("/")
    kept, left, functions = [], [], set()
    for item in items:
        function = item.nodeid.partition("[")[0]
        of = crc32(item.nodeid.encode()) % int(parts) if function in functions else 0
        functions.add(function)
        (kept if of == int(part) else left).append(item)
    if left:
        config.hook.pytest_deselected(items=left)
        items[:] = kept


def pytest_collection_finish(session: pytest.Session) -> None:
    """What the libraries and all tests are made of stays to the end: without it the collector walks through millions of objects again and again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)  # of pytest-xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log):
    """Under `--dist loadfile` a file is one worker's, for its builds are made once. Long tests that share nothing are each a worker's own."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class ByFile(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return nodeid if file.endswith(("test_instruction_sets.py", "test_compile.py")) else file

    return ByFile(config, log)


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "slow: takes more than a few seconds; left out by `make test-fast`")
    config.addinivalue_line("markers", "gates: GPU code for further architectures, further planted bugs and cases of a kind that `make test` has; `make gates`")
    config.addinivalue_line("markers", "matrix: the numeric tests with further instruction sets, seeds, kills of runs and random calls; `make matrix`")
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
