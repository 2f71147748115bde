"""out = source + S_k B_k of every client. Tile: ROWS rows of one segment x COLUMNS columns, looping over the rank in steps of DEPTH.

Three uses of one kernel: accumulating into `out` (source = out), writing beside a base output (source = base), writing under a bias (source = bias, the
same row for all, or nothing). The last two own every row, so that tiles of rank 0 cover the base-only ones. Bytes: source in (a bias stays in cache), out
once, S once per column tile from L2. A loop over the rank rounds its length up to DEPTH, which wastes less than buckets of powers of two.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from hetlora_kernels.reference import compute_dtype, dropout_threshold
from hetlora_kernels.triton._common import TYPES, block_for, cast, divide, launch
from hetlora_kernels.triton._segments import FIELDS, cover_tiles, expand_tiles, keep_mask, layer_params, load_rows, operands, tiles

_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def lora_term(
    s,
    rows,
    seeds,
    keys,
    tile,
    position,
    live,
    first_column,
    row_stride,
    column_stride,
    width,
    threshold,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """S_k B_k on one tile [ROWS, COLUMNS]; with `seeds` its dropout mask and 1 / (1 - p)."""
    rank, first_row = tl.multiple_of(tl.load(tile + 3), UNIT), tl.multiple_of(tl.load(tile + 5), UNIT)
    place = tl.multiple_of(tl.load(tile + 6), UNIT)
    local, column = tl.arange(0, ROWS), first_column + tl.arange(0, COLUMNS)
    total = tl.zeros((ROWS, COLUMNS), ACC)
    for start in range(0, rank, DEPTH):
        r = start + tl.arange(0, DEPTH)
        own = tl.load(s + place + local[:, None] * rank + r[None, :], mask=live[:, None] & (r < rank)[None, :], other=0.0)
        inside = (r < rank)[:, None] & (column < width)[None, :]
        b = tl.load(rows + (first_row + r)[:, None] * row_stride + column[None, :].to(tl.int64) * column_stride, mask=inside, other=0.0)
        total = tl.dot(own, b.to(own.dtype), total, input_precision="ieee", out_dtype=ACC)
    if seeds is not None:
        key = tl.load(keys + position, mask=live & (rank > 0), other=0)
        kept = keep_mask(tl.load(seeds + tl.load(tile)), key, first_column, threshold, ROWS, COLUMNS)
        total = tl.where(kept, divide(total * 65536, (65536 - threshold).to(ACC) + tl.zeros_like(total)), 0.0)
    return total


@triton.jit(do_not_specialize=["threshold"])
def _expand_kernel(
    out,  # [T, d], row stride out_stride
    source,  # [T, d] with row stride source_stride (0: one row for all), or None
    s,  # packed S
    rows,  # [S, d], strides row_stride, column_stride
    seeds,  # int64 [K] or None
    keys,  # int64, one for each position, or None
    index,  # int64: row of out at each position, or None
    tiles,  # int64 [., FIELDS]
    out_stride,
    source_stride,
    row_stride,
    column_stride,
    width,
    threshold,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    tile = tiles + tl.program_id(0).to(tl.int64) * _FIELDS
    local, first = tl.arange(0, ROWS), tl.program_id(1) * COLUMNS
    live = local < tl.load(tile + 2)
    position = tl.load(tile + 1) + local
    row = load_rows(index, position, live)[:, None]
    column = (first + tl.arange(0, COLUMNS))[None, :]
    inside = live[:, None] & (column < width)
    total = lora_term(
        s, rows, seeds, keys, tile, position, live, first, row_stride, column_stride, width, threshold, UNIT, ACC, ROWS, COLUMNS, DEPTH
    )  # fmt: skip
    if source is not None:
        total = tl.load(source + row * source_stride + column, mask=inside, other=0.0).to(ACC) + total
    tl.store(out + row * out_stride + column, cast(total, out.dtype.element_ty), mask=inside)


def _launch(kind, extent, out, source, source_stride, s, rows, seeds, row_keys, index, ranks, starts, lengths, dropout):
    s, rows = operands(s[None], rows)
    setting = layer_params("expand", s.dtype, s.device)
    tiled = tiles(kind, ranks, starts, lengths, setting["ROWS"], *extent, device=s.device)
    width = out.shape[1]
    columns = block_for(setting.pop("COLUMNS"), width)
    launch(
        _expand_kernel,
        (tiled.number, triton.cdiv(width, columns)),
        s.device,
        *(out, source, s, rows, seeds, row_keys, index, tiled.table, out.stride(0), source_stride, *rows.stride(), width, dropout_threshold(dropout)),
        UNIT=tiled.unit,
        ACC=TYPES[compute_dtype(s.dtype)],
        COLUMNS=columns,
        **setting | {"DEPTH": min(setting["DEPTH"], tiled.largest)},
    )


def expand_(out, s, rows, seeds, row_keys, index, ranks, starts, lengths, dropout):
    """See `reference.expand_`. The columns of `out` must be adjacent (`ValueError`)."""
    if out.stride(1) != 1 and out.shape[1] > 1:
        raise ValueError(f"out: expected adjacent columns, got strides {out.stride()} for shape {tuple(out.shape)}")
    _launch(expand_tiles, (), out, out, out.stride(0), s, rows, seeds, row_keys, index, ranks, starts, lengths, dropout)


def covers(index: Tensor | None, total: int) -> bool:
    """Whether `expanded` can write `total` rows: gathered rows must be all there are, since the table does not know where the others lie."""
    return index is None or index.numel() == total


def expanded(source: Tensor | None, shape: torch.Size, dtype: torch.dtype, s: Tensor, rows: Tensor, seeds, row_keys, index, ranks, starts, lengths, dropout):
    """A new [T, d] = source + S_k B_k; `source` is [T, d], one row [d] for all, or None for zero. Only where `covers`."""
    out = s.new_empty(shape, dtype=dtype)
    if source is not None and source.dim() == 2 and source.stride(1) != 1:
        source = source.contiguous()
    stride = source.stride(0) if source is not None and source.dim() == 2 else 0
    if source is not None and source.dim() == 1:
        source = source.contiguous()
    _launch(cover_tiles, (shape[0],), out, source, stride, s, rows, seeds, row_keys, index, ranks, starts, lengths, dropout)
    return out
