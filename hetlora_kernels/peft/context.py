"""`client_segments`: name the client of each sequence or token of a batch, for an attached bank or for the adapters of a fused PEFT model."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hetlora_kernels.layout import check_int64
from hetlora_kernels.peft.attached import Attachment, attachment
from hetlora_kernels.peft.batch import Batch, known_forms
from hetlora_kernels.peft.calls import Holder, ModelCalls, checkpointing, holding
from hetlora_kernels.peft.fused import BASE, AdapterBatch, FusedLayer
from hetlora_kernels.peft.ids import check_step, client_rows, client_table
from hetlora_kernels.peft.training import Training, all_known
from hetlora_kernels.peft.wrappers import check_wrappers


@contextmanager
def client_segments(
    model: nn.Module,
    ids: Sequence[int] | Sequence[str] | Tensor,
    seeds: Tensor | None = None,
    step: int | Tensor = 0,
    sequence_index: Tensor | None = None,
    rows: Mapping[str, Any] | None = None,
    positions: Tensor | None = None,
) -> Iterator[Tensor]:
    """Name the client of each sequence (or token) of the batch; spans forward and backward. Yields the clients as int64, [batch] or [batch, seq].

    model: one that carries a bank (`attach`), or a PEFT model whose LoRA layers are fused (`fuse`, `enable`). There the K clients are its adapters, in the
    order they were added, active or not: each row gets its own adapter and no other, in training as in inference. Which of them train is, as
    ever, their parameters' requires_grad (`model.base_model.set_adapter([...])` sets it). An adapter that owns no row gets no gradient.
    ids: [batch] or [batch, seq], -1 = base only, any order; for a PEFT model also adapter names, "__base__" = base only. Where transformers' `generate` repeats
    the batch (beams, several answers), those before or after the repetition.
    seeds: int64 [K], one dropout seed per client; every layer and step mixes its own from them. None: drawn from torch's generator.
    step: the step's number, an integer or int64 [K].
    sequence_index: int64 [batch], each sequence's index in its client's step batch; default its position among the client's sequences here.
    Micro-batches of one step pass it, so that a row's mask does not depend on the split.
    positions: int64 [batch, seq], the place of each token in its sequence, where a row holds several sequences (packing): the model's `position_ids`. ids and
    sequence_index then have this shape too, and masks are those of the same sequences in rows of their own. That no sequence sees another's tokens is
    the model's part.
    rows: {part of the model: clients of the rows of its layers' inputs}, for parts whose inputs are no rows of the sequences, as a vision tower's patches.
    A part is a module's dotted name or words in a row of it ("visual"); of several that fit a layer the longest counts. The clients have the input's leading
    shape, or are a list of all its rows.

    Rows that the model moves about (routed tokens, flattened, sequence-first, pooled) are followed from its inputs to each layer. `ValueError` by the name
    of the layer where that is not possible for certain.

    `ValueError` where neither is there, and for a PEFT model with adapters in a layer that is not fused or with `modules_to_save`: these know one adapter
    for the whole batch. `RuntimeError` from a layer whose adapter is a variant (DoRA, ...) or merged.

    >>> import torch
    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from hetlora_kernels.peft import client_segments, fuse
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"]), adapter_name="alice")
    >>> model.add_adapter("bob", LoraConfig(r=3, target_modules=["0"]))
    >>> report = fuse(model)
    >>> model.base_model.set_adapter(["alice", "bob"])  # both are trained
    >>> with client_segments(model, ["bob", "alice", "__base__"]) as ids:  # the adapter of each row of the batch
    ...     model(torch.randn(3, 4)).sum().backward()
    >>> ids.tolist(), model.base_model.model[0].lora_B["bob"].weight.grad.shape
    ([1, 0, -1], torch.Size([6, 3]))
    """
    shared = attachment(model)
    layers = {} if shared is not None else {name: module for name, module in model.named_modules() if isinstance(module, FusedLayer)}
    if shared is None and not layers:
        raise ValueError("model: no bank is attached and no PEFT layer is fused; call attach(model, bank) or fuse(model) first")
    names = _adapters(model, list(layers.values())) if shared is None else []
    modules = list(model.modules()) if shared is None else shared.modules_of(model)
    check_wrappers(model, modules, shared is not None, names)
    clients = len(names) if shared is None else shared.bank.num_clients
    table = client_table(_numbers(ids, names), clients)
    given = {part: client_rows(part, _numbers(own, names), clients) for part, own in (rows or {}).items()}
    if seeds is not None and not isinstance(seeds, Tensor):
        raise TypeError(f"seeds: expected an int64 tensor of shape ({clients},), got a {type(seeds).__name__}")
    if seeds is not None:
        check_int64("seeds", seeds, (clients,))
    check_step(step, clients)
    if positions is not None:
        _check_packed(table, sequence_index, positions)
    elif sequence_index is not None:
        check_int64("sequence_index", sequence_index, (table.shape[0],), ", one per sequence")
    forms = shared.forms if shared is not None else {name: known_forms(layer) for name, layer in layers.items()}
    for part in given:
        if not any(f".{part}." in f".{name}." for name in forms):
            raise ValueError(f"rows: no adapted layer is in a part {part!r} of the model")
        for stack in _stacks(layers if shared is None else shared.layers):
            inside_part = [f".{part}." in f".{name}." for name in stack]
            if any(inside_part) and not all(inside_part):
                raise ValueError(
                    f"rows: a part {part!r} has some of the projections of experts whose rows come together; name the experts as a whole, as in {stack[0]!r}"
                )
    batch: Batch
    if shared is not None:
        batch = Batch(clients, table, sequence_index, seeds if shared.dropout else None, step, given, forms, positions)
        everything: list[Holder] = [(shared, "batch", batch)]
    else:
        _check_all_fused(model)
        batch = AdapterBatch(names, table, sequence_index, seeds, step, given, forms, positions)
        everything = [(layer, "_hetlora_batch", (batch, position)) for position, layer in enumerate(layers.values())]
    for device in {shared.bank.device} if shared is not None else {parameter.device for layer in layers.values() for parameter in layer.parameters()}:
        if device.type != "meta":  # an offloaded weight
            batch.place(device)
    batch.thread = get_ident()

    def current() -> Batch | None:
        if shared is not None:
            return shared.batch
        given = next(iter(layers.values()))._hetlora_batch
        return None if given is None else given[0]

    calls = ModelCalls(model, modules, batch, layers if shared is None else shared.layers, current)
    owners = ["the bank"] if shared is not None else [f"adapter {name!r}" for name in cast(AdapterBatch, batch).names]
    training = Training(model, _factors(batch, shared, layers)) if torch.is_grad_enabled() and not all_known(model, owners) else None

    def inside(module: nn.Module) -> list[Holder]:
        members = set(module.modules())
        return everything if shared is not None else [holder for holder in everything if holder[0] in members]

    try:
        with _of_this_thread(shared or next(iter(layers.values()))), holding(everything), calls, checkpointing(modules, batch, inside):
            yield table
        if training is not None:
            training.tell(batch.ran)
    finally:
        if shared is not None:
            shared.left = True
        for layer in layers.values():
            layer._hetlora_left = True


def _check_packed(table: Tensor, sequence_index: Tensor | None, positions: Tensor) -> None:
    """`ValueError` where rows of several sequences do not say by token whose they are."""
    shape = tuple(table.shape)
    if len(shape) != 2:
        raise ValueError(f"positions: only with ids per token, [batch, seq], got ids of shape {shape}")
    for name, tensor in (("positions", positions), ("sequence_index", sequence_index)):
        check_int64(name, tensor, shape, ", one per token, beside ids per token and positions")


def _adapters(model: nn.Module, layers: Sequence[Any]) -> list[str]:
    """The model's adapters in the order they were added."""
    for module in model.modules():
        config = module.__dict__.get("peft_config")
        if isinstance(config, dict):
            return list(config)
    return list(dict.fromkeys(name for layer in layers for name in layer.r))


_threads: WeakKeyDictionary[Any, int] = WeakKeyDictionary()


@contextmanager
def _of_this_thread(holder: Any) -> Iterator[None]:
    """`RuntimeError` where another thread is in a block of the same model: each would give the other its rows."""
    before, here = _threads.get(holder), get_ident()
    if before not in (None, here):
        raise RuntimeError("client_segments: another thread is inside a block of this model; give each thread a model of its own")
    _threads[holder] = here
    try:
        yield
    finally:
        if before is None:
            _threads.pop(holder, None)


def _stacks(layers: Mapping[str, nn.Module]) -> list[list[str]]:
    """Names of layers that are one module: the projections of stacked experts, for which one of them is asked whose the rows are."""
    stacks: dict[int, list[str]] = {}
    for name, layer in layers.items():
        experts = cast(Any, layer).get_base_layer() if isinstance(layer, FusedLayer) else layer
        stacks.setdefault(id(experts), []).append(name)
    return [names for names in stacks.values() if len(names) > 1]


def _factors(batch: Batch, shared: Attachment | None, layers: Mapping[str, Any]) -> Iterator[tuple[str, str, nn.Parameter]]:
    """(who they are, layer, factor) of what owns rows in the batch."""
    if shared is not None:
        for name in shared.bank.shapes:
            yield from (("the bank", name, factor) for factor in (shared.bank.a[name], shared.bank.bt[name]))
        return
    for adapter in cast(AdapterBatch, batch).names:
        for name, layer in layers.items():
            yield from ((f"adapter {adapter!r}", name, side[adapter].weight) for side in (layer.lora_A, layer.lora_B) if adapter in side)


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
