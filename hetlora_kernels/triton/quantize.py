"""Rank rows in 8 or 4 bits with one scale a row. Quantising: a program per row, which it reads twice (the second time from L2), for its largest magnitude and
for its codes. Back: a program per BLOCK columns of a row.

Bytes: rows once, codes and scales once. One launch for all modules. Rounding is an addition of 1.5 * 2^(mantissa bits), ties to even, the same on every rung.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hetlora_kernels.reference import compute_dtype
from hetlora_kernels.triton._common import TYPES, alignment, block_for, cast, contiguous, divide, launch, module_table, params, require_contiguous


@triton.jit
def _magnitude_bits(value):
    """Bits of |value|: they order as the numbers do, with NaN on top."""
    if value.dtype == tl.float64:
        return value.to(tl.int64, bitcast=True) & 0x7FFFFFFFFFFFFFFF
    else:
        return value.to(tl.int32, bitcast=True) & 0x7FFFFFFF


@triton.jit
def _rounded(quotient):
    """The nearest integer, ties to even, of a magnitude below 2^22."""
    if quotient.dtype == tl.float64:
        return ((quotient + 6755399441055744.0).to(tl.int64, bitcast=True) - 0x4338000000000000).to(tl.int32)
    else:
        return (quotient + 12582912.0).to(tl.int32, bitcast=True) - 0x4B400000


@triton.jit
def _code(source, column, width, scale, ACC: tl.constexpr, BYTES: tl.constexpr, ALIGN: tl.constexpr):
    """Codes of the columns `column` of a row; zero where the scale is 1 by default, or past the row."""
    inside = tl.max_constancy(column < width, ALIGN)
    value = tl.load(tl.multiple_of(source + column, BYTES), mask=inside, other=0.0).to(ACC)
    usable = (scale > 0) & (scale < float("inf"))
    divisor = tl.where(usable, scale, 1.0).to(ACC)
    return tl.where(usable, _rounded(divide(value, tl.zeros_like(value) + divisor)), 0)


@triton.jit
def _quantize_kernel(
    modules,  # int64 [M, 5]: rows, codes, scales, number of rows, width
    LIMIT: tl.constexpr,
    IN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BYTES: tl.constexpr = 16 if ALIGN > 1 else 1  # promised for every row start: the compiler cannot see into the table
    entry = modules + tl.program_id(1) * 5
    rows, codes, scales = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    count, width = tl.load(entry + 3), tl.load(entry + 4)
    row = tl.program_id(0).to(tl.int64)
    if row >= count:
        return
    source = rows.to(tl.pointer_type(IN)) + row * width
    offsets = tl.arange(0, BLOCK)
    most = _magnitude_bits(tl.zeros([BLOCK], dtype=ACC))
    for start in range(0, width, BLOCK):
        inside = tl.max_constancy(start + offsets < width, ALIGN)
        value = tl.load(tl.multiple_of(source + start + offsets, BYTES), mask=inside, other=0.0).to(ACC)
        most = tl.maximum(most, _magnitude_bits(value))
    largest = tl.max(most, axis=0).to(ACC, bitcast=True)
    scale = divide(largest, tl.zeros_like(largest) + LIMIT).to(tl.float32)
    scale = tl.where(scale < 1.1754943508222875e-38, 0.0, scale)
    tl.store(scales.to(tl.pointer_type(tl.float32)) + row, scale)
    target = codes.to(tl.pointer_type(tl.int8))
    if LIMIT == 127:
        for start in range(0, width, BLOCK):
            column = start + offsets
            code = _code(source, column, width, scale, ACC, BYTES, ALIGN)
            tl.store(target + row * width + column, code.to(tl.int8), mask=column < width)
    else:
        stored = (width + 1) // 2
        for start in range(0, stored, BLOCK):
            byte = start + offsets
            low = _code(source, 2 * byte, width, scale, ACC, 1, 1)
            high = _code(source, 2 * byte + 1, width, scale, ACC, 1, 1)
            tl.store(target + row * stored + byte, ((low & 15) | ((high & 15) << 4)).to(tl.int8), mask=byte < stored)


@triton.jit
def _dequantize_kernel(
    modules,  # int64 [M, 5]: out, codes, scales, number of rows, width
    LIMIT: tl.constexpr,
    OUT: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BYTES: tl.constexpr = 16 if ALIGN > 1 else 1
    entry = modules + tl.program_id(1) * 5
    out, codes, scales = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    count, width = tl.load(entry + 3), tl.load(entry + 4)
    chunks = tl.maximum(tl.cdiv(width, BLOCK), 1)
    row = tl.program_id(0) // chunks
    if (row >= count) | (width == 0):
        return
    column = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.max_constancy(column < width, ALIGN)
    source = codes.to(tl.pointer_type(tl.int8))
    if LIMIT == 127:
        code = tl.load(source + row * width + column, mask=inside, other=0).to(tl.int32)
    else:
        byte = tl.load(source + row * ((width + 1) // 2) + column // 2, mask=inside, other=0).to(tl.int32)
        code = (((byte >> (4 * (column % 2)).to(tl.int32)) & 15) ^ 8) - 8
    scale = tl.load(scales.to(tl.pointer_type(tl.float32)) + row).to(ACC)
    tl.store(tl.multiple_of(out.to(tl.pointer_type(OUT)) + row * width + column, BYTES), cast(code.to(ACC) * scale, OUT), mask=inside)


def quantize_rows_(codes, scales, rows, bits):
    """See `reference.quantize_rows_`."""
    require_contiguous(codes=codes, scales=scales)
    rows = contiguous(rows)
    device, counts, widths = rows[0].device, [r.shape[0] for r in rows], [r.shape[1] for r in rows]
    setting = params("quantize", device)
    # A float64 division needs so many registers that a whole block spills on sm_100.
    block = setting.pop("BLOCK") // (4 if rows[0].dtype == torch.float64 else 1)
    launch(
        _quantize_kernel,
        (max(counts), len(rows)),
        device,
        module_table(device, rows, codes, scales, counts, widths),
        LIMIT=2 ** (bits - 1) - 1,
        IN=TYPES[rows[0].dtype],
        ACC=TYPES[compute_dtype(rows[0].dtype)],
        BLOCK=block_for(block, max(widths)),
        ALIGN=alignment(widths, rows),
        **setting,
    )


def dequantize_rows_(out, codes, scales, bits):
    """See `reference.dequantize_rows_`."""
    require_contiguous(out=out)
    codes, scales = contiguous(codes), contiguous(scales)
    device, counts, widths = out[0].device, [o.shape[0] for o in out], [o.shape[1] for o in out]
    setting = params("quantize", device)
    block = block_for(setting.pop("BLOCK"), max(widths))
    launch(
        _dequantize_kernel,
        (max(c * triton.cdiv(w, block) for c, w in zip(counts, widths, strict=True)), len(out)),
        device,
        module_table(device, out, codes, scales, counts, widths),
        LIMIT=2 ** (bits - 1) - 1,
        OUT=TYPES[out[0].dtype],
        ACC=tl.float64 if out[0].dtype == torch.float64 else tl.float32,
        BLOCK=block,
        ALIGN=alignment(widths, out),
        **setting,
    )
