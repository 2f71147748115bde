"""Distribution. Tile: one bank row x BLOCK columns x CLIENTS of its owners; the row is read once per tile and written to each of them.

Bytes: R d in (again for every further CLIENTS owners, from L2), S d out; masked-dense K R d out. One launch for all modules and clients.
A tile per output row would read the bank once per client and leave the repeats to L2.
"""

from __future__ import annotations

import triton
import triton.language as tl

from hetlora_kernels.triton._common import (
    TYPES,
    alignment,
    block_for,
    cast,
    contiguous,
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
def _truncate_kernel(
    modules,  # int64 [M, 5]: bank, out, rows, width, layout
    layouts,  # int32: offsets [K + 1], owner starts [R + 1], owners [S]
    clients,
    STARTS: tl.constexpr,
    OWNERS: tl.constexpr,
    IN: tl.constexpr,
    OUT: tl.constexpr,
    DENSE: tl.constexpr,
    CLIENTS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BYTES: tl.constexpr = 16 if ALIGN > 1 else 1  # promised for every row start: the compiler cannot see into the table
    entry = modules + tl.program_id(1) * 5
    bank, out = tl.load(entry), tl.load(entry + 1)
    rows, width = tl.load(entry + 2), tl.load(entry + 3)
    layout = layouts + tl.load(entry + 4)
    chunks = tl.maximum(tl.cdiv(width, BLOCK), 1)
    row = tl.program_id(0) // chunks
    if (row >= rows) | (width == 0):
        return
    column = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.max_constancy(column < width, ALIGN)
    value = cast(tl.load(tl.multiple_of(bank.to(tl.pointer_type(IN)) + row * width + column, BYTES), mask=inside, other=0.0), OUT)
    target = out.to(tl.pointer_type(OUT)) + column
    first = tl.program_id(2) * CLIENTS
    if DENSE:
        for k in range(first, tl.minimum(first + CLIENTS, clients)):
            owned = tl.load(layout + k + 1) - tl.load(layout + k) > row
            tl.store(tl.multiple_of(target + (k * rows + row) * width, BYTES), tl.where(owned, value, 0.0), mask=inside)
    else:
        start, end = tl.load(layout + STARTS + row), tl.load(layout + STARTS + row + 1)
        for position in range(start + first, tl.minimum(start + first + CLIENTS, end)):
            k = tl.load(layout + OWNERS + position)
            tl.store(tl.multiple_of(target + (tl.load(layout + k) + row) * width, BYTES), value, mask=inside)


def truncate_(out, bank, ranks, dense):
    """See `reference.truncate_`."""
    require_contiguous(out=out)
    bank = contiguous(bank)
    device, own = bank[0].device, split_ranks(ranks, len(bank))
    table, where, (_, starts, owned) = layout_table(device, own, offsets, owner_starts, row_owners)
    rows = [b.shape[0] if dense else max(r, default=0) for b, r in zip(bank, own, strict=True)]
    widths = [b.shape[1] for b in bank]
    setting = params("truncate", device)
    clients = len(own[0])
    block = block_for(setting.pop("BLOCK"), max(widths))
    launch(
        _truncate_kernel,
        (max(r * triton.cdiv(w, block) for r, w in zip(rows, widths, strict=True)), len(bank), triton.cdiv(clients, setting["CLIENTS"])),
        device,
        module_table(device, bank, out, rows, widths, where),
        table,
        clients,
        STARTS=starts,
        OWNERS=owned,
        IN=TYPES[bank[0].dtype],
        OUT=TYPES[out[0].dtype],
        DENSE=bool(dense),
        BLOCK=block,
        ALIGN=alignment(widths, bank, out),
        **setting,
    )
