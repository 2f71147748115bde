"""Pictures of the diagnostics: energy of each rank row by round, effective rank, and the error of averaging A and B apart."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.ticker import MaxNLocator

from hetlora.report.drawing import BLUE, VERMILION, empty, is_narrow, legend_below, marker_size, panels
from hetlora.run_folder import Run

Diagnosed = list[tuple[int, dict[str, Any]]]  # (round, its diagnostics)
_LEAST = 1e-6  # shares below this have the colour of this


def diagnosed(run: Run) -> Diagnosed:
    return [(record["round"], record["diagnostics"]) for record in run.trained if record.get("diagnostics")]


def mean_over_runs(runs: Sequence[Diagnosed], key: str) -> tuple[list[int], list[float]]:
    """(rounds, mean over runs) of one number, where every run has it."""
    tables = [{number: values[key] for number, values in run if values.get(key) is not None} for run in runs]
    rounds = sorted(set.intersection(*map(set, tables))) if tables else []
    return rounds, [statistics.fmean(table[number] for table in tables) for number in rounds]


def draw_energy(axes: Axes, runs: Sequence[Diagnosed], title: str) -> AxesImage:
    """Heat map, rank row by round: the row's share of the bank's energy, mean over runs."""
    rounds = [number for number, _ in runs[0]]
    height = max(len(values["row_energy"]) for run in runs for _, values in run)
    shares = [[0.0] * len(rounds) for _ in range(height)]
    for run in runs:
        for column, (_, values) in enumerate(run):
            total = sum(values["row_energy"]) or 1.0
            for row, energy in enumerate(values["row_energy"]):
                shares[row][column] += energy / total / len(runs)
    grid = [[max(share, _LEAST) for share in row] for row in shares]
    extent = (rounds[0] - 0.5, rounds[-1] + 0.5, 0.5, height + 0.5)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis", norm=LogNorm(_LEAST, 1), extent=extent, origin="lower")
    axes.grid(False)
    axes.set_title(title if len(title) < 30 else title.replace("+", "\n+"), fontsize=10)  # a comparison's 'method+setting=value+...'
    axes.set_xlabel("round")
    axes.set_ylabel("rank row")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    return image


def energy_bar(figure: Figure, image: AxesImage, beside: list[Axes]) -> None:
    """The scale of `draw_energy`, with plain numbers: the style has mathematics switched off."""
    bar = figure.colorbar(image, ax=beside, shrink=0.7, label="share of the energy")
    bar.ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")


CAPTION = (
    "Energy of a rank row: sum over modules of ||b_i||² ||a_i||², as its share of the round's total. Effective rank: exp of the entropy of the singular "
    "values of B A, mean over modules. Merge error: distance of the new bank's B A from the exact weighted sum of the uploads' products, relative to the sum."
)


def draw_run(run: Run, figure: Figure) -> tuple[str, str, str]:
    title = "Rank rows of the bank by round, and the error of the merge"
    rows = diagnosed(run)
    if not rows:
        axes = figure.subplots()
        empty(axes, "No diagnostics are on record.")
        return title, "No diagnostics are on record.", title + ": none on record"
    left, right = panels(figure, 2)
    image = draw_energy(left, [rows], "share of the energy by rank row")
    energy_bar(figure, image, [left])
    rounds, ranks = mean_over_runs([rows], "effective_rank")
    right.plot(rounds, ranks, color=BLUE, marker="o", markersize=marker_size(rounds), label=f"effective rank: {ranks[-1]:.1f} at the end")
    right.set_ylim(bottom=0)
    right.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    right.set_xlabel("round")
    right.set_ylabel("effective rank")
    lines = right.get_lines()
    with_error, errors = mean_over_runs([rows], "merge_error")
    if errors:
        other = right.twinx()
        other.plot(with_error, errors, color=VERMILION, marker="s", markersize=marker_size(rounds), label=f"merge error: {errors[-1]:.2f} at the end")
        other.set_ylim(bottom=0)
        other.set_ylabel("merge error (relative)")
        other.grid(False)
        lines = [*lines, *other.get_lines()]
    legend_below(figure, 1 if is_narrow(figure) else 2, lines)
    figure.suptitle(title, x=0.01, ha="left", fontsize=12)
    spoken = f"; merge error {errors[-1]:.3f}" if errors else ""
    return title, CAPTION, f"{title}: effective rank {ranks[0]:.1f} in round {rounds[0]}, {ranks[-1]:.1f} in round {rounds[-1]}{spoken}"
