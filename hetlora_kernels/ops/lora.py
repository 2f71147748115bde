"""The multi-rank LoRA layer: many clients of different ranks in one batch on one frozen weight, with exact gradients.

A call goes through `_run` to one op, `lora_forward`. Its backward pass is `lora_backward`. An op refuses what does not fit, and `_explain` names the argument.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, is_autocast_enabled, is_grad_enabled
from torch.compiler import is_compiling

from hetlora_kernels import _torch
from hetlora_kernels._library import call, register_fake
from hetlora_kernels.layout import RankLayout, Segments, check_int64
from hetlora_kernels.ops._layer import NUMBERS, check_layer, lying_as, of_base, thirds
from hetlora_kernels.ops._lists import FLOATS
from hetlora_kernels.reference import compute_dtype, dropout_threshold, operand_dtype


class KeptSeeds(NamedTuple):
    """Dropout seeds, int64 [K] on the device of x, that nobody writes until the backward pass: a call takes no copy of them."""

    values: Tensor


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
    *,
    transposed: bool = False,
    casts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """y = x W^T + bias + scale_k * (drop(x) A_k^T) B_k^T for the rows of each client k; base-only rows get x W^T + bias.

    x: [..., n] input, any leading shape; its rows, flattened, are those of `seg`.
    weight: [m, n] frozen; one that requires a gradient is refused.   bias: [m] or None; may require a gradient.
    a: [S, n], bt: [S, m] packed rank rows (bt is B transposed), S = layout.total; any floating-point type, cast to x's once.
    layout: ranks of the K clients.   seg: rows of each client; clients past seg.num_clients have no rows and get zero gradients.
    scale: number or [K].   dropout: probability p in [0, 1), in steps of 1/65536; kept elements are divided by 1 - p.
    seeds: int64 [K], one dropout seed per client for this layer and step; None with p > 0 draws them from torch's generator.
    training: False switches dropout off.   transposed: bt is B [m, S] itself, as PEFT keeps lora_B.weight; so is its gradient.
    casts: a and bt in x's type, 16 bits, where the caller keeps such copies: a GPU multiplies with them and casts nothing. On a CPU they are not used.

    Returns y: [..., m] in x's type (the autocast type inside autocast). Products accumulate in float32 (float64 for float64). Differentiable
    once, in x, a, bt and bias; the mask is regenerated in backward from the seeds (Philox4x32-7, see `reference.keep_mask`), so what is kept
    is x, S and the seeds. Given the same x and dY rows, a client's gradients do not depend on the other clients in the batch.
    Raises `ValueError` or `TypeError` naming the argument; a refused call draws no seeds. Source: HETLORA section 2; LoRA, Hu et al. 2022, equation 3.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> layout, seg = hk.RankLayout([1, 2]), hk.Segments.from_lengths([2, 1])  # two rows of client 0, one of client 1
    >>> x, weight = torch.randn(3, 4), torch.randn(5, 4)
    >>> a, bt = torch.randn(3, 4, requires_grad=True), torch.randn(3, 5, requires_grad=True)
    >>> y = hk.lora_linear(x, weight, None, a, bt, layout, seg, scale=2.0)
    >>> expected = x @ weight.T + torch.cat([2 * x[:2] @ a[:1].T @ bt[:1], 2 * x[2:] @ a[1:].T @ bt[1:]])
    >>> torch.allclose(y, expected, atol=1e-5)
    True
    >>> y.sum().backward()
    >>> a.grad.shape, bt.grad.shape
    (torch.Size([3, 4]), torch.Size([3, 5]))
    """
    return _run(True, x, weight, bias, None, a, bt, layout, seg, scale, dropout if training else 0.0, seeds, transposed, casts)


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
    *,
    transposed: bool = False,
    casts: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """base_out + scale_k * (drop(x) A_k^T) B_k^T, not in place: for any base layer, quantised or a user's own.

    base_out: [..., m] the base layer's output; its type is the result's.   x: [..., n] the base layer's input.
    The other arguments, gradients and errors are those of `lora_linear`; the gradient of base_out is that of the result.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> layout, seg = hk.RankLayout([1, 2]), hk.Segments.from_ids([1, -1])  # the second row belongs to no client
    >>> base = torch.nn.Linear(4, 5)  # stands for any base layer
    >>> x, a, bt = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3, 5)
    >>> y = hk.lora_add(base(x), x, a, bt, layout, seg)
    >>> torch.allclose(y[0], base(x)[0] + x[0] @ a[1:].T @ bt[1:], atol=1e-5), torch.equal(y[1], base(x)[1])
    (True, True)
    """
    return _run(False, x, None, None, base_out, a, bt, layout, seg, scale, dropout if training else 0.0, seeds, transposed, casts)


def _run(whole, x, weight, bias, base, a, bt, layout, seg, scale, dropout, seeds, transposed, casts) -> Tensor:
    """The call.   whole: with the base product, of `weight` and `bias`; else beside `base`, the base layer's output."""
    state = None
    try:
        if is_autocast_enabled("cpu" if x.is_cpu else x.device.type):
            if x.dtype in FLOATS and x.dtype != torch.float64:  # which autocast leaves as they are
                dtype = torch.get_autocast_dtype(x.device.type)
                x, weight, bias = [tensor.to(dtype) if isinstance(tensor, Tensor) else tensor for tensor in (x, weight, bias)]
            with torch.autocast(x.device.type, enabled=False):
                return _run(whole, x, weight, bias, base, a, bt, layout, seg, scale, dropout, seeds, transposed, casts)
        if whole and weight.requires_grad and is_grad_enabled():
            raise ValueError("weight: expected a frozen weight, got one that requires a gradient; call weight.requires_grad_(False)")
        tracing = is_compiling()
        plan = seg.plan(layout, scale, x.device, x.dtype, tracing)
        keys = None
        if dropout == 0:
            seeds, dropout = None, 0.0
        else:
            if seeds is None and not tracing:  # a refused call draws none
                if x.is_cpu:
                    state = torch.get_rng_state()
                else:  # the state of a GPU's generator cannot be read while a CUDA graph is recorded
                    check_layer(x, a, bt, layout.total, seg.num_rows, transposed, **of_base(weight, bias, base))
            seeds = _check_seeds(dropout, seeds, layout.num_clients, x.device)
            keys = None if seeds is None else seg.keys_on(x.device)
        batch = plan.scale, seeds, keys, plan.gathered, plan.segments, dropout, transposed  # the arguments that end both ops
        if casts is not None and (operand_dtype(x) != casts[0].dtype or casts[0].shape != a.shape or casts[1].shape != bt.shape):
            casts = None
        types = (a.dtype, bt.dtype) if tracing else (NUMBERS.get(a.dtype), NUMBERS.get(bt.dtype))  # None: the op refuses the factor
        return (_Lora.apply if tracing else _direct)(x, weight, bias, base, a, bt, casts, batch, types)
    except Exception as error:
        if state is not None:
            torch.set_rng_state(state)
        named = _explain(error, x, a, bt, layout, seg, transposed, **({"weight": weight, "bias": bias} if whole else {"base_out": base}))
        if named is error:
            raise
        raise named from None


def _explain(error: Exception, x, a, bt, layout, seg, transposed, **base) -> Exception:
    """What a refused call gets: an error that names the wrong argument, or `error` itself where none is wrong."""
    if _torch.inside_torch_func():
        return RuntimeError(
            "lora_linear, lora_add: expected no transform of torch.func (vmap, grad, jvp, ...) around the call; x may have any leading dimensions in place of "
            "vmap, backward() gives the gradients, and for other transforms `unfuse(model)` has PEFT's own layers back"
        )
    try:
        if not isinstance(layout, RankLayout):
            raise TypeError(f"layout: expected a RankLayout, got {type(layout).__name__}")
        if not isinstance(seg, Segments):
            raise TypeError(f"seg: expected Segments, got {type(seg).__name__}")
        check_layer(x, a, bt, layout.total, seg.num_rows, transposed, **base)
    except (TypeError, ValueError) as named:
        return named
    return error


def _check_seeds(dropout: Any, seeds: Tensor | KeptSeeds | None, clients: int, device: torch.device) -> Tensor | None:
    """int64 [K] on `device`, or None where nothing is dropped."""
    if not isinstance(dropout, (int, float)):
        raise TypeError(f"dropout: expected a number, got {dropout!r}")
    if not 0 <= dropout < 1 or dropout_threshold(dropout) > 65535:
        raise ValueError(f"dropout: expected a probability in [0, 1 - 1/131072), got {dropout}")
    if dropout_threshold(dropout) == 0:
        return None
    if type(seeds) is KeptSeeds:
        return seeds.values
    if seeds is None:
        return torch.randint(-(2**63), 2**63 - 1, (clients,), dtype=torch.int64, device=device)
    return check_int64("seeds", seeds, (clients,)).to(device, copy=True)  # the backward pass needs them as they are now


class _Lora(torch.autograd.Function):
    """One op each way. Either `weight` (the base is computed by the op) or `base` (its output is given) is a tensor."""

    @staticmethod
    def forward(ctx, x, weight, bias, base, a, bt, casts, batch, types):
        used = casts or (a, bt)
        out, s = call("lora_forward")(x, weight, bias, base, *used, *batch)
        ctx.save_for_backward(x, weight, *used, s)
        ctx.batch, ctx.types = batch, types
        return out

    @staticmethod
    def backward(ctx, d_y):
        if is_grad_enabled():  # a graph of the backward pass is asked for
            return _backward_once(ctx, d_y)
        x, weight, a, bt, s = ctx.saved_tensors
        need_x, _, need_bias, need_base, need_a, need_bt, _, _, _ = ctx.needs_input_grad
        d_x, d_a, d_bt = call("lora_backward")(d_y, x, weight, a, bt, s, *ctx.batch, need_x, need_a, need_bt, *ctx.types)
        d_bias = d_y.reshape(d_y.shape[:-1].numel(), d_y.shape[-1]).sum(0, dtype=compute_dtype(x.dtype)).to(x.dtype) if need_bias else None
        return d_x if need_x else None, None, d_bias, d_y if need_base else None, d_a if need_a else None, d_bt if need_bt else None, None, None, None


_backward_once = torch.autograd.function.once_differentiable(_Lora.backward)
_direct = _torch.apply_of(_Lora)


@register_fake("lora_forward")
def _(x, weight, bias, base, a, bt, scale, seeds, row_keys, index, segments, dropout, transposed):
    ranks, _, lengths = thirds(segments)
    check_layer(x, a, bt, sum(ranks), segments[0], transposed, **of_base(weight, bias, base))
    out = (base if weight is None else x).new_empty((*x.shape[:-1], bt.shape[0 if transposed else 1]))
    return out, x.new_empty(sum(rank * length for rank, length in zip(ranks, lengths, strict=True)), dtype=operand_dtype(x))


@register_fake("lora_backward")
def _(d_y, x, weight, a, bt, s, scale, seeds, row_keys, index, segments, dropout, transposed, need_x, need_a, need_bt, type_a, type_bt):
    d_bt = lying_as(bt, bt.new_empty(bt.shape[::-1] if transposed else bt.shape, dtype=type_bt), transposed) if need_bt else bt.new_empty(0, dtype=type_bt)
    return x.new_empty(x.shape if need_x else 0), a.new_empty(a.shape if need_a else 0, dtype=type_a), d_bt


@register_fake("shrink")
def _(x, rows, scale, seeds, row_keys, index, ranks, starts, lengths, dropout):
    return x.new_empty(sum(r * n for r, n in zip(ranks, lengths, strict=False)), dtype=operand_dtype(x))


@register_fake("expand_")
def _(out, s, rows, seeds, row_keys, index, ranks, starts, lengths, dropout):
    return None


@register_fake("grouped_gram")
def _(s, x, seeds, row_keys, index, ranks, starts, lengths, dropout, dtype):
    return x.new_empty((sum(ranks), x.shape[1]), dtype=dtype)
