"""S = scale_k * drop(x_k) A_k^T of every client. Tile: ROWS rows of one segment x all its rank rows (128 at a time), looping over the columns.

Bytes: x once (again for every further 128 rank rows), A once per tile from L2, S once. The largest rank of the call decides which branches are compiled;
the client's own rank decides which one runs, so its bits do not depend on who else is there. Dropout zeroes elements of the operand, 1 / (1 - p) goes
to the float32 sum together with the scale.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hetlora_kernels.reference import compute_dtype, dropout_threshold
from hetlora_kernels.triton._common import TYPES, block_for, cast, divide, launch
from hetlora_kernels.triton._segments import FIELDS, keep_mask, layer_params, load_rows, operands, shrink_tiles, tiles

_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _shrink_tile(
    x,
    rows,
    out,
    factor,
    seeds,
    keys,
    index,
    tile,
    x_stride,
    row_stride,
    column_stride,
    width,
    threshold,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
):
    rank, taken = tl.multiple_of(tl.load(tile + 3), UNIT), tl.multiple_of(tl.load(tile + 4), UNIT)
    first_row, place = tl.multiple_of(tl.load(tile + 5), UNIT), tl.multiple_of(tl.load(tile + 6), UNIT)
    local, column, r = tl.arange(0, ROWS), tl.arange(0, DEPTH), tl.arange(0, RANK)
    live = local < tl.load(tile + 2)
    position = tl.load(tile + 1) + local
    source = x + load_rows(index, position, live)[:, None] * x_stride
    factors = rows + (first_row + r)[None, :] * row_stride
    if seeds is not None:
        seed, key = tl.load(seeds + tl.load(tile)), tl.load(keys + position, mask=live, other=0)
    total = tl.zeros((ROWS, RANK), ACC)
    for start in range(0, width, DEPTH):
        at = start + column
        inside = at < width
        own = tl.load(source + at[None, :], mask=live[:, None] & inside[None, :], other=0.0)
        if seeds is not None:
            own = tl.where(keep_mask(seed, key, start, threshold, ROWS, DEPTH), own, 0.0)
        b = tl.load(factors + at[:, None].to(tl.int64) * column_stride, mask=inside[:, None] & (r < taken)[None, :], other=0.0)
        total = tl.dot(own, b.to(own.dtype), total, input_precision="ieee", out_dtype=ACC)
    target = out + place + local[:, None] * rank + r[None, :]
    tl.store(target, cast(total * factor, out.dtype.element_ty), mask=live[:, None] & (r < taken)[None, :])


@triton.jit(do_not_specialize=["threshold"])
def _shrink_kernel(
    x,  # [T, n], row stride x_stride
    rows,  # [S, n], strides row_stride, column_stride
    out,  # packed S
    scale,  # [K]
    seeds,  # int64 [K] or None
    keys,  # int64, one for each position, or None
    index,  # int64: row of x at each position, or None
    tiles,  # int64 [., FIELDS]
    x_stride,
    row_stride,
    column_stride,
    width,
    threshold,  # draws below it drop an element
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    DEPTH: tl.constexpr,
    LARGEST: tl.constexpr,
):
    tile = tiles + tl.program_id(0).to(tl.int64) * _FIELDS
    taken = tl.load(tile + 4)
    factor = tl.load(scale + tl.load(tile)).to(ACC)
    if seeds is not None:
        factor = divide(factor * 65536, (65536 - threshold).to(ACC))
    # fmt: off
    if taken <= 16:
        _shrink_tile(x, rows, out, factor, seeds, keys, index, tile, x_stride, row_stride, column_stride, width, threshold, UNIT, ACC, ROWS, DEPTH, 16)
    if LARGEST >= 32:
        if (taken > 16) & (taken <= 32):
            _shrink_tile(x, rows, out, factor, seeds, keys, index, tile, x_stride, row_stride, column_stride, width, threshold, UNIT, ACC, ROWS, DEPTH, 32)
    if LARGEST >= 64:
        if (taken > 32) & (taken <= 64):
            _shrink_tile(x, rows, out, factor, seeds, keys, index, tile, x_stride, row_stride, column_stride, width, threshold, UNIT, ACC, ROWS, DEPTH, 64)
    if LARGEST >= 128:
        if taken > 64:
            _shrink_tile(x, rows, out, factor, seeds, keys, index, tile, x_stride, row_stride, column_stride, width, threshold, UNIT, ACC, ROWS, DEPTH, 128)
    # fmt: on


def shrink(x, rows, scale, seeds, row_keys, index, ranks, starts, lengths, dropout):
    """See `reference.shrink`."""
    out = x.new_empty(sum(r * n for r, n in zip(ranks, lengths, strict=False)))
    x, rows = operands(x, rows)
    setting = layer_params("shrink", x.dtype, x.device)
    tiled = tiles(shrink_tiles, ranks, starts, lengths, setting["ROWS"], device=x.device)
    launch(
        _shrink_kernel,
        (tiled.number,),
        x.device,
        *(x, rows, out, scale, seeds, row_keys, index, tiled.table, x.stride(0), *rows.stride(), x.shape[1], dropout_threshold(dropout)),
        UNIT=tiled.unit,
        ACC=TYPES[compute_dtype(x.dtype)],
        LARGEST=tiled.largest,
        **setting | {"DEPTH": block_for(setting["DEPTH"], x.shape[1])},
    )
    return out
