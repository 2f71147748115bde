"""Fused SGD over every client of a bank. Tile: one rank row x BLOCK columns of one factor, as in adamw.py.

Bytes: parameters, gradients and (with momentum) buffers once, parameters and buffers written once; the launches before it as in _step.py.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hetlora_kernels.triton._common import cast
from hetlora_kernels.triton._step import check, prepare, state_at, store_cast, update


@triton.jit
def _sgd_kernel(
    modules,  # int64 [2 M, 8]: parameter, gradient, buffer, -, cast, rows, width, layout
    layouts,  # int32 with a tail flag per row at FLAGS and its client at OWNERS
    coefficients,  # [2 M, K]
    numbers,  # [K, 4]
    scalars,  # float64 [2]: momentum, weight decay
    active,  # bool [K]
    clients,
    FLAGS: tl.constexpr,
    OWNERS: tl.constexpr,
    T: tl.constexpr,
    M: tl.constexpr,  # of the third pointer
    ACC: tl.constexpr,
    LAM: tl.constexpr,
    MOMENTUM: tl.constexpr,
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
    p, g = tl.load(p_at, mask=inside, other=0.0).to(ACC), tl.load(g_at, mask=inside, other=0.0).to(ACC)
    if LAM:
        if tl.load(layout + FLAGS + row) != 0:
            g += tl.load(coefficients + tl.program_id(1) * clients + k) * p
    g = g * tl.load(numbers + k * 4) + tl.load(scalars + 1).to(ACC) * p
    if MOMENTUM:
        b_at = state_at(entry, place, M, ALIGN)
        g += tl.load(b_at, mask=inside, other=0.0).to(ACC) * tl.load(scalars).to(ACC)
        tl.store(b_at, cast(g, M), mask=inside)
    value = cast(p - tl.load(numbers + k * 4 + 2) * g, T)
    tl.store(p_at, value, mask=inside)
    if CAST is not None:
        store_cast(entry, place, inside, value, CAST, ALIGN)


def sgd_(params, grads, buffers, casts, lr, active, clip, lam, ranks, keep, momentum, weight_decay):
    """See `reference.sgd_`. All lists must be of one type (`TypeError`), `buffers` may be bfloat16 beside float32."""
    grads = check(params, grads, casts, "buffers", buffers=buffers)
    prepared = prepare(params, grads, lr, None, active, clip, lam, ranks, keep, (momentum, weight_decay))
    update(_sgd_kernel, prepared, (params, grads, buffers) if buffers else (params, grads), casts, active, LAM=lam is not None, MOMENTUM=bool(buffers))
