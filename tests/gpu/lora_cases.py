"""Calls of the LoRA layer and of the three ops it is made of, judged as in cases.py: shared by the Triton and the CUDA tests.

Each shape is ranks, rows per client, base-only rows and one width. `gathered` deals the rows out at random, so that the ops get an `index`; dropout comes
with seeds over 64 bits and row keys of distant sequences.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from cases import Case, _generator
from torch import Tensor

from hetlora_kernels import Segments
from hetlora_kernels.reference import compute_dtype

DROP = 0.3
LORA_SHAPES: dict[str, dict[str, Any]] = {
    # Empty and one-token segments, a client of rank 0 with rows, more ranks than segments, a width that is a multiple of nothing.
    "small": {"ranks": [4, 0, 1, 7, 16, 3, 2], "lengths": [5, 3, 0, 17, 1, 9], "base": 2, "width": 37},
    # Every compute bucket, one past it, 2^k + 1 rows, more than one tile of rows and of columns.
    "mixed": {"ranks": [16, 0, 7, 64, 3, 128, 17, 1], "lengths": [65, 2, 33, 129, 1, 17, 5, 0], "base": 3, "width": 203},
    # Rows that start at multiples of 16 bytes: the wide accesses.
    "aligned": {"ranks": [8, 3, 32], "lengths": [33, 70, 2], "base": 1, "width": 160},
    # A rank beyond the largest bucket, and a segment of several chunks of rows.
    "long": {"ranks": [150, 5], "lengths": [3, 1100], "base": 0, "width": 40},
    # More ranks than the kernel for S B keeps of S, over several tiles of columns.
    "streamed": {"ranks": [150, 5], "lengths": [3, 330], "base": 0, "width": 136},
    # More columns than one split of shrink has, with a last one that is short and rows that are not aligned.
    "wide": {"ranks": [3, 18], "lengths": [2, 66], "base": 1, "width": 2051},
    # No base-only rows: what is gathered is all there is.
    "covered": {"ranks": [5, 16, 2], "lengths": [9, 4, 20], "base": 0, "width": 24},
    "narrow": {"ranks": [3, 2], "lengths": [2, 7], "base": 1, "width": 1},
    "base-only": {"ranks": [3, 0], "lengths": [0, 2], "base": 2, "width": 9},
    "no-rows": {"ranks": [3, 2], "lengths": [0, 0], "base": 0, "width": 9},
    "no-ranks": {"ranks": [0, 0], "lengths": [2, 1], "base": 0, "width": 9},
}


def _draw(seed: int, rows: int, columns: int, dtype: torch.dtype, std: float = 1.0) -> Tensor:
    return (torch.randn(rows, columns, generator=_generator(seed), dtype=torch.float64) * std).to(dtype)


def _transposed(t: Tensor) -> Tensor:
    """The same values as PEFT holds them: the transpose of a contiguous [width, rank]."""
    return t.t().contiguous().t()


def segments(shape: Mapping[str, Any], gathered: bool) -> Segments:
    """Rows in order of the clients, the base-only ones after the first client; or every row anywhere."""
    lengths, base = shape["lengths"], shape["base"]
    ids = [k for k, length in enumerate(lengths) for _ in range(length)]
    ids[lengths[0] : lengths[0]] = [-1] * base
    if gathered:
        ids = [ids[i] for i in torch.randperm(len(ids), generator=_generator(31)).tolist()]
    keys = torch.arange(len(ids)) % 5 * (2**20 + 2**33) + torch.arange(len(ids)) // 5 - 2
    return Segments.from_ids(ids, row_keys=keys, num_clients=len(lengths))


def _segment_args(shape: Mapping[str, Any], gathered: bool, drop: bool) -> list[Any]:
    seg, device = segments(shape, gathered), torch.device("cpu")
    seeds = [(-1) ** k * (0x1234567890ABCDEF + 7919 * k) for k in range(len(shape["ranks"]))]
    drawn = [torch.tensor(seeds), seg.keys_on(device)] if drop else [None, None]
    return [*drawn, seg.index_on(device), shape["ranks"], seg.starts, seg.lengths, DROP if drop else 0.0]


def _layer_args(shape: Mapping[str, Any], gathered: bool, drop: bool) -> list[Any]:
    """The same as the layer's two ops take them, without `transposed`."""
    *own, ranks, starts, lengths, p = _segment_args(shape, gathered, drop)
    absent = [0] * (len(ranks) - len(lengths))
    return [*own, [_rows_of_x(shape), *ranks, *starts, *absent, *lengths, *absent], p]


def _rows_of_x(shape: Mapping[str, Any]) -> int:
    return sum(shape["lengths"]) + shape["base"]


def _packed(shape: Mapping[str, Any]) -> int:
    return sum(rank * length for rank, length in zip(shape["ranks"], shape["lengths"], strict=False))


def shrink(shape: Mapping[str, Any], gathered: bool, drop: bool, factors: torch.dtype | None, peft: bool, dtype: torch.dtype) -> tuple[str, list[Any]]:
    x = _draw(41, _rows_of_x(shape), shape["width"], dtype)
    rows = _draw(42, sum(shape["ranks"]), shape["width"], factors or dtype, shape["width"] ** -0.5)
    scale = torch.linspace(0.5, 2.0, len(shape["ranks"]), dtype=torch.float64).to(compute_dtype(dtype))
    return "shrink", [x, _transposed(rows) if peft else rows, scale, *_segment_args(shape, gathered, drop)]


def expand(
    shape: Mapping[str, Any], gathered: bool, drop: bool, factors: torch.dtype | None, peft: bool, target: torch.dtype | None, dtype: torch.dtype
) -> tuple[str, list[Any]]:
    out = _draw(43, _rows_of_x(shape), shape["width"], target or dtype)
    s = _draw(44, 1, _packed(shape), dtype)[0]
    rows = _draw(45, sum(shape["ranks"]), shape["width"], factors or dtype, 0.5)
    return "expand_", [out, s, _transposed(rows) if peft else rows, *_segment_args(shape, gathered, drop)]


def grouped_gram(shape: Mapping[str, Any], gathered: bool, drop: bool, result: torch.dtype | None, dtype: torch.dtype) -> tuple[str, list[Any]]:
    s, x = _draw(46, 1, _packed(shape), dtype)[0], _draw(47, _rows_of_x(shape), shape["width"], dtype)
    return "grouped_gram", [s, x, *_segment_args(shape, gathered, drop), result or dtype]


def forward(shape: Mapping[str, Any], gathered: bool, drop: bool, kind: str, dtype: torch.dtype) -> tuple[str, list[Any]]:
    """kind: "bias", "no-bias" or "base" (the output of another layer, in float32). Where rows are gathered B goes in as PEFT keeps it, else its transpose."""
    rows, n, m, total = _rows_of_x(shape), shape["width"], shape["width"] + 13, sum(shape["ranks"])
    scale = torch.linspace(0.5, 2.0, len(shape["ranks"]), dtype=torch.float64).to(compute_dtype(dtype))
    base = _draw(48, rows, m, torch.float32) if kind == "base" else None
    weight, bias = (_draw(49, m, n, dtype, n**-0.5), _draw(50, 1, m, dtype)[0]) if base is None else (None, None)
    bt = _transposed(_draw(52, total, m, dtype, 0.5))
    factors = (_draw(51, total, n, torch.float32, n**-0.5), bt.t() if gathered else bt, scale)
    call = [_draw(53, rows, n, dtype), weight, None if kind == "no-bias" else bias, base, *factors, *_layer_args(shape, gathered, drop)]
    return "lora_forward", [*call, gathered]


def backward(shape: Mapping[str, Any], gathered: bool, drop: bool, frozen: bool, dtype: torch.dtype) -> tuple[str, list[Any]]:
    """`frozen`: with the frozen weight, else the LoRA term alone."""
    rows, n, m, total = _rows_of_x(shape), shape["width"], shape["width"] + 13, sum(shape["ranks"])
    scale = torch.linspace(0.5, 2.0, len(shape["ranks"]), dtype=torch.float64).to(compute_dtype(dtype))
    weight = _draw(54, m, n, dtype, m**-0.5) if frozen else None
    bt = _transposed(_draw(56, total, m, dtype, 0.5))
    factors = (_draw(55, total, n, torch.float32, n**-0.5), bt.t() if gathered else bt, _draw(57, 1, _packed(shape), dtype)[0], scale)
    call = [_draw(58, rows, m, dtype), _draw(59, rows, n, dtype), weight, *factors, *_layer_args(shape, gathered, drop)]
    return "lora_backward", [*call, gathered, True, True, True, torch.float32, dtype]


def layer_cases(shape: Mapping[str, Any]) -> dict[str, Case]:
    """The whole layer, for rungs that have `lora_forward` and `lora_backward`."""
    every: dict[str, Case] = {}
    for where, gathered in (("", False), ("-gathered", True)):
        for kind in ("bias", "no-bias", "base"):
            every[f"forward-{kind}{where}"] = partial(forward, shape, gathered, gathered, kind)
        every[f"backward{where}"] = partial(backward, shape, gathered, not gathered, True)
        every[f"backward-base{where}"] = partial(backward, shape, gathered, not gathered, False)
    return every


def lora_cases(shape: Mapping[str, Any]) -> dict[str, Case]:
    """The three ops with each of their options at least once."""
    every: dict[str, Case] = {}
    for where, gathered in (("", False), ("-gathered", True)):
        for how, drop in (("", False), ("-drop", True)):
            every[f"shrink{where}{how}"] = partial(shrink, shape, gathered, drop, None, False)
            every[f"expand{where}{how}"] = partial(expand, shape, gathered, drop, None, False, None)
            every[f"grouped_gram{where}{how}"] = partial(grouped_gram, shape, gathered, drop, None)
    every["shrink-float32-factors"] = partial(shrink, shape, False, True, torch.float32, False)
    every["shrink-peft-strides"] = partial(shrink, shape, True, False, None, True)
    every["expand-float32-factors"] = partial(expand, shape, False, True, torch.float32, False, None)
    every["expand-peft-strides"] = partial(expand, shape, True, False, None, True, None)
    every["expand-float32-out"] = partial(expand, shape, True, False, None, False, torch.float32)
    every["grouped_gram-float32-result"] = partial(grouped_gram, shape, True, True, torch.float32)
    return every
