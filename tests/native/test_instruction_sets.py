"""The kernels that are written for each instruction set, on those this machine has below its best."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hetlora_kernels import _library

ROOT = Path(__file__).parents[2]
FILES = [f"tests/kernels/test_{name}.py" for name in ("lora", "lora_calls", "lora_small", "lora_tiles", "norms", "dropout")]


def run(instruction_set: str, *command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"HETLORA_INSTRUCTION_SET": instruction_set}
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in _library.available(), reason="no compiled kernel for CPU tensors")
@pytest.mark.parametrize("instruction_set", ["base", "avx2"])
def test_the_kernel_tests_pass_with(instruction_set):
    done = run(instruction_set, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", "not reference and not compile", *FILES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


DOTS = """
import torch, hetlora_kernels
draw = torch.Generator().manual_seed(0)
x, a = torch.randn(8, 1001, generator=draw), torch.randn(8, 1001, generator=draw)
print(torch.ops.hetlora.shrink(x, a, torch.ones(1), None, None, None, [8], [0], [8], 0.0).tolist())
"""


def test_the_variable_chooses_and_refuses():
    if "cpu" not in _library.available():
        pytest.skip("no compiled kernel for CPU tensors")
    base, avx512 = (run(name, "-c", DOTS) for name in ("base", "avx512"))
    assert base.returncode == avx512.returncode == 0, base.stderr + avx512.stderr
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert base.stdout != avx512.stdout  # other widths of vectors add in another order
    wrong = run("sse9", "-c", "import hetlora_kernels")
    assert wrong.returncode != 0 and "HETLORA_INSTRUCTION_SET: expected one of base, avx2, avx512, got 'sse9'" in wrong.stderr
