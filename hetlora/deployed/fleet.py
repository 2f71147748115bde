"""Clients that are processes of their own, as `hetlora.fleet.Fleet`: what is the same whichever engine carries the messages."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

import torch

import hetlora_kernels as hk
from hetlora import server
from hetlora.client import LocalResult
from hetlora.config import Config, ConfigError
from hetlora.deployed import messages
from hetlora.deployed.exchange import Exchange, Order, Reply
from hetlora.deployed.local import Base
from hetlora.deployed.members import Members
from hetlora.deployed.wire import size
from hetlora.evaluate import evaluation, mean_over_clients
from hetlora.fleet import Progress
from hetlora.ranks import Capability, Device, StartingRanks
from hetlora.server import ServerState
from hetlora.training import Trained


@dataclass
class Turn:
    """What the loop asked for."""

    state: ServerState
    names: list[str]
    number: int
    lr: float

    def order(self, name: str) -> Order:
        state, everyone = self.state, list(self.state.ranks)
        fleet = [max(state.ranks[other].values()) for other in everyone]
        return Order(name, self.number, self.lr, list(state.ranks[name].values()), state.r_min, state.r_max, fleet, everyone.index(name))

    def whole(self) -> ServerState:
        """The state, as if every client had the whole bank: for an evaluation."""
        return replace(self.state, ranks={name: dict.fromkeys(self.state.bank.shapes, self.state.r_max) for name in self.names})


def read_reply(cfg: Config, exchange: Exchange, turn: Turn, name: str, content: messages.Content) -> tuple[Reply, hk.AdapterBank, int]:
    """A client's report, its upload as a bank of one client and the upload's bytes; `ConfigError` where it is not what the client was asked for."""
    if messages.ARRAYS not in content.array_records:
        raise ConfigError(f"its reply has no record {messages.ARRAYS!r}")
    arrays = content.array_records[messages.ARRAYS]
    reply = messages.reply(content, len(turn.state.bank.shapes))
    upload = exchange.collect(cfg, turn.state, name, turn.number, reply, arrays)
    if refused := server.refused(upload):
        raise ConfigError(refused[0])
    return reply, upload, size(arrays)


@dataclass
class Round:
    """What came back of a round's training. Positions are those of the turn's names."""

    replies: dict[int, Reply] = field(default_factory=dict)
    uploads: dict[int, hk.AdapterBank] = field(default_factory=dict)
    bytes_up: dict[int, int] = field(default_factory=dict)
    dropped: dict[int, str] = field(default_factory=dict)

    def trained(self, cfg: Config, turn: Turn, exchange: Exchange, down: list[int]) -> Trained:
        """What the loop merges, in the order of the turn's names.   down: bytes sent to each client."""
        arrived, shapes = sorted(self.replies), turn.state.bank.shapes
        replies = [self.replies.get(k) for k in range(len(turn.names))]
        nothing = LocalResult(0, 0, 0, math.nan, math.nan)
        results = [reply.result if reply else nothing for reply in replies]
        ranks = [dict(zip(shapes, reply.ranks, strict=True)) if reply else turn.state.ranks[name] for name, reply in zip(turn.names, replies, strict=True)]
        tails = [reply.tails if reply else (0.0, 0.0) for reply in replies]
        uploads = [self.uploads.pop(k) for k in arrived]
        parts = exchange.trained(cfg, turn.state, turn.names, turn.number, replies, uploads) if arrived else _NOTHING
        return Trained(results, self.dropped, ranks, tails, bytes_down=down, bytes_up=[self.bytes_up[k] for k in arrived], **parts)


_NOTHING: dict[str, Any] = {"uploads": None, "received": None, "parameters": 0}
Self = TypeVar("Self", bound="DeployedFleet")


class DeployedFleet(ABC):
    """The clients of a run behind an engine.   engine: its name, for the log."""

    def __init__(self, base: Base, members: Members, engine: str) -> None:
        self.base, self.members, self.engine = base, members, engine
        self.names: list[str] = []
        self.model_name, self.shapes = base.name, base.shapes
        self.device, self.model = torch.device("cpu"), None
        self.where = f"processes of their own, on this machine or others, reached through {engine}"

    @abstractmethod
    def train(self, cfg: Config, state: ServerState, names: Sequence[str], number: int, lr: float, progress: Progress) -> Trained: ...

    @abstractmethod
    def _evaluations(self, state: ServerState) -> dict[str, messages.Evaluated]:
        """What every client that is there finds under the bank of `state`; asked once a round."""

    def gathered(self: Self) -> Self:
        """Itself, when the run's clients are known."""
        self.names = self.members.gather()
        return self

    def sized(self, cfg: Config, state: ServerState) -> tuple[Config, list[str]]:
        """Each node finds out for itself; the lines are those of the ranks, where devices measured for them."""
        rule = cfg.rank_rule
        return cfg, rule.told([self.members.of[name] for name in self.names], state.ranks_start) if isinstance(rule, Capability) else []

    def describe(self) -> dict[str, Any]:
        return {"parameters": self.base.parameters, "data": "on the clients", "clients": len(self.names), "held_out_clients": 0}

    def fingerprint(self) -> str:
        return f"{self.engine.lower()} {self.names!r}"

    def starting_ranks(self, cfg: Config) -> StartingRanks:
        return cfg.rank_rule.assign([self.members.of[name] for name in self.names], cfg.seed)

    def base_weights(self, cfg: Config) -> dict[str, torch.nn.Parameter]:
        return {}

    def present(self) -> list[str]:
        return self.members.present()

    def sequences(self, name: str) -> int:
        return self.members.of[name].sequences

    def measured(self, name: str) -> Device | None:
        return self.members.of[name].device

    def evaluate(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, Any]:
        """Perplexity over the tokens of all clients; with `evaluate = all` also the mean over clients, held-out and training text."""
        found = self._evaluations(state)
        progress(len(found), len(self.names))
        self.members.write_roster()
        loss, tokens = (sum(own.whole[i] for own in found.values()) for i in (0, 1))
        result: dict[str, Any] = {"client_text": evaluation(loss, int(tokens)) if tokens else None, "held_out_clients": None}
        if cfg.evaluate == "all":
            for name, pairs in (("own_text", [own.own for own in found.values()]), ("own_train", [own.train for own in found.values()])):
                if means := [evaluation(*pair) for pair in pairs if pair[1]]:
                    result[name] = mean_over_clients(means)
        return result

    def answers(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, Any]:
        return {}  # the server has no text; what asks for answers is refused

    def own_text(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, dict[str, Any]]:
        return {name: evaluation(*own.own) for name, own in self._evaluations(state).items() if own.own[1]}
