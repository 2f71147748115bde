"""Who takes part in a run: nodes come and go, and may have other numbers when they come back; clients are known by their names."""

from __future__ import annotations

import json
import math
import time
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from hetlora import __version__, run_folder
from hetlora.deployed import messages
from hetlora.deployed.local import Base
from hetlora.deployed.messages import Content
from hetlora.deployed.settings import Waiting
from hetlora.errors import ConfigError
from hetlora.ranks import Capability, Device, RankRule

Node = int | str
"""What an engine calls a node."""

ROSTER = "clients.json"
"""The clients of the run, in its folder: those that had joined when it began."""


@dataclass
class Member:
    """A client of the run.   node: where it is reached now; None while it is away."""

    name: str
    sequences: int
    capability: float | None
    device: Device | None = None
    node: Node | None = None


class Members(ABC):
    """The clients of a run.   rule: of their ranks.   folder: of the run.   say: receives a line for the user."""

    def __init__(self, base: Base, rule: RankRule, waiting: Waiting, folder: Path, say: Callable[[str], None]) -> None:
        self.base, self.rule, self.waiting, self.roster, self.say = base, rule, waiting, folder / ROSTER, say
        self.of: dict[str, Member] = {}
        self._bases: dict[str, str] = {}

    @abstractmethod
    def _look(self, new: bool) -> list[str]:
        """Names of the clients that are connected, sorted. Nodes that were not known are asked who they are, and `meet`; of those that left, `node` is None.

        new: clients that are not on record may join.
        """

    def gather(self) -> list[str]:
        """Names of the run's clients, when enough have joined: as many as `min_clients`; where the run goes on, its clients are those on record."""
        new = not self.waiting.resume
        if not new:
            self._read_roster()
        least = self.waiting.min_clients if new else min(self.waiting.min_clients, len(self.of))
        self._wait(least, f"of {least} clients joined", new)
        self._one_base()
        return sorted(self.of)

    def present(self, least: int = 1) -> list[str]:
        """Names of the clients that are connected; waits where these are fewer than `least`."""
        return self._wait(least, f"of {least} clients were connected", False)

    def node(self, name: str) -> Any:
        node = self.of[name].node
        assert node is not None, name
        return node

    def _wait(self, least: int, what: str, new: bool) -> list[str]:
        deadline = time.monotonic() + self.waiting.join_timeout
        while len(found := self._look(new)) < least:
            if time.monotonic() > deadline:
                raise ConfigError(
                    f"{len(found)} {what} within {self.waiting.join_timeout:g} s ({', '.join(found) or 'none'}); "
                    "start more nodes, lower min-clients or raise join-timeout"
                )
            time.sleep(POLL)
        return found

    def meet(self, node: Node, answer: Content, new: bool) -> None:
        """Take what a node says of itself; `ConfigError` where its client can take no part."""
        own = messages.introduction(answer)
        if own.version != __version__:
            raise ConfigError(f"client {own.client!r} runs hetlora {own.version}, the server {__version__}; install the same")
        if own.modules != self.base.modules:
            raise ConfigError(f"client {own.client!r} has other target modules than {self.base.name!r} has; give it the same model and target_modules")
        member = self.of.get(own.client)
        if member is None:
            if not new:
                raise ConfigError(f"client {own.client!r} joined after the run had begun; it can take part in the next one")
            if math.isinf(own.capability):
                raise ConfigError(f"client {own.client!r} says capability = {own.capability}; expected a finite number, or none")
            capability = None if math.isnan(own.capability) else own.capability
            member = Member(own.client, own.sequences, capability, node=node)
            if isinstance(self.rule, Capability):
                member.device = _device(own, self.rule)
                self.rule.check(member)
            self.of[own.client] = member
        else:
            if member.node is not None:
                raise ConfigError(f"client {own.client!r} is already there as node {member.node}; give every client a name of its own")
            if (before := self._bases.get(own.client, own.base)) != own.base:
                raise ConfigError(f"client {own.client!r} came back with another base model ({own.base[:8]}, it had {before[:8]})")
            member.node = node
            self.say(f"client {own.client!r} is back, as node {node}")
        self._bases[own.client] = own.base

    def _one_base(self) -> None:
        """Every client computes on the same base; adapters trained on different ones have no sum that means anything."""
        bases = Counter(self._bases.values())
        if len(bases) > 1:
            usual = bases.most_common(1)[0][0]
            odd = sorted(name for name, base in self._bases.items() if base != usual)
            raise ConfigError(f"{len(odd)} of {len(self._bases)} clients hold another base model than the others: {odd[:5]}; give all the same model")

    # ---------------------------------------------------------------- on record

    def write_roster(self) -> None:
        """Once, when the run's folder is there."""
        if not self.roster.exists():
            clients = [{name: value for name, value in asdict(own).items() if name != "node"} for _, own in sorted(self.of.items())]
            run_folder.write_atomic(self.roster, json.dumps({"clients": clients}, indent=2) + "\n")

    def _read_roster(self) -> None:
        problems: list[str] = []
        found = run_folder.read_json(self.roster, problems)
        try:
            self.of = {own["name"]: _member(own) for own in (found or {})["clients"]}
        except (KeyError, TypeError, ValueError):
            raise ConfigError(f"{self.roster}: not the list of the run's clients; restore it from a copy, or start a new run") from None


def _device(own: messages.Introduction, rule: Capability) -> Device | None:
    """What a client says of its device: no rank above MAX counts."""
    if own.unmeasured:
        raise ConfigError(f"client {own.client!r} cannot be given a rank: {own.unmeasured}")
    return Device(min(own.device_rank, rule.high), own.step_seconds) if own.device_rank else None


def _member(own: dict[str, Any]) -> Member:
    measured = own.get("device")
    return Member(own["name"], int(own["sequences"]), own["capability"], Device(int(measured["rank"]), float(measured["seconds"])) if measured else None)


POLL = 1.0
"""Seconds between two looks at who is connected."""
