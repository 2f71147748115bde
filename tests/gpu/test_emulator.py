"""The CUDA kernels, launchers and bindings run on the host under AddressSanitizer in four schedules, and planted bugs that these runs must notice."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import emulated
import pytest

pytestmark = [pytest.mark.slow, pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))]
SCHEDULES = "fwd,rev,rand,warp"
# The worker judges float32 alone where a planted bug is built, so only that is compiled.
OTHER_TYPES = ("bf16: return body(__nv_bfloat16{})", "f16: return body(__half{})", "f64: return body(double{})")


@pytest.fixture(scope="module")
def objects(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return emulated.compile_all(tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def library(objects: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    return emulated.link(objects, tmp_path_factory.mktemp("library") / "emulated.so")


def work(library: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {
        "LD_PRELOAD": str(emulated.sanitizer_library()),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "PYTHONPATH": str(emulated.HERE.parents[1]),
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(emulated.HERE / "emulator_worker.py"), str(library), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)


def wrong(done: subprocess.CompletedProcess[str]) -> dict[str, str]:
    """{schedule case: what is wrong} of a finished worker."""
    assert done.returncode == 0, done.stderr[-3000:]
    return {f"{schedule} {case}": what for schedule, report in json.loads(done.stdout).items() for case, what in report.items() if what}


def test_every_op_in_every_type_and_schedule(library: Path) -> None:
    assert not wrong(work(library, "f32,bf16,f16,f64", "small", SCHEDULES))


def test_many_clients_several_tiles_and_splits(library: Path) -> None:
    assert not wrong(work(library, "f32,bf16", "large", "rev,warp"))


def test_modules_without_columns_or_rows(library: Path) -> None:
    assert not wrong(work(library, "f32,bf16", "edge", "warp"))


@dataclass(frozen=True)
class Mutant:
    """A planted bug: `old` becomes `new` in a header, the kernels of `source` are rebuilt, and `case` has to fail."""

    header: str
    source: str
    old: str
    new: str
    size: str
    case: str


BARRIER = "        __syncthreads();\n"
MUTANTS = {
    "no barrier between staging and use": Mutant(
        "gram.cuh", "gram", BARRIER + "        for (int column = group", "        for (int column = group", "small", "gram"
    ),
    "no barrier before the next stage": Mutant("gram.cuh", "gram", "        }\n" + BARRIER + "    }\n", "        }\n    }\n", "large", "gram"),
    "no barrier before the groups are added": Mutant("gram.cuh", "gram", BARRIER + "        for (int at", "        for (int at", "small", "gram"),
    "a barrier that half the threads miss": Mutant(
        "gram.cuh", "gram", BARRIER + "        for (int at", "        if (threadIdx.x < 128) __syncthreads();\n        for (int at", "small", "gram"
    ),
    "a tile stored past its matrix": Mutant("gram.cuh", "gram", "if (left >= rank || right >= rank) return;", "", "small", "gram"),
    "a mirrored tile forgotten": Mutant("gram.cuh", "gram", "if (i != j) out", "if (false) out", "large", "gram"),
    "splits added without the last": Mutant("gram.cuh", "gram", "split < splits;", "split + 1 < splits;", "large", "gram"),
    "shared memory overrun": Mutant("gram.cuh", "gram", "at < SIDE * DEPTH; at", "at < 2 * GRAM_SHARED; at", "small", "gram"),
    "a load past the row": Mutant("common.cuh", "aggregate", "if (column < width) pack", "pack", "small", "aggregate"),
    "a store past the row": Mutant("common.cuh", "accumulate", "if (column >= width) return;", "", "small", "accumulate"),
    "a scalar store past the row": Mutant("common.cuh", "accumulate", "if (column < width) row[column] =", "row[column] =", "small", "accumulate"),
    "a client that owns one row too many": Mutant("aggregate.cuh", "aggregate", "- offset > item.row", "- offset >= item.row", "small", "aggregate"),
    "clients after the first 32 forgotten": Mutant("aggregate.cuh", "aggregate", "first += WARP", "first += 2 * WARP", "large", "aggregate"),
    "lanes that leave before the ballot": Mutant(
        "truncate.cuh", "truncate", "    const unsigned owners =", "    if (!dense && !owns) return;\n    const unsigned owners =", "small", "truncate"
    ),
    "a sum over half the warp": Mutant("common.cuh", "norms", "distance = WARP / 2;", "distance = WARP / 4;", "small", "tail_norms"),
    "the neighbour's row": Mutant("common.cuh", "optim", "if (offsets[middle] <= row) low", "if (offsets[middle] < row) low", "small", "adamw-clip-tail"),
    "the tail one row late": Mutant("step.cuh", "optim", "coefficients && item.row >= item", "coefficients && item.row > item", "small", "sgd-momentum-tail"),
}


def run_changed(mutant: Mutant, objects: list[Path], folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the library with the change, for float32 alone, and run the mutant's case in every schedule."""
    source = folder / "csrc"
    shutil.copytree(emulated.CSRC, source)
    text = (source / mutant.header).read_text()
    assert text.count(mutant.old) == 1, f"{mutant.header} no longer has the line that this bug changes"
    (source / mutant.header).write_text(text.replace(mutant.old, mutant.new))
    dispatch = (source / "dispatch.cuh").read_text()
    for other in OTHER_TYPES:
        assert other in dispatch
        dispatch = dispatch.replace(f"case Type::{other};", "")
    (source / "dispatch.cuh").write_text(dispatch)
    changed = emulated.compile_kernel(source / f"{mutant.source}.cu", folder / "changed.o", source)
    library = emulated.link([changed if o.stem == mutant.source else o for o in objects], folder / "changed.so")
    return work(library, "f32", mutant.size, SCHEDULES, mutant.case)


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_noticed(name: str, objects: list[Path], tmp_path: Path) -> None:
    done = run_changed(MUTANTS[name], objects, tmp_path)
    assert "AddressSanitizer" in done.stderr or wrong(done)


def test_the_same_build_without_a_bug_passes(objects: list[Path], tmp_path: Path) -> None:
    line = "split < splits;"
    assert not wrong(run_changed(Mutant("gram.cuh", "gram", line, line, "large", "gram"), objects, tmp_path))
