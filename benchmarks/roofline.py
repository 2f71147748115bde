"""The roofline of `hetlora bench report`: achieved operations a second against operations for each byte, under the ceilings measured in the same run.

The roof is min(best product, best copy x operations for each byte) of one type and number of threads (Williams, Waterman, Patterson, CACM 2009).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from hetlora.report.drawing import BLUE, GREY, ORANGE, is_narrow, panels

from . import figures

Place = tuple[str, int]  # type, threads
Point = tuple[float, float]  # operations for each byte, operations a second


@dataclass
class Roof:
    copy: float  # bytes a second
    product: float  # operations a second
    own: list[Point]
    others: list[Point]  # the fastest other way of each case

    def at(self, intensity: float) -> float:
        return min(self.product, self.copy * intensity)


def point(record: figures.Record) -> Point:
    return record["flops"] / record["bytes"], record["flops"] / record["median_s"]


def roofs(cases: Mapping[figures.Key, Mapping[str, figures.Record]], best: figures.Ceilings) -> dict[Place, Roof]:
    """{(type, threads): its ceilings and points}, of the types that have both ceilings and a case whose operations are counted."""
    found: dict[Place, Roof] = {}
    for (_, _, _, dtype, threads), case in cases.items():
        ours, copy, product = figures.own(case), best.get(("copy", dtype, threads)), figures.product(best, dtype, threads)
        if ours is None or not ours.get("flops") or not copy or not product:
            continue
        roof = found.setdefault((dtype, threads), Roof(copy, product[0], [], []))
        roof.own.append(point(ours))
        if others := figures.alternatives(case):
            roof.others.append(point(case[min(others, key=lambda name: others[name])]))
    return found


def draw(found: Mapping[Place, Roof], figure: Figure) -> tuple[str, str, str]:
    """A panel for each type and number of threads."""
    said = []
    for axes, ((dtype, threads), roof) in zip(panels(figure, len(found)), found.items(), strict=True):
        every = [x for x, _ in (*roof.own, *roof.others)]
        edge = roof.product / roof.copy
        low, high = min(*every, edge) / 2, max(*every, edge) * 2
        turns = [low, edge, high]
        axes.plot(turns, [roof.at(x) / 1e9 for x in turns], color="black", linewidth=1.2, label="ceiling: copy, product")
        for points, colour, mark, name in ((roof.others, ORANGE, "s", "fastest other way"), (roof.own, BLUE, "o", "hetlora")):
            axes.plot([x for x, _ in points], [y / 1e9 for _, y in points], linestyle="", marker=mark, markersize=4.5, alpha=0.75, color=colour, label=name)
        axes.axvline(edge, color=GREY, linewidth=0.8, linestyle=":")
        axes.set_xscale("log")
        axes.set_yscale("log")
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axis.set_minor_formatter(NullFormatter())
        axes.set_xlim(low, high)
        axes.set_xlabel("operations / byte")
        axes.set_ylabel("GFLOP/s")
        axes.set_title(f"{dtype}, {threads} thread{'s' * (threads > 1)}")
        shares = sorted(y / roof.at(x) for x, y in roof.own)
        said.append(f"{dtype}, {threads} thread{'s' * (threads > 1)}: hetlora at {100 * shares[0]:.0f} to {100 * shares[-1]:.0f} % of the ceiling")
    lines, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(lines, labels, fontsize=8, loc="outside lower center", ncols=1 if is_narrow(figure) else 3, frameon=False)
    caption = "Each point is a case of the layer or the loss, forward and backward: the operations of its products over its bytes (inputs, "
    caption += "outputs, weight, once each). Left of the dotted line copying bounds it, right of it multiplying. Both ceilings are "
    caption += "the best that this run measured, so what lies in the cache may be above the slope."
    caption += " A 16-bit type is under float32's products where those are faster."
    return "Roofline of the layer and the loss", caption, "Roofline. " + "; ".join(said)
