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


@pytest.fixture
def groups(monkeypatch, tmp_path):
    """A tree of groups of processes, and a machine of eight cores."""
    monkeypatch.setattr(processor, "_GROUPS", tmp_path / "groups")
    monkeypatch.setattr(processor, "_OWN_GROUPS", tmp_path / "own")
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)), raising=False)

    def write(own: str, **files: str) -> None:
        (tmp_path / "own").write_text(own)
        for name, text in files.items():
            path = tmp_path / "groups" / name.replace("__", "/").replace("cpu_", "cpu.")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)

    return write


@pytest.mark.parametrize(("text", "expected"), [("max 100000\n", 8), ("200000 100000\n", 2), ("150000 100000\n", 2), ("10000 100000\n", 1)])
def test_the_quota_of_a_container(groups, text, expected):
    """It sees its own group as the root."""
    groups("0::/\n", cpu_max=text)
    assert processor.cores() == expected


def test_the_quota_of_a_service_or_a_batch_job(groups):
    """Its group, or one around it, has the limit; the root of a machine has none. The least counts."""
    own = "0::/system.slice/job.scope\n"
    groups(own, system_slice="")
    assert processor.cores() == 8
    groups(own, **{"system.slice__cpu_max": "400000 100000\n"})
    assert processor.cores() == 4
    groups(own, **{"system.slice__job.scope__cpu_max": "300000 100000\n"})
    assert processor.cores() == 3
    groups("0::/another.slice\n")
    assert processor.cores() == 8


@pytest.mark.parametrize("folder", ["cpu", "cpu,cpuacct"])
def test_the_quota_of_a_group_of_the_first_version(groups, folder):
    own = f"{folder}__a__job__cpu_cfs"
    groups(f"5:memory:/elsewhere\n4:{folder}:/a/job\n0::/\n", **{f"{own}_quota_us": "250000\n", f"{own}_period_us": "100000\n"})
    assert processor.cores() == 3
    groups(f"4:{folder}:/\n", **{f"{folder}__cpu_cfs_quota_us": "-1\n", f"{folder}__cpu_cfs_period_us": "100000\n"})
    assert processor.cores() == 8


def test_a_container_that_is_told_its_place_on_the_machine(groups):
    """Without a namespace of groups the path names folders that the container does not see; its root has the limit."""
    groups("4:cpu:/docker/0123\n", **{"cpu__cpu_cfs_quota_us": "100000\n", "cpu__cpu_cfs_period_us": "100000\n"})
    assert processor.cores() == 1


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
