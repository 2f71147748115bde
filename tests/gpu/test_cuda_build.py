"""The CUDA library built by setup.py, with the CPU build of torch and no GPU: no spills, tensor cores where the layer's types have them, and no torch symbol
it could lack. For the oldest architecture; `make gates` builds all. HETLORA_TEST_CUDA_ARCHS=9.0 builds one, for a look while a
kernel is written."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from functools import cache
from pathlib import Path

import pytest
import torch

from benchmarks import static

ROOT = Path(__file__).parents[2]
NVCC = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
# In libtorch_cuda, which libtorch brings along where there is one.
ONLY_WITH_CUDA = {"aoti_torch_get_current_cuda_stream", "aoti_torch_cuda_addmm_out", "aoti_torch_cuda_mm_out"}

pytestmark = [pytest.mark.slow, pytest.mark.skipif(not Path(NVCC).exists(), reason="nvcc is not installed")]


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(folder of the libraries, what the compilers said)."""
    folder = tmp_path_factory.mktemp("cuda_build")
    # The CPU library would be built beside it, and is not looked at here.
    program = "import setup; setup.BuildKernels.build_cpu = lambda *_: None; setup.main()"
    command = [sys.executable, "-c", program, "build_ext", "--build-lib", str(folder / "lib"), "--build-temp", str(folder / "temp")]
    archs = os.environ.get("HETLORA_TEST_CUDA_ARCHS", "8.0")
    environment = os.environ | {"HETLORA_CUDA": "1", "HETLORA_CUDA_ARCHS": archs}
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


def test_no_kernel_spills_on_any_architecture(build: tuple[Path, str]) -> None:
    folder, log = build
    found = resources(log)
    archs = {int(code[3:]) for code in json.loads((folder / "_build_info.json").read_text())["cuda"]["archs"] if code.startswith("sm_")}
    assert {r["arch"] for r in found} == archs
    assert len({r["kernel"] for r in found}) * len(archs) == len(found)
    assert not [r for r in found if r["stack"] or r["stores"] or r["loads"]]
    assert max(r["shared"] for r in found) <= 48 << 10, "more than the static limit of every architecture"


@cache
def instructions(file: Path) -> dict[tuple[int, str], Counter[str]]:
    """{(architecture, kernel): how often each instruction is in it, by name without modifiers}."""
    return {place: kernel.instructions for place, kernel in static.read(file).items()}


needs_disassembler = pytest.mark.skipif(static.cuobjdump() is None, reason="cuobjdump is not installed, neither with the CUDA toolkit nor with Triton")


def built_object(build: tuple[Path, str], source: str) -> Path:
    return build[0].parents[1] / "temp" / "csrc" / "cuda" / f"{source}.o"


@needs_disassembler
@pytest.mark.parametrize("kernel", ["shrink", "expand", "grouped_gram"])
def test_the_layer_multiplies_on_tensor_cores_and_copies_asynchronously(build: tuple[Path, str], kernel: str) -> None:
    """16-bit types on tensor cores on every architecture, the others not: float32 products are exact, without TF32."""
    record = json.loads((build[0] / "_build_info.json").read_text())["cuda"]
    found = instructions(built_object(build, f"{kernel}.cu"))
    own = {place: names for place, names in found.items() if f"{kernel}_kernelI" in place[1]}
    assert {arch for arch, _ in own} == {int(code[3:]) for code in record["archs"] if code.startswith("sm_")}
    assert len(own) == 8 * len({arch for arch, _ in own}), "four types, with and without dropout"
    for (arch, name), names in own.items():
        narrow = "bfloat16" in name or "6__half" in name
        assert ("HMMA" in names) == narrow, f"{name} on sm_{arch}: HMMA {'missing' if narrow else 'unexpected'}"
        assert ("LDSM" in names) == narrow and "LDGSTS" in names, f"{name} on sm_{arch}: ldmatrix or cp.async not as expected"


@needs_disassembler
def test_the_servers_gram_multiplies_16_bit_rows_on_tensor_cores(build: tuple[Path, str]) -> None:
    """With float32 sums, straight from registers; float32 rows by FMA from asynchronous copies; what is added in float64 in float64."""
    found = instructions(built_object(build, "gram.cu"))
    own = {place: names for place, names in found.items() if "gram_kernelI" in place[1]}
    assert len(own) == 7 * len({arch for arch, _ in found}), "four types, three of them in float64 too"
    for (arch, name), names in own.items():
        narrow, wide = "bfloat16fE" in name or "halffE" in name, "dEEv" in name
        where = f"{name} on sm_{arch}"
        assert ("HMMA" in names) == narrow and ("DFMA" in names) == wide, f"{where}: not the products expected"
        assert ("LDGSTS" in names) == ("Iff" in name or "Idd" in name), f"{where}: cp.async not as expected"
        assert narrow or wide or names["FFMA"] >= 2 * 256, f"{where}: not 8 x 8 sums of four columns a thread, aligned and not"


DROPOUT_INTEGERS = 44  # 65 with 64-bit products, halves taken apart and masks made element by element


@needs_disassembler
@pytest.mark.parametrize("kernel", ["shrink", "grouped_gram"])
def test_what_dropout_costs_in_integer_instructions(build: tuple[Path, str], kernel: str) -> None:
    """Beside the kernel without it, per unit of eight 16-bit columns: seven rounds of two xors of three terms, and four words masked twice."""
    units = 4  # of a thread in one step
    found = instructions(built_object(build, f"{kernel}.cu"))
    drops = {
        place: names
        for place, names in found.items()
        if f"{kernel}_kernelI" in place[1] and "Lb1E" in place[1] and ("bfloat16" in place[1] or "__half" in place[1])
    }
    assert drops
    for (arch, name), names in drops.items():
        without = found[arch, name.replace("Lb1E", "Lb0E")]
        cost = sum(names[code] - without[code] for code in static.INTEGER) / units
        assert cost <= DROPOUT_INTEGERS, f"{name} on sm_{arch}: {cost} integer instructions a unit"


def test_the_library_needs_no_unexpected_torch_symbol(build: tuple[Path, str]) -> None:
    lines = subprocess.run(["nm", "-D", "--undefined-only", build[0] / "_C_cuda.so"], capture_output=True, text=True, check=True).stdout.splitlines()
    needed = {line.split()[-1].split("@")[0] for line in lines}
    torchs = {s for s in needed if s.startswith(("aoti_torch_", "torch_", "_ZN2at", "_ZN3c10", "_ZN5torch"))}
    library = Path(torch.__file__).parent / "lib"
    have = defined(library / "libtorch_cpu.so") | defined(library / "libc10.so")
    assert torchs and torchs - have <= ONLY_WITH_CUDA
    assert not {s for s in needed if s.startswith("cuda")}, "the CUDA runtime is to be linked statically"
