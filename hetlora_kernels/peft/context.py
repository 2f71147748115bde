"""`client_segments`: name the client of each sequence or token of a batch, for an attached bank or for the adapters of a fused PEFT model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from hetlora_kernels.peft.attached import attachment
from hetlora_kernels.peft.batch import Batch, check_step, client_table
from hetlora_kernels.peft.fused import BASE, AdapterBatch, FusedLayer


@contextmanager
def client_segments(
    model: nn.Module,
    ids: Sequence[int] | Sequence[str] | Tensor,
    seeds: Tensor | None = None,
    step: int | Tensor = 0,
    sequence_index: Tensor | None = None,
) -> Iterator[Tensor]:
    """Name the client of each sequence (or token) of the batch; spans forward and backward. Yields the clients as int64, [batch] or [batch, seq].

    model: one that carries a bank (`attach`), or a PEFT model whose LoRA layers are fused (`fuse`, `enable`). There the K clients are its adapters, in the
    order they were added, active or not: each row gets its own adapter and no other, in training as in inference. Which of them train is, as
    ever, their parameters' requires_grad (`model.base_model.set_adapter([...])` sets it). An adapter that owns no row gets no gradient.
    ids: [batch] or [batch, seq], -1 = base only, any order; for a PEFT model also adapter names, "__base__" = base only.
    seeds: int64 [K], one dropout seed per client; every layer and step mixes its own from them. None: drawn from torch's generator.
    step: the step's number, an integer or int64 [K].
    sequence_index: int64 [batch], each sequence's index in its client's step batch; default its position among the client's sequences here.
    Micro-batches of one step pass it, so that a row's mask does not depend on the split.

    `ValueError` where neither is there, and for a PEFT model with adapters in a layer that is not fused or with `modules_to_save`: these know one adapter
    for the whole batch. `RuntimeError` from a layer whose adapter is a variant (DoRA, ...) or merged.
    """
    shared = attachment(model)
    layers = [] if shared is not None else [module for module in model.modules() if isinstance(module, FusedLayer)]
    if shared is None and not layers:
        raise ValueError("model: no bank is attached and no PEFT layer is fused; call attach(model, bank) or fuse(model) first")
    names = _adapters(model, layers) if shared is None else []
    clients = len(names) if shared is None else shared.bank.num_clients
    table = client_table(_numbers(ids, names), clients)
    if seeds is not None and (seeds.dtype != torch.int64 or tuple(seeds.shape) != (clients,)):
        raise ValueError(f"seeds: expected an int64 tensor of shape ({clients},), got {seeds.dtype} {tuple(seeds.shape)}")
    check_step(step, clients)
    if sequence_index is not None and (sequence_index.dtype != torch.int64 or tuple(sequence_index.shape) != (table.shape[0],)):
        got = f"{sequence_index.dtype} {tuple(sequence_index.shape)}"
        raise ValueError(f"sequence_index: expected an int64 tensor of shape ({table.shape[0]},), one per sequence, got {got}")
    if shared is not None:
        before, shared.batch = shared.batch, Batch(clients, table, sequence_index, None if seeds is None else seeds.to(shared.bank.device), step)
        try:
            yield table
        finally:
            shared.batch = before
        return
    _check_all_fused(model)
    outer = [layer._hetlora_batch for layer in layers]
    batch = AdapterBatch(names, table, sequence_index, seeds, step)
    try:
        for position, layer in enumerate(layers):
            layer._hetlora_batch = (batch, position)
        yield table
    finally:
        for layer, own in zip(layers, outer, strict=True):
            layer._hetlora_batch = own


def _adapters(model: nn.Module, layers: Sequence[Any]) -> list[str]:
    """The model's adapters in the order they were added."""
    for module in model.modules():
        config = module.__dict__.get("peft_config")
        if isinstance(config, dict):
            return list(config)
    return list(dict.fromkeys(name for layer in layers for name in layer.r))


def _numbers(ids: Any, names: list[str]) -> Any:
    """`ids` with adapter names replaced by their numbers."""
    if isinstance(ids, str):
        if ids != BASE and ids not in names:
            raise ValueError(f"ids: expected one of the adapters {names} or {BASE!r}, got {ids!r}")
        return -1 if ids == BASE else names.index(ids)
    return [_numbers(one, names) for one in ids] if isinstance(ids, (list, tuple)) else ids


def _check_all_fused(model: nn.Module) -> None:
    """`ValueError` where a module of the model would use one adapter for the whole batch."""
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils import AuxiliaryTrainingWrapper

    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and not isinstance(module, FusedLayer):
            what = f"a {type(module).__name__} that is not fused"
        elif isinstance(module, AuxiliaryTrainingWrapper) and module._adapters:
            what = "kept by modules_to_save or trainable tokens"
        else:
            continue
        raise ValueError(f"model: {name!r} is {what}: it knows one adapter for the whole batch, so clients cannot share a batch on this model")
