"""Threads and their waiting are chosen before torch is imported; on shared cores nothing spins."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from click.testing import CliRunner

from hetlora import processor
from hetlora.cli import cli
from hetlora.errors import ConfigError

NAMES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


@pytest.fixture
def fresh(monkeypatch):
    """A process without torch, on four free cores."""
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.setattr(processor, "cores", lambda: 4)
    monkeypatch.setattr(processor, "used_by_others", lambda: 0.0)
    yield monkeypatch
    for name in NAMES:
        os.environ.pop(name, None)


def test_free_cores(fresh):
    assert processor.prepare() == "threads: 4 (cores here: 4); they spin briefly while they wait, then sleep"
    assert os.environ["OMP_NUM_THREADS"] == "4" and os.environ["GOMP_SPINCOUNT"] == "1000" and "OMP_WAIT_POLICY" not in os.environ


def test_cores_that_others_use(fresh):
    fresh.setattr(processor, "used_by_others", lambda: 1.52)
    assert processor.prepare(3) == "threads: 3 (--threads); they sleep while they wait, as other processes use 1.5 cores"
    assert os.environ["OMP_NUM_THREADS"] == "3" and os.environ["OMP_WAIT_POLICY"] == "passive"


@pytest.mark.parametrize("name", NAMES[1:])
def test_what_the_user_chose_stays(fresh, name):
    fresh.setenv("OMP_NUM_THREADS", "7")
    fresh.setenv(name, "5")
    assert processor.prepare() == f"threads: 7 (OMP_NUM_THREADS); they wait as {name}=5 says"
    assert [os.environ.get(own) for own in NAMES[1:]] == ["5" if own == name else None for own in NAMES[1:]]
    assert os.environ["OMP_NUM_THREADS"] == "7"


@pytest.mark.parametrize(("text", "expected"), [("max 100000\n", 8), ("200000 100000\n", 2), ("150000 100000\n", 2), ("10000 100000\n", 1)])
def test_the_quota_of_a_container(monkeypatch, tmp_path, text, expected):
    (tmp_path / "cpu.max").write_text(text)
    real = processor.Path
    monkeypatch.setattr(processor, "Path", lambda path: real(str(path).replace("/sys/fs/cgroup", str(tmp_path))))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    assert processor.cores() == expected


def test_use_by_others_is_measured():
    """A second process that computes is seen."""
    if processor.used_by_others(0.01) is None:
        pytest.skip("this system does not tell how busy its cores are")
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        assert max(processor.used_by_others(0.3) for _ in range(20)) > 0.3
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize("command", ["run", "demo", "compare"])
def test_a_wrong_number_is_one_line(command):
    result = CliRunner().invoke(cli, [command, "--threads", "0"])
    assert result.exit_code == 2 and "hetlora: error: --threads: expected a number from 1 to 1024, got 0" in result.output


def test_prepare_raises():
    with pytest.raises(ConfigError, match="--threads"):
        processor.prepare(100_000)


def test_torch_has_the_threads(tmp_path):
    """In a process of its own, as the command does it: chosen before torch, and torch obeys."""
    code = "from hetlora import processor; print(processor.prepare(1)); import torch; print(torch.get_num_threads())"
    environment = {name: value for name, value in os.environ.items() if name not in NAMES}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    first, last = done.stdout.strip().splitlines()
    assert first.startswith("threads: 1 (--threads); they ") and last == "1"
