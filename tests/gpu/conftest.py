"""The emulated library, built once for all the tests that run on it, in whichever worker they run."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path

import emulated
import pytest


@pytest.fixture(scope="session")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "emulated"
    folder.mkdir(exist_ok=True)
    built = folder / "emulated.so"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # a worker that comes while another builds waits for it
        if not built.exists():
            emulated.link(emulated.compile_all(folder), folder / "unnamed.so").rename(built)
    return built


@pytest.fixture(scope="session")
def objects(library: Path) -> list[Path]:
    return sorted(library.parent.glob("*.o"))
