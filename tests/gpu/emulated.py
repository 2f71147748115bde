"""Build the CUDA kernels, their launchers and the bindings for the host, as they are or with a planted bug, and run cases on them: ops of the namespace
`hetlora_emulated` on CPU tensors, under AddressSanitizer."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import forked
import pytest
import torch

HERE = Path(__file__).parent
ENGINE = HERE / "emulator"
CSRC = HERE.parents[1] / "csrc" / "cuda"
SCHEDULES = "fwd,rev,rand,warp"
# Types and schedules that every op is run in: each type in two, so each schedule with two types; `make gates` has the other pairs.
PAIRS = [pytest.param("f32,bf16", "rand,warp"), pytest.param("f16,f64", "fwd,rev")]
PAIRS += [pytest.param("f32,bf16", "fwd,rev", marks=pytest.mark.gates), pytest.param("f16,f64", "rand,warp", marks=pytest.mark.gates)]
# Where a planted bug is built, only the type that its case runs in is compiled.
TYPES = {
    "f32": "case Type::f32: return body(float{});",
    "bf16": "case Type::bf16: return body(__nv_bfloat16{});",
    "f16": "case Type::f16: return body(__half{});",
    "f64": "case Type::f64: return body(double{});",
}
_SANITIZE = ["-fsanitize=address,alignment", "-fno-sanitize-recover=all"]
_COMMON = ["g++", "-std=c++17", "-fPIC", "-fvisibility=hidden", "-Wall", "-Werror", "-Wno-unknown-pragmas"]


def cuda_include() -> Path | None:
    """The CUDA toolkit's headers: the kernels' types come from them."""
    nvcc = shutil.which("nvcc")
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), nvcc and str(Path(nvcc).resolve().parents[1]), "/usr/local/cuda"]
    return next((Path(h) / "include" for h in homes if h and (Path(h) / "include" / "cuda_bf16.h").exists()), None)


def sanitizer_library() -> str | None:
    """The AddressSanitizer runtime to preload, since python itself is not built with it."""
    if shutil.which("g++") is None:
        return None
    found = subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True, check=True).stdout.strip()
    return found if Path(found).exists() else None


def missing() -> str | None:
    """Why the emulator cannot be built here, or None."""
    if sanitizer_library() is None:
        return "g++ with AddressSanitizer is not installed"
    return None if cuda_include() else "the CUDA toolkit's headers are not installed (set CUDA_HOME)"


def _compile(source: Path, target: Path, extra: list[str]) -> Path:
    command = [*_COMMON, "-c", f"-I{cuda_include()}", *extra, str(source), "-o", str(target)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}\n{done.stderr[-3000:]}")
    return target


def compile_kernel(source: Path, target: Path, headers: Path = CSRC, sanitize: bool = True, engine: Path = ENGINE) -> Path:
    """`engine`: a folder with the header that _precompile made, for builds as that one is made for."""
    options = [*(_SANITIZE if sanitize else []), "-O1", "-x", "c++", "-include", str(engine / "cuda_on_cpu.h")]
    return _compile(source, target, [*options, f"-I{ENGINE}", f"-I{headers}", "-Wno-switch"])


def _precompile(folder: Path) -> Path:
    """cuda_on_cpu.h into the folder, precompiled: it and what it includes are half of a kernel's compilation for one type."""
    header = shutil.copy2(ENGINE / "cuda_on_cpu.h", folder)  # with its time: by that #pragma once knows the two for one
    _compile(Path(header), folder / "cuda_on_cpu.h.gch", [*_SANITIZE, "-O1", "-x", "c++-header", "-w"])
    return folder


def _compile_bindings(source: Path, target: Path) -> Path:
    names = [
        "-DHETLORA_EMULATOR",
        "-DHETLORA_NAMESPACE=hetlora_emulated",
        "-DHETLORA_DISPATCH_KEY=CPU",
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-DHETLORA_EXPAND_BLOCKS=6",
    ]
    torch_include = f"-isystem{Path(torch.__file__).parent / 'include'}"
    return _compile(source, target, [*names, torch_include, f"-I{ENGINE}", f"-I{CSRC}", "-O0"])


def compile_all(folder: Path) -> list[Path]:
    """Object files of everything, two at a time, with the precompiled header beside them."""
    engine = _precompile(folder)
    jobs = [(partial(compile_kernel, engine=engine), (source, folder / f"{source.stem}.o")) for source in sorted(CSRC.glob("*.cu"))]
    jobs += [(_compile_bindings, (source, folder / f"{source.stem}_bindings.o")) for source in sorted(CSRC.glob("*.cpp"))]
    jobs.append((_compile, (ENGINE / "cuda_on_cpu.cpp", folder / "engine.o", [*_SANITIZE, "-O1"])))
    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(lambda job: job[0](*job[1]), jobs))


def link(objects: list[Path], target: Path, sanitize: bool = True) -> Path:
    library = Path(torch.__file__).parent / "lib"
    command = ["g++", "-shared", *(_SANITIZE if sanitize else []), *map(str, objects), "-o", str(target), f"-L{library}", "-ltorch", "-ltorch_cpu"]
    subprocess.run(command, check=True, capture_output=True, text=True)
    return target


def _changes() -> dict[str, str]:
    return {
        "LD_PRELOAD": str(sanitizer_library()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(HERE.parents[1]),
        "OMP_NUM_THREADS": "1",
    }


def run_worker(script: str, library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a worker of this folder on an emulated library."""
    command = [sys.executable, str(HERE / script), str(library), *arguments]
    return subprocess.run(command, env=os.environ | _changes(), capture_output=True, text=True)


def work(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run cases on an emulated library in a process of their own, forked from an emulator_worker.py."""
    return forked.call(HERE / "emulator_worker.py", _changes(), str(library), *arguments)


def wrong(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """{schedule case: what is wrong} of a finished worker."""
    assert done.returncode == 0, done.stderr[-3000:]
    return {f"{schedule} {case}": what for schedule, report in json.loads(done.stdout).items() for case, what in report.items() if what}


@dataclass(frozen=True)
class Mutant:
    """A planted bug: `old` becomes `new` in `file`, the kernels of `source` are rebuilt for one type, and `case` of `shapes` has to fail. `kept`: one of its
    kind, which `make test` has too."""

    file: str
    source: str
    old: str
    new: str
    shapes: str
    case: str
    dtype: str = "f32"
    kept: bool = False


def share_of(mutants: Mapping[str, Mutant]) -> list[Any]:
    """Parameters of a test of each: the first of each source and type and the `kept` run in `make test`, all in `make gates`."""
    seen, chosen = set(), []
    for name, mutant in mutants.items():
        place = (mutant.source, mutant.dtype)
        chosen.append(pytest.param(name, marks=() if mutant.kept or place not in seen else pytest.mark.gates))
        seen.add(place)
    return chosen


def run_changed(mutant: Mutant, objects: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the library with the change and run the mutant's case in every schedule, until one notices."""
    source = folder / "csrc" / "cuda"
    shutil.copytree(CSRC.parent, source.parent)
    text = (source / mutant.file).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.file} no longer has the line that this bug changes"
    (source / mutant.file).write_text(text.replace(mutant.old, mutant.new))
    dispatch = (source / "dispatch.cuh").read_text()
    for name, line in TYPES.items():
        assert line in dispatch
        dispatch = dispatch if name == mutant.dtype else dispatch.replace(line, "")
    (source / "dispatch.cuh").write_text(dispatch)
    changed = compile_kernel(source / f"{mutant.source}.cu", folder / "changed.o", source, engine=objects[0].parent)
    library = link([changed if o.stem == mutant.source else o for o in objects], folder / "changed.so")
    for schedule in SCHEDULES.split(","):
        done = work(library, mutant.dtype, mutant.shapes, schedule, mutant.case)
        if done.returncode or wrong(done):
            break
    return done
