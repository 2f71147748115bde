"""Fresh rows on the folded bank (`train = 'fresh-rows'`, `merge = 'bank-svd'`; `--method fold`): everybody computes with the server's whole bank, and
trains what no other client trains.

The server keeps one bank of rank R. A round, s the scale of the run, m and n the widths of a module:
  1. a client downloads all R rows, quantised row by row, and folds them into W for the time of its training: W + s B_g A_g. They are frozen.
  2. it draws rho_k = floor(r_k (m + n) / m) fresh rows A_k, starts from B_k = 0 and trains B_k alone, as many numbers as a LoRA of rank r_k has.
  3. it sends B_k; the server draws A_k again from the same seed.
  4. bank <- the best approximation of rank R of B_g A_g + sum_k p_k B_k A_k.
The base never changes, and the bank is what is exported.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

import hetlora_kernels as hk
from hetlora.low_rank import best_rank
from hetlora.seeds import torch_generator
from hetlora_kernels.ops.quantize import code_bytes

Shapes = Mapping[str, tuple[int, int]]
BITS = {"8bit": 8, "4bit": 4}


# ---------------------------------------------------------------- the download


@dataclass(frozen=True)
class Download:
    """What a client receives: the bank as it computes with it, and the bytes that travelled."""

    bank: hk.AdapterBank
    num_bytes: int


def download(bank: hk.AdapterBank, kind: str) -> Download:
    """All rows of the server's bank, in '8bit' or '4bit' with one float32 scale a row of A and of B^T, or 'exact', in the bank's own type."""
    if kind == "exact":
        return Download(bank.to(), bank.num_bytes(0))
    rows = [t.detach() for t in bank.parameters()]
    codes, scales = hk.quantize_rows(rows, BITS[kind])
    back = hk.dequantize_rows(codes, scales, [t.shape[1] for t in rows], dtype=bank.dtype)
    received = bank.to()
    for own, values in zip(received.parameters(), back, strict=True):
        own.data = values
    return Download(received, download_bytes(bank.shapes, bank.layouts[next(iter(bank.shapes))].ranks[0], kind, bank.dtype))


def download_bytes(shapes: Shapes, rank: int, kind: str, dtype: torch.dtype) -> int:
    """Bytes of one download of `rank` rows."""
    if kind == "exact":
        return sum(rank * (m + n) * dtype.itemsize for m, n in shapes.values())
    return sum(rank * (code_bytes(width, BITS[kind]) + 4) for shape in shapes.values() for width in shape)


@contextmanager
def folded(model: nn.Module, bank: hk.AdapterBank, scale: float) -> Iterator[None]:
    """Inside the block the modules that `bank` (of one client) names compute with W + s B A, frozen.

    A plain weight makes room for one that holds the sum, in its own type; after the block the model has the very tensors it had. A quantised layer keeps its
    weight, and s (x A^T) B^T is added to what it returns. A module whose B is zero is left as it is.
    """
    weights: dict[str, nn.Parameter] = {}
    hooks = []
    try:
        for name in bank.shapes:
            a, bt = bank.a[name].detach(), bank.bt[name].detach()
            if not bool(bt.any()):
                continue
            layer = model.get_submodule(name)
            weight = layer._parameters.get("weight")
            if type(weight) is nn.Parameter and weight.is_floating_point():
                weights[name] = weight
                layer.weight = nn.Parameter(_sum(weight, a, bt, scale, hasattr(layer, "nf")), requires_grad=False)
            else:
                hooks.append(layer.register_forward_hook(_beside(a, bt, scale)))
        yield
    finally:
        for name, weight in weights.items():
            model.get_submodule(name).weight = weight
        for hook in hooks:
            hook.remove()


def _sum(weight: Tensor, a: Tensor, bt: Tensor, scale: float, transposed: bool) -> Tensor:
    """W + s B A in W's type, added in the wider of the two; GPT-2's Conv1D stores W transposed."""
    delta = a.t() @ bt if transposed else bt.t() @ a
    return (weight.detach() + scale * delta).to(weight.dtype)


def _beside(a: Tensor, bt: Tensor, scale: float):
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = inputs[0]
        return out + (scale * (x.to(a.dtype) @ a.t()) @ bt).to(out.dtype)

    return add


# ---------------------------------------------------------------- fresh rows


def fresh_ranks(ranks: Mapping[str, Sequence[int]], shapes: Shapes) -> dict[str, list[int]]:
    """rho_k = floor(r_k (m + n) / m), at most n: {module: one per client}.

    B_k [m, rho_k] then has no more numbers than the r_k (m + n) of a LoRA of rank r_k. n rows already span whatever a row of A can be.
    """
    return {name: [min(n, rank * (m + n) // m) for rank in ranks[name]] for name, (m, n) in shapes.items()}


def fresh_bank(
    shapes: Shapes,
    ranks: Mapping[str, Sequence[int]],
    means: Mapping[str, float],
    clients: Sequence[str],
    seed: int,
    round_number: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> hk.AdapterBank:
    """The adapters that clients start a round from: A_k drawn, B_k = 0; A is frozen.

    ranks: rho, {module: one per client}.   means: {module: rho_bar}, as `mean_ranks` gives it.   clients: names.
    A_k ~ U(-1, 1) sqrt(rho_bar / (rho_k n)), from the seed of (run, round, client, module): server and client draw the same, on whatever device. The root
    makes the update of one optimiser step about as large at every rank.
    """
    bank = hk.AdapterBank(shapes, ranks, dtype=dtype, device=device)
    for name, (_, n) in shapes.items():
        layout = bank.layouts[name]
        drawn = torch.empty(layout.total, n, dtype=dtype)
        for k, client in enumerate(clients):
            rows = layout.rows(k)
            bound = math.sqrt(means[name] / (max(1, layout.ranks[k]) * n))
            drawn[rows].uniform_(-bound, bound, generator=torch_generator(seed, "fresh rows", round_number, client, name))
        bank.a[name].data = drawn.to(device)
    return bank.freeze_a()


def mean_ranks(ranks: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """rho_bar of each module: the geometric mean of the fleet's fresh ranks, {module: one per client of the federation}."""
    return {name: math.exp(sum(math.log(max(1, rank)) for rank in own) / len(own)) for name, own in ranks.items()}


# ---------------------------------------------------------------- the merge


def merged_bank(bank: hk.AdapterBank, uploads: hk.AdapterBank, weights: Tensor, rank: int) -> hk.AdapterBank:
    """The bank of rank `rank` nearest to B_g A_g + sum_k p_k B_k A_k; weights p: [K, modules]. Each p_k is in B_k and in A_k as its root."""
    stacks = []
    for module, name in enumerate(bank.shapes):
        root = torch.repeat_interleave(weights[:, module].double().sqrt(), torch.tensor(uploads.layouts[name].ranks)).to(uploads.device)[:, None]
        sides = ((bank.bt[name], uploads.bt[name]), (bank.a[name], uploads.a[name]))
        x, y = (torch.cat([old.detach().double(), root * new.detach().double()]) for old, new in sides)
        stacks.append((x, y))
    out = hk.AdapterBank(bank.shapes, [rank], dtype=bank.dtype, device=bank.device)
    for name, (bt, a) in zip(bank.shapes, best_rank(stacks, rank), strict=True):
        out.bt[name].data, out.a[name].data = bt.to(bank.dtype), a.to(bank.dtype)
    return out
