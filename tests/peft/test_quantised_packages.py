"""The tests of quantised bases with the packages that quantise. These stay out of the environment: every process that imports PEFT would import them too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(sys.prefix) / "quantised"  # where `make venv` puts them
FILES = ("peft/test_bitsandbytes.py", "federation/test_quantized.py", "peft/test_torchao.py")


@pytest.mark.slow
def test_quantised_bases_are_attached_fused_and_trained():
    missing = [package for package in ("bitsandbytes", "torchao") if not (FOLDER / package).is_dir()]
    if missing:
        pytest.skip(f"{', '.join(missing)} not in {FOLDER}: `make venv` puts them there on Linux")
    root = Path(__file__).parents[2]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"PYTHONPATH": str(FOLDER)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *(str(root / "tests" / file) for file in FILES)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True)
    skipped = [line for line in done.stdout.splitlines() if line.startswith("SKIPPED") and "on a CPU with AVX512-BF16 only" not in line]
    assert done.returncode == 0 and " passed" in done.stdout and not skipped, done.stdout[-3000:] + done.stderr[-2000:]
