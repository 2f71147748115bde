"""Wrappers that share a model among processes or devices: which of them a batch of several clients fits, and on what terms."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any
from weakref import WeakSet

import torch
from torch import distributed, nn

_DIVIDES = ("FullyShardedDataParallel", "FSDP")
_compared: WeakSet[nn.Module] = WeakSet()  # wrappers whose processes are known to hold the same adapters


def check_wrappers(model: nn.Module, modules: Sequence[nn.Module], attached: bool, adapters: Sequence[str]) -> None:
    """`ValueError` for a model that is wrapped in ways that a batch of several clients does not fit.

    modules: all of the model's.   attached: it carries a bank.   adapters: names of a fused model's.
    A wrapped model in training compares the adapters of all processes, once: every process must open a block.
    """
    kinds = {type(module).__name__ for module in modules}
    kind = next((kind for kind in sorted(kinds) if kind == "DataParallel" or kind.startswith(_DIVIDES)), None)
    if kind is None and any(hasattr(parameter, "device_mesh") for module in modules for parameter in module._parameters.values()):
        kind = "a DTensor weight"
    if kind is not None:
        raise ValueError(f"model: {kind} divides weights or batches past client_segments; use one process and one whole model for each GPU")
    if "DistributedDataParallel" not in kinds:
        return
    wrapper: Any = next(module for module in modules if type(module).__name__ == "DistributedDataParallel")
    if attached:
        raise ValueError("model: DistributedDataParallel does not see the factors of an attached bank; average their gradients yourself, or use fuse(model)")
    if not wrapper.find_unused_parameters:
        raise ValueError("model: adapters without rows get no gradient; make DistributedDataParallel with find_unused_parameters=True")
    group = getattr(wrapper, "process_group", None)
    if group is not None and torch.is_grad_enabled() and wrapper.training and wrapper not in _compared:
        _compare(list(adapters), group)
        _compared.add(wrapper)


def _compare(adapters: list[str], group: Any) -> None:
    count = distributed.get_world_size(group)
    if count == 1:
        return
    everywhere: list[Any] = [None] * count
    distributed.all_gather_object(everywhere, adapters, group=group)
    for rank, other in enumerate(everywhere):
        if other != adapters:
            raise ValueError(
                f"model: DistributedDataParallel would average adapters of different clients: process {rank} holds {other[:5]}, this one {adapters[:5]}; "
                f"give every process all adapters, or train without DistributedDataParallel"
            )
    warnings.warn(
        f"client_segments: DistributedDataParallel takes the mean of every gradient over its {count} processes, so an adapter whose rows are in one of them "
        f"gets 1/{count} of the gradient that it has alone: multiply the loss by {count}, or give each adapter as many rows in every process",
        stacklevel=5,
    )
