"""Every Triton kernel variant compiled for each architecture without a GPU: no spills, shared memory within the architecture's limit, 16-byte accesses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
# Bytes of shared memory that one block may have (CUDA C programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 87: 163 << 10, 90: 227 << 10, 100: 227 << 10, 110: 227 << 10}
STREAMING = {"_truncate_kernel", "_aggregate_kernel", "_accumulate_kernel", "_squares_kernel", "_adamw_kernel", "_sgd_kernel", "_gram_kernel"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")]


@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_compile_without_spills(arch: int, tmp_path: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(HERE.parents[1]), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, HERE / "triton_aot.py", str(arch)], env=environment, capture_output=True, text=True, timeout=290)
    assert done.returncode == 0, done.stderr[-3000:]
    variants = [json.loads(line) for line in done.stdout.splitlines()]
    assert {v["kernel"] for v in variants} >= STREAMING
    assert not [v for v in variants if v["stack"] or v["local"]], "registers spill"
    assert not [v for v in variants if v["shared"] > SHARED_LIMIT[arch]], "more shared memory than a block may have"
    assert not [v for v in variants if v["kernel"] in STREAMING and "odd" not in v["case"] and not v["wide"]], "no 16-byte access"
    assert not [v for v in variants if v["kernel"] in STREAMING and "odd" in v["case"] and v["wide"]], "16-byte accesses where rows are not aligned"
