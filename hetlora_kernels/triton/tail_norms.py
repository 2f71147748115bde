"""Norms over packed rows. Tile: one row x BLOCK columns to one float64 partial sum; a second launch adds the partials of a client in order.

Bytes: the tail rows once. The same first pass serves the optimisers: with gradients it also sums g.g and g.p, so that clipping together with the tail
regulariser reads gradients and tail rows once before the update (|g + c p|^2 = g.g + 2 c g.p + c^2 p.p, and c is known only after the pass).
No atomics: bitwise repeatable.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from hetlora_kernels.reference import compute_dtype
from hetlora_kernels.triton._common import (
    TYPES,
    alignment,
    block_for,
    contiguous,
    launch,
    layout_table,
    module_table,
    offsets,
    params,
    row_clients,
    split_ranks,
)


def cut_offsets(layout: tuple) -> list[int]:
    """offsets, then the first tail row of each client: 2 K + 1 integers. `layout` is (ranks, cuts)."""
    own = offsets(layout[0])
    return own + [start + min(cut, rank) for start, rank, cut in zip(own, *layout, strict=False)]


def tail_flags(layout: tuple) -> list[int]:
    """1 for each packed row at or past its client's cut."""
    return [int(row >= cut) for rank, cut in zip(*layout, strict=True) for row in range(rank)]


def owner_of_row(layout: tuple) -> list[int]:
    return row_clients(layout[0])


@triton.jit
def _squares_kernel(
    modules,  # int64 [T, 6]: parameter, gradient, rows, width, layout, first partial
    layouts,  # int32 with a flag per packed row at FLAGS
    partials,  # float64 [P], or [3, P] with gradients: p.p, then g.g and g.p
    count,  # P
    FLAGS: tl.constexpr,
    T: tl.constexpr,
    ACC: tl.constexpr,
    GRADS: tl.constexpr,
    BLOCK: tl.constexpr,
    ALIGN: tl.constexpr,
):
    BYTES: tl.constexpr = 16 if ALIGN > 1 else 1  # promised for every row start: the compiler cannot see into the table
    entry = modules + tl.program_id(1) * 6
    rows, width = tl.load(entry + 2), tl.load(entry + 3)
    chunks = tl.maximum(tl.cdiv(width, BLOCK), 1)
    row = tl.program_id(0) // chunks
    if (row >= rows) | (width == 0):
        return
    tail = tl.load(layouts + tl.load(entry + 4) + FLAGS + row) != 0
    if not GRADS:
        if not tail:
            return
    column = (tl.program_id(0) % chunks) * BLOCK + tl.arange(0, BLOCK)
    inside = tl.max_constancy(column < width, ALIGN)
    target = partials + tl.load(entry + 5) + tl.program_id(0)
    source = tl.multiple_of(tl.load(entry).to(tl.pointer_type(T)) + row * width + column, BYTES)
    p = tl.load(source, mask=inside & tail, other=0.0).to(ACC)
    tl.store(target, tl.sum(p * p, axis=0).to(tl.float64))
    if GRADS:
        source = tl.multiple_of(tl.load(entry + 1).to(tl.pointer_type(T)) + row * width + column, BYTES)
        g = tl.load(source, mask=inside, other=0.0).to(ACC)
        tl.store(target + count, tl.sum(g * g, axis=0).to(tl.float64))
        tl.store(target + 2 * count, tl.sum(g * p, axis=0).to(tl.float64))


@triton.jit
def sum_range(values, start, end, BLOCK: tl.constexpr):
    """values[start] + ... + values[end - 1] in a fixed order, float64."""
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(values + index, mask=index < end, other=0.0)
    return tl.sum(total, axis=0)


@triton.jit
def _tail_norms_kernel(
    modules,  # int64 [M, 6] as above
    layouts,  # int32: offsets [K + 1], first tail rows [K]
    partials,  # float64 [P]
    out,  # [K, M]
    clients,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    entry = modules + tl.program_id(1) * 6
    k = tl.program_id(0)
    layout = layouts + tl.load(entry + 4)
    chunks, first = tl.cdiv(tl.load(entry + 3), CHUNK), tl.load(entry + 5)
    total = sum_range(partials, first + tl.load(layout + clients + 1 + k) * chunks, first + tl.load(layout + k + 1) * chunks, BLOCK)
    tl.store(out + k * tl.num_programs(1) + tl.program_id(1), tl.sqrt(total).to(out.dtype.element_ty))


def launch_squares(tensors: Sequence[Tensor], grads: Sequence[Tensor], table: Tensor, where: Sequence[int], flags: int) -> tuple[Tensor, Tensor, int]:
    """Run the first pass: (module table, partial sums, columns per partial). `grads` may be empty."""
    device = tensors[0].device
    setting = params("norms", device)
    rows, widths = [t.shape[0] for t in tensors], [t.shape[1] for t in tensors]
    block = block_for(setting.pop("BLOCK"), max(widths))
    tiles = [r * triton.cdiv(w, block) for r, w in zip(rows, widths, strict=True)]
    first = offsets(tuple(tiles))
    partials = torch.empty(3 if grads else 1, first[-1], dtype=torch.float64, device=device)
    modules = module_table(device, tensors, grads or [0] * len(tensors), rows, widths, where, first[:-1])
    launch(
        _squares_kernel,
        (max(tiles), len(tensors)),
        device,
        *(modules, table, partials, first[-1]),
        FLAGS=flags,
        T=TYPES[tensors[0].dtype],
        ACC=TYPES[compute_dtype(tensors[0].dtype)],
        GRADS=bool(grads),
        BLOCK=block,
        ALIGN=alignment(widths, tensors, grads),
        **setting,
    )
    return modules, partials, block


def tail_norms(rows, ranks, keep):
    """See `reference.tail_norms`."""
    rows = contiguous(rows)
    device, count = rows[0].device, len(rows)
    layouts = list(zip(split_ranks(ranks, count), split_ranks(keep, count), strict=True))
    clients = len(layouts[0][0])
    out = torch.empty(clients, count, dtype=compute_dtype(rows[0].dtype), device=device)
    table, where, (_, flags) = layout_table(device, layouts, cut_offsets, tail_flags)
    modules, partials, chunk = launch_squares(rows, [], table, where, flags)
    launch(_tail_norms_kernel, (clients, count), device, *(modules, table, partials, out, clients), CHUNK=chunk, BLOCK=256, num_warps=1)
    return out
