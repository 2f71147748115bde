"""The CUDA kernels, launchers and bindings run on the host under AddressSanitizer in four schedules, and planted bugs that these runs must notice."""

from __future__ import annotations

from pathlib import Path

import emulated
import pytest
from emulated import SCHEDULES, Mutant, run_changed, work, wrong

pytestmark = [pytest.mark.slow, pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))]


def test_every_op_in_every_type_and_schedule(library: Path) -> None:
    assert not wrong(work(library, "f32,bf16,f16,f64", "small", SCHEDULES))


def test_many_clients_several_tiles_and_splits(library: Path) -> None:
    assert not wrong(work(library, "f32,bf16", "large", "rev,warp"))


def test_modules_that_share_their_ranks(library: Path) -> None:
    assert not wrong(work(library, "f32", "shared", "fwd"))


def test_modules_without_columns_or_rows(library: Path) -> None:
    assert not wrong(work(library, "f32,bf16", "edge", "warp"))


BARRIER = "        __syncthreads();\n"
MUTANTS = {
    "no barrier between staging and use": Mutant(
        "gram.cu", "gram", BARRIER + "        for (int column = group", "        for (int column = group", "small", "gram"
    ),
    "no barrier before the next stage": Mutant("gram.cu", "gram", "        }\n" + BARRIER + "    }\n", "        }\n    }\n", "large", "gram"),
    "no barrier before the groups are added": Mutant("gram.cu", "gram", BARRIER + "        for (int at", "        for (int at", "small", "gram"),
    "a barrier that half the threads miss": Mutant(
        "gram.cu", "gram", BARRIER + "        for (int at", "        if (threadIdx.x < 128) __syncthreads();\n        for (int at", "small", "gram"
    ),
    "a tile stored past its matrix": Mutant("gram.cu", "gram", "if (left >= rank || right >= rank) return;", "", "small", "gram"),
    "a mirrored tile forgotten": Mutant("gram.cu", "gram", "if (i != j) out", "if (false) out", "large", "gram"),
    "splits added without the last": Mutant("gram.cu", "gram", "split < splits;", "split + 1 < splits;", "large", "gram"),
    "shared memory overrun": Mutant("gram.cu", "gram", "at < SIDE * DEPTH; at", "at < 2 * GRAM_SHARED; at", "small", "gram"),
    "a load past the row": Mutant("common.cuh", "aggregate", "if (column < width) pack", "pack", "small", "aggregate"),
    "a store past the row": Mutant("common.cuh", "aggregate", "if (column >= width) return;", "", "small", "accumulate"),
    "a scalar store past the row": Mutant("common.cuh", "aggregate", "if (column < width) row[column] =", "row[column] =", "small", "accumulate"),
    "a client that owns one row too many": Mutant("aggregate.cu", "aggregate", "- offset > item.row", "- offset >= item.row", "small", "aggregate"),
    "clients after the first 32 forgotten": Mutant("aggregate.cu", "aggregate", "first += WARP", "first += 2 * WARP", "large", "aggregate"),
    "lanes that leave before the ballot": Mutant(
        "truncate.cu", "truncate", "    const unsigned owners =", "    if (!dense && !owns) return;\n    const unsigned owners =", "small", "truncate"
    ),
    "a maximum over half the warp": Mutant("quantize.cu", "quantize", "distance = WARP / 2;", "distance = WARP / 4;", "large", "quantize-8"),
    "a code past an odd width": Mutant("quantize.cu", "quantize", "high = 2 * at + 1 < width ?", "high = true ?", "small", "quantize-4"),
    "a scale that is no normal number": Mutant("quantize.cu", "quantize", "if (scale < 1.17549435e-38f) scale = 0;", "", "small", "quantize-8"),
    "a sum over half the warp": Mutant("common.cuh", "norms", "distance = WARP / 2;", "distance = WARP / 4;", "small", "tail_norms"),
    "the neighbour's row": Mutant("common.cuh", "optim", "if (offsets[middle] <= row) low", "if (offsets[middle] < row) low", "small", "adamw-clip-tail"),
    "modules added before all are there": Mutant("optim.cu", "optim", "__syncthreads();  // every module's", "// every module's", "small", "adamw-clip"),
    "a step counted for who stays out": Mutant("optim.cu", "optim", "each.step[k] + each.active[k]", "each.step[k] + 1", "small", "adamw"),
    "a copy of the moment, not of the factor": Mutant(
        "optim.cu",
        "optim",
        "start, p, base, module.width);\n        store<ALIGNED>(at[2]",
        "start, m, base, module.width);\n        store<ALIGNED>(at[2]",
        "checks",
        "casts",
    ),
    "the tail one row late": Mutant("optim.cu", "optim", "coefficients && item.row >= item", "coefficients && item.row > item", "small", "sgd-momentum-tail"),
}


@pytest.mark.parametrize("name", MUTANTS)
def test_a_planted_bug_is_noticed(name: str, objects: list[Path], tmp_path: Path) -> None:
    done = run_changed(MUTANTS[name], objects, tmp_path)
    assert "AddressSanitizer" in done.stderr or wrong(done)


def test_the_same_build_without_a_bug_passes(objects: list[Path], tmp_path: Path) -> None:
    line = "split < splits;"
    assert not wrong(run_changed(Mutant("gram.cu", "gram", line, line, "large", "gram"), objects, tmp_path))
