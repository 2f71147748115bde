"""Fused AdamW over every client of a bank. Tile: one rank row x BLOCK columns of one factor, so client and tail are the same for the whole tile.

Bytes: parameters, gradients and both moments once, parameters and moments written once; the launches before it (see _step.py) read gradients once
more when clipping and tail rows once more with the regulariser. Arithmetic in float32 (float64 for float64), stored once.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

from hetlora_kernels.triton._common import cast, divide, square_root
from hetlora_kernels.triton._step import check, prepare, state_at, store_cast, update


@triton.jit
def _adamw_kernel(
    modules,  # int64 [2 M, 8]: parameter, gradient, exp_avg, exp_avg_sq, cast, rows, width, layout
    layouts,  # int32 with a tail flag per row at FLAGS and its client at OWNERS
    coefficients,  # [2 M, K]
    numbers,  # [K, 4]
    scalars,  # float64 [6]
    active,  # bool [K]
    clients,
    FLAGS: tl.constexpr,
    OWNERS: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,  # of the third pointer
    ACC: tl.constexpr,
    LAM: tl.constexpr,
    CAST: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BYTES: tl.constexpr = 16 if ALIGN > 1 else 1  # promised for every row start: the compiler cannot see into the table
    entry = modules + tl.program_id(1) * 8
    rows, width, layout = tl.load(entry + 5), tl.load(entry + 6), layouts + tl.load(entry + 7)
    chunks = tl.maximum(tl.cdiv(width, BLOCK), 1)
    row = tl.program_id(0) // chunks
    if (row >= rows) | (width == 0):
        return
    k = tl.load(layout + OWNERS + row)
    if tl.load(active + k) == 0:
        return
    column = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.max_constancy(column < width, ALIGN)
    place = row * width + column
    p_at = tl.multiple_of(tl.load(entry).to(tl.pointer_type(T)) + place, BYTES)
    g_at = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(T)) + place, BYTES)
    m_at = state_at(entry, place, M, ALIGN)
    v_at = tl.multiple_of(tl.load(entry + 3).to(tl.pointer_type(T)) + place, BYTES)
    p, g = tl.load(p_at, mask=inside, other=0.0).to(ACC), tl.load(g_at, mask=inside, other=0.0).to(ACC)
    m, v = tl.load(m_at, mask=inside, other=0.0).to(ACC), tl.load(v_at, mask=inside, other=0.0).to(ACC)
    if LAM:
        if tl.load(layout + FLAGS + row) != 0:
            g += tl.load(coefficients + tl.program_id(1) * clients + k) * p
    g *= tl.load(numbers + k * 4)
    beta1, beta2 = tl.load(scalars), tl.load(scalars + 1)
    m += (g - m) * (1 - beta1).to(ACC)
    v = v * beta2.to(ACC) + g * g * (1 - beta2).to(ACC)
    tl.store(m_at, cast(m, M), mask=inside)  # before the division, which wants the registers of their addresses
    tl.store(v_at, cast(v, T), mask=inside)
    root = tl.load(numbers + k * 4 + 3) + tl.zeros_like(v)
    ratio = divide(m, divide(square_root(v), root) + tl.load(scalars + 2).to(ACC))
    p = p * tl.load(numbers + k * 4 + 1) - tl.load(numbers + k * 4 + 2) * ratio
    value = cast(p, T)
    tl.store(p_at, value, mask=inside)
    if CAST is not None:
        store_cast(entry, place, inside, value, CAST, ALIGN)


def adamw_(params, grads, exp_avg, exp_avg_sq, casts, lr, step, active, clip, lam, ranks, keep, beta1, beta2, eps, weight_decay):
    """See `reference.adamw_`. All lists must be of one type (`TypeError`), `exp_avg` may be bfloat16 beside float32."""
    grads = check(params, grads, casts, "exp_avg", exp_avg=exp_avg, exp_avg_sq=exp_avg_sq)
    logarithms = [math.log(beta) if beta > 0 else -math.inf for beta in (beta1, beta2)]
    prepared = prepare(params, grads, lr, step, active, clip, lam, ranks, keep, (beta1, beta2, eps, weight_decay, *logarithms))
    update(_adamw_kernel, prepared, (params, grads, exp_avg, exp_avg_sq), casts, active, LAM=lam is not None)
