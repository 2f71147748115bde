"""Carry a bank of K clients' adapters on any model: attach and detach."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from hetlora_kernels._uploads import on_host
from hetlora_kernels.bank import AdapterBank
from hetlora_kernels.linear import linear_shape
from hetlora_kernels.ops.lora import lora_add, lora_linear
from hetlora_kernels.peft import bank_experts
from hetlora_kernels.peft.batch import Batch, Forms, Rows, known_forms, left_is_over
from hetlora_kernels.peft.experts import expert_shape, why_not_experts

_ATTACHMENT = "_hetlora_attachment"
_OWN_FORWARD = "_hetlora_own_forward"
_PLACES = "_hetlora_places"  # of stacked experts: {projection: {expert: (name in the bank, its position)}}
_PACKS = "support_avx512bf16_for_cpu"
_PAST = ("out_proj", "dt_proj")  # of state-space mixers: read by their kernels, as PEFT refuses out_proj


class Attachment:
    """State shared by all attached layers of one model: the bank and the batch's clients."""

    def __init__(self, bank: AdapterBank, scale: float | Sequence[float] | Tensor, dropout: float) -> None:
        shape, clients = tuple(on_host(scale).shape), bank.num_clients
        if shape not in ((), (clients,)):
            raise ValueError(f"scale: expected a number or {clients} numbers, one per client, got shape {shape}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.bank, self.scale, self.dropout = bank, scale, dropout
        self.base_requires_grad: dict[str, bool] = {}
        self.batch = Batch(clients)
        self.unpacked: list[nn.Module] = []
        self.left = False  # whether the last call was inside a `client_segments` block that is over
        self.forms: dict[str, Forms] = {}
        self.layers: dict[str, nn.Module] = {}
        self._modules: tuple[nn.Module, list[nn.Module]] | None = None

    def modules_of(self, model: nn.Module) -> list[nn.Module]:
        """All modules of the model; looked up once."""
        if self._modules is None or self._modules[0] is not model:
            self._modules = model, list(model.modules())
        return self._modules[1]


def _forward(layer: Any, base: Callable[..., Any] | None, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    """base(x) with the clients' terms; base None: a plain `nn.Linear`, whose product goes into one op with them."""
    shared, name, _ = layer.__dict__[_ATTACHMENT]
    batch = shared.batch
    if batch.ids is None and shared.left:
        shared.left = left_is_over(name)
    if batch.follower is None:
        return _compute(layer, base, batch.rows(x, name), x, args, kwargs)
    with batch.follower.paused():
        rows = batch.rows(x, name)
        out = _compute(layer, base, rows, x, args, kwargs)
    batch.follower.set(out, rows.entry)
    return out


def _patched(layer: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _forward(layer, layer.__dict__[_OWN_FORWARD], x, args, kwargs)


def _compute(layer: Any, base: Callable[..., Any] | None, rows: Rows, x: Tensor, args: Any, kwargs: Any) -> Tensor:
    shared, name, position = layer.__dict__[_ATTACHMENT]
    if _PLACES in layer.__dict__:
        return bank_experts.compute(layer, shared, layer.__dict__[_PLACES], rows, x, args, kwargs)
    bank, batch = shared.bank, shared.batch
    seeds = batch.layer_seeds(position, x.device) if shared.dropout else None
    options: dict[str, Any] = {"scale": shared.scale, "dropout": shared.dropout, "seeds": seeds, "training": layer.training or batch.seeds is not None}
    if bank.casts is not None and not torch.compiler.is_compiling():
        options["casts"] = bank.casts.of(name)
    factors = bank.a[name], bank.bt[name], bank.layouts[name], rows.segments
    if base is None:
        return lora_linear(x, layer.weight, layer.bias, *factors, **options)
    out = base(x, *args, **kwargs)
    if not isinstance(out, Tensor):
        raise TypeError(f"bank: layer {name!r} returns a {type(out).__name__}, no tensor that adapters can be added to; leave it out")
    return lora_add(out, x, *factors, **options)


class _AttachedLayer(nn.Module):
    """Mixed in front of a layer's class: its forward adds the clients' LoRA terms. Parameters and state_dict keys stay the layer's own."""

    _plain_linear: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _forward(self, None if type(self)._plain_linear else super().forward, x, args, kwargs)

    def _get_name(self) -> str:
        return type(self).__bases__[-1].__name__

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        twin = memo[id(self)] = type(self).__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise TypeError("model: a bank is attached, and an attached model is not pickled; call detach(model) first and keep bank.state_dict() beside it")


_attached_classes: dict[tuple[type, bool], type] = {}


def _attached_class(layer: nn.Module) -> type:
    cls = type(layer)
    plain = cls is nn.Linear and type(layer.weight) in (nn.Parameter, Tensor)
    if (cls, plain) not in _attached_classes:
        _attached_classes[cls, plain] = type(f"Attached{cls.__name__}", (_AttachedLayer, cls), {"_plain_linear": plain, "__module__": __name__})
    return _attached_classes[cls, plain]


def _carry(layer: nn.Module, shared: Attachment, name: str, position: int, place: bank_experts.Place | None) -> None:
    if place is not None:
        layer.__dict__.setdefault(_PLACES, {}).setdefault(place.projection, {})[place.expert] = name, position
    layer.__dict__.setdefault(_ATTACHMENT, (shared, name, position))
    shared.forms[name], shared.layers[name] = known_forms(layer), layer
    own = layer.__dict__.get("forward")
    if isinstance(layer, _AttachedLayer):
        return  # another of these experts came by
    if own is None:
        layer.__class__ = _attached_class(layer)
    else:  # patched in the instance (accelerate's offloading, other libraries): Python calls that one, whatever the class says
        layer.__dict__[_OWN_FORWARD] = own
        layer.__dict__["forward"] = functools.partial(_patched, layer)  # a deep copy of which holds the copied layer


def _put_back(layer: nn.Module) -> None:
    layer.__dict__.pop(_ATTACHMENT, None)
    layer.__dict__.pop(_PLACES, None)
    if isinstance(layer, _AttachedLayer):
        layer.__class__ = type(layer).__bases__[-1]
    if _OWN_FORWARD in layer.__dict__:
        layer.__dict__["forward"] = layer.__dict__.pop(_OWN_FORWARD)


def attach(model: nn.Module, bank: AdapterBank, scale: float | Sequence[float] | Tensor = 1.0, dropout: float = 0.0) -> nn.Module:
    """Let every module that `bank` names carry its clients' adapters: y = base(x) + scale_k * (drop(x) A_k^T) B_k^T.

    model: any torch model whose modules have the bank's dotted names; `nn.Linear` runs fused, any other layer (quantised, Conv1D) through
    `lora_add` on its own output. Of experts that lie in one parameter (Mixtral, GPT-OSS, ... of transformers 5) each is named by its number:
    "mlp.experts.gate_up_proj.3".   scale: number or [K].
    dropout: probability on the LoRA branch's input, applied by layers in training mode, and in any mode where `client_segments` gives seeds.

    In place: the class of each layer is swapped for a subclass, its parameters and state_dict keys stay. Freezes every parameter of the model
    (`detach` gives their requires_grad back); the bank's factors are trained. A bank of one client needs no `client_segments`.
    Returns `model`. `ValueError` by the name of the module, and nothing is attached, when one is missing, has other widths, is on another device, is no
    linear layer (an embedding, a router that returns several tensors) or has a weight that the model reads past the layer (Mamba's `out_proj`); or
    when a bank is attached already.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> from hetlora_kernels.peft import attach, client_segments, detach
    >>> model = torch.nn.Sequential(torch.nn.Linear(4, 6))
    >>> bank = hk.AdapterBank({"0": (6, 4)}, ranks=[2, 3])
    >>> model = attach(model, bank, scale=2.0)
    >>> with client_segments(model, [1, 0, -1]):  # the client of each row of the batch
    ...     model(torch.randn(3, 4)).sum().backward()
    >>> bank.a["0"].grad.shape, model[0].weight.grad
    (torch.Size([5, 4]), None)
    >>> model = detach(model)
    """
    if attachment(model) is not None:
        raise ValueError("model: a bank is attached already; call detach(model) first")
    modules = dict(model.named_modules())
    places = {name: bank_experts.place_of(name, modules) for name in bank.shapes if name not in modules}
    carriers: dict[str, nn.Module] = {}
    for name, shape in bank.shapes.items():
        place = places.get(name)
        carrier = carriers[name] = modules[name] if place is None else place.experts
        stack = name.rsplit(".", 2)[0]
        if place is not None and stack in bank.shapes:
            raise ValueError(f"bank: module {stack!r} is a stack of experts, and {name!r} one of its projections; name one or the other")
        found = linear_shape(carrier) if place is None else expert_shape(carrier, place.projection)
        if found is not None and found != shape:
            raise ValueError(f"bank: expected (out, in) = {found} for module {name!r} as in the model, got {shape}")
        reason = _why_not(carrier, modules.get(name.rpartition(".")[0])) if place is None else why_not_experts(carrier)
        if reason is not None:
            raise ValueError(f"bank: module {name!r} {reason}; leave it out")
        for parameter in carrier.parameters(recurse=False):
            if parameter.device not in (bank.device, torch.device("meta")):
                raise ValueError(f"bank: expected device {parameter.device} of module {name!r} as the model, got {bank.device}")
    parameter = next((p for p in model.parameters() if p.device.type != "meta"), None)
    if bank.device.type == "meta" or (parameter is not None and parameter.device != bank.device and not hasattr(model, "hf_device_map")):
        raise ValueError(f"bank: expected device {'that holds data' if parameter is None else parameter.device} as the model, got {bank.device}")
    for name, module in modules.items():
        if getattr(getattr(getattr(module, "weight", None), "quant_state", None), "packing_format_for_cpu", False):
            raise ValueError(
                f"model: bitsandbytes has packed the weight of {name!r} for inference, gradients do not pass; load the model anew and attach first"
            )
    shared = Attachment(bank, scale, dropout)
    shared.base_requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for position, name in enumerate(bank.shapes):
            _carry(carriers[name], shared, name, position, places.get(name))
    except BaseException:
        for carrier in carriers.values():
            _put_back(carrier)
        raise
    model.requires_grad_(False)
    for module in modules.values():
        if getattr(module, _PACKS, False):  # bitsandbytes, 4-bit, in eval mode on a CPU
            module.__dict__[_PACKS] = False
            shared.unpacked.append(module)
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: the layers' own classes and the parameters' requires_grad come back. `ValueError` when nothing is attached.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> from hetlora_kernels.peft import attach, detach
    >>> model = attach(torch.nn.Sequential(torch.nn.Linear(4, 6)), hk.AdapterBank({"0": (6, 4)}, ranks=[2]))
    >>> type(model[0]).__name__, model[0].weight.requires_grad
    ('AttachedLinear', False)
    >>> type(detach(model)[0]).__name__, model[0].weight.requires_grad
    ('Linear', True)
    """
    shared = attachment(model)
    if shared is None:
        raise ValueError("model: no bank is attached; call attach(model, bank) first")
    for module in model.modules():
        if _ATTACHMENT in module.__dict__:
            _put_back(module)
    for module in shared.unpacked:
        module.__dict__[_PACKS] = True
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(shared.base_requires_grad.get(name, parameter.requires_grad))
    return model


def _why_not(layer: nn.Module, parent: nn.Module | None) -> str | None:
    """Why a layer cannot carry adapters; None where it can."""
    kind = type(layer)
    if isinstance(layer, (nn.Embedding, nn.EmbeddingBag, nn.modules.conv._ConvNd, nn.ModuleList, nn.ModuleDict, nn.Sequential)):
        return f"is a {kind.__name__}, no linear layer"
    past = hasattr(parent, "A_log") and any(layer is getattr(parent, name, None) for name in _PAST)
    if past or isinstance(layer, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return f"is the {kind.__name__} of a {type(parent).__name__}, which reads its weight past the layer, where no adapter takes part"
    if isinstance(layer, nn.Linear) and kind.__module__.partition(".")[0] not in ("torch", "bitsandbytes") and "forward" not in layer.__dict__:
        try:
            with torch.no_grad():
                out = kind.forward(layer, torch.zeros(1, 1, layer.in_features, dtype=layer.weight.dtype, device=layer.weight.device))
        except Exception:  # asks for more than an input
            return None
        if not isinstance(out, Tensor):
            return f"is a {kind.__name__}, which returns a {type(out).__name__} (a router?), no tensor that adapters can be added to"
    return None


def attachment(model: nn.Module) -> Attachment | None:
    """What the attached layers of `model` share; None where nothing is attached."""
    for module in model.modules():
        if _ATTACHMENT in module.__dict__:
            return module.__dict__[_ATTACHMENT][0]
    return None
