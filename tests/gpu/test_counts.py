"""Launches by counting, without a device: what one adapted layer and one optimiser step give a GPU to do."""

from __future__ import annotations

import json
from pathlib import Path

import emulated
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900), pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))]

LAUNCHES = {
    "forward, small": 5,
    "backward, small": 7,
    "forward, several splits": 6,
    "backward, several splits": 10,
    "forward, several splits, odd rank": 6,
    "backward, several splits, odd rank": 11,
    "step, AdamW": 4,
    "step, AdamW, clip and tail": 6,
    "step, SGD": 3,
    "step, SGD, clip and tail": 5,
}


def test_launches(library: Path) -> None:
    done = emulated.run_worker("count_worker.py", library)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == LAUNCHES
