"""The course of a run over its rounds: learning rate, the best round, when to stop early, and which runs can be made longer. Torch is not loaded here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from hetlora.config import Config, ConfigError

Record = Mapping[str, Any]  # a line of rounds.jsonl


def learning_rate(cfg: Config, number: int) -> float:
    """The rate of round `number`, counted from 1: lr t / (W + 1) in the first W = warmup_rounds, then lr_schedule over the rounds that are left."""
    warm = cfg.warmup_rounds
    if number <= warm:
        return cfg.lr * number / (warm + 1)
    done = (number - 1 - warm) / (cfg.rounds - warm)
    return cfg.lr * {"constant": 1.0, "linear": 1 - done, "cosine": 0.5 * (1 + math.cos(math.pi * done))}[cfg.lr_schedule]


def held_out_losses(history: Sequence[Record]) -> dict[int, float]:
    """{round: loss of the global adapter on the clients' held-out text} of the rounds that were evaluated."""
    parts = {record["round"]: (record["evaluation"] or {}).get("client_text") for record in history}
    return {number: part["loss"] for number, part in parts.items() if part}


def best_round(history: Sequence[Record]) -> int | None:
    """The first round with the lowest held-out loss, round 0 included; None where no loss is a number."""
    losses = {number: loss for number, loss in held_out_losses(history).items() if not math.isnan(loss)}
    return min(losses, key=losses.__getitem__, default=None)


def stalled(history: Sequence[Record], patience: int) -> bool:
    """Whether the last `patience` evaluations brought no held-out loss below the lowest one before them; never with patience = 0.

    An evaluation does not count where all rounds since the one before it were given up: it is that of the same bank.
    """
    best, losses = best_round(history), held_out_losses(history)
    fruitless, trained = 0, False
    for record in history:
        trained |= not record.get("given_up")
        if record["round"] in losses:
            fruitless += trained and (best is None or record["round"] > best)
            trained = False
    return 0 < patience <= fruitless


def idle_patience(cfg: Config) -> list[str]:
    """A line where no more evaluations come before the last round than could stop the run there."""
    there = (cfg.rounds - 1) // cfg.eval_every
    if there >= cfg.patience:
        return []
    come = "1 evaluation comes" if there == 1 else f"{there} evaluations come"
    what = f"patience = {cfg.patience}: nothing can stop early, as {come} before the last of {cfg.rounds} rounds"
    return [f"{what} (eval_every = {cfg.eval_every})"]


# ---------------------------------------------------------------- more rounds than were planned


def check_length(cfg: Config, planned: int, done: int) -> None:
    """`ConfigError` where a run of `planned` rounds, `done` of them done, cannot become the run of cfg.rounds that it would have been from the start."""
    if cfg.rounds == planned:
        return
    what = f"rounds: the run was made for {planned}, now {cfg.rounds}"
    if cfg.lr_schedule != "constant":
        raise ConfigError(f"{what}, and lr_schedule = {cfg.lr_schedule!r} has other learning rates for that from the start; leave it out, or start a new run")
    if cfg.rounds <= done:
        raise ConfigError(f"{what}, and {done} are done; give more than {done}, or leave --rounds out")
    if done == planned and done % cfg.eval_every and (cfg.keep_best or cfg.patience):
        raise ConfigError(
            f"{what}; keep_best and patience have looked at the evaluation of round {done}, which a run of {cfg.rounds} rounds and eval_every = "
            f"{cfg.eval_every} would not have; start a new run"
        )


def as_planned(history: Sequence[Record], cfg: Config) -> list[dict[str, Any]]:
    """The records as a run of cfg.rounds has them: without what an earlier, shorter plan evaluated because a round was its last."""
    found = []
    for record in history:
        own = dict(record)
        if 0 < own["round"] < cfg.rounds:
            if own["round"] % cfg.eval_every:
                own["evaluation"] = None
            elif own["evaluation"]:
                own["evaluation"] = {name: part for name, part in own["evaluation"].items() if name not in ("rouge_l", "samples")}
        found.append(own)
    return found
