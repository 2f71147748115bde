"""The multi-rank LoRA layer: many clients of different ranks in one batch on one frozen weight, with exact gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from hetlora_kernels._library import call as _kernel
from hetlora_kernels._library import layer_term, register_fake, whole_layer
from hetlora_kernels.layout import Plan, RankLayout, Segments
from hetlora_kernels.ops._lists import FLOATS
from hetlora_kernels.reference import compute_dtype, dropout_threshold

# scale [K], seeds [K] or None, row keys or None, index or None, plan, dropout probability
Call = tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Plan, float]


def lora_linear(
    x: Tensor,  # [..., n]
    weight: Tensor,  # [m, n]
    bias: Tensor | None,  # [m]
    a: Tensor,  # [S, n]
    bt: Tensor,  # [S, m]
    layout: RankLayout,
    seg: Segments,
    scale: float | Sequence[float] | Tensor = 1.0,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """y = x W^T + bias + scale_k * (drop(x) A_k^T) B_k^T for the rows of each client k; base-only rows get x W^T + bias.

    x: [..., n] input, any leading shape; its rows, flattened, are those of `seg`.
    weight: [m, n] frozen; one that requires a gradient is refused.   bias: [m] or None; may require a gradient.
    a: [S, n], bt: [S, m] packed rank rows (bt is B transposed), S = layout.total; any floating-point type, cast to x's once.
    layout: ranks of the K clients.   seg: rows of each client; clients past seg.num_clients have no rows and get zero gradients.
    scale: number or [K].   dropout: probability p in [0, 1), in steps of 1/65536; kept elements are divided by 1 - p.
    seeds: int64 [K], one dropout seed per client for this layer and step; None with p > 0 draws them from torch's generator.
    training: False switches dropout off.

    Returns y: [..., m] in x's type (the autocast type inside autocast). Products accumulate in float32 (float64 for float64). Differentiable
    once, in x, a, bt and bias; the mask is regenerated in backward from the seeds (Philox4x32-7, see `reference.keep_mask`), so what is kept
    is x, S and the seeds. Given the same x and dY rows, a client's gradients do not depend on the other clients in the batch.
    Raises `ValueError` or `TypeError` naming the argument. Source: HETLORA section 2; LoRA, Hu et al. 2022, equation 3.
    """
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"weight: expected a tensor [out, in], got {tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected a frozen weight, got one that requires a gradient; call weight.requires_grad_(False)")
    m, n = weight.shape
    if bias is not None and bias.shape != (m,):
        raise ValueError(f"bias: expected shape ({m},), got {tuple(bias.shape)}")
    _check_input(x, n)
    if _autocast(x) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"weight: expected the type and device of x ({x.dtype}, {x.device}), got {weight.dtype}, {weight.device}")
    call = _adapter_call(x, m, a, bt, layout, seg, scale, dropout if training else 0.0, seeds)
    return _apply(x, bias, None, a, bt, weight, call)


def lora_add(
    base_out: Tensor,  # [..., m]
    x: Tensor,  # [..., n]
    a: Tensor,  # [S, n]
    bt: Tensor,  # [S, m]
    layout: RankLayout,
    seg: Segments,
    scale: float | Sequence[float] | Tensor = 1.0,
    dropout: float = 0.0,
    seeds: Tensor | None = None,
    training: bool = True,
) -> Tensor:
    """base_out + scale_k * (drop(x) A_k^T) B_k^T, not in place: for any base layer, quantised or a user's own.

    base_out: [..., m] the base layer's output; its type is the result's.   x: [..., n] the base layer's input.
    The other arguments, gradients and errors are those of `lora_linear`; the gradient of base_out is that of the result.
    """
    _check_input(x, None)
    if not isinstance(base_out, Tensor) or base_out.dtype not in FLOATS:
        got = base_out.dtype if isinstance(base_out, Tensor) else type(base_out).__name__
        raise TypeError(f"base_out: expected a float32, bfloat16, float16 or float64 tensor, got {got}")
    if base_out.shape[:-1] != x.shape[:-1] or base_out.device != x.device:
        raise ValueError(
            f"base_out: expected the leading shape and device of x {tuple(x.shape)} on {x.device}, got {tuple(base_out.shape)} on {base_out.device}"
        )
    if _autocast(x) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    m = base_out.shape[-1]
    call = _adapter_call(x, m, a, bt, layout, seg, scale, dropout if training else 0.0, seeds)
    return _apply(x, None, base_out, a, bt, None, call)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def _check_input(x: Tensor, n: int | None) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x: expected a float32, bfloat16, float16 or float64 tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.dim() < 1 or (n is not None and x.shape[-1] != n):
        raise ValueError(f"x: expected a last dimension of {n if n is not None else 'in_features'}, got shape {tuple(x.shape)}")


def _adapter_call(x, m, a, bt, layout, seg, scale, dropout, seeds) -> Call:
    """Checks of everything but the base; what a call has beside its differentiable tensors and the weight."""
    if not isinstance(layout, RankLayout):
        raise TypeError(f"layout: expected a RankLayout, got {type(layout).__name__}")
    if not isinstance(seg, Segments):
        raise TypeError(f"seg: expected Segments, got {type(seg).__name__}")
    n, clients, device = x.shape[-1], len(layout.ranks), x.device
    size = layout.total
    if not (isinstance(a, Tensor) and a.shape == (size, n) and a.dtype in FLOATS and a.device == device):
        _refuse_factor("a", a, (size, n), device)
    if not (isinstance(bt, Tensor) and bt.shape == (size, m) and bt.dtype in FLOATS and bt.device == device):
        _refuse_factor("bt", bt, (size, m), device)
    rows = x.numel() // n if n else 0
    if seg.num_rows != rows:
        raise ValueError(f"seg: expected segments over the {rows} rows of x, got {seg.num_rows}")
    if seg.num_clients > clients:
        raise ValueError(f"seg: expected at most the layout's {clients} clients, got {seg.num_clients}")
    if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
        raise ValueError("scale: expected a constant, got a tensor that requires a gradient; scale is not trained")
    scales = layout.scales(scale, device, compute_dtype(x.dtype))
    seeds = None if dropout == 0 else _check_seeds(dropout, seeds, clients, device)
    keys = None if seeds is None else seg.keys_on(device)
    return scales, seeds, keys, seg.index_on(device), seg.plan(layout), float(dropout)


def _refuse_factor(name: str, factor: object, shape: tuple[int, int], device: torch.device) -> NoReturn:
    if isinstance(factor, Tensor) and factor.shape == shape and factor.dtype in FLOATS:
        raise ValueError(f"{name}: expected device {device} as x, got {factor.device}")
    got = f"{tuple(factor.shape)} {factor.dtype}" if isinstance(factor, Tensor) else type(factor).__name__
    raise ValueError(f"{name}: expected a floating-point tensor of shape {shape}, got {got}")


def _check_seeds(dropout: float, seeds: Tensor | None, clients: int, device: torch.device) -> Tensor | None:
    """int64 [K] on `device`, or None where nothing is dropped."""
    if not 0 <= dropout < 1 or dropout_threshold(dropout) > 65535:
        raise ValueError(f"dropout: expected a probability in [0, 1 - 1/131072), got {dropout}")
    if dropout_threshold(dropout) == 0:
        return None
    if seeds is None:
        return torch.randint(-(2**63), 2**63 - 1, (clients,), dtype=torch.int64, device=device)
    if not isinstance(seeds, Tensor) or seeds.dtype != torch.int64 or tuple(seeds.shape) != (clients,):
        got = f"{seeds.dtype} {tuple(seeds.shape)}" if isinstance(seeds, Tensor) else type(seeds).__name__
        raise ValueError(f"seeds: expected an int64 tensor of shape ({clients},), got {got}")
    return seeds.to(device)


class _Lora(torch.autograd.Function):
    """Forward and backward of the layer. Either `weight` (the base is computed here) or `base` (its output is given) is a tensor.

    One op each way where the rung has it, for the whole layer (`whole_layer`) or for what it adds to the base (`layer_term`), else the rung's three ops.
    """

    @staticmethod
    def forward(ctx, x, bias, base, a, bt, weight, call):
        x = x.contiguous()
        matrix = x.dim() == 2
        flat = x if matrix else x.view(-1, x.shape[-1])
        flat_base = base if base is None or matrix else base.reshape(-1, base.shape[-1])
        run = _without_autocast(_forward) if _autocast(x) else _forward
        out, s = run(flat, weight, bias, flat_base, a, bt, call)
        ctx.save_for_backward(x, weight, a, bt, s)
        ctx.call = call
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Not a view: autograd forbids in-place changes of a view that a Function returns, and models make them.
        return out if matrix else torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[1]))

    @staticmethod
    def backward(ctx, d_y):
        return _refuse_second_derivatives(ctx, d_y) if torch.is_grad_enabled() else _backward(ctx, d_y)


# What `Function.apply` adds to its base class serves the transforms of torch.func and costs 4 us a call, a tenth of a small layer's whole cost.
_direct_apply = super(torch.autograd.Function, _Lora).apply


def _apply(*arguments) -> Tensor:
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return _Lora.apply(*arguments)
    return _direct_apply(*arguments)


def _backward(ctx, d_y):
    x, weight, a, bt, s = ctx.saved_tensors
    need_x, need_bias, need_base, need_a, need_bt = ctx.needs_input_grad[:5]
    flat, flat_dy = (x, d_y) if x.dim() == 2 else (x.view(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1]))
    d_out = flat_dy.contiguous() if d_y.dtype == x.dtype else flat_dy.to(x.dtype).contiguous()
    run = _without_autocast(_gradients) if _autocast(x) else _gradients
    d_x, d_a, d_bt = run(d_out, flat, weight, a, bt, s, ctx.call, need_x, need_a, need_bt)
    d_x = d_x if d_x is None or x.dim() == 2 else d_x.view(x.shape)
    d_bias = flat_dy.sum(0, dtype=compute_dtype(d_y.dtype)).to(ctx.bias_dtype) if need_bias else None
    return d_x, d_bias, d_y if need_base else None, d_a, d_bt, None, None


# The decorator's own cost is paid only where a graph of the backward pass is asked for.
_refuse_second_derivatives = torch.autograd.function.once_differentiable(_backward)


def _without_autocast(run):
    """`run`, its first argument naming the device: the types are chosen already, and a float32 product inside would be made in half precision."""

    def outside(x, *arguments):
        with torch.autocast(x.device.type, enabled=False):
            return run(x, *arguments)

    return outside


def _forward(x, weight, bias, base, a, bt, call: Call) -> tuple[Tensor, Tensor]:
    """(base + LoRA term, packed S)."""
    scale, seeds, keys, index, plan, dropout = call
    lists = (plan.ranks, plan.starts, plan.lengths)
    whole = whole_layer(x.is_cpu)
    if whole is not None:
        return whole[0](x, weight, bias, base, a, bt, scale, seeds, keys, index, *lists, dropout)
    out = F.linear(x, weight, bias) if base is None else base.clone(memory_format=torch.contiguous_format)
    term = layer_term(x.is_cpu)
    if term is not None:
        return out, term[0](out, x, a, bt, scale, seeds, keys, index, plan.table, plan.elements, dropout)
    s = _kernel("shrink")(x, a.to(x.dtype), scale, seeds, keys, index, *lists, dropout)
    _kernel("expand_")(out, s, bt.to(x.dtype), None, None, index, *lists, 0.0)
    return out, s


def _gradients(d_y, x, weight, a, bt, s, call: Call, need_x: bool, need_a: bool, need_bt: bool) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """(d_x, d_a, d_bt), None for what is not needed."""
    scale, seeds, keys, index, plan, dropout = call
    lists = (plan.ranks, plan.starts, plan.lengths)
    whole = whole_layer(x.is_cpu)
    if whole is not None:
        grads = whole[1](d_y, x, weight, a, bt, s, scale, seeds, keys, index, *lists, dropout, need_x, need_a, need_bt)
        return grads[0] if need_x else None, grads[int(need_x)] if need_a else None, grads[-1] if need_bt else None
    d_x = None
    if need_x:
        d_x = torch.zeros_like(x) if weight is None else torch.mm(d_y, weight)
    term = layer_term(x.is_cpu)
    if term is not None:
        transposed = not bt.is_contiguous() and bt.stride(0) == 1  # decided here and not in the op: a compiler may give it bt in another layout
        d_a, d_bt = term[1](d_x, d_y, x, a, bt, s, scale, seeds, keys, index, plan.table, dropout, need_a, need_bt, transposed)
        return d_x, d_a if need_a else None, d_bt if need_bt else None
    d_a = d_bt = d_s = None
    if need_x or need_a:
        d_s = _kernel("shrink")(d_y, bt.to(x.dtype), scale, None, None, index, *lists, 0.0)
    if need_x:
        _kernel("expand_")(d_x, d_s, a.to(x.dtype), seeds, keys, index, *lists, dropout)
    if need_a:
        d_a = _kernel("grouped_gram")(d_s, x, seeds, keys, index, *lists, dropout, a.dtype)
    if need_bt:
        d_bt = _kernel("grouped_gram")(s, d_y, None, None, index, *lists, 0.0, bt.dtype)
    return d_x, d_a, d_bt


@register_fake("lora_forward")
def _(x, weight, bias, base, a, bt, scale, seeds, row_keys, index, ranks, starts, lengths, dropout):
    out = x.new_empty((x.shape[0], weight.shape[0])) if base is None else torch.empty_like(base, memory_format=torch.contiguous_format)
    return out, x.new_empty(sum(r * n for r, n in zip(ranks, lengths, strict=False)))


@register_fake("lora_backward")
def _(d_y, x, weight, a, bt, s, scale, seeds, row_keys, index, ranks, starts, lengths, dropout, need_x, need_a, need_bt):
    wanted = ((x, need_x), (a, need_a), (bt, need_bt))
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like, need in wanted if need]


@register_fake("lora_add_")
def _(out, x, a, bt, scale, seeds, row_keys, index, plan, elements, dropout):
    return x.new_empty(elements)


@register_fake("lora_grads_")
def _(d_x, d_y, x, a, bt, s, scale, seeds, row_keys, index, plan, dropout, need_a, need_bt, transposed):
    d_a = a.new_empty(a.shape if need_a else 0)
    if need_bt and transposed:
        return d_a, bt.new_empty((bt.shape[1], bt.shape[0])).t()
    return d_a, bt.new_empty(bt.shape if need_bt else 0)


@register_fake("shrink")
def _(x, rows, scale, seeds, row_keys, index, ranks, starts, lengths, dropout):
    return x.new_empty(sum(r * n for r, n in zip(ranks, lengths, strict=False)))


@register_fake("expand_")
def _(out, s, rows, seeds, row_keys, index, ranks, starts, lengths, dropout):
    return None


@register_fake("grouped_gram")
def _(s, x, seeds, row_keys, index, ranks, starts, lengths, dropout, dtype):
    return x.new_empty((sum(ranks), x.shape[1]), dtype=dtype)
