"""`hetlora compare`: every method on the same data, model, clients, seeds and budget, as ordinary runs in one folder that can be continued.

A cell is one run: a method at a seed. Its result is a function of its own config alone: the base model that cells share is never changed, and methods
that change the base get a copy of it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hetlora import run_folder
from hetlora.ahead import Known, check
from hetlora.compare.methods import ALONE, METHODS, OWNED, ComparisonPlan, Method, method_config, parse_methods, refuse_shared
from hetlora.config import Config, ConfigError
from hetlora.data import FederatedData, Federation, load_data
from hetlora.federation import load, look, starting_ranks
from hetlora.lock import FolderLock
from hetlora.loop import simulate
from hetlora.observer import Observer

PLAN = "comparison-plan.json"
SEARCH_SEED = 1000  # added to the seed: far from those of the comparison, however many there are
EVERY_CELL: dict[str, Any] = {"evaluate": "all", "diagnostics": True, "save_clients": False}
"""What a comparison's tables and pictures need of each run, unless the user says otherwise."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the comparison. `value`: the searched setting's value as text, '' without a search. `search`: it chooses that value.

    `ranks`: {client: rank} of the common settings at this seed, also where the method gives all clients one rank: groups of clients are told by it.
    """

    method: str
    seed: int
    cfg: Config
    value: str = ""
    search: bool = False
    ranks: Mapping[str, int] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was run: `cells` by method and seed, `search` runs, and the value each method got from them."""

    folder: Path
    plan: ComparisonPlan
    common: Config
    methods: list[Method]
    cells: list[Cell]
    search: list[Cell]
    chosen: dict[str, str]


class Bench:
    """The one base model in memory, and the data of each seed (they differ where clients are held out)."""

    def __init__(self, common: Config, observer: Observer, federation: Federation | None) -> None:
        """Without `federation` the weights wait for `load`."""
        self._common, self._first = common, federation
        self._known = {} if federation else {self._key(common): look(common, observer)}

    def load(self) -> None:
        if self._known:
            self._first = load(self._common, self._known[self._key(self._common)])

    def check(self, cfg: Config) -> None:
        """`ConfigError` for what keeps a run from its first round, as far as it can be known before the weights are loaded."""
        if self._known:
            known = self._of(cfg)
            check(cfg, known, starting_ranks(cfg, known.data))

    @staticmethod
    def _key(cfg: Config) -> tuple[str, int, int]:
        return cfg.data, cfg.held_out_clients, cfg.seed if cfg.held_out_clients else 0

    def federation(self, cfg: Config) -> Federation:
        """For one run: the shared model, or a copy of it where the run changes the base."""
        assert self._first, "loaded by now"
        model = copy.deepcopy(self._first.model) if cfg.merge_kind.base != "none" else self._first.model
        return dataclasses.replace(self._first, model=model, data=self.data(cfg))

    def data(self, cfg: Config) -> FederatedData:
        return self._of(cfg).data if self._known or not self._first else self._first.data

    def _of(self, cfg: Config) -> Known:
        first = self._known[self._key(self._common)]
        if self._key(cfg) not in self._known:
            self._known[self._key(cfg)] = dataclasses.replace(first, data=load_data(cfg, first.tokenizer))
        return self._known[self._key(cfg)]

    def trial(self, common: Config, plan: ComparisonPlan) -> Config:
        """Common settings of the search: a seed and clients of its own, and as large a share of them in a round as in the comparison."""
        trial = common.model_copy(
            update={
                "seed": common.seed + SEARCH_SEED,
                "rounds": plan.search_rounds or common.rounds,
                "data": plan.search_data or common.data,
                "held_out_clients": 0 if plan.search_data else common.held_out_clients,
            }
        )
        clients, own = len(self.data(common).clients), len(self.data(trial).clients)
        return trial.model_copy(update={"clients_per_round": max(1, round(min(common.clients_per_round, clients) * own / clients))})


def run_comparison(
    common: Config,
    plan: ComparisonPlan,
    observer: Observer | None = None,
    federation: Federation | None = None,
) -> Comparison:
    """Run every cell that `common.output` does not hold yet, each in a run folder of its own there; the same call continues a stopped comparison.

    common: settings of all runs; those in `methods.OWNED` must keep their defaults.   observer: also told of every cell that is done.
    federation: model and data loaded before; then every run works on these data, search included.

    Raises `ConfigError` for settings that no method can use, and when the folder holds a comparison with other common settings.
    """
    observer = observer or Observer()
    methods = parse_methods(plan.methods)
    common = _with_defaults(common)
    if plan.against and plan.against not in (names := [method.name for method in methods]):
        raise ConfigError(f"against: expected one of the methods ({', '.join(names)}), got {plan.against!r}")
    _parse_search(plan.search)
    folder = Path(common.output)
    with FolderLock() as lock:  # each run locks its own folder too: this one keeps two comparisons from dividing the runs between them
        if _is_this_comparison(folder, common, plan):
            lock.take(folder)
        bench = Bench(common, observer, federation)
        # A method that cannot run is refused before the weights, before hours of others, and before there is a folder with its settings.
        for method in methods:
            bench.check(_cell(method, common, bench, folder / "cells", {}, False).cfg)
        for own in _searched(common, plan, methods, bench, folder / "search").values():
            for cell in own.values():
                bench.check(cell.cfg)
        bench.load()
        if not lock.folder:
            _open_folder(folder, common, plan)
            lock.take(folder)
        if lock.note:
            observer.message(lock.note)
        return _run_cells(common, plan, methods, folder, observer, bench)


def _run_cells(common: Config, plan: ComparisonPlan, methods: list[Method], folder: Path, observer: Observer, bench: Bench) -> Comparison:
    setting, _ = _parse_search(plan.search)
    seeds = range(common.seed, common.seed + plan.seeds)
    search, best = _search(common, plan, methods, bench, folder / "search", observer, len(methods) * len(seeds))
    chosen = {method.name: str(method.settings.get(setting) or best[method.like or method.name]) for method in methods} if setting else {}
    cells = []
    for seed in seeds:
        for method in methods:
            value = {setting: chosen[method.name]} if setting and setting not in method.settings else {}
            cells.append(_cell(method, common.model_copy(update={"seed": seed}), bench, folder / "cells", value, False))
            _run_cell(cells[-1], bench, observer, len(search) + len(cells), len(search) + len(methods) * len(seeds))
    cells.sort(key=lambda cell: ([method.name for method in methods].index(cell.method), cell.seed))
    return Comparison(folder, plan, common, methods, cells, search, chosen)


def _search(
    common: Config, plan: ComparisonPlan, methods: list[Method], bench: Bench, folder: Path, observer: Observer, later: int
) -> tuple[list[Cell], dict[str, str]]:
    """(the search's runs, {method: the value with the lowest final loss}); `later`: runs that follow, for the count that is shown."""
    setting, _ = _parse_search(plan.search)
    if not setting:
        return [], {}
    trial = bench.trial(common, plan)
    cells = _searched(common, plan, methods, bench, folder)
    losses: dict[str, dict[str, float]] = {name: {} for name in cells}
    done = 0
    for name, own in cells.items():
        for value, cell in own.items():
            done += 1
            _run_cell(cell, bench, observer, done, sum(map(len, cells.values())) + later)
            losses[name][value] = _final_loss(cell)
    for name, own in cells.items():
        for _ in range(plan.search_beyond):
            best = _least(losses[name])
            further = beyond(list(own), best)
            if further is None:
                break
            where = f"search: {setting} = {best} is best for {name}, and at the end of its values"
            try:
                own[further] = _cell(METHODS[name], trial, bench, folder, {setting: further}, True)
            except ConfigError as error:
                observer.message(f"{where}; none is tried beyond it ({error})")
                break
            observer.message(f"{where}; {further} is tried too")
            done += 1
            _run_cell(own[further], bench, observer, done, sum(map(len, cells.values())) + later)
            losses[name][further] = _final_loss(own[further])
    return [cell for own in cells.values() for cell in own.values()], {name: _least(own) for name, own in losses.items()}


def _searched(common: Config, plan: ComparisonPlan, methods: list[Method], bench: Bench, folder: Path) -> dict[str, dict[str, Cell]]:
    """{method: {value: the run that tries it}} of the search; {} without one."""
    setting, values = _parse_search(plan.search)
    if not setting:
        return {}
    trial = bench.trial(common, plan)
    names = dict.fromkeys(method.like or method.name for method in methods)
    return {name: {value: _cell(METHODS[name], trial, bench, folder, {setting: value}, True) for value in values} for name in names}


def _least(losses: Mapping[str, float]) -> str:
    return min(losses, key=losses.__getitem__)


def _with_defaults(common: Config) -> Config:
    given = [name for name in OWNED if getattr(common, name) != Config.model_fields[name].default]
    if given:
        raise ConfigError(f"{', '.join(given)}: set by the methods of a comparison; leave it out, or add a method 'hetlora+{given[0]}=...'")
    for name, why in ALONE.items():
        if getattr(common, name) != Config.model_fields[name].default:
            raise ConfigError(f"{name}: {why}; leave it out")
    return common.model_copy(update={name: value for name, value in EVERY_CELL.items() if name not in common.model_fields_set})


def _parse_search(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    listed = [value.strip() for value in values.split(",") if value.strip()]
    if text and (not equals or name not in Config.model_fields or name in (*OWNED, "seed", "output", "ranks") or not listed):
        raise ConfigError(f"search: expected 'SETTING=V1,V2,...' with a setting such as lr, got {text!r}")
    refuse_shared("search", name, "")
    return name, listed


def beyond(values: list[str], best: str) -> str | None:
    """The value as far beyond `best`, the least or the largest of `values`, as that is from its neighbour, by ratio; None where `best` is inside.

    Also None where there is no ratio to go on with: one value, or one that is not a number above 0.

    >>> beyond(["0.005", "0.01", "0.02"], "0.02"), beyond(["0.005", "0.01"], "0.005"), beyond(["adamw", "sgd"], "sgd")
    ('0.04', '0.0025', None)
    """
    try:
        numbers = sorted({float(value) for value in values})
    except ValueError:
        return None
    if len(numbers) < 2 or numbers[0] <= 0 or float(best) not in (numbers[0], numbers[-1]):
        return None
    end, neighbour = numbers[:2] if float(best) == numbers[0] else numbers[:-3:-1]
    return f"{end * end / neighbour:.4g}"


def _wanted(common: Config, plan: ComparisonPlan) -> dict[str, dict[str, Any]]:
    """What all runs of a comparison have in common; methods, seeds and searched values may be added to it."""
    return {"config": common.model_dump(exclude={"output"}), "plan": plan.model_dump(include={"search_data", "search_rounds"})}


def _is_this_comparison(folder: Path, common: Config, plan: ComparisonPlan) -> bool:
    """Whether `folder` holds this comparison, or is free for it; `ConfigError` where it holds something else."""
    if not (folder / PLAN).exists():
        run_folder.refuse_existing(folder, "it holds no comparison; choose another folder")
        return False
    saved, wanted = _read_plan(folder / PLAN), _wanted(common, plan)
    pairs = [(key, saved[part].get(key), value) for part in wanted for key, value in wanted[part].items()]
    different = [f"{key} was {old!r}, now {new!r}" for key, old, new in pairs if old != new]
    if different:
        raise ConfigError(f"{folder}: holds a comparison with other settings ({'; '.join(different[:4])}); give them, or another folder")
    return True


def _open_folder(folder: Path, common: Config, plan: ComparisonPlan) -> None:
    """Create the folder, where no other process did so meanwhile."""
    if not _is_this_comparison(folder, common, plan):
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_atomic(folder / PLAN, json.dumps(_wanted(common, plan), indent=2) + "\n")


def _read_plan(file: Path) -> dict[str, Any]:
    problems: list[str] = []
    saved = run_folder.read_json(file, problems)
    if saved is None or not all(isinstance(saved.get(part), dict) for part in ("config", "plan")):
        raise ConfigError(f"{file}: damaged ({problems[0] if problems else 'no settings in it'}); restore it from a copy, or give another folder")
    saved["config"] = Config.create(str(file), **saved["config"]).model_dump()  # settings that came later have their defaults
    return saved


def _cell(method: Method, common: Config, bench: Bench, folder: Path, values: dict[str, str], search: bool) -> Cell:
    value = next(iter(values.values()), "")
    name = f"{run_folder.folder_name(method.name, safe='+=')}{f'-{value}' if value else ''}"  # a search that takes another value leaves the old runs alone
    starting = starting_ranks(common, bench.data(common))
    cfg = method_config(method, common, starting, **values, output=str(folder / name / f"seed-{common.seed}"))
    return Cell(method.name, common.seed, cfg, value, search, starting.ranks)


def _run_cell(cell: Cell, bench: Bench, observer: Observer, done: int, total: int) -> None:
    folder = Path(cell.cfg.output)
    summary = None
    if (folder / run_folder.SUMMARY).is_file():
        run_folder.check_same_config(folder, cell.cfg)
    else:
        summary = simulate(cell.cfg, resume=run_folder.is_run(folder), observer=observer, federation=bench.federation(cell.cfg)).summary
    what = f"search {cell.method} {cell.value}" if cell.search else f"{cell.method} seed {cell.seed}"
    observer.cell(what, done, total, summary)


def _final_loss(cell: Cell) -> float:
    """Held-out loss of the global adapter at the end of a finished cell; infinite where it is no number."""
    problems: list[str] = []
    summary = run_folder.read_summary(Path(cell.cfg.output), problems)
    try:
        loss = float((summary or {})["evaluation_after"]["client_text"]["loss"])
        return math.inf if math.isnan(loss) else loss
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{Path(cell.cfg.output) / run_folder.SUMMARY}: damaged ({problems[0] if problems else 'no loss in it'}); restore it") from None
