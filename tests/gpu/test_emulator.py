"""The CUDA kernels, launchers and bindings run on the host under AddressSanitizer in four schedules, and planted bugs that these runs must notice:
a share of them in `make test`, all in `make gates`."""

from __future__ import annotations

from pathlib import Path

import emulated
import pytest
from emulated import Mutant, run_changed, work, wrong

pytestmark = [pytest.mark.slow, pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))]


@pytest.mark.parametrize(("dtypes", "schedules"), emulated.PAIRS)
def test_every_op_in_every_type_and_schedule(library: Path, dtypes: str, schedules: str) -> None:
    assert not wrong(work(library, dtypes, "small", schedules))


# Each type and each schedule; the other two pairs are left to `make gates`.
@pytest.mark.parametrize(
    ("dtype", "schedule"),
    [("f32", "warp"), ("bf16", "rev"), pytest.param("f32", "rev", marks=pytest.mark.gates), pytest.param("bf16", "warp", marks=pytest.mark.gates)],
)
def test_many_clients_several_tiles_and_splits(library: Path, dtype: str, schedule: str) -> None:
    assert not wrong(work(library, dtype, "large", schedule))


def test_gram_tiles_of_every_size(library: Path) -> None:
    """On tensor cores, in float32 and in float64."""
    assert not wrong(work(library, "f32,bf16,f16", "tiles", "rand", "gram"))
    assert not wrong(work(library, "bf16,f64", "tiles", "rev", "delta_norms-exact"))


def test_modules_that_share_their_ranks(library: Path) -> None:
    assert not wrong(work(library, "f32", "shared", "fwd"))


def test_modules_without_columns_or_rows(library: Path) -> None:
    assert not wrong(work(library, "f32,bf16", "edge", "warp"))


STAGED = "        await_copies<0>();\n        __syncthreads();  // the stage is whole, and the one before it is free\n"
READ, UPPER, WARPS = (
    f"__syncthreads();  // {why}\n" for why in ("what was there has been read", "the sums of the upper half are there", "the sums of all warps are there")
)
MUTANTS = {
    "no barrier between staging and use": Mutant("gram.cu", "gram", STAGED, "        await_copies<0>();\n", "small", "gram"),
    "no wait for the copies": Mutant("gram.cu", "gram", STAGED, STAGED.replace("await_copies<0>();", ""), "small", "gram"),
    "the next stage over the one in use": Mutant("gram.cu", "gram", "stage, (step + 1) % 2,", "stage, step % 2,", "large", "gram"),
    "no barrier before the groups are added": Mutant("gram.cu", "gram", UPPER, "\n", "small", "gram"),
    "no barrier before the next groups are added": Mutant("gram.cu", "gram", READ, "\n", "small", "gram"),
    "a barrier that half the threads miss": Mutant("gram.cu", "gram", READ, "if (threadIdx.x < 64) " + READ, "small", "gram", kept=True),
    "half of the groups forgotten": Mutant("gram.cu", "gram", "left > 1; left =", "left > 2; left =", "small", "gram"),
    "columns past the width": Mutant("gram.cu", "gram", "min(max(last - column, 0), V)", "V", "small", "gram"),
    "a tile against itself, not its neighbour": Mutant("gram.cu", "gram", "y + x : across + x;", "y + x : x;", "tiles", "gram"),
    "a tile stored past its matrix": Mutant("gram.cuh", "gram", "left <= right && right < rank", "left <= right", "small", "gram"),
    "a mirrored element forgotten": Mutant("gram.cuh", "gram", "if (left != right) out", "if (false) out", "small", "gram", kept=True),
    "splits added without the last": Mutant("gram.cu", "gram", "split < splits;", "split + 1 < splits;", "large", "gram"),
    "shared memory overrun": Mutant("gram.cu", "gram", "chunk * PIECES >= pieces", "chunk * PIECES >= 3 * stage.pieces()", "small", "gram", kept=True),
    "tensor cores: halves of a band in each other's place": Mutant(
        "gram_mma.cuh", "gram", "half % 2 + 2 * (w % 2)", "half % 2 * 2 + w % 2", "small", "gram", "bf16"
    ),
    "tensor cores: a tile against itself, not its neighbour": Mutant("gram_mma.cuh", "gram", "left_of = tile.j", "left_of = tile.i", "tiles", "gram", "bf16"),
    "tensor cores: columns of the first warp again": Mutant("gram_mma.cuh", "gram", "first + warp * STEP * AHEAD", "first", "small", "gram", "bf16"),
    "tensor cores: aligned columns past the width": Mutant(
        "gram_mma.cuh", "gram", "if (inside > 0) words", "if (row + 8 * half + down < rank) words", "large", "gram", "bf16"
    ),
    "tensor cores: an element past the width": Mutant("gram_mma.cuh", "gram", "if (4 * e < inside)", "if (inside > 0)", "small", "gram", "bf16"),
    "tensor cores: two warps forgotten": Mutant("gram_mma.cuh", "gram", "w < GRAM_WARPS;", "w < GRAM_WARPS / 2;", "large", "gram", "bf16"),
    "tensor cores: sums over those of another tile": Mutant("gram_mma.cuh", "gram", READ, "\n", "tiles", "gram", "bf16"),
    "tensor cores: sums added before they are there": Mutant("gram_mma.cuh", "gram", WARPS, "\n", "small", "gram", "bf16"),
    "tensor cores: one chain of sums for all columns": Mutant(
        "gram_mma.cuh", "gram", "if (AHEAD > 1 && a % CHAIN == CHAIN - 1)", "if (false)", "large", "gram", "f16"
    ),
    "a load past the row": Mutant("common.cuh", "aggregate", "if (column < width) pack", "pack", "small", "aggregate"),
    "a store past the row": Mutant("common.cuh", "aggregate", "if (column >= width) return;", "", "small", "accumulate", kept=True),
    "a scalar store past the row": Mutant("common.cuh", "aggregate", "if (column < width) row[column] =", "row[column] =", "small", "accumulate"),
    "a client that owns one row too many": Mutant("aggregate.cu", "aggregate", "- offset > item.row", "- offset >= item.row", "small", "aggregate"),
    "clients after the first 32 forgotten": Mutant("aggregate.cu", "aggregate", "first += WARP", "first += 2 * WARP", "large", "aggregate"),
    "lanes that leave before the ballot": Mutant(
        "truncate.cu", "truncate", "    const unsigned owners =", "    if (!dense && !owns) return;\n    const unsigned owners =", "small", "truncate"
    ),
    "a maximum over half the warp": Mutant("quantize.cu", "quantize", "distance = WARP / 2;", "distance = WARP / 4;", "large", "quantize-8"),
    "a code past an odd width": Mutant("quantize.cu", "quantize", "high = 2 * at + 1 < width ?", "high = true ?", "small", "quantize-4"),
    "a scale that is no normal number": Mutant("quantize.cu", "quantize", "if (scale < 1.17549435e-38f) scale = 0;", "", "small", "quantize-8", kept=True),
    "slopes over the label's logit before it is read": Mutant(
        "cross_entropy.cu", "cross_entropy", "__syncthreads();  // the factors are there, and", "//", "small", "cross_entropy"
    ),
    "a sum that stays relative to a smaller logit": Mutant(
        "cross_entropy.cu", "cross_entropy", "own.sum *= exponential(own.top - relative);", "", "large", "cross_entropy"
    ),
    "a sum over half the warp": Mutant("common.cuh", "norms", "distance = WARP / 2;", "distance = WARP / 4;", "small", "tail_norms"),
    "the neighbour's row": Mutant("common.cuh", "optim", "if (offsets[middle] <= row) low", "if (offsets[middle] < row) low", "small", "adamw-clip-tail"),
    "modules added before all are there": Mutant("optim.cu", "optim", "__syncthreads();  // every module's", "// every module's", "small", "adamw-clip"),
    "a step counted for who stays out": Mutant("optim.cu", "optim", "each.step[k] + each.active[k]", "each.step[k] + 1", "small", "adamw"),
    "a copy of the moment, not of the factor": Mutant(
        "optim.cu",
        "optim",
        "start, p, base, module.width);\n        store<ALIGNED>(mean",
        "start, m, base, module.width);\n        store<ALIGNED>(mean",
        "checks",
        "casts",
    ),
    "a moment that steps as it is stored": Mutant("optim.cu", "optim", "client.rate * (m[e] /", "client.rate * (rounded<M>(m[e]) /", "checks", "moments"),
    "the tail one row late": Mutant("optim.cu", "optim", "coefficients && item.row >= item", "coefficients && item.row > item", "small", "sgd-momentum-tail"),
    "a slope of the softcap that is lost where it saturates": Mutant(
        "cross_entropy.cu", "cross_entropy", "4 * e / ((1 + e) * (1 + e))", "e / e * (1 - tanh(inner) * tanh(inner))", "small", "cross_entropy-saturated"
    ),
    "slopes of a label that is no word": Mutant(
        "cross_entropy.cu", "cross_entropy", "is_word ? 0 : static_cast<double>(NAN)", "0", "small", "cross_entropy-no-word", kept=True
    ),
}


@pytest.mark.parametrize("name", emulated.share_of(MUTANTS))
def test_a_planted_bug_is_noticed(name: str, objects: list[Path], tmp_path: Path) -> None:
    done = run_changed(MUTANTS[name], objects, tmp_path)
    assert "AddressSanitizer" in done.stderr or wrong(done)


def test_the_same_build_without_a_bug_passes(objects: list[Path], tmp_path: Path) -> None:
    line = "split < splits;"
    assert not wrong(run_changed(Mutant("gram.cu", "gram", line, line, "large", "gram"), objects, tmp_path))
