"""Losses of rows of logits, which their own gradients replace: the loss of a language model for a chunk of its tokens at a time."""

from __future__ import annotations

import torch
from torch import Tensor

from hetlora_kernels._library import call, register_fake
from hetlora_kernels.ops._lists import FLOATS
from hetlora_kernels.reference import compute_dtype

IGNORED = -100
"""The label of a row that has no loss."""


def cross_entropy_(
    logits: Tensor,  # [T, V]
    labels: Tensor,  # [T]
    weights: Tensor | None = None,  # [T]
    *,
    scale: float = 1.0,
    softcap: float = 0.0,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    slopes: bool = True,
) -> Tensor:
    """l_t = L_t - (1 - e) z_t[label_t] - e mean z_t + z_loss L_t^2 with L_t = logsumexp(z_t), e = label_smoothing;  then x_t <- weights_t d l_t / d x_t.

    logits: x, of any floating-point type, contiguous. With a softcap c > 0 z = c tanh(scale x / c), without one (0) z = scale x.
    labels: int64, a word or -100: no loss, and slopes of zero, whatever the row holds.   weights: default 1. They are not part of the losses.
    slopes: False leaves the logits as they are.

    Returns l [T] in float32 (float64 for float64), the type of the arithmetic; slopes are rounded once to the logits' type. A row depends on itself alone.
    A row with a NaN, +inf or nothing above -inf has the loss NaN, as `torch.nn.functional.cross_entropy` has it; some of -inf are words that never come.
    A label that is no word: `RuntimeError` on a CPU, NaN in its loss and slopes on a GPU. `ValueError` for shapes, types and, as nothing is recorded
    for autograd, for logits that require grad where grad is enabled.

    >>> import torch
    >>> from hetlora_kernels.ops.cross_entropy import cross_entropy_
    >>> logits = torch.zeros(1, 4)
    >>> cross_entropy_(logits, torch.tensor([1])), logits
    (tensor([1.3863]), tensor([[ 0.2500, -0.7500,  0.2500,  0.2500]]))
    """
    if logits.dim() != 2 or logits.dtype not in FLOATS or not logits.is_contiguous():
        raise ValueError(f"logits: expected contiguous [T, V] of floating-point numbers, got {logits.dtype} {tuple(logits.shape)}, strides {logits.stride()}")
    if logits.requires_grad and torch.is_grad_enabled():
        raise ValueError("logits: expected none that require grad, as slopes take their place and nothing is recorded; detach them or use torch.no_grad()")
    for name, tensor, dtype in (("labels", labels, torch.int64), ("weights", weights, compute_dtype(logits.dtype))):
        if tensor is not None and (tensor.dtype != dtype or tensor.shape != logits.shape[:1] or tensor.device != logits.device):
            expected = f"{dtype} ({len(logits)},) on {logits.device}"
            raise ValueError(f"{name}: expected {expected}, got {tensor.dtype} {tuple(tensor.shape)} on {tensor.device}")
    given = None if weights is None else weights.contiguous()
    losses: Tensor = call("cross_entropy_")(logits, labels.contiguous(), given, scale, softcap, label_smoothing, z_loss, slopes)
    return losses


@register_fake("cross_entropy_")
def _(logits, labels, weights, scale, softcap, smoothing, z_loss, slopes):
    return logits.new_empty(len(logits), dtype=compute_dtype(logits.dtype))
