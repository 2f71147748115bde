"""Gram matrices of each client's rank rows, and from them the norms of the updates B A.

Tile: SIDE x SIDE of one client's matrix over SPLIT columns, SIDE = 16, 32 or 64 by the client's rank; only tiles on or above the diagonal are computed
and mirrored. A row wider than SPLIT is divided among programs; their planes are added in order by a second launch (no atomics, and a client's result
does not depend on who else is in the call). Bytes: S d in (again per tile row for ranks above 64), sum r^2 out. 16-bit rows multiply on tensor cores, which
cut sums off instead of rounding: CHAIN dot products in one chain, and chains are added as float32. Float32 rows multiply in float32 without TF32; float64
and `exact`, which first makes a float64 copy of narrower rows, in float64.
"""

from __future__ import annotations

from itertools import accumulate

import torch
import triton
import triton.language as tl

from hetlora_kernels.reference import compute_dtype
from hetlora_kernels.triton._common import TYPES, alignment, contiguous, launch, layout_table, module_table, offsets, params, split_ranks


def _side(rank: int) -> int:
    return 16 if rank <= 16 else 32 if rank <= 32 else 64


def _tiles(ranks: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(client, tile row, tile column) of every tile on or above a diagonal."""
    found = []
    for k, rank in enumerate(ranks):
        count = -(-rank // _side(rank))
        found += [(k, i, j) for i in range(count) for j in range(i, count)]
    return found


def tile_list(ranks: tuple[int, ...]) -> list[int]:
    """Four integers a tile: client, tile row, tile column, first element of its plane."""
    tiles = _tiles(ranks)
    planes = accumulate((_side(ranks[k]) ** 2 for k, _, _ in tiles), initial=0)
    return [value for tile, plane in zip(tiles, planes, strict=False) for value in (*tile, plane)]


def gram_offsets(ranks: tuple[int, ...]) -> list[int]:
    """First element of each client's matrix in the packed result."""
    return list(accumulate((rank * rank for rank in ranks), initial=0))[:-1]


def plane_size(ranks: tuple[int, ...]) -> int:
    return sum(_side(ranks[k]) ** 2 for k, _, _ in _tiles(ranks))


@triton.jit
def _load_tile(source, row, rank, width, column, last, ALIGN: tl.constexpr):
    BYTES: tl.constexpr = 16 if ALIGN > 1 else 1  # promised for every row start: the compiler cannot see into the table
    inside = tl.max_constancy(column < last, (1, ALIGN))
    return tl.load(tl.multiple_of(source + row * width + column, (1, BYTES)), mask=(row < rank) & inside, other=0.0)


@triton.jit
def _tile_product(source, rank, width, first, last, i, j, ACC: tl.constexpr, SIDE: tl.constexpr, DEPTH: tl.constexpr, CHAIN: tl.constexpr, ALIGN: tl.constexpr):
    """[SIDE, SIDE] products of the rows of tiles i and j over columns first .. last, in 16 bits CHAIN times DEPTH columns in one chain of sums."""
    left, right = i * SIDE + tl.arange(0, SIDE)[:, None], j * SIDE + tl.arange(0, SIDE)[:, None]
    total = tl.zeros((SIDE, SIDE), dtype=ACC)
    for start in range(first, last, DEPTH * CHAIN):
        part = tl.zeros((SIDE, SIDE), dtype=ACC)
        for step in tl.static_range(CHAIN):
            column = start + step * DEPTH + tl.arange(0, DEPTH)[None, :]
            x = _load_tile(source, left, rank, width, column, last, ALIGN)
            y = _load_tile(source, right, rank, width, column, last, ALIGN)
            part = tl.dot(x, tl.trans(y), acc=part, input_precision="ieee", out_dtype=ACC)
        total += part
    return total


@triton.jit
def _store_tile(total, out, planes, rank, i, j, single, SIDE: tl.constexpr):
    """The tile to the result and its mirror image, or to its plane of partial sums."""
    row, column = tl.arange(0, SIDE)[:, None], tl.arange(0, SIDE)[None, :]
    if single:
        left, right = i * SIDE + row, j * SIDE + column
        inside = (left < rank) & (right < rank)
        tl.store(out + left * rank + right, total, mask=inside)
        tl.store(out + right * rank + left, total, mask=inside & (i != j))
    else:
        tl.store(planes + row * SIDE + column, total)


@triton.jit
def _gram_kernel(
    modules,  # int64 [M, 7]: rows, out, planes, width, layout, tiles, elements of one split's planes
    layouts,  # int32: offsets [K + 1], result offsets [K], tiles [., 4]
    SQUARES: tl.constexpr,
    TILES: tl.constexpr,
    T: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
    DEPTH: tl.constexpr,
    CHAIN: tl.constexpr,
    ALIGN: tl.constexpr,
):
    entry = modules + tl.program_id(1) * 7
    width, layout = tl.load(entry + 3), layouts + tl.load(entry + 4)
    first = tl.program_id(2) * SPLIT
    if (tl.program_id(0) >= tl.load(entry + 5)) | ((first >= width) & (first > 0)):
        return
    tile = layout + TILES + tl.program_id(0) * 4
    k, i, j = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    start = tl.load(layout + k)
    rank = tl.load(layout + k + 1) - start
    source = tl.load(entry).to(tl.pointer_type(T)) + start * width
    out = tl.load(entry + 1).to(tl.pointer_type(ACC)) + tl.load(layout + SQUARES + k)
    planes = tl.load(entry + 2).to(tl.pointer_type(ACC)) + tl.program_id(2) * tl.load(entry + 6) + tl.load(tile + 3)
    last, single = tl.minimum(first + SPLIT, width), width <= SPLIT
    if rank <= 16:
        _store_tile(_tile_product(source, rank, width, first, last, i, j, ACC, 16, DEPTH, CHAIN, ALIGN), out, planes, rank, i, j, single, 16)
    elif rank <= 32:
        _store_tile(_tile_product(source, rank, width, first, last, i, j, ACC, 32, DEPTH, CHAIN, ALIGN), out, planes, rank, i, j, single, 32)
    else:
        _store_tile(_tile_product(source, rank, width, first, last, i, j, ACC, 64, DEPTH, CHAIN, ALIGN), out, planes, rank, i, j, single, 64)


@triton.jit
def _sum_planes(out, planes, size, splits, rank, i, j, ACC: tl.constexpr, SIDE: tl.constexpr):
    place = tl.arange(0, SIDE)[:, None] * SIDE + tl.arange(0, SIDE)[None, :]
    total = tl.zeros((SIDE, SIDE), dtype=ACC)
    for split in range(splits):
        total += tl.load(planes + split * size + place)
    _store_tile(total, out, planes, rank, i, j, True, SIDE)


@triton.jit
def _gram_sum_kernel(
    modules,  # int64 [M, 7] as above
    layouts,
    SQUARES: tl.constexpr,
    TILES: tl.constexpr,
    ACC: tl.constexpr,
    SPLIT: tl.constexpr,
):
    entry = modules + tl.program_id(1) * 7
    width, layout = tl.load(entry + 3), layouts + tl.load(entry + 4)
    if (tl.program_id(0) >= tl.load(entry + 5)) | (width <= SPLIT):
        return
    tile = layout + TILES + tl.program_id(0) * 4
    k, i, j = tl.load(tile), tl.load(tile + 1), tl.load(tile + 2)
    rank = tl.load(layout + k + 1) - tl.load(layout + k)
    out = tl.load(entry + 1).to(tl.pointer_type(ACC)) + tl.load(layout + SQUARES + k)
    planes, size, splits = tl.load(entry + 2).to(tl.pointer_type(ACC)) + tl.load(tile + 3), tl.load(entry + 6), tl.cdiv(width, SPLIT)
    if rank <= 16:
        _sum_planes(out, planes, size, splits, rank, i, j, ACC, 16)
    elif rank <= 32:
        _sum_planes(out, planes, size, splits, rank, i, j, ACC, 32)
    else:
        _sum_planes(out, planes, size, splits, rank, i, j, ACC, 64)


def gram(rows, ranks, exact):
    """See `reference.gram`."""
    # Triton's float64 tile product does not compile on operands that come from a narrower type.
    rows = contiguous([r.double() for r in rows] if exact else rows)
    device, own = rows[0].device, split_ranks(ranks, len(rows))
    dtype = torch.float64 if exact else compute_dtype(rows[0].dtype)
    out = [torch.empty(sum(r * r for r in ranks_m), dtype=dtype, device=device) for ranks_m in own]
    setting = params("gram" + {torch.float64: "_float64", torch.float32: "_float32"}.get(rows[0].dtype, ""), device)
    split, depth, warps = setting["SPLIT"], setting["DEPTH"], setting["num_warps"]
    widths, sizes, tiles = [r.shape[1] for r in rows], [plane_size(r) for r in own], [len(_tiles(r)) for r in own]
    splits = [triton.cdiv(w, split) for w in widths]
    firsts = offsets(tuple(n * size if n > 1 else 0 for n, size in zip(splits, sizes, strict=True)))
    planes = torch.empty(firsts[-1], dtype=dtype, device=device)
    table, where, (_, squares, tile_at) = layout_table(device, own, offsets, gram_offsets, tile_list)
    places = [planes.data_ptr() + first * planes.element_size() for first in firsts[:-1]]
    modules = module_table(device, rows, out, places, widths, where, tiles, sizes)
    common = {"SQUARES": squares, "TILES": tile_at, "ACC": TYPES[dtype], "SPLIT": split, "num_warps": warps}
    launch(
        _gram_kernel,
        (max(tiles), len(rows), max(1, *splits)),
        device,
        modules,
        table,
        T=TYPES[rows[0].dtype],
        DEPTH=depth,
        CHAIN=setting["CHAIN"],
        ALIGN=alignment(widths, rows),
        **common,
    )
    if max(splits) > 1:
        launch(_gram_sum_kernel, (max(tiles), len(rows)), device, modules, table, **common)
    return out
