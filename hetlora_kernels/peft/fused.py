"""The fused forward of a PEFT LoRA layer: base product and adapters in one op. `fuse` puts `FusedLayer` in front of the layer's class.

Every call asks two things. Is the layer disabled, merged, inside `client_segments` or given `adapter_names`? Are the modules that it stands for plain? A hook
or a patched forward must run. All of it reads attributes; rank layouts and segments are made once and shared by the layers.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from hetlora_kernels.layout import RankLayout, Segments
from hetlora_kernels.ops._lists import FLOATS
from hetlora_kernels.ops.lora import lora_add, lora_linear
from hetlora_kernels.peft.batch import Batch, Forms, Rows, left_is_over

BASE = "__base__"  # PEFT's name for "no adapter" in adapter_names
_LARGEST_DROPOUT = 1 - 2**-16
_TENSORS = (nn.Parameter, Tensor)

Term = tuple[nn.Linear, nn.Linear, float, float]  # lora_A, lora_B, dropout, scaling

_told: set[str] = set()


def tell(reason: str) -> None:
    """Say once in this process that a LoRA layer runs PEFT's own forward, and why."""
    if reason not in _told and not torch.compiler.is_compiling():
        _told.add(reason)
        warnings.warn(f"hetlora_kernels.peft: a LoRA layer runs PEFT's own forward: {reason}", stacklevel=3)


def _sole(rank: int, rows: int) -> tuple[RankLayout, Segments]:
    """One client of this rank that owns every row."""
    return RankLayout([rank]), Segments(rows, [0], [rows], None, None)


_kept_sole = lru_cache(maxsize=64)(_sole)


def _plain(module: nn.Module, cls: type) -> bool:
    """Whether calling `module` is nothing but `cls.forward`."""
    state = module.__dict__
    hooks = state["_forward_hooks"] or state["_forward_pre_hooks"] or state["_backward_hooks"] or state["_backward_pre_hooks"]
    return type(module) is cls and not hooks and "forward" not in state


def _parameter(module: nn.Module, name: str) -> Any:
    """`getattr(module, name)` past nn.Module's slow look-up; FSDP keeps parameters as plain attributes."""
    own = module._parameters
    return own[name] if name in own else getattr(module, name)


def _without_names(kwargs: dict[str, Any]) -> None:
    """What is for PEFT's own forward and not for the base layer."""
    for key in ("adapter_names", "alora_offsets"):
        kwargs.pop(key, None)


def why_not_linear(base: nn.Module) -> str | None:
    """Why the base product is left to the base layer itself; None where `lora_linear` may compute it."""
    if not _plain(base, nn.Linear):
        return f"the base layer is a {type(base).__name__}" if type(base) is not nn.Linear else "the base layer has hooks or a patched forward"
    weight = _parameter(base, "weight")
    if type(weight) not in _TENSORS:
        return f"the base layer's weight is a {type(weight).__name__}"
    return "the base layer's weight is trained" if weight.requires_grad and torch.is_grad_enabled() else None


class AdapterBatch(Batch):
    """A batch whose clients are adapters of one PEFT model; only those that own a row are its clients."""

    def __init__(
        self,
        names: Sequence[str],
        ids: Tensor,
        sequence_index: Tensor | None = None,
        seeds: Tensor | None = None,
        step: int | Tensor = 0,
        given: Mapping[str, Tensor] | None = None,
        forms: Mapping[str, Forms] | None = None,
        positions: Tensor | None = None,
    ) -> None:
        """names: all adapters, that `ids`, `seeds`, `given` and a `step` [K] count."""
        given = given or {}
        everyone = torch.cat([ids.reshape(-1).cpu(), *(own.reshape(-1).cpu() for own in given.values())])
        present = [k for k in everyone.unique().tolist() if k >= 0]
        local = torch.full((len(names) + 1,), -1, dtype=torch.int64, device="cpu")  # the last one serves -1
        local[present] = torch.arange(len(present), device="cpu")
        seeds = None if seeds is None else seeds[present]
        step = step[present] if isinstance(step, Tensor) and step.dim() else step
        own = {part: local[rows.cpu()].to(rows.device) for part, rows in given.items()}
        super().__init__(len(present), local[ids.cpu()].to(ids.device), sequence_index, seeds, step, own, forms, positions)
        self.names = tuple(names[k] for k in present)
        self.layers = tuple(forms) if forms else ("",)  # by position


_named: dict[tuple, AdapterBatch] = {}


def _named_batch(names: Sequence[str]) -> AdapterBatch:
    """The batch that PEFT's `adapter_names` describes; the last one is kept, as every layer of the model asks for it."""
    key = tuple(names), torch.is_inference_mode_enabled()
    if key not in _named:
        adapters = [name for name in dict.fromkeys(names) if name != BASE]
        ids = torch.tensor([-1 if name == BASE else adapters.index(name) for name in names], dtype=torch.int64, device="cpu")
        _named.clear()
        _named[key] = AdapterBatch(adapters, ids)
    return _named[key]


class FusedLayer(nn.Module):
    """Mixed in front of `peft.tuners.lora.Linear` (or a bitsandbytes one): y = x W^T + bias + sum over its adapters of scaling * (drop(x) A^T) B^T.

    Parameters, state_dict keys, merging, saving and everything but `forward` are PEFT's own. The frozen product is fused where the base is a plain
    `nn.Linear` (`lora_linear`), else the adapters are added to the base layer's output (`lora_add`). PEFT's own forward runs, and a warning says
    so once, for LoRA variants, adapters with hooks, patched forwards or modules of another class, scalings that are tensors, dropout of 1, and inside
    `peft.helpers.disable_input_dtype_casting`.
    """

    _hetlora_batch: tuple[AdapterBatch, int] | None = None  # set inside `client_segments`: the batch, and the layer's position in the model
    _hetlora_left = False  # whether the last call was inside a `client_segments` block that is over

    # PEFT's
    _active_adapter: str | list[str]
    _disable_adapters: bool
    cast_input_dtype_enabled: bool
    lora_variant: dict[str, Any]
    merged_adapters: list[str]
    scaling: dict[str, Any]

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._hetlora_batch is not None:
            return self._mixed(self._hetlora_batch, x, args, kwargs)
        if self._hetlora_left:
            self._hetlora_left = left_is_over(self._get_name())
        if self._disable_adapters or self.merged_adapters:
            return super().forward(x, *args, **kwargs)
        if kwargs and kwargs.get("adapter_names") is not None:
            return self._with_names(x, args, kwargs)
        active = self._active_adapter
        terms: list[Term] = []
        for name in (active,) if isinstance(active, str) else active:
            term = self._term(name, False)
            if isinstance(term, str):
                tell(term)
                return super().forward(x, *args, **kwargs)
            if term is not None:
                terms.append(term)
        if not terms or x.dtype not in FLOATS:  # no active adapter here, or an input that only PEFT's own casts make fit
            return super().forward(x, *args, **kwargs)
        if kwargs:
            _without_names(kwargs)
        extra = None
        for _, b, _, scaling in terms:
            bias = _parameter(b, "bias")
            if bias is not None:
                extra = bias * scaling if extra is None else extra + bias * scaling
        out = self._base(x, extra, args, kwargs)
        rows = x.numel() // x.shape[-1]
        sole = _sole if torch.compiler.is_compiling() else _kept_sole  # a traced call must not depend on what others left here
        for a, b, p, scaling in terms:
            factor_a, factor_b = _parameter(a, "weight"), _parameter(b, "weight")
            one = sole(factor_a.shape[0], rows)
            if isinstance(out, Tensor):
                out = lora_add(out, x, factor_a, factor_b, *one, scaling, p, transposed=True)
            else:
                out = lora_linear(x, *out, factor_a, factor_b, *one, scaling, p, transposed=True)
        assert isinstance(out, Tensor)
        return out

    def _get_name(self) -> str:
        return type(self).__bases__[-1].__name__

    def _term(self, name: str, seeded: bool) -> Term | str | None:
        """What adapter `name` adds here, None where this layer lacks it, or the reason why it must go through PEFT's own forward."""
        modules: dict[str, Any] = self._modules
        a = modules["lora_A"]._modules.get(name)
        if a is None:
            return None
        if name in self.lora_variant:
            return f"adapter {name!r} is a LoRA variant, {type(self.lora_variant[name]).__name__}"
        b, drop, scaling = modules["lora_B"]._modules[name], modules["lora_dropout"]._modules[name], self.scaling[name]
        if not (_plain(a, nn.Linear) and _plain(b, nn.Linear) and type(_parameter(a, "weight")) in _TENSORS and type(_parameter(b, "weight")) in _TENSORS):
            return f"lora_A or lora_B of adapter {name!r} has hooks, a patched forward, or is no plain nn.Linear"
        p = 0.0
        if type(drop) is not nn.Identity or not _plain(drop, nn.Identity):
            if not _plain(drop, nn.Dropout) or drop.inplace or drop.p > _LARGEST_DROPOUT:
                return f"the dropout of adapter {name!r} is not an nn.Dropout below 1 without hooks"
            p = drop.p if drop.training or seeded else 0.0
        if type(scaling) not in (float, int):
            return f"the scaling of adapter {name!r} is a {type(scaling).__name__}, not a number"
        if not self.cast_input_dtype_enabled:
            return "PEFT's casting of inputs to the adapter's type is switched off"
        return a, b, p, scaling

    def _terms(self, names: Iterable[str], seeded: bool) -> tuple[list[Term | None], str | None]:
        """(what each adapter adds here, None), or ([], why one of them must go through PEFT's own forward)."""
        terms: list[Term | None] = []
        for name in names:
            term = self._term(name, seeded)
            if isinstance(term, str):
                return [], term
            terms.append(term)
        return terms, None

    def modes(self) -> tuple[str | None, str | None]:
        """(why the base product is not fused, why PEFT's own forward runs), for any of the layer's adapters; None where neither."""
        return why_not_linear(cast(nn.Module, self.base_layer)), self._terms(cast(nn.Module, self.lora_A)._modules, False)[1]

    def _base(self, x: Tensor, extra: Tensor | None, args: Any, kwargs: Any) -> tuple[Tensor, Tensor | None] | Tensor:
        """(weight, bias with `extra` added) where the base product can be fused for this input, else the base layer's output with `extra` added.

        An input that does not fit the base layer gets that layer's own error.
        """
        base: Any = self._modules["base_layer"]
        if not (args or kwargs) and (extra is None or extra.dim() == 1) and why_not_linear(base) is None:
            weight, bias = _parameter(base, "weight"), _parameter(base, "bias")
            if x.shape[-1] == weight.shape[1] and (x.dtype == weight.dtype or torch.is_autocast_enabled(x.device.type)):
                return weight, bias if extra is None else (extra if bias is None else bias + extra).to(weight.dtype)
        out = base(x, *args, **kwargs)
        return out if extra is None else out + extra.to(out.dtype)

    def _with_names(self, x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """PEFT's mixed batches in inference: `adapter_names` names the adapter of each sequence."""
        names = kwargs["adapter_names"]
        _, reason = self._terms((name for name in dict.fromkeys(names) if name != BASE), False)
        if reason is not None:
            tell(reason)
        if reason is not None or len(x) != len(names) or x.dim() < 2 or x.dtype not in FLOATS:
            return super().forward(x, *args, **kwargs)  # which checks its arguments
        return self._mixed((_named_batch(names), 0), x, args, kwargs)

    def _mixed(self, given: tuple[AdapterBatch, int], x: Tensor, args: Any, kwargs: Any) -> Tensor:
        """Each row carries its own adapter's term."""
        batch, position = given
        _without_names(kwargs)
        if self._disable_adapters:
            return super().forward(x, *args, **kwargs)
        if self.merged_adapters:
            raise RuntimeError(f"client_segments: adapters {self.merged_adapters} are merged into the base; call unmerge_adapter() first")
        own, reason = self._terms(batch.names, batch.seeds is not None)
        if reason is not None:
            raise RuntimeError(f"client_segments: {reason}; such an adapter cannot share a batch")
        name = batch.layers[position]
        if batch.follower is None:
            return self._mixed_rows(own, batch.rows(x, name), given, x, args, kwargs)
        with batch.follower.paused():
            rows = batch.rows(x, name)
            out = self._mixed_rows(own, rows, given, x, args, kwargs)
        batch.follower.set(out, rows.entry)
        return out

    def _mixed_rows(self, own: list[Term | None], rows: Rows, given: tuple[AdapterBatch, int], x: Tensor, args: Any, kwargs: Any) -> Tensor:
        batch, position = given
        segments = rows.segments
        out = self._base(x, _bias_rows(own, rows, x), args, kwargs)
        seeds = batch.layer_seeds(position, x.device)
        # Adapters of one dropout go together; the others have rank 0 in that call.
        for p in dict.fromkeys(term[2] for term in own if term is not None):
            members = [term if term is not None and term[2] == p else None for term in own]
            held = [term for term in members if term is not None]
            a = held[0][0].weight if len(held) == 1 else torch.cat([term[0].weight for term in held])
            bt = (held[0][1].weight if len(held) == 1 else torch.cat([term[1].weight for term in held], dim=1)).t()
            layout = RankLayout([0 if term is None else term[0].weight.shape[0] for term in members])
            scale = tuple(1.0 if term is None else float(term[3]) for term in members)
            options: dict[str, Any] = {"scale": scale, "dropout": p, "seeds": seeds}
            out = lora_add(out, x, a, bt, layout, segments, **options) if isinstance(out, Tensor) else lora_linear(x, *out, a, bt, layout, segments, **options)
        return out if isinstance(out, Tensor) else nn.functional.linear(x, *out)


def _bias_rows(terms: list[Term | None], rows: Rows, x: Tensor) -> Tensor | None:
    """[*leading, m] scaling * bias of each row's adapter (`lora_bias`), or None where no adapter has one."""
    biases = [None if term is None or term[1].bias is None else term[1].bias * term[3] for term in terms]
    like = next((bias for bias in biases if bias is not None), None)
    if like is None:
        return None
    nothing = torch.zeros_like(like)
    table = torch.stack([*(nothing if bias is None else bias for bias in biases), nothing])
    assert rows.ids is not None
    return table[rows.ids.to(x.device)].view(*x.shape[:-1], -1)
