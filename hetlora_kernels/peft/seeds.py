"""Dropout seeds of layers and steps."""

from __future__ import annotations

import torch
from torch import Tensor

from hetlora_kernels._uploads import uploaded
from hetlora_kernels.ops.lora import KeptSeeds

_MASK64 = (1 << 64) - 1
_MODULE = 0x632BE59BD9B4E019


def layer_seeds(seeds: Tensor, step: int | Tensor, module: int) -> Tensor:
    """int64 [K]: each client's dropout seed for one step and one module, mixed from (client seed, step, module index) by SplitMix64's finaliser.

    >>> import torch
    >>> from hetlora_kernels.peft import layer_seeds
    >>> seeds = torch.tensor([7, 8])  # one of each client
    >>> first, second = layer_seeds(seeds, step=0, module=0), layer_seeds(seeds, step=0, module=1)
    >>> first.dtype, first.shape, torch.equal(first, second)
    (torch.int64, torch.Size([2]), False)
    """
    return _mix64(_mixed_steps(seeds, step) + _signed((module + 1) * _MODULE))


class SeedTable:
    """The `layer_seeds` of every layer of one batch: mixed in one go where the clients' seeds are, and copied once to a device, without a wait.

    A layer takes its row. On a GPU that is no launch and no copy.
    """

    def __init__(self, seeds: Tensor, step: int | Tensor, modules: int) -> None:
        self._modules, self._clients = modules, len(seeds)
        self._made = self._mixed(seeds, step)
        self._placed: dict[torch.device, Tensor] = {}

    def _mixed(self, seeds: Tensor, step: int | Tensor) -> Tensor:
        places = torch.arange(1, self._modules + 1, dtype=torch.int64, device=seeds.device)[:, None]
        mixed = _mix64(_mixed_steps(seeds, step) + places * _signed(_MODULE))
        # Rows start at multiples of 16 bytes: where some did not, Triton would compile its kernels twice.
        return torch.nn.functional.pad(mixed, (0, len(seeds) % 2))

    def rewrite(self, seeds: Tensor, step: int | Tensor) -> None:
        """Another step's seeds in the same memory, which a recorded step reads."""
        mixed = self._mixed(seeds, step)
        for device, placed in self._placed.items():
            placed.copy_(uploaded("seeds", mixed, device))

    def place(self, device: torch.device) -> Tensor:
        """[modules, K or K + 1] on `device`."""
        if device not in self._placed:
            self._placed[device] = uploaded("seeds", self._made, device)
        return self._placed[device]

    def row(self, module: int, device: torch.device) -> KeptSeeds:
        """int64 [K] on `device`: the seeds of the layer at this position."""
        return KeptSeeds(self.place(device)[module, : self._clients])


def _mixed_steps(seeds: Tensor, step: int | Tensor) -> Tensor:
    return _mix64(seeds + torch.as_tensor(step, dtype=torch.int64, device=seeds.device) * _signed(0x9E3779B97F4A7C15))


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64 with wrap-around; `>>` made logical by masks."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))
