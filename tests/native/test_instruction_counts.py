"""No kernel takes over 5 % more instructions than it did: valgrind counts those of fixed calls, and a committed file says how many there were.

Counted are kernels that need no torch, in their AVX2 form, which is the most that valgrind runs (`instruction_counts.cpp`). A count does not depend on what
else the machine does. It depends on the compiler, so counts of another compiler, or of another of its releases, are not compared: the test is skipped and
says so.

After a change that is meant to take more instructions, with the compiler that the file names (another one takes its place, with counts of its own):

    .venv/bin/python tests/native/test_instruction_counts.py
"""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]
COMMITTED = Path(__file__).with_name("instruction_counts.json")
REFRESH = ".venv/bin/python tests/native/test_instruction_counts.py"
WITHOUT_TORCH = ("simd", "gram_kernels", "lora_kernels", "optim_kernels")
SOURCES = (ROOT / "tests/native/instruction_counts.cpp", *(ROOT / "csrc/cpu" / f"{name}.cpp" for name in WITHOUT_TORCH))
AVX2 = 1  # in InstructionSet of simd.h
LIMIT = 1.05

Counts = dict[str, int]


def build() -> ModuleType:
    """setup.py, for its compiler and flags."""
    spec = importlib.util.spec_from_file_location("hetlora_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look there
    spec.loader.exec_module(module)
    return module


def compiler_name(compiler: str) -> str:
    """As "g++ 12.2.0 x86_64": what decides the instructions, with the flags, which are setup.py's."""
    shown = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    option = "-dumpfullversion" if "Free Software Foundation" in shown else "-dumpversion"
    version = subprocess.run([compiler, option], capture_output=True, text=True, check=True).stdout.strip()
    return f"{'g++' if option == '-dumpfullversion' else 'clang++'} {version} {platform.machine()}"


def calls(profile: str) -> Counts:
    """Instructions of each `case_NAME`, with all that it calls, from callgrind's file. A name stands once and a number for it after that."""
    names = dict(re.findall(r"^c?fn=\((\d+)\) (\S.*)$", profile, re.MULTILINE))
    costs = re.findall(r"^cfn=\((\d+)\).*\ncalls=\d+ .*\n\S+ (\d+)$", profile, re.MULTILINE)
    return {names[number].removeprefix("case_"): int(cost) for number, cost in costs if names[number].startswith("case_")}


def measured(setup: ModuleType, compiler: str, folder: Path) -> Counts:
    flags = [*setup.CXX_FLAGS, *setup.contraction_flags(compiler), f"-I{ROOT / 'csrc/cpu'}"]
    objects = [folder / f"{source.stem}.o" for source in SOURCES]
    commands = [[compiler, *flags, "-c", str(source), "-o", str(out)] for source, out in zip(SOURCES, objects, strict=True)]
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda command: subprocess.run(command, check=True), commands))
    program, profile = folder / "counts", folder / "profile"
    # Names are bound when the program starts, so that no call binds one.
    subprocess.run([compiler, "-Wl,-z,now", *map(str, objects), "-o", str(program)], check=True)
    command = ["valgrind", "-q", "--tool=callgrind", f"--callgrind-out-file={profile}", "--toggle-collect=case_*", str(program)]
    chosen = subprocess.run(command, env={}, capture_output=True, text=True, check=True).stdout
    if int(chosen) != AVX2:
        pytest.skip(f"instructions are not counted: under valgrind this processor has no AVX2, it has instruction set {chosen.strip()} of simd.h")
    return calls(profile.read_text())


def slower(now: Counts, before: Counts) -> list[str]:
    """A line for each call that takes too many instructions, or that only one of the two has."""
    found = [f"{name}: only in {'the committed counts' if name in before else 'the program'}" for name in sorted(now.keys() ^ before.keys())]
    for name in now.keys() & before.keys():
        if now[name] > LIMIT * before[name]:
            found.append(f"{name}: {now[name]} instructions, before {before[name]} (+{100 * (now[name] / before[name] - 1):.1f} %)")
    return found


def tools() -> tuple[ModuleType, str]:
    """setup.py and its compiler, or the test is skipped."""
    if platform.machine() != "x86_64" or not sys.platform.startswith("linux"):
        pytest.skip(f"instructions are counted on Linux on x86-64, this is {sys.platform} on {platform.machine()}")
    if shutil.which("valgrind") is None:
        pytest.skip("instructions are not counted: no valgrind was found")
    setup = build()
    compiler = setup.find_compiler()
    if compiler is None:
        pytest.skip("instructions are not counted: no C++ compiler was found")
    return setup, compiler


@pytest.mark.slow
def test_no_kernel_takes_over_five_percent_more_instructions(tmp_path: Path) -> None:
    setup, compiler = tools()
    committed, name = json.loads(COMMITTED.read_text()), compiler_name(compiler)
    if name != committed["compiler"]:
        pytest.skip(f"instructions are not counted: {COMMITTED.name} is of {committed['compiler']}, this is {name}")
    found = slower(measured(setup, compiler, tmp_path), committed["counts"])
    assert not found, "\n".join([*found, f"Where that is meant: {REFRESH}"])


def test_what_takes_more_is_found_and_what_is_not_counted_too() -> None:
    before = {"a": 100, "b": 100, "c": 100, "gone": 1}
    assert slower({"a": 105, "b": 50, "c": 106, "new": 1}, before) == [
        "gone: only in the committed counts",
        "new: only in the program",
        "c: 106 instructions, before 100 (+6.0 %)",
    ]
    profile = "fn=(1) main\n0 9\ncfn=(2) case_x\ncalls=1 0 \n0 120\ncfn=(3) other\ncalls=1 0 \n0 7\n\nfn=(4) case_y\n0 3\n\nfn=(1)\ncfn=(4)\ncalls=1 0 \n0 33\n"
    assert calls(profile) == {"x": 120, "y": 33}


def refresh() -> None:
    setup, compiler = tools()
    with tempfile.TemporaryDirectory() as folder:
        counts = measured(setup, compiler, Path(folder))
    COMMITTED.write_text(json.dumps({"compiler": compiler_name(compiler), "counts": counts}, indent=2) + "\n")
    print(f"{COMMITTED}: {len(counts)} counts of {compiler_name(compiler)}")


if __name__ == "__main__":
    try:
        refresh()
    except pytest.skip.Exception as reason:
        sys.exit(str(reason))
