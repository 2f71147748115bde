"""A comparison's figures from the run folders of its cells: means and spreads over seeds as HTML, PNG, CSV, JSON and a Markdown table."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table as Grid
from rich.text import Text

from hetlora.checkpoint import write_atomic
from hetlora.compare.run import Cell, Comparison
from hetlora.report.page import Run, environment, picture_data, read_run
from hetlora.report.terminal import number, perplexity_of

GLOBAL, OWN, UNSEEN = "client_text", "own_text", "held_out_clients"


@dataclass(frozen=True)
class Outcome:
    """A finished cell and what its folder says."""

    cell: Cell
    run: Run

    def curve(self, part: str) -> list[tuple[int, float]]:
        """(round, perplexity) at each evaluation of `part`."""
        return [(r["round"], p) for r in self.run.records if (p := perplexity_of(r.get("evaluation"), part)) is not None]

    def evaluations(self) -> list[dict[str, Any]]:
        return [record["evaluation"] for record in self.run.records if record.get("evaluation")]


def gaps(outcome: Outcome) -> list[tuple[float, float]]:
    """(rank at the end, over-fitting gap) of every client: how much further its training loss fell than its held-out loss since before training, in nats."""
    found = outcome.evaluations()
    if "own_train" not in found[0] or outcome.run.summary is None:
        return []
    before, after = ([t - s for t, s in zip(e["own_text"]["losses"], e["own_train"]["losses"], strict=True)] for e in (found[0], found[-1]))
    ranks = [client["rank_end"] for client in outcome.run.summary["clients"]]
    return [(rank, late - early) for rank, early, late in zip(ranks, before, after, strict=True)]


def rounds_to(outcome: Outcome, target: float) -> float | None:
    """First evaluated round whose global held-out perplexity is at most `target`; below 1: that share of the perplexity before training."""
    curve = outcome.curve(GLOBAL)
    limit = target * curve[0][1] if target < 1 else target
    return next((float(round) for round, perplexity in curve if perplexity <= limit), None)


def _share(outcome: Outcome) -> float:
    """Parameters that a client trains in a round, mean over clients and rounds, in percent of all weights of the model."""
    assert outcome.run.summary is not None
    visits = sum(len(record["clients"]) + len(record["dropped"]) for record in outcome.run.trained)
    return 100 * outcome.run.summary["trained_parameters"] / visits / outcome.run.summary["parameters"]


def _total(outcome: Outcome, key: str) -> float:
    assert outcome.run.summary is not None
    return float(outcome.run.summary[key])


def _gap(outcome: Outcome) -> float | None:
    values = [gap for _, gap in gaps(outcome)]
    return statistics.fmean(values) if values else None


def _rouge(outcome: Outcome) -> float | None:
    found = outcome.evaluations()[-1].get("rouge_l")
    return 100 * found["f1"] if found else None


@dataclass(frozen=True)
class Metric:
    """A column of the table. `value` of one cell, None where it does not exist."""

    key: str
    title: str
    digits: int
    value: Callable[[Outcome, float], float | None]


def _of(part: str, pick: Callable[[Sequence[float]], float]) -> Callable[[Outcome, float], float | None]:
    def value(outcome: Outcome, target: float) -> float | None:
        values = [perplexity for _, perplexity in outcome.curve(part)]
        return pick(values) if values else None

    return value


METRICS = (
    Metric("global_final", "global held-out text, final", 3, _of(GLOBAL, lambda values: values[-1])),
    Metric("global_best", "best", 3, _of(GLOBAL, min)),
    Metric("own_final", "clients' own held-out text, final", 3, _of(OWN, lambda values: values[-1])),
    Metric("own_best", "best", 3, _of(OWN, min)),
    Metric("unseen_final", "unseen clients, final", 3, _of(UNSEEN, lambda values: values[-1])),
    Metric("rouge_l", "ROUGE-L (F1, %)", 2, lambda outcome, _: _rouge(outcome)),
    Metric("rounds_to_target", "rounds to target", 1, rounds_to),
    Metric("gap", "over-fitting gap (nats)", 3, lambda outcome, _: _gap(outcome)),
    Metric("megabytes_down", "MB down", 2, lambda outcome, _: _total(outcome, "bytes_down") / 1e6),
    Metric("megabytes_up", "MB up", 2, lambda outcome, _: _total(outcome, "bytes_up") / 1e6),
    Metric("trained_percent", "trained, % of full", 2, lambda outcome, _: _share(outcome)),
    Metric("cpu_seconds", "CPU s", 0, lambda outcome, _: _total(outcome, "cpu_seconds")),
    Metric("seconds", "wall s", 0, lambda outcome, _: _total(outcome, "seconds")),
)


@dataclass(frozen=True)
class Tally:
    """One metric of one method: a value per seed, in seed order; None where it does not exist (a target that was not reached)."""

    values: list[float | None]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.known) if self.known else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.known) if len(self.known) > 1 and all(map(math.isfinite, self.known)) else None

    def text(self, digits: int) -> str:
        """Mean ± standard deviation; how many seeds have a value where not all do."""
        if not self.known:
            return "-"
        spread = f" ± {number(self.std, digits)}" if self.std is not None else ""
        return number(self.mean, digits) + spread + (f" ({len(self.known)} of {len(self.values)})" if len(self.known) < len(self.values) else "")


@dataclass(frozen=True)
class Table:
    """What the comparison found. `outcomes` by method, in the order asked for; `tallies[method][metric key]`."""

    comparison: Comparison
    outcomes: dict[str, list[Outcome]]
    search: list[Outcome]
    tallies: dict[str, dict[str, Tally]]

    @property
    def metrics(self) -> list[Metric]:
        """The columns in which any method has a value."""
        return [m for m in METRICS if any(own[m.key].known for own in self.tallies.values())]

    def text(self, method: str) -> str:
        return next(m.text for m in self.comparison.methods if m.name == method)


def tabulate(comparison: Comparison) -> Table:
    """Read every cell's run folder."""
    outcomes: dict[str, list[Outcome]] = {}
    for cell in comparison.cells:
        outcomes.setdefault(cell.method, []).append(Outcome(cell, read_run(cell.cfg.output)))
    target = comparison.plan.target
    tallies = {name: {m.key: Tally([m.value(o, target) for o in own]) for m in METRICS} for name, own in outcomes.items()}
    return Table(comparison, outcomes, [Outcome(cell, read_run(cell.cfg.output)) for cell in comparison.search], tallies)


def markdown(table: Table) -> str:
    """The table as Markdown: one line per method, perplexities as mean ± standard deviation over the seeds."""
    return _markdown(["method", *(m.title for m in table.metrics)], [[name, *_texts(table, name)] for name in table.tallies])


def _texts(table: Table, name: str) -> list[str]:
    return [table.tallies[name][m.key].text(m.digits) for m in table.metrics]


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def search_rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the search: per method, 'final (best)' global perplexity for each value; the value taken is marked."""
    values = list(dict.fromkeys(outcome.cell.value for outcome in table.search))
    rows: dict[str, dict[str, str]] = {}
    best = {outcome.cell.method: table.comparison.chosen.get(outcome.cell.method) for outcome in table.search}
    for name, method in ((m.like or m.name, m) for m in table.comparison.methods):
        best[name] = best.get(name) or table.comparison.chosen[method.name]
    for outcome in table.search:
        perplexities = [perplexity for _, perplexity in outcome.curve(GLOBAL)]
        mark = " *" if outcome.cell.value == best[outcome.cell.method] else ""
        rows.setdefault(outcome.cell.method, {})[outcome.cell.value] = f"{number(perplexities[-1], 3)} ({number(min(perplexities), 3)}){mark}"
    name = table.comparison.plan.search.partition("=")[0]
    return ["method", *(f"{name} {value}" for value in values)], [[method, *(own[value] for value in values)] for method, own in rows.items()]


def _csv(table: Table) -> str:
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(["method", "seed", "searched value", *(m.key for m in METRICS)])
    for name, outcomes in table.outcomes.items():
        for i, outcome in enumerate(outcomes):
            values = [table.tallies[name][m.key].values[i] for m in METRICS]
            writer.writerow([name, outcome.cell.seed, outcome.cell.value, *("" if value is None else f"{value:.6g}" for value in values)])
    return buffer.getvalue()


def _plain(value: Any) -> Any:
    """Numbers to six digits, in lists and dicts too; those that JSON does not know (infinite perplexities) become text."""
    if isinstance(value, dict):
        return {key: _plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else str(value)
    return value


def _diagnostics(outcome: Outcome) -> dict[str, Any]:
    """Effective rank and merge error by round, and the energy of the rank rows after the last; every round's is in the run folder."""
    found = [record["diagnostics"] for record in outcome.run.trained if record.get("diagnostics")]
    last = found[-1]["row_energy"] if found else []
    return {"effective_rank": [own["effective_rank"] for own in found], "merge_error": [own["merge_error"] for own in found], "row_energy": last}


def _json(table: Table) -> str:
    """Every figure of the page."""
    methods = {}
    for name, outcomes in table.outcomes.items():
        methods[name] = {
            "text": table.text(name),
            "searched": table.comparison.chosen.get(name),
            "metrics": {key: {"mean": t.mean, "std": t.std, "values": t.values} for key, t in table.tallies[name].items()},
            "curves": {part: [o.curve(part) for o in outcomes] for part in (GLOBAL, OWN, "own_train", UNSEEN)},
            "gap_by_rank": [gaps(outcome) for outcome in outcomes],
            "diagnostics": [_diagnostics(outcome) for outcome in outcomes],
        }
    versions = next(iter(table.outcomes.values()))[0].run.versions
    search = [{"method": o.cell.method, "value": o.cell.value, "curve": o.curve(GLOBAL)} for o in table.search]
    common = {"plan": table.comparison.plan.model_dump(), "config": table.comparison.common.model_dump(), "versions": versions}
    return json.dumps(_plain({**common, "methods": methods, "search": search})) + "\n"


def target_text(table: Table) -> str:
    target = table.comparison.plan.target
    return f"{100 * target:g} % of the perplexity before training" if target < 1 else f"perplexity {target:g}"


def print_comparison(console: Console, comparison: Comparison) -> None:
    """Final and best perplexity, bytes and time of every method in the terminal; the other columns are in the files."""
    table = tabulate(comparison)
    shown = [m for m in table.metrics if m.key in ("global_final", "global_best", "own_final", "gap", "megabytes_up", "cpu_seconds")]
    grid = Grid()
    grid.add_column("method", overflow="fold")
    for metric in shown:
        grid.add_column(metric.title, justify="right")
    for name, tallies in table.tallies.items():
        grid.add_row(Text(name), *(tallies[m.key].text(m.digits) for m in shown))
    console.print()
    console.print(grid)


def write_comparison(comparison: Comparison) -> Path:
    """Write comparison.html (pictures embedded), its PNGs, comparison.csv (a line per method and seed), .json and .md to the comparison's folder.

    Returns the page's path. Raises ConfigError when a cell's run folder cannot be read.
    """
    from hetlora.compare import pictures as drawings  # matplotlib takes a second to load

    table = tabulate(comparison)
    folder = comparison.folder
    pictures = drawings.draw_all(table)
    for name, picture in pictures.items():
        write_atomic(folder / name, picture.png)
    write_atomic(folder / "comparison.csv", _csv(table))
    write_atomic(folder / "comparison.json", _json(table))
    text = markdown(table)
    if table.search:
        text += "\nSearch: final (best) perplexity of the global adapter; * = the value taken\n\n" + _markdown(*search_rows(table))
    write_atomic(folder / "comparison.md", text)
    page = folder / "comparison.html"
    first = next(iter(table.outcomes.values()))[0]
    html = (
        environment()
        .get_template("compare/page.html.j2")
        .render(
            table=table,
            rows=[(name, table.text(name), _texts(table, name)) for name in table.tallies],
            search=search_rows(table) if table.search else None,
            target=target_text(table),
            pictures=picture_data(pictures),
            common=comparison.common.model_dump(),
            versions=first.run.versions,
            before=first.curve(GLOBAL)[0][1],
            notes=sorted({note for picture in pictures.values() for note in picture.notes}),
        )
    )
    write_atomic(page, html)
    return page
