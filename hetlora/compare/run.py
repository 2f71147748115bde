"""`hetlora compare`: every method on the same data, model, clients, seeds and budget, as ordinary runs in one folder that can be continued.

A cell is one run: a method at a seed. Its result is a function of its own config alone: the base model that cells share is never changed, and methods
that change the base get a copy of it.
"""

from __future__ import annotations

import copy
import dataclasses
import json
from pathlib import Path
from typing import Any

from hetlora import run_folder
from hetlora.compare.methods import METHODS, OWNED, Method, Plan, method_config, parse_methods, refuse_shared
from hetlora.config import Config, ConfigError
from hetlora.data import load_data
from hetlora.federation import Federation, prepare, starting_ranks
from hetlora.lock import FolderLock
from hetlora.loop import simulate
from hetlora.observer import Observer

PLAN = "comparison-plan.json"
SEARCH_SEED = 1000  # added to the seed: far from those of the comparison, however many there are
EVERY_CELL: dict[str, Any] = {"evaluate": "all", "diagnostics": True, "save_clients": False}
"""What a comparison's tables and pictures need of each run, unless the user says otherwise."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run of the comparison. `value`: the searched setting's value as text, '' without a search. `search`: it chooses that value."""

    method: str
    seed: int
    cfg: Config
    value: str = ""
    search: bool = False


@dataclasses.dataclass(frozen=True)
class Comparison:
    """What was run: `cells` by method and seed, `search` runs, and the value each method got from them."""

    folder: Path
    plan: Plan
    common: Config
    methods: list[Method]
    cells: list[Cell]
    search: list[Cell]
    chosen: dict[str, str]


class _Bench:
    """The one base model in memory, and the data of each seed (they differ where clients are held out)."""

    def __init__(self, common: Config, observer: Observer, federation: Federation | None) -> None:
        self._first = federation or prepare(common, observer)
        self._own_data = federation is None
        self._data = {self._key(common): self._first.data}

    @staticmethod
    def _key(cfg: Config) -> tuple[str, int, int]:
        return cfg.data, cfg.held_out_clients, cfg.seed if cfg.held_out_clients else 0

    def federation(self, cfg: Config) -> Federation:
        """For one run: the shared model, or a copy of it where the run changes the base."""
        if self._own_data and self._key(cfg) not in self._data:
            self._data[self._key(cfg)] = load_data(cfg, self._first.tokenizer)
        data = self._data[self._key(cfg)] if self._own_data else self._first.data
        model = copy.deepcopy(self._first.model) if cfg.merge_kind.base != "none" else self._first.model
        shapes = self._first.shapes
        return dataclasses.replace(self._first, model=model, shapes=shapes, data=data)

    def bounds(self, cfg: Config) -> tuple[int, int]:
        plan = starting_ranks(cfg, self.federation(cfg).data)
        return plan.r_min, plan.r_max


def run_comparison(
    common: Config,
    plan: Plan,
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
    _parse_search(plan.search)
    folder = _open_folder(common, plan)
    with FolderLock() as lock:  # each run locks its own folder too: this one keeps two comparisons from dividing the runs between them
        lock.take(folder)
        if lock.note:
            observer.message(lock.note)
        return _run_cells(common, plan, methods, folder, observer, federation)


def _run_cells(common: Config, plan: Plan, methods: list[Method], folder: Path, observer: Observer, federation: Federation | None) -> Comparison:
    setting, values = _parse_search(plan.search)
    bench = _Bench(common, observer, federation)
    for method in methods:  # so that a method that cannot run is refused before hours of others
        _cell(method, common, bench, folder / "cells", {}, False)
    search: list[Cell] = []
    if setting:
        trial = common.model_copy(
            update={
                "seed": common.seed + SEARCH_SEED,
                "rounds": plan.search_rounds or common.rounds,
                "data": plan.search_data or common.data,
                "held_out_clients": 0 if plan.search_data else common.held_out_clients,
            }
        )
        searched = list(dict.fromkeys(method.like or method.name for method in methods))
        search = [_cell(METHODS[name], trial, bench, folder / "search", {setting: value}, True) for name in searched for value in values]
    seeds = range(common.seed, common.seed + plan.seeds)
    total = len(search) + len(methods) * len(seeds)
    for done, cell in enumerate(search, 1):
        _run_cell(cell, bench, observer, done, total)
    best = {name: min((c for c in search if c.method == name), key=_final_loss).value for name in {c.method for c in search}}
    chosen = {method.name: best[method.like or method.name] for method in methods} if setting else {}
    cells = []
    for seed in seeds:
        for method in methods:
            value = {setting: chosen[method.name]} if setting and setting not in method.settings else {}
            cells.append(_cell(method, common.model_copy(update={"seed": seed}), bench, folder / "cells", value, False))
            _run_cell(cells[-1], bench, observer, len(search) + len(cells), total)
    cells.sort(key=lambda cell: ([method.name for method in methods].index(cell.method), cell.seed))
    return Comparison(folder, plan, common, methods, cells, search, chosen)


def _with_defaults(common: Config) -> Config:
    given = [name for name in OWNED if getattr(common, name) != Config.model_fields[name].default]
    if given:
        raise ConfigError(f"{', '.join(given)}: set by the methods of a comparison; leave it out, or add a method 'hetlora+{given[0]}=...'")
    return common.model_copy(update={name: value for name, value in EVERY_CELL.items() if name not in common.model_fields_set})


def _parse_search(text: str) -> tuple[str, list[str]]:
    name, equals, values = text.partition("=")
    listed = [value.strip() for value in values.split(",") if value.strip()]
    if text and (not equals or name not in Config.model_fields or name in (*OWNED, "seed", "output", "ranks") or not listed):
        raise ConfigError(f"search: expected 'SETTING=V1,V2,...' with a setting such as lr, got {text!r}")
    refuse_shared("search", name, "")
    return name, listed


def _open_folder(common: Config, plan: Plan) -> Path:
    """Create the folder, or make sure that the comparison it holds has the same common settings; methods, seeds and searched values may be added."""
    folder = Path(common.output)
    wanted = {"config": common.model_dump(exclude={"output"}), "plan": plan.model_dump(include={"search_data", "search_rounds"})}
    if (folder / PLAN).exists():
        saved = _read_plan(folder / PLAN)
        pairs = [(key, saved[part].get(key), value) for part in wanted for key, value in wanted[part].items()]
        different = [f"{key} was {old!r}, now {new!r}" for key, old, new in pairs if old != new]
        if different:
            raise ConfigError(f"{folder}: holds a comparison with other settings ({'; '.join(different[:4])}); give them, or another folder")
    else:
        run_folder.refuse_existing(folder, "it holds no comparison; choose another folder")
        folder.mkdir(parents=True, exist_ok=True)
        run_folder.write_atomic(folder / PLAN, json.dumps(wanted, indent=2) + "\n")
    return folder


def _read_plan(file: Path) -> dict[str, Any]:
    problems: list[str] = []
    saved = run_folder.read_json(file, problems)
    if saved is None or not all(isinstance(saved.get(part), dict) for part in ("config", "plan")):
        raise ConfigError(f"{file}: damaged ({problems[0] if problems else 'no settings in it'}); restore it from a copy, or give another folder")
    saved["config"] = Config.create(str(file), **saved["config"]).model_dump()  # settings that came later have their defaults
    return saved


def _cell(method: Method, common: Config, bench: _Bench, folder: Path, values: dict[str, str], search: bool) -> Cell:
    value = next(iter(values.values()), "")
    name = f"{run_folder.folder_name(method.name, safe='+=')}{f'-{value}' if value else ''}"  # a search that takes another value leaves the old runs alone
    r_min, r_max = bench.bounds(common)
    cfg = method_config(method, common, r_min, r_max, **values, output=str(folder / name / f"seed-{common.seed}"))
    return Cell(method.name, common.seed, cfg, value, search)


def _run_cell(cell: Cell, bench: _Bench, observer: Observer, done: int, total: int) -> None:
    folder = Path(cell.cfg.output)
    summary = None
    if (folder / run_folder.SUMMARY).is_file():
        run_folder.check_same_config(folder, cell.cfg)
    else:
        summary = simulate(cell.cfg, resume=run_folder.is_run(folder), observer=observer, federation=bench.federation(cell.cfg)).summary
    what = f"search {cell.method} {cell.value}" if cell.search else f"{cell.method} seed {cell.seed}"
    observer.cell(what, done, total, summary)


def _final_loss(cell: Cell) -> float:
    """Held-out loss of the global adapter at the end of a finished cell."""
    problems: list[str] = []
    summary = run_folder.read_summary(Path(cell.cfg.output), problems)
    try:
        return float((summary or {})["evaluation_after"]["client_text"]["loss"])
    except (KeyError, TypeError, ValueError):
        raise ConfigError(f"{Path(cell.cfg.output) / run_folder.SUMMARY}: damaged ({problems[0] if problems else 'no loss in it'}); restore it") from None
