"""The multi-rank LoRA layer: many clients of different ranks in one batch on one frozen weight, with exact gradients."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from hetlora_kernels._library import call as _kernel
from hetlora_kernels._library import layer_ops, register_fake, small_ops
from hetlora_kernels.layout import Plan, RankLayout, Segments
from hetlora_kernels.ops._lists import FLOATS
from hetlora_kernels.reference import compute_dtype, dropout_threshold, operand_dtype

# plan, seeds [K] or None, row keys or None, dropout probability, whether bt is given (and its gradient wanted) as B [m, S]
Call = tuple[Plan, Tensor | None, Tensor | None, float, bool]

# What a small call is, on the CPU: with so few rows our own base product is the faster one, of 16-bit types with so small a weight (docs/kernels-lora.md).
_FEW_ROWS = 8
_SMALL_16_BIT_WEIGHT = 2**18  # elements
_WIDE = {torch.float32, torch.float64}


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
    is x, S (not of a small call on the CPU) and the seeds. Given the same x and dY rows, a client's gradients do not depend on the other clients in the batch.
    Raises `ValueError` or `TypeError` naming the argument. Source: HETLORA section 2; LoRA, Hu et al. 2022, equation 3.

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
    if _checked_by_the_small_op(x, weight, bias, a, bt, layout, seg):
        try:
            plan = seg.plan(layout, scale, x.device, x.dtype)
            call = _call(plan, seg, dropout if training else 0.0, seeds, layout.num_clients, x.device)
            return _direct_small(x, bias, None, a, bt, weight, call)
        except (RuntimeError, TypeError, ValueError):
            pass  # the checks below name the argument; what they do not find wrong is raised again by the op
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ValueError(f"weight: expected a tensor [out, in], got {tuple(weight.shape) if isinstance(weight, Tensor) else type(weight).__name__}")
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight: expected a frozen weight, got one that requires a gradient; call weight.requires_grad_(False)")
    m, n = weight.shape
    if bias is not None and not (isinstance(bias, Tensor) and bias.shape == (m,)):
        raise ValueError(f"bias: expected a tensor of shape ({m},) or None, got {tuple(bias.shape) if isinstance(bias, Tensor) else type(bias).__name__}")
    _check_input(x, n)
    autocast = _autocast(x)
    if autocast and x.dtype != torch.float64:
        dtype = torch.get_autocast_dtype(x.device.type)
        x, weight, bias = x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    if weight.dtype != x.dtype or weight.device != x.device:
        raise ValueError(f"weight: expected the type and device of x ({x.dtype}, {x.device}), got {weight.dtype}, {weight.device}")
    if bias is not None and (bias.dtype != x.dtype or bias.device != x.device):
        raise ValueError(f"bias: expected the type and device of x ({x.dtype}, {x.device}), got {bias.dtype}, {bias.device}")
    call = _adapter_call(x, n, m, a, bt, layout, seg, scale, dropout if training else 0.0, seeds)
    arguments = x, bias, None, a, bt, weight, call
    return _without_autocast(_apply, *arguments) if autocast else _apply(*arguments)


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

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> layout, seg = hk.RankLayout([1, 2]), hk.Segments.from_ids([1, -1])  # the second row belongs to no client
    >>> base = torch.nn.Linear(4, 5)  # stands for any base layer
    >>> x, a, bt = torch.randn(2, 4), torch.randn(3, 4), torch.randn(3, 5)
    >>> y = hk.lora_add(base(x), x, a, bt, layout, seg)
    >>> torch.allclose(y[0], base(x)[0] + x[0] @ a[1:].T @ bt[1:], atol=1e-5), torch.equal(y[1], base(x)[1])
    (True, True)
    """
    _check_input(x, None)
    if not isinstance(base_out, Tensor) or base_out.dtype not in FLOATS:
        got = base_out.dtype if isinstance(base_out, Tensor) else type(base_out).__name__
        raise TypeError(f"base_out: expected a float32, bfloat16, float16 or float64 tensor, got {got}")
    if base_out.shape[:-1] != x.shape[:-1] or base_out.device != x.device:
        raise ValueError(
            f"base_out: expected the leading shape and device of x {tuple(x.shape)} on {x.device}, got {tuple(base_out.shape)} on {base_out.device}"
        )
    autocast = _autocast(x)
    if autocast and x.dtype != torch.float64:
        x = x.to(torch.get_autocast_dtype(x.device.type))
    call = _adapter_call(x, x.shape[-1], base_out.shape[-1], a, bt, layout, seg, scale, dropout if training else 0.0, seeds)
    arguments = x, None, base_out, a, bt, None, call
    return _without_autocast(_apply, *arguments) if autocast else _apply(*arguments)


def _autocast(x: Tensor) -> bool:
    return torch.is_autocast_enabled("cpu" if x.is_cpu else x.device.type)


def _check_input(x: Tensor, n: int | None) -> None:
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x: expected a float32, bfloat16, float16 or float64 tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    if x.dim() < 1 or (n is not None and x.shape[-1] != n):
        raise ValueError(f"x: expected a last dimension of {n if n is not None else 'in_features'}, got shape {tuple(x.shape)}")


def _adapter_call(x, n, m, a, bt, layout, seg, scale, dropout, seeds) -> Call:
    """Checks of everything but the base; what a call has beside its differentiable tensors and the weight."""
    if not isinstance(layout, RankLayout):
        raise TypeError(f"layout: expected a RankLayout, got {type(layout).__name__}")
    if not isinstance(seg, Segments):
        raise TypeError(f"seg: expected Segments, got {type(seg).__name__}")
    size, device = layout.total, x.device
    if not (isinstance(a, Tensor) and a.shape == (size, n) and a.dtype in FLOATS and a.device == device):
        _refuse_factor("a", a, (size, n), device)
    if not (isinstance(bt, Tensor) and bt.shape == (size, m) and bt.dtype in FLOATS and bt.device == device):
        _refuse_factor("bt", bt, (size, m), device)
    rows = x.numel() // n if n else 0
    if seg.num_rows != rows:
        raise ValueError(f"seg: expected segments over the {rows} rows of x, got {seg.num_rows}")
    return _call(seg.plan(layout, scale, device, x.dtype), seg, dropout, seeds, layout.num_clients, device)


def _call(plan: Plan, seg: Segments, dropout: float, seeds: Tensor | None, clients: int, device: torch.device, own_b: bool = False) -> Call:
    if dropout == 0:
        return plan, None, None, 0.0, own_b
    seeds = _check_seeds(dropout, seeds, clients, device)
    return plan, seeds, None if seeds is None else seg.keys_on(device), float(dropout), own_b


def checked_by_the_op(*tensors: Tensor | None) -> bool:
    """Whether the op itself refuses what does not fit: the C++ ops do, on tensors of the CPU; not while the call is traced or its types are autocast's."""
    ops = layer_ops(True)
    own = ops is not None and not ops[2] and all(tensor is None or tensor.is_cpu for tensor in tensors)
    return own and not (torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"))


def _is_small(x: Tensor, weight: Tensor | None, rows: int) -> bool:
    own = 0 < rows <= _FEW_ROWS and x.is_cpu and small_ops() is not None
    return own and (weight is None or x.dtype in _WIDE or weight.numel() <= _SMALL_16_BIT_WEIGHT)


def _checked_by_the_small_op(x, weight, bias, a, b, layout, seg) -> bool:
    """Whether `lora_linear` may call the op for small calls before its own checks, which take as long as the op. Asked here is all that the op lets pass."""
    if type(seg) is not Segments or type(layout) is not RankLayout or torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    try:
        if not _is_small(x, weight, seg.num_rows) or weight.requires_grad or torch._C._are_functorch_transforms_active():
            return False
        return weight.is_cpu and a.is_cpu and b.is_cpu and (bias is None or bias.is_cpu) and 0 < x.numel() == seg.num_rows * weight.shape[-1]
    except (AttributeError, IndexError):  # no tensors, or of no dimension
        return False


def linear_of_one(x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, plan: Plan, seg: Segments, dropout: float) -> Tensor:
    """`lora_linear` for one client that owns every row, with B [m, r] as PEFT keeps it, without its checks of tensors; where `checked_by_the_op` says so."""
    return _apply(x, bias, None, a, b, weight, _call(plan, seg, dropout, None, 1, x.device, True))


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

    One op each way where the rung has it, for the whole layer or for what it adds to the base (`layer_ops`), else the rung's three ops. The way of the CPU is
    written out in place, for a call on few rows takes as long as what it calls.
    """

    @staticmethod
    def forward(ctx, x, bias, base, a, bt, weight, call):
        x = x.contiguous()
        matrix = x.dim() == 2
        flat = x if matrix else x.view(-1, x.shape[-1])
        flat_base = base if base is None or matrix else base.reshape(-1, base.shape[-1])
        plan, seeds, keys, dropout, own_b = call
        if own_b:
            bt = bt.t()
        ops = layer_ops(x.is_cpu)
        if ops is not None and ops[2]:
            batch = plan.index, plan.ranks, plan.starts, plan.lengths
            out, s = ops[0](flat, weight, bias, flat_base, a, bt, plan.scale, seeds, keys, *batch, dropout)
        else:
            out = F.linear(flat, weight, bias) if base is None else flat_base.clone(memory_format=torch.contiguous_format)
            if ops is not None:
                s = ops[0](out, flat, a, bt, seeds, keys, plan.index, plan.table, plan.elements, dropout)
            else:
                s = _add_in_steps(out, flat, a, bt, call)
        ctx.save_for_backward(x, weight, a, bt, s)
        ctx.call = call
        if bias is not None:
            ctx.bias_dtype = bias.dtype
        # Not a view: autograd forbids in-place changes of a view that a Function returns, and models make them.
        return out if matrix else torch.ops.aten._unsafe_view(out, (*x.shape[:-1], out.shape[1]))

    @staticmethod
    def backward(ctx, d_y):
        run = _refuse_second_derivatives if torch.is_grad_enabled() else _backward
        return _without_autocast(run, ctx, d_y) if _autocast(d_y) else run(ctx, d_y)


class _SmallLora(torch.autograd.Function):
    """The same for small calls: one op each way, which takes what it is given in any layout and keeps nothing."""

    @staticmethod
    def forward(ctx, x, bias, base, a, b, weight, call):
        plan, seeds, keys, dropout, own_b = call
        ctx.save_for_backward(x, weight, a, b)
        ctx.call = call
        return small_ops()[0](x, weight, bias, base, a, b, seeds, keys, plan.index, plan.table, dropout, own_b)

    @staticmethod
    def backward(ctx, d_y):
        run = _refuse_second_derivatives_of_small if torch.is_grad_enabled() else _small_backward
        return run(ctx, d_y)


def _small_backward(ctx, d_y):
    x, weight, a, b = ctx.saved_tensors
    need_x, need_bias, need_base, need_a, need_b, _, _ = ctx.needs_input_grad
    plan, seeds, keys, dropout, own_b = ctx.call
    ops = small_ops()
    run = _kernel("lora_small_backward") if ops is None else ops[1]  # another rung may be forced by now
    d_x, d_a, d_b = run(d_y, x, weight, a, b, seeds, keys, plan.index, plan.table, dropout, own_b, need_x, need_a, need_b)
    d_bias = d_y.reshape(plan.rows, d_y.shape[-1]).sum(0, dtype=compute_dtype(d_y.dtype)).to(d_y.dtype) if need_bias else None
    return d_x if need_x else None, d_bias, d_y if need_base else None, d_a if need_a else None, d_b if need_b else None, None, None


# What `Function.apply` adds to its base class serves the transforms of torch.func and costs 4 us a call, a tenth of a small layer's whole cost.
_direct, _direct_small = super(torch.autograd.Function, _Lora).apply, super(torch.autograd.Function, _SmallLora).apply


def _apply(x, bias, base, a, bt, weight, call: Call) -> Tensor:
    small = _is_small(x, weight, call[0].rows) and (base is None or base.dtype == x.dtype)
    if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return (_SmallLora if small else _Lora).apply(x, bias, base, a, bt, weight, call)
    return (_direct_small if small else _direct)(x, bias, base, a, bt, weight, call)


def _backward(ctx, d_y):
    x, weight, a, bt, s = ctx.saved_tensors
    need_x, need_bias, need_base, need_a, need_bt, _, _ = ctx.needs_input_grad
    matrix = x.dim() == 2
    flat, flat_dy = (x, d_y) if matrix else (x.view(-1, x.shape[-1]), d_y.reshape(-1, d_y.shape[-1]))
    d_out = flat_dy.contiguous() if d_y.dtype == x.dtype else flat_dy.to(x.dtype).contiguous()
    plan, seeds, keys, dropout, own_b = ctx.call
    ops = layer_ops(x.is_cpu)
    d_x = d_a = d_bt = None
    as_b = False  # whether d_bt is made as B's gradient [m, S]
    if ops is not None and ops[2]:
        batch = plan.index, plan.ranks, plan.starts, plan.lengths
        grads = ops[1](d_out, flat, weight, a, bt, s, plan.scale, seeds, keys, *batch, dropout, need_x, need_a, need_bt)
        d_x, d_a, d_bt = grads[0] if need_x else None, grads[int(need_x)] if need_a else None, grads[-1] if need_bt else None
    else:
        if need_x:
            d_x = torch.zeros_like(flat) if weight is None else torch.mm(d_out, weight)
        if ops is None:
            d_a, d_bt = _gradients_in_steps(d_x, d_out, flat, a, bt, s, ctx.call, need_a, need_bt)
        else:
            as_b = own_b or (not bt.is_contiguous() and bt.stride(0) == 1)  # in the layout of the parameter that PEFT's lora_B.weight.t() is a view of
            d_a, d_bt = ops[1](d_x, d_out, flat, a, bt, s, seeds, keys, plan.index, plan.table, dropout, need_a, need_bt, as_b)
            d_a, d_bt = d_a if need_a else None, d_bt if need_bt else None
    if as_b != own_b and d_bt is not None:
        d_bt = d_bt.t()
    d_x = d_x if d_x is None or matrix else d_x.view(x.shape)
    d_bias = flat_dy.sum(0, dtype=compute_dtype(d_y.dtype)).to(ctx.bias_dtype) if need_bias else None
    return d_x, d_bias, d_y if need_base else None, d_a, d_bt, None, None


# The decorator's own cost is paid only where a graph of the backward pass is asked for.
_refuse_second_derivatives = torch.autograd.function.once_differentiable(_backward)
_refuse_second_derivatives_of_small = torch.autograd.function.once_differentiable(_small_backward)


def _without_autocast(run, *arguments):
    """run(*arguments): the types are chosen already, and a float32 product inside would be made in half precision."""
    device = next(value.device.type for value in arguments if isinstance(value, Tensor))
    with torch.autocast(device, enabled=False):
        return run(*arguments)


def _add_in_steps(out, x, a, bt, call: Call) -> Tensor:
    """out += LoRA term; the packed S."""
    plan, seeds, keys, dropout, _ = call
    batch = plan.index, plan.ranks, plan.starts, plan.lengths
    s = _kernel("shrink")(x, a, plan.scale, seeds, keys, *batch, dropout)
    _kernel("expand_")(out, s, bt, None, None, *batch, 0.0)
    return s


def _gradients_in_steps(d_x, d_y, x, a, bt, s, call: Call, need_a: bool, need_bt: bool) -> tuple[Tensor | None, Tensor | None]:
    """d_x, unless None, += the LoRA term's gradient; (d_a, d_bt), None for what is not needed."""
    plan, seeds, keys, dropout, _ = call
    batch = plan.index, plan.ranks, plan.starts, plan.lengths
    d_a = d_bt = d_s = None
    if d_x is not None or need_a:
        d_s = _kernel("shrink")(d_y, bt, plan.scale, None, None, *batch, 0.0)
    if d_x is not None:
        _kernel("expand_")(d_x, d_s, a, seeds, keys, *batch, dropout)
    if need_a:
        d_a = _kernel("grouped_gram")(d_s, x, seeds, keys, *batch, dropout, a.dtype)
    if need_bt:
        d_bt = _kernel("grouped_gram")(s, d_y, None, None, *batch, 0.0, bt.dtype)
    return d_a, d_bt


def _empty_s(x: Tensor, elements: int) -> Tensor:
    return x.new_empty(elements, dtype=operand_dtype(x))


@register_fake("lora_forward")
def _(x, weight, bias, base, a, bt, scale, seeds, row_keys, index, ranks, starts, lengths, dropout):
    out = x.new_empty((x.shape[0], weight.shape[0])) if base is None else torch.empty_like(base, memory_format=torch.contiguous_format)
    return out, _empty_s(x, sum(r * n for r, n in zip(ranks, lengths, strict=False)))


@register_fake("lora_backward")
def _(d_y, x, weight, a, bt, s, scale, seeds, row_keys, index, ranks, starts, lengths, dropout, need_x, need_a, need_bt):
    wanted = ((x, need_x), (a, need_a), (bt, need_bt))
    return [torch.empty_like(like, memory_format=torch.contiguous_format) for like, need in wanted if need]


@register_fake("lora_add_")
def _(out, x, a, bt, seeds, row_keys, index, plan, elements, dropout):
    return _empty_s(x, elements)


@register_fake("lora_grads_")
def _(d_x, d_y, x, a, bt, s, seeds, row_keys, index, plan, dropout, need_a, need_bt, as_b):
    size = (bt.shape[1], bt.shape[0]) if as_b else bt.shape
    return a.new_empty(a.shape if need_a else 0), bt.new_empty(size if need_bt else 0)


@register_fake("lora_small_forward")
def _(x, weight, bias, base, a, b, seeds, row_keys, index, plan, dropout, own_b):
    return x.new_empty((*x.shape[:-1], b.shape[0 if own_b else 1]))


@register_fake("lora_small_backward")
def _(d_y, x, weight, a, b, seeds, row_keys, index, plan, dropout, own_b, need_x, need_a, need_b):
    d_b = b.new_empty(b.shape if need_b else 0)
    if need_b and not own_b and not b.is_contiguous() and b.stride() == (1, b.shape[0]):
        d_b = b.new_empty_strided(b.shape, b.stride())
    return x.new_empty(x.shape if need_x else 0), a.new_empty(a.shape if need_a else 0), d_b


@register_fake("shrink")
def _(x, rows, scale, seeds, row_keys, index, ranks, starts, lengths, dropout):
    return _empty_s(x, sum(r * n for r, n in zip(ranks, lengths, strict=False)))


@register_fake("expand_")
def _(out, s, rows, seeds, row_keys, index, ranks, starts, lengths, dropout):
    return None


@register_fake("grouped_gram")
def _(s, x, seeds, row_keys, index, ranks, starts, lengths, dropout, dtype):
    return x.new_empty((sum(ranks), x.shape[1]), dtype=dtype)
