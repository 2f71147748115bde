"""Pictures of a comparison: perplexity by round and what it costs, ablations, over-fitting by rank, and what happens to the rank rows."""

from __future__ import annotations

import math
import statistics
from functools import partial
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hetlora.compare.figures import GLOBAL, Outcome, Table, gaps
from hetlora.report.diagnostics import CAPTION, diagnosed, draw_energy, energy_bar, mean_over_runs
from hetlora.report.drawing import GREY, Picture, empty, is_narrow, legend_below, log_axis, marker_size, panels, render, resize

_LOOKS = {
    "hetlora": ("#0072B2", "o"),
    "hetlora-gamma1": ("#56B4E9", "s"),
    "homlora-min": ("#009E73", "v"),
    "homlora-mean": ("#999933", "d"),
    "homlora-max": ("#D55E00", "^"),
    "recon-svd": ("#CC79A7", "D"),
    "flora": ("#E69F00", "P"),
    "fold": ("#332288", "*"),
    "fedavg-full": ("#000000", "X"),
}
_OTHERS = ("#CC79A7", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#000000", "#882255", "#44AA99")
_OTHER_MARKS = "sv^DPX*hp"  # one more than colours, so that pairs of both do not repeat


def _look(table: Table, name: str) -> tuple[str, str]:
    if name in _LOOKS:
        return _LOOKS[name]
    place = [other for other in table.outcomes if other not in _LOOKS].index(name)
    return _OTHERS[place % len(_OTHERS)], _OTHER_MARKS[place % len(_OTHER_MARKS)]


def draw_all(table: Table) -> dict[str, Picture]:
    """File name -> picture, in reading order."""
    named = {method.name: method for method in table.comparison.methods}
    main = [name for name in table.outcomes if named[name].like is None]
    ablations = [name for name in table.outcomes if named[name].like is not None]
    pictures = {"comparison.png": render(partial(_trade_off, table, main or ablations, "What each method reaches, and what it sends for it"))}
    if ablations:
        with_parents = list(dict.fromkeys([*(named[name].like or "" for name in ablations), *ablations]))
        shown = [name for name in with_parents if name in table.outcomes]
        pictures["ablations.png"] = render(partial(_trade_off, table, shown, "Ablations: one thing changed at a time"))
    pictures["gap.png"] = render(partial(_gap, table, main or ablations))
    if any(diagnosed(outcome.run) for own in table.outcomes.values() for outcome in own):
        pictures["diagnostics.png"] = render(partial(_diagnostics, table))
    return pictures


def _mean_curve(outcomes: list[Outcome], part: str) -> tuple[list[int], list[float], list[float]]:
    """(rounds, mean, sample standard deviation) over seeds, of the rounds in which every seed has a finite value."""
    tables = [{r: p for r, p in outcome.curve(part) if math.isfinite(p)} for outcome in outcomes]
    rounds = sorted(set.intersection(*map(set, tables)))
    values = [[table[r] for table in tables] for r in rounds]
    return rounds, [statistics.fmean(own) for own in values], [statistics.stdev(own) if len(own) > 1 else 0.0 for own in values]


def _curves(table: Table, names: list[str], part: str, axes: Axes) -> list[float]:
    """Mean lines with bands of one standard deviation; returns the values shown."""
    shown: list[float] = []
    for name in names:
        colour, mark = _look(table, name)
        rounds, means, stds = _mean_curve(table.outcomes[name], part)
        if not rounds:
            continue
        style: Any = "-" if name in _LOOKS else "--"
        axes.plot(rounds, means, color=colour, marker=mark, markersize=marker_size(rounds), linestyle=style, linewidth=1.4, label=name)
        low, high = ([m + side * s for m, s in zip(means, stds, strict=True)] for side in (-1, 1))
        axes.fill_between(rounds, low, high, color=colour, alpha=0.12)
        shown += means
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    axes.set_xlabel("round")
    if shown:
        log_axis(axes, shown)
    else:
        empty(axes, "No finite evaluation is on record.")
    return shown


def _seeds_text(table: Table) -> str:
    count = table.comparison.plan.seeds
    return f"Lines: mean over {count} seeds; bands: one standard deviation." if count > 1 else "One seed."


def _trade_off(table: Table, names: list[str], title: str, figure: Figure) -> tuple[str, str, str]:
    resize(figure, 13, 6)
    figure.suptitle(title, x=0.01, ha="left", fontsize=13)
    left, right = panels(figure, 2)
    left.set_title("perplexity on the clients' held-out text by round")
    _curves(table, names, GLOBAL, left)
    left.set_ylabel("perplexity of the global adapter (lower is better)")
    right.set_title("at the end, against bytes sent up by clients")
    finals, sizes = [], []
    for name in names:
        final, sent = table.tallies[name]["global_final"], table.tallies[name]["megabytes_up"]
        if final.mean is None or not math.isfinite(final.mean) or not sent.mean:
            continue
        finals.append(final.mean)
        sizes.append(sent.mean)
        colour, mark = _look(table, name)
        right.errorbar(sent.mean, final.mean, xerr=sent.std or 0, yerr=final.std or 0, color=colour, marker=mark, markersize=8, linestyle="none", label=name)
    right.set_xlabel("MB sent up in the whole run, all clients")
    right.set_ylabel("final perplexity (lower is better)")
    if finals:
        log_axis(right, finals)
        if log_axis(right, sizes, right.xaxis):
            right.set_xlabel("MB sent up in the whole run, all clients (logarithmic)")
    legend_below(figure, 2 if is_narrow(figure) else 5, left.get_legend_handles_labels()[0])
    caption = f"{_seeds_text(table)} Lower left in the right panel is better. Bytes are sizes of the factors (or of the model), computed from the ranks."
    spoken = "; ".join(f"{name} {table.tallies[name]['global_final'].text(2)} at {table.tallies[name]['megabytes_up'].text(2)} MB" for name in names)
    return title, caption, f"{title}: {spoken}"


def _gap(table: Table, names: list[str], figure: Figure) -> tuple[str, str, str]:
    title = "Over-fitting gap by rank"
    axes = figure.subplots()
    axes.set_title(title)
    largest, one_rank = 0.0, False
    for name in names:
        colour, mark = _look(table, name)
        by_rank: dict[float, list[float]] = {}
        for outcome in table.outcomes[name]:
            for rank, gap in gaps(outcome):
                by_rank.setdefault(rank, []).append(gap)
        if not by_rank:
            continue
        largest = max(largest, *by_rank)
        ranks = sorted(by_rank)
        means = [statistics.fmean(by_rank[rank]) for rank in ranks]
        if len(ranks) == 1:
            axes.axhline(means[0], color=colour, linestyle=":", linewidth=1)
            one_rank = True
        where = [rank if rank else math.nan for rank in ranks]  # full fine-tuning has no rank: its line says it
        axes.plot(where, means, color=colour, marker=mark, linestyle="none", alpha=0.75, label=name if ranks != [0] else f"{name} (no rank: line)")
    if not largest:
        empty(axes, "No training text was evaluated.")
        return title, "No training text was evaluated.", title + ": not on record"
    if one_rank:
        axes.plot([], [], color=GREY, linestyle=":", linewidth=1, label="one rank for all")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.set_xlabel("rank of the client at the end")
    axes.set_ylabel("nats per token")
    legend_below(figure, 2 if is_narrow(figure) else 4)
    caption = (
        "How much further the loss on a client's own training text fell than on its own held-out text, from before training to the end, under the rank rows "
        "the client receives. A point: mean over the clients of that rank and over seeds."
    )
    spoken = "; ".join(f"{name} {table.tallies[name]['gap'].text(3)}" for name in names)
    return title, caption, f"{title}, mean over clients: {spoken}"


def _diagnostics(table: Table, figure: Figure) -> tuple[str, str, str]:
    title = "Rank rows of the bank, effective rank and merge error"
    runs = {name: rows for name, own in table.outcomes.items() if all(rows := [diagnosed(outcome.run) for outcome in own])}
    columns = 1 if is_narrow(figure) else 4
    lines = math.ceil((len(runs) + 2) / columns)
    resize(figure, 13, 2.9 * lines + 0.6)
    grid = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    image = None
    for axes, (name, rows) in zip(grid, runs.items(), strict=False):
        image = draw_energy(axes, rows, name)
    for axes, key, what in zip(grid[len(runs) :], ("effective_rank", "merge_error"), ("effective rank", "merge error (relative)"), strict=False):
        axes.set_title(what, fontsize=10)
        for name, rows in runs.items():
            rounds, means = mean_over_runs(rows, key)
            colour, mark = _look(table, name)
            axes.plot(rounds, means, color=colour, marker=mark, markersize=3, linewidth=1.2, label=name)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
        axes.set_xlabel("round")
    for axes in grid[len(runs) + 2 :]:
        axes.set_axis_off()
    if image is not None:
        energy_bar(figure, image, grid[: len(runs)])
    legend_below(figure, 2 if is_narrow(figure) else 6, grid[len(runs)].get_legend_handles_labels()[0], fontsize=9)
    without = [name for name in table.outcomes if name not in runs]
    caption = f"{CAPTION} Heat maps: rank row (up) by round, mean over seeds." + (f" Without a bank that lasts: {', '.join(without)}." if without else "")
    spoken = []
    for name, rows in runs.items():
        _, ranks = mean_over_runs(rows, "effective_rank")
        spoken.append(f"{name} effective rank {ranks[-1]:.1f}")
    return title, caption, f"{title}: {'; '.join(spoken)}"
