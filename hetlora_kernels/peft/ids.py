"""The clients of a batch as they are given: checked, and counted."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from hetlora_kernels._uploads import on_host


class KnownClients(NamedTuple):
    """The clients of sequences, int64 [batch], on the model's device: looked at before, so that a recorded step need not read them back."""

    values: Tensor


def client_table(ids: Sequence[int] | Tensor | KnownClients | None, clients: int) -> Tensor:
    """`ids` as int64, [batch] or [batch, seq], each -1 or a client."""
    if type(ids) is KnownClients:
        return ids.values
    if ids is None:
        raise TypeError("ids: expected the client of each sequence, [batch], or token, [batch, seq], got None")
    table = on_host(ids)
    if table.numel() and (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool):
        raise TypeError(f"ids: expected integers, got {table.dtype}")
    if table.dim() not in (1, 2):
        raise ValueError(f"ids: expected shape [batch] or [batch, seq], got {tuple(table.shape)}")
    if table.numel() and (int(table.min()) < -1 or int(table.max()) >= clients):
        raise ValueError(f"ids: expected -1 (base only) or a client below {clients}, got values {int(table.min())} .. {int(table.max())}")
    return table.to(torch.int64)


def client_rows(part: str, ids: Any, clients: int) -> Tensor:
    """The clients of the rows of a part of the model as int64, of any shape."""
    table = on_host(ids)
    if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool or table.dim() == 0:
        raise TypeError(f"rows: expected integers, the clients of the rows of {part!r}, got {table.dtype} of shape {tuple(table.shape)}")
    if table.numel() and (int(table.min()) < -1 or int(table.max()) >= clients):
        raise ValueError(f"rows: expected -1 (base only) or a client below {clients} for {part!r}, got values {int(table.min())} .. {int(table.max())}")
    return table.to(torch.int64)


def check_step(step: int | Tensor, clients: int) -> None:
    table = on_host(step)
    if table.is_floating_point() or table.is_complex() or tuple(table.shape) not in ((), (clients,)):
        raise ValueError(f"step: expected an integer or ({clients},) integers, one per client, got {table.dtype} {tuple(table.shape)}")


def sequence_index_of(ids: Tensor) -> Tensor:
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


def generated_per_sequence() -> int:
    """Inside transformers' `generate`: how often it repeats each sequence, for beams or several answers; else 1."""
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        config = frame.f_locals.get("generation_config") if frame.f_code.co_name == "generate" else None
        if config is not None and hasattr(config, "num_beams"):
            return max(config.num_beams or 1, config.num_return_sequences or 1)
        frame = frame.f_back
    return 1
