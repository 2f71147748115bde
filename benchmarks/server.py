"""The server suite: every server and client operation on 100 and 1000 clients with ranks 5..50, against copying as many bytes in the same round."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora_kernels.ops.quantize import code_bytes

from .providers import PROVIDERS, Problem, Run
from .shapes import SERVER_SHAPES, TINY, chosen, elements_per_rank, power_law_ranks
from .steps import STEPS, step_bytes
from .timing import ENDLESS_SECONDS, interleaved, peak_extra_bytes

QUANTIZED = tuple(op for op in PROVIDERS if "quantize_rows" in op)
SHORT_CLIENTS = 32
SHORT_BFLOAT16 = ("aggregate", "truncate", "gram", "delta_norms", "adamw")  # of a quick run, which has every operation in float32
YARDSTICK_BYTES = 256 << 20  # a copy longer than this is timed on this much and scaled
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2, torch.float16: 3e-3, torch.float64: 1e-10}


@dataclass
class Case:
    op: str
    shape: str
    problem: Problem
    providers: dict[str, Callable[[Problem], Run]]
    bytes: int  # each distinct byte read once, each byte written once
    yardstick: str = "copy"  # "copy" of as many bytes, or one "read" of them
    note: str = ""


class WrongResultError(RuntimeError):
    """A provider disagrees with the reference; nothing of it is timed."""


def wanted(options: Any, device: torch.device) -> list[tuple[str, str, list[tuple[int, int]], int, torch.dtype]]:
    """(operation, name of the shapes, shapes, clients, type) of each case."""
    shapes, counts = SERVER_SHAPES, (100, 1000)
    if options.quick or options.short:
        shapes, counts = ({"tiny": TINY}, (5,)) if options.quick else (dict([list(SERVER_SHAPES.items())[-1]]), (SHORT_CLIENTS,))
    found = []
    for name, shape in shapes.items():
        for clients in counts:
            for dtype in (torch.float32, torch.bfloat16):
                ops = operations(shape, clients, dtype, options.memory_gb)
                if options.short and not options.quick and dtype == torch.bfloat16:
                    ops = [op for op in ops if op in SHORT_BFLOAT16]
                found += [(op, name, shape, clients, dtype) for op in ops if chosen(options, op, name, str(dtype).removeprefix("torch."))]
    return found


def cases(options: Any, device: torch.device) -> Iterator[Case]:
    """Made one at a time, so that only one holds its buffers."""
    for op, name, shape, clients, dtype in wanted(options, device):
        yield make_case(op, name, shape, power_law_ranks(clients), dtype, device, options.memory_gb)


def operations(shape: list[tuple[int, int]], clients: int, dtype: torch.dtype, memory_gb: float) -> list[str]:
    batch = ["aggregate", "truncate"] if fits(shape, clients, dtype, memory_gb) else []
    return [*batch, "accumulate"] + (["gram", "delta_norms", "tail_norms", *QUANTIZED, *STEPS] if clients <= 100 else [])


def upload_bytes(shape: list[tuple[int, int]], clients: int, dtype: torch.dtype) -> int:
    return sum(power_law_ranks(clients)) * elements_per_rank(shape) * dtype.itemsize


def fits(shape: list[tuple[int, int]], clients: int, dtype: torch.dtype, memory_gb: float) -> bool:
    """Whether all uploads, a result as large (truncation) and what PyTorch's forms need fit in the limit; else they are streamed."""
    return 4 * upload_bytes(shape, clients, dtype) <= memory_gb * 1e9


def make_case(op: str, name: str, shape: list[tuple[int, int]], ranks: list[int], dtype: torch.dtype, device: torch.device, memory_gb: float) -> Case:
    if op in STEPS:
        # Parameters, gradients and two moments, for this project, for PyTorch and for the reference.
        few = ranks if 16 * upload_bytes(shape, len(ranks), dtype) <= memory_gb * 1e9 else power_law_ranks(8)
        p = Problem(shape, few, dtype, device)
        return Case(op, name, p, dict(STEPS[op]), step_bytes(p, op))
    size, clients, note = dtype.itemsize, len(ranks), ""
    if op == "accumulate":
        ranks = [power_law_ranks(8)[k % 8] for k in range(clients)]
        note = f"{upload_bytes(shape, clients, dtype) / 1e9:.2f} GB of uploads one by one"
        note += "" if fits(shape, clients, dtype, memory_gb) else ": too many to hold"
    p = Problem(shape, ranks, dtype, device)
    width = sum(p.widths)
    uploads, bank = p.layout.total * width * size, p.max_rank * width * size
    moved = {"aggregate": uploads + bank, "truncate": uploads + bank, "accumulate": uploads + 2 * p.layout.total * width * 4}
    moved |= {"gram": uploads, "delta_norms": uploads, "tail_norms": sum(rank - rank // 2 for rank in ranks) * width * size}
    moved |= {op: uploads + p.layout.total * sum(code_bytes(d, 4 if "4 bits" in op else 8) + 4 for d in p.widths) for op in QUANTIZED}
    return Case(op, name, p, PROVIDERS[op], moved[op], "read" if op in ("gram", "delta_norms", "tail_norms") else "copy", note)


def check(case: Case, name: str, run: Run, truth: list[Tensor]) -> None:
    work, result = run
    work()
    for position, (own, true) in enumerate(zip(result(), truth, strict=True)):
        error = (own.double().reshape(-1) - true.double().reshape(-1)).norm() / true.double().norm().clamp_min(1e-30)
        if not bool(error <= TOLERANCE[case.problem.dtype]):
            raise WrongResultError(f"{name}: {case.op} on {case.shape}, {case.problem.dtype}: tensor {position} is off by {float(error):.2e}; nothing is timed")


def on_rungs(case: Case, rungs: Sequence[str] | None) -> dict[str, Callable[[Problem], Run]]:
    """The case's providers, this project's once for each of the rungs; None: on the rung in use, and its name is not said."""
    if not rungs:
        return case.providers
    found = {}
    for name, make in case.providers.items():
        of = {f"{name} {rung}": partial(_forced, make, rung) for rung in rungs} if name.startswith("hetlora") else {name: make}
        found |= of
    return found


def _forced(make: Callable[[Problem], Run], rung: str, problem: Problem) -> Run:
    with hk.use_backend(rung):
        work, result = make(problem)

    def forced() -> None:
        with hk.use_backend(rung):
            work()

    return forced, result


def reference_result(case: Case) -> list[Tensor]:
    with hk.use_backend("reference"):
        work, result = next(iter(case.providers.values()))(case.problem)
        work()
        return [t.clone() for t in result()]


def yardsticks(case: Case, device: torch.device) -> tuple[Callable[[], object], float]:
    """(copy or read of the case's bytes, or of a part of them, how many times the part fits)."""
    length = max(1024, min(case.bytes, YARDSTICK_BYTES) // 4)
    if case.yardstick == "read":
        flat = torch.ones(length, device=device)
        return flat.sum, case.bytes / (4 * length)
    source = torch.ones(length // 2, device=device)
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), case.bytes / (8 * (length // 2))


def measure(case: Case, options: Any, device: torch.device, threads: int) -> list[dict[str, Any]]:
    """One record for each provider and the yardstick; `WrongResultError` before anything is timed when one is wrong."""
    torch.set_num_threads(threads)
    truth = reference_result(case)
    runs: dict[str, Run] = {name: make(case.problem) for name, make in on_rungs(case, options.rungs).items()}
    for name, run in runs.items():
        check(case, name, run, truth)
    del truth
    yardstick, scale = yardsticks(case, device)
    works = {case.yardstick: yardstick} | {name: work for name, (work, _) in runs.items()}
    timings = interleaved(works, case.yardstick, device, options.seconds, how=options.how)
    records = []
    for name, timing in timings.items():
        own = scale if name == case.yardstick else 1.0
        record = {"op": case.op, "shape": case.shape, "clients": len(case.problem.ranks), "dtype": str(case.problem.dtype).removeprefix("torch.")}
        record |= {"threads": threads, "provider": name, "yardstick": case.yardstick, "bytes": case.bytes, "note": case.note}
        record |= timing.figures(case.bytes, own) | {"ratio": timing.ratio * own / scale}
        endless = timing.median > ENDLESS_SECONDS
        record["peak_extra_bytes"] = None if name == case.yardstick or endless else peak_extra_bytes(works[name], device)
        records.append(record)
    return records
