"""Distribution: each client receives the leading rank rows of the bank (HETLORA section 3.1, "truncation")."""

from __future__ import annotations

from collections.abc import Sequence
from typing import overload

import torch
from torch import Tensor

from hetlora_kernels._library import call, register_fake
from hetlora_kernels.ops._lists import FLOATS, Layouts, flat_ranks, module_layouts, module_list, outputs, written


@overload
def truncate(bank_rows: Tensor, layout: Layouts, dtype: torch.dtype | None = ..., dense: bool = ..., out: Tensor | None = ...) -> Tensor: ...


@overload
def truncate(
    bank_rows: Sequence[Tensor], layout: Layouts, dtype: torch.dtype | None = ..., dense: bool = ..., out: Sequence[Tensor] | None = ...
) -> list[Tensor]: ...


def truncate(
    bank_rows: Tensor | Sequence[Tensor],  # [R, d], or one per module
    layout: Layouts,
    dtype: torch.dtype | None = None,
    dense: bool = False,
    out: Tensor | Sequence[Tensor] | None = None,
) -> Tensor | list[Tensor]:
    """rows of client k = bank_rows[: r_k], cast to `dtype`.

    bank_rows: [R, d] rank rows of the global bank (A, or B transposed); a list does all modules in one call.
    layout: ranks of the K clients; one RankLayout, or one per module. Every rank must be <= R.
    dtype: type of the result; default: the bank's.   dense: False -> packed [S, d]; True -> zero-masked [K, R, d].
    out: tensor(s) to write instead of fresh ones; every element is written. Memory shared with `bank_rows` is refused.

    Returns packed rows [S, d] (or [K, R, d]), a list when a list came in. Not differentiable. `ValueError` on a rank above R.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> bank_rows = torch.tensor([[1.0, 1.0], [2.0, 2.0], [3.0, 3.0]])
    >>> hk.truncate(bank_rows, hk.RankLayout([1, 2])).tolist()
    [[1.0, 1.0], [1.0, 1.0], [2.0, 2.0]]
    >>> hk.truncate(bank_rows, hk.RankLayout([1, 2]), dense=True).shape
    torch.Size([2, 3, 2])
    """
    banks, many = module_list("bank_rows", bank_rows)
    layouts = module_layouts(layout, len(banks))
    dtype = banks[0].dtype if dtype is None else dtype
    if dtype not in FLOATS:
        raise TypeError(f"dtype: expected float32, bfloat16, float16 or float64, got {dtype}")
    for position, (bank, own) in enumerate(zip(banks, layouts, strict=True)):
        if own.max_rank > bank.shape[0]:
            raise ValueError(f"layout: expected ranks <= {bank.shape[0]} (rows of bank_rows[{position}]), got {own.max_rank}")
    shapes = [(own.num_clients, *bank.shape) if dense else (own.total, bank.shape[1]) for bank, own in zip(banks, layouts, strict=True)]
    result = outputs("out", out, shapes, dtype, banks[0].device, banks)
    call("truncate_")(result, banks, flat_ranks(layouts), dense)
    written(result)
    return result if many else result[0]


@register_fake("truncate_")
def _(out, bank, ranks, dense):
    return None
