"""Carry a bank of K clients' adapters on any model: attach and detach."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from hetlora_kernels.bank import AdapterBank
from hetlora_kernels.linear import linear_shape
from hetlora_kernels.ops.lora import lora_add, lora_linear
from hetlora_kernels.peft.batch import Batch, Rows, known_forms, left_is_over

_ATTACHMENT = "_hetlora_attachment"


class Attachment:
    """State shared by all attached layers of one model: the bank and the batch's clients."""

    def __init__(self, bank: AdapterBank, scale: float | Sequence[float] | Tensor, dropout: float) -> None:
        shape, clients = tuple(torch.as_tensor(scale).shape), bank.num_clients
        if shape not in ((), (clients,)):
            raise ValueError(f"scale: expected a number or {clients} numbers, one per client, got shape {shape}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.bank, self.scale, self.dropout = bank, scale, dropout
        self.base_requires_grad: dict[str, bool] = {}
        self.batch = Batch(clients)
        self.left = False  # whether the last call was inside a `client_segments` block that is over
        self.forms: dict[str, dict[int, Any]] = {}


class _AttachedLayer(nn.Module):
    """Mixed in front of a layer's class: its forward adds the clients' LoRA terms. Parameters and state_dict keys stay the layer's own."""

    _plain_linear: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared, name, position = self.__dict__[_ATTACHMENT]
        batch = shared.batch
        if shared.left:
            shared.left = left_is_over(shared.left, name)
        rows = batch.rows(x, name)
        if batch.follower is None:
            return self._compute(shared, name, position, rows, x, args, kwargs)
        with batch.follower.paused():
            out = self._compute(shared, name, position, rows, x, args, kwargs)
        batch.follower.set(out, rows.entry)
        return out

    def _compute(self, shared: Attachment, name: str, position: int, rows: Rows, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        bank, batch = shared.bank, shared.batch
        layout, segments = bank.layouts[name], rows.segments
        training = self.training or batch.seeds is not None
        seeds = batch.layer_seeds(position) if shared.dropout else None
        options = {"scale": shared.scale, "dropout": shared.dropout, "seeds": seeds, "training": training}
        if type(self)._plain_linear:
            return lora_linear(x, cast(Tensor, self.weight), cast("Tensor | None", self.bias), bank.a[name], bank.bt[name], layout, segments, **options)
        return lora_add(super().forward(x, *args, **kwargs), x, bank.a[name], bank.bt[name], layout, segments, **options)

    def _get_name(self) -> str:
        return type(self).__mro__[2].__name__


_attached_classes: dict[type, type] = {}


def _attached_class(cls: type) -> type:
    if cls not in _attached_classes:
        _attached_classes[cls] = type(f"Attached{cls.__name__}", (_AttachedLayer, cls), {"_plain_linear": cls is nn.Linear, "__module__": __name__})
    return _attached_classes[cls]


def attach(model: nn.Module, bank: AdapterBank, scale: float | Sequence[float] | Tensor = 1.0, dropout: float = 0.0) -> nn.Module:
    """Let every module that `bank` names carry its clients' adapters: y = base(x) + scale_k * (drop(x) A_k^T) B_k^T.

    model: any torch model whose modules have the bank's dotted names; `nn.Linear` runs fused, any other layer (quantised, Conv1D) through
    `lora_add` on its own output.   scale: number or [K].
    dropout: probability on the LoRA branch's input, applied by layers in training mode, and in any mode where `client_segments` gives seeds.

    In place: the class of each layer is swapped for a subclass, its parameters and state_dict keys stay. Freezes every parameter of the model
    (`detach` gives their requires_grad back); the bank's factors are trained. A bank of one client needs no `client_segments`.
    Returns `model`. `ValueError` when a module is missing, has other widths, is on another device, or a bank is attached already.
    """
    if any(_ATTACHMENT in module.__dict__ for module in model.modules()):
        raise ValueError("model: a bank is attached already; call detach(model) first")
    modules = dict(model.named_modules())
    for name, shape in bank.shapes.items():
        if name not in modules:
            raise ValueError(f"bank: module {name!r} is not in the model")
        found = linear_shape(modules[name])
        if found is not None and found != shape:
            raise ValueError(f"bank: expected (out, in) = {found} for module {name!r} as in the model, got {shape}")
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device != bank.device:
        raise ValueError(f"bank: expected device {parameter.device} as the model, got {bank.device}")
    shared = Attachment(bank, scale, dropout)
    shared.base_requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for position, name in enumerate(bank.shapes):
        layer = modules[name]
        layer.__dict__[_ATTACHMENT] = (shared, name, position)
        shared.forms[name] = known_forms(layer)
        layer.__class__ = _attached_class(type(layer))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: the layers' own classes and the parameters' requires_grad come back. `ValueError` when nothing is attached."""
    shared = attachment(model)
    if shared is None:
        raise ValueError("model: no bank is attached; call attach(model, bank) first")
    for module in model.modules():
        if _ATTACHMENT in module.__dict__:
            module.__class__ = type(module).__mro__[2]
            del module.__dict__[_ATTACHMENT]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(shared.base_requires_grad.get(name, parameter.requires_grad))
    return model


def attachment(model: nn.Module) -> Attachment | None:
    """What the attached layers of `model` share; None where nothing is attached."""
    for module in model.modules():
        if _ATTACHMENT in module.__dict__:
            return module.__dict__[_ATTACHMENT][0]
    return None
