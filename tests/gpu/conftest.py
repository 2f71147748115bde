"""The emulated library, built once in a process for all the tests that run on it."""

from __future__ import annotations

from pathlib import Path

import emulated
import pytest


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return emulated.compile_all(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="session")
def library(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated.link(objects, tmp_path_factory.mktemp("library") / "emulated.so")
