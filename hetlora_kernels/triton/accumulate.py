"""Streaming aggregation: total[m][: r_m] += weights[m] * rows[m]. Tile: BLOCK consecutive elements of one module.

Bytes: one client's rows in, the same part of the bank in and out: the floor. One launch for all modules.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hetlora_kernels.triton._common import TYPES, alignment, block_for, contiguous, launch, module_table, params, require_contiguous


@triton.jit
def _accumulate_kernel(
    modules,  # int64 [M, 3]: total, rows, elements
    weights,  # [M]
    IN: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BYTES: tl.constexpr = 16 if ALIGN > 1 else 1  # promised for every row start: the compiler cannot see into the table
    entry = modules + tl.program_id(1) * 3
    total, rows, elements = tl.load(entry), tl.load(entry + 1), tl.load(entry + 2)
    first = tl.program_id(0).to(tl.int64) * BLOCK
    if first >= elements:
        return
    index = first + tl.arange(0, BLOCK)
    inside = tl.max_constancy(index < elements, ALIGN)
    weight = tl.load(weights + tl.program_id(1)).to(ACC)
    target = tl.multiple_of(total.to(tl.pointer_type(ACC)) + index, BYTES)
    value = tl.load(tl.multiple_of(rows.to(tl.pointer_type(IN)) + index, BYTES), mask=inside, other=0.0).to(ACC)
    tl.store(target, tl.load(target, mask=inside, other=0.0) + value * weight, mask=inside)


def accumulate_(total, rows, weights):
    """See `reference.accumulate_`."""
    require_contiguous(total=total)
    rows = contiguous(rows)
    device = rows[0].device
    elements = [r.numel() for r in rows]
    setting = params("accumulate", device)
    block = block_for(setting.pop("BLOCK"), max(elements))
    launch(
        _accumulate_kernel,
        (triton.cdiv(max(elements), block), len(rows)),
        device,
        module_table(device, total, rows, elements),
        weights.contiguous(),
        IN=TYPES[rows[0].dtype],
        ACC=TYPES[total[0].dtype],
        BLOCK=block,
        ALIGN=alignment(elements, total, rows),
        **setting,
    )
