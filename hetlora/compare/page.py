"""A comparison as files and in the terminal: HTML page, pictures, CSV, JSON and a Markdown table."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from hetlora.compare import saved
from hetlora.compare.differences import difference_rows, difference_text, differences, reference
from hetlora.compare.figures import GLOBAL, METRICS, OWN, UNSEEN, Outcome, Table, gaps
from hetlora.compare.pictures import draw_all
from hetlora.report.page import environment, picture_data
from hetlora.report.terminal import Column, fitted_table, print_text
from hetlora.report.text import change_text, number, printable
from hetlora.run_folder import write_atomic


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
    setting = table.comparison.plan.search.partition("=")[0]
    best = {outcome.cell.method: table.comparison.chosen.get(outcome.cell.method) for outcome in table.search}
    for name, method in ((m.like or m.name, m) for m in table.comparison.methods):
        if setting not in method.settings:
            best[name] = best.get(name) or table.comparison.chosen[method.name]
    for outcome in table.search:
        perplexities = [perplexity for _, perplexity in outcome.curve(GLOBAL)]
        mark = " *" if outcome.cell.value == best[outcome.cell.method] else ""
        rows.setdefault(outcome.cell.method, {})[outcome.cell.value] = f"{number(perplexities[-1], 3)} ({number(min(perplexities), 3)}){mark}"
    values.sort(key=_sortable)
    return ["method", *(f"{setting} {value}" for value in values)], [[method, *(own.get(value, "-") for value in values)] for method, own in rows.items()]


def _sortable(value: str) -> tuple[float, str]:
    """Numbers by size, then what is no number."""
    try:
        return float(value), ""
    except ValueError:
        return math.inf, value


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
    against = {
        name: {"global_by_seed": own.by_seed, "own_by_client": own.by_client, "own_by_group": own.by_group, "own_interval": own.interval, "own_p": own.p}
        for name, own in differences(table).items()
    }
    versions = next(iter(table.outcomes.values()))[0].run.versions
    search = [{"method": o.cell.method, "value": o.cell.value, "curve": o.curve(GLOBAL)} for o in table.search]
    common = {"plan": table.comparison.plan.model_dump(), "config": table.comparison.common.model_dump(), "versions": versions}
    return json.dumps(_plain({**common, "methods": methods, "search": search, "against": reference(table), "differences": against})) + "\n"


def target_text(table: Table) -> str:
    target = table.comparison.plan.target
    return f"{100 * target:g} % of the perplexity before training" if target < 1 else f"perplexity {target:g}"


def privacy_note(table: Table) -> str:
    """What epsilon of the table covers; '' where no run had differential privacy."""
    found = [spent for own in table.outcomes.values() for outcome in own if (spent := (outcome.run.summary or {}).get("privacy"))]
    if not found:
        return ""
    deltas = ", ".join(f"{delta:g}" for delta in sorted({spent["delta"] for spent in found}))
    simulated = "" if all(spent["secret"] for spent in found) else " Noise from a run's seed protects nobody: this is a simulation."
    return (
        f"Differential privacy of clients: epsilon (at delta {deltas}) is that of one run by itself. It counts neither the other runs on the same clients "
        f"nor a choice among methods, seeds and searched values by their held-out text, which is seen without noise here.{simulated}"
    )


PRINTED = {"global_final": 0, "global_best": 4, "own_final": 1, "gap": 5, "megabytes_up": 2, "epsilon": 6, "cpu_seconds": 3}
"""{metric: how spare its column is} of the terminal's table."""


def print_comparison(console: Console, table: Table, spare: Mapping[str, int] = PRINTED) -> None:
    """Some columns of every method in the terminal, as many of `spare` as its width allows; the other columns are in the files."""
    shown = [m for m in table.metrics if m.key in spare]
    columns = [Column("method"), *(Column(m.title if m.key != "global_best" else "global held-out text, best", spare[m.key]) for m in shown)]
    rows = [[printable(name), *(tallies[m.key].text(m.digits) for m in shown)] for name, tallies in table.tallies.items()]
    grid, dropped = fitted_table(columns, rows, console.width)
    console.print()
    console.print(grid)
    if dropped:
        print_text(console, f"not shown at this width: {'; '.join(dropped)} (comparison.csv has all)")
    if note := privacy_note(table):
        print_text(console, note)


_PARTS = {
    "The global adapter": ("global_final", "global_best", "unseen_final", "rouge_l", "gap", "effective_rank"),
    "Clients' own text": ("own_final", "own_best", "own_small", "own_middle", "own_big"),
    "What it costs": ("rounds_to_target", "megabytes_down", "megabytes_up", "trained_percent", "epsilon", "cpu_seconds", "seconds"),
}
"""The page's tables of results: one of all columns would fit no screen."""
_RELATIVE = ("global_", "own_", "unseen_", "megabytes_", "cpu_")  # beginnings of the columns that are also shown against the reference method


def _cells(table: Table, name: str) -> dict[str, tuple[str, str]]:
    """Metric -> (value, its change against the reference method in percent; '' where that says nothing)."""
    base = table.tallies[reference(table)]
    found = {}
    for m in table.metrics:
        own = table.tallies[name][m.key]
        beside = change_text(base[m.key].mean, own.mean) if m.key.startswith(_RELATIVE) and name != reference(table) else ""
        found[m.key] = (own.text(m.digits), beside)
    return found


def sentence(table: Table) -> str:
    """What the comparison found, and how sure it is."""
    finals = {name: own["global_final"] for name, own in table.tallies.items()}
    order = sorted((name for name, own in finals.items() if own.mean is not None and math.isfinite(own.mean)), key=lambda name: finals[name].mean or 0.0)
    seeds = table.comparison.plan.seeds
    if len(order) < 2:
        return f"{len(order)} of {len(finals)} methods ended with a finite perplexity, which leaves nothing to compare."
    best, second = order[:2]
    pairs = [(a, b) for a, b in zip(finals[best].values, finals[second].values, strict=True) if a is not None and b is not None]
    ahead = sum(a < b for a, b in pairs)
    said = (
        f"Of {len(finals)} methods {best} reached the lowest perplexity of the clients' held-out text, {finals[best].text(3)}, "
        f"{change_text(finals[second].mean, finals[best].mean)} against the next, {second} ({finals[second].text(3)})"
    )
    if seeds == 1:
        return said + "; this is one seed, which does not establish an order."
    if ahead == len(pairs):
        chance = f"chance alone would do that once in {2 ** len(pairs)} times"
        return said + f"; it was ahead in all {len(pairs)} seeds ({chance})."
    return said + f"; it was ahead in {ahead} of {len(pairs)} seeds only, so the order of the two is not established."


def write_comparison(table: Table, opening: Sequence[str] = ()) -> Path:
    """Write comparison.html (pictures embedded), its PNGs, comparison.csv (a line per method and seed), .json and .md to the comparison's folder.

    opening: paragraphs that the page begins with. Returns the page's path.
    """
    folder = table.comparison.folder
    pictures = draw_all(table)
    for name, picture in pictures.items():
        write_atomic(folder / name, picture.png)
    write_atomic(folder / "comparison.csv", _csv(table))
    write_atomic(folder / "comparison.json", _json(table))
    text = markdown(table)
    if note := privacy_note(table):
        text += f"\n{note}\n"
    if len(table.tallies) > 1:
        text += f"\n{difference_text(table)}\n\n" + _markdown(*difference_rows(table))
    if table.search:
        text += "\nSearch: final (best) perplexity of the global adapter; * = the value taken\n\n" + _markdown(*search_rows(table))
    write_atomic(folder / "comparison.md", text)
    page = folder / "comparison.html"
    first = next(iter(table.outcomes.values()))[0]
    made = saved.read(folder).get("made", {}) if (folder / saved.RUNS).is_file() else {}
    html = (
        environment()
        .get_template("compare/page.html.j2")
        .render(
            table=table,
            opening=opening,
            rows=[(name, table.text(name), _cells(table, name)) for name in table.tallies],
            parts=[(title, own) for title, keys in _PARTS.items() if (own := [m for m in table.metrics if m.key in keys])],
            against=reference(table),
            sentence=sentence(table),
            finished=made.get("started"),
            command=made.get("command"),
            search=search_rows(table) if table.search else None,
            differences=difference_rows(table) if len(table.tallies) > 1 else None,
            differences_text=difference_text(table),
            target=target_text(table),
            pictures=picture_data(pictures),
            common=table.comparison.common.model_dump(),
            versions=first.run.versions,
            before=first.curve(GLOBAL)[0][1],
            notes=[*filter(None, [privacy_note(table)]), *sorted({note for picture in pictures.values() for note in picture.notes})],
        )
    )
    write_atomic(page, html)
    return page
