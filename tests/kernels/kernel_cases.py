"""Oracles written from the equations, independent of the package's own reference. How exact a result must be is said in accuracy.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import torch
import torch.nn.functional as F
from accuracy import Estimate, any_order, in_groups, in_parts
from torch import Tensor

import hetlora_kernels as hk
from hetlora_kernels.reference import compute_dtype, operand_dtype

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
MIXED_RANKS = [4, 0, 1, 64, 3, 7, 8, 128, 16, 24]
MIXED_LENGTHS = [5, 3, 0, 17, 1, 33, 2, 9, 1, 65]  # empty, one token, 2^k + 1 tokens, rows of a client of rank 0
ROUNDED_RANK = 32  # kPairedRank of csrc/cpu/lora_pairs.h
_WORD = 0xFFFFFFFF


def drawn(seed: int) -> torch.Generator:
    """A generator of a test's random numbers; HETLORA_TEST_SEED gives every test others."""
    return torch.Generator().manual_seed(seed + 1_000_003 * int(os.environ.get("HETLORA_TEST_SEED", "0")))


# ---------------------------------------------------------------- dropout, in integers


def philox_words(counter: Sequence[Any], key: Sequence[int], rounds: int) -> tuple[Any, Any, Any, Any]:
    """Philox4x32 of Salmon et al. (SC 2011), round by round, of Python's integers or of int64 tensors, whose products are those modulo 2^64."""
    (x0, x1, x2, x3), (k0, k1) = counter, key
    for turn in range(rounds):
        if turn:
            k0, k1 = (k0 + 0x9E3779B9) & _WORD, (k1 + 0xBB67AE85) & _WORD
        left, right = 0xD2511F53 * x0, 0xCD9E8D57 * x2
        x0, x1, x2, x3 = (right >> 32 & _WORD) ^ x1 ^ k0, right & _WORD, (left >> 32 & _WORD) ^ x3 ^ k1, left & _WORD
    return x0, x1, x2, x3


def kept(seed: int, keys: Sequence[int], columns: int, p: float) -> Tensor:
    """[rows, columns] booleans: an element is kept when its 16-bit draw is at least round(65536 p)."""
    low, high = (torch.tensor([key >> shift & _WORD for key in keys], dtype=torch.int64)[:, None] for shift in (0, 32))
    blocks = torch.arange((columns + 7) // 8)  # of eight columns, two draws in each word
    words = torch.broadcast_tensors(*philox_words((low, high, blocks, 0), (seed & _WORD, seed >> 32 & _WORD), 7))
    draws = torch.stack([half for word in words for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return draws.reshape(len(keys), 8 * len(blocks))[:, :columns] >= round(65536 * p)


# ---------------------------------------------------------------- the layer


@dataclass
class Layer:
    """One call of the layer: factors in float64 on the CPU, who owns which row, and how the call is made."""

    ranks: list[int]
    ids: list[int]  # client of each row, -1 = base only
    n: int
    m: int
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    a: Tensor
    bt: Tensor
    scale: list[float]
    p: float = 0.0
    seeds: list[int] = field(default_factory=list)
    keys: list[int] | None = None
    grad: Tensor | None = None  # [T, m], the gradient that comes in

    def client_rows(self, k: int) -> list[int]:
        return [t for t, owner in enumerate(self.ids) if owner == k]

    def layout(self) -> hk.RankLayout:
        return hk.RankLayout(self.ranks)

    def segments(self) -> hk.Segments:
        keys = None if self.keys is None else torch.tensor(self.keys, dtype=torch.int64)
        return hk.Segments.from_ids(self.ids, row_keys=keys, num_clients=len(self.ranks))


def make_layer(ranks: Sequence[int], ids: Sequence[int], n: int, m: int, seed: int = 0, p: float = 0.0, bias: bool = True, keys: list[int] | None = None):
    """A `Layer` of Gaussian data with variances as in a real one, a scale and a dropout seed of its own for each client."""
    g = drawn(1000 + seed)

    def draw(*shape: int, std: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=g, dtype=torch.float64) * std

    total = sum(ranks)
    return Layer(
        ranks=list(ranks),
        ids=list(ids),
        n=n,
        m=m,
        x=draw(len(ids), n),
        weight=draw(m, n, std=n**-0.5),
        bias=draw(m) if bias else None,
        a=draw(total, n, std=n**-0.5),
        bt=draw(total, m, std=0.5),
        scale=[0.5 + 0.25 * k for k in range(len(ranks))],
        p=p,
        seeds=[(-1) ** k * (0x1234567890ABCDEF + 7919 * k + seed) for k in range(len(ranks))],
        keys=keys,
        grad=draw(len(ids), m),
    )


def mixed_ids(shuffled: bool = True, base_rows: int = 4) -> list[int]:
    """Clients of MIXED_LENGTHS with some base-only rows, in order or shuffled."""
    ids = [k for k, length in enumerate(MIXED_LENGTHS) for _ in range(length)] + [-1] * base_rows
    if shuffled:
        order = torch.randperm(len(ids), generator=drawn(5)).tolist()
        ids = [ids[i] for i in order]
    return ids


def plain_layer(layer: Layer, x: Tensor, a: Tensor, bt: Tensor, base: Tensor) -> Tensor:
    """base + scale_k * drop(x) A_k^T B_k^T, client by client with autograd's gradients: the oracle in float64, PyTorch's own result in any other type.

    As in PEFT: x is cast to the factors' type, the sum is made in the wider of the two and rounded to the base's.
    """
    ends = list(accumulate(layer.ranks))
    y = base.to(torch.promote_types(base.dtype, a.dtype))
    for k, (end, rank) in enumerate(zip(ends, layer.ranks, strict=True)):
        rows = torch.tensor(layer.client_rows(k), dtype=torch.int64, device=x.device)
        if not rank or not len(rows):
            continue
        own = x[rows].to(a.dtype)
        if layer.p:
            keys = list(range(len(rows))) if layer.keys is None else [layer.keys[t] for t in layer.client_rows(k)]
            mask = kept(layer.seeds[k], keys, layer.n, layer.p).to(x.device)
            own = torch.where(mask, own / (1 - round(65536 * layer.p) / 65536), torch.zeros((), dtype=own.dtype, device=x.device))
        delta = F.linear(F.linear(own, a[end - rank : end]), bt[end - rank : end].t())
        y = y.index_add(0, rows, delta.to(y.dtype) * layer.scale[k])
    return y.to(base.dtype)


def run_plain(layer: Layer, dtype: torch.dtype, factor_dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """y, d_x, d_a, d_bt, d_bias of `plain_layer` in `dtype` on data already rounded to it."""
    leaves = leaf_tensors(layer, dtype, factor_dtype, device)
    base = F.linear(leaves["x"], leaves["weight"], leaves.get("bias"))
    y = plain_layer(layer, leaves["x"], leaves["a"], leaves["bt"], base)
    y.backward(layer.grad.to(device, y.dtype))
    return results(y, leaves)


def run_fused(layer: Layer, dtype: torch.dtype, factor_dtype: torch.dtype | None = None, device: torch.device | str = "cpu") -> dict[str, Tensor]:
    """The same through `lora_linear`."""
    leaves = leaf_tensors(layer, dtype, factor_dtype, device)
    y = hk.lora_linear(
        *(leaves["x"], leaves["weight"], leaves.get("bias"), leaves["a"], leaves["bt"], layer.layout(), layer.segments()),
        scale=layer.scale,
        dropout=layer.p,
        seeds=torch.tensor(layer.seeds, device=device),
    )
    y.backward(layer.grad.to(device, y.dtype))
    return results(y, leaves)


def leaf_tensors(layer: Layer, dtype: torch.dtype, factor_dtype: torch.dtype | None, device: torch.device | str) -> dict[str, Tensor]:
    """The call's tensors rounded to `dtype` (the factors to `factor_dtype`); all but the weight require a gradient."""
    types = {"x": dtype, "weight": dtype, "bias": dtype, "a": factor_dtype or dtype, "bt": factor_dtype or dtype}
    present = {name: kind for name, kind in types.items() if getattr(layer, name) is not None}
    return {name: getattr(layer, name).to(device, kind, copy=True).requires_grad_(name != "weight") for name, kind in present.items()}


def results(y: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    """A gradient that autograd left out, because no row reaches the leaf, is zero."""
    grads = {f"d_{name}": torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return {"y": y.detach(), **grads}


def rounded(layer: Layer, dtype: torch.dtype, factor_dtype: torch.dtype | None = None) -> Layer:
    """The layer with every tensor rounded to `dtype` and held in float64, so that the float64 oracle sees the same data as the kernel."""
    cast = {name: getattr(layer, name) for name in ("x", "weight", "bias", "a", "bt", "grad")}
    cast = {name: t if t is None else t.to(factor_dtype if name in ("a", "bt") and factor_dtype else dtype).double() for name, t in cast.items()}
    return Layer(**{**layer.__dict__, **cast})


# ---------------------------------------------------------------- tolerance


def estimated(layer: Layer, dtype: torch.dtype, device: torch.device | str = "cpu", base: Estimate | None = None, ours: bool = False) -> dict[str, Estimate]:
    """The results of a call in `dtype` on a layer of data that is rounded already, with the errors that our arithmetic may make (accuracy.py).

    base: the given output of another layer. ours: the base product is our kernel's, whose order of sums is known; else the framework's.
    """
    inside = compute_dtype(dtype)
    # Triton's kernels round operands as they do for tensor cores, in the interpreter too.
    operand = dtype if os.environ.get("TRITON_INTERPRET") == "1" else operand_dtype(torch.empty(0, dtype=dtype, device=device))
    x, grad, a, bt = (Estimate(t) for t in (layer.x, layer.grad, layer.a, layer.bt))
    if operand != inside:
        a, bt = a.rounded(operand), bt.rounded(operand)
    weight = Estimate(layer.weight)
    # float64 is judged by itself: the truth's own order of sums is the framework's.
    columns, rows_of_w = (any_order, any_order) if inside == torch.float64 else (in_parts, in_groups)
    if base is None:
        # The framework may round before it adds the bias, and after.
        base = x.matmul(weight.t(), inside, columns if ours else any_order).rounded(dtype)
        base = base if layer.bias is None else base.plus(Estimate(layer.bias), dtype)
        d_x = grad.matmul(weight, inside, rows_of_w if ours else any_order).rounded(dtype)
    else:
        d_x = Estimate(torch.zeros_like(layer.x))
    y, d_a, d_bt = base, Estimate(torch.zeros_like(layer.a)), Estimate(torch.zeros_like(layer.bt))
    ends = list(accumulate(layer.ranks))
    for k, (end, rank) in enumerate(zip(ends, layer.ranks, strict=True)):
        rows = torch.tensor(layer.client_rows(k), dtype=torch.int64)
        if not rank or not len(rows):
            continue
        own_a, own_bt, own, d_y = a[end - rank : end], bt[end - rank : end], x[rows], grad[rows]
        # As in PEFT, S and dS may be rounded to bfloat16 from rank 32 on, where rows and both factors are bfloat16: so they are on processors that
        # multiply pairs of such numbers (docs/kernels-lora.md). Factors in float32 have numbers that bfloat16 has not.
        in_bfloat16 = dtype == torch.bfloat16 and all(torch.equal(t, t.to(dtype).double()) for t in (layer.a, layer.bt))
        kind = dtype if rank >= ROUNDED_RANK and in_bfloat16 else operand
        drop = torch.ones(len(rows), layer.n, dtype=torch.float64)
        if layer.p:
            keys = list(range(len(rows))) if layer.keys is None else [layer.keys[t] for t in layer.client_rows(k)]
            drop = kept(layer.seeds[k], keys, layer.n, layer.p).double() / (1 - round(65536 * layer.p) / 65536)
            own = own.times(drop, inside)
        s = own.matmul(own_a.t(), inside, columns).times(layer.scale[k], inside).rounded(kind)
        d_s = d_y.matmul(own_bt.t(), inside, columns).times(layer.scale[k], inside).rounded(kind)
        term, d_term = s.matmul(own_bt, inside), d_s.matmul(own_a, inside).times(drop, inside)
        for whole, part in ((y, term), (d_x, d_term)):
            whole[rows] = whole[rows].plus(part, inside)
        d_a[end - rank : end], d_bt[end - rank : end] = d_s.t().matmul(own, inside), s.t().matmul(d_y, inside)
    out = {"y": y, "d_x": d_x, "d_a": d_a, "d_bt": d_bt}
    if layer.bias is not None:
        out["d_bias"] = Estimate(torch.ones(1, len(layer.ids))).matmul(grad, inside)[0]
    return out


def same_bits(left: Tensor, right: Tensor) -> bool:
    if left.shape != right.shape or left.dtype != right.dtype:
        return False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[left.element_size()]
    return bool((left.detach().contiguous().view(integers) == right.detach().contiguous().view(integers)).all())


# ---------------------------------------------------------------- the two ways of the CPU library


BY_SIZE, SMALL, LARGE, WIDENED = range(4)  # csrc/cpu/lora_ops.cpp


@contextmanager
def going(way: int) -> Iterator[None]:
    """Every call of the layer on the CPU kernels goes this way inside the block."""
    before = torch.ops.hetlora._lora_way(way)
    try:
        yield
    finally:
        torch.ops.hetlora._lora_way(before)


# ---------------------------------------------------------------- memory


def guarded(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> tuple[Tensor, Callable[[], None]]:
    """A contiguous tensor between 64 guard elements on each side, and the check that no guard was written."""
    size = 1
    for extent in shape:
        size *= extent
    buffer = torch.full((size + 128,), 12345.0, dtype=dtype, device=device)

    def check() -> None:
        guards = torch.cat((buffer[:64], buffer[-64:]))
        assert bool((guards == torch.tensor(12345.0, dtype=dtype, device=device)).all())

    return buffer[64 : 64 + size].view(*shape), check


def scattered(t: Tensor) -> Tensor:
    """The same values in a non-contiguous tensor: every second column of a wider one, rows transposed in memory."""
    wide = torch.full((2 * t.shape[1], t.shape[0]), float("nan"), dtype=t.dtype, device=t.device)
    view = wide.t()[:, ::2]
    view.copy_(t)
    return view
