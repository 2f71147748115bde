"""What `fold` takes: the exact merge of a server, and a client's layer with A frozen. `python -m benchmarks.fold`.

Merge: the attention projections of one layer and a round of 100 clients, by default. Beside `fold` (the bank and every client's fresh rows) the sum that
FlexLoRA and the other merges by SVD truncate (every client's own rows). The result is checked on the stacks before a figure is printed. Modelled: operations
at the rate of a product on this machine, and what an SVD reads. A GPU's floor is the same by its maker's figures.
Layer: forward and backward of one layer for clients of mixed ranks in one batch. Once with both factors trained, once with B alone, whose backward pass leaves
out A's Gram product, and once with B alone over twice the rows, as `fold` has them. The first two agree in the gradients of x and B. Rounds are in turns.
One thread. Times are those of its processor.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora import fold
from hetlora.low_rank import best_rank

from . import lora, model
from .shapes import LLAMA_8B_ATTENTION_LAYER, power_law_ranks

KINDS = ("fold", "recon-svd")
WIDTHS = (128, 576, 1536)
LOADS = ((1024, (16,) * 8), (1024, (4, 8, 16, 32, 64, 4, 8, 16)))  # rows of x, ranks of the clients
SVD_OPERATIONS = 12  # times n^3: 8/3 for the bidiagonal form, 8/3 for each side's vectors by divide and conquer, 2 for each side's reflections
SVD_BYTES = 16 / 3  # times n^3: for its bidiagonal form what is left of the core is read twice for each column
FROZEN, BOTH, ALONE, TWICE = "frozen layer", "A and B", "B alone", "B alone, twice the rows"
FLOAT64_TFLOPS = {"H100": 67, "H200": 67}  # of the makers' public figures, tensor cores


# ---------------------------------------------------------------- the merge


def parts_of(kind: str, m: int, n: int, ranks: Sequence[int], rank: int) -> int:
    """S, the rank-1 parts of the sum: rows of every client, and for fold those of the bank."""
    if kind != "fold":
        return sum(ranks)
    return rank + sum(fold.fresh_ranks({"": ranks}, {"": (m, n)})[""])


def operations(m: int, n: int, parts: int, rank: int) -> tuple[dict[str, float], float]:
    """({step: multiplications and additions}, bytes that the SVD reads) of `low_rank.best_rank` for one module."""
    counts = {"QR": 0.0, "core": 0.0, "back": 0.0}
    sides = []
    for width in (m, n):
        small = parts < width
        sides.append(parts if small else width)
        if small:  # R by Householder reflections, then Q of them
            counts["QR"] += 2 * (2 * width * parts**2 - 2 / 3 * parts**3)
            counts["back"] += 2.0 * width * parts * rank
    short, long = sorted(sides)
    counts["core"] = 2.0 * short * long * parts
    counts["SVD"] = SVD_OPERATIONS * short**3 + (8.0 * long * short**2 if long > short else 0.0)  # a QR first where the core is no square
    return counts, SVD_BYTES * short**3


def stacks_of(kind: str, shapes: Sequence[tuple[int, int]], ranks: Sequence[int], rank: int) -> list[tuple[Tensor, Tensor]]:
    """(x [S, m], y [S, n]) in float32 of each module."""
    draw = torch.Generator().manual_seed(0)
    found = []
    for m, n in shapes:
        parts = parts_of(kind, m, n, ranks, rank)
        found.append((torch.randn(parts, m, generator=draw), torch.randn(parts, n, generator=draw) / n**0.5))
    return found


def check_merge(stack: tuple[Tensor, Tensor], bt: Tensor, a: Tensor) -> None:
    """With U and V the unit rows of B^T and A, U M V^T is diag(s), s the product of their norms; M = x^T y, float32 factors."""
    x, y = (side.double() for side in stack)
    u, v = (torch.nn.functional.normalize(side.double(), dim=1) for side in (bt, a))
    core, norms = (u @ x.mT) @ (y @ v.mT), bt.double().norm(dim=1) * a.double().norm(dim=1)
    off = float((core - norms.diag()).norm() / norms.norm())
    if not off <= 16 * torch.finfo(torch.float32).eps * len(bt) ** 0.5:
        raise SystemExit(f"the merge's rows are no singular vectors of the sum, off by {off:.1e}; nothing is printed")


def rates(width: int) -> tuple[float, float]:
    """(operations a second of a float64 product, bytes a second of a sum) of `width` x `width` matrices, the best of three."""
    one, other = (torch.randn(width, width, dtype=torch.float64) for _ in range(2))
    return max(2 * width**3 / seconds(lambda: one @ other) for _ in range(3)), max(one.nbytes / seconds(one.sum) for _ in range(3))


def merges(shapes: Sequence[tuple[int, int]], clients: int, rank: int) -> list[str]:
    """A line for each kind of merge and shape; modules of one shape go through together."""
    ranks = power_law_ranks(clients)
    rate, reading = rates(max(map(max, shapes)) // 2)
    head = ["merge", "modules", "m x n", "S", "operations, 1e9 (QR, core, SVD, back)", "measured", "modelled", "measured / modelled"]
    gpus = [gpu for gpu in model.GPUS if gpu.name in FLOAT64_TFLOPS]
    lines = [f"{clients} clients, ranks {min(ranks)} to {max(ranks)}, {sum(ranks)} in all; bank of rank {rank}."]
    lines += [f"Float64 products at {rate / 1e9:.3g} GFLOP/s, reading at {reading / 1e9:.3g} GB/s.\n"]
    lines += [f"| {' | '.join([*head, *(f'{gpu.name}, at least' for gpu in gpus)])} |", f"|---|{'--:|' * (len(head) + len(gpus) - 1)}"]
    for kind in KINDS:
        for shape in dict.fromkeys(shapes):
            own = [one for one in shapes if one == shape]
            stacks = stacks_of(kind, own, ranks, rank)
            start = time.thread_time()
            merged = best_rank(stacks, rank)
            taken = time.thread_time() - start
            for stack, (bt, a) in zip(stacks, merged, strict=True):
                check_merge(stack, bt, a)
            counts, read = operations(*shape, len(stacks[0][0]), rank)
            every = sum(counts.values())
            modelled = len(own) * (every / rate + read / reading)
            floors = [len(own) * (every / (1e12 * FLOAT64_TFLOPS[gpu.name]) + read / (1e9 * gpu.gb_per_s)) for gpu in gpus]
            steps = ", ".join(f"{counts[step] / 1e9:.3g}" for step in ("QR", "core", "SVD", "back"))
            cells = [kind, str(len(own)), f"{shape[0]} x {shape[1]}", str(len(stacks[0][0])), f"{every / 1e9:.3g} ({steps})"]
            cells += [f"{taken:.3g} s", f"{modelled:.3g} s", f"{taken / modelled:.2f}", *(f"{1e3 * floor:.2g} ms" for floor in floors)]
            lines.append(f"| {' | '.join(cells)} |")
    return lines


# ---------------------------------------------------------------- the layer


def layer_of(width: int, rows: int, ranks: Sequence[int]) -> dict[str, Callable[[], object]]:
    """Forward and backward of the layer: without adapters, with both factors trained, with B alone, and with B alone over twice the rows."""
    rung = hk.backends("cpu")["lora_forward"][0]
    runs: dict[str, Callable[[], object]] = {}
    grads = []
    for trained, own in ((BOTH, ranks), (ALONE, ranks), (TWICE, [2 * rank for rank in ranks])):
        problem = lora.Problem(width, width, rows, list(own), torch.float32, torch.device("cpu"))
        problem.a.requires_grad_(trained == BOTH)
        runs[trained], results = lora.ours(problem, rung)
        runs[trained]()
        d_x, d_a, d_bt = results()
        assert (d_a is None) == (trained != BOTH)
        grads.append((d_x.clone(), d_bt.clone()))
    if not all(torch.equal(one, other) for one, other in zip(*grads[:2], strict=True)):
        raise SystemExit(f"{width} x {width}: the gradients of x and B depend on whether A is trained; nothing is printed")
    return {FROZEN: lora.frozen(problem), **runs}


def layers(widths: Sequence[int], rounds: int) -> list[str]:
    """A line for each width and load."""
    head = ["m = n", "rows", "ranks", FROZEN, BOTH, ALONE, TWICE, f"{ALONE} / {BOTH} (quartiles)", "of what LoRA adds"]
    lines = [f"| {' | '.join(head)} |", f"|{'--:|' * len(head)}"]
    for width in widths:
        for rows, ranks in LOADS:
            runs = layer_of(width, rows, ranks)
            times: dict[str, list[float]] = {name: [] for name in runs}
            for turn in range(rounds + 1):
                for name in runs if turn % 2 else reversed(runs):
                    times[name].append(seconds(runs[name]))
            own = {name: values[1:] for name, values in times.items()}
            low, middle, high = statistics.quantiles((b / a for b, a in zip(own[ALONE], own[BOTH], strict=True)), n=4)
            medians = {name: statistics.median(values) for name, values in own.items()}
            saved = (medians[ALONE] - medians[BOTH]) / (medians[BOTH] - medians[FROZEN])
            cells = [str(width), str(rows), ", ".join(map(str, ranks)), *(f"{1e3 * value:.3g} ms" for value in medians.values())]
            lines.append(f"| {' | '.join([*cells, f'{middle:.2f} ({low:.2f} to {high:.2f})', f'{saved:+.0%}'])} |")
    return lines


def seconds(run: Callable[[], object]) -> float:
    """Of the thread's processor, for one call."""
    start = time.thread_time()
    run()
    return time.thread_time() - start


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(description="Time of fold's merge on the server, and of a client's layer with A frozen.")
    options.add_argument("--clients", type=int, default=100, help="of a round (default 100)")
    options.add_argument("--rank", type=int, default=50, help="of the bank (default 50)")
    options.add_argument("--shrink", type=int, default=1, help="divide all widths by this (default 1)")
    options.add_argument("--rounds", type=int, default=21, help="of the layer's pairs (default 21)")
    options.add_argument("--only", choices=["merge", "layer"], help="(default both)")
    chosen = options.parse_args(argv)
    torch.set_num_threads(1)
    print(f"one thread, torch {torch.__version__}\n")
    if chosen.only != "layer":
        shapes = [(m // chosen.shrink, n // chosen.shrink) for m, n in LLAMA_8B_ATTENTION_LAYER]
        print("\n".join(merges(shapes, chosen.clients, chosen.rank)), "\n", flush=True)
    if chosen.only != "merge":
        print("\n".join(layers([width // chosen.shrink for width in WIDTHS], chosen.rounds)), flush=True)


if __name__ == "__main__":
    main()
