"""||B_k A_k||_F of every client and module from the Gram matrices of both factors, one program each, combined in float64.

Bytes beyond those of `gram`: 2 sum r^2 in, K M out.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from hetlora_kernels.triton._common import TYPES, launch, layout_table, module_table, offsets, split_ranks
from hetlora_kernels.triton.gram import gram, gram_offsets


@triton.jit
def _delta_norms_kernel(
    modules,  # int64 [M, 3]: Gram of A, Gram of Bt, layout
    layouts,  # int32: offsets [K + 1], result offsets [K]
    out,  # [K, M]
    SQUARES: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k, module = tl.program_id(0), tl.program_id(1)
    entry = modules + module * 3
    layout = layouts + tl.load(entry + 2)
    rank = tl.load(layout + k + 1) - tl.load(layout + k)
    first = tl.load(layout + SQUARES + k)
    a, b = tl.load(entry).to(tl.pointer_type(ACC)) + first, tl.load(entry + 1).to(tl.pointer_type(ACC)) + first
    total = tl.zeros((BLOCK,), dtype=tl.float64)
    for start in range(0, rank * rank, BLOCK):
        index = start + tl.arange(0, BLOCK)
        inside = index < rank * rank
        total += tl.load(a + index, mask=inside, other=0.0).to(tl.float64) * tl.load(b + index, mask=inside, other=0.0).to(tl.float64)
    squared = tl.sum(total, axis=0)
    tl.store(out + k * tl.num_programs(1) + module, tl.sqrt(tl.where(squared < 0, 0.0, squared)).to(out.dtype.element_ty))


def delta_norms(a, bt, ranks, exact):
    """See `reference.delta_norms`."""
    count, device = len(a), a[0].device
    grams = gram([*a, *bt], [*ranks, *ranks], exact)
    own = split_ranks(ranks, count)
    out = torch.empty(len(own[0]), count, dtype=grams[0].dtype, device=device)
    table, where, (_, squares) = layout_table(device, own, offsets, gram_offsets)
    modules = module_table(device, grams[:count], grams[count:], where)
    launch(_delta_norms_kernel, (len(own[0]), count), device, modules, table, out, SQUARES=squares, ACC=TYPES[out.dtype], BLOCK=256, num_warps=1)
    return out
