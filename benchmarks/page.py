"""`hetlora bench report FILE.json`: one self-contained page and its pictures: shares of the ceilings, other ways, roofline, memory, and curves by rank, clients
and tokens."""

from __future__ import annotations

import argparse
import re
import statistics
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, FileSystemLoader
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from hetlora.report.drawing import BLUE, GREEN, GREY, ORANGE, VERMILION, Picture, is_narrow, legend_below, panels, render, resize
from hetlora.report.page import environment, picture_data
from hetlora.run_folder import write_atomic

from . import compare, figures, lora, roofline

Cases = dict[figures.Key, dict[str, figures.Record]]
Group = tuple[str, str]  # operation, type
MARK = '<meta name="generator" content="hetlora bench">'
LAYER = re.compile(r"(?P<layer>\S+) T=(?P<rows>\d+) r=(?P<rank>\d+)$")  # the clients of a curve have one rank
LOOKS = {"PEFT one by one": (ORANGE, "s"), "torch addmm one by one": (GREEN, "^"), "torch padded bmm": (GREY, "d")}
LOOKS |= {lora.LORAFUSION: ("#222222", "*"), "torch padded grouped_mm": ("#CC79A7", "x"), "torch grouped_mm by rank": ("#882255", "+")}
OWN_LOOKS = ((BLUE, "o"), (VERMILION, "v"), ("#56B4E9", "P"))


def groups(cases: Cases, value: Callable[[Mapping[str, figures.Record]], float | None]) -> dict[Group, list[float]]:
    """{(operation, type): its value in each case that has one}, in the order of the file."""
    found: dict[Group, list[float]] = {}
    for (op, _, _, dtype, _), case in cases.items():
        if (one := value(case)) is not None:
            found.setdefault((op, dtype), []).append(one)
    return found


def own_share(best: figures.Ceilings, case: Mapping[str, figures.Record]) -> float | None:
    ours = figures.own(case)
    of = None if ours is None else figures.share(ours, best)
    return None if of is None else of[0]


def best_other(case: Mapping[str, figures.Record]) -> float | None:
    """The fastest other way's time over this project's."""
    others = figures.alternatives(case)
    return min(others.values()) if others else None


def rows_of(axes: Axes, figure: Figure, found: dict[Group, list[float]]) -> None:
    """A line of the axes for each group, with its name."""
    resize(figure, 9, 1.5 + 0.27 * len(found))
    names = [f"{op}, {dtype}" for op, dtype in found]
    if is_narrow(figure):
        names = [name.replace(", clipped and regularised", ", all").replace(", forward and backward", "") for name in names]
    axes.set_yticks(range(len(found)), names, fontsize=7.5)
    axes.set_ylim(len(found) - 0.4, -0.6)
    axes.grid(axis="y", visible=False)


def draw_shares(found: dict[Group, list[float]], figure: Figure) -> tuple[str, str, str]:
    axes = figure.subplots()
    rows_of(axes, figure, found)
    for place, values in enumerate(found.values()):
        middle = 100 * statistics.median(values)
        axes.barh(place, middle, 0.66, color=BLUE)
        if len(values) > 1:
            axes.plot([100 * value for value in values], [place] * len(values), linestyle="", marker="|", color="black", markersize=6)
        axes.annotate(f"{middle:.0f}", (max(middle, 100 * max(values)), place), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    axes.axvline(100, color=GREY, linewidth=1)
    axes.set_xlim(0, max(115.0, 112 * max(max(values) for values in found.values())))
    axes.set_xlabel("% of the ceiling" if is_narrow(figure) else "% of the ceiling that was measured in the same run")
    caption = "Bars: median over the shapes, clients and threads measured; strokes: each of them. The server's operations are held against copying or reading "
    caption += "as many bytes, layers against their products at the best measured rate. A copy writes as much as it reads, so what mostly reads may pass 100 %."
    caption += " Products of a 16-bit type are held against those of float32 where these are faster, for each of its numbers is a float32 too."
    return "Share of the device's ceiling", caption, "Bars of the share of the ceiling: " + told(found, lambda value: f"{100 * value:.0f} %")


def draw_ratios(found: dict[Group, list[float]], figure: Figure) -> tuple[str, str, str]:
    axes = figure.subplots()
    rows_of(axes, figure, found)
    axes.set_xscale("log")
    for place, values in enumerate(found.values()):
        middle = statistics.median(values)
        axes.barh(place, middle - 1, 0.66, left=1, color=BLUE if middle >= 1 else VERMILION)
        if len(values) > 1:
            axes.plot(values, [place] * len(values), linestyle="", marker="|", color="black", markersize=6)
        axes.annotate(f"{middle:.2f}", (max(1.0, middle, *values), place), (4, 0), textcoords="offset points", va="center", fontsize=7.5)
    every = [value for values in found.values() for value in values]
    low, high = min(0.8, *every) / 1.05, max(1.5, *every) * (1.7 if is_narrow(figure) else 1.3)
    axes.set_xlim(low, high)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if low <= tick <= high]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.axvline(1, color=GREY, linewidth=1)
    axes.set_xlabel("fastest other way / hetlora" if is_narrow(figure) else "time of the fastest other way / time of hetlora")
    caption = "Right of 1 hetlora is faster (blue), left of it slower (red). The other way is the fastest of those measured beside it in the same rounds: "
    caption += "PyTorch's own forms, and stock PEFT. Bars: median over the cases; strokes: each of them."
    return "Against the fastest other way", caption, "Bars of the time of the fastest other way over hetlora's: " + told(found, lambda value: f"{value:.2f}")


def overheads(cases: Cases) -> tuple[dict[Group, list[float]], dict[Group, list[float]]]:
    """{(operation, type): time over the frozen layer, base or head, less one} of hetlora and of the fastest other way, of the cases that have such a floor."""

    def of(case: Mapping[str, figures.Record], record: figures.Record | None) -> float | None:
        floored = record is not None and record["yardstick"].startswith("frozen") and record["yardstick"] in case
        return figures.overhead(record, case) if record is not None and floored else None

    def fastest(case: Mapping[str, figures.Record]) -> figures.Record | None:
        others = figures.alternatives(case)
        return case[min(others, key=lambda name: others[name])] if others else None

    return groups(cases, lambda case: of(case, figures.own(case))), groups(cases, lambda case: of(case, fastest(case)))


def draw_overheads(found: tuple[dict[Group, list[float]], dict[Group, list[float]]], figure: Figure) -> tuple[str, str, str]:
    own, others = found
    axes = figure.subplots()
    rows_of(axes, figure, own)
    for side, values, colour, name in ((-0.2, own, BLUE, "hetlora"), (0.2, others, ORANGE, "fastest other way")):
        for place, group in enumerate(own):
            each = [100 * value for value in values.get(group, [])]
            if not each:
                continue
            middle = statistics.median(each)
            axes.barh(place + side, middle, 0.36, color=colour, label=None if axes.get_legend_handles_labels()[1][-1:] == [name] else name)
            if len(each) > 1:
                axes.plot(each, [place + side] * len(each), linestyle="", marker="|", color="black", markersize=5)
            axes.annotate(f"{middle:.0f}", (max(0.0, middle, *each), place + side), (4, 0), textcoords="offset points", va="center", fontsize=7)
    axes.axvline(0, color=GREY, linewidth=1)
    axes.margins(x=0.12)
    axes.set_xlabel("% over the frozen layer" if is_narrow(figure) else "% of time over the frozen layer, base or head")
    figure.legend(fontsize=8, loc="outside lower center", ncols=1 if is_narrow(figure) else 2, frameon=False)
    caption = "What adapters cost beside the same products with frozen weights alone, in the same rounds. Bars: median over the cases; strokes: each of them. "
    caption += "Below 0: the frozen layer or head is torch's, and takes longer alone than this way takes with adapters."
    text = told(own, lambda value: f"{100 * value:.0f} %")
    return "Overhead over the frozen layer", caption, f"Bars of the overhead over the frozen layer. hetlora: {text}"


def told(found: dict[Group, list[float]], text: Callable[[float], str]) -> str:
    return "; ".join(f"{op}, {dtype}: {text(statistics.median(values))}" for (op, dtype), values in found.items())


Memory = dict[Group, tuple[float, dict[str, float]]]  # MiB of this project, and of other ways


def memory(cases: Cases) -> Memory:
    """Of each operation and type the case in which a way takes the most; what takes less than a MiB in every way is left out."""
    found: Memory = {}
    for (op, _, _, dtype, _), case in cases.items():
        ours = figures.own(case)
        others = {name: case[name]["peak_extra_bytes"] / 2**20 for name in figures.alternatives(case) if case[name].get("peak_extra_bytes") is not None}
        if ours is None or ours.get("peak_extra_bytes") is None or not others:
            continue
        own = ours["peak_extra_bytes"] / 2**20
        before = found.get((op, dtype), (0.0, {"": 1.0}))
        if max(own, *others.values()) > max(before[0], *before[1].values()):
            found[op, dtype] = own, others
    return found


def draw_memory(found: Memory, figure: Figure) -> tuple[str, str, str]:
    axes = figure.subplots()
    rows_of(axes, figure, {(op, f"{dtype}: {own:.3g} MiB"): [] for (op, dtype), (own, _) in found.items()})
    most = max(max(own, *others.values()) for own, others in found.values())
    for place, (own, others) in enumerate(found.values()):
        axes.barh(place, own, 0.66, color=BLUE, label="hetlora" if place == 0 else None)
        names = ("the other way that takes least", "that takes most") if place == 0 else (None, None)
        for value, colour, mark, name in zip((min(others.values()), max(others.values())), (ORANGE, GREY), "sd", names, strict=True):
            axes.plot(value, place, linestyle="", marker=mark, color=colour, label=name)
    axes.set_xlim(0, 1.05 * most)
    axes.set_xlabel("MiB")
    figure.legend(fontsize=8, loc="outside lower center", ncols=1 if is_narrow(figure) else 3, frameon=False)
    caption = "How far memory rises above what is held before the call, as the system or the device tells it; the numbers are hetlora's. Of each operation the "
    caption += "case in which a way takes the most. Operations that take less than a MiB in every way are not shown."
    text = "; ".join(f"{op}, {dtype}: {own:.3g} MiB, other ways {min(o.values()):.3g} to {max(o.values()):.3g}" for (op, dtype), (own, o) in found.items())
    return "Memory of a call", caption, f"Bars of memory. {text}"


Curve = dict[str, dict[int, float]]  # provider -> rank, clients or tokens -> time over the frozen layer


def curves(cases: Cases) -> dict[Group, tuple[str, dict[str, Curve]]]:
    """{(operation, type): (where, {by what: curve})}: by rank for one client, by clients of one rank, of the layer, rows and threads that have the most points;
    by tokens of each client, of the number of clients and rank that have the most numbers of rows there. A curve has two points at least.
    """
    by_place: dict[Group, dict[tuple[str, int, int], list[tuple[int, int, Mapping[str, figures.Record]]]]] = {}
    for (op, shape, clients, dtype, threads), case in cases.items():
        match = LAYER.match(shape)
        if op.startswith("lora_linear") and match and all(record["yardstick"] == "frozen layer" for record in case.values()):
            place = (match["layer"], int(match["rows"]), threads)
            by_place.setdefault((op, dtype), {}).setdefault(place, []).append((int(match["rank"]), clients, case))
    found = {}
    for group, places in by_place.items():
        (layer, rows, threads), points = max(places.items(), key=lambda pair: len(pair[1]))
        single = [(rank, case) for rank, clients, case in points if clients == 1]
        ranks = [rank for rank, clients, _ in points if clients > 1]
        common = statistics.mode(ranks) if ranks else None
        many = [(clients, case) for rank, clients, case in points if common is not None and rank == common]
        of_rank = "" if common is None else f", clients of rank {common}"
        by_load: dict[tuple[int, int], list[tuple[int, Mapping[str, figures.Record]]]] = {}
        for (other, all_rows, count), own in places.items():
            if (other, count) == (layer, threads):
                for rank, clients, case in own:
                    by_load.setdefault((clients, rank), []).append((all_rows // clients, case))
        (clients, rank), by_tokens = max(by_load.items(), key=lambda pair: (len(pair[1]), pair[0][0]))
        of_load = f"; tokens of {clients} client{'s' * (clients > 1)} of rank {rank}"
        lines = {"rank of the one client": curve(single), "clients": curve(many), "tokens of each client": curve(by_tokens)}
        shown = {label: line for label, line in lines.items() if len(next(iter(line.values()), {})) > 1}
        if shown:
            of_load = of_load if "tokens of each client" in shown else ""
            found[group] = (f"{layer}, {rows} rows, {threads} thread{'s' * (threads > 1)}; ranks at one client{of_rank}{of_load}", shown)
    return found


def curve(points: list[tuple[int, Mapping[str, figures.Record]]]) -> Curve:
    lines: Curve = {}
    for at, case in sorted(points, key=lambda point: point[0]):
        for name, record in case.items():
            if name not in figures.FLOORS and name != "hetlora reference" and "compiled" not in name:
                lines.setdefault(name, {})[at] = record["ratio"]
    return lines


def draw_curves(group: Group, where: str, shown: dict[str, Curve], figure: Figure) -> tuple[str, str, str]:
    for axes, (label, lines) in zip(panels(figure, len(shown)), shown.items(), strict=True):
        ticks = sorted({at for line in lines.values() for at in line})
        for place, (name, line) in enumerate(sorted(lines.items(), key=lambda pair: not pair[0].startswith("hetlora"))):
            colour, mark = LOOKS.get(name, OWN_LOOKS[place % len(OWN_LOOKS)])
            axes.plot(list(line), list(line.values()), color=colour, marker=mark, label=name)
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_locator(FixedLocator(ticks))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.axhline(1, color=GREY, linewidth=1)
        axes.set_ylim(0, None)
        axes.set_xlabel(label)
        axes.set_ylabel("time / frozen layer")
    named = {line.get_label(): line for axes in figure.axes for line in axes.get_legend_handles_labels()[0]}  # some ways need several clients
    legend_below(figure, 3, list(named.values()), fontsize=8)
    op, dtype = group
    title = f"{op}, {dtype}: by rank, clients and tokens" if len(shown) == 3 else f"{op}, {dtype}: by {' and by '.join(label.split()[0] for label in shown)}"
    caption = f"Forward and backward over the frozen layer's time in the same rounds (grey line: 1, no cost at all). {where}."
    return title, caption, f"Curves of {title}. {where}."


def draw_all(data: Mapping[str, Any]) -> dict[str, Picture]:
    cases, best = figures.by_case(data["results"]), figures.ceilings(data["results"])
    pictures = {}
    if shares := groups(cases, partial(own_share, best)):
        pictures["shares"] = render(partial(draw_shares, shares))
    if ratios := groups(cases, best_other):
        pictures["ratios"] = render(partial(draw_ratios, ratios))
    if (over := overheads(cases))[0]:
        pictures["overhead"] = render(partial(draw_overheads, over))
    if roofs := roofline.roofs(cases, best):
        pictures["roofline"] = render(partial(roofline.draw, roofs))
    for group, (where, lines) in curves(cases).items():
        name = re.sub(r"[^\w.]+", "-", f"curves {group[0]} {group[1]}").strip("-")
        pictures[name] = render(partial(draw_curves, group, where, lines))
    if held := memory(cases):
        pictures["memory"] = render(partial(draw_memory, held))
    return pictures


def tiles(data: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(title, value, remark) of the ceilings."""
    found, best = [], figures.ceilings(data["results"])
    for (what, dtype, threads), value in best.items():
        text = f"{value / 1e12:.3g} TFLOP/s" if what == "product" and value >= 1e12 else f"{value / 1e9:.3g} {'GFLOP/s' if what == 'product' else 'GB/s'}"
        remark = "" if what != "product" or figures.product(best, dtype, threads) == (value, "product") else "; as float32 it is faster"
        found.append((f"{what}, {dtype}", text, f"{threads} thread{'s' * (threads > 1)}, the best measured{remark}"))
    return found


def warned(data: Mapping[str, Any]) -> list[str]:
    found = ["These are tiny shapes: the figures mean nothing."] if data.get("measurement") is False else []
    if text := compare.busy(data):
        found.append(f"Other work was running on the machine: {text}.")
    found += ["The caches were overwritten before every call."] if data.get("cold") else []
    return found + [f"Not measured: {text}" for text in data.get("refused") or []]


def left_out(data: Mapping[str, Any]) -> list[str]:
    left = data.get("left_out") or []
    return [left] if isinstance(left, str) else left


def about(data: Mapping[str, Any]) -> str:
    device = data["device"]
    parts = [f"{device.get('cpu', 'processor not named')}, {device.get('cores', '?')} cores", str(device.get("system", "system not named"))]
    if "gpu" in device:
        parts.insert(0, f"compute capability {device.get('capability')}, {device.get('memory_gb')} GB")
    rungs = list((data.get("backends") or {}).values())
    parts += [f"{rungs.count(rung)} operations on the {rung} rung" for rung in dict.fromkeys(rungs)]
    return "; ".join([*parts, ", ".join(f"{package} {version}" for package, version in data["versions"].items())])


def rows(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Every figure as text."""
    cases, best = figures.by_case(data["results"]), figures.ceilings(data["results"])
    ceilings = [(figures.key(record), {record["provider"]: record}) for record in data["results"] if figures.is_ceiling(record)]
    found = []
    for of, case in [*ceilings, *cases.items()]:
        others = figures.alternatives(case)
        for place, (name, record) in enumerate(case.items()):
            share = figures.share(record, best) if name != record["yardstick"] else None
            span = f"{figures.seconds(record['p20_s'])} to {figures.seconds(record['p80_s'])}"
            if "device_s" in record:
                span += f"; {figures.seconds(record['device_s'])} between events on the device"
            held = [f"{100 * share[0]:.0f} % of {share[1]}"] if share else []
            held += [f"{100 * record['modelled_s'] / record['median_s']:.0f} % of the modelled floor"] if record.get("modelled_s") else []
            cells = [name, figures.seconds(record["median_s"]), span, figures.rate(record), ", ".join(held), figures.memory(record)]
            found.append({"case": figures.title(of) if place == 0 else "", "cells": [*cells, f"{others[name]:.2f}" if name in others else ""]})
    return found


def arguments(argv: list[str], prog: str, parser_class: type[argparse.ArgumentParser]) -> argparse.Namespace:
    parser = parser_class(prog=prog, description=__doc__)
    parser.add_argument("file", type=Path, metavar="FILE.json")
    parser.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder of page and pictures [default: that of the file]")
    return parser.parse_args(argv)


def main(options: argparse.Namespace) -> int:
    data = compare.read(options.file)
    folder = options.output or options.file.parent
    folder.mkdir(parents=True, exist_ok=True)
    page = folder / f"{options.file.stem}.html"
    if page.exists() and MARK not in page.read_text(encoding="utf-8", errors="replace")[:2000]:
        raise ValueError(f"{page}: exists and is no page of hetlora bench; name another folder with --output")
    pictures = {f"{options.file.stem}-{name}.png": picture for name, picture in draw_all(data).items()}
    made = environment()
    made.loader = ChoiceLoader([made.loader, FileSystemLoader(Path(__file__).parent)])
    text = made.get_template("page.html.j2").render(
        mark=MARK,
        name=data["device"].get("gpu") or data["device"].get("cpu"),
        about=about(data),
        date=data.get("date", "without a date"),
        command=data.get("command"),
        warnings=warned(data),
        left_out=left_out(data),
        tiles=tiles(data),
        pictures=picture_data(pictures),
        rows=rows(data),
    )
    for name, picture in pictures.items():
        write_atomic(folder / name, picture.png)
    write_atomic(page, text)
    print(f"report: {page} ({len(pictures)} pictures)")
    return 0
