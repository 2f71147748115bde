"""The fused forward of PEFT's `target_parameters` on stacked experts: the adapters of every expert beside the frozen products, for one client or many."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.utils import parametrize

from hetlora_kernels.peft.batch import Rows, left_is_over
from hetlora_kernels.peft.experts import Factors, projections, routing, run_experts, why_not_experts
from hetlora_kernels.peft.fused import AdapterBatch, FusedLayer, Term, tell


class FusedExperts(FusedLayer):
    """Mixed in front of `peft.tuners.lora.ParamWrapper`, one for each adapted projection, each around the next. The outermost computes for all of them.

    A wrapper's A [r E, n] has the rank rows of expert after expert, its B [m, r E] those of all experts for one rank row after another.
    """

    parameter_name: str
    num_experts: int

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self._hetlora_batch is not None:
            return self._mixed(self._hetlora_batch, x, args, kwargs)
        if self._hetlora_left:
            self._hetlora_left = left_is_over(self._get_name())
        wrappers = self._wrappers()
        routed = routing(args, kwargs)
        terms = {wrapper.parameter_name: wrapper._active() for wrapper in wrappers if isinstance(wrapper, FusedExperts)}
        reason = self._why_not(wrappers) or next((term for own in terms.values() for term in own if isinstance(term, str)), None)
        if reason is None and routed is None:
            reason = _other_arguments(wrappers)
        off = any(wrapper._disable_adapters or wrapper.merged_adapters for wrapper in wrappers)
        off = off or parametrize.is_parametrized(wrappers[-1].base_layer)  # the wrapper around this one runs PEFT's own forward, and said so
        if reason is not None and not off:
            tell(reason)
        if reason is not None or routed is None or off or torch.compiler.is_compiling() or not any(terms.values()):
            return super(FusedLayer, self).forward(x, *args, **kwargs)
        adapters = {wrapper.parameter_name: [wrapper._factors([term]) for term in terms[wrapper.parameter_name]] for wrapper in wrappers}
        return run_experts(self._experts(), x, *routed, adapters)

    def modes(self) -> tuple[str | None, str | None]:
        _, reason = super().modes()
        return f"{type(self._experts()).__name__} is a stack of experts", self._why_not(self._wrappers()) or reason

    def _experts(self) -> Any:
        return self._wrappers()[-1].base_layer

    def _wrappers(self) -> list[Any]:
        """This one, and those inside it."""
        wrappers: list[Any] = [self]
        while hasattr(wrappers[-1].base_layer, "base_layer"):
            wrappers.append(wrappers[-1].base_layer)
        return wrappers

    def _why_not(self, wrappers: list[Any]) -> str | None:
        """Why PEFT's own forward runs, for any adapter."""
        experts = wrappers[-1].base_layer
        other = next((wrapper for wrapper in wrappers if not isinstance(wrapper, FusedExperts)), None)
        if other is not None:
            return f"an adapter of {other.parameter_name} of the same experts is not fused"
        for module in (*wrappers[1:], experts):  # which nobody calls
            name = type(module).__name__ if module is experts else f"the adapter of {module.parameter_name}"
            if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
                return f"{name} has hooks"
            if "forward" in module.__dict__:
                return f"the forward of {name} is patched"
        return why_not_experts(experts)

    def _active(self) -> list[Any]:
        """What the active adapters add here, or why that must go through PEFT's own forward."""
        active = self._active_adapter
        terms = [self._term(name, False) for name in ((active,) if isinstance(active, str) else active)]
        return [term for term in terms if term is not None]

    def _mixed_rows(self, own: list[Term | None], rows: Rows, given: tuple[AdapterBatch, int], x: Tensor, args: Any, kwargs: Any) -> Tensor:
        batch, _ = given
        wrappers, routed = self._wrappers(), routing(args, kwargs)
        reason = self._why_not(wrappers)
        if reason is None and routed is None:
            reason = _other_arguments(wrappers)
        terms = {self.parameter_name: own}
        for wrapper in wrappers[1:]:
            if reason is None and wrapper.merged_adapters:
                reason = f"adapters {wrapper.merged_adapters} are merged into {wrapper.parameter_name}; call unmerge_adapter() first"
            if reason is None:
                batch.rows(x, batch.layers[wrapper._hetlora_batch[1]])  # they are known by one call as these are
                if not wrapper._disable_adapters:
                    terms[wrapper.parameter_name], reason = wrapper._terms(batch.names, False)
        if reason is not None or routed is None:
            raise RuntimeError(f"client_segments: {reason}; such an adapter cannot share a batch")
        adapters = {wrapper.parameter_name: [wrapper._factors(held)] for wrapper in wrappers if any(held := terms.get(wrapper.parameter_name, []))}
        return run_experts(wrappers[-1].base_layer, x, *routed, adapters, len(batch.names), rows.ids)

    def _factors(self, terms: list[Term | None]) -> Factors:
        """Of one client for each term."""
        count, held = self.num_experts, [term for term in terms if term is not None]
        a = [term[0].weight.unflatten(0, (count, -1)) for term in held]  # [E, r, n]
        bt = [term[1].weight.unflatten(1, (-1, count)).permute(2, 1, 0) for term in held]  # [E, r, m]
        if not (getattr(self, "_did_swap_in_out_features", False) or self._experts().is_transposed):
            a, bt = bt, a  # earlier versions of PEFT gave the two factors each other's widths here
        ranks = [0 if term is None else term[0].weight.shape[0] // count for term in terms] * count
        scale = tuple(1.0 if term is None else float(term[3]) for term in terms) * count
        return Factors(torch.cat(a, 1).flatten(0, 1), torch.cat(bt, 1).flatten(0, 1), ranks, scale)


def _other_arguments(wrappers: list[Any]) -> str:
    return f"{type(wrappers[-1].base_layer).__name__} is called with other arguments than top_k_index and top_k_weights"


def fits(wrapper: Any) -> str | None:
    """Why a `ParamWrapper` cannot have the fused forward; None where it can."""
    experts = wrapper.get_base_layer()
    reason = why_not_experts(experts)
    if reason is None and wrapper.parameter_name not in projections(experts):
        reason = f"{wrapper.parameter_name} of {type(experts).__name__} is none of the projections {', '.join(projections(experts))}"
    return reason
