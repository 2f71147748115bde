"""The list of a comparison's runs as a file, so that its page can be made again without its command."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetlora import run_folder
from hetlora.compare.methods import make_plan, parse_methods
from hetlora.compare.run import PLAN, Cell, Comparison
from hetlora.config import Config, ConfigError

RUNS = "comparison-runs.json"


def is_comparison(folder: Path) -> bool:
    return (folder / PLAN).is_file()


def save(comparison: Comparison, opening: Sequence[str] = ()) -> None:
    """Write comparison-runs.json: the plan, the runs, what the search chose, when, by which command, and the paragraphs that its page begins with."""

    def entry(cell: Cell) -> dict[str, Any]:
        own = Path(cell.cfg.output).relative_to(comparison.folder)
        return {"method": cell.method, "seed": cell.seed, "value": cell.value, "search": cell.search, "ranks": cell.ranks, "folder": own.as_posix()}

    content = {
        "made": run_folder.origin(),
        "plan": comparison.plan.model_dump(),
        "common": comparison.common.model_dump(),
        "chosen": comparison.chosen,
        "opening": list(opening),
        "runs": [entry(cell) for cell in (*comparison.cells, *comparison.search)],
    }
    run_folder.write_atomic(comparison.folder / RUNS, json.dumps(content, indent=2) + "\n")


def reopen(folder: Path) -> Comparison:
    """The finished comparison in `folder`. Raises `ConfigError` where it is not finished, or its files are damaged."""
    if not (folder / RUNS).is_file():
        raise ConfigError(f"{folder}: this comparison is not finished; give its 'hetlora compare' command again, it runs nothing twice")
    saved = read(folder)
    try:
        cells = [Cell(own["method"], own["seed"], _config(folder / own["folder"]), own["value"], own["search"], own["ranks"]) for own in saved["runs"]]
        plan = make_plan(str(folder / RUNS), **saved["plan"])
        common = Config.create(str(folder / RUNS), **{**saved["common"], "output": str(folder)})
        return Comparison(folder, plan, common, parse_methods(plan.methods), *_split(cells), dict(saved["chosen"]))
    except (KeyError, TypeError) as error:
        raise ConfigError(f"{folder / RUNS}: damaged ({error}); give the 'hetlora compare' command again, it runs nothing twice") from None


def read(folder: Path) -> dict[str, Any]:
    """comparison-runs.json as it stands; `ConfigError` where it cannot be read."""
    problems: list[str] = []
    saved = run_folder.read_json(folder / RUNS, problems)
    if saved is None:
        raise ConfigError(f"{folder / RUNS}: damaged ({problems[0]}); give the 'hetlora compare' command again, it runs nothing twice")
    return saved


def _config(run: Path) -> Config:
    return run_folder.read_config(run).model_copy(update={"output": str(run)})


def _split(cells: list[Cell]) -> tuple[list[Cell], list[Cell]]:
    return [cell for cell in cells if not cell.search], [cell for cell in cells if cell.search]
