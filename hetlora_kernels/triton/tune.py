"""`hetlora tune`, or python -m hetlora_kernels.triton.tune: measure this device's launch parameters of the layer's kernels and its fastest way through it.

Every candidate's result is checked before it is timed. The file goes into the package's params folder, or, when that cannot be written, to
`_common.user_params()`; it is read from either place from the next process on. Kernels and types not measured here keep the untuned defaults.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product as cartesian
from math import log
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from hetlora_kernels import reference
from hetlora_kernels.reference import compute_dtype
from hetlora_kernels.triton import lora
from hetlora_kernels.triton._common import PARAMS, device_params, params_file, user_params
from hetlora_kernels.triton.expand import expand_
from hetlora_kernels.triton.grouped_gram import grouped_gram
from hetlora_kernels.triton.shrink import shrink

Bench = Callable[[Callable[[], Any]], float]
"""Milliseconds of a call."""

DTYPES = (torch.bfloat16, torch.float32)
RANKS = (4, 8, 16, 32, 64, 16, 8, 64)
SHAPES = ((2048, 1536), (8192, 4096))  # rows of the batch, width
# (rows), (depth, width): the linears of SmolLM2-135M, Qwen2.5-1.5B and Llama-3.1-8B
LAYER_ROWS = (512, 2048, 8192)
LAYER_SHAPES = ((576, 576), (576, 1536), (1536, 1536), (1536, 8960), (8960, 1536), (4096, 4096), (4096, 14336), (14336, 4096))


def candidates(kernel: str, dtype: torch.dtype) -> Iterator[dict[str, int]]:
    """Settings worth a try; what a device's shared memory or registers refuse is left out when it is tried."""
    half = dtype != torch.float32
    if kernel == "shrink":
        for rows, depth, warps, stages in cartesian((16, 32, 64) if half else (16, 32), (32, 64, 128) if half else (16, 32), (4, 8), (2, 3, 4)):
            yield {"ROWS": rows, "DEPTH": depth, "num_warps": warps, "num_stages": stages}
    elif kernel == "expand":
        for rows, columns, warps in cartesian((16, 32, 64) if half else (16, 32), (64, 128, 256) if half else (32, 64), (4, 8)):
            yield {"ROWS": rows, "COLUMNS": columns, "DEPTH": 32 if half else 16, "num_warps": warps, "num_stages": 2}
    elif kernel == "grouped_gram":
        for split, columns, depth, warps in cartesian((512, 1024, 2048), (64, 128) if half else (32,), (32, 64) if half else (16,), (4, 8)):
            yield {"SPLIT": split, "COLUMNS": columns, "DEPTH": depth, "num_warps": warps, "num_stages": 3 if half else 2}
    elif half:  # in float32 the BLAS library's product is out of reach
        for rows, columns, depth, warps, stages in cartesian((64, 128), (128, 256), (32, 64), (4, 8), (3, 4)):
            yield {"ROWS": rows, "COLUMNS": columns, "DEPTH": depth, "RANK": 16, "GROUP": 8, "num_warps": warps, "num_stages": stages}


def _batch(rows: int, device: torch.device) -> tuple[Any, ...]:
    """(seeds, row_keys, index, ranks, starts, lengths, dropout) of eight clients with as many rows each, with dropout."""
    length = rows // len(RANKS)
    starts = [k * length for k in range(len(RANKS))]
    keys = torch.arange(rows, device=device)
    return torch.arange(len(RANKS), device=device), keys, None, list(RANKS), starts, [length] * len(RANKS), 0.1


def _draw(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device, dtype=torch.float32).to(dtype)


def calls(kernel: str, dtype: torch.dtype, rows: int, width: int, device: torch.device) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """(the kernel, the reference in plain PyTorch), both returning the result of one call on the same data."""
    batch = _batch(rows, device)
    x, factors = _draw(device, dtype, rows, width), _draw(device, dtype, sum(RANKS), width) * width**-0.5
    s = _draw(device, dtype, sum(r * n for r, n in zip(RANKS, batch[5], strict=True)))
    scale = torch.ones(len(RANKS), device=device, dtype=compute_dtype(dtype))
    if kernel == "shrink":
        return lambda: shrink(x, factors, scale, *batch), lambda: reference.shrink(x, factors, scale, *batch)
    if kernel == "grouped_gram":
        gram = (s, x, *batch, torch.float32)
        return partial(grouped_gram, *gram), partial(reference.grouped_gram, *gram)
    plain = (None, None, *batch[2:6], 0.0)
    if kernel == "fused":
        weight = _draw(device, dtype, width, width) * width**-0.5
        return lambda: lora.product(x, weight.t(), None, "fused", s, factors, *plain), lambda: _added(x @ weight.t(), s, factors, plain, reference.expand_)
    return lambda: _added(x, s, factors, batch, expand_), lambda: _added(x, s, factors, batch, reference.expand_)


def _added(out: Tensor, s: Tensor, factors: Tensor, batch: tuple, run: Callable) -> Tensor:
    target = out.clone()
    run(target, s, factors, *batch)
    return target


def _agrees(got: Tensor, expected: Tensor, dtype: torch.dtype) -> bool:
    """A wrong tile is far outside this; rounding is far inside."""
    return float((got.double() - expected.double()).norm()) <= 8 * torch.finfo(dtype).eps * float(expected.double().norm())


def best(kernel: str, dtype: torch.dtype, device: torch.device, shapes: tuple, bench: Bench, say: Callable[[str], None]) -> dict[str, int] | None:
    """The candidate with the smallest geometric mean of times over `shapes`; None when there are no candidates. `RuntimeError` when none is right."""
    name = kernel if dtype != torch.float32 else f"{kernel}_float32"
    tables, options = device_params(device), list(candidates(kernel, dtype))
    before, times = tables[name], {}
    checked = [calls(kernel, dtype, rows, width, device) for rows, width in shapes]
    truths = [own() for _, own in checked] if options else []
    for number, option in enumerate(options):
        tables[name] = option
        try:
            if all(_agrees(run(), truth, dtype) for (run, _), truth in zip(checked, truths, strict=True)):
                times[number] = sum(log(bench(run)) for run, _ in checked)
            else:
                say(f"{name} {option}: wrong result, left out")
        except (RuntimeError, triton.runtime.errors.OutOfResources, triton.compiler.CompilationError) as error:
            say(f"{name} {option}: left out ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})")
    tables[name] = before
    if options and not times:
        raise RuntimeError(f"{name}: no candidate gave a right result on {device}")
    return options[min(times, key=lambda number: times[number])] if times else None


def ways(dtype: torch.dtype, device: torch.device, rows: tuple, shapes: tuple, bench: Bench) -> list[dict[str, Any]]:
    """For each shape of a layer's product the milliseconds of each way and the fastest."""
    found = []
    for count, (depth, width) in cartesian(rows, shapes):
        x, weight, bias = _draw(device, dtype, count, depth), _draw(device, dtype, width, depth), _draw(device, dtype, width)
        factors, batch = _draw(device, dtype, sum(RANKS), width), _batch(count, device)
        s = _draw(device, dtype, sum(r * n for r, n in zip(RANKS, batch[5], strict=True)))
        plain = (None, None, *batch[2:6], 0.0)
        times = {way: bench(partial(lora.product, x, weight.t(), bias, way, s, factors, *plain)) for way in lora.WAYS}
        fastest = min(times, key=lambda way: times[way])
        found.append({"dtype": lora.type_name(dtype), "rows": count, "depth": depth, "width": width, "way": fastest, "ms": times})
    return found


def measure(device: torch.device, bench: Bench, say: Callable[[str], None], shapes: tuple = SHAPES, rows: tuple = LAYER_ROWS, layers: tuple = LAYER_SHAPES):
    """{"kernels": ..., "layer": ...} of `device`, as a file in params/ has them."""
    tables, kernels = device_params(device), {}
    for dtype, kernel in cartesian(DTYPES, ("shrink", "expand", "grouped_gram", "fused")):
        setting = best(kernel, dtype, device, shapes, bench, say)
        if setting is not None:
            name = kernel if dtype != torch.float32 else f"{kernel}_float32"
            tables[name] = kernels[name] = setting
            say(f"{name}: {setting}")
    measured = [entry for dtype in (torch.bfloat16, torch.float16, torch.float32) for entry in ways(dtype, device, rows, layers, bench)]
    for entry in measured:
        say(f"{entry['dtype']} {entry['rows']} x {entry['depth']} x {entry['width']}: {entry['way']} {entry['ms']}")
    return {"kernels": kernels, "layer": {"rule": "nearest measured shape", "default": tables["layer"]["default"], "measured": measured}}


def target_file(device_name: str) -> Path:
    """The file that will be read: the user's where there is one already or the package's folder cannot be written."""
    own = user_params() / params_file(device_name)
    return own if own.exists() or not os.access(PARAMS, os.W_OK) else PARAMS / params_file(device_name)


def tune(say: Callable[[str], None] = print) -> Path:
    """Measure the current CUDA device and write its file; returns the path. `OSError` where there is no CUDA device."""
    if not torch.cuda.is_available():
        raise OSError("tune: expected a CUDA device to measure on, found none; the untuned defaults stay in use")
    device = torch.device("cuda", torch.cuda.current_device())
    name = torch.cuda.get_device_name(device)

    def bench(run: Callable[[], Any]) -> float:
        return float(triton.testing.do_bench(run, return_mode="median"))

    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    content = {"tuned": True, "device": name, **versions, **measure(device, bench, say)}
    path = target_file(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return path


def main() -> int:
    try:
        print(f"written: {tune()}")
    except OSError as error:
        print(f"hetlora: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
