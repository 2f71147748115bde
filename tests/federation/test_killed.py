"""Kills at random points, with two writers at a time: a run that goes on has the bits of one that nothing disturbed. `make test` draws six kills
of each kind of run, `make matrix` twenty. HETLORA_TEST_SEED draws others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_resume import COMMON, SETTINGS, assert_same, fresh
from tiny import contents, tiny_config

from hetlora.loop import simulate

NO_PRUNING = {name: value for name, value in COMMON.items() if name not in ("gamma", "prune_lambda")}
RUNS = {kind: {**COMMON, **own} for kind, own in SETTINGS.items()}
RUNS |= {"fold": {**NO_PRUNING, "gamma": 0.99, "train": "fold", "server_optimizer": "fedavgm"}}
RUNS |= {"alternating": {**NO_PRUNING, "gamma": 0.99, "train": "alternating", "server_optimizer": "fedadam", "server_lr": 0.01}}
ROUNDS = 8


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.matrix)])
def test_kills_and_two_writers_leave_the_bits_of_an_undisturbed_run(tmp_path, kills):
    seed, here = os.environ.get("HETLORA_TEST_SEED", "0"), Path(__file__).parent
    runs = {kind: {**own, "rounds": ROUNDS} for kind, own in RUNS.items()}
    given = json.dumps({"root": str(tmp_path), "runs": runs, "kills": kills, "seed": seed})
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), *sys.path])}
    done = subprocess.run([sys.executable, str(here / "killed_runs.py"), given], capture_output=True, text=True, timeout=800, env=environment)
    assert done.returncode == 0, f"seed {seed}: {done.stderr}"
    counts = json.loads(done.stdout.splitlines()[-1])
    assert all(own["killed"] >= kills for own in counts.values()) and sum(own["locked"] for own in counts.values()) > 0, counts
    for kind, settings in runs.items():
        whole = simulate(tiny_config(tmp_path / kind, **settings), federation=fresh())
        for number in range(counts[kind]["runs"]):
            folder = tmp_path / f"{kind}.{number}"
            resume = (folder / "config.json").exists()  # else the last one was killed before there was a run
            assert_same(simulate(tiny_config(folder, **settings), resume=resume, federation=fresh()), whole)
            assert not [name for name in contents(folder) if name.endswith((".tmp", ".lock"))], f"seed {seed}, {folder.name}"
