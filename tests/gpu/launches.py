"""Launches of every Triton op on CPU tensors: what triton_aot.py compiles. Shapes as in use, so that the aligned variants are chosen."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hetlora_kernels.ops.quantize import CODES, code_bytes
from hetlora_kernels.reference import compute_dtype
from hetlora_kernels.triton import OPS
from hetlora_kernels.triton.fused import fused

RANKS = [4, 16, 50, 128]
WIDTHS = [576, 1536]
TYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


def _rows(dtype: torch.dtype, odd: int = 0, count: int = sum(RANKS)) -> list[torch.Tensor]:
    return [torch.zeros(count, width + odd, dtype=dtype) for width in WIDTHS]


def _truncate(source: torch.dtype, target: torch.dtype, dense: bool, odd: int = 0) -> None:
    out = [torch.zeros(len(RANKS) * 128, width + odd, dtype=target) for width in WIDTHS]
    OPS["truncate_"](out, _rows(source, odd, 128), RANKS * 2, dense)


def _aggregate(source: torch.dtype, target: torch.dtype, owners: bool, odd: int = 0) -> None:
    weights = torch.ones(len(RANKS), len(WIDTHS), dtype=compute_dtype(source))
    OPS["aggregate_"](_rows(target, odd, 128), _rows(source, odd), weights, _rows(target, odd, 128), RANKS * 2, owners)


def _accumulate(source: torch.dtype, odd: int = 0) -> None:
    total = compute_dtype(source)
    OPS["accumulate_"](_rows(total, odd), _rows(source, odd), torch.ones(len(WIDTHS), dtype=total))


def _quantize(dtype: torch.dtype, bits: int, odd: int = 0) -> None:
    rows = _rows(dtype, odd)
    codes = [torch.zeros(len(r), code_bytes(r.shape[1], bits), dtype=CODES[bits]) for r in rows]
    scales = [torch.zeros(len(r)) for r in rows]
    OPS["quantize_rows_"](codes, scales, rows, bits)
    OPS["dequantize_rows_"](rows, codes, scales, bits)


def _cross_entropy(dtype: torch.dtype, softcap: float, words: int = 49152) -> None:
    labels, weights = torch.zeros(8, dtype=torch.int64), torch.ones(8, dtype=compute_dtype(dtype))
    OPS["cross_entropy_"](torch.zeros(8, words, dtype=dtype), labels, weights if softcap else None, 1.0, softcap, 0.1, 0.01, True)


CASES: dict[str, Callable[[], None]] = {
    "cross_entropy-f32-odd": partial(_cross_entropy, torch.float32, 0.0, 49153),
    "cross_entropy-f32-odd-one": partial(_cross_entropy, torch.float32, 0.0, 1),  # an integer argument of 1 is a constant of the kernel
    "quantize-4-f32-odd": partial(_quantize, torch.float32, 4, 1),
    "truncate-f32-bf16": partial(_truncate, torch.float32, torch.bfloat16, False),
    "truncate-f32-odd": partial(_truncate, torch.float32, torch.float32, False, 1),
}
for _name, _dtype in TYPES.items():
    CASES[f"truncate-{_name}"] = partial(_truncate, _dtype, _dtype, False)
    CASES[f"truncate-dense-{_name}"] = partial(_truncate, _dtype, _dtype, True)
    CASES[f"aggregate-{_name}"] = partial(_aggregate, _dtype, _dtype, False)
    CASES[f"aggregate-owners-{_name}"] = partial(_aggregate, _dtype, _dtype, True)
    CASES[f"quantize-8-{_name}"] = partial(_quantize, _dtype, 8)
    CASES[f"quantize-4-{_name}"] = partial(_quantize, _dtype, 4)
    CASES[f"accumulate-{_name}"] = partial(_accumulate, _dtype)
    CASES[f"cross_entropy-{_name}"] = partial(_cross_entropy, _dtype, 30.0 if _name in ("bf16", "f64") else 0.0)


def _norms(dtype: torch.dtype, exact: bool) -> None:
    OPS["delta_norms"]([torch.zeros(sum(RANKS), 4096, dtype=dtype)], [torch.zeros(sum(RANKS), 576, dtype=dtype)], RANKS, exact)
    OPS["tail_norms"](_rows(dtype), RANKS * 2, [2, 8, 25, 64] * 2)


def _step(dtype: torch.dtype, odd: int = 0, cast: bool = False, half: bool = False) -> None:
    kinds = [_rows(dtype, odd) for _ in range(4)]
    if half:
        kinds[2] = [t.to(torch.bfloat16) for t in kinds[2]]
    casts = [t.to(torch.bfloat16) for t in kinds[0]] if cast else []
    clients = torch.ones(len(RANKS), dtype=torch.float64)
    settings = (torch.ones(len(RANKS), dtype=torch.bool), clients, clients, RANKS, [2, 8, 25, 64])
    OPS["adamw_"](*kinds, casts, clients, torch.ones(len(RANKS), dtype=torch.int64), *settings, 0.9, 0.999, 1e-8, 0.01)
    OPS["sgd_"](*kinds[:3], casts, clients, *settings, 0.9, 0.01)


for _name, _dtype in TYPES.items():
    CASES[f"norms-{_name}"] = partial(_norms, _dtype, False)
    CASES[f"step-{_name}"] = partial(_step, _dtype)
CASES["norms-exact-f32"] = partial(_norms, torch.float32, True)
CASES["step-f32-cast"] = partial(_step, torch.float32, 0, True)
CASES["step-f32-odd"] = partial(_step, torch.float32, 1)
CASES["step-f32-half"] = partial(_step, torch.float32, 0, False, True)


def _layer(op: str, dtype: torch.dtype, ranks: list[int], drop: bool, gathered: bool, odd: int = 0, peft: bool = False) -> None:
    """One of the layer's three ops on 1536 (or `odd` more) columns; segments of several tiles and chunks, rows of PEFT's strides."""
    lengths, width = [256, 0, 1500, 300][: len(ranks)], 1536 + odd
    total, flat = sum(lengths), sum(r * n for r, n in zip(ranks, lengths, strict=True))
    x, rows, s = torch.zeros(total, width, dtype=dtype), torch.zeros(sum(ranks), width, dtype=dtype), torch.zeros(flat, dtype=dtype)
    rows = rows.t().contiguous().t() if peft else rows
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    keys = torch.zeros(total, dtype=torch.int64)
    segments = (torch.zeros(4, dtype=torch.int64) if drop else None, keys if drop else None, keys if gathered else None, ranks, starts, lengths, 0.1 * drop)
    if op == "shrink":
        OPS["shrink"](x, rows, torch.ones(4, dtype=compute_dtype(dtype)), *segments)
    elif op == "expand_":
        OPS["expand_"](x, s, rows, *segments)
    else:
        OPS["grouped_gram"](s, x, *segments, dtype)


def _fused(dtype: torch.dtype, drop: bool) -> None:
    """The one-launch product as forward (W^T, a bias) and as dx (W, dropout)."""
    ranks, lengths = [4, 50], [256, 300]
    total, flat = sum(lengths), sum(r * n for r, n in zip(ranks, lengths, strict=True))
    x, weight, rows = torch.zeros(total, 1536, dtype=dtype), torch.zeros(1536, 1536, dtype=dtype), torch.zeros(sum(ranks), 1536, dtype=dtype)
    keys, seeds = (torch.zeros(total, dtype=torch.int64), torch.zeros(2, dtype=torch.int64)) if drop else (None, None)
    bias = None if drop else torch.zeros(1536, dtype=dtype)
    fused(x, weight if drop else weight.t(), bias, torch.zeros(flat, dtype=dtype), rows, seeds, keys, None, ranks, [0, 256], lengths, 0.1 * drop)


CASES["fused-f16"] = partial(_fused, torch.float16, False)
CASES["fused-drop-bf16"] = partial(_fused, torch.bfloat16, True)
CASES["fused-drop-f32"] = partial(_fused, torch.float32, True)
CASES["fused-drop-f64"] = partial(_fused, torch.float64, True)
for _op in ("shrink", "expand_", "grouped_gram"):
    # All four buckets take seconds to compile: with dropout where it weighs most, without it once.
    for _name, _dtype in TYPES.items():
        if _name != "f16" or _op == "expand_":  # the code of bf16
            CASES[f"{_op}-drop-gathered-{_name}"] = partial(_layer, _op, _dtype, RANKS, True, True)
    CASES[f"{_op}-bf16"] = partial(_layer, _op, torch.bfloat16, RANKS, False, False)
    CASES[f"{_op}-rank16-peft-bf16"] = partial(_layer, _op, torch.bfloat16, [16], True, False, 0, True)
    CASES[f"{_op}-rank16-f32"] = partial(_layer, _op, torch.float32, [16], False, False)
    CASES[f"{_op}-odd-bf16"] = partial(_layer, _op, torch.bfloat16, [3, 5, 7], True, True, 1)
