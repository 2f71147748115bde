"""A bank of three modules and four clients for the optimisers' tests, and the clients' own factors of it."""

from __future__ import annotations

import torch
from kernel_cases import drawn
from torch import Tensor

import hetlora_kernels as hk

SHAPES = {"q": (6, 5), "mlp.up": (9, 4), "v": (3, 7)}
RANKS = {"q": [4, 1, 3, 0], "mlp.up": [8, 3, 2, 1], "v": [1, 0, 7, 2]}
KEEP = {"q": [3, 1, 1, 0], "mlp.up": [5, 0, 2, 0], "v": [0, 0, 9, 1]}  # part, everything, nothing and more than everything


def make_bank(dtype, device, seed=0) -> hk.AdapterBank:
    g = drawn(seed)
    bank = hk.AdapterBank(SHAPES, RANKS, dtype=dtype, device=device, generator=g)
    for t in bank.bt.values():
        t.data.copy_(torch.randn(t.shape, generator=g) * 0.3)
    return bank


def own_factors(bank: hk.AdapterBank, k: int) -> list[Tensor]:
    """Leaves of client k: all A, then all B^T, as a torch optimiser takes them."""
    rows = {name: layout.rows(k) for name, layout in bank.layouts.items()}
    return [t.detach()[rows[name]].clone().requires_grad_() for side in (bank.a, bank.bt) for name, t in side.items()]
