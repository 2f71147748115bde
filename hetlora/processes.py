"""Which of the processes of one run this one is, as torchrun says in the environment. No torch here."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from hetlora.errors import ConfigError

_NAMES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


@dataclass(frozen=True)
class Place:
    """This process among those of the run, and among those of the run on this machine. Number 0 leads: it alone reads settings, speaks and writes."""

    number: int = 0
    count: int = 1
    number_here: int = 0
    count_here: int = 1

    @property
    def follows(self) -> bool:
        return self.number > 0


def place() -> Place:
    """As torchrun started this process; alone where it did not. `ConfigError` for numbers that name no place."""
    if any(name not in os.environ for name in (*_NAMES, "MASTER_ADDR", "MASTER_PORT")):
        return Place()
    texts = {name: os.environ[name] for name in _NAMES}
    try:
        found = Place(*(int(text) for text in texts.values()))
    except ValueError:
        found = Place(count=0)
    if not (0 <= found.number < found.count and 0 <= found.number_here < found.count_here <= found.count):
        shown = ", ".join(f"{name}={text}" for name, text in texts.items())
        raise ConfigError(f"environment: expected the place of this process as torchrun gives it, got {shown}; start it with torchrun, or unset them")
    return found


def only_run(command: str | None) -> None:
    """`ConfigError` where `command` was started as several processes and cannot share its work."""
    count = place().count
    if count > 1 and command in ("demo", "compare"):
        raise ConfigError(f"{command}: torchrun started {count} processes, and only 'hetlora run' shares its work between them; start it without torchrun")


def deal(costs: Sequence[float], count: int) -> list[list[int]]:
    """The positions of `costs`, dealt out so that the `count` shares cost about the same: the dearest first, each to the share that has cost least so far.

    Equal ones in their order; each share is in ascending order, and the same wherever it is worked out.

    >>> deal([5, 9, 1, 4], 2)
    [[1, 2], [0, 3]]
    """
    shares: list[list[int]] = [[] for _ in range(count)]
    spent = [0.0] * count
    for position in sorted(range(len(costs)), key=lambda k: -costs[k]):
        least = spent.index(min(spent))
        shares[least].append(position)
        spent[least] += costs[position]
    return [sorted(share) for share in shares]
