"""Dropout seeds of layers and steps."""

from __future__ import annotations

import torch
from torch import Tensor

_MASK64 = (1 << 64) - 1


def layer_seeds(seeds: Tensor, step: int | Tensor, module: int) -> Tensor:
    """int64 [K]: each client's dropout seed for one step and one module, mixed from (client seed, step, module index) by SplitMix64's finaliser.

    >>> import torch
    >>> from hetlora_kernels.peft import layer_seeds
    >>> seeds = torch.tensor([7, 8])  # one of each client
    >>> first, second = layer_seeds(seeds, step=0, module=0), layer_seeds(seeds, step=0, module=1)
    >>> first.dtype, first.shape, torch.equal(first, second)
    (torch.int64, torch.Size([2]), False)
    """
    state = seeds + torch.as_tensor(step, dtype=torch.int64, device=seeds.device) * _signed(0x9E3779B97F4A7C15)
    state = _mix64(state)
    return _mix64(state + _signed((module + 1) * 0x632BE59BD9B4E019))


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64 with wrap-around; `>>` made logical by masks."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))
