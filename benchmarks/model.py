"""`python -m benchmarks.model`: what each GPU kernel should take, *modelled* from bytes, operations and launches. Nothing here was measured on a GPU.

A kernel takes its launches and the longest of five: bytes over bandwidth, bytes from and to L2, products over the peak of their pipe, the integer operations
of dropout, and the chain of stages that a block goes through one after another. The devices are their makers' public figures. The assumptions are the constants
below; expect +-25 %. That the longest hides the others is one of them. A measurement that disagrees is a finding: about the kernel, or about an assumption.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from .shapes import LLAMA_8B_ATTENTION_LAYER, elements_per_rank, power_law_ranks

COPY_SHARE = 0.9  # of the public bandwidth that a copy reaches
PRODUCT_SHARE = 0.7  # of the public 16-bit peak that the framework's large products reach
CACHE_BYTES = 24  # that L2 gives a multiprocessor in a clock: 6.3 TB/s on an H100; no maker's figure
LAUNCH_US = 2.0  # start and end of one kernel on the device
STAGE_CLOCKS = 480  # of a block of the layer's kernels for 64 columns or rows: copies, barrier, products
DROPOUT_CLOCKS = 470  # more with dropout
RESIDENT = 3  # such blocks on a multiprocessor, by registers and shared memory
DROPOUT_INTEGERS = 38  # integer instructions for eight columns: counted in the machine code (tests/gpu/test_cuda_build.py)
GRAM_SHARE = 0.6  # of the float32 peak in the server's Gram kernel: 256 products beside 16 loads from shared memory, and 84 to 98 % of the threads have some
MMA_SHARE = 0.5  # of the 16-bit peak that mma.sync reaches
LOSS_INSTRUCTIONS = 42  # of cross_entropy_ for a bfloat16 logit: 186 and 151 in the loops of both passes for eight, counted in the machine code of sm_87
CASTS = 0  # of float32 factors to the base's type, each way: the optimiser keeps them in it (`cast=`); 2 without

# of csrc/cuda: lora.h, lora_layer.h, gram.cu
ROWS, COLUMNS, DEPTH, SPLIT, SPLITS, CHUNK = 64, 64, 64, 1024, 8, 1024
WIDEST, BLOCKS, EXPAND_PLANES = 256, 256, 16 << 20
WIDEST_GRAM, GRAM_SPLIT = 64, 2048


@dataclass(frozen=True)
class Gpu:
    """Public figures: multiprocessors, boost clock, bandwidth, dense peaks; integer lanes of a multiprocessor."""

    name: str
    multiprocessors: int
    gigahertz: float
    gb_per_s: float
    float32_tflops: float
    bfloat16_tflops: float
    integer_lanes: int = 64


GPUS = (
    Gpu("H100", 132, 1.98, 3350, 67, 989),
    Gpu("H200", 132, 1.98, 4800, 67, 989),
    Gpu("AGX Orin", 16, 1.3, 204.8, 5.3, 42.5),
    Gpu("Orin Nano", 8, 1.02, 102, 2.09, 16.7),  # 8 GB, in the mode MAXN SUPER of JetPack 6.2
    Gpu("Thor", 20, 1.575, 273, 8.06, 258, 128),
)


@dataclass(frozen=True)
class Work:
    """What a call of a kernel has to do, whatever the device."""

    kernel: str
    launches: int
    bytes: int  # in and out of memory
    cached: int = 0  # from L2 beside them, where the model has counted it
    products: float = 0  # multiplications and additions
    pipe: str = "bfloat16"
    share: float = 1.0  # of that pipe's peak that can be had
    units: int = 0  # of eight columns under dropout
    blocks: int = 0
    stages: int = 0  # of a block, one after another

    def parts(self, gpu: Gpu) -> dict[str, float]:
        """{bound: microseconds}."""
        clocks = STAGE_CLOCKS + (DROPOUT_CLOCKS if self.units else 0)
        waves = math.ceil(self.blocks / (gpu.multiprocessors * RESIDENT))
        peak = (gpu.bfloat16_tflops if self.pipe == "bfloat16" else gpu.float32_tflops) * self.share
        return {
            "memory": self.bytes / (COPY_SHARE * gpu.gb_per_s * 1e3),
            "cache": (self.bytes + self.cached) / (CACHE_BYTES * gpu.multiprocessors * gpu.gigahertz * 1e3),
            "products": self.products / (peak * 1e6),
            "integers": self.units * DROPOUT_INTEGERS / (gpu.integer_lanes * gpu.multiprocessors * gpu.gigahertz * 1e3),
            "stages": waves * self.stages * clocks / (gpu.gigahertz * 1e3),
        }

    def microseconds(self, gpu: Gpu) -> float:
        return self.launches * LAUNCH_US + max(self.parts(gpu).values())

    def bound(self, gpu: Gpu) -> str:
        parts = self.parts(gpu)
        return max(parts, key=lambda name: parts[name])


# ---------------------------------------------------------------- the layer, bfloat16 x [T, n], float32 factors of rank r


def base_product(rows: int, n: int, m: int, adds: bool) -> Work:
    """x W^T by the framework; `adds`: onto what lies in the result."""
    return Work(
        "base product" + (", adding" if adds else ""), 1, 2 * (rows * n + n * m + (2 if adds else 1) * rows * m), products=2 * rows * n * m, share=PRODUCT_SHARE
    )


def cast(elements: int) -> Work:
    return Work("cast of a factor", 1, 6 * elements)


def splits_of(n: int) -> int:
    """Of the columns of x in shrink: of 1024, or an eighth of them in steps of 64."""
    return math.ceil(n / max(SPLIT, math.ceil(n / (SPLITS * 64)) * 64))


def columns_of_a_block(rows: int, m: int) -> int:
    """Of expand: as many as leave blocks for a whole device."""
    columns = WIDEST
    while columns > COLUMNS and math.ceil(rows / ROWS) * math.ceil(m / columns) < BLOCKS:
        columns //= 2
    return columns


def expand_adds(rows: int, n: int, m: int, rank: int) -> bool:
    """Whether expand adds the planes of shrink, instead of a launch in between."""
    columns, plane_row = columns_of_a_block(rows, m), splits_of(n) * rank * 4
    return rank <= 2 * DEPTH and (plane_row <= 2 * columns or plane_row * rows * math.ceil(m / columns) <= EXPAND_PLANES)


def shrink(rows: int, n: int, rank: int, drop: bool, then: int = 0) -> Work:
    """`then`: columns of the expand that follows."""
    splits = splits_of(n)
    blocks, stages = math.ceil(rows / ROWS) * splits, math.ceil(n / splits / DEPTH)
    own = splits > 1 and not (then and expand_adds(rows, n, then, rank))
    cached = 2 * math.ceil(rows / ROWS) * rank * n + (4 * splits * rows * rank * (1 + own) if splits > 1 else 0)
    moved = 2 * (rows * n + rank * n + rows * rank)
    name = "shrink" + (", adds its planes" if own else "")
    return Work(name, 1 + own, moved, cached, 2 * rows * n * rank, units=drop * rows * n // 8, blocks=blocks, stages=stages)


def widen(rows: int, rank: int) -> Work:
    """S of an odd rank copied to rows of whole 16 bytes, before a backward pass."""
    return Work("copy of S, rows of 16 bytes", 1, 2 * rows * (rank + math.ceil(rank / 8) * 8))


def expand(rows: int, m: int, rank: int, drop: bool, in_place: bool, shrunk_from: int = 0) -> Work:
    """`shrunk_from`: columns of the x that S comes from."""
    columns = columns_of_a_block(rows, m)
    across, tiles = math.ceil(m / columns), math.ceil(rows / ROWS)
    adds = shrunk_from > 0 and splits_of(shrunk_from) > 1 and expand_adds(rows, shrunk_from, m, rank)
    cached = across * rows * rank * (4 * splits_of(shrunk_from) if adds else 2) + 2 * tiles * rank * m
    moved = 2 * ((2 if in_place else 1) * rows * m + rows * rank + rank * m)
    stages = 1 + math.ceil(min(m, columns) / COLUMNS) * math.ceil(rank / DEPTH)
    name = "expand" + (", in place" if in_place else "") + (", adds planes" if adds else "")
    return Work(name, 1, moved, cached, 2 * rows * m * rank, units=drop * rows * m // 8, blocks=tiles * across, stages=stages)


def grouped_gram(rows: int, d: int, rank: int, drop: bool) -> Work:
    chunks = math.ceil(rows / CHUNK)
    blocks, stages = chunks * math.ceil(d / COLUMNS), math.ceil(min(rows, CHUNK) / DEPTH)
    moved = 2 * (rows * d + rows * rank) + 4 * rank * d
    cached = 2 * math.ceil(d / COLUMNS) * rows * rank + (2 * 4 * chunks * rank * d if chunks > 1 else 0)
    return Work("grouped_gram", 1 + (chunks > 1), moved, cached, 2 * rows * d * rank, units=drop * rows * d // 8, blocks=blocks, stages=stages)


def layer(rows: int, n: int, m: int, rank: int, drop: bool) -> list[Work]:
    """Every launch of a forward and a backward pass where each row has a client and every gradient is asked for."""
    casts = [cast(rank * n), cast(rank * m)] * CASTS
    forward = [shrink(rows, n, rank, drop, m), expand(rows, m, rank, False, False, n), base_product(rows, n, m, True)]
    backward = [shrink(rows, m, rank, False, n), expand(rows, n, rank, drop, False, m), base_product(rows, m, n, True)]
    grams = [replace(grouped_gram(rows, n, rank, drop), launches=1), grouped_gram(rows, m, rank, False)]  # one launch adds the planes of both
    return [*casts, *forward, *backward, *grams]


def frozen(rows: int, n: int, m: int) -> list[Work]:
    return [base_product(rows, n, m, False), base_product(rows, m, n, False)]


def total(work: Sequence[Work], gpu: Gpu) -> float:
    return sum(one.microseconds(gpu) for one in work)


# ---------------------------------------------------------------- server and optimisers: `elements` of one rank row over all modules, float32


def truncate(elements: int, ranks: Sequence[int]) -> Work:
    return Work("truncate_", 2, 4 * elements * (max(ranks) + sum(ranks)))


def aggregate(elements: int, ranks: Sequence[int]) -> Work:
    return replace(truncate(elements, ranks), kernel="aggregate_")


def accumulate(elements: int, rank: int) -> Work:
    return Work("accumulate_", 2, 4 * elements * rank * 3)


def gram_tiles(rank: int, size: int) -> tuple[int, int, int]:
    """(multiplications, rows read, elements of planes) for one column of a client's rows of `size` bytes: tiles on or above the diagonal, of squares of 8 or
    bands of 16 rows, each with the later ones and itself."""
    unit = 16 if size == 2 else 8
    tiles = math.ceil(rank / WIDEST_GRAM)
    across = math.ceil(math.ceil(rank / max(tiles, 1)) / unit)
    beside = tiles * (tiles - 1) // 2  # off the diagonal; on tensor cores two bands by two
    read = rank + beside * (math.ceil(across / 2) ** 2 * 4 if size == 2 else 2 * across) * unit
    multiplications = (tiles * across * (across + 1) // 2 + beside * across**2) * unit**2
    return multiplications, read, (tiles + beside) * (across * unit) ** 2


def gram(elements: int, ranks: Sequence[int], size: int = 4) -> Work:
    """Rows of `size` bytes: 4 for float32, which multiplies without tensor cores, 2 for the 16-bit types."""
    multiplications, read, planes = (sum(column) for column in zip(*(gram_tiles(rank, size) for rank in ranks), strict=True))
    cached = size * elements * (read - sum(ranks)) + 2 * 4 * planes * math.ceil(elements / GRAM_SPLIT)
    pipe, share = ("bfloat16", MMA_SHARE) if size == 2 else ("float32", GRAM_SHARE)
    return Work("gram", 3, size * elements * sum(ranks), cached, products=2 * elements * multiplications, pipe=pipe, share=share)


def delta_norms(elements: int, ranks: Sequence[int]) -> Work:
    """The Gram matrices of both factors, then one warp a client and module."""
    return replace(gram(elements, ranks), kernel="delta_norms", launches=4)


def quantize(elements: int, ranks: Sequence[int], bits: int) -> Work:
    """Rows in, codes and one scale a row out; the second read of a row comes from L2."""
    return Work(f"quantize_rows_, {bits} bits", 2, elements * sum(ranks) * (32 + bits) // 8)


def dequantize(elements: int, ranks: Sequence[int], bits: int) -> Work:
    return replace(quantize(elements, ranks, bits), kernel=f"dequantize_rows_, {bits} bits")


def tail_norms(elements: int, ranks: Sequence[int]) -> Work:
    return Work("tail_norms, half of each rank", 3, 4 * elements * sum(rank // 2 for rank in ranks))


def adamw(elements: int, ranks: Sequence[int]) -> Work:
    """Parameter, gradient and both moments in; parameter and moments out."""
    return Work("adamw_", 3, 7 * 4 * elements * sum(ranks))


def adamw_clipping(elements: int, ranks: Sequence[int]) -> Work:
    """With clipping and the regulariser of half of each rank: gradients, and parameters of the tail rows, once more."""
    own = adamw(elements, ranks)
    return replace(own, kernel="adamw_, clip and tail", launches=4, bytes=own.bytes + 4 * elements * (sum(ranks) + sum(rank // 2 for rank in ranks)))


def sgd(elements: int, ranks: Sequence[int]) -> Work:
    return Work("sgd_", 3, 3 * 4 * elements * sum(ranks))


def cross_entropy(rows: int, words: int, held: bool) -> Work:
    """bfloat16 logits in, slopes out in their place. `held`: L2 holds the rows in flight, so that the second pass reads none from memory.

    An instruction counts as a multiplication and an addition without tensor cores.
    """
    size, products = 2 * rows * words, 2 * LOSS_INSTRUCTIONS * rows * words
    name = f"cross_entropy_, logits again from {'L2' if held else 'memory'}"
    return Work(name, 1, (2 if held else 3) * size + 12 * rows, size if held else 0, products=products, pipe="float32")


# ---------------------------------------------------------------- tables


def layer_seconds(gpu: Gpu | None, rows: int, n: int, m: int, ranks: Sequence[int], drop: bool) -> float | None:
    """Modelled time of the layer's launches on the device, equal rows for each rank; None for a device that the model does not know."""
    return None if gpu is None else total(layer(rows, n, m, math.ceil(sum(ranks) / len(ranks)), drop), gpu) / 1e6


def gpu_named(name: str, multiprocessors: int) -> Gpu | None:
    """The device that the driver means: every Orin is "Orin" to it, and other cards than the one modelled are called H100, too."""
    words = set(name.lower().split())
    return next((gpu for gpu in GPUS if words & {*gpu.name.lower().split()} and gpu.multiprocessors == multiprocessors), None)


def gpu_of(device: torch.device) -> Gpu | None:
    properties = torch.cuda.get_device_properties(device)
    return gpu_named(properties.name, properties.multi_processor_count)


def kernel_table(rows: Sequence[tuple[str, Work]]) -> list[str]:
    lines = ["| kernel | load | launches | MB | bound, H100 | " + " | ".join(f"{gpu.name}, modelled us" for gpu in GPUS) + " | measured |"]
    lines.append("|---|---|--:|--:|---|" + "--:|" * len(GPUS) + "---|")
    for load, work in rows:
        cells = [work.kernel, load, str(work.launches), f"{work.bytes / 1e6:.1f}", work.bound(GPUS[0]), *(f"{work.microseconds(gpu):.3g}" for gpu in GPUS)]
        lines.append("| " + " | ".join(cells) + " | |")
    return lines


def rows() -> list[tuple[str, Work]]:
    """(load, kernel): each kernel of a layer at two lengths, server and client ops."""
    rows: list[tuple[str, Work]] = []
    for tokens in (8192, 2048):
        for p, drop in (("0", False), ("0.1", True)):
            load = f"T={tokens}, 4096 columns, r=16, p={p}"
            rows += [
                (load, work)
                for work in (shrink(tokens, 4096, 16, drop, 4096), expand(tokens, 4096, 16, drop, False, 4096), grouped_gram(tokens, 4096, 16, drop))
            ]
        rows += [(f"T={tokens}, 4096->4096", base_product(tokens, 4096, 4096, adds)) for adds in (False, True)]
    rows += [("T=8192, 4096 columns, r=16, p=0", expand(8192, 4096, 16, False, True)), ("16 x 4096", cast(16 * 4096))]
    rows += [("T=8192, 4096 columns, r=64, p=0", shrink(8192, 4096, 64, False, 4096)), ("T=8192, r=11", widen(8192, 11))]
    ranks, elements = [4, 8, 16, 32, 64] * 20, elements_per_rank(LLAMA_8B_ATTENTION_LAYER)
    load = "Llama-3.1-8B attention layer, 100 clients, ranks 4..64, float32"
    rows += [(load, make(elements, ranks)) for make in (truncate, aggregate, delta_norms, tail_norms, adamw, adamw_clipping, sgd)]
    rows += [(load, make(elements, ranks, bits)) for make in (quantize, dequantize) for bits in (8, 4)]
    # The Gram kernel by type and rank: what a rank pays is the squares or bands it rounds up to.
    for name, own in (("ranks 4..64", ranks), ("ranks 5..50 by a power law", power_law_ranks(100)), ("rank 39", [39] * 100), ("rank 64", [64] * 100)):
        for dtype, size in (("float32", 4), ("bfloat16", 2)):
            rows.append((load.replace("ranks 4..64, float32", f"{name}, {dtype}"), gram(elements, own, size)))
    rows.append((load.replace("100 clients, ranks 4..64", "1 client, rank 16"), accumulate(elements, 16)))
    rows += [(f"T=2048, {words} words", cross_entropy(2048, words, held)) for words, held in ((49152, True), (128256, False))]
    return rows


def table() -> list[str]:
    """The table of docs/figures/gpu.md: the kernels, and the layer's overhead."""
    lines = [*kernel_table(rows()), "", "Forward and backward of the layer over the frozen layer's, *modelled*, r = 16, p = 0.1:", ""]
    lines += [
        "| n -> m | T | launches | " + " | ".join(f"{gpu.name}, modelled" for gpu in GPUS) + " | measured |",
        "|---|--:|--:|" + "--:|" * len(GPUS) + "---|",
    ]
    for n, m in ((4096, 4096), (4096, 14336), (14336, 4096), (1536, 1536), (8960, 1536)):
        for tokens in (8192, 2048):
            own, base = layer(tokens, n, m, 16, True), frozen(tokens, n, m)
            over = [f"+{100 * (total(own, gpu) / total(base, gpu) - 1):.0f} %" for gpu in GPUS]
            lines.append(f"| {n} -> {m} | {tokens} | {sum(work.launches for work in own)} | " + " | ".join(over) + " | |")
    return lines


if __name__ == "__main__":
    print("\n".join(table()))
    sys.exit(0)
