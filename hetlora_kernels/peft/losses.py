"""A loss for each client of a mixed batch, from logits, or from hidden states and the head without ever holding the logits of a batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import cross_entropy, linear

from hetlora_kernels._torch import multiplies_fast
from hetlora_kernels.ops.cross_entropy import IGNORED, cross_entropy_
from hetlora_kernels.peft.head import Head
from hetlora_kernels.peft.ids import KnownClients, client_table
from hetlora_kernels.reference import compute_dtype

CHUNK = {"cpu": 1 << 24, "cuda": 1 << 26}
"""Logits that one chunk of rows holds at most, by device type: 64 and 256 MiB in float32. Other types: as 'cuda'."""
COUNTED = {"cpu"}
"""Device types where rows without a label are left out. Elsewhere counting them would wait for the device."""


def client_losses(
    states: Tensor,  # [batch, seq, vocab], or [batch, seq, d] with a head
    labels: Tensor,  # [batch, seq]
    ids: Sequence[int] | Tensor | KnownClients,  # [batch] or [batch, seq]
    num_clients: int,
    shift: bool = True,
    reduction: str = "mean",
    *,
    head: Head | None = None,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
) -> Tensor:
    """[K] loss of each client: the mean (or sum) over its own tokens of -log softmax(z)[label]; 0 for a client without tokens.

    states: logits z; with `head` the hidden states that it takes, z = head(states). Then logits are made for a chunk of rows at a time and no more are ever
        held, which is the larger part of a step's memory at a large vocabulary. The gradient of the states is made in the same pass. Rows without a label
        are left out on a CPU. `hidden_states` runs a model up to here.
    labels: token ids, -100 = ignored.   ids: client of each sequence or token, -1 = none (its tokens count for nobody).
    shift: True for causal models, the states at position t predict label t + 1.
    reduction: 'mean' over the client's tokens, or 'sum' (micro-batches divide by the step's own count).
    label_smoothing: e in [0, 1): the target is 1 - e for the label and e / V for each of the V words (Szegedy et al., arXiv 1512.00567).
    z_loss: c >= 0, adds c logsumexp(z)^2 to a token's loss (PaLM, arXiv 2204.02311).

    Differentiable, once. Losses are in float32 (float64 for float64). A non-finite loss of one client does not touch another's. Raises ValueError for shapes
    and values that do not fit, TypeError for a head that is no `Head`.

    >>> import torch
    >>> from hetlora_kernels.peft import Head, client_losses
    >>> labels = torch.randint(0, 7, (3, 5))
    >>> logits = torch.randn(3, 5, 7, requires_grad=True)
    >>> losses = client_losses(logits, labels, ids=[0, 1, 0], num_clients=2)
    >>> losses.shape
    torch.Size([2])
    >>> losses.sum().backward()  # each client gets the gradient of its own mean: never take one mean over the batch
    >>> hidden, weight = torch.randn(3, 5, 4, requires_grad=True), torch.randn(7, 4)
    >>> client_losses(hidden, labels, ids=[0, 1, 0], num_clients=2, head=Head(weight)).sum().backward()
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing: expected a number from 0 to below 1, got {label_smoothing!r}")
    if not 0 <= z_loss < float("inf"):
        raise ValueError(f"z_loss: expected a finite number >= 0, got {z_loss!r}")
    if head is not None and not isinstance(head, Head):
        raise TypeError(f"head: expected a Head, got {type(head).__name__}; Head(linear.weight, linear.bias) makes one, hidden_states(model) a model's own")
    name, last = ("logits", "vocab") if head is None else ("states", "d")
    if states.dim() != 3 or tuple(labels.shape) != tuple(states.shape[:2]):
        raise ValueError(f"labels: expected shape {tuple(states.shape[:2])} as {name} [batch, seq, {last}], got {tuple(labels.shape)}")
    if head is not None and states.shape[-1] != head.weight.shape[-1]:
        raise ValueError(f"states: expected {head.weight.shape[-1]} columns as the head's weight {tuple(head.weight.shape)}, got {states.shape[-1]}")
    table = client_table(ids, num_clients).to(states.device)
    if table.shape[0] != labels.shape[0] or (table.dim() == 2 and table.shape != labels.shape):
        raise ValueError(f"ids: expected shape ({labels.shape[0]},) or {tuple(labels.shape)}, got {tuple(table.shape)}")
    table = table[:, None].expand(labels.shape) if table.dim() == 1 else table
    if shift:
        states, labels, table = states[:, :-1], labels[:, 1:], table[:, 1:]
    targets, extras = labels.reshape(-1), (label_smoothing, z_loss)
    counted = table.reshape(-1).masked_fill(targets == IGNORED, -1)  # takes its number as an argument, which torch.where would copy to a GPU
    rows = states.reshape(-1, states.shape[-1])
    losses = _from_logits(rows, targets, *extras) if head is None else _from_states(rows, targets.masked_fill(counted < 0, IGNORED), head, extras)
    own = counted[None, :] == torch.arange(num_clients, device=states.device)[:, None]
    sums = losses[None, :].expand(own.shape).masked_fill(~own, 0.0).sum(1)
    return sums if reduction == "sum" else sums / own.sum(1).clamp_min(1)


def _from_logits(logits: Tensor, targets: Tensor, smoothing: float, z_loss: float) -> Tensor:
    """[T] losses of rows of logits, 0 for ignored ones."""
    logits = logits.to(compute_dtype(logits.dtype))
    losses = cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none", label_smoothing=smoothing)
    return losses + z_loss * logits.logsumexp(1).square().masked_fill(targets == IGNORED, 0.0) if z_loss else losses


def _from_states(states: Tensor, targets: Tensor, head: Head, extras: tuple[float, float]) -> Tensor:
    """The same of hidden states [T, d]."""
    device = states.device.type
    if torch.is_autocast_enabled(device):  # what a Linear would do
        dtype = torch.get_autocast_dtype(device)
        states, head = states.to(dtype), head._replace(weight=head.weight.to(dtype), bias=None if head.bias is None else head.bias.to(dtype))
    if states.dtype != head.weight.dtype:
        raise ValueError(f"states: expected the dtype of the head's weight, {head.weight.dtype}, got {states.dtype}")
    with torch.autocast(device, enabled=False):
        return _StatesLoss.apply(states, head.weight, head.bias, targets, head.scale, head.softcap, extras)


class _StatesLoss(torch.autograd.Function):
    """Losses [T] of rows of states. For a loss l_t of row t alone, d l_t / d h_t needs no upstream gradient g_t but as a factor: it is made with the loss."""

    @staticmethod
    def forward(
        ctx: Any, states: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, scale: float, softcap: float, extras: tuple[float, float]
    ) -> Tensor:
        options: dict[str, Any] = {"scale": scale, "softcap": softcap, "label_smoothing": extras[0], "z_loss": extras[1]}
        kept = (targets != IGNORED).nonzero()[:, 0] if states.device.type in COUNTED else None
        rows, labels = (states, targets) if kept is None else (states[kept], targets[kept])
        losses = rows.new_empty(len(rows), dtype=compute_dtype(states.dtype))
        slopes = torch.empty_like(rows) if ctx.needs_input_grad[0] else None
        for part in _chunks(rows, weight):
            logits = _linear(rows[part], weight, bias)
            losses[part] = cross_entropy_(logits, labels[part], slopes=slopes is not None, **options)
            if slopes is not None:
                _times(logits, weight, slopes[part])
            del logits  # before the next chunk's are made
        ctx.save_for_backward(states, weight, bias, targets, kept, slopes)
        ctx.options = options
        return losses if kept is None else losses.new_zeros(len(states)).index_copy_(0, kept, losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        with torch.autocast(grad.device.type, enabled=False):  # as forward: it may be on where backward is called
            return (*_gradients(ctx, grad), None, None, None, None)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    """Of the states, the weight and the bias; None where none is asked for."""
    states, weight, bias, targets, kept, slopes = ctx.saved_tensors
    rows, labels, grads = (states, targets, grad) if kept is None else (states[kept], targets[kept], grad[kept])
    d_states = d_weight = d_bias = None
    if slopes is not None:
        d_states = (slopes * grads[:, None]).to(states.dtype)  # the product in the losses' type
        d_states = d_states if kept is None else torch.zeros_like(states).index_copy_(0, kept, d_states)
    if any(ctx.needs_input_grad[1:3]):
        dtype = grads.dtype
        d_weight, d_bias = torch.zeros(weight.shape, dtype=dtype, device=weight.device), torch.zeros(len(weight), dtype=dtype, device=weight.device)
        for part in _chunks(rows, weight):
            slope, own = _linear(rows[part], weight, bias), rows[part]
            if ctx.needs_input_grad[2]:
                slope = slope.to(dtype)  # for a sum over rows, of slopes that are not rounded
            cross_entropy_(slope, labels[part], grads[part], **ctx.options)
            if ctx.needs_input_grad[2]:
                d_bias += slope.sum(0)
            if kept is None:  # nothing of nobody's rows: 0 times a NaN of theirs is no 0
                own = own.masked_fill((labels[part] == IGNORED)[:, None], 0.0)
            d_weight += _product_of_rows(slope.to(rows.dtype), own).to(dtype)
        d_weight = d_weight.to(weight.dtype)
        d_bias = None if bias is None else d_bias.to(bias.dtype)
    return d_states, d_weight, d_bias


def _chunks(rows: Tensor, weight: Tensor) -> Iterator[slice]:
    size = max(1, CHUNK.get(rows.device.type, CHUNK["cuda"]) // len(weight))
    return (slice(start, start + size) for start in range(0, len(rows), size))


PART = 1 << 18
"""Elements of a 16-bit weight that are converted at a time: 1 MiB in float32, which stays in a core's L2 cache until the product has read it."""


def _parts(weight: Tensor) -> Iterator[slice]:
    size = max(1, PART // max(1, weight.shape[1]))
    return (slice(start, start + size) for start in range(0, len(weight), size))


def _linear(rows: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """rows weight^T + bias. Where torch multiplies a 16-bit type slowly: in float32, rounded once."""
    if multiplies_fast(rows.dtype, rows.device.type):
        return linear(rows, weight, bias)
    out, wide = rows.new_empty(len(rows), len(weight)), rows.float()
    for part in _parts(weight):
        out[:, part] = linear(wide, weight[part].float(), None if bias is None else bias[part].float())
    return out


def _times(left: Tensor, weight: Tensor, out: Tensor) -> None:
    """out = left weight, in the same way."""
    if multiplies_fast(left.dtype, left.device.type):
        torch.mm(left, weight, out=out)
        return
    sums = torch.zeros(out.shape, dtype=torch.float32, device=out.device)
    for part in _parts(weight):
        sums.addmm_(left[:, part].float(), weight[part].float())
    out.copy_(sums)


def _product_of_rows(left: Tensor, right: Tensor) -> Tensor:
    """left^T right, in the same way."""
    return left.t() @ right if multiplies_fast(left.dtype, left.device.type) else left.t().float() @ right.float()
