"""Aggregation: the weighted ragged sum of the clients' rank rows (HETLORA section 3.3), in one call or one client at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from hetlora_kernels._library import call, register_fake
from hetlora_kernels._uploads import capturing, on_host, uploaded
from hetlora_kernels.layout import whole
from hetlora_kernels.ops._lists import FLOATS, Layouts, flat_ranks, module_list, outputs, prepare, written
from hetlora_kernels.reference import compute_dtype

Normalize = Literal["none", "owners"]


def _check_normalize(normalize: str) -> bool:
    if normalize not in ("none", "owners"):
        raise ValueError(f"normalize: expected 'none' or 'owners', got {normalize!r}")
    return normalize == "owners"


def _check_keep(keep: Tensor | Sequence[Tensor] | None, shapes: Sequence[tuple[int, int]], device: torch.device) -> list[Tensor]:
    if keep is None:
        return []
    kept, _ = module_list("keep", keep)
    if [tuple(t.shape) for t in kept] != list(shapes) or kept[0].device != device:
        raise ValueError(f"keep: expected shapes {list(shapes)} on {device}, got {[tuple(t.shape) for t in kept]} on {kept[0].device}")
    return kept


def client_weights(weights: Tensor | Sequence[float], clients: int, modules: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[K, M] from [K] or [K, M], in the type of the sums; `ValueError` unless all are finite and >= 0."""
    try:
        # On the host, where it comes from there: the check below then waits for no device. Plain numbers would become float32 first.
        table = on_host(weights, torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        raise TypeError(f"weights: expected numbers, one per client or [clients, modules], got {weights!r}") from None
    if table.dtype.is_complex or table.is_quantized or table.layout != torch.strided or (table.is_meta and device.type != "meta"):
        raise ValueError(f"weights: expected real numbers, got a tensor of type {table.dtype}, {table.layout} on {table.device}")
    if tuple(table.shape) not in ((clients,), (clients, modules)):
        raise ValueError(f"weights: expected shape ({clients},) or ({clients}, {modules}), got {tuple(table.shape)} {table.dtype}")
    table = table.detach().to(dtype)
    unseen = torch.compiler.is_compiling() or table.is_meta or (table.is_cuda and capturing(device))  # no value may be asked for: nothing is checked
    if not unseen and not bool(((table >= 0) & table.isfinite()).all()):
        bad = table[~((table >= 0) & table.isfinite())]
        raise ValueError(f"weights: expected finite numbers >= 0, got {float(bad[0])} ({bad.numel()} of {table.numel()} are not)")
    table = uploaded("weights", table, device)
    return (table[:, None].expand(clients, modules) if table.dim() == 1 else table).contiguous()


def aggregate(
    rows: Tensor | Sequence[Tensor],  # [S, d], or one per module
    layout: Layouts,
    weights: Tensor | Sequence[float],  # [K] or [K, M]
    max_rank: int,
    normalize: Normalize = "none",
    keep: Tensor | Sequence[Tensor] | None = None,  # [R, d]
    dtype: torch.dtype | None = None,
    out: Tensor | Sequence[Tensor] | None = None,  # [R, d]
) -> Tensor | list[Tensor]:
    """out[i] = sum over the clients k with r_k > i of weights[k] * rows_k[i], for i < max_rank: zero-padding without the zeros.

    rows: packed rank rows [S, d] of the uploads; a list does all modules in one call.   layout: one RankLayout, or one per module.
    weights: [K], or [K, modules]; used as given (not renormalised).   max_rank: R, at least the largest rank.
    normalize: 'none' as published; 'owners' divides a row by the total weight of the clients that own it (a total of zero gives zero).
    keep: [R, d] values for rows that no client owns (owned = its rank exceeds the row's index, whatever its weight); default zero.
    dtype: type of the result; default: that of `rows`.   out: tensor(s) to write instead of fresh ones; memory shared with the inputs is refused.

    Sums in float32 (float64 for float64) in client order, so the result is bitwise repeatable. Not differentiable.
    Returns [R, d], a list when a list came in. `ValueError` for shapes that do not fit, and for weights that are negative or not finite.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> rows = torch.tensor([[1.0, 1.0], [2.0, 2.0], [4.0, 4.0]])  # client 0 has one rank row, client 1 two
    >>> hk.aggregate(rows, hk.RankLayout([1, 2]), weights=[0.25, 0.75], max_rank=2).tolist()
    [[1.75, 1.75], [3.0, 3.0]]
    >>> hk.aggregate(rows, hk.RankLayout([1, 2]), weights=[0.25, 0.75], max_rank=2, normalize="owners").tolist()
    [[1.75, 1.75], [4.0, 4.0]]
    """
    listed, many, layouts = prepare("rows", rows, layout)
    owners = _check_normalize(normalize)
    largest, max_rank = max(own.max_rank for own in layouts), whole("max_rank", max_rank)
    if max_rank < largest:
        raise ValueError(f"max_rank: expected at least the largest rank {largest}, got {max_rank}")
    shapes = [(max_rank, tensor.shape[1]) for tensor in listed]
    device = listed[0].device
    table = client_weights(weights, layouts[0].num_clients, len(listed), device, compute_dtype(listed[0].dtype))
    dtype = listed[0].dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    kept = _check_keep(keep, shapes, device)
    result = outputs("out", out, shapes, dtype, device, [*listed, *kept])
    call("aggregate_")(result, listed, table, kept, flat_ranks(layouts), owners)
    written(result)
    return result if many else result[0]


class Accumulator:
    """Aggregation of uploads that arrive one at a time: memory O(bank), whatever the number of clients; the order of `add` is the order of sums.

    like: tensors [*, d], one per module, that give width, type and device.   max_rank: R.

    `add(rows, weight)` then `result(...)` equals `aggregate` of the same uploads in the same order. Sums in float32 (float64 for float64).

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> sums = hk.Accumulator(like=[torch.empty(0, 2)], max_rank=2)
    >>> sums.add([torch.tensor([[1.0, 1.0]])], weight=0.25)
    >>> sums.add([torch.tensor([[2.0, 2.0], [4.0, 4.0]])], weight=0.75)
    >>> sums.count, sums.result()[0].tolist()
    (2, [[1.75, 1.75], [3.0, 3.0]])
    """

    def __init__(self, like: Sequence[Tensor], max_rank: int) -> None:
        listed, _ = module_list("like", like)
        max_rank = whole("max_rank", max_rank, 0)
        self._dtype = listed[0].dtype
        sums = compute_dtype(self._dtype)
        self._total = [torch.zeros(max_rank, t.shape[1], dtype=sums, device=t.device) for t in listed]
        self._owner_weight = torch.zeros(len(listed), max_rank, dtype=sums, device=listed[0].device)
        self._index = torch.arange(max_rank, device=listed[0].device)
        self._owned = [0] * len(listed)
        self.max_rank = max_rank
        self.count = 0

    def add(self, rows: Sequence[Tensor], weight: float | Tensor) -> None:
        """Add one client's rows [r_m, d_m] of every module with `weight`: a number, or [modules], finite and >= 0; `ValueError` otherwise, nothing added."""
        listed, _ = module_list("rows", rows)
        if len(listed) != len(self._total):
            raise ValueError(f"rows: expected {len(self._total)} modules, got {len(listed)}")
        for position, (tensor, total) in enumerate(zip(listed, self._total, strict=True)):
            if tensor.shape[0] > self.max_rank or tensor.shape[1] != total.shape[1] or tensor.device != total.device:
                raise ValueError(
                    f"rows[{position}]: expected at most {self.max_rank} rows of width {total.shape[1]} on {total.device}, got {tuple(tensor.shape)} "
                    f"on {tensor.device}"
                )
        sums = self._total[0].dtype
        if isinstance(weight, Tensor):
            weight = weight.expand(len(listed)) if weight.dim() == 0 else weight
        else:
            try:
                weight = torch.tensor(float(weight), dtype=torch.float64, device="cpu").expand(len(listed))
            except (TypeError, ValueError, OverflowError):
                raise TypeError(f"weight: expected a number, or a tensor [modules], got {weight!r}") from None
        weights = client_weights(weight[None], 1, len(listed), self._total[0].device, sums)[0]
        call("accumulate_")(self._total, listed, weights)
        written(self._total)
        ranks = uploaded("rows", torch.tensor([t.shape[0] for t in listed], device="cpu"), self._index.device)
        self._owner_weight += (self._index[None] < ranks[:, None]) * weights[:, None]
        self._owned = [max(owned, t.shape[0]) for owned, t in zip(self._owned, listed, strict=True)]
        self.count += 1

    def result(self, normalize: Normalize = "none", keep: Sequence[Tensor] | None = None, dtype: torch.dtype | None = None) -> list[Tensor]:
        """The aggregate so far, [R, d] per module, in the type of `like` unless `dtype` says else; more clients may be added afterwards."""
        owners = _check_normalize(normalize)
        dtype = self._dtype if dtype is None else dtype
        if dtype not in FLOATS:
            raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
        kept = _check_keep(keep, [(self.max_rank, t.shape[1]) for t in self._total], self._total[0].device)
        out = []
        for module, (total, owned) in enumerate(zip(self._total, self._owned, strict=True)):
            value = total
            if owners:
                weight = self._owner_weight[module][:, None]
                value = torch.where(weight != 0, total / weight, 0.0)
            value = value.to(dtype, copy=True)
            if kept:
                value[owned:] = kept[module][owned:].to(value.dtype)
            out.append(value)
        return out


@register_fake("aggregate_")
def _(out, rows, weights, keep, ranks, owners):
    return None


@register_fake("accumulate_")
def _(total, rows, weights):
    return None
