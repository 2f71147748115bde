"""Whose rows are whose in one batch: clients of sequences or tokens, the segments of each layer's input, and the dropout seeds of each layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import torch
from torch import Tensor

from hetlora_kernels.layout import Segments

_MASK64 = (1 << 64) - 1
SEQUENCE_STRIDE = 1 << 20  # row key = sequence index in the client's step batch * 2^20 + position


class Batch:
    """The clients of one batch, as `client_segments` names them, and what every layer makes of them."""

    def __init__(
        self,
        num_clients: int,
        ids: Tensor | None = None,  # int64 [batch] or [batch, seq]; None: one client owns every row
        sequence_index: Tensor | None = None,  # int64 [batch]
        seeds: Tensor | None = None,  # int64 [num_clients]
        step: int | Tensor = 0,
    ) -> None:
        self.num_clients, self.ids, self.sequence_index, self.seeds, self.step = num_clients, ids, sequence_index, seeds, step
        self._segments: dict[tuple[int, ...], Segments] = {}

    def segments(self, leading: tuple[int, ...]) -> Segments:
        """Segments of an input with this leading shape; built once per shape."""
        if leading not in self._segments:
            self._segments[leading] = self._build(leading)
        return self._segments[leading]

    def row_ids(self, leading: tuple[int, ...]) -> Tensor:
        """int64 [rows]: the client of each row of an input with this leading shape. `ValueError` where the ids do not fit it."""
        assert self.ids is not None
        batch, rows = self.ids.shape[0], prod(leading)
        length = rows // batch if batch else 0
        if rows != length * batch or (self.ids.dim() == 2 and rows != self.ids.numel()) or (len(leading) > 1 and leading[0] != batch):
            got = tuple(self.ids.shape)
            raise ValueError(f"ids: expected one client per sequence, or per token, of an input with leading shape {leading}, got shape {got}")
        return (self.ids[:, None].expand(batch, length) if self.ids.dim() == 1 else self.ids).reshape(-1)

    def row_keys(self, leading: tuple[int, ...]) -> Tensor:
        """int64 [rows]: what names each row in a dropout mask, so that it depends neither on the batch's other clients nor on padding."""
        assert self.ids is not None
        batch, rows = self.ids.shape[0], prod(leading)
        sequence = _sequence_index(self.ids) if self.sequence_index is None else self.sequence_index
        sequence = sequence[:, None] if sequence.dim() == 1 else sequence
        length = rows // batch if batch else 0
        keys = sequence * SEQUENCE_STRIDE + torch.arange(length, dtype=torch.int64, device=self.ids.device)
        return keys.expand(batch, length).reshape(-1)

    def layer_seeds(self, position: int) -> Tensor | None:
        """int64 [K] seeds of the layer at this position, or None where the batch has none."""
        return None if self.seeds is None else layer_seeds(self.seeds, self.step, position)

    def _build(self, leading: tuple[int, ...]) -> Segments:
        if self.ids is not None:
            return Segments.from_ids(self.row_ids(leading), self.row_keys(leading), num_clients=self.num_clients)
        if self.num_clients != 1:
            raise RuntimeError(
                f"the attached bank has {self.num_clients} clients: run the model, and its backward pass, inside `with client_segments(model, ids)`"
            )
        return Segments.from_lengths([prod(leading)])


def _sequence_index(ids: Tensor) -> Tensor:
    """Number of earlier sequences of the batch that hold the same client: [batch], or [batch, seq] for ids per token."""
    if ids.dim() == 1:
        same = ids[None, :] == ids[:, None]
        return same.tril(-1).sum(1)
    out = torch.zeros_like(ids)
    for client in ids.unique().tolist():
        holds = (ids == client).any(1)
        earlier = holds.cumsum(0) - holds.to(torch.int64)
        out = torch.where(ids == client, earlier[:, None], out)
    return out


def layer_seeds(seeds: Tensor, step: int | Tensor, module: int) -> Tensor:
    """int64 [K]: each client's dropout seed for one step and one module, mixed from (client seed, step, module index) by SplitMix64's finaliser."""
    state = seeds + torch.as_tensor(step, dtype=torch.int64, device=seeds.device) * _signed(0x9E3779B97F4A7C15)
    state = _mix64(state)
    return _mix64(state + _signed((module + 1) * 0x632BE59BD9B4E019))


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64 with wrap-around; `>>` made logical by masks."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


def client_table(ids: Sequence[int] | Tensor, clients: int) -> Tensor:
    """`ids` as int64, [batch] or [batch, seq], each -1 or a client."""
    table = torch.as_tensor(ids)
    if table.numel() and (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool):
        raise TypeError(f"ids: expected integers, got {table.dtype}")
    if table.dim() not in (1, 2):
        raise ValueError(f"ids: expected shape [batch] or [batch, seq], got {tuple(table.shape)}")
    if table.numel() and (int(table.min()) < -1 or int(table.max()) >= clients):
        raise ValueError(f"ids: expected -1 (base only) or a client below {clients}, got values {int(table.min())} .. {int(table.max())}")
    return table.to(torch.int64)


def check_step(step: int | Tensor, clients: int) -> None:
    table = torch.as_tensor(step)
    if table.is_floating_point() or table.is_complex() or tuple(table.shape) not in ((), (clients,)):
        raise ValueError(f"step: expected an integer or ({clients},) integers, one per client, got {table.dtype} {tuple(table.shape)}")
