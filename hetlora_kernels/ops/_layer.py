"""What the arguments of a LoRA layer must be: asked by the rungs written in Python and by shape functions, and again once a compiled op has refused a call."""

from __future__ import annotations

import torch
from torch import Tensor

from hetlora_kernels.ops._lists import FLOATS


def check_layer(x: Tensor, a: Tensor, bt: Tensor, total: int, rows: int, transposed: bool, **base: Tensor | None) -> None:
    """`ValueError` or `TypeError` naming the argument, unless the tensors of one call fit together.

    total: S, the sum of the ranks.   rows: T of the segments.   transposed: bt is B [m, S].
    base: weight= and bias= of the frozen layer, or its output base_out=, or nothing.
    """
    m = n = None
    if "weight" in base:
        weight, bias = base["weight"], base.get("bias")
        if not isinstance(weight, Tensor) or weight.dim() != 2:
            raise ValueError(f"weight: expected a tensor [out, in], got {_seen(weight)}")
        m, n = weight.shape
        if bias is not None and not (isinstance(bias, Tensor) and bias.shape == (m,)):
            raise ValueError(f"bias: expected a tensor of shape ({m},) or None, got {_seen(bias)}")
    if not isinstance(x, Tensor) or x.dtype not in FLOATS:
        raise TypeError(f"x: expected a float32, bfloat16, float16 or float64 tensor, got {x.dtype if isinstance(x, Tensor) else type(x).__name__}")
    for name, given in {"x": x, "a": a, "bt": bt, **base}.items():
        if isinstance(given, Tensor) and (given.layout != torch.strided or given.is_nested):
            raise TypeError(f"{name}: expected a dense tensor, got {'a nested one' if given.is_nested else given.layout}")
    if x.dim() < 1 or (n is not None and x.shape[-1] != n):
        raise ValueError(f"x: expected a last dimension of {'in_features' if n is None else n}, got shape {tuple(x.shape)}")
    if "base_out" in base:
        m = _width_of_output(base["base_out"], x)
    device = x.device
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


def _seen(given) -> str:
    return str(tuple(given.shape)) if isinstance(given, Tensor) else type(given).__name__


def _width_of_output(base_out, x: Tensor) -> int:
    if not isinstance(base_out, Tensor) or base_out.dtype not in FLOATS:
        got = base_out.dtype if isinstance(base_out, Tensor) else type(base_out).__name__
        raise TypeError(f"base_out: expected a float32, bfloat16, float16 or float64 tensor, got {got}")
    if base_out.shape[:-1] != x.shape[:-1] or base_out.device != x.device:
        where = f"{tuple(x.shape)} on {x.device}, got {tuple(base_out.shape)} on {base_out.device}"
        raise ValueError(f"base_out: expected the leading shape and device of x {where}")
    return base_out.shape[-1]


def _check_factor(name: str, factor, shape: tuple[int, int], device) -> None:
    if isinstance(factor, Tensor) and factor.shape == shape and factor.dtype in FLOATS:
        if factor.device != device:
            raise ValueError(f"{name}: expected device {device} as x, got {factor.device}")
        return
    got = f"{tuple(factor.shape)} {factor.dtype}" if isinstance(factor, Tensor) else type(factor).__name__
    raise ValueError(f"{name}: expected a floating-point tensor of shape {shape}, got {got}")
