"""The CUDA kernels of the LoRA layer run on the host as in test_emulator.py: ragged cases, the whole layer, the mask and the published Philox vectors, and
planted bugs, a share of them in `make test` and all in `make gates`. Copies by cp.async arrive in the emulator when they are waited for and are garbage
before, so that a missing wait shows."""

from __future__ import annotations

import ctypes
import sys
from pathlib import Path

import emulated
import pytest
from emulated import Mutant, run_changed, work, wrong

sys.path.insert(0, str(emulated.HERE.parent / "kernels"))
from test_dropout import PUBLISHED

pytestmark = [pytest.mark.slow, pytest.mark.skipif(emulated.missing() is not None, reason=str(emulated.missing()))]


@pytest.mark.parametrize(("dtypes", "schedules"), emulated.PAIRS)
def test_every_op_in_every_type_and_schedule(library: Path, dtypes: str, schedules: str) -> None:
    assert not wrong(work(library, dtypes, "lora-small", schedules))


@pytest.mark.parametrize("shape", ["mixed", "aligned", "long", "streamed", "wide", "narrow", "base-only", "no-rows", "no-ranks"])
def test_every_rank_and_segment(library: Path, shape: str) -> None:
    assert not wrong(work(library, "f32,bf16", f"lora-{shape}", "rand"))


def test_whole_layer_mask_and_batch_mates(library: Path) -> None:
    assert not wrong(work(library, "f32,bf16", "checks", "warp"))


def test_published_vectors_of_philox(tmp_path: Path) -> None:
    source = tmp_path / "philox.cu"
    source.write_text(
        '#include "philox.cuh"\n'
        'extern "C" __attribute__((visibility("default"))) void words(uint32_t* c, uint64_t key) {\n'
        "    const hetlora::Counter out = hetlora::philox({c[0], c[1], c[2], c[3]}, key);\n"
        "    memcpy(c, out.word, sizeof out.word);\n}\n"
    )
    emulated.link([emulated.compile_kernel(source, tmp_path / "philox.o", sanitize=False)], tmp_path / "philox.so", sanitize=False)
    function = ctypes.CDLL(str(tmp_path / "philox.so")).words
    for counter, key, rounds, expected in PUBLISHED:
        if rounds == 7:
            words = (ctypes.c_uint32 * 4)(*counter)
            function(words, ctypes.c_uint64(key[0] | key[1] << 32))
            assert tuple(words) == expected


STAGED = "            __syncthreads();  // the stage is whole, and the one before it is free\n"
MUTANTS = {
    "shrink: no barrier between staging and use": Mutant("shrink.cu", "shrink", STAGED, "", "lora-small", "shrink"),
    "shrink: no wait for the copies": Mutant("shrink.cu", "shrink", "ring.await();", "", "lora-aligned", "shrink", kept=True),
    "shrink: dropped columns of the first stage again": Mutant(
        "shrink.cu", "shrink", "key[part], left + step * DEPTH<T> + column", "key[part], left + column", "lora-small", "shrink-drop"
    ),
    "a low draw compared with its neighbour": Mutant("philox.cuh", "shrink", "word[e / 2] << 16) < limit", "word[e / 2]) < limit", "lora-small", "shrink-drop"),
    "a dropped low half that takes its neighbour": Mutant(
        "lora.cuh", "grouped_gram", "pack.v[w] &= 0xffff0000u;", "pack.v[w] = 0;", "lora-small", "grouped_gram-drop", "bf16"
    ),
    "shrink: columns past the width": Mutant(
        "shrink.cu", "shrink", "source[part] < 0 ? 0 : width - k - column", "source[part] < 0 ? 0 : DRAWS", "lora-small", "shrink"
    ),
    "shrink: rows past the client's": Mutant(
        "shrink.cu", "shrink", "if (t >= client.length) continue;\n            if (plane)", "if (plane)", "lora-small", "shrink"
    ),
    "shrink: elements counted in 32 bits": Mutant(
        "shrink.cu",
        "shrink",
        "static_cast<int64_t>(max(source[part], 0)) * call.width",
        "static_cast<int>(static_cast<unsigned>(max(source[part], 0)) * call.width)",
        "checks",
        "far rows",
        kept=True,
    ),
    "shrink: every split in the first plane": Mutant(
        "shrink.cu", "shrink", "left / shrink_columns(call.width) * call.plane_size", "0 * call.plane_size", "lora-wide", "shrink"
    ),
    "expand: planes added without the last": Mutant(
        "lora.cuh", "expand", "split < call.splits;", "split + 1 < call.splits;", "checks", "several splits-forward-no-bias"
    ),
    "expand: an S that no block writes": Mutant(
        "expand.cu", "expand", "depth / DRAWS, left == 0)", "depth / DRAWS, false)", "checks", "several splits-forward-no-bias"
    ),
    "expand: S of the first columns for all": Mutant(
        "expand.cu", "expand", "if (!kept || next_column == left) {", "if (next_column == left) {", "lora-streamed", "expand", "bf16"
    ),
    "expand: stages of S in turn, though they are kept": Mutant(
        "expand.cu", "expand", "(kept ? stage : step % 2)", "(step % 2)", "lora-streamed", "expand", "bf16"
    ),
    "expand: a half of the product over the other": Mutant(
        "expand.cu", "expand", "                    __syncwarp();  // the half before has been read\n", "", "lora-streamed", "expand", "bf16"
    ),
    "shrink: the mask of the first split again": Mutant(
        "shrink.cu", "shrink", "left + step * DEPTH<T> + column)", "step * DEPTH<T> + column)", "lora-wide", "shrink-drop"
    ),
    "shrink: rank rows of the first split again": Mutant("shrink.cu", "shrink", "ranks, left + k, UNITS", "ranks, k, UNITS", "lora-wide", "shrink"),
    "a copy of S with two rows in one place": Mutant(
        "lora.cuh",
        "shrink",
        "(call.wide) + static_cast<int64_t>(client.start + t)",
        "(call.wide) + static_cast<int64_t>(client.start + t / 2)",
        "checks",
        "backward, covered, aligned x",
    ),
    "S copied before it is whole": Mutant("shrink.cu", "shrink", "    __syncthreads();  // S is whole\n", "", "checks", "backward, covered, aligned x"),
    "an S of the forward pass that is not copied": Mutant(
        "shrink.cu",
        "shrink",
        "    widen_rows<T>(call, client, (static_cast<int>(blockIdx.x) - client.tiles) * LORA_ROWS);",
        "    (void)client;",
        "checks",
        "backward, covered, aligned x",
    ),
    "shrink: no barrier between passes": Mutant("shrink.cu", "shrink", "if (first) __syncthreads();", "", "checks", "alone"),
    "a wait for one copy too few": Mutant("lora.cuh", "grouped_gram", "await_copies<1>();", "await_copies<2>();", "checks", "alone", "bf16"),
    "fragments of the wrong columns": Mutant(
        "lora.cuh", "shrink", "row + middle + low, k + high)", "row + high + low, k + middle)", "lora-small", "shrink", "bf16"
    ),
    "a neighbour's rank row": Mutant("lora.cuh", "expand", "first + row < client.rank ?", "first + row <= client.rank ?", "checks", "poisoned neighbours"),
    "expand: no barrier before the product": Mutant(
        "expand.cu", "expand", "if (PRODUCT_IN_STAGE<T>) __syncthreads();  // the product takes the stage's place", "", "lora-mixed", "expand", "bf16"
    ),
    "expand: no wait for the copies": Mutant("expand.cu", "expand", "await_copies<0>();", "", "lora-aligned", "expand"),
    "expand: a warp that does not wait for its lanes": Mutant(
        "expand.cu", "expand", "                    __syncwarp();  // the half is whole\n", "", "lora-small", "expand", "bf16", kept=True
    ),
    "expand: a store past the row": Mutant("expand.cu", "expand", "        if (column + e >= call.width) return;\n", "", "lora-small", "expand"),
    "expand: a wide result that forgets what it adds to": Mutant(
        "expand.cu", "expand", "    if (call.before) sum = ", "    if (false) sum = ", "lora-aligned", "expand-float32-out", "bf16"
    ),
    "expand: the mask of the next row": Mutant(
        "expand.cu", "expand", "call.keys[client.start + top + local]", "call.keys[client.start + top + local / 2]", "lora-small", "expand-drop"
    ),
    "grouped_gram: no barrier between staging and use": Mutant("grouped_gram.cu", "grouped_gram", STAGED, "", "lora-small", "grouped_gram"),
    "grouped_gram: the mask of the step before": Mutant(
        "grouped_gram.cu", "grouped_gram", "(step + 1) * DEPTH<T> + row", "step * DEPTH<T> + row", "lora-aligned", "grouped_gram-drop"
    ),
    "grouped_gram: rows of the next client": Mutant("grouped_gram.cu", "grouped_gram", "at < end ? static_cast", "true ? static_cast", "checks", "alone"),
    "grouped_gram: one gradient's planes for both": Mutant(
        "grouped_gram.cu", "grouped_gram", "sums.planes[which]", "sums.planes[0]", "checks", "several chunks-backward"
    ),
    "grouped_gram: splits added without the last": Mutant(
        "grouped_gram.cu", "grouped_gram", "chunk < chunks; ++chunk", "chunk + 1 < chunks; ++chunk", "lora-long", "grouped_gram"
    ),
}


@pytest.mark.parametrize("name", emulated.share_of(MUTANTS))
def test_a_planted_bug_is_noticed(name: str, objects: list[Path], tmp_path: Path) -> None:
    done = run_changed(MUTANTS[name], objects, tmp_path)
    assert "AddressSanitizer" in done.stderr or wrong(done)


def test_the_same_build_without_a_bug_passes(objects: list[Path], tmp_path: Path) -> None:
    line = "await_copies<0>();\n            __sync"
    assert not wrong(run_changed(Mutant("expand.cu", "expand", line, line, "lora-small", "expand", "bf16"), objects, tmp_path))
