"""Stacked experts that carry a bank: each expert's projection is a module of the bank, as if it were a linear layer of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hetlora_kernels.layout import Segments
from hetlora_kernels.peft.batch import Rows
from hetlora_kernels.peft.experts import Factors, is_stack, projections, routing, run_experts


class Place(NamedTuple):
    """Where a module of the bank is in the model."""

    experts: Any  # nn.Module
    projection: str
    expert: int


def place_of(name: str, modules: Mapping[str, nn.Module]) -> Place:
    """The place of "PATH.PROJECTION.EXPERT". `ValueError` where the model has none of this name."""
    stack, _, projection = name.rpartition(".")[0].rpartition(".")
    number = name.rpartition(".")[2]
    experts: Any = modules.get(stack)
    if experts is None or not is_stack(experts) or projection not in projections(experts):
        raise ValueError(f"bank: module {name!r} is not in the model")
    if number not in map(str, range(experts.num_experts)):
        raise ValueError(f"bank: module {name!r}: expected an expert from 0 to {experts.num_experts - 1}, got {number!r}")
    return Place(experts, projection, int(number))


def compute(experts: Any, shared: Any, places: Mapping[str, Mapping[int, tuple[str, int]]], rows: Rows, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """The experts' forward with the terms of the clients of `shared.bank`.   places: {projection: {expert: (name in the bank, position)}}."""
    given = routing(args, kwargs)
    if given is None:
        raise TypeError(f"bank: {type(experts).__name__} is called with other arguments than top_k_index and top_k_weights; leave it out")
    batch, dropout = shared.batch, shared.dropout if experts.training or shared.batch.seeds is not None else 0.0
    batch.passed([name for own in places.values() for name, _ in own.values()])
    adapters = {projection: [_factors(experts.num_experts, shared, own, dropout, x.device)] for projection, own in places.items()}
    keys = _keys(rows.segments, x.device) if dropout else None
    return run_experts(experts, x, *given, adapters, shared.bank.num_clients, rows.ids, keys)


def _factors(count: int, shared: Any, own: Mapping[int, tuple[str, int]], dropout: float, device: torch.device) -> Factors:
    bank, clients = shared.bank, shared.bank.num_clients
    names = [own[e][0] for e in sorted(own)]
    ranks = [rank for e in range(count) for rank in (bank.layouts[own[e][0]].ranks if e in own else [0] * clients)]
    scale = shared.scale
    if not isinstance(scale, (int, float)):
        scale = scale.expand(clients).repeat(count) if isinstance(scale, Tensor) else tuple(scale) * count
    seeds = None
    if dropout and shared.batch.seeds is not None:
        nothing = torch.zeros(clients, dtype=torch.int64, device=device)
        seeds = torch.cat([shared.batch.layer_seeds(own[e][1], device).values if e in own else nothing for e in range(count)])
    return Factors(torch.cat([bank.a[name] for name in names]), torch.cat([bank.bt[name] for name in names]), ranks, scale, dropout, seeds)


def _keys(segments: Segments, device: torch.device) -> Tensor:
    """int64 [T]: the key of each row, in the order of the rows."""
    if segments.row_keys is not None:
        return segments.row_keys.to(device)
    keys, index = segments.keys_on(device), segments.index_on(device)
    return keys if index is None else keys.new_zeros(segments.num_rows).index_copy(0, index, keys)
