"""Where the clients of a run are, and what its rounds ask of them. `LocalFleet`: their text and one model for all are in this process."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch

from hetlora import checkpoint, rouge, samples
from hetlora.config import Config
from hetlora.data import ClientData, Federation
from hetlora.evaluate import WHOLE, Part, Whole, evaluate_bank, evaluate_clients, mean_over_clients, pool_text
from hetlora.federation import base_weights, starting_ranks
from hetlora.memory import with_step_tokens
from hetlora.models import checkpointed
from hetlora.ranks import Device, StartingRanks
from hetlora.server import ServerState
from hetlora.training import Trained, Work

Progress = Callable[[int, int], None]


class Fleet(Protocol):
    """What the rounds know of the clients. Names are sorted; a client's name is the same in every round and after a restart.

    shapes: {module: (m, n)} of the modules that carry adapters.   model: the base, where it is in this process.
    where: the clients of the run were ..., for its report.
    """

    where: str

    names: list[str]
    model_name: str
    shapes: dict[str, tuple[int, int]]
    device: torch.device
    model: Any

    def describe(self) -> dict[str, Any]: ...

    def sized(self, cfg: Config, state: ServerState) -> tuple[Config, list[str]]: ...

    def fingerprint(self) -> str:
        """Changes when the run must not be continued with these clients."""
        ...

    def starting_ranks(self, cfg: Config) -> StartingRanks: ...

    def base_weights(self, cfg: Config) -> dict[str, torch.nn.Parameter]:
        """Weights of the base that the rounds change; {} where they change none."""
        ...

    def present(self) -> list[str]:
        """Names of the clients that can take part now, sorted."""
        ...

    def sequences(self, name: str) -> int:
        """Training sequences of a client."""
        ...

    def measured(self, name: str) -> Device | None:
        """What a client's device measured, where the ranks follow from that."""
        ...

    def train(self, cfg: Config, state: ServerState, names: Sequence[str], number: int, lr: float, progress: Progress) -> Trained: ...

    def evaluate(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, Any]:
        """The `evaluation` of a round's record: the global adapter on everybody's held-out text, and what else the settings ask for."""
        ...

    def answers(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, Any]:
        """What an `evaluation` has besides before the first and after the last round; {} where the settings ask for nothing."""
        ...

    def own_text(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, dict[str, Any]]:
        """{client: loss, perplexity, tokens} of every client's own held-out text under what it receives of the bank."""
        ...


@dataclass
class LocalFleet:
    """Clients simulated in this process, on one copy of the base model.   split: who does which part of an evaluation."""

    federation: Federation
    split: Whole = WHOLE
    where = "simulated in one process; no byte crossed a network"

    def __post_init__(self) -> None:
        self.clients = {client.name: client for client in self.federation.data.clients}
        self.names = list(self.clients)
        self.model, self.model_name = self.federation.model, self.federation.model_name
        self.shapes, self.device = self.federation.shapes, self.federation.device
        self.auto: dict[str, int] = {}  # settings that `sized` found

    def sized(self, cfg: Config, state: ServerState) -> tuple[Config, list[str]]:
        """`cfg` with numbers for max_tokens_per_step = 'auto' and what comes with it, found once, and lines that say how."""
        if cfg.max_tokens_per_step:
            return cfg, []
        if self.auto:
            return cfg.model_copy(update=self.auto), []
        own, said = with_step_tokens(cfg, self.model, self.shapes, list(state.ranks_start.values()))
        self.auto = {"max_tokens_per_step": own.max_tokens_per_step, "clients_at_once": own.clients_at_once}
        return own, said

    def describe(self) -> dict[str, Any]:
        data = self.federation.data
        parameters = sum(p.numel() for p in self.model.parameters())
        return {"parameters": parameters, "data": data.source, "clients": len(data.clients), "held_out_clients": len(data.held_out)}

    def fingerprint(self) -> str:
        return checkpoint.fingerprint(self.federation.data)

    def starting_ranks(self, cfg: Config) -> StartingRanks:
        return starting_ranks(cfg, self.federation.data)

    def base_weights(self, cfg: Config) -> dict[str, torch.nn.Parameter]:
        if weights := base_weights(cfg, self.model, self.shapes):
            self.federation.folded_by = Path(cfg.output)
        return weights

    def present(self) -> list[str]:
        return self.names

    def sequences(self, name: str) -> int:
        return self.clients[name].sequences

    def measured(self, name: str) -> None:
        """Nothing: a simulation has no devices."""

    def train(self, cfg: Config, state: ServerState, names: Sequence[str], number: int, lr: float, progress: Progress) -> Trained:
        cfg, _ = self.sized(cfg, state)
        work = Work(cfg, self.model, state, [self.clients[name] for name in names], number, lr, progress)
        with checkpointed(self.model, cfg.gradient_checkpointing):
            trained: Trained = cfg.training_kind.load()(work)
        return trained

    def evaluate(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, Any]:
        """Losses and perplexities; before the first and after the last round also ROUGE-L of answers, if asked for."""
        cfg, _ = self.sized(cfg, state)
        data = self.federation.data
        sets = {"client_text": pool_text(data.clients, cfg.eval_tokens), "held_out_clients": pool_text(data.held_out, cfg.eval_tokens)}
        scale = cfg.scale_at(state.r_max)
        found: dict[str, Any] = {
            name: evaluate_bank(self.model, state.bank, sequences, scale, cfg.max_tokens_per_step, progress, self.split) for name, sequences in sets.items()
        }
        if cfg.evaluate == "all":
            parts: dict[str, Part] = {"own_text": "test", "own_train": "train"}
            found |= {name: mean_over_clients(list(self.own_text(cfg, state, progress, part).values())) for name, part in parts.items()}
        return found | (self.answers(cfg, state, progress) if state.round in (0, cfg.rounds) else {})

    def answers(self, cfg: Config, state: ServerState, progress: Progress) -> dict[str, Any]:
        found: dict[str, Any] = {"rouge_l": rouge.evaluate(self.federation, state.bank, cfg, progress, self.split)} if cfg.rouge_examples else {}
        return found | ({"samples": samples.evaluate(self.federation, state.bank, cfg, progress, self.split)} if cfg.sample_prompts else {})

    def own_text(self, cfg: Config, state: ServerState, progress: Progress, part: Part = "test") -> dict[str, dict[str, Any]]:
        cfg, _ = self.sized(cfg, state)
        clients: list[ClientData] = list(self.clients.values())
        share = math.ceil(cfg.eval_tokens / len(clients)) if cfg.eval_tokens else 0
        with cfg.training_kind.load_receives()(state, cfg, self.model, self.names) as (bank, ranks):
            scale = cfg.scale_at(state.r_max)
            found = evaluate_clients(self.model, bank, ranks, clients, scale, cfg.max_tokens_per_step, share, progress, part, self.split)
        return dict(zip(self.names, found, strict=True))
