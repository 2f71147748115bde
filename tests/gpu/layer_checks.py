"""What lora_cases.py does not ask of the CUDA kernels: the whole layer, tables too large for kernel arguments, the mask bit by bit, bits that batch mates
must not change. A check is a function of (ops, type) that returns None or what is wrong; it raises nothing."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from cases import failures
from lora_cases import LORA_SHAPES, _draw, _rows_of_x, _segment_args, _transposed, grouped_gram, shrink

from hetlora_kernels.reference import compute_dtype, keep_mask

Check = Callable[[Mapping[str, Callable], torch.dtype], str | None]

# More clients with work than a launch carries in its arguments.
MANY = {"ranks": [1 + k % 3 for k in range(70)], "lengths": [1 + k % 2 for k in range(70)], "base": 1, "width": 24}
# Every row has a LoRA term, so that the layer may start from it.
COVERED = {"ranks": [4, 9, 16], "lengths": [5, 66, 1], "base": 0, "width": 40}
OUT = 24  # columns of the layer's output


def _layer_args(shape: Mapping[str, Any], gathered: bool, drop: bool, on_base: bool, dtype: torch.dtype) -> list[Any]:
    """x, weight, bias, base, a, bt, scale and the segments' arguments; factors in float32, as PEFT keeps them, Bt as a transposed view."""
    rows, n, total = _rows_of_x(shape), shape["width"], sum(shape["ranks"])
    wide = compute_dtype(dtype)
    x, weight, bias = _draw(51, rows, n, dtype), _draw(52, OUT, n, dtype, n**-0.5), _draw(53, 1, OUT, dtype)[0]
    base = _draw(54, rows, OUT, dtype) if on_base else None
    a, bt = _draw(55, total, n, wide, n**-0.5), _transposed(_draw(56, total, OUT, dtype, 0.5))
    scale = torch.linspace(0.5, 2.0, len(shape["ranks"]), dtype=torch.float64).to(wide)
    linear = [None, None, base] if on_base else [weight, bias, None]
    return [x, *linear, a, bt, scale, *_segment_args(shape, gathered, drop)]


def forward(shape: Mapping[str, Any], gathered: bool, drop: bool, on_base: bool, dtype: torch.dtype) -> tuple[str, list[Any]]:
    return "lora_forward", _layer_args(shape, gathered, drop, on_base, dtype)


def backward(shape: Mapping[str, Any], gathered: bool, drop: bool, on_base: bool, dtype: torch.dtype) -> tuple[str, list[Any]]:
    x, weight, _, _, a, bt, *rest = _layer_args(shape, gathered, drop, on_base, dtype)
    packed = sum(rank * length for rank, length in zip(shape["ranks"], shape["lengths"], strict=False))
    d_y, s = _draw(57, _rows_of_x(shape), OUT, dtype), _draw(58, 1, packed, dtype)[0]
    return "lora_backward", [d_y, x, weight, a, bt, s, *rest, True, True, True]


def mask(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """The kept elements of each op are those of reference.keep_mask, seen through ones and an identity."""
    rows, width, p = 70, 37, 0.3
    seeds, keys = torch.tensor([-0x1234567890ABCDEF]), torch.arange(rows) * (2**33 + 7) - 3
    expected = keep_mask(seeds[0], keys, width, p)
    segments = [seeds, keys, None, [width], [0], [rows], p]
    ones, eye, wide = torch.ones(rows, width, dtype=dtype), torch.eye(width, dtype=dtype), compute_dtype(dtype)
    seen = {"shrink": ops["shrink"](ones, eye, torch.ones(1, dtype=wide), *segments).view(rows, width)}
    seen["expand_"] = torch.zeros(rows, width, dtype=dtype)
    ops["expand_"](seen["expand_"], ones.reshape(-1), eye, *segments)
    # The Gram matrix of S = identity rows: row t of the result is row t of drop(x).
    square = [seeds, keys, None, [rows], [0], [rows], p]
    seen["grouped_gram"] = ops["grouped_gram"](torch.eye(rows, dtype=dtype).reshape(-1), ones, *square, wide)
    for name, values in seen.items():
        if not torch.equal(values != 0, expected):
            return f"{name}: {int(((values != 0) != expected).sum())} elements of the mask differ"
    return None


def alone(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """S and the gradient of a client have the same bits alone and beside others."""
    ranks, lengths, width = [5, 16, 130], [3, 1100, 9], 72
    seeds, x = torch.tensor([11, -12, 13]), _draw(61, sum(lengths), width, dtype)
    keys, rows = torch.arange(len(x)), _draw(62, sum(ranks), width, dtype)
    scale = torch.tensor([0.5, 2.0, 3.0], dtype=compute_dtype(dtype))
    starts = [sum(lengths[:k]) for k in range(3)]
    s = ops["shrink"](x, rows, scale, seeds, keys, None, ranks, starts, lengths, 0.25)
    gram = ops["grouped_gram"](s, x, seeds, keys, None, ranks, starts, lengths, 0.25, dtype)
    flat = row = 0
    for k, (rank, length, start) in enumerate(zip(ranks, lengths, starts, strict=True)):
        own, one = slice(start, start + length), slice(k, k + 1)
        segments = (seeds[one], keys[own].clone(), None, [rank], [0], [length], 0.25)
        s_alone = ops["shrink"](x[own].clone(), rows[row : row + rank].clone(), scale[one].clone(), *segments)
        gram_alone = ops["grouped_gram"](s_alone, x[own].clone(), *segments, dtype)
        if not (torch.equal(s_alone, s[flat : flat + rank * length]) and torch.equal(gram_alone, gram[row : row + rank])):
            return f"client {k} differs alone"
        flat, row = flat + rank * length, row + rank
    return None


def strided_out(ops: Mapping[str, Callable], dtype: torch.dtype) -> str | None:
    """expand_ on every second column of a wider matrix; the others stay."""
    shape = COVERED
    s, rows = _draw(63, 1, 4 * 5 + 9 * 66 + 16, dtype)[0], _draw(64, sum(shape["ranks"]), shape["width"], dtype)
    wide = _draw(65, _rows_of_x(shape), 2 * shape["width"], dtype)
    before, dense = wide.clone(), wide[:, ::2].contiguous()
    segments: list[Any] = _segment_args(shape, False, False)
    ops["expand_"](wide[:, ::2], s, rows, *segments)
    ops["expand_"](dense, s, rows, *segments)
    return None if torch.equal(wide[:, ::2], dense) and torch.equal(wide[:, 1::2], before[:, 1::2]) else "differs from the contiguous one"


CHECKS: dict[str, Check] = {"mask": mask, "alone": alone, "strided out": strided_out}
for _kind, _make in (("forward", forward), ("backward", backward)):
    for _base in (False, True):
        for _name, _shape, _gathered in (("covered", COVERED, False), ("gathered", COVERED, True), ("base-only rows", LORA_SHAPES["small"], False)):
            CHECKS[f"{_kind}-{_name}{'-on a base' if _base else ''}"] = partial(failures, partial(_make, _shape, _gathered, True, _base))
CHECKS["many clients-shrink"] = partial(failures, partial(shrink, MANY, True, True, None, False))
CHECKS["many clients-grouped_gram"] = partial(failures, partial(grouped_gram, MANY, False, True, None))
