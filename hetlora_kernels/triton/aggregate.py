"""Aggregation. Tile: one output row x BLOCK columns, owned by one program that adds the row's owners in client order, four loads in flight.

Bytes: S d in, R d out (plus the unowned rows of `keep`): the floor. The owners of each row are a table built on the host once per layout, so no
client is visited that does not own the row. Float32 sums (float64 for float64), no atomics: bitwise repeatable.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hetlora_kernels.reference import compute_dtype
from hetlora_kernels.triton._common import (
    TYPES,
    alignment,
    block_for,
    cast,
    contiguous,
    divide,
    launch,
    layout_table,
    module_table,
    offsets,
    owner_starts,
    params,
    require_contiguous,
    row_owners,
    split_ranks,
)


@triton.jit
def _aggregate_kernel(
    modules,  # int64 [M, 7]: rows, out, keep, output rows, width, largest rank, layout
    layouts,  # int32: offsets [K + 1], owner starts [R + 1], owners [S]
    weights,  # [K, M]
    STARTS: tl.constexpr,
    OWNERS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    KEEP: tl.constexpr,
    ACC: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BYTES: tl.constexpr = 16 if ALIGN > 1 else 1  # promised for every row start: the compiler cannot see into the table
    module = tl.program_id(1)
    entry = modules + module * 7
    source, out, keep = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    rows, width, owned = tl.load(entry + 3), tl.load(entry + 4), tl.load(entry + 5)
    layout = layouts + tl.load(entry + 6)
    chunks = tl.maximum(tl.cdiv(width, BLOCK), 1)
    row = tl.program_id(0) // chunks
    if (row >= rows) | (width == 0):
        return
    column = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.max_constancy(column < width, ALIGN)
    total = tl.zeros((BLOCK,), dtype=ACC)
    if row < owned:
        first = source.to(tl.pointer_type(IN)) + row * width + column
        weight_sum = tl.load(weights) * 0
        start, end = tl.load(layout + STARTS + row), tl.load(layout + STARTS + row + 1)
        for group in range(start, end, 4):
            for step in tl.static_range(4):
                here = group + step < end
                k = tl.load(layout + OWNERS + group + step, mask=here, other=0)
                weight = tl.load(weights + k * tl.num_programs(1) + module)
                value = tl.load(tl.multiple_of(first + tl.load(layout + k).to(tl.int64) * width, BYTES), mask=inside & here, other=0.0).to(ACC)
                # A selection, not a product with zero: client 0 stands in for the missing ones and its weight may be infinite.
                total = tl.where(here, total + value * weight, total)
                weight_sum = tl.where(here, weight_sum + weight, weight_sum)
        if NORMALIZE:
            total = tl.where(weight_sum != 0, divide(total, tl.where(weight_sum != 0, weight_sum, 1.0) + tl.zeros_like(total)), 0.0)
    elif keep != 0:
        total = tl.load(keep.to(tl.pointer_type(KEEP)) + row * width + column, mask=inside, other=0.0).to(ACC)
    tl.store(tl.multiple_of(out.to(tl.pointer_type(OUT)) + row * width + column, BYTES), cast(total, OUT), mask=inside)


def aggregate_(out, rows, weights, keep, ranks, owners):
    """See `reference.aggregate_`."""
    require_contiguous(out=out)
    rows, keep = contiguous(rows), contiguous(keep)
    device, own = rows[0].device, split_ranks(ranks, len(rows))
    dtype = compute_dtype(rows[0].dtype)
    if not own[0]:
        return _without_clients(out, keep)
    table, where, (_, starts, owned) = layout_table(device, own, offsets, owner_starts, row_owners)
    counts, widths = [o.shape[0] for o in out], [o.shape[1] for o in out]
    setting = params("aggregate", device)
    block = block_for(setting.pop("BLOCK"), max(widths))
    launch(
        _aggregate_kernel,
        (max(r * triton.cdiv(w, block) for r, w in zip(counts, widths, strict=True)), len(rows)),
        device,
        module_table(device, rows, out, keep or [0] * len(rows), counts, widths, [max(r) for r in own], where),
        table,
        weights.to(dtype).contiguous(),
        STARTS=starts,
        OWNERS=owned,
        IN=TYPES[rows[0].dtype],
        OUT=TYPES[out[0].dtype],
        KEEP=TYPES[keep[0].dtype if keep else rows[0].dtype],
        ACC=TYPES[dtype],
        NORMALIZE=bool(owners),
        BLOCK=block,
        ALIGN=alignment(widths, rows, out),
        **setting,
    )


def _without_clients(out, keep):
    """Nobody owns a row: `keep`, or zero."""
    for position, target in enumerate(out):
        target.copy_(keep[position]) if keep else target.zero_()
