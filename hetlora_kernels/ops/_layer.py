"""What the rungs written in Python share of a LoRA layer: its two ops, made of a rung's steps, and the check of its arguments, which is also made by shape
functions and of a call that a compiled op has refused."""

from __future__ import annotations

import torch
from torch import Tensor

from hetlora_kernels._torch import numbered, unsafe_view
from hetlora_kernels.layout import seen
from hetlora_kernels.ops._lists import FLOATS

NUMBERS = numbered(FLOATS)
_DTYPES = {number: dtype for dtype, number in NUMBERS.items()}


def check_layer(x: Tensor, a: Tensor, bt: Tensor, total: int, rows: int, transposed: bool, **base: Tensor | None) -> None:
    """`ValueError` or `TypeError` naming the argument, unless the tensors of one call fit together.

    total: S, the sum of the ranks.   rows: T of the segments.   transposed: bt is B [m, S].
    base: weight= and bias= of the frozen layer, or its output base_out=, or nothing.
    """
    m = n = None
    if "weight" in base:
        weight, bias = base["weight"], base.get("bias")
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(f"weight: expected a tensor [out, in], got {seen(weight)}")
        m, n = weight.shape
        if bias is not None and not (isinstance(bias, Tensor) and bias.shape == (m,)):
            raise ValueError(f"bias: expected a tensor of shape ({m},) or None, got {seen(bias)}")
    _floating("x", x)
    traced = torch.compiler.is_dynamo_compiling()  # which does not let a backward pass ask for a layout; the shape functions, which are not traced, do
    for name, given in {"x": x, "a": a, "bt": bt, **base}.items():
        if not traced and isinstance(given, Tensor) and (given.layout != torch.strided or given.is_nested):
            raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if given.is_nested else given.layout}")
    if x.dim() < 1 or (n is not None and x.shape[-1] != n):
        raise ValueError(f"x: expected a last dimension of {'in_features' if n is None else n}, got shape {tuple(x.shape)}")
    device = x.device
    if "base_out" in base:
        base_out = _floating("base_out", base["base_out"])
        if base_out.shape[:-1] != x.shape[:-1] or base_out.device != device:
            where = f"{tuple(x.shape)} on {device}, got {tuple(base_out.shape)} on {base_out.device}"
            raise ValueError(f"base_out: expected the leading shape and device of x {where}")
        m = base_out.shape[-1]
    for name in ("weight", "bias"):
        given = base.get(name)
        if given is not None and (given.dtype != x.dtype or given.device != device):
            raise ValueError(f"{name}: expected the type and device of x ({x.dtype}, {device}), got {given.dtype}, {given.device}")
    _check_factor("a", a, (total, x.shape[-1]), device)
    if m is None:
        m = bt.shape[0 if transposed else -1]
    _check_factor("bt", bt, (m, total) if transposed else (total, m), device)
    own = x.numel() // x.shape[-1] if x.shape[-1] else 0
    if rows != own:
        raise ValueError(f"seg: expected segments over the {own} rows of x, got {rows}")


def of_base(weight: Tensor | None, bias: Tensor | None, base: Tensor | None) -> dict[str, Tensor | None]:
    """The `base` of `check_layer` from an op's arguments."""
    if (weight is None) == (base is None):
        raise RuntimeError("weight, base: expected one of them")
    return {"weight": weight, "bias": bias} if base is None else {"base_out": base}


def _floating(name: str, given) -> Tensor:
    if not isinstance(given, Tensor) or given.dtype not in FLOATS:
        raise TypeError(f"{name}: expected a float32, bfloat16, float16 or float64 tensor, got {seen(given)}")
    return given


def _check_factor(name: str, factor, shape: tuple[int, int], device) -> None:
    if not isinstance(factor, Tensor) or factor.shape != shape or factor.dtype not in FLOATS:
        raise ValueError(f"{name}: expected a floating-point tensor of shape {shape}, got {seen(factor)}")
    if factor.device != device:
        raise ValueError(f"{name}: expected device {device} as x, got {factor.device}")


def thirds(segments: list[int]) -> tuple[list[int], list[int], list[int]]:
    """(ranks, starts, lengths) of the clients, from the one list of the layer's ops, which the rows of x begin."""
    count = len(segments) // 3
    return segments[1 : 1 + count], segments[1 + count : 1 + 2 * count], segments[1 + 2 * count :]


def matrix(x: Tensor) -> Tensor:
    """x [..., n] as [T, n]."""
    return x if x.dim() == 2 else x.reshape(x.shape[:-1].numel(), x.shape[-1])


def lying_as(bt: Tensor, gradient: Tensor, transposed: bool) -> Tensor:
    """A gradient [S, m] in the shape and the memory layout of the `bt` that came in: as it is, or as PEFT keeps its lora_B [m, S]."""
    if transposed:
        return gradient.t().contiguous()
    return gradient.t().contiguous().t() if not bt.is_contiguous() and bt.stride() == (1, bt.shape[0]) else gradient


def base_first(expand_):
    """(with_base, beside) of `whole_layer` that write the base, on which `expand_` adds in place."""

    def with_base(x, matrix, bias, *terms):
        return added(x @ matrix if bias is None else torch.addmm(bias, x, matrix), *terms)

    def beside(like, base, *terms):
        return added(like.new_zeros(like.shape) if base is None else base.clone(memory_format=torch.contiguous_format), *terms)

    def added(out, *terms):
        expand_(out, *terms)
        return out

    return with_base, beside


def whole_layer(shrink, with_base, beside, grouped_gram):
    """(lora_forward, lora_backward) of a rung, from its steps.

    with_base(x, matrix, bias, s, rows, *walk): x matrix + bias + S_k rows_k, bias [d] or None.
    beside(like, base, s, rows, *walk): base + S_k rows_k in a new tensor of the shape and type of `like`; base None: zeros.
    """

    def lora_forward(x, weight, bias, base, a, bt, scale, seeds, row_keys, index, segments, dropout, transposed):
        """(base + scale_k * drop(x) A_k^T B_k^T, S) where base = x W^T + bias, or the given tensor [..., m]; x of any leading shape. S as `shrink` packs it."""
        check_layer(x, a, bt, sum(thirds(segments)[0]), segments[0], transposed, **of_base(weight, bias, base))
        flat, rows, lists = matrix(x), bt.t() if transposed else bt, thirds(segments)
        s = shrink(flat, a, scale, seeds, row_keys, index, *lists, dropout)
        plain = None, None, index, *lists, 0.0
        out = with_base(flat, weight.t(), bias, s, rows, *plain) if base is None else beside(matrix(base), matrix(base), s, rows, *plain)
        return out if x.dim() == 2 else unsafe_view(out, (*x.shape[:-1], out.shape[1])), s

    def lora_backward(d_y, x, weight, a, bt, s, scale, seeds, row_keys, index, segments, dropout, transposed, need_x, need_a, need_bt, type_a, type_bt):
        """(d_x, d_a in type_a, d_bt in type_bt), without elements where not needed; without `weight` d_x is that of the LoRA term alone.

        A type is a dtype, or its number where this is called past the dispatcher.
        """
        type_a, type_bt = _DTYPES.get(type_a, type_a), _DTYPES.get(type_bt, type_bt)
        check_layer(x, a, bt, sum(thirds(segments)[0]), segments[0], transposed, **({} if weight is None else {"weight": weight}))
        flat, flat_dy, rows = matrix(x), matrix(d_y).to(x.dtype), bt.t() if transposed else bt
        masked, plain = (seeds, row_keys, index, *thirds(segments), dropout), (None, None, index, *thirds(segments), 0.0)
        d_x, d_a, d_bt = x.new_empty(0), a.new_empty(0, dtype=type_a), bt.new_empty(0, dtype=type_bt)
        # Autocast, which may be on around a backward pass, would make its float32 products in half precision.
        with torch.autocast(d_y.device.type, enabled=False):
            d_s = shrink(flat_dy, rows, scale, *plain) if need_x or need_a else None
            if need_x:
                d_x = (beside(flat, None, d_s, a, *masked) if weight is None else with_base(flat_dy, weight, None, d_s, a, *masked)).view(x.shape)
            if need_a:
                d_a = grouped_gram(d_s, flat, *masked, type_a)
            if need_bt:
                d_bt = lying_as(bt, grouped_gram(s, flat_dy, *plain, type_bt), transposed)
        return d_x, d_a, d_bt

    return lora_forward, lora_backward
