"""What the two optimisers share: the launches that turn norms, clipping and the regulariser into one coefficient per factor and a few numbers per client.

1. norms (`tail_norms.launch_squares`), when there is clipping or a regulariser: gradients once, tail rows once.
2. combine, one program per module and client: c_A = lam |B_tail| / |A_tail|, c_B = lam |A_tail| / |B_tail|, squared norm of g + c p.
3. prepare, one program per client: clipping factor, and the optimiser's own numbers in float64.
Then the optimiser's update, one pass over everything. No atomics, no host synchronisation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hetlora_kernels.reference import compute_dtype
from hetlora_kernels.triton._common import (
    TYPES,
    alignment,
    block_for,
    cast,
    contiguous,
    launch,
    layout_table,
    module_table,
    params,
    require_contiguous,
    split_ranks,
)
from hetlora_kernels.triton._tables import upload
from hetlora_kernels.triton.tail_norms import cut_offsets, launch_squares, owner_of_row, sum_range, tail_flags


@triton.jit
def _side(modules, layouts, partials, count, tensor, k, clients, CHUNK: tl.constexpr, CLIP: tl.constexpr, BLOCK: tl.constexpr):
    """(tail p.p, g.g, tail g.p) of one client's rows in one factor."""
    entry = modules + tensor * 6
    layout = layouts + tl.load(entry + 4)
    chunks, first = tl.cdiv(tl.load(entry + 3), CHUNK), tl.load(entry + 5)
    start, end = first + tl.load(layout + k) * chunks, first + tl.load(layout + k + 1) * chunks
    tail = first + tl.load(layout + clients + 1 + k) * chunks
    pp = sum_range(partials, tail, end, BLOCK)
    gg, gp = pp * 0, pp * 0
    if CLIP:
        gg = sum_range(partials + count, start, end, BLOCK)
        gp = sum_range(partials + 2 * count, tail, end, BLOCK)
    return pp, gg, gp


@triton.jit
def _combine_kernel(
    modules,  # int64 [2 M, 6], see tail_norms
    layouts,
    partials,  # float64 [P] or [3, P]
    count,  # P
    lam,  # float64 [K]
    coefficients,  # [2 M, K]
    squares,  # float64 [M, K]
    clients,
    CHUNK: tl.constexpr,
    LAM: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k, module, count_m = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    pp_a, gg_a, gp_a = _side(modules, layouts, partials, count, module, k, clients, CHUNK, CLIP, BLOCK)
    pp_b, gg_b, gp_b = _side(modules, layouts, partials, count, module + count_m, k, clients, CHUNK, CLIP, BLOCK)
    c_a, c_b = pp_a * 0, pp_a * 0
    if LAM:
        weight, norm_a, norm_b = tl.load(lam + k), tl.sqrt(pp_a), tl.sqrt(pp_b)
        c_a = tl.where(norm_a > 0, weight * norm_b / tl.where(norm_a > 0, norm_a, 1.0), 0.0)
        c_b = tl.where(norm_b > 0, weight * norm_a / tl.where(norm_b > 0, norm_b, 1.0), 0.0)
        tl.store(coefficients + module * clients + k, c_a.to(coefficients.dtype.element_ty))
        tl.store(coefficients + (module + count_m) * clients + k, c_b.to(coefficients.dtype.element_ty))
    if CLIP:
        total = gg_a + gg_b
        if LAM:
            total += 2 * (c_a * gp_a + c_b * gp_b) + c_a * c_a * pp_a + c_b * c_b * pp_b
        tl.store(squares + module * clients + k, total)


@triton.jit
def _prepare_kernel(
    squares,  # float64 [M, K]
    clip,  # float64 [K]
    lr,  # float64 [K]
    step,  # int64 [K], counts this step afterwards
    active,  # bool [K]
    scalars,  # float64 [6]: beta1, beta2, eps, weight decay, log beta1, log beta2
    numbers,  # [K, 4]: clipping factor, 1 - lr weight decay, lr / (1 - beta1^t), sqrt(1 - beta2^t); SGD: factor, -, lr, -
    modules,
    ADAM: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    k, clients = tl.program_id(0), tl.num_programs(0)
    rate = tl.load(lr + k).to(tl.float64)
    factor, decay, root = rate * 0 + 1, rate * 0 + 1, rate * 0 + 1
    if CLIP:
        total = tl.zeros((BLOCK,), dtype=tl.float64)
        for first in range(0, modules, BLOCK):
            index = first + tl.arange(0, BLOCK)
            total += tl.load(squares + index * clients + k, mask=index < modules, other=0.0)
        limit = tl.load(clip + k).to(tl.float64)
        # Rounding can leave a tiny negative sum where the regulariser cancels the gradient; NaN passes through.
        squared = tl.sum(total, axis=0)
        ratio = limit / (tl.sqrt(tl.where(squared < 0, 0.0, squared)) + 1e-6)
        factor = tl.where(limit > 0, tl.where(ratio > 1, 1.0, ratio), 1.0)
    if ADAM:
        steps = tl.load(step + k) + tl.where(tl.load(active + k) != 0, 1, 0)
        tl.store(step + k, steps)
        count = steps.to(tl.float64)
        decay = 1 - rate * tl.load(scalars + 3)
        rate = rate / (1 - tl.exp(count * tl.load(scalars + 4)))
        root = tl.sqrt(1 - tl.exp(count * tl.load(scalars + 5)))
    target = numbers + k * 4
    kind: tl.constexpr = numbers.dtype.element_ty
    tl.store(target, factor.to(kind))
    tl.store(target + 1, decay.to(kind))
    tl.store(target + 2, rate.to(kind))
    tl.store(target + 3, root.to(kind))


@dataclass(frozen=True)
class Prepared:
    """What an update kernel needs: tables, coefficients, per-client numbers, and its launch."""

    table: Tensor
    where: list[int]
    flags: int
    owners: int
    coefficients: Tensor
    numbers: Tensor
    scalars: Tensor
    rows: list[int]
    widths: list[int]
    clients: int


def prepare(params_, grads, lr, step, active, clip, lam, ranks, keep, scalars: Sequence[float]) -> Prepared:
    """Launches 1 to 3; `step` is None for SGD."""
    device, count = params_[0].device, len(params_) // 2
    own = split_ranks(ranks, count)
    cuts = own if lam is None else split_ranks(keep, count)
    layouts = list(zip(own, cuts, strict=True)) * 2
    clients, dtype = len(own[0]), compute_dtype(params_[0].dtype)
    table, where, (_, flags, owners) = layout_table(device, layouts, cut_offsets, tail_flags, owner_of_row)
    coefficients = torch.empty(2 * count, clients, dtype=dtype, device=device)
    numbers = torch.empty(clients, 4, dtype=dtype, device=device)
    squares = torch.empty(count, clients, dtype=torch.float64, device=device)
    values = upload(scalars, torch.float64, device)
    if clip is not None or lam is not None:
        modules, partials, chunk = launch_squares(params_, [] if clip is None else grads, table, where, flags)
        launch(
            _combine_kernel,
            (clients, count),
            device,
            *(modules, table, partials, partials.shape[1], lr if lam is None else lam, coefficients, squares, clients),
            CHUNK=chunk,
            LAM=lam is not None,
            CLIP=clip is not None,
            BLOCK=256,
            num_warps=1,
        )
    launch(
        _prepare_kernel,
        (clients,),
        device,
        *(squares, lr if clip is None else clip, lr, lr if step is None else step, active, values, numbers, count),
        ADAM=step is not None,
        CLIP=clip is not None,
        BLOCK=128,
        num_warps=1,
    )
    rows, widths = [p.shape[0] for p in params_], [p.shape[1] for p in params_]
    return Prepared(table, where, flags, owners, coefficients, numbers, values, rows, widths, clients)


@triton.jit
def store_cast(entry, place, inside, value, CAST: tl.constexpr, ALIGN: tl.constexpr):
    """`value` once more in CAST, at the module's fifth pointer."""
    BYTES: tl.constexpr = ALIGN * CAST.primitive_bitwidth // 8 if ALIGN > 1 else 1
    tl.store(tl.multiple_of(tl.load(entry + 4).to(tl.pointer_type(CAST)) + place, BYTES), cast(value, CAST), mask=inside)


@triton.jit
def state_at(entry, place, M: tl.constexpr, ALIGN: tl.constexpr):
    """Addresses of the first state, m or SGD's buffer, whose type M may be another than the parameters'."""
    BYTES: tl.constexpr = ALIGN * M.primitive_bitwidth // 8 if ALIGN > 1 else 1
    return tl.multiple_of(tl.load(entry + 2).to(tl.pointer_type(M)) + place, BYTES)


def check(params_, grads, casts, first, **states) -> list[Tensor]:
    """Contiguous gradients of the parameters' type; parameters and states must be contiguous and of that type, casts contiguous and of one type.

    first: name of the state that may be bfloat16 beside parameters in float32.
    """
    require_contiguous(params=params_, casts=casts, **states)
    kind = params_[0].dtype
    for name, tensors in {"grads": grads, **states}.items():
        half = name == first and kind == torch.float32 and bool(tensors) and tensors[0].dtype == torch.bfloat16
        own, told = (torch.bfloat16, "the first one's type") if half else (kind, "the type of the parameters")
        for position, tensor in enumerate(tensors):
            if tensor.dtype != own:
                raise TypeError(f"{name}[{position}]: expected {told}, {own}, got {tensor.dtype}")
    return contiguous(grads)


def update(kernel: Any, prepared: Prepared, lists: Sequence[Sequence[Tensor]], casts: Sequence[Tensor], active: Tensor, **constants: Any) -> None:
    """Launch an update kernel over every tile of every factor. `lists`: parameters, gradients and states."""
    device = lists[0][0].device
    setting = params("step", device)
    block = block_for(setting.pop("BLOCK"), max(prepared.widths))
    nothing = [0] * len(lists[0])
    columns: list[Sequence[int | Tensor]] = [*lists, *[nothing] * (4 - len(lists)), casts or nothing]
    state = lists[2] if len(lists) > 2 else lists[0]
    aligned = all(other.data_ptr() % 16 == 0 for other in (*casts, *state))
    modules = module_table(device, *columns, prepared.rows, prepared.widths, prepared.where)
    launch(
        kernel,
        (max(r * triton.cdiv(w, block) for r, w in zip(prepared.rows, prepared.widths, strict=True)), len(prepared.rows)),
        device,
        *(modules, prepared.table, prepared.coefficients, prepared.numbers, prepared.scalars, active),
        prepared.clients,
        FLAGS=prepared.flags,
        OWNERS=prepared.owners,
        T=TYPES[lists[0][0].dtype],
        M=TYPES[state[0].dtype],
        ACC=TYPES[prepared.numbers.dtype],
        BLOCK=block,
        CAST=TYPES[casts[0].dtype] if casts else None,
        ALIGN=alignment(prepared.widths, *lists[:2], *lists[3:]) if aligned else 1,
        **constants,
        **setting,
    )
