"""Norms of low-rank updates through Gram matrices, never forming B A (HETLORA sections 3.2 and 3.3)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from hetlora_kernels._library import call, register_fake
from hetlora_kernels.layout import own_list
from hetlora_kernels.ops._lists import Layouts, client_integers, flat_ranks, prepare
from hetlora_kernels.reference import compute_dtype


def gram(rows: Tensor | Sequence[Tensor], layout: Layouts, exact: bool = False) -> Tensor | list[Tensor]:
    """G_k = rows_k rows_k^T for each client.

    rows: packed rank rows [S, d], or a list of modules.   layout: one RankLayout, or one per module.
    exact: products and result in float64 instead of float32 (float64 input is always exact).

    Returns the r_k x r_k matrices packed one after another, [sum r_k^2], a list when a list came in; `unpack_gram` views them. Not differentiable.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> rows = torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]])
    >>> hk.gram(rows, hk.RankLayout([1, 2])).tolist()
    [5.0, 9.0, 0.0, 0.0, 1.0]
    """
    listed, many, layouts = prepare("rows", rows, layout)
    result = call("gram")(listed, flat_ranks(layouts), exact)
    return result if many else result[0]


def unpack_gram(packed: Tensor, layout) -> list[Tensor]:
    """Views [r_k, r_k] into the packed result of `gram`, one per client.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> layout = hk.RankLayout([1, 2])
    >>> packed = hk.gram(torch.tensor([[1.0, 2.0], [3.0, 0.0], [0.0, 1.0]]), layout)
    >>> [own.tolist() for own in hk.unpack_gram(packed, layout)]
    [[[5.0]], [[9.0, 0.0], [0.0, 1.0]]]
    """
    size = sum(rank * rank for rank in layout.ranks)
    if not isinstance(packed, Tensor) or tuple(packed.shape) != (size,):
        raise ValueError(f"packed: expected the {size} elements that `gram` gives, got {tuple(packed.shape) if isinstance(packed, Tensor) else packed!r}")
    blocks = packed.split([rank * rank for rank in layout.ranks])
    return [block.view(rank, rank) for block, rank in zip(blocks, layout.ranks, strict=True)]


def delta_norms(a: Tensor | Sequence[Tensor], bt: Tensor | Sequence[Tensor], layout: Layouts, exact: bool = False) -> Tensor:
    """||B_k A_k||_F = sqrt(max(0, sum over i, j of (Bt_k Bt_k^T)_ij (A_k A_k^T)_ij)): the sparsity weight S_k of the paper.

    a: [S, n], bt: [S, m] packed rank rows, or lists of modules.   layout: one RankLayout, or one per module.
    exact: float64 products. Default: float32 products combined in float64, which loses relative accuracy when rank rows nearly cancel
    (two rows a, a + 1e-3 e against b, -b: about 1e-2; exact: 1e-9). Squared norms of rows are float32 too: rows shorter than 1e-19
    lose digits and at last count for 0, rows longer than 1e19 give inf or NaN. exact: neither.

    Returns float32 [K] for tensors, [K, modules] for lists; float64 when the input is, or `exact`. Not differentiable.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> a, bt = torch.tensor([[3.0, 4.0], [1.0, 0.0]]), torch.tensor([[2.0], [1.0]])
    >>> hk.delta_norms(a, bt, hk.RankLayout([1, 1])).tolist()  # ||2 (3, 4)|| and ||1 (1, 0)||
    [10.0, 1.0]
    """
    a_list, many, layouts = prepare("a", a, layout)
    bt_list, many_bt, _ = prepare("bt", bt, layouts)
    if many != many_bt:
        raise ValueError(f"bt: expected a {'list of modules' if many else 'tensor'} as for a, got the other")
    if bt_list[0].dtype != a_list[0].dtype or bt_list[0].device != a_list[0].device:
        raise ValueError(f"bt: expected the type and device of a ({a_list[0].dtype}, {a_list[0].device}), got {bt_list[0].dtype}, {bt_list[0].device}")
    result = call("delta_norms")(a_list, bt_list, flat_ranks(layouts), exact)
    return result if many else result[:, 0]


def tail_norms(rows: Tensor | Sequence[Tensor], layout: Layouts, keep: Sequence[int] | Sequence[Sequence[int]]) -> Tensor:
    """||rows_k[keep_k :]||_F for each client: the factor norms in the pruning score (paper, section 3.2).

    rows: packed rank rows [S, d], or a list of modules.   layout: one RankLayout, or one per module.
    keep: host integers >= 0, one per client (or one sequence per module); at or above r_k the tail is empty and its norm 0.

    On a GPU squares of float32 and 16-bit rows are float32: rows shorter than 1e-19 lose digits and at last count for 0, rows longer than 1e19 are infinite.

    Returns float32 [K] for a tensor, [K, modules] for a list; float64 when the input is. Not differentiable: `AdamW` and `SGD` carry the
    regulariser's gradient.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> rows = torch.tensor([[9.0, 9.0], [3.0, 4.0], [7.0, 7.0]])
    >>> hk.tail_norms(rows, hk.RankLayout([2, 1]), keep=[1, 1]).tolist()
    [5.0, 0.0]
    """
    listed, many, layouts = prepare("rows", rows, layout)
    result = call("tail_norms")(listed, flat_ranks(layouts), client_integers("keep", keep, layouts))
    return result if many else result[:, 0]


@register_fake("gram")
def _(rows, ranks, exact):
    sizes = [sum(r * r for r in own_list(ranks, m, len(rows))) for m in range(len(rows))]
    return [t.new_empty(size, dtype=torch.float64 if exact else compute_dtype(t.dtype)) for t, size in zip(rows, sizes, strict=True)]


@register_fake("delta_norms")
def _(a, bt, ranks, exact):
    return a[0].new_empty((len(own_list(ranks, 0, len(a))), len(a)), dtype=torch.float64 if exact else compute_dtype(a[0].dtype))


@register_fake("tail_norms")
def _(rows, ranks, keep):
    return rows[0].new_empty((len(own_list(ranks, 0, len(rows))), len(rows)), dtype=compute_dtype(rows[0].dtype))
