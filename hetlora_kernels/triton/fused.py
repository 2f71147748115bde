"""out = x M + bias + S_k B_k in one launch: the base product of the layer (M = W^T) or of its dx (M = W), started from the LoRA term.

Tile: ROWS rows of one segment x COLUMNS columns, looping over the depth of M. The sum begins with bias and S B (for dx with its dropout mask), so the term
costs no pass over the output. Worth it only where this product loses little to the BLAS library's: about 367 / depth of it on an H200 by the model in
docs/kernels-gpu.md, which is why a measured table decides and the default is not this kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from hetlora_kernels.reference import compute_dtype, dropout_threshold
from hetlora_kernels.triton._common import TYPES, block_for, cast, launch
from hetlora_kernels.triton._segments import FIELDS, cover_tiles, layer_params, load_rows, operands, tiles
from hetlora_kernels.triton.expand import lora_term

_FIELDS = tl.constexpr(FIELDS)


@triton.jit(do_not_specialize=["threshold"])
def _fused_kernel(
    x,  # [T, depth], row stride x_stride
    matrix,  # [depth, d], strides depth_stride, matrix_stride
    out,  # [T, d] contiguous
    bias,  # [d] or None
    s,  # packed S
    rows,  # [S, d], strides row_stride, column_stride
    seeds,  # int64 [K] or None
    keys,  # int64, one for each position, or None
    index,  # int64: row of x and out at each position, or None
    tiles,  # int64 [., FIELDS], covering every row
    count,  # tiles
    x_stride,
    depth_stride,
    matrix_stride,
    row_stride,
    column_stride,
    depth,
    width,  # d
    threshold,
    UNIT: tl.constexpr,
    ACC: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    RANK: tl.constexpr,
    GROUP: tl.constexpr,
):
    # GROUP row tiles go through all column tiles before the next ones: their rows of x and the columns of M stay in L2.
    across = tl.cdiv(width, COLUMNS)
    group = tl.program_id(0) // (GROUP * across)
    height = tl.minimum(count - group * GROUP, GROUP)
    inner = tl.program_id(0) % (GROUP * across)
    tile = tiles + (group * GROUP + inner % height).to(tl.int64) * _FIELDS
    first = inner // height * COLUMNS
    local, at = tl.arange(0, ROWS), tl.arange(0, DEPTH)
    column = (first + tl.arange(0, COLUMNS))[None, :]
    live = local < tl.load(tile + 2)
    position = tl.load(tile + 1) + local
    row = load_rows(index, position, live)[:, None]
    total = lora_term(
        s, rows, seeds, keys, tile, position, live, first, row_stride, column_stride, width, threshold, UNIT, ACC, ROWS, COLUMNS, RANK
    )  # fmt: skip
    if bias is not None:
        total += tl.load(bias + column, mask=column < width, other=0.0).to(ACC)
    for start in range(0, depth, DEPTH):
        k = start + at
        left = tl.load(x + row * x_stride + k[None, :], mask=live[:, None] & (k < depth)[None, :], other=0.0)
        right = tl.load(
            matrix + k[:, None].to(tl.int64) * depth_stride + column.to(tl.int64) * matrix_stride, mask=(k < depth)[:, None] & (column < width), other=0.0
        )
        total = tl.dot(left, right, total, input_precision="ieee", out_dtype=ACC)
    tl.store(out + row * width + column, cast(total, out.dtype.element_ty), mask=live[:, None] & (column < width))


def fused(x: Tensor, matrix: Tensor, bias: Tensor | None, s: Tensor, rows: Tensor, seeds, row_keys, index, ranks, starts, lengths, dropout) -> Tensor:
    """[T, d] = x matrix + bias + S_k rows_k; `matrix` [depth, d] of any strides. Only where `expand.covers`."""
    total, width, depth = x.shape[0], matrix.shape[1], x.shape[1]
    out = x.new_empty(total, width)
    x, rows = operands(x, rows)
    setting = layer_params("fused", x.dtype, x.device)
    tiled = tiles(cover_tiles, ranks, starts, lengths, setting["ROWS"], total, device=x.device)
    columns = block_for(setting.pop("COLUMNS"), width)
    strides = (x.stride(0), *matrix.stride(), *rows.stride())
    launch(
        _fused_kernel,
        (tiled.number * triton.cdiv(width, columns),),
        x.device,
        *(x, matrix, out, bias, s, rows, seeds, row_keys, index, tiled.table, tiled.number, *strides, depth, width, dropout_threshold(dropout)),
        UNIT=tiled.unit,
        ACC=TYPES[compute_dtype(x.dtype)],
        COLUMNS=columns,
        **setting | {"DEPTH": block_for(setting["DEPTH"], depth), "RANK": min(setting["RANK"], tiled.largest)},
    )
    return out
