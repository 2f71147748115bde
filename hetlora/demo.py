"""`hetlora demo`: a whole federation on this machine, offline, in minutes, by four methods; every number it prints was measured in that run."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from hetlora.compare.methods import make_plan
from hetlora.compare.run import Comparison, run_comparison
from hetlora.config import Config
from hetlora.data import Federation, load_data
from hetlora.demo_model import DemoModel
from hetlora.federation import prepare, resolve_model, starting_ranks
from hetlora.loop import simulate
from hetlora.observer import Observer
from hetlora.python_text import stdlib_documents

CALIBRATION_EVERY = 6  # each sixth package, four in all, chooses lambda and takes no part in the federation
LAMBDAS = (1000.0, 100.0, 10.0, 1.0, 0.1)
TOLERANCE = 0.005
SETTINGS: dict[str, Any] = {
    "model": "demo",
    "target_modules": "attention",
    "ranks": "powerlaw:5:50",
    "gamma": 0.99,
    "rounds": 6,
    "clients_per_round": 6,
    "held_out_clients": 3,
    "max_tokens_per_client": 16384,
    "local_steps": 4,
    "batch_size": 3,
    "lr": 5e-3,
    "eval_tokens": 8192,
    "eval_every": 3,
    "seed": 1,  # with seed 0 the power law happens to give 19 of the 21 clients rank 5
    "output": "runs/demo",
}
METHODS_SHOWN = {
    "homlora-min": "every device at the least rank, what the weakest can do and the fewest bytes",
    "hetlora": "every device at its own rank, with rows that do not pay pruned (the published method)",
    "fold": "every device computes with the whole merged adapter and trains fresh rows, as many numbers as its rank allows",
    "homlora-max": "every device at the largest rank, which the weak ones could not run",
}
COLUMNS = {"global_final": 0, "own_small": 2, "own_middle": 5, "own_big": 3, "megabytes_down": 4, "megabytes_up": 1}  # how spare each one is
MODEL = DemoModel(steps=200)  # fewer than where a run asks for the model 'demo': the demo ends in minutes on old and busy processors too
FAST_MODEL = DemoModel(hidden=64, layers=1, heads=2, intermediate=64, steps=20, warmup=5)
FAST: dict[str, Any] = {"rounds": 2, "clients_per_round": 3, "local_steps": 1, "batch_size": 2, "max_tokens_per_client": 2048, "eval_tokens": 2048}
CALIBRATION: dict[str, Any] = {
    "rounds": 3,
    "held_out_clients": 0,
    "eval_tokens": 4096,
    "eval_every": 3,
    "save_clients": False,
}


def packages() -> tuple[list[str], list[str]]:
    """(federated, calibration) packages of the standard library, disjoint."""
    names = sorted(stdlib_documents())
    calibration = names[CALIBRATION_EVERY - 1 :: CALIBRATION_EVERY][:4]
    return [name for name in names if name not in calibration], calibration


def run_demo(observer: Observer | None = None, fast: bool = False, **overrides: Any) -> tuple[Comparison, list[str]]:
    """Run the demo: four methods on the same federation. Returns the comparison, and what it shows in plain words, a paragraph each.

    Settings are `SETTINGS` with `overrides`; prune_lambda is chosen by `choose_lambda` unless given.
    fast: two tiny rounds on a tiny, hardly trained model: shows that everything works, not what it achieves.
    """
    observer = observer or Observer()
    federated, calibration = packages()
    settings = {**SETTINGS, **(FAST if fast else {}), **overrides}
    cfg = Config.create("demo", **{**settings, "data": "stdlib:" + ",".join(federated)})
    words = opening(cfg, fast)
    for text in words:
        observer.message(text)
    if Path(cfg.output).exists() and any(Path(cfg.output).iterdir()):
        cfg = cfg.model_copy(update={"output": _free(cfg.output)})
        observer.message(f"the folder {settings['output']} holds an earlier demo; this one goes to {cfg.output}")
    cfg = cfg.model_copy(update={"model": resolve_model(cfg, observer.pretrain, FAST_MODEL if fast else MODEL)})
    federation = prepare(cfg, observer)
    observer.message(_fleet(cfg, federation))
    if "prune_lambda" in overrides:
        observer.message(f"pruning (hetlora): gamma = {cfg.gamma:g}, lambda = {cfg.prune_lambda:g}, as asked for")
    else:
        cfg = cfg.model_copy(update={"prune_lambda": choose_lambda(cfg, calibration, federation, observer, LAMBDAS[:1] if fast else LAMBDAS)})
    return run_comparison(cfg, make_plan("demo", methods=",".join(METHODS_SHOWN), seeds=1), observer, federation), words


def opening(cfg: Config, fast: bool = False) -> list[str]:
    """What the demo simulates and what its columns mean, before anything is computed."""
    trained = len(cfg.data.split(",")) - cfg.held_out_clients
    return [
        f"What is simulated: {trained} packages of Python's library stand for {trained} devices, some weak and some strong, and {cfg.held_out_clients} more "
        "for devices that never train. All of them are in this process, and nothing is sent anywhere.",
        "Every device keeps its text to itself and has the same small, frozen language model. In a round a few devices train an adapter on their own text and "
        "send it, and the server merges what came. A device's rank says how large an adapter it can train.",
        "Four ways to deal with different ranks, on the same devices, data, rounds and learning rate:",
        *(f"{name}: {text}." for name, text in METHODS_SHOWN.items()),
        "Perplexity: between how many equally likely bytes the model is torn at each byte of text that nobody trains on. Lower is better. Global: the merged "
        "adapter on the text of all devices. Own: what a device receives of it, on the device's own text; small, middle and big are devices by rank. MB down "
        "and up: what all devices receive and send in the whole run.",
        "One run of each on one draw of the ranks: differences of a few percent say nothing. docs/results.md has studies with several.",
        *(["Fast: a tiny, hardly trained model and two rounds. The numbers show that everything works, not what it achieves."] if fast else []),
    ]


def _fleet(cfg: Config, federation: Federation) -> str:
    """The ranks that were drawn, in one line."""
    starting = starting_ranks(cfg, federation.data)
    ranks = sorted(starting.ranks.values())
    return f"ranks of the {len(ranks)} devices: {', '.join(map(str, ranks))} (seed {cfg.seed}); the server's adapter has rank {starting.r_max}"


def choose_lambda(cfg: Config, calibration: list[str], federation: Federation, observer: Observer, grid: tuple[float, ...] = LAMBDAS) -> float:
    """The strongest pruning that costs nothing worth mentioning: the largest lambda of `grid` whose held-out loss, after a short federation over the
    `calibration` packages alone, is at most 0.5 % above that of lambda = 0; 0 when there is none.
    """
    trial = cfg.model_copy(update={**CALIBRATION, "data": "stdlib:" + ",".join(calibration), "clients_per_round": len(calibration)})
    trial_federation = Federation(federation.model, federation.model_name, federation.shapes, load_data(trial, federation.tokenizer))
    starting = starting_ranks(cfg, federation.data)
    steps = max(len(calibration) - 1, 1)
    # Spread, so that there are tails to act on.
    ranks = [starting.r_min + round((starting.r_max - starting.r_min) * i / steps) for i in range(len(calibration))]
    trial = trial.model_copy(update={"ranks": ",".join(map(str, ranks))})
    losses = {}
    for value in (0.0, *grid):
        with tempfile.TemporaryDirectory(prefix="hetlora-") as folder:
            watching = _Trial(observer, f"how strongly hetlora prunes: trying lambda = {value:g}")
            settings = trial.model_copy(update={"prune_lambda": value, "output": f"{folder}/run"})
            result = simulate(settings, observer=watching, federation=trial_federation)
        observer.message(f"calibration: lambda = {value:g} gives a held-out loss of {result.summary['evaluation_after']['client_text']['loss']:.4f}")
        losses[value] = result.summary["evaluation_after"]["client_text"]["loss"]
        if value and losses[value] <= losses[0.0] * (1 + TOLERANCE):
            break
    chosen = value if losses[value] <= losses[0.0] * (1 + TOLERANCE) else 0.0
    tried = ", ".join(f"{v:g}: {loss:.4f}" for v, loss in losses.items())
    observer.message(
        f"pruning (hetlora): gamma = {cfg.gamma:g}, lambda = {chosen:g}: the largest of {', '.join(f'{v:g}' for v in grid)} whose held-out loss after "
        f"{CALIBRATION['rounds']} rounds over the packages {', '.join(calibration)} (ranks {trial.ranks}; not in the federation) is at most {TOLERANCE:.1%} "
        f"above that of lambda = 0 ({tried})"
    )
    return chosen


class _Trial(Observer):
    """Of a run of the calibration: its rounds are progress."""

    def __init__(self, observer: Observer, what: str) -> None:
        self._observer, self._what = observer, what

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        self._total = cfg.rounds

    def round_end(self, record: dict[str, Any]) -> None:
        self._observer.work(self._what, record["round"], self._total)


def _free(output: str) -> str:
    """`output` with the first number behind it that is not taken."""
    number = 2
    while Path(f"{output}-{number}").exists():
        number += 1
    return f"{output}-{number}"
