"""What the fuzzing draws, and the loop that counts its calls and says what to repeat when one fails."""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from kernel_cases import FLOATS, scattered
from torch import Tensor

SEED = int(os.environ.get("HETLORA_TEST_SEED", "0"))


class Draw(random.Random):
    """Random choices of one case; a torch generator beside, of the same seed."""

    def __init__(self, seed: str) -> None:
        super().__init__(seed)
        self.torch = torch.Generator().manual_seed(self.getrandbits(60))

    def rank(self) -> int:
        return self.choice([0, 0, 1, 1, 2, 3, 4, 5, 7, 8, 9, 13, 16, 17, 24, 32, 33, 40])

    def ranks(self, most: int = 6) -> list[int]:
        return [self.rank() for _ in range(self.randrange(most + 1))]

    def width(self) -> int:
        return self.choice([1, 2, 3, 5, 7, 8, 9, 15, 16, 17, 31, 33, 40, 64, 65])

    def dtype(self) -> torch.dtype:
        return self.choice(FLOATS)

    def normal(self, *shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
        """Gaussian, of a magnitude between 2^-6 and 2^6."""
        return (torch.randn(*shape, generator=self.torch, dtype=torch.float64) * 2.0 ** self.randint(-6, 6)).to(dtype)

    def lying(self, t: Tensor) -> Tensor:
        """The same values of a 2-D tensor in memory of some other form: strided, transposed, at an odd offset, with gaps between the rows, expanded."""
        rows, columns = t.shape
        form = self.randrange(6)
        if form == 0:
            return scattered(t)
        if form == 1:
            return t.t().contiguous().t()
        if form == 2:
            return torch.cat((t.new_full((1,), float("nan")), t.reshape(-1)))[1:].view(rows, columns)
        if form == 3:
            gaps = t.new_full((rows, columns + 3), float("nan"))
            gaps[:, 1 : 1 + columns] = t
            return gaps[:, 1 : 1 + columns]
        if form == 4:
            return torch.nn.Parameter(t.clone())
        return t.flip(0).contiguous().flip(0)


def repeat(case: Callable[[Draw], int], calls: int) -> None:
    """Cases of growing numbers until they have made `calls` calls; a failure names the one to repeat."""
    made = number = 0
    while made < calls:
        seed = f"{case.__name__} {SEED} {number}"
        try:
            made += case(Draw(seed))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__} in {case.__name__}(Draw({seed!r})): {error}") from error
        number += 1


def shares(calls: dict[Callable[[Draw], int], int]) -> list[Any]:
    """Parameters `case` and `calls` of a test: half of each case's calls in `make test`, all in `make matrix`."""
    half = [pytest.param(case, number // 2, id=case.__name__) for case, number in calls.items()]
    return half + [pytest.param(case, number, id=f"{case.__name__}, all", marks=pytest.mark.matrix) for case, number in calls.items()]


def refused(call: Callable[[], object], names: Sequence[str], what: str) -> None:
    """The call ends in an error that begins with one of `names`, and not in a result."""
    try:
        result = call()
    except (ValueError, TypeError, IndexError) as error:
        assert str(error).startswith(tuple(names)), f"{what}: no name of {names} begins the message {error}"
    else:
        raise AssertionError(f"{what}: accepted, got {type(result).__name__}")
