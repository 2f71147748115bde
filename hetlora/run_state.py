"""A run in memory, and how it is kept in its folder after every round and taken up again from there."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hetlora import checkpoint, course, run_folder, server
from hetlora.config import Config, ConfigError
from hetlora.fleet import Fleet
from hetlora.observer import Observer
from hetlora.ranks import StartingRanks, from_record, to_record


@dataclass
class Run:
    """What the rounds of a run work on, and their records so far."""

    cfg: Config
    fleet: Fleet
    state: server.ServerState
    folder: Path
    observer: Observer
    history: list[dict[str, Any]] = field(default_factory=list)
    fingerprint: str = field(init=False)

    def __post_init__(self) -> None:
        self.fingerprint = self.fleet.fingerprint()


def ranks_on_record(run: Run) -> dict[str, int | dict[str, int]]:
    """Every client's rank as JSON has it: one number, or one per module."""
    return {name: to_record(ranks, run.cfg.prune_scope) for name, ranks in run.state.ranks.items()}


def save(run: Run) -> None:
    """The checkpoint of the round that ended, and the global adapter."""
    state = run.state
    content = {name: getattr(state, name) for name in checkpoint.STATE} | {"data": run.fingerprint, "ranks": ranks_on_record(run)}
    content["settings"] = run_folder.method_settings(run.cfg)
    checkpoint.save_checkpoint(run.folder, content, state.bank, run.fleet.base_weights(run.cfg), state.moments)
    _write_adapter(run)


def _write_adapter(run: Run) -> None:
    if "global" in run.cfg.saves:
        checkpoint.write_adapter(run.folder / run_folder.ADAPTER, run.state.bank.adapter(0), run.cfg.scale_at(run.state.r_max), run.fleet.model_name)


def restore(run: Run) -> list[dict[str, Any]]:
    """State and history up to the newest checkpoint; an empty history when there is none yet."""
    loaded = checkpoint.load_checkpoint(run.folder)
    rounds = run.folder / run_folder.ROUNDS
    if loaded is None:
        if any(record["round"] > 0 for record in run_folder.read_rounds(run.folder)):
            raise ConfigError(f"{run.folder / run_folder.CHECKPOINT}: missing, though rounds are on record; restore it from a copy, or start a new run")
        rounds.unlink(missing_ok=True)
        checkpoint.set_rounds(run.folder, run.cfg.rounds)
        return []
    _take(run, *loaded)
    history = course.as_planned(run_folder.read_rounds(run.folder, last=run.state.round), run.cfg)
    if [record["round"] for record in history] != list(range(run.state.round + 1)):
        raise ConfigError(f"{rounds}: expected one line for each of the rounds 0 to {run.state.round}; restore it from a copy, or start a new run")
    checkpoint.set_rounds(run.folder, run.cfg.rounds)  # before what an earlier plan evaluated leaves the log
    _write_adapter(run)
    note_best(run, history)
    run_folder.write_atomic(rounds, "".join(json.dumps(record) + "\n" for record in history))
    run.observer.message(f"continuing after round {run.state.round} of {run.cfg.rounds}")
    return history


def _take(run: Run, content: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
    """The state of a checkpoint becomes the run's. `ConfigError` where it is that of other data, ranks or another model."""
    state = run.state
    checkpoint.check_start(run.folder, content, run.cfg, run.fingerprint, StartingRanks(state.r_min, state.r_max, state.ranks_start))
    try:
        run.state.bank.load_state_dict({key[len("bank.") :]: value for key, value in tensors.items() if key.startswith("bank.")})
    except ValueError as error:
        raise ConfigError(f"{run.folder / run_folder.CHECKPOINT}: does not fit the model of this run ({error})") from None
    with torch.no_grad():
        for name, weight in run.fleet.base_weights(run.cfg).items():
            weight.copy_(tensors[f"base.{name}"])
    run.state.moments = {key[len("server.") :]: value.to(run.fleet.device) for key, value in tensors.items() if key.startswith("server.")}
    for name in checkpoint.STATE:
        setattr(run.state, name, content[name])
    run.state.ranks = {name: from_record(saved, run.cfg.prune_scope, run.state.bank.shapes) for name, saved in content["ranks"].items()}


def note_best(run: Run, history: list[dict[str, Any]]) -> None:
    """With keep_best: where the newest round is the best so far, its checkpoint is kept."""
    if run.cfg.keep_best and course.best_round(history) == run.state.round:
        checkpoint.keep_as_best(run.folder)


def return_to_best(run: Run) -> dict[str, Any]:
    """With keep_best: the state of the best round becomes that of the run, on the run's way to its end. Returns the round's record."""
    best, last = course.best_round(run.history), run.state.round
    if not run.cfg.keep_best or best is None or best == last:
        return run.history[-1]
    found = checkpoint.load_checkpoint(run.folder, run_folder.BEST)
    if found is None or found[0]["round"] != best:
        what = f"{run.folder / run_folder.BEST}: {'missing' if found is None else 'of another round'}, the best round was {best}"
        raise ConfigError(f"{what}; restore it from a copy, or start a new run")
    trained = run.state.rounds_trained
    _take(run, *found)
    run.state.rounds_trained = trained
    _write_adapter(run)
    run.observer.message(f"kept: round {best} of {last}, whose held-out loss is the lowest")
    return run.history[best]
