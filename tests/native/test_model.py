"""The performance model: its constants are those of the kernels, its arithmetic holds what it says, and it is labelled as a model wherever it is printed."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from benchmarks import model

ROOT = Path(__file__).resolve().parents[2]
H100 = model.GPUS[0]


def test_tiles_and_splits_are_those_of_the_kernels():
    header = "".join((ROOT / "csrc" / "cuda" / name).read_text() for name in ("lora.h", "lora_layer.h"))
    own = {name: int(value) for name, value in re.findall(r"(\w+) = (\d+)[;,]", header)}
    assert (own["LORA_ROWS"], own["LORA_COLUMNS"], own["GRAM_ROWS"]) == (model.ROWS, model.COLUMNS, model.CHUNK)
    assert (own["SHRINK_COLUMNS"], own["SHRINK_SPLITS"], own["LORA_DEPTH"]) == (model.SPLIT, model.SPLITS, 2 * model.DEPTH)
    assert own["WIDEST"] == model.WIDEST and f"HETLORA_EXPAND_BLOCKS {model.BLOCKS}\n" in header
    assert f"EXPAND_PLANES = {model.EXPAND_PLANES >> 20} << 20;" in header


def test_expand_adds_the_planes_of_shrink_where_they_are_few():
    """Splits are of 1024 columns, eight at most; planes of a row are no more bytes than the block writes, or few in all."""
    assert [model.splits_of(n) for n in (64, 1024, 1025, 4096, 8192, 14336)] == [1, 1, 2, 4, 8, 8]
    assert model.expand_adds(8192, 4096, 4096, 16) and not model.expand_adds(8192, 4096, 4096, 64) and not model.expand_adds(64, 4096, 4096, 129)
    assert model.expand_adds(256, 4096, 4096, 64), "16 MB in all"
    assert sum(work.launches for work in model.layer(8192, 4096, 4096, 16, True)) == 3 + 6


def test_bytes_are_the_floor_of_each_kernel():
    """bfloat16 x and result, once each."""
    assert model.shrink(100, 64, 4, True).bytes == 2 * (100 * 64 + 4 * 64 + 100 * 4)
    assert model.expand(100, 64, 4, False, True).bytes - model.expand(100, 64, 4, False, False).bytes == 2 * 100 * 64
    assert model.aggregate(10, [1, 3]).bytes == 4 * 10 * (4 + 3) and model.adamw(10, [1, 3]).bytes == 7 * 4 * 10 * 4


def test_a_rank_pays_for_the_squares_of_its_gram_matrix():
    """csrc/cuda/table.h: squares of 8 rows in float32, bands of 16 in 16 bits, those on or above the diagonal; tiles of at most 64 rows."""
    table, kernel = ((ROOT / "csrc" / "cuda" / name).read_text() for name in ("table.h", "gram.cuh"))
    assert "result == Type::f64 ? 4 : rows == Type::f32 ? 8 : 16" in table and f"(rank + {model.WIDEST_GRAM - 1}) / {model.WIDEST_GRAM};" in table
    assert f"GRAM_SPLIT = {model.GRAM_SPLIT};" in kernel
    assert [model.gram_tiles(rank, 4)[0] for rank in (0, 5, 9, 40, 64)] == [0, 64, 3 * 64, 15 * 64, 36 * 64]
    assert [model.gram_tiles(rank, 2)[0] for rank in (0, 5, 17, 40, 64)] == [0, 256, 3 * 256, 6 * 256, 10 * 256]
    assert model.gram_tiles(70, 4) == (2 * 15 * 64 + 25 * 64, 70 + 80, 3 * 40 * 40), "two tiles of 40, and one beside them that reads both"
    assert model.gram(10, [5, 9]).products == 2 * 10 * 4 * 64 and model.gram(10, [5], 2).bytes == 2 * 10 * 5
    assert model.gram(4096, [64], 2).bound(H100) == "memory" == model.gram(4096, [40]).bound(H100)


def test_ranks_whose_gram_matrix_is_below_60_percent_of_the_bandwidth():
    """As docs/kernels-gpu.md says, of 100 clients and four projections of a block of Llama-3.1-8B."""
    elements = model.elements_per_rank(model.LLAMA_8B_ATTENTION_LAYER)

    def below(gpu: model.Gpu, size: int) -> list[int]:
        calls = {rank: model.gram(elements, [rank] * 100, size) for rank in range(1, 65)}
        return [rank for rank, work in calls.items() if work.bytes / work.parts(gpu)[work.bound(gpu)] < 0.6 * gpu.gb_per_s * 1e3]

    jetsons = {"AGX Orin": [1], "Orin Nano": [1], "Thor": [1]}
    assert {gpu.name: below(gpu, 4) for gpu in model.GPUS} == {"H100": [1, 57], "H200": [1, 2, 33, 34, *range(41, 65)], **jetsons}
    assert {gpu.name: below(gpu, 2) for gpu in model.GPUS} == {"H100": [1], "H200": [1], "AGX Orin": [1], "Orin Nano": [1], "Thor": []}


def test_a_kernel_takes_its_launches_and_its_longest_part():
    work = model.shrink(2048, 4096, 16, True)
    parts = work.parts(H100)
    assert work.microseconds(H100) == work.launches * model.LAUNCH_US + max(parts.values()) and parts[work.bound(H100)] == max(parts.values())
    assert (work.launches, work.blocks, work.stages) == (2, 4 * 32, 16)
    assert (model.shrink(2048, 1024, 16, True).launches, model.grouped_gram(1024, 64, 4, False).launches, model.grouped_gram(1025, 64, 4, False).launches) == (
        1,
        1,
        2,
    )


@pytest.mark.parametrize("gpu", model.GPUS, ids=lambda gpu: gpu.name)
def test_more_work_never_takes_less(gpu):
    for make in (lambda rows: model.shrink(rows, 4096, 16, True), lambda rows: model.expand(rows, 4096, 16, True, True)):
        times = [make(rows).microseconds(gpu) for rows in (64, 512, 2048, 8192, 65536)]
        assert times == sorted(times)
    dropping, plain, base = model.layer(2048, 4096, 4096, 8, True), model.layer(2048, 4096, 4096, 8, False), model.frozen(2048, 4096, 4096)
    assert model.total(dropping, gpu) >= model.total(plain, gpu) > model.total(base, gpu)


@pytest.mark.parametrize(
    ("name", "multiprocessors", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", 132, "H100"),
        ("NVIDIA H100 PCIe", 114, None),
        ("NVIDIA H200", 132, "H200"),
        ("NVIDIA GH200 480GB", 132, None),
        ("Orin", 16, "AGX Orin"),
        ("Orin (nvgpu)", 8, "Orin Nano"),
        ("Orin", 14, None),
        ("NVIDIA Thor", 20, "Thor"),
        ("RTX 4090", 128, None),
    ],
)
def test_devices_go_by_the_name_that_the_driver_says_and_their_multiprocessors(name, multiprocessors, gpu):
    found = model.gpu_named(name, multiprocessors)
    assert (found.name if found else None) == gpu
    assert (model.layer_seconds(found, 64, 64, 64, [4], False) is None) == (gpu is None)


# Every kernel of csrc/cuda, and the row of the model that holds its launch.
MODELLED = {
    "accumulate_kernel": "accumulate_",
    "adamw_kernel": "adamw_",
    "aggregate_kernel": "aggregate_",
    "cross_entropy_kernel": "cross_entropy_, logits again from L2",
    "delta_norms_kernel": "delta_norms",
    "dequantize_kernel": "dequantize_rows_, 8 bits",
    "expand_kernel": "expand, adds planes",
    "gram_kernel": "gram",
    "gram_sum_kernel": "gram",
    "grouped_gram_kernel": "grouped_gram",
    "grouped_gram_sum_kernel": "grouped_gram",
    "prepare_kernel": "adamw_",
    "quantize_kernel": "quantize_rows_, 8 bits",
    "sgd_kernel": "sgd_",
    "shrink_kernel": "shrink",
    "shrink_sum_kernel": "shrink, adds its planes",
    "squares_kernel": "adamw_, clip and tail",
    "tail_norms_kernel": "tail_norms, half of each rank",
    "truncate_kernel": "truncate_",
    "upload_kernel": "truncate_",
    "widen_kernel": "copy of S, rows of 16 bytes",
}


def test_every_kernel_of_the_library_has_a_row():
    sources = "".join(file.read_text() for file in sorted((ROOT / "csrc" / "cuda").glob("*.cu*")))
    assert set(re.findall(r"__global__ void (?:\s*__launch_bounds__\([^;{]*?\)\s+)?(\w+)\(", sources)) == set(MODELLED)
    assert set(MODELLED.values()) <= {work.kernel for _, work in model.rows()}


def test_kernels_that_few_layers_launch():
    """Planes of shrink that expand does not add; an odd rank; an optimiser that clips and regularises."""
    assert [model.shrink(8192, 4096, rank, False, 4096).launches for rank in (16, 64)] == [1, 2]
    assert model.widen(100, 11).bytes == 2 * 100 * (11 + 16) and model.widen(100, 11).launches == 1
    own, plain = model.adamw_clipping(10, [2, 4]), model.adamw(10, [2, 4])
    assert (own.launches - plain.launches, own.bytes - plain.bytes) == (1, 4 * 10 * (6 + 3)), "gradients, and parameters of the tail rows, once more"


def test_the_loss_reads_its_logits_again_from_l2_or_from_memory():
    held, again = model.cross_entropy(10, 100, True), model.cross_entropy(10, 100, False)
    assert (held.bytes - 12 * 10, held.cached, again.bytes - held.bytes, again.cached) == (2 * 2 * 1000, 2 * 1000, 2 * 1000, 0)
    assert held.parts(H100)["products"] == pytest.approx(model.LOSS_INSTRUCTIONS * 1000 / (128 * 132 * 1.98e3), rel=0.01), "one instruction a lane and clock"
    assert {work.kernel.split(",")[0] for _, work in model.rows()} >= {"cross_entropy_", "aggregate_", "gram", "shrink", "adamw_"}


def test_every_figure_is_labelled_as_modelled():
    heads = [line for line in model.table() if line.startswith(("| kernel", "| n -> m"))]
    assert len(heads) == 2 and all(f"{gpu.name}, modelled" in head for gpu in model.GPUS for head in heads)
    assert all(line.endswith("| |") for line in model.table() if line.startswith("| ") and line not in heads), "nothing was measured"
