"""The multi-rank LoRA layer: many clients of different ranks in one batch on one frozen weight, with exact gradients."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hetlora_kernels._library import call, register_fake, whole_layer
from hetlora_kernels.layout import RankLayout, Segments
from hetlora_kernels.ops._lists import FLOATS
from hetlora_kernels.reference import compute_dtype, dropout_threshold


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
    device = x.device
    if torch.is_autocast_enabled(device.type) and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dtype != x.dtype or weight.device != device:
        raise ValueError(f"weight: expected the type and device of x ({x.dtype}, {x.device}), got {weight.dtype}, {weight.device}")
    arguments = _adapter_arguments(x, m, a, bt, layout, seg, scale, dropout if training else 0.0, seeds)
    return _Lora.apply(x, weight, bias, None, *arguments)


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
    if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    m = base_out.shape[-1]
    arguments = _adapter_arguments(x, m, a, bt, layout, seg, scale, dropout if training else 0.0, seeds)
    return _Lora.apply(x, None, None, base_out, *arguments)


def _check_input(x: Tensor, n: int | None) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x: expected a float32, bfloat16, float16 or float64 tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.dim() < 1 or (n is not None and x.shape[-1] != n):
        raise ValueError(f"x: expected a last dimension of {n if n is not None else 'in_features'}, got shape {tuple(x.shape)}")


def _adapter_arguments(x, m, a, bt, layout, seg, scale, dropout, seeds):
    """Checks of everything but the base; returns (a, bt, scale [K], seeds or None, keys, index, (ranks, starts, lengths, dropout))."""
    if not isinstance(layout, RankLayout):
        raise TypeError(f"layout: expected a RankLayout, got {type(layout).__name__}")
    if not isinstance(seg, Segments):
        raise TypeError(f"seg: expected Segments, got {type(seg).__name__}")
    n, clients, device = x.shape[-1], len(layout.ranks), x.device
    for name, factor, width in (("a", a, n), ("bt", bt, m)):
        if not isinstance(factor, Tensor) or factor.shape != (layout.total, width) or factor.dtype not in FLOATS:
            got = f"{tuple(factor.shape)} {factor.dtype}" if isinstance(factor, Tensor) else type(factor).__name__
            raise ValueError(f"{name}: expected a floating-point tensor of shape ({layout.total}, {width}), got {got}")
        if factor.device != device:
            raise ValueError(f"{name}: expected device {device} as x, got {factor.device}")
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
    return a, bt, scales, seeds, keys, seg.index_on(device), (list(layout.ranks), seg.starts, seg.lengths, float(dropout))


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

    `rows` = (ranks, starts, lengths, dropout). One op each way where the rung has it (`whole_layer`), else composed of the rung's three.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, base, a, bt, scale, seeds, keys, index, rows):
        x = x.contiguous()
        flat = x if x.dim() == 2 else x.view(-1, x.shape[-1])
        flat_base = base if base is None or base.dim() == 2 else base.reshape(-1, base.shape[-1])
        run = (whole_layer(x.is_cpu) or _COMPOSED)[0]
        out, s = _without_autocast(run, x, flat, weight, bias, flat_base, a, bt, scale, seeds, keys, index, *rows)
        ctx.save_for_backward(x, weight, a, bt, s, scale, seeds, keys, index)
        ctx.rows = rows
        ctx.bias_dtype = None if bias is None else bias.dtype
        # Not a view: autograd forbids in-place changes of a view that a Function returns, and models make them.
        return out if x.dim() == 2 else torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[1]))

    @staticmethod
    def backward(ctx, d_y):
        return _refuse_second_derivatives(ctx, d_y) if torch.is_grad_enabled() else _backward(ctx, d_y)


def _backward(ctx, d_y):
    x, weight, a, bt, s, scale, seeds, keys, index = ctx.saved_tensors
    need_x, _, need_bias, need_base, need_a, need_bt = ctx.needs_input_grad[:6]
    flat, flat_dy = (x, d_y) if x.dim() == 2 else (x.view(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1]))
    d_out = flat_dy.contiguous() if d_y.dtype == x.dtype else flat_dy.to(x.dtype).contiguous()
    run = (whole_layer(x.is_cpu) or _COMPOSED)[1]
    grads = _without_autocast(run, x, d_out, flat, weight, a, bt, s, scale, seeds, keys, index, *ctx.rows, need_x, need_a, need_bt)
    d_x = None if not need_x else grads[0] if x.dim() == 2 else grads[0].view(x.shape)
    d_a = grads[int(need_x)] if need_a else None
    d_bt = grads[-1] if need_bt else None
    d_bias = flat_dy.sum(0, dtype=compute_dtype(d_y.dtype)).to(ctx.bias_dtype) if need_bias else None
    return d_x, None, d_bias, d_y if need_base else None, d_a, d_bt, None, None, None, None, None


# The decorator's own cost is paid only where a graph of the backward pass is asked for.
_refuse_second_derivatives = torch.autograd.function.once_differentiable(_backward)


def _without_autocast(run, x, *arguments):
    """The types are chosen already; a weight would be cast again."""
    if not torch.is_autocast_enabled(x.device.type):
        return run(*arguments)
    with torch.autocast(x.device.type, enabled=False):
        return run(*arguments)


def _compose_forward(x, weight, bias, base, a, bt, scale, seeds, keys, index, ranks, starts, lengths, dropout):
    s = call("shrink")(x, a.to(x.dtype), scale, seeds, keys, index, ranks, starts, lengths, dropout)
    out = F.linear(x, weight, bias) if base is None else base.clone(memory_format=torch.contiguous_format)
    call("expand_")(out, s, bt.to(x.dtype), None, None, index, ranks, starts, lengths, 0.0)
    return out, s


def _compose_backward(d_y, x, weight, a, bt, s, scale, seeds, keys, index, ranks, starts, lengths, dropout, need_x, need_a, need_bt):
    segments = (seeds, keys, index, ranks, starts, lengths, dropout)
    plain = (None, None, index, ranks, starts, lengths, 0.0)
    d_s = call("shrink")(d_y, bt.to(x.dtype), scale, *plain) if need_x or need_a else None
    out = []
    if need_x:
        out.append(x.new_zeros(x.shape) if weight is None else d_y @ weight)
        call("expand_")(out[0], d_s, a.to(x.dtype), *segments)
    if need_a:
        out.append(call("grouped_gram")(d_s, x, *segments, a.dtype))
    if need_bt:
        out.append(call("grouped_gram")(s, d_y, *plain, bt.dtype))
    return out


_COMPOSED = (_compose_forward, _compose_backward)


@register_fake("lora_forward")
def _(x, weight, bias, base, a, bt, scale, seeds, row_keys, index, ranks, starts, lengths, dropout):
    out = x.new_empty((x.shape[0], weight.shape[0])) if base is None else torch.empty_like(base, memory_format=torch.contiguous_format)
    return out, x.new_empty(sum(r * n for r, n in zip(ranks, lengths, strict=False)))


@register_fake("lora_backward")
def _(d_y, x, weight, a, bt, s, scale, seeds, row_keys, index, ranks, starts, lengths, dropout, need_x, need_a, need_bt):
    wanted = ((x, need_x), (a, need_a), (bt, need_bt))
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like, need in wanted if need]


@register_fake("shrink")
def _(x, rows, scale, seeds, row_keys, index, ranks, starts, lengths, dropout):
    return x.new_empty(sum(r * n for r, n in zip(ranks, lengths, strict=False)))


@register_fake("expand_")
def _(out, s, rows, seeds, row_keys, index, ranks, starts, lengths, dropout):
    return None


@register_fake("grouped_gram")
def _(s, x, seeds, row_keys, index, ranks, starts, lengths, dropout, dtype):
    return x.new_empty((sum(ranks), x.shape[1]), dtype=dtype)
