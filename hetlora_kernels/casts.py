"""Factors of a bank a second time, in the type of a 16-bit base: layers on a GPU multiply with them, and need not cast float32 factors in every call."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from hetlora_kernels.ops._lists import written


class Casts:
    """The copies of one bank. Whoever writes its factors either writes the copies too and says so (`in_step`), as the optimisers do, or else finds them made
    anew at a layer's next call: autograd counts what is written to a tensor. It does not count what is written through `.data`, so nothing may be.

    modules: the bank's names.   factors: its parameters, A of all modules and then Bt.   copies: like the factors, in their order.
    """

    def __init__(self, modules: Iterable[str], factors: Iterable[Tensor], dtype: torch.dtype) -> None:
        if dtype not in (torch.bfloat16, torch.float16):
            raise ValueError(f"cast: expected torch.bfloat16 or torch.float16, the base's type, got {dtype}")
        self.dtype = dtype
        self._factors = list(factors)
        self._places = {name: place for place, name in enumerate(modules)}
        self.copies = [factor.detach().to(dtype) for factor in self._factors]
        self._versions = [factor._version for factor in self._factors]

    def of(self, name: str) -> tuple[Tensor, Tensor]:
        """A and Bt of a module."""
        place = self._places[name]
        return self._fresh(place), self._fresh(place + len(self._places))

    def _fresh(self, place: int) -> Tensor:
        factor, copy = self._factors[place], self.copies[place]
        if factor._version != self._versions[place]:
            with torch.no_grad():
                copy.copy_(factor)
            self._versions[place] = factor._version
        return copy

    def current(self) -> list[Tensor]:
        return [self._fresh(place) for place in range(len(self.copies))]

    def in_step(self) -> None:
        """Factors and copies were written alike."""
        written(self.copies)
        self._versions = [factor._version for factor in self._factors]
