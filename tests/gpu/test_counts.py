"""Launches by counting, without a device: what one adapted layer and one optimiser step give a GPU to do."""

from __future__ import annotations

import json
from pathlib import Path

import emulated
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))]

LAUNCHES = {
    "forward, small": 3,
    "backward, small": 5,
    "forward, several splits": 3,
    "backward, several splits": 6,
    "forward, several splits, odd rank": 3,
    "backward, several splits, odd rank": 7,
    "forward, a rank past what expand keeps": 4,
    "backward, a rank past what expand keeps": 7,
    "step, AdamW": 3,
    "step, AdamW, clip and tail": 4,
    "step, SGD": 3,
    "step, SGD, clip and tail": 4,
}


def test_launches(library: Path) -> None:
    done = emulated.run_worker("count_worker.py", library)
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout.splitlines()[-1]) == LAUNCHES
