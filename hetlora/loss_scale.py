"""Loss scaling for a base in float16, whose small gradients would become zero on their way back through it."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

FIRST = 2.0**16


class LossScale:
    """The factor S of the loss in one client's or cohort's round; 1, and no work, where no weight of `model` is float16.

    Gradients are those of S times the loss, divided by S afterwards, which is exact as S is a power of two. S begins at 2^16. Where a gradient overflows though
    the loss is finite, S is halved and the step is made again, so that no step is left out; S does not grow within a round.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        self.value = FIRST if any(weight.dtype == torch.float16 for weight in model.parameters()) else 1.0

    def gradients(self, backward: Callable[[float], Tensor], trained: Sequence[Tensor], zero_grad: Callable[[], None]) -> Tensor:
        """What `backward` returns, the losses; the gradients of `trained` are then those of the loss itself.

        backward(S): adds the gradients of S times the loss.
        """
        while True:
            zero_grad()
            losses = backward(self.value)
            if self.value == 1:
                return losses
            found = [tensor.grad for tensor in trained if tensor.grad is not None]
            whole = torch.stack([gradient.isfinite().all() for gradient in found]) if found else torch.ones(1, dtype=torch.bool)
            if bool(losses.isfinite().all()) and not bool(whole.all()):
                self.value /= 2
                continue
            for gradient in found:
                gradient.div_(self.value)
            return losses
