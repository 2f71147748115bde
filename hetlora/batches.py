"""From the sequences of a step to what the model is called with: padded in rows of their own, or packed, several to a row."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from hetlora.data import token_ids

IGNORED = -100  # label of positions that are not predicted
NOBODY = -1  # client of padding in packed rows

Rows = Sequence[tuple[int, int, Tensor]]  # (client, position in its step batch, sequence)


@dataclass(frozen=True)
class Batching:
    """How the sequences of a step become rows.

    name: 'padded': one to a row, in order. 'sorted': the same, by length where a step is several batches. 'packed': several to a row as long as the step's
    longest sequence, or, with `one_row`, all of a batch in one row (for attention that is told where sequences end, and needs no mask).
    reason: why this one, for the reader of a run's first lines.
    """

    name: Literal["padded", "sorted", "packed"]
    reason: str = ""
    one_row: bool = False

    def __str__(self) -> str:
        return f"{self.name}; {self.reason}"


PADDED = Batching("padded")


@dataclass(frozen=True)
class Batch:
    """What one forward and backward is over.

    ids, labels: int64 [rows, length].   owner: client of each row, [rows], or of each token, [rows, length], `NOBODY` for padding.   index: each sequence's
    position in its client's step batch, shaped as `owner`.   positions: [rows, length], each token's place in its sequence; None: a sequence is a row.
    """

    ids: Tensor
    labels: Tensor
    owner: Tensor
    index: Tensor
    positions: Tensor | None = None


def collate(sequences: Sequence[Tensor], device: torch.device, least: int = 0) -> tuple[Tensor, Tensor]:
    """(input ids, labels), right-padded to the longest, or to `least` tokens; a causal model needs no attention mask: no token looks to its right.

    Labels of tokens that are not predicted (`data.ClientData`) are `IGNORED`.
    """
    length = max(least, *(len(s) for s in sequences))
    ids = torch.zeros(len(sequences), length, dtype=torch.int64)
    labels = torch.full((len(sequences), length), IGNORED, dtype=torch.int64)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = token_ids(sequence)
        labels[row, : len(sequence)] = sequence.where(sequence >= 0, IGNORED)
    return ids.to(device), labels.to(device)


def micro_batches(lengths: Sequence[int], max_tokens: int) -> Iterator[slice]:
    """Split sequences of these lengths, in order, so that each part has at most `max_tokens` with its padding (one sequence at the least)."""
    start, longest = 0, 0
    for end, length in enumerate(lengths):
        longest = max(longest, length)
        if end > start and longest * (end + 1 - start) > max_tokens:
            yield slice(start, end)
            start, longest = end, length
    yield slice(start, len(lengths))


def fill_rows(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Rows of at most `room` tokens, each a list of places in `lengths`: best fit, the longest first; none of `lengths` is above `room`.

    Within a row places rise, and rows are in the order of their first places, so that a client's sequences stay near each other.

    >>> fill_rows([3, 8, 5, 2, 6], 8)
    [[0, 2], [1], [3, 4]]
    """
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []  # (room left, row), sorted
    for place in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        at = bisect_left(free, (lengths[place], -1))
        if at < len(free):
            left, row = free.pop(at)
        else:
            left, row = room, len(rows)
            rows.append([])
        rows[row].append(place)
        insort(free, (left - lengths[place], row))
    return sorted(sorted(row) for row in rows)


def batches(rows: Rows, max_tokens: int, device: torch.device, batching: Batching = PADDED) -> Iterator[Batch]:
    """The batches of one step, of at most `max_tokens` each with padding (one sequence at the least). Their gradients add up to the step's."""
    lengths = [len(sequence) for _, _, sequence in rows]
    if batching.name == "packed":
        room = max(max_tokens, *lengths) if batching.one_row else max(lengths)
        filled = fill_rows(lengths, room)
        if len(filled) < len(rows):
            together = 1 if batching.one_row else max(1, max_tokens // room)
            for start in range(0, len(filled), together):
                yield _packed([[rows[i] for i in row] for row in filled[start : start + together]], device)
            return
    if batching.name != "padded" and max(lengths) * len(rows) > max_tokens:
        rows = sorted(rows, key=lambda row: -len(row[2]))
        lengths = sorted(lengths, reverse=True)
    for part in micro_batches(lengths, max_tokens):
        ids, labels = collate([sequence for _, _, sequence in rows[part]], device)
        owner, index = (torch.tensor([row[at] for row in rows[part]], dtype=torch.int64) for at in (0, 1))
        yield Batch(ids, labels, owner, index)


def _packed(rows: Sequence[Rows], device: torch.device) -> Batch:
    """Rows of several sequences. What pads a row is a sequence of its own to the model, and nobody's."""
    length = max(sum(len(sequence) for _, _, sequence in row) for row in rows)
    shape = (len(rows), length)
    ids, index, positions = (torch.zeros(shape, dtype=torch.int64) for _ in range(3))
    labels, owner = torch.full(shape, IGNORED, dtype=torch.int64), torch.full(shape, NOBODY, dtype=torch.int64)
    for number, row in enumerate(rows):
        start = 0
        for client, place, sequence in row:
            own = number, slice(start, start + len(sequence))
            ids[own], owner[own], index[own], positions[own] = token_ids(sequence), client, place, torch.arange(len(sequence))
            labels[own] = sequence.where(sequence >= 0, IGNORED)
            labels[number, start] = IGNORED  # the token before it is another sequence's
            start += len(sequence)
        positions[number, start:] = torch.arange(length - start)
    return Batch(ids.to(device), labels.to(device), owner, index, positions.to(device))
