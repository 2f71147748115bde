"""Perplexity on held-out text: of the global adapter, and of each client with the rank rows it would receive."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.batches import collate, micro_batches
from hetlora.client import token_losses
from hetlora.data import ClientData, predicted
from hetlora.ranks import ClientRanks, bank_ranks
from hetlora_kernels.peft import attach, client_segments, detach

Progress = Callable[[int, int], None]
Part = Literal["test", "train"]
T = TypeVar("T")
CLIENTS_AT_ONCE = 32  # banks of this many clients keep evaluation memory flat however many clients a federation has


class Whole:
    """Who does which part of an evaluation: this process all of them. `spread.Shared` deals them out; its numbers are the same to the bit."""

    def mine(self, costs: Sequence[float]) -> list[int]:
        """Positions of the parts that this process does; costs: of each part."""
        return list(range(len(costs)))

    def gathered(self, own: dict[int, T]) -> list[T]:
        """What all parts gave, in their order.   own: {position: what it gave}, of `mine`."""
        return [own[position] for position in sorted(own)]


WHOLE = Whole()


def pool_text(clients: Sequence[ClientData], max_tokens: int, part: Part = "test") -> list[Tensor]:
    """Held-out (or training) sequences of all clients, one of each in turn, until `max_tokens` (0 = all): a sample that no large client dominates."""
    pooled: list[Tensor] = []
    total = 0
    own = [getattr(client, part) for client in clients]
    for turn in range(max(map(len, own), default=0)):
        for sequences in own:
            if turn < len(sequences):
                if max_tokens and pooled and total + len(sequences[turn]) > max_tokens:
                    return pooled
                pooled.append(sequences[turn])
                total += len(sequences[turn])
    return pooled


@torch.no_grad()
def _token_losses(
    model: torch.nn.Module,
    bank: hk.AdapterBank,
    owned: Sequence[tuple[int, Tensor]],
    scale: float,
    max_tokens: int,
    progress: Progress | None,
    split: Whole,
) -> tuple[Tensor, list[int]]:
    """(summed loss [K] float64, predicted tokens [K]); owned: (client of the bank, sequence). Batches are summed in their order, whoever did them."""
    slots = bank.num_clients
    parts = list(micro_batches([len(s) for _, s in owned], max_tokens))
    mine = split.mine([sum(len(s) for _, s in owned[part]) for part in parts])
    own: dict[int, Tensor] = {}
    attach(model, bank, scale=scale)
    try:
        for done, number in enumerate(mine):
            part = parts[number]
            ids, labels = collate([s for _, s in owned[part]], bank.device)
            owner = torch.tensor([k for k, _ in owned[part]], dtype=torch.int64)
            with client_segments(model, owner):
                own[number] = token_losses(model, ids, labels, owner, slots).double().cpu()
            if progress:
                progress(done + 1, len(mine))
    finally:
        detach(model)
    counts = [0] * slots
    for k, sequence in owned:
        counts[k] += predicted(sequence)
    return sum(split.gathered(own), torch.zeros(slots, dtype=torch.float64)), counts


def evaluation(loss_sum: float, tokens: int) -> dict[str, Any]:
    """{"loss" (mean, nats per token), "perplexity", "tokens"} of summed losses."""
    loss = loss_sum / tokens if tokens else float("nan")
    return {"loss": loss, "perplexity": math.exp(loss) if loss < 700 else math.inf, "tokens": tokens}


def evaluate_bank(
    model: torch.nn.Module,
    bank: hk.AdapterBank,
    sequences: Sequence[Tensor],
    scale: float,
    max_tokens: int,
    progress: Progress | None = None,
    split: Whole = WHOLE,
) -> dict[str, Any] | None:
    """{"loss" (nats per token), "perplexity", "tokens"} of a bank of one client on `sequences`; None when there are none."""
    if not sequences:
        return None
    sums, counts = _token_losses(model, bank, [(0, s) for s in sequences], scale, max_tokens, progress, split)
    return evaluation(float(sums[0]), counts[0])


def evaluate_clients(
    model: torch.nn.Module,
    bank: hk.AdapterBank,
    ranks: Sequence[ClientRanks],
    clients: Sequence[ClientData],
    scale: float,
    max_tokens: int,
    tokens_per_client: int = 0,
    progress: Progress | None = None,
    part: Part = "test",
    split: Whole = WHOLE,
) -> list[dict[str, Any]]:
    """Each client's own held-out (or training) text under the leading rows of `bank` that its rank gives it, many clients in one batch."""
    results: list[dict[str, Any]] = []
    for start in range(0, len(clients), CLIENTS_AT_ONCE):
        group = clients[start : start + CLIENTS_AT_ONCE]
        own = bank.truncate(bank_ranks(list(ranks[start : start + CLIENTS_AT_ONCE]), bank.shapes))
        owned = [(k, s) for k, client in enumerate(group) for s in pool_text([client], tokens_per_client, part)]
        sums, counts = _token_losses(model, own, owned, scale, max_tokens, None, split)
        results += [evaluation(float(total), count) for total, count in zip(sums, counts, strict=True)]
        if progress:
            progress(len(results), len(clients))
    return results


def mean_over_clients(results: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Mean of the clients' losses and of their perplexities (each client counts once), the tokens of all, and every client's loss."""
    count = len(results)
    sums = {key: sum(result[key] for result in results) for key in ("loss", "perplexity", "tokens")}
    losses = [round(result["loss"], 5) for result in results]
    return {"loss": sums["loss"] / count, "perplexity": sums["perplexity"] / count, "tokens": sums["tokens"], "losses": losses}
