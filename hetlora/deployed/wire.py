"""Tensors as arrays that travel, bit for bit in every type, and read back only where they are what was expected.

An array holds the tensor's bytes, little end first: numpy's types, which the engines' own arrays hold, have no bfloat16.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.errors import ConfigError
from hetlora.ranks import ClientRanks

KIND = "hetlora.raw"
Shapes = Mapping[str, tuple[int, int]]


class Array(NamedTuple):
    """What travels of a tensor."""

    dtype: str
    shape: tuple[int, ...]
    stype: str
    data: bytes


class Received(Protocol):
    """An array as an engine hands it over: Flower has a class of its own, with these four."""

    @property
    def dtype(self) -> str: ...
    @property
    def shape(self) -> Iterable[int]: ...
    @property
    def stype(self) -> str: ...
    @property
    def data(self) -> bytes: ...


Arrays = dict[str, Array]
ReceivedArrays = Mapping[str, Received]

if sys.byteorder != "little":
    raise ImportError("hetlora.deployed: this machine stores numbers with the big end first, and arrays travel with the little end first")


def to_array(tensor: Tensor) -> Array:
    data = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Array(dtype=_name(tensor.dtype), shape=tuple(tensor.shape), stype=KIND, data=data)


def from_array(array: Received, shape: Sequence[int], dtype: torch.dtype, what: str) -> Tensor:
    """The tensor in `array`; `ConfigError` that begins with `what` where it is not of this shape and type."""
    expected = math.prod(shape) * dtype.itemsize
    if (array.stype, array.dtype, tuple(array.shape), len(array.data)) != (KIND, _name(dtype), tuple(shape), expected):
        raise ConfigError(
            f"{what}: expected {_name(dtype)} {list(shape)} in {expected} bytes, "
            f"got {array.dtype[:40]} {list(array.shape)[:4]} in {len(array.data)} bytes of kind {array.stype[:40]!r}"
        )
    return torch.frombuffer(bytearray(array.data), dtype=dtype).view(*shape) if expected else torch.empty(*shape, dtype=dtype)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def only_keys(record: ReceivedArrays, expected: Sequence[str], what: str) -> None:
    if set(record) != set(expected):
        raise ConfigError(f"{what}: expected the arrays {sorted(expected)}, got {sorted(str(key)[:40] for key in record)[:5]}")


# ---------------------------------------------------------------- rank rows


def row_spans(cuts: Sequence[int]) -> list[tuple[int, int]]:
    """Consecutive spans of rows that end at the distinct values of `cuts`."""
    ends = sorted({cut for cut in cuts if cut > 0})
    return list(zip([0, *ends], ends, strict=False))


def span_key(span: tuple[int, int]) -> str:
    return f"rows {span[0]}:{span[1]}"


def pack_rows(bank: hk.AdapterBank, span: tuple[int, int], sides: str = "ab") -> Array:
    """Rows `span` of a bank of one client in one array: of every module in order A, then B^T; `sides` = 'b': B^T alone.

    A module with fewer rows gives those it has. Clients of different ranks get equal arrays for the rows they share, which an engine may store and send once.
    """
    start, stop = span
    parts = []
    for name in bank.shapes:
        parts += [factor[name].detach()[start:stop].flatten() for side, factor in (("a", bank.a), ("b", bank.bt)) if side in sides]
    return to_array(torch.cat(parts))


def unpack_rows(
    arrays: Mapping[tuple[int, int], Received], shapes: Shapes, ranks: ClientRanks, dtype: torch.dtype, what: str, sides: str = "ab"
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(A, B^T) of every module, [rank, width] each, from the spans that `pack_rows` made; a side that was not sent has no rows."""
    found: dict[str, dict[str, list[Tensor]]] = {side: {name: [] for name in shapes} for side in "ab"}
    for (start, stop), array in sorted(arrays.items()):
        rows = {name: max(0, min(stop, ranks[name]) - start) for name in shapes}
        counts = [rows[name] * width for name, (m, n) in shapes.items() for side, width in (("a", n), ("b", m)) if side in sides]
        pieces = iter(from_array(array, [sum(counts)], dtype, what).split(counts))
        for name, (m, n) in shapes.items():
            for side, width in (("a", n), ("b", m)):
                if side in sides:
                    found[side][name].append(next(pieces).view(rows[name], width))
    joined = [
        {name: torch.cat(found[side][name]) if found[side][name] else torch.empty(0, width, dtype=dtype) for name, width in widths.items()}
        for side, widths in (("a", {name: n for name, (_, n) in shapes.items()}), ("b", {name: m for name, (m, _) in shapes.items()}))
    ]
    return joined[0], joined[1]


def size(record: ReceivedArrays) -> int:
    """Bytes of the arrays' content."""
    return sum(len(array.data) for array in record.values())
