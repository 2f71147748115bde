"""Rank rows in 8 or 4 bits with one scale per row: what a server sends where clients only compute with the rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, overload

import torch
from torch import Tensor

from hetlora_kernels._library import call, register_fake
from hetlora_kernels.layout import int_list
from hetlora_kernels.ops._lists import FLOATS, module_list, outputs, written

CODES = {8: torch.int8, 4: torch.uint8}
"""Bits of a code -> type of the tensor that holds the codes."""


def code_bytes(width: int, bits: int) -> int:
    """Bytes of the codes of one row of `width` elements: two codes of 4 bits share a byte. The row's scale is 4 more."""
    return width if bits == 8 else (width + 1) // 2


@overload
def quantize_rows(rows: Tensor, bits: int = ...) -> tuple[Tensor, Tensor]: ...


@overload
def quantize_rows(rows: Sequence[Tensor], bits: int = ...) -> tuple[list[Tensor], list[Tensor]]: ...


def quantize_rows(
    rows: Tensor | Sequence[Tensor],  # [R, d], or one per module
    bits: int = 8,
) -> tuple[Tensor, Tensor] | tuple[list[Tensor], list[Tensor]]:
    """scale_i = max_j |x_ij| / q with q = 2^(bits - 1) - 1;  code_ij = x_ij / scale_i, rounded to the nearest integer, ties to even.

    rows: [R, d] of any floating-point type; a list does all modules in one call.   bits: 8 or 4.

    Returns (codes, scales), lists when a list came in. codes: int8 [R, d]; of 4 bits uint8 [R, ceil(d / 2)], column 2j in the low half of byte j, column
    2j + 1 in the high half, each a two's complement number from -7 to 7, the half past an odd width zero. scales: float32 [R].
    With x' = code * scale, as `dequantize_rows` gives it: |x - x'| <= (1/2 + 2^-16) scale, the 2^-16 for the roundings of division and product in float32.
    A row of zeros has scale 0, and so has one whose scale would lie below 2^-126, the smallest normal number: its codes are zero.
    Division, rounding and maximum are exact or correctly rounded in one order, so that every rung gives the same bits. Arithmetic is float32, float64 for
    float64 rows. Not differentiable. `ValueError` on other bits, and on a row with a NaN, an infinity or a scale beyond float32.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> codes, scales = hk.quantize_rows(torch.tensor([[127.0, -1.0, 2.4]]))
    >>> codes.tolist(), scales.tolist()
    ([[127, -1, 2]], [1.0])
    """
    listed, many = module_list("rows", rows)
    if not isinstance(bits, int) or bits not in CODES:
        raise ValueError(f"bits: expected 8 or 4, got {bits!r}")
    device = listed[0].device
    codes = [torch.empty(t.shape[0], code_bytes(t.shape[1], bits), dtype=CODES[bits], device=device) for t in listed]
    together = torch.empty(sum(t.shape[0] for t in listed), dtype=torch.float32, device=device)  # one look for what is not finite
    scales = list(together.split([t.shape[0] for t in listed]))
    call("quantize_rows_")(codes, scales, listed, bits)
    if not together.is_meta and not bool(torch.isfinite(together).all()):
        module, row = next((m, int(bad[0])) for m, own in enumerate(scales) if len(bad := (~torch.isfinite(own)).nonzero()))
        where = f"rows[{module}]" if many else "rows"
        raise ValueError(f"{where}: expected finite values with a scale in float32, got a scale of {float(scales[module][row])} in row {row}")
    return (codes, scales) if many else (codes[0], scales[0])


@overload
def dequantize_rows(codes: Tensor, scales: Tensor, width: int | None = ..., dtype: torch.dtype = ..., out: Tensor | None = ...) -> Tensor: ...


@overload
def dequantize_rows(
    codes: Sequence[Tensor], scales: Sequence[Tensor], width: Sequence[int] | None = ..., dtype: torch.dtype = ..., out: Sequence[Tensor] | None = ...
) -> list[Tensor]: ...


def dequantize_rows(
    codes: Tensor | Sequence[Tensor],  # int8 [R, d] or uint8 [R, ceil(d / 2)], or one per module
    scales: Tensor | Sequence[Tensor],  # float32 [R], or one per module
    width: int | Sequence[int] | None = None,
    dtype: torch.dtype = torch.float32,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """x'_ij = code_ij * scale_i, the inverse of `quantize_rows` up to its rounding.

    codes, scales: as `quantize_rows` gives them; their type says how many bits a code has.
    width: d, or one per module; needed for codes of 4 bits, of which an odd d leaves one half of the last byte unused.
    dtype: of the result.   out: tensor(s) to write instead of fresh ones; every element is written.

    Returns rows [R, d], a list when a list came in; products are made in float32 (float64 for a float64 result) and rounded once. Not differentiable.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> codes, scales = hk.quantize_rows(torch.tensor([[127.0, -1.0, 2.4]]))
    >>> hk.dequantize_rows(codes, scales).tolist()
    [[127.0, -1.0, 2.0]]
    """
    many = not isinstance(codes, Tensor)
    listed, bits = _codes(codes)
    scaled: list[Any] = list(scales) if isinstance(scales, (list, tuple)) else [scales]
    widths = _widths(listed, bits, width)
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    if len(scaled) != len(listed):
        raise ValueError(f"scales: expected {len(listed)} tensors, one per module, got {len(scaled)}")
    for position, (own, scale) in enumerate(zip(listed, scaled, strict=True)):
        if not isinstance(scale, Tensor) or scale.dtype != torch.float32 or tuple(scale.shape) != own.shape[:1] or scale.device != own.device:
            got = f"{scale.dtype} {tuple(scale.shape)} on {scale.device}" if isinstance(scale, Tensor) else type(scale).__name__
            raise ValueError(f"scales[{position}]: expected float32 of shape ({own.shape[0]},) on {own.device}, got {got}")
    result = outputs("out", out, [(own.shape[0], d) for own, d in zip(listed, widths, strict=True)], dtype, listed[0].device)
    call("dequantize_rows_")(result, [own.contiguous() for own in listed], [scale.detach().contiguous() for scale in scaled], bits)
    written(result)
    return result if many else result[0]


def _codes(codes: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], int]:
    """The checked codes of every module, and the bits of one."""
    kinds = {kind: bits for bits, kind in CODES.items()}
    listed: list[Any] = list(codes) if isinstance(codes, (list, tuple)) else [codes]
    if not listed or not all(isinstance(own, Tensor) and own.layout == torch.strided for own in listed):
        raise TypeError("codes: expected a tensor or a non-empty list of tensors")
    for position, own in enumerate(listed):
        if own.dim() != 2 or own.dtype not in kinds or own.dtype != listed[0].dtype or own.device != listed[0].device:
            raise ValueError(f"codes[{position}]: expected [rows, bytes] of int8 or uint8, one type and device, got {own.dtype} {tuple(own.shape)}")
    return listed, kinds[listed[0].dtype]


def _widths(codes: list[Tensor], bits: int, width: int | Sequence[int] | None) -> list[int]:
    if width is None and bits == 4:
        raise ValueError("width: expected the number of columns, as two codes of 4 bits share a byte, got None")
    if width is None:
        return [own.shape[1] for own in codes]
    widths = [width] * len(codes) if isinstance(width, int) else int_list("width", width)
    if len(widths) != len(codes):
        raise ValueError(f"width: expected one number or {len(codes)}, one per module, got {len(widths)}")
    for own, d in zip(codes, widths, strict=True):
        if code_bytes(d, bits) != own.shape[1]:
            raise ValueError(f"width: expected the columns of codes with {own.shape[1]} bytes a row in {bits} bits, got {d}")
    return widths


@register_fake("quantize_rows_")
def _(codes, scales, rows, bits):
    return None


@register_fake("dequantize_rows_")
def _(out, codes, scales, bits):
    return None
