"""A loss for each client of a mixed batch."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from hetlora_kernels.peft.batch import client_table


def client_losses(
    logits: Tensor,  # [batch, seq, vocab]
    labels: Tensor,  # [batch, seq]
    ids: Sequence[int] | Tensor,  # [batch] or [batch, seq]
    num_clients: int,
    shift: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """[K] loss of each client: the mean (or sum) over its own tokens of -log softmax(logits)[label]; 0 for a client without tokens.

    labels: token ids, -100 = ignored.   ids: client of each sequence or token, -1 = none (its tokens count for nobody).
    shift: True for causal models, the logits at position t predict label t + 1.
    reduction: 'mean' over the client's tokens, or 'sum' (micro-batches divide by the step's own count).

    Differentiable. In float32 (float64 for float64). A non-finite loss of one client does not touch another's.

    >>> import torch
    >>> from hetlora_kernels.peft import client_losses
    >>> logits, labels = torch.randn(3, 5, 7, requires_grad=True), torch.randint(0, 7, (3, 5))
    >>> losses = client_losses(logits, labels, ids=[0, 1, 0], num_clients=2)
    >>> losses.shape
    torch.Size([2])
    >>> losses.sum().backward()  # each client gets the gradient of its own mean: never take one mean over the batch
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if logits.dim() != 3 or tuple(labels.shape) != tuple(logits.shape[:2]):
        raise ValueError(f"labels: expected shape {tuple(logits.shape[:2])} as logits [batch, seq, vocab], got {tuple(labels.shape)}")
    table = client_table(ids, num_clients).to(logits.device)
    if table.shape[0] != labels.shape[0] or (table.dim() == 2 and table.shape != labels.shape):
        raise ValueError(f"ids: expected shape ({labels.shape[0]},) or {tuple(labels.shape)}, got {tuple(table.shape)}")
    table = table[:, None].expand(labels.shape) if table.dim() == 1 else table
    if shift:
        logits, labels, table = logits[:, :-1], labels[:, 1:], table[:, 1:]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).to(dtype), labels.reshape(-1), ignore_index=-100, reduction="none")
    counted = torch.where(labels.reshape(-1) == -100, -1, table.reshape(-1))
    own = counted[None, :] == torch.arange(num_clients, device=logits.device)[:, None]
    sums = torch.where(own, losses[None, :], 0.0).sum(1)
    return sums if reduction == "sum" else sums / own.sum(1).clamp_min(1)
