"""`client_losses` by hand, and what it refuses."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import drawn

from hetlora_kernels.peft import client_losses


@pytest.mark.parametrize("shift", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("per_token", [False, True])
def test_client_losses_by_hand(shift, reduction, per_token, device):
    g = drawn(0)
    logits = torch.randn(4, 5, 7, generator=g, dtype=torch.float64).to(device).requires_grad_()
    labels = torch.randint(0, 7, (4, 5), generator=g)
    labels[0, 3:], labels[1] = -100, -100  # sequence 1, all of client 1's tokens, counts for nothing
    ids = torch.tensor([0, 1, 3, 0])
    if per_token:
        ids = ids[:, None].repeat(1, 5)
        ids[0, 2:], ids[3, 0] = -1, 3
    losses = client_losses(logits, labels.to(device), ids, 4, shift=shift, reduction=reduction)
    log_probabilities = logits.detach().cpu().log_softmax(-1)
    sums, counts = [0.0] * 4, [0] * 4
    for i in range(4):
        for t in range(5):
            at = t - 1 if shift else t
            owner = int(ids[i, t]) if per_token else int(ids[i])
            if at >= 0 and labels[i, t] != -100 and owner >= 0:
                sums[owner] -= log_probabilities[i, at, labels[i, t]].item()
                counts[owner] += 1
    expected = [s / max(c, 1) if reduction == "mean" else s for s, c in zip(sums, counts, strict=True)]
    assert losses.tolist() == pytest.approx(expected) and losses[1] == 0 == losses[2]
    losses.sum().backward()
    assert bool((logits.grad[1] == 0).all()) and bool(logits.grad[2].any())
    half = client_losses(logits.detach().bfloat16(), labels.to(device), ids, 4)
    assert half.dtype == torch.float32 and losses.dtype == torch.float64


LOGITS, LABELS = torch.zeros(2, 4, 5), torch.zeros(2, 4, dtype=torch.int64)
BAD_LOSSES = [
    (lambda: client_losses(LOGITS, LABELS[:, :3], [0, 1], 2), ValueError, r"^labels: expected shape \(2, 4\).*\(2, 3\)"),
    (lambda: client_losses(LOGITS[0], LABELS, [0, 1], 2), ValueError, r"^labels: "),
    (lambda: client_losses(LOGITS, LABELS, [0], 2), ValueError, r"^ids: expected shape \(2,\) or \(2, 4\), got \(1,\)"),
    (lambda: client_losses(LOGITS, LABELS, [[0, 1]] * 2, 2), ValueError, r"^ids: .*\(2, 2\)"),
    (lambda: client_losses(LOGITS, LABELS, 0, 2), ValueError, r"^ids: .*\(\)"),
    (lambda: client_losses(LOGITS, LABELS, [0.0, 1.0], 2), TypeError, r"^ids: expected integers"),
    (lambda: client_losses(LOGITS, LABELS, [0, 2], 2), ValueError, r"^ids: .*below 2, got values 0 \.\. 2"),
    (lambda: client_losses(LOGITS, LABELS, [0, 1], 2, reduction="none"), ValueError, r"^reduction: "),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD_LOSSES)
def test_client_losses_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
