"""The whole layer of this rung: shrink, one of three ways to bring base and LoRA term together, and the factors' gradients.

The ways, for the forward pass (x W^T + bias + S B) and for dx (dY W + mask(dS A) / (1 - p)) alike:
  lora_first   S B is written under the bias, and the BLAS library's product accumulates on it: one write of the output more than the base alone;
  base_first   the base, then S B accumulates in place: one read and one write more. The only way where gathered rows leave base-only ones out;
  fused        one Triton product that starts from bias and S B (fused.py).
Which one is data: the nearest measured shape of params/<device>.json (`hetlora tune` writes it), else its default.
"""

from __future__ import annotations

from functools import lru_cache
from math import log2
from typing import Any

import torch
from torch import Tensor

from hetlora_kernels.ops._layer import base_first, whole_layer
from hetlora_kernels.triton._common import device_params
from hetlora_kernels.triton.expand import covers, expand_, expanded
from hetlora_kernels.triton.fused import fused
from hetlora_kernels.triton.grouped_gram import grouped_gram
from hetlora_kernels.triton.shrink import shrink

WAYS = ("lora_first", "base_first", "fused")
_base_first, _beside_first = base_first(expand_)


def type_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def nearest(table: dict[str, Any], dtype: str, rows: int, depth: int, width: int) -> str:
    """The way that was fastest on the measured shape nearest in the logarithms of its extents; the table's default where its type was not measured."""

    def distance(entry: dict[str, Any]) -> float:
        return sum(abs(log2(max(1, ours)) - log2(entry[name])) for name, ours in (("rows", rows), ("depth", depth), ("width", width)))

    own = [entry for entry in table["measured"] if entry["dtype"] == dtype]
    return min(own, key=distance)["way"] if own else table["default"]


@lru_cache(maxsize=4096)
def _way(device: torch.device, dtype: torch.dtype, rows: int, depth: int, width: int) -> str:
    return nearest(device_params(device)["layer"], type_name(dtype), rows, depth, width)


def product(x: Tensor, matrix: Tensor, bias: Tensor | None, way: str, s: Tensor, rows: Tensor, *walk: Any) -> Tensor:
    """x matrix + bias + S_k rows_k in one of the three ways; `walk` = (seeds, row_keys, index, ranks, starts, lengths, dropout)."""
    if way == "fused":
        return fused(x, matrix, bias, s, rows, *walk)
    if way == "lora_first":
        return expanded(bias, torch.Size((x.shape[0], matrix.shape[1])), x.dtype, s, rows, *walk).addmm_(x, matrix)
    return _base_first(x, matrix, bias, s, rows, *walk)


def _with_base(x: Tensor, matrix: Tensor, bias: Tensor | None, s: Tensor, rows: Tensor, *walk: Any) -> Tensor:
    way = _way(x.device, x.dtype, x.shape[0], *matrix.shape) if covers(walk[2], x.shape[0]) else "base_first"
    return product(x, matrix, bias, way, s, rows, *walk)


def _beside(like: Tensor, base: Tensor | None, s: Tensor, rows: Tensor, *walk: Any) -> Tensor:
    if covers(walk[2], like.shape[0]):
        return expanded(base, like.shape, like.dtype, s, rows, *walk)
    return _beside_first(like, base, s, rows, *walk)


lora_forward, lora_backward = whole_layer(shrink, _with_base, _beside, grouped_gram)
