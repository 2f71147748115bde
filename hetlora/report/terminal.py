"""What a run shows in a terminal: progress while it works, one table when it is done, as wide as the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from hetlora.config import Config
from hetlora.observer import Observer
from hetlora.report.text import cells, change_text, fold_name, number, perplexity_of, printable, privacy_text, rank_text, round_line, size_text, wrap
from hetlora.report.verdict import got_worse

MOST_CLIENTS = 40
SHOWN_CLIENTS = 20
_PLAIN_WIDTH = 160


class _Console(Console):
    """Rich's console; where nobody reads any more (`| head`), its caller is told, not ended."""

    def on_broken_pipe(self) -> NoReturn:
        self.quiet = True
        raise BrokenPipeError(32, "nobody reads the output any more")


def make_console(stderr: bool = False) -> Console:
    """A console that keeps whole lines where there is no terminal; rich itself obeys NO_COLOR."""
    console = _Console(highlight=False, markup=False, soft_wrap=False, stderr=stderr)
    return console if console.is_terminal else _Console(highlight=False, markup=False, width=_PLAIN_WIDTH, stderr=stderr)


def print_text(console: Console, text: str) -> None:
    """One line; in a terminal as many as it takes, broken between words."""
    text = printable(text)
    for line in wrap(text, console.width) if console.is_terminal else [text]:
        console.print(Text(line), soft_wrap=True)


class ConsoleObserver(Observer):
    """Shows a run: bars for the rounds and for the work within a round on a terminal, else one line per event.

    Use it as a context manager, so that the terminal is restored when the run stops. `cfg` is the run's config once it has started.
    """

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or make_console()
        self.cfg: Config | None = None
        self._live = self.console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description}", markup=False),
            BarColumn(bar_width=max(5, min(30, self.console.width - 58))),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left", markup=False),
            TimeRemainingColumn(),
            console=self.console,
            transient=True,
            disable=not self._live,
        )
        self._rounds: TaskID | None = None
        self._inner: TaskID | None = None
        self._inner_name = ""
        self._total = 0
        self._pretrain_tenth = -1

    def __enter__(self) -> ConsoleObserver:
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bars.stop()

    def _print(self, text: str) -> None:
        print_text(self._bars.console, text)

    def _step(self, name: str, done: int, total: int) -> None:
        """Move the inner bar; a new `name` starts a new one, so that its time left is that of its own work."""
        if not self._live:
            return
        if name != self._inner_name:
            self._drop_inner()
            self._inner, self._inner_name = self._bars.add_task(name, total=total), name
        if self._inner is not None:
            self._bars.update(self._inner, completed=done, total=total)

    def _drop_inner(self) -> None:
        if self._inner is not None:
            self._bars.remove_task(self._inner)
        self._inner, self._inner_name = None, ""

    def message(self, text: str) -> None:
        self._print(text)

    def pretrain(self, done: int, total: int, loss: float) -> None:
        self._step("making the base model", done, total)
        tenth = 10 * done // max(total, 1)
        if not self._live and tenth != self._pretrain_tenth:
            self._print(f"making the base model: step {done}/{total}, loss {number(loss, 3)}")
        self._pretrain_tenth = tenth
        if done >= total:
            self._drop_inner()
            if self._live:
                self._print(f"made the base model: {total} steps, loss {number(loss, 3)}")

    def work(self, what: str, done: int, total: int) -> None:
        self._step(what, done, total)
        if done >= total:
            self._drop_inner()

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        self.cfg, self._total = cfg, cfg.rounds
        for key, value in info.items():
            self._print(f"{key.replace('_', ' ')}: {value}")
        if self._live:
            self._drop_inner()
            self._rounds = self._bars.add_task("rounds", total=cfg.rounds)

    def round_start(self, round: int, total: int, names: list[str]) -> None:
        self._total = total
        self._drop_inner()
        if self._rounds is not None:
            self._bars.update(self._rounds, description=f"round {round}/{total}, {len(names)} clients", completed=round - 1, total=total)

    def local_step(self, done: int, total: int) -> None:
        self._step("  local training", done, total)

    def evaluate(self, done: int, total: int) -> None:
        self._step("  evaluation", done, total)

    def round_end(self, record: dict[str, Any]) -> None:
        self._drop_inner()
        if self._rounds is not None:
            self._bars.update(self._rounds, completed=record["round"])
        self._print(round_line(record, self._total))

    def finish(self, summary: dict[str, Any]) -> None:
        self._drop_inner()
        self._bars.stop()


class ComparisonObserver(ConsoleObserver):
    """Shows a comparison: bars for the run at work on a terminal, and one line for every cell that is done. What many runs say is shown once."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._said: set[str] = set()

    def message(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            super().message(text)

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        self.cfg, self._total = cfg, cfg.rounds
        if self._live:
            self._drop_inner()
            self._drop_rounds()
            self._rounds = self._bars.add_task("rounds", total=cfg.rounds)

    def round_end(self, record: dict[str, Any]) -> None:
        self._drop_inner()
        if self._rounds is not None:
            self._bars.update(self._rounds, completed=record["round"])

    def finish(self, summary: dict[str, Any]) -> None:
        self._drop_inner()
        self._drop_rounds()

    def _drop_rounds(self) -> None:
        if self._rounds is not None:
            self._bars.remove_task(self._rounds)
        self._rounds = None

    def cell(self, label: str, done: int, total: int, summary: dict[str, Any] | None) -> None:
        """`done` of `total` cells: `summary` of the run that just ended; None for one that was there already."""
        if summary is None:
            self._print(f"{done}/{total} {label}: done before")
            return
        before, after = (number(perplexity_of(summary[key], "client_text"), 3) for key in ("evaluation_before", "evaluation_after"))
        self._print(f"{done}/{total} {label}: perplexity {before} -> {after}; {summary['cpu_seconds']:.0f} s of CPU time, {summary['seconds']:.0f} s")


def _change(client: dict[str, Any]) -> float:
    before, after = client.get("perplexity_before"), client.get("perplexity_after")
    if not before or not after:
        return -1.0
    change = abs(math.log(after) - math.log(before))
    return math.inf if math.isnan(change) else change


@dataclass(frozen=True)
class Column:
    """`spare`: left out where the terminal is too narrow, those of the highest number first; 0 = never."""

    title: str
    spare: int = 0


_LONGEST_NAME = 32  # columns of the screen that a name may ask for before columns of the table are left out


def fitted_table(columns: Sequence[Column], rows: Sequence[Sequence[str]], width: int) -> tuple[Table, list[str]]:
    """A table no wider than `width`, and the titles of the columns that are left out for it. The first column holds names: it alone may fold.

    Titles break between words, numbers nowhere.
    """
    shown = list(range(len(columns)))
    names = max((cells(row[0]) for row in rows), default=0)

    def least(i: int) -> int:
        return max(*(cells(word) for word in columns[i].title.split(" ")), *(cells(row[i]) for row in rows), 1)

    def room() -> int:
        """What is left for the names."""
        return width - 1 - 3 * len(shown) - sum(least(i) for i in shown[1:])

    while room() < max(cells(columns[0].title), min(names, _LONGEST_NAME)) and any(columns[i].spare for i in shown[1:]):
        shown.remove(max(shown[1:], key=lambda i: columns[i].spare))
    first = max(min(max(names, cells(columns[0].title)), room()), 1)
    spare = room() - first
    table = Table()
    table.add_column(columns[0].title, overflow="fold", width=first)
    for i in shown[1:]:
        own = min(max(least(i), cells(columns[i].title)), least(i) + max(spare, 0))
        spare -= own - least(i)
        table.add_column(columns[i].title, justify="right", width=own)
    for row in rows:
        table.add_row(Text(fold_name(row[0], first)), *(Text(row[i]) for i in shown[1:]))
    return table, [column.title for i, column in enumerate(columns) if i not in shown]


_CLIENT_COLUMNS = (Column("client"), Column("rank"), Column("rounds", 1), Column("training sequences", 2), Column("perplexity"), Column("change"))


def client_table(summary: dict[str, Any], width: int = _PLAIN_WIDTH) -> tuple[Table, str]:
    """Per client: rank, work, perplexity; and a line that says what is left out ('' if nothing). A client that got worse is marked."""
    clients, note = summary["clients"], ""
    if len(clients) > MOST_CLIENTS:
        note = f"{SHOWN_CLIENTS} of {len(clients)} clients are shown, those whose perplexity changed most; all are in summary.json"
        chosen = {id(c) for c in sorted(clients, key=_change, reverse=True)[:SHOWN_CLIENTS]}
        clients = [c for c in clients if id(c) in chosen]
    rows = []
    for c in clients:
        before, after = c.get("perplexity_before"), c.get("perplexity_after")
        rows.append(
            (
                printable(c["name"]),
                f"{rank_text(c['rank_start'])} -> {rank_text(c['rank_end'])}",
                str(c["rounds"]),
                str(c["sequences"]),
                f"{number(before)} -> {number(after)}",
                change_text(before, after) + (" worse" if got_worse(c) else ""),
            )
        )
    table, dropped = fitted_table(_CLIENT_COLUMNS, rows, width)
    if dropped:
        note = "; ".join(filter(None, (note, f"not shown at this width: {', '.join(dropped)} (summary.json has all)")))
    return table, note


def total_lines(summary: dict[str, Any]) -> list[str]:
    """Global perplexity and traffic, one line each."""
    lines = []
    for part, name in (("client_text", "clients' held-out text"), ("held_out_clients", "held-out clients")):
        before, after = (perplexity_of(summary.get(key), part) for key in ("evaluation_before", "evaluation_after"))
        if before is None and after is None:
            lines.append(f"global perplexity, {name}: not evaluated")
        else:
            lines.append(f"global perplexity, {name}: {number(before)} -> {number(after)} ({change_text(before, after)})")
    for way in ("down", "up"):
        ours, full = summary[f"bytes_{way}"], summary[f"bytes_{way}_homlora"]
        share = f", {100 * ours / full:.1f} % of it" if full else ""
        lines.append(f"adapter bytes {way}: {size_text(ours)}; HomLoRA at r={summary['homlora_rank']} would move {size_text(full)}{share}")
    if summary.get("privacy"):
        lines.append(f"privacy of each client: {privacy_text(summary['privacy'])}")
    return lines


def print_summary(console: Console, summary: dict[str, Any], own_text: str) -> None:
    """own_text: of the run's kind of training (`kinds.TrainingKind`)."""
    table, note = client_table(summary, console.width)
    console.print()
    print_text(console, f"Clients; perplexity is that of {own_text}, on the client's own held-out text")
    console.print(table)
    for line in ([note] if note else []) + total_lines(summary) + [f"note: {text}" for text in summary.get("notes") or []]:
        print_text(console, line)
