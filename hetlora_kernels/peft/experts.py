"""Experts whose weights lie in one 3-D parameter (Mixtral, Qwen3-MoE, GPT-OSS, ... of transformers 5), with an adapter of every client for every expert.

Each (client, expert) is a client of the kernels: routed rows are sorted by expert for the frozen product, and one `lora_add` a projection adds the adapters.
PEFT's own way (`target_parameters`) makes B A of every expert, a tensor as large as the experts, in every forward pass.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from hetlora_kernels.layout import RankLayout, Segments
from hetlora_kernels.ops._lists import FLOATS
from hetlora_kernels.ops.lora import lora_add

_ASKED = ("num_experts", "has_gate", "has_bias", "is_transposed", "has_post_expert_norm", "_apply_gate")
_ROUTING = ("top_k_index", "top_k_weights")
_SAME = (None, "eager", "batched_mm", "grouped_mm")  # experts_implementation: ways to the same sums


class Factors(NamedTuple):
    """The adapters of one projection, those of an expert's K clients beside each other: `c = e K + k` is a client of the kernels."""

    a: Tensor  # [S, n]
    bt: Tensor  # [S, m]
    ranks: Sequence[int]  # [E K]
    scale: float | Sequence[float] | Tensor  # number or [E K]
    dropout: float = 0.0
    seeds: Tensor | None = None  # int64 [E K]


def projections(experts: Any) -> tuple[str, str]:
    """Names of the parameters of the two projections: into the experts, and out of them."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def is_stack(module: Any) -> bool:
    """Whether a module says of itself what `run_experts` asks, as those with transformers' `use_experts_implementation` do."""
    return all(hasattr(module, name) for name in _ASKED)


def why_not_experts(experts: Any) -> str | None:
    """Why these experts are left to their own forward; None where `run_experts` computes what they do."""
    kind = type(experts).__name__
    if not is_stack(experts):
        return f"{kind} is no stack of experts in the way of transformers' experts_implementation"
    if getattr(experts, "_is_expert_parallel", False):
        return f"the experts of {kind} are divided among devices"
    if "forward" in experts.__dict__:
        return f"the forward of {kind} is patched"
    if "experts_interface" not in getattr(getattr(type(experts).forward, "__code__", None), "co_freevars", ()):
        return f"{kind} has a forward of its own"
    implementation = getattr(getattr(experts, "config", None), "_experts_implementation", None)
    if implementation not in _SAME:
        return f"experts_implementation = {implementation!r} is chosen for {kind}"
    for name in projections(experts):
        weight = experts._parameters.get(name)
        if type(weight) not in (nn.Parameter, Tensor) or weight.dim() != 3 or weight.dtype not in FLOATS:
            what = "missing" if weight is None else f"a {type(weight).__name__} of {weight.dim()} dimensions in {weight.dtype}"
            return f"{name} of {kind} is {what}, where a plain parameter [experts, ., .] of floats is expected"
    return None


def expert_shape(experts: Any, projection: str) -> tuple[int, int]:
    """(out, in) widths of one expert's projection."""
    _, first, second = getattr(experts, projection).shape
    return (second, first) if experts.is_transposed else (first, second)


def routing(args: Any, kwargs: Any) -> tuple[Tensor, Tensor] | None:
    """(experts, weights) of each token, or None where a call has other arguments."""
    given = {**dict(zip(_ROUTING, args, strict=False)), **kwargs}
    return (given[_ROUTING[0]], given[_ROUTING[1]]) if len(args) <= 2 and set(given) == set(_ROUTING) else None


def run_experts(*given: Any, **named: Any) -> Tensor:
    """`_run_experts`, which a compiled model calls and does not trace: how many rows an expert has is data."""
    if torch.compiler.is_compiling():  # here and not as a decorator, which imports the compiler, and Triton
        return torch.compiler.disable(_run_experts)(*given, **named)
    return _run_experts(*given, **named)


def _run_experts(
    experts: Any,
    hidden: Tensor,  # [..., h]
    top_k_index: Tensor,  # int [tokens, k]
    top_k_weights: Tensor,  # [tokens, k]
    adapters: Mapping[str, Sequence[Factors]],
    clients: int = 1,
    owners: Tensor | None = None,  # int64 [tokens]
    keys: Tensor | None = None,  # int64 [tokens]
) -> Tensor:
    """sum over a token's k experts e of weight_e * down_e(act(up_e(x))), each projection y = x W_e^T + bias_e + scale * (drop(x) A^T) B^T.

    top_k_index: 0 .. E - 1. E stands for no expert, as in transformers.
    adapters: {projection: its adapters, one after another}. A projection that is not named has none.
    clients: K.
    owners: the client of each token. -1: no client. None: every token is client 0's.
    keys: the row key of each token, which names it in a dropout mask.
    Returns the shape of `hidden`, in its type.
    """
    x, count, width = hidden.reshape(-1, hidden.shape[-1]), experts.num_experts, top_k_index.shape[-1]
    # Rows lie by expert, and by client inside each, those of no client first: nothing is gathered but the routed tokens themselves.
    place = top_k_index.reshape(-1).long() * (clients + 1)
    place = place + 1 if owners is None else place + owners.to(place.device).repeat_interleave(width) + 1
    order = torch.argsort(place, stable=True)
    if not top_k_index.is_cuda and top_k_index.numel() and not 0 <= int(top_k_index.min()) <= int(top_k_index.max()) <= count:
        raise ValueError(f"top_k_index: expected experts from 0 to {count - 1}, or {count} for none, got {int(top_k_index.min())}..{int(top_k_index.max())}")
    sizes = torch.bincount(place, minlength=(count + 1) * (clients + 1))
    starts, sizes = (part.view(-1, clients + 1)[:count] for part in (sizes.cumsum(0) - sizes, sizes))
    table, by_expert = torch.stack([starts, sizes]).flatten(1).tolist(), sizes.sum(1)
    first, lengths = ([number for at, number in enumerate(row) if at % (clients + 1)] for row in table)
    routed, order = len(order), order[: sum(table[1])]  # without those of no expert, which are the last
    token = order // width
    segments = Segments(len(token), first, lengths, None, None if keys is None else keys.to(token.device)[token])

    def projected(rows: Tensor, name: str) -> Tensor:
        if not torch.is_autocast_enabled(rows.device.type):
            rows = rows.to(getattr(experts, name).dtype)  # as transformers' grouped product does
        out = _product(experts, name, rows, by_expert)
        for factors in adapters.get(name, ()):
            a, bt, ranks, scale, dropout, seeds = factors
            out = lora_add(out, rows, a, bt, RankLayout(ranks), segments, scale, dropout, seeds)
        return out

    into, out_of = projections(experts)
    inner = projected(x[token], into)
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    outer = projected(inner, out_of)
    if experts.has_post_expert_norm:
        outer = experts.post_expert_norm(outer)
    weighted = outer * top_k_weights.reshape(-1)[order, None]
    back = order.new_full((routed,), len(order))
    back[order] = torch.arange(len(order), device=order.device)
    if len(order) < routed:
        weighted = torch.cat([weighted, weighted.new_zeros(1, weighted.shape[-1])])
    # Not index_add_, whose order of sums is not fixed on a GPU.
    return weighted[back].view(len(x), width, weighted.shape[-1]).sum(1).to(hidden.dtype).view(hidden.shape)


def _product(experts: Any, name: str, rows: Tensor, by_expert: Tensor) -> Tensor:
    """[T, m] x W_e^T + bias_e of rows that lie by expert.   by_expert: int64 [E], how many each has."""
    weight, bias = getattr(experts, name), getattr(experts, f"{name}_bias") if experts.has_bias else None
    weights = weight if experts.is_transposed else weight.transpose(1, 2)
    if _grouped(rows, weights):
        out = nn.functional.grouped_mm(rows, weights, offs=by_expert.cumsum(0).int())
        return out if bias is None else out + bias.repeat_interleave(by_expert, 0, output_size=len(rows))
    parts = [
        nn.functional.linear(part, weights[e].t(), None if bias is None else bias[e])
        for e, part in enumerate(rows.split(by_expert.tolist()))
        if len(part) or e == 0  # not an empty list
    ]
    return torch.cat(parts)


def _grouped(rows: Tensor, weights: Tensor) -> bool:
    """Whether torch's grouped product takes them: one type, rows of 16 bytes, and on a GPU bfloat16 from sm_80 on. It is no part of autocast."""
    if not len(rows) or rows.dtype != weights.dtype or torch.is_autocast_enabled(rows.device.type) or not hasattr(nn.functional, "grouped_mm"):
        return False
    if any(size * rows.element_size() % 16 for size in weights.shape[1:]) or rows.data_ptr() % 16 or weights.data_ptr() % 16:
        return False
    if rows.is_cuda:
        return rows.dtype == torch.bfloat16 and torch.cuda.get_device_capability(rows.device) >= (8, 0)
    return rows.device.type == "cpu" and rows.dtype in (torch.float32, torch.bfloat16, torch.float16)
