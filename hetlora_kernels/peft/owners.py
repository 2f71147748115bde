"""Whose data the elements of a tensor are: `Owners`, and what becomes of them when tensors are reshaped or joined."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

NOBODY = -1


class Owners:
    """The sequences that the elements of one tensor belong to.

    table: int64, as many dimensions as the tensor, each of its size or 1 (the owner is the same along it); `NOBODY` = no sequence's data.
    fixed: whether the order follows from shapes alone, not from indices that are data.   sure: whether the model's text inputs fix it.
    """

    __slots__ = ("fixed", "rows", "sure", "table")

    def __init__(self, table: Tensor, fixed: bool = True, sure: bool = True) -> None:
        self.table, self.fixed, self.sure = table, fixed, sure
        self.rows: dict[tuple[int, ...], Any] = {}  # (clients, segments) that layers made of it, by leading shape

    def like(self, table: Tensor, fixed: bool = True) -> Owners:
        return Owners(table, self.fixed and fixed, self.sure)

    def on(self, device: torch.device) -> Owners:
        return self if self.table.device == device else self.like(self.table.to(device))

    def fits(self, tensor: Tensor) -> bool:
        return self.table.dim() == tensor.dim() and all(own in (1, size) for own, size in zip(self.table.shape, tensor.shape, strict=True))

    def varies(self, dim: int) -> bool:
        return self.table.shape[dim] > 1


class _Lost:
    def __repr__(self) -> str:
        return "LOST"


LOST = _Lost()
Entry = Owners | _Lost | None  # None: no sequence's data
Look = Callable[[Any], Entry]


class ForeignRows(ValueError):
    """Rows of one sequence are written where another's belong, or may be.   entry: of what they are written to, where all rows are known to be the text's."""

    def __init__(self, entry: Entry, text: str = "") -> None:
        super().__init__(text)
        self.entry = entry


def tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += tensors(value)
        elif isinstance(value, slice):
            found += tensors((value.start, value.stop, value.step))
    return found


def join(entries: Sequence[Entry], dims: int) -> Entry:
    """Owners of what is made element by element, with broadcasting, of tensors with these entries."""
    if any(entry is LOST for entry in entries):
        return LOST
    owners: list[Owners] = [entry for entry in dict.fromkeys(entries) if isinstance(entry, Owners)]
    if not owners:
        return None
    first = owners[0] if owners[0].table.dim() == dims else owners[0].like(aligned(owners[0].table, dims))
    for other in owners[1:]:
        one, two = first.table, aligned(other.table, dims)
        if not (one.shape == two.shape and torch.equal(one, two)):
            if bool(((one >= 0) & (two >= 0) & (one != two)).any()):
                return LOST
            mixed = torch.where(one >= 0, one, two)
            same = mixed.shape == one.shape and torch.equal(mixed, one)
            fixed = first.fixed if same else other.fixed if mixed.shape == two.shape and torch.equal(mixed, two) else first.fixed and other.fixed
            first = Owners(one if same else mixed, fixed, first.sure and other.sure)
        elif (other.fixed and not first.fixed) or (first.sure and not other.sure):
            first = Owners(one, True if other.fixed else first.fixed, first.sure and other.sure)
    return first


def aligned(table: Tensor, dims: int) -> Tensor:
    return table.reshape((1,) * (dims - table.dim()) + tuple(table.shape))


def compact(table: Tensor) -> Tensor:
    """The same with size 1 along every dimension in which it was only expanded."""
    for dim, (size, stride) in enumerate(zip(table.shape, table.stride(), strict=True)):
        if stride == 0 and size > 1:
            table = table.narrow(dim, 0, 1)
    return table


def plainer(table: Tensor) -> Tensor:
    """The same with size 1 along every dimension in which nothing changes, by the values."""
    for dim, size in enumerate(table.shape):
        if size > 1 and torch.equal(table, table.narrow(dim, 0, 1).expand_as(table)):
            table = table.narrow(dim, 0, 1)
    return table


def reshaped(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The owners of a tensor of shape `old`, seen as shape `new`; only dimensions that are merged or split with a varying one grow."""
    shape: list[int] = []
    grown = list(table.shape)
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin, left, right = i, j, 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        if any(table.shape[d] > 1 for d in range(start, i)):
            grown[start:i] = old[start:i]
            shape += new[begin:j]
        else:
            shape += [1] * (j - begin)
    whole = table.expand(grown).reshape(shape)
    return whole if whole.shape == table.shape else plainer(whole)


def through_view(base: Tensor, before: Entry, view: Tensor, entry: Entry) -> Entry:
    """Owners of a tensor after a view of it was written to. A base that is nobody's may be filled part by part."""
    if before is LOST or (isinstance(before, Owners) and not bool((before.table < 0).any())):
        return before
    if not isinstance(entry, Owners):
        return entry if before is None else LOST
    memory = torch.empty_strided(base.shape, base.stride(), dtype=torch.int64, device=base.device).fill_(NOBODY)
    if isinstance(before, Owners):
        memory.copy_(before.table.expand(base.shape))
    part = memory.as_strided(view.shape, view.stride(), view.storage_offset() - base.storage_offset())
    new = entry.table.expand(view.shape)
    if bool(((part >= 0) & (new >= 0) & (part != new)).any()):
        return LOST
    part.copy_(torch.where(new >= 0, new, part))
    known = [own for own in (before, entry) if isinstance(own, Owners)]
    return Owners(plainer(memory), all(own.fixed for own in known), all(own.sure for own in known))
