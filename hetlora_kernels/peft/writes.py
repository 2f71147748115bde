"""What becomes of the owners of a tensor that another is written into: rules as in `moves`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from hetlora_kernels.peft.owners import LOST, NOBODY, Entry, ForeignRows, Look, Owners, join, plainer, tensors


def widths(index: Any) -> list[int]:
    """How many dimensions of a tensor each part of an index takes."""
    parts = index if isinstance(index, tuple) else (index,)
    return [one.dim() if isinstance(one, Tensor) and one.dtype == torch.bool else 0 if one is None or one is ... else 1 for one in parts]


def _written(target: Entry, tensor: Tensor, index: Any, source: Entry, value: Any) -> Entry:
    """Owners of `tensor` after tensor[index] = value, or += value."""
    if source is None or target is LOST:
        return target
    slices = isinstance(index, tuple) and len(index) == tensor.dim() == value.dim() and all(isinstance(one, slice) for one in index)
    if slices and isinstance(source, Owners):
        # part of every sequence: the rest of it, filled with constants, is as much its own
        index = (index[0], *(slice(None) if not source.varies(d) else index[d] for d in range(1, len(index))))
    if source is LOST:  # positions keep whose they are; nothing says whose a container's are
        if isinstance(target, Owners):
            raise ForeignRows(target)
        return LOST
    assert isinstance(source, Owners)
    before = target.table if isinstance(target, Owners) else source.table.new_full((1,) * tensor.dim(), NOBODY)
    narrow = not source.varies(-1) and sum(widths(index)) < tensor.dim() and before.shape[-1] == 1
    table = before.expand((*tensor.shape[:-1], 1) if narrow else tensor.shape).clone()
    region = table[index]
    own = source.table if source.table.dim() == region.dim() else source.table.expand((*value.shape[:-1], 1) if narrow else value.shape)
    own = own.expand_as(region)
    if bool(((region >= 0) & (own >= 0) & (region != own)).any()):
        if not source.sure or (isinstance(target, Owners) and not target.sure):
            raise ForeignRows(LOST)
        return LOST
    table[index] = torch.where(own >= 0, own, region)
    if bool(((own >= 0) & (table[index] != own)).any()):  # rows of several sequences went to one place
        return LOST
    parts = index if isinstance(index, tuple) else (index,)
    fixed = source.fixed and (not isinstance(target, Owners) or target.fixed) and not any(isinstance(one, (Tensor, list)) for one in parts)
    if isinstance(target, Owners) and torch.equal(table, before.expand_as(table)):
        return target
    return Owners(plainer(table), fixed, source.sure and (not isinstance(target, Owners) or target.sure))


def _pointed(look: Look, tensor: Tensor, index: Any, value: Any) -> Entry:
    """Owners of `tensor` after tensor[index] = value, both nobody's: an element is the sequence's whose part of the index may reach it."""
    parts = index if isinstance(index, tuple) else (index,)
    known = [entry for one in parts if isinstance(entry := look(one), Owners)]
    if len(known) < sum(look(one) is not None for one in tensors(parts)):
        return LOST
    if not known:
        return None
    if len(parts) == 1 and parts[0].dtype == torch.bool and (not isinstance(value, Tensor) or value.numel() == 1):  # as `masked_fill`
        return known[0].like(known[0].table.reshape(*known[0].table.shape, *(1,) * (tensor.dim() - parts[0].dim())))
    table = known[0].table.new_full(tensor.shape, NOBODY)
    # One sequence's part of the index reaches every place of its dimensions, at the places that the other parts name.
    if len({owner for own in known for owner in own.table.unique().tolist()}) == 1:
        reach = [[slice(None)] * width if isinstance(look(one), Owners) else [one] for one, width in zip(parts, widths(index), strict=True)]
        table[tuple(one for some in reach for one in some)] = known[0].table.reshape(-1)[0]
        return Owners(plainer(table), False, all(own.sure for own in known))
    if len(known) == len(parts) or any(not isinstance(one, Tensor) or one.dtype == torch.bool for one in parts):
        return LOST
    shape = torch.broadcast_shapes(*[one.shape for one in parts])
    own = join(known, len(shape))
    if not isinstance(own, Owners):
        return LOST
    places, after = [], len(known)
    for dim, one in enumerate(parts):  # [*shape, every place of each dimension that data choose in]
        if look(one) is None:
            places.append(one.expand(shape).reshape(*shape, *(1,) * len(known)))
        else:
            after -= 1
            places.append(torch.arange(tensor.shape[dim], device=table.device).reshape(-1, *(1,) * after))
    region = table[tuple(places)]
    wanted = own.table.reshape(*own.table.shape, *(1,) * (region.dim() - own.table.dim())).expand_as(region)
    table[tuple(places)] = wanted
    if bool((table[tuple(places)] != wanted).any()):  # several sequences may reach one place
        return LOST
    return own.like(plainer(table), False)


def write(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    tensor, index, value = args[:3]
    index = tuple(index) if isinstance(index, list) and any(isinstance(one, Tensor) for one in index) else index
    if look(tensor) is None and look(value) is None:
        return _pointed(look, tensor, index, value)
    return _written(look(tensor), tensor, index, look(value), value)


def write_along(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    tensor, dim, index, value = args[0], *(kwargs.get(name, args[at] if len(args) > at else None) for at, name in ((1, "dim"), (2, "index"), (3, "source")))
    if value is None:
        value = kwargs.get("src")
    if index.dim() > 1:
        parts = [look(tensor), look(index), look(value)]
        if not any(isinstance(part, Owners) and part.varies(dim) for part in parts):  # each row within itself
            return join(parts, tensor.dim())
        # scatter with one index for a whole row
        if dim != 0 or index.dim() != 2 or not torch.equal(index, index[:, :1].expand_as(index)):
            return LOST
        if parts[0] is None and parts[2] is None:
            return parts[1] and LOST
        index = index[:, 0]
    elif look(tensor) is None and look(value) is None:
        return look(index) and LOST
    return _written(look(tensor), tensor, (slice(None),) * (dim % tensor.dim()) + (index,), look(value), value)


def masked_scatter(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    tensor, mask, value = args[:3]
    own, source = look(tensor), look(value)
    if isinstance(own, Owners) and isinstance(source, Owners):
        wanted = own.table.expand(tensor.shape)[mask.expand(tensor.shape)]
        if not torch.equal(wanted, source.table.expand(value.shape).reshape(-1)[: wanted.numel()]):
            raise ForeignRows(LOST)
    if isinstance(own, Owners) and source is LOST:
        raise ForeignRows(own)
    return own if isinstance(own, Owners) else LOST
