"""`fuse`, `unfuse`, `enable`: give PEFT's LoRA layers the fused forward, and say which layers have it and which do not."""

from __future__ import annotations

import warnings
from collections import Counter
from dataclasses import dataclass, field
from typing import Any, cast
from weakref import WeakValueDictionary

from peft import LoraConfig
from peft.tuners.lora import LoraLayer, LoraModel
from peft.tuners.lora.layer import Linear, ParamWrapper
from torch import nn

from hetlora_kernels.peft import fused_experts
from hetlora_kernels.peft.fused import FusedLayer, tell


class FusedLinear(FusedLayer, Linear):
    """`peft.tuners.lora.Linear` with the fused forward.

    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from hetlora_kernels.peft import FusedLinear, fuse
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"]))
    >>> report = fuse(model)
    >>> isinstance(model.base_model.model[0], FusedLinear)
    True
    """


class FusedParamWrapper(fused_experts.FusedExperts, ParamWrapper):
    """`peft.tuners.lora.ParamWrapper` (`target_parameters`) with the fused forward, around stacked experts."""


FusedParamWrapper.__name__ = "ParamWrapper"  # PEFT knows the layer by it where another parameter or adapter comes


@dataclass
class FuseReport:
    """Which LoRA layers run fused. Printing it gives the summary.

    fused: {layer: "lora_linear", the frozen product and the adapters in one op, or "lora_add: why", the adapters added to the base layer's output};
    left: {layer: why PEFT's own forward runs}.

    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from hetlora_kernels.peft import fuse
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"]))
    >>> report = fuse(model)
    >>> report.fused, report.left
    ({'base_model.model.0': 'lora_linear'}, {})
    """

    fused: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"fused {len(self.fused)} of {len(self.fused) + len(self.left)} LoRA layers"]
        for heading, layers in (("fused, ", self.fused), ("left to PEFT, ", self.left)):
            for reason, count in Counter(layers.values()).items():
                first = next(name for name, why in layers.items() if why == reason)
                lines.append(f"  {heading}{reason}: {count} ({first}{', ...' if count > 1 else ''})")
        return "\n".join(lines)

    def _add(self, name: str, layer: LoraLayer, reason: str | None) -> None:
        self.fused.pop(name, None)
        self.left.pop(name, None)
        if isinstance(layer, FusedLayer):
            not_linear, reason = layer.modes()
            if reason is None:
                self.fused[name] = "lora_linear" if not_linear is None else f"lora_add: {not_linear}"
                return
        self.left[name] = str(reason)


class _LiveReport(FuseReport):
    """Of layers that are made while the model is not finished: PEFT freezes the base after it. What runs is looked up when it is asked for."""

    def __init__(self) -> None:
        self._known = FuseReport()
        self._made: WeakValueDictionary[str, LoraLayer] = WeakValueDictionary()

    def _looked_up(self) -> FuseReport:
        for name, layer in list(self._made.items()):
            if isinstance(layer, FusedLayer):
                self._known._add(name, layer, None)
        return self._known

    @property  # type: ignore[misc]
    def fused(self) -> dict[str, str]:  # type: ignore[override]
        return self._looked_up().fused

    @property  # type: ignore[misc]
    def left(self) -> dict[str, str]:  # type: ignore[override]
        return self._looked_up().left

    def _add(self, name: str, layer: LoraLayer, reason: str | None) -> None:
        self._known._add(name, layer, reason)
        self._made[name] = layer

    def __reduce__(self) -> Any:
        return FuseReport, (dict(self.fused), dict(self.left))


_bitsandbytes: dict[str, type] = {}


def _fused_class(cls: type) -> type | None:
    """The fused subclass of a LoRA layer's class, or None where there is none."""
    if cls is Linear:
        return FusedLinear
    if cls is ParamWrapper:
        return FusedParamWrapper
    if cls.__module__ != "peft.tuners.lora.bnb" or cls.__name__ not in ("Linear4bit", "Linear8bitLt"):
        return None
    name = f"Fused{cls.__name__}"
    if name not in _bitsandbytes:
        _bitsandbytes[name] = type(name, (FusedLayer, cls), {"__module__": __name__, "__doc__": f"`{cls.__name__}` of PEFT with the fused forward."})
    return _bitsandbytes[name]


def __getattr__(name: str) -> Any:
    """Pickled models find the bitsandbytes classes here, which exist once a model has such layers."""
    if name in ("FusedLinear4bit", "FusedLinear8bitLt"):
        from peft.tuners.lora import bnb

        return _fused_class(getattr(bnb, name.removeprefix("Fused")))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _swap(layer: LoraLayer) -> str | None:
    """Give the layer its fused class; returns why not where that cannot be."""
    if isinstance(layer, FusedLayer):
        return None
    fused = _fused_class(type(layer))
    if fused is None:
        subject = "a subclass of lora.Linear" if isinstance(layer, Linear) else "not a lora.Linear"
        base = type(layer.get_base_layer()).__name__
        return f"{type(layer).__module__.rpartition('.')[2]}.{type(layer).__name__} over {base} is {subject}"
    if "forward" in layer.__dict__:
        return "its forward is patched"
    reason = fused_experts.fits(layer) if fused is FusedParamWrapper else None
    if reason is not None:
        return reason
    layer.__class__ = fused
    return None


def fuse(model: nn.Module) -> FuseReport:
    """Turn every LoRA linear of an existing PEFT model into its fused subclass, in place.

    model: a `PeftModel`, or any model with PEFT LoRA layers in it.

    Parameters, state_dict keys, optimiser state, saving, merging, adapters and hooks stay as they are: only the class of the layers changes, so a fused model
    saves as a stock one and loads as a stock one (call `fuse` after loading). Calling it again, after adapters were added, is harmless.

    Returns a report of what is fused and what is left to PEFT, with the reason; a `UserWarning` says so too where anything is left. `ValueError` where the
    model has no LoRA layer. Second derivatives are refused by the fused layers: `unfuse` for them. Dropout masks are this project's own: same distribution
    as PEFT's, other draws.

    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from hetlora_kernels.peft import fuse
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"]))
    >>> print(fuse(model))
    fused 1 of 1 LoRA layers
      fused, lora_linear: 1 (base_model.model.0)
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoraLayer)}
    if not layers:
        raise ValueError("model: expected a model with PEFT LoRA layers, found none")
    report = FuseReport()
    reasons = {name: _swap(layer) for name, layer in layers.items()}
    for name, layer in layers.items():  # what the whole of them made of each
        report._add(name, layer, reasons[name])
    if report.left:
        warnings.warn(f"hetlora_kernels.peft: {report}", stacklevel=2)
    return report


def unfuse(model: nn.Module) -> nn.Module:
    """Give every fused layer of `model` its PEFT class back, in place; returns `model`. `ValueError` where none is fused.

    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from hetlora_kernels.peft import fuse, unfuse
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), LoraConfig(r=2, target_modules=["0"]))
    >>> report = fuse(model)
    >>> type(model.base_model.model[0]).__module__, type(unfuse(model).base_model.model[0]).__module__
    ('hetlora_kernels.peft.swap', 'peft.tuners.lora.layer')
    """
    layers = [module for module in model.modules() if isinstance(module, FusedLayer)]
    if not layers:
        raise ValueError("model: expected a model with fused layers, found none")
    for layer in layers:
        layer.__class__ = type(layer).__bases__[-1]
        layer.__dict__.pop("_hetlora_batch", None)
    return model


class _Registration:
    """What PEFT calls to make the LoRA layer of a module: its own layer, then the fused class."""

    def __init__(self, config: LoraConfig) -> None:
        self.config, self.report = config, _LiveReport()

    def __call__(self, target: nn.Module, adapter_name: str, config: LoraConfig | None = None, **kwargs: Any) -> nn.Module:
        config = self.config if config is None else config  # PEFT before 0.18 passes none
        registered = config._custom_modules or {}
        config._custom_modules = {key: made for key, made in registered.items() if cast(Any, made) is not self} or None
        try:
            layer = LoraModel._create_new_module(config, adapter_name, target, **kwargs)
        finally:
            config._custom_modules = registered
        name = kwargs.get("target_name") or type(target).__name__
        self.report._add(name, layer, _swap(layer))
        left = self.report.left
        if name in left:
            tell(left[name])
        return layer


def enable(config: LoraConfig) -> FuseReport:
    """Let models that are made from `config` (`get_peft_model`, `add_adapter`, ...) have fused LoRA layers from the start.

    Uses PEFT's registration of custom layers on this one config; nothing of it is saved with the adapter. Layers that cannot be fused are PEFT's own.

    Returns a report that fills as layers are made and says what runs when it is asked: print it after `get_peft_model`. A warning says once for each reason
    what is left. `TypeError` where `config` is not a `LoraConfig`.

    >>> from peft import LoraConfig, get_peft_model
    >>> from torch import nn
    >>> from hetlora_kernels.peft import enable
    >>> config = LoraConfig(r=2, target_modules=["0"])
    >>> report = enable(config)
    >>> model = get_peft_model(nn.Sequential(nn.Linear(4, 6)), config)
    >>> len(report.fused), report.left
    (1, {})
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"config: expected a peft.LoraConfig, got {type(config).__name__}")
    mapping: dict[Any, Any] = config._custom_modules or {}
    for made in mapping.values():
        if isinstance(made, _Registration):
            return made.report
    registration = _Registration(config)
    config._register_custom_module(cast(Any, {nn.Module: registration}))
    return registration.report
