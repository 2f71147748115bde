"""S_k^T drop(x_k) of every client: da and dbt. Tile: the client's rank rows (128 at a time) x COLUMNS columns over a chunk of SPLIT rows of its segment.

Bytes: x once (again for every further 128 rank rows), S once per column tile from L2, the result once; a segment longer than SPLIT writes and reads one
plane of partial sums for each chunk, added in order by a second launch: no atomics, and the chunks of a client depend on its own rows only.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hetlora_kernels.reference import compute_dtype, dropout_threshold
from hetlora_kernels.triton._common import TYPES, block_for, cast, divide, launch
from hetlora_kernels.triton._segments import FIELDS, gram_tiles, keep_mask, layer_params, load_rows, operands, plane_rows, tiles

_FIELDS = tl.constexpr(FIELDS)


@triton.jit
def _gram_tile(
    s,
    x,
    out,
    planes,
    seeds,
    keys,
    index,
    tile,
    x_stride,
    width,
    threshold,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
):
    count = tl.load(tile + 2)
    rank, taken = tl.multiple_of(tl.load(tile + 3), UNIT), tl.multiple_of(tl.load(tile + 4), UNIT)
    place, plane = tl.multiple_of(tl.load(tile + 6), UNIT), tl.load(tile + 7)
    first, r = tl.program_id(1) * COLUMNS, tl.arange(0, RANK)
    column = first + tl.arange(0, COLUMNS)
    inside = (column < width)[None, :]
    total = tl.zeros((COLUMNS, RANK), ACC)
    for start in range(0, count, DEPTH):
        local = start + tl.arange(0, DEPTH)
        live = local < count
        position = tl.load(tile + 1) + local
        own = tl.load(x + load_rows(index, position, live)[:, None] * x_stride + column[None, :], mask=live[:, None] & inside, other=0.0)
        if seeds is not None:
            key = tl.load(keys + position, mask=live, other=0)
            own = tl.where(keep_mask(tl.load(seeds + tl.load(tile)), key, first, threshold, DEPTH, COLUMNS), own, 0.0)
        left = tl.load(s + place + local[:, None] * rank + r[None, :], mask=live[:, None] & (r < taken)[None, :], other=0.0)
        total = tl.dot(tl.trans(own), left, total, input_precision="ieee", out_dtype=ACC)
    if seeds is not None:
        total = divide(total * 65536, (65536 - threshold).to(ACC) + tl.zeros_like(total))
    total, stored = tl.trans(total), (r < taken)[:, None] & inside
    if plane < 0:
        target = (tl.load(tile + 5) + r)[:, None] * width + column[None, :]
        tl.store(out + target, cast(total, out.dtype.element_ty), mask=stored)
    else:
        tl.store(planes + (plane + r)[:, None] * width + column[None, :], total, mask=stored)


@triton.jit(do_not_specialize=["threshold"])
def _grouped_gram_kernel(
    s,  # packed S
    x,  # [T, d], row stride x_stride
    out,  # [S, d]
    planes,  # [., d] partial sums
    seeds,  # int64 [K] or None
    keys,  # int64, one for each position, or None
    index,  # int64: row of x at each position, or None
    tiles,  # int64 [., FIELDS]
    x_stride,
    width,
    threshold,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    LARGEST: tl.constexpr,
):
    tile = tiles + tl.program_id(0).to(tl.int64) * _FIELDS
    taken = tl.load(tile + 4)
    # fmt: off
    if taken <= 16:
        _gram_tile(s, x, out, planes, seeds, keys, index, tile, x_stride, width, threshold, UNIT, ACC, COLUMNS, DEPTH, 16)
    if LARGEST >= 32:
        if (taken > 16) & (taken <= 32):
            _gram_tile(s, x, out, planes, seeds, keys, index, tile, x_stride, width, threshold, UNIT, ACC, COLUMNS, DEPTH, 32)
    if LARGEST >= 64:
        if (taken > 32) & (taken <= 64):
            _gram_tile(s, x, out, planes, seeds, keys, index, tile, x_stride, width, threshold, UNIT, ACC, COLUMNS, DEPTH, 64)
    if LARGEST >= 128:
        if taken > 64:
            _gram_tile(s, x, out, planes, seeds, keys, index, tile, x_stride, width, threshold, UNIT, ACC, COLUMNS, DEPTH, 128)
    # fmt: on


@triton.jit
def _plane_sum_kernel(
    planes,  # [., d]
    out,  # [S, d]
    rows,  # int64 [., FIELDS]: chunks, row of out, rank, first row among the planes
    width,
    COLUMNS: tl.constexpr,
):
    entry = rows + tl.program_id(0).to(tl.int64) * _FIELDS
    chunks, row, rank = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = column < width
    source = planes + tl.load(entry + 3) * width + column
    total = tl.load(source, mask=inside, other=0.0)
    for chunk in range(1, chunks):
        total += tl.load(source + chunk * rank * width, mask=inside, other=0.0)
    tl.store(out + row * width + column, cast(total, out.dtype.element_ty), mask=inside)


def grouped_gram(s, x, seeds, row_keys, index, ranks, starts, lengths, dropout, dtype):
    """See `reference.grouped_gram`."""
    device, width, compute = x.device, x.shape[1], compute_dtype(x.dtype)
    out = x.new_empty((sum(ranks), width), dtype=dtype)
    x, s = operands(x, s)
    setting = layer_params("grouped_gram", x.dtype, device)
    split, columns = setting.pop("SPLIT"), block_for(setting.pop("COLUMNS"), width)
    tiled = tiles(gram_tiles, ranks, starts, lengths, split, device=device)
    sums = tiles(plane_rows, ranks, starts, lengths, split, device=device)
    count = sum(rank * -(-length // split) for rank, length in zip(ranks, lengths, strict=False) if length > split)
    planes = torch.empty(count, width, dtype=compute, device=device)
    launch(
        _grouped_gram_kernel,
        (tiled.number, triton.cdiv(width, columns)),
        device,
        *(s, x, out, planes, seeds, row_keys, index, tiled.table, x.stride(0), width, dropout_threshold(dropout)),
        UNIT=tiled.unit,
        ACC=TYPES[compute],
        COLUMNS=columns,
        LARGEST=tiled.largest,
        **setting,
    )
    wide = block_for(1024, width)
    launch(_plane_sum_kernel, (sums.number, triton.cdiv(width, wide)), device, planes, out, sums.table, width, COLUMNS=wide, num_warps=4)
    return out
