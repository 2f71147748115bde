"""The CUDA library built by setup.py for every architecture, with the CPU build of torch and no GPU: no spills, and no torch symbol it could lack."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
ONLY_WITH_CUDA = {"aoti_torch_get_current_cuda_stream"}  # in libtorch_cuda, which libtorch brings along where there is one

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path(NVCC).exists(), reason="nvcc is not installed")]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder of the libraries, what the compilers said)."""
    folder = tmp_path_factory.mktemp("cuda_build")
    command = [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    environment = {k: v for k, v in os.environ.items() if k != "HETLORA_CUDA_ARCHS"} | {"HETLORA_CUDA": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return folder / "lib" / "hetlora_kernels", done.stdout


def resources(log: str) -> list[dict[str, int | str]]:
    """Per kernel and architecture: registers, bytes of shared memory, stack and spills, from the lines of `-Xptxas -v`."""
    pattern = (
        r"Compiling entry function '(\w+)' for 'sm_(\d+)'.*?(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads"
        r".*?Used (\d+) registers(?:.*?(\d+) bytes smem)?"
    )
    names = ("stack", "stores", "loads", "registers", "shared")
    return [
        {"kernel": m[1], "arch": int(m[2]), **{name: int(value or 0) for name, value in zip(names, m.groups()[2:], strict=True)}}
        for m in re.finditer(pattern.replace(r"(?:.*?(", r"(?:[^\n]*?("), log, re.DOTALL)
    ]


def defined(library: Path) -> set[str]:
    lines = subprocess.run(["nm", "-D", "--defined-only", library], capture_output=True, text=True, check=True).stdout.splitlines()
    return {line.split()[-1].split("@")[0] for line in lines}


@pytest.mark.timeout(900)
def test_no_kernel_spills_on_any_architecture(build: tuple[Path, str]) -> None:
    folder, log = build
    found = resources(log)
    archs = {int(code[3:]) for code in json.loads((folder / "_build_info.json").read_text())["cuda"]["archs"] if code.startswith("sm_")}
    assert {r["arch"] for r in found} == archs
    assert len({r["kernel"] for r in found}) * len(archs) == len(found)
    assert not [r for r in found if r["stack"] or r["stores"] or r["loads"]]
    assert max(r["shared"] for r in found) <= 48 << 10, "more than the static limit of every architecture"


@pytest.mark.timeout(900)
def test_the_library_needs_no_unexpected_torch_symbol(build: tuple[Path, str]) -> None:
    lines = subprocess.run(["nm", "-D", "--undefined-only", build[0] / "_C_cuda.so"], capture_output=True, text=True, check=True).stdout.splitlines()
    needed = {line.split()[-1].split("@")[0] for line in lines}
    torchs = {s for s in needed if s.startswith(("aoti_torch_", "torch_", "_ZN2at", "_ZN3c10", "_ZN5torch"))}
    library = Path(torch.__file__).parent / "lib"
    have = defined(library / "libtorch_cpu.so") | defined(library / "libc10.so")
    assert torchs and torchs - have <= ONLY_WITH_CUDA
    assert not {s for s in needed if s.startswith("cuda")}, "the CUDA runtime is to be linked statically"
