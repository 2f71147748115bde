"""Tiles of the LoRA layer's kernels: which rows and rank rows a program owns, and the regenerated dropout mask of such a tile.

A tile never crosses a segment, so nothing is padded and a client's result does not depend on its batch mates. One tile is eight int64:
client, first row in the order of the segments, rows, rank, rank rows of this tile, first rank row, first element in the packed S, plane (grouped Gram).
The table is built once for equal (ranks, starts, lengths, tile size), and kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, chain
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from hetlora_kernels.triton._common import params
from hetlora_kernels.triton._tables import table

FIELDS = 8
LARGEST_BUCKET = 128

Tile = tuple[int, int, int, int, int, int, int, int]


class Segment(NamedTuple):
    client: int
    row: int  # first rank row
    rank: int
    start: int  # first row, in the order of the segments
    length: int
    flat: int  # first element in the packed S


class Tiles(NamedTuple):
    table: Tensor  # int64 [number, FIELDS]
    number: int
    largest: int  # bucket of the largest rank
    unit: int  # every rank, and so every place in S, is a multiple of it


def bucket(rank: int) -> int:
    """Rank rows that a program computes on for `rank` of them: 16, 32, 64 or 128."""
    return min(LARGEST_BUCKET, max(16, triton.next_power_of_2(rank)))


def every_segment(ranks: Sequence[int], starts: Sequence[int], lengths: Sequence[int]) -> Iterator[Segment]:
    """Each client's, those without rank rows or batch rows too."""
    row = flat = 0
    for k, rank in enumerate(ranks):
        start, length = (starts[k], lengths[k]) if k < len(lengths) else (0, 0)
        yield Segment(k, row, rank, start, length, flat)
        row += rank
        flat += rank * length


def shrink_tiles(segments: Sequence[Segment], rows: int) -> Iterator[Tile]:
    """`rows` rows of a segment and at most 128 of its rank rows."""
    for s in segments:
        for first in range(0, s.length, rows):
            for part in range(0, s.rank, LARGEST_BUCKET):
                place = s.flat + first * s.rank + part
                yield s.client, s.start + first, min(rows, s.length - first), s.rank, min(LARGEST_BUCKET, s.rank - part), s.row + part, place, 0


def expand_tiles(segments: Sequence[Segment], rows: int) -> Iterator[Tile]:
    """`rows` rows of a segment and all its rank rows."""
    for s in segments:
        for first in range(0, s.length if s.rank else 0, rows):
            yield s.client, s.start + first, min(rows, s.length - first), s.rank, s.rank, s.row, s.flat + first * s.rank, 0


def cover_tiles(segments: Sequence[Segment], rows: int, total: int) -> Iterator[Tile]:
    """Those of `expand_tiles`, and tiles of rank 0 over the rest of the rows 0 .. total - 1."""
    yield from expand_tiles(segments, rows)
    taken = sorted((s.start, s.start + s.length) for s in segments if s.rank and s.length)
    for (_, end), (start, _) in zip([(0, 0), *taken], [*taken, (total, total)], strict=True):
        for first in range(end, start, rows):
            yield 0, first, min(rows, start - first), 0, 0, 0, 0, 0


def gram_chunks(segments: Sequence[Segment], split: int) -> list[int]:
    """Row chunks of each client; one for a client without rows, whose result is zero."""
    return [max(1, -(-s.length // split)) for s in segments]


def gram_tiles(segments: Sequence[Segment], split: int) -> Iterator[Tile]:
    """A chunk of `split` rows and at most 128 rank rows; plane = first row among the planes of partial sums, -1 where one chunk is all."""
    plane = 0
    for s, chunks in zip(segments, gram_chunks(segments, split), strict=True):
        for chunk in range(chunks):
            for part in range(0, s.rank, LARGEST_BUCKET):
                first, where = chunk * split, plane + chunk * s.rank + part if chunks > 1 else -1
                place = s.flat + first * s.rank + part
                yield s.client, s.start + first, min(split, s.length - first), s.rank, min(LARGEST_BUCKET, s.rank - part), s.row + part, place, where
        plane += chunks * s.rank if chunks > 1 else 0


def plane_rows(segments: Sequence[Segment], split: int) -> Iterator[Tile]:
    """For each rank row with several chunks: (chunks, row, rank, first of its rows among the planes)."""
    counts = gram_chunks(segments, split)
    firsts = accumulate((chunks * s.rank if chunks > 1 else 0 for s, chunks in zip(segments, counts, strict=True)), initial=0)
    for s, chunks, first in zip(segments, counts, firsts, strict=False):
        for i in range(s.rank if chunks > 1 else 0):
            yield chunks, s.row + i, s.rank, first + i, 0, 0, 0, 0


@lru_cache(maxsize=512)
def _built(kind: Callable, ranks: tuple, starts: tuple, lengths: tuple, sizes: tuple) -> tuple[list[int], int, int]:
    """(fields of every tile, bucket, unit) on the host."""
    fields = list(chain.from_iterable(kind(list(every_segment(ranks, starts, lengths)), *sizes)))
    unit = next(unit for unit in (8, 4, 1) if all(rank % unit == 0 for rank in ranks))
    return fields, bucket(max(ranks, default=0)), unit


def tiles(kind: Callable, ranks: Sequence[int], starts: Sequence[int], lengths: Sequence[int], *sizes: int, device: torch.device) -> Tiles:
    """The table of one of the functions above, from the cache where it was built before."""
    key = kind, tuple(ranks), tuple(starts), tuple(lengths), sizes
    fields, largest, unit = _built(*key)
    return Tiles(table(key, lambda: fields, torch.int64, device), len(fields) // FIELDS, largest, unit)


def layer_params(name: str, dtype: torch.dtype, device: torch.device) -> dict[str, int]:
    """Launch parameters of one of the layer's kernels on operands of `dtype`."""
    return params(name + {torch.float32: "_float32", torch.float64: "_float64"}.get(dtype, ""), device)


def operands(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """x with adjacent columns, and rank rows that the kernel may cast as it loads: float64 products do not compile on operands of a narrower type."""
    narrow = x.dtype != rows.dtype and torch.float64 in (x.dtype, rows.dtype)
    return x if x.stride(1) == 1 else x.contiguous(), rows.to(x.dtype) if narrow else rows


@triton.jit
def load_rows(index, position, live):
    """Row numbers of a tile: the positions themselves, or what `index` has there."""
    if index is None:
        return position
    else:
        return tl.load(index + position, mask=live, other=0)


@triton.jit
def keep_mask(seed, keys, first_column, threshold, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Boolean [ROWS, COLUMNS] of `reference.keep_mask` from column `first_column`, a multiple of 8, on; `keys` is int64 [ROWS].

    One Philox call serves eight columns. Its halves are compared first and joined after: what may have to change its layout is then one byte wide.
    """
    zero = tl.zeros((ROWS, COLUMNS // 8), tl.uint32)
    low, high = keys.to(tl.uint32)[:, None] + zero, (keys >> 32).to(tl.uint32)[:, None] + zero
    block = (first_column // 8 + tl.arange(0, COLUMNS // 8)).to(tl.uint32)[None, :] + zero
    w0, w1, w2, w3 = tl.philox(seed, low, high, block, zero, n_rounds=7)
    limit = threshold.to(tl.uint32)
    even = tl.join(tl.join((w0 & 0xFFFF) >= limit, (w2 & 0xFFFF) >= limit), tl.join((w1 & 0xFFFF) >= limit, (w3 & 0xFFFF) >= limit))
    odd = tl.join(tl.join((w0 >> 16) >= limit, (w2 >> 16) >= limit), tl.join((w1 >> 16) >= limit, (w3 >> 16) >= limit))
    return tl.reshape(tl.join(even, odd), (ROWS, COLUMNS))
