"""The pictures of a run's report: perplexity, ranks, aggregation weights, bytes, and diagnostics where the run recorded them."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from hetlora.report.diagnostics import draw_run
from hetlora.report.drawing import BLUE, GREY, MOST_LABELS, ORANGE, VERMILION, Picture, empty, is_narrow, legend_below, log_axis, marker_size, render, resize
from hetlora.report.text import perplexity_of
from hetlora.report.verdict import rank_groups
from hetlora.run_folder import DIAGNOSTICS, PICTURES, Run, mean_rank

_MOST_NAMES = 3
_MOST_ROWS = 40  # clients that the heat map shows one by one
_SMALLEST_ROW = 7  # points that a row of the heat map needs for a name one can read


def _short(name: str, length: int) -> str:
    return name if len(name) <= length else name[: length - 1] + "…"


def draw_all(run: Run) -> dict[str, Picture]:
    """File name -> picture, in reading order."""
    drawn: dict[str, Callable[[Run, Figure], tuple[str, str, str]]] = dict(zip(PICTURES, (_perplexity, _ranks, _weights, _bytes), strict=True))
    if any(record.get("diagnostics") for record in run.records):
        drawn[DIAGNOSTICS] = draw_run
    return {name: render(partial(draw, run)) for name, draw in drawn.items()}


def _round_axis(axes: Axes, run: Run) -> None:
    last = max(run.records[-1]["round"], 1)
    margin = max(0.1, 0.015 * last)
    axes.set_xlim(-margin, last + margin)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6 if is_narrow(axes.figure) else 12, min_n_ticks=1))
    axes.set_xlabel("round" if run.complete else "round (the run is not complete)")


def _perplexity(run: Run, figure: Figure) -> tuple[str, str, str]:
    title = "Perplexity of the global adapter by round"
    axes = figure.subplots()
    axes.set_title(title)
    spoken, shown, left_out = [], [], 0
    for part, name, colour, marker in (
        ("client_text", "clients' held-out text", BLUE, "o"),
        ("held_out_clients", "held-out clients (never train)", VERMILION, "s"),
    ):
        points = [(r["round"], float(p)) for r in run.records if (p := perplexity_of(r.get("evaluation"), part)) is not None]
        finite = [(x, y) for x, y in points if math.isfinite(y)]
        left_out += len(points) - len(finite)
        if not finite:
            continue
        xs, ys = [x for x, _ in finite], [y for _, y in finite]
        axes.plot(xs, ys, color=colour, marker=marker, markersize=marker_size(xs), label=f"{name}: {ys[0]:.2f} → {ys[-1]:.2f}")
        axes.axhline(ys[0], color=colour, linestyle=":", linewidth=1)
        shown += ys
        spoken.append(f"{name} from {ys[0]:.2f} in round {xs[0]} to {ys[-1]:.2f} in round {xs[-1]}")
    if not spoken:
        empty(axes, "No evaluation is on record.")
        return title, "No evaluation is on record.", title + ": none on record"
    _round_axis(axes, run)
    axes.set_ylabel("perplexity per token (lower is better)")
    log = log_axis(axes, shown)
    axes.plot([], [], color=GREY, linestyle=":", linewidth=1, label="before training")
    legend_below(figure, 1 if is_narrow(figure) else 3)
    caption = "Measured on text that no client trains on. The axis " + ("is logarithmic." if log else "does not start at 0.")
    if left_out:
        caption += f" {left_out} values that are infinite or not a number are left out."
    return title, caption, f"{title}: " + "; ".join(spoken)


def _rank_paths(run: Run) -> dict[str, list[tuple[int, float]]]:
    """Client -> (round, rank after it), from (0, start) on; a point for each round it trained in."""
    paths = {name: [(0, rank)] for name, rank in run.start_ranks.items()}
    for record in run.trained:
        for client in record.get("clients") or []:
            paths[client["name"]].append((record["round"], mean_rank(client["rank"])))
    return paths


def _ranks(run: Run, figure: Figure) -> tuple[str, str, str]:
    title = "Rank of each client by round"
    axes = figure.subplots()
    axes.set_title(title)
    paths, last = _rank_paths(run), max(run.records[-1]["round"], 1)
    if not paths:
        empty(axes, "No client's rank is on record.")
        return title, "No client's rank is on record.", title + ": none on record"
    pruned = {name for name, path in paths.items() if path[-1][1] < path[0][1]}
    cuts = [(x, y) for path in paths.values() for (_, before), (x, y) in pairwise(path) if y < before]
    alpha = 0.9 if len(paths) <= MOST_LABELS else 0.5
    for name, path in sorted(paths.items(), key=lambda item: item[0] in pruned):
        xs, ys = [x for x, _ in path] + [last], [y for _, y in path] + [path[-1][1]]
        hot = name in pruned
        axes.step(xs, ys, where="post", color=BLUE if hot else "#999999", linewidth=1.3 if hot else 1.0, alpha=alpha, zorder=3 if hot else 2)
    if cuts:
        axes.plot(*zip(*cuts, strict=True), linestyle="none", marker="v", markersize=5, color=VERMILION, zorder=4, label=f"pruned ({len(cuts)} times)")
    means = [(r["round"], r["mean_rank"]) for r in run.records if r.get("mean_rank") is not None]
    if means:
        label = f"mean of all clients: {means[0][1]:.1f} → {means[-1][1]:.1f}"
        axes.plot(*zip(*means, strict=True), color="black", linewidth=2, linestyle="--", zorder=5, label=label)
    if pruned:
        axes.plot([], [], color=BLUE, label=f"a client that pruned ({len(pruned)})")
    if len(pruned) < len(paths):
        idle = sum(len(path) == 1 for path in paths.values())
        also = f", {idle} of them never trained" if idle else ""
        axes.plot([], [], color="#999999", label=f"a client that kept its rank ({len(paths) - len(pruned)}{also})")
    _round_axis(axes, run)
    axes.set_ylim(bottom=0)
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axes.set_ylabel("rank" if run.config.get("prune_scope") != "module" else "rank (mean over modules)")
    _label_ends(axes, paths, last)
    legend_below(figure, 1 if is_narrow(figure) else 2)
    caption = (
        "Each line is a client; a triangle is a round in which it pruned itself. Lines of equal rank lie on one another; the right edge says who ends there."
    )
    if not pruned:
        caption += " No client pruned in this run."
    return title, caption, f"{title}: {len(paths)} clients, {len(pruned)} of them pruned, {len(cuts)} prunings in all"


def _label_ends(axes: Axes, paths: dict[str, list[tuple[int, float]]], last: int) -> None:
    """At the right edge: who ends at which rank. Labels that would touch are merged into one with a count."""
    top = max(y for path in paths.values() for _, y in path)
    ends: dict[float, list[str]] = {}
    for name, path in paths.items():
        ends.setdefault(path[-1][1], []).append(name)
    groups: list[tuple[list[float], list[str]]] = []
    for rank in sorted(ends):
        if groups and rank - groups[-1][0][0] < 0.045 * top:
            groups[-1][0].append(rank)
            groups[-1][1].extend(ends[rank])
        else:
            groups.append(([rank], list(ends[rank])))
    for ranks, names in groups:
        low, high = (f"{edge:g}" if float(edge).is_integer() else f"{edge:.1f}" for edge in (ranks[0], ranks[-1]))
        whose = ", ".join(_short(name, 16) for name in names) if len(names) <= (1 if is_narrow(axes.figure) else _MOST_NAMES) else f"{len(names)} clients"
        where = (last, sum(ranks) / len(ranks))
        text = f"{low if low == high else f'{low}-{high}'}: {whose}"
        axes.annotate(text, where, xytext=(8, 0), textcoords="offset points", va="center", fontsize=8, color=GREY, annotation_clip=False)


def _weights(run: Run, figure: Figure) -> tuple[str, str, str]:
    title = "Weight of each upload in the round's average"
    rounds = [record["round"] for record in run.trained]
    uploads = {(c["name"], r["round"]): c.get("weight") for r in run.trained for c in r.get("clients") or []}
    drops = [(d["name"], r["round"]) for r in run.trained for d in r.get("dropped") or []]
    names = sorted({name for name, _ in [*uploads, *drops]})
    axes = figure.subplots()
    axes.set_title(title)
    if not names:
        empty(axes, "No upload is on record.")
        return title, "No upload is on record.", title + ": none on record"
    if run.config.get("secure_aggregation"):
        hidden = "Not known: secure aggregation hides each client's weight."
        empty(axes, hidden)
        return title, hidden, f"{title}: {hidden.lower()}"
    grouped = len(names) > _MOST_ROWS
    if grouped:  # one row for all clients of a rank: hundreds of rows cannot be read
        groups = rank_groups({name: run.start_ranks[name] for name in names})
        of = {name: f"rank {label}: {len(own)} clients" for label, own in groups.items() for name in own}
    else:
        of = {name: name for name in names}
    names, sampled = list(dict.fromkeys(sorted(of.values(), key=list(of.values()).index))), set(names)
    resize(figure, max(6.5, min(14, 3.5 + 0.32 * len(rounds))), max(3.2, min(16, 1.6 + (0.35 if grouped else 0.2) * len(names))))
    row, column = {name: i for i, name in enumerate(names)}, {round: i for i, round in enumerate(rounds)}
    grid = [[math.nan] * len(rounds) for _ in names]
    for (name, round), weight in uploads.items():
        if weight is not None:
            cell = grid[row[of[name]]]
            cell[column[round]] = float(weight) + (0.0 if math.isnan(cell[column[round]]) else cell[column[round]])
    axes.set_facecolor("#eeeeee")
    axes.grid(False)
    image = axes.imshow(grid, aspect="auto", interpolation="nearest", cmap="viridis_r", vmin=0)
    if drops:
        points = ([column[r] for _, r in drops], [row[of[n]] for n, _ in drops])
        axes.plot(*points, linestyle="none", marker="x", color=VERMILION, markersize=7, markeredgewidth=2, label="dropped")
        legend_below(figure, 1)
    row_points = 72 * (figure.get_figheight() - 1.2) / len(names)
    every = math.ceil(_SMALLEST_ROW / row_points)
    axes.set_yticks(
        range(0, len(names), every),
        [_short(name, 16 if is_narrow(figure) and not grouped else 28) for name in names[::every]],
        fontsize=min(8, 0.75 * row_points * every),
    )
    axes.set_ylabel("clients by rank at the start" if grouped else "client")
    step = math.ceil(len(rounds) / (10 if is_narrow(figure) else 25))
    axes.set_xticks(range(0, len(rounds), step), [str(round) for round in rounds[::step]])
    axes.set_xlabel("round" if run.complete else "round (the run is not complete)")
    by_module = run.config.get("weights") == "sparsity" and run.config.get("weight_scope") == "module"
    figure.colorbar(
        image,
        ax=axes,
        label="weight" + (", mean over modules" if by_module else ""),
        aspect=max(15, 4 * figure.get_figheight()),
    )
    caption = f"Grey: not sampled in that round. The weights of a round add up to 1. Weights here: {run.config.get('weights', 'not recorded')}."
    if grouped:
        caption += f" More than {_MOST_ROWS} clients: a row is all clients of a rank, its weight the sum of theirs."
    never = len(run.start_ranks.keys() - sampled)
    caption += f" {never} clients that were never sampled are not shown." if never else ""
    caption += f" Every {every}th name is written." if every > 1 else ""
    return title, caption, f"{title}: heat map of {len(names)} {'groups of ranks' if grouped else 'clients'} by {len(rounds)} rounds"


def _bytes(run: Run, figure: Figure) -> tuple[str, str, str]:
    title = "Adapter bytes moved, added up over the rounds"
    axes = figure.subplots()
    axes.set_title(title)
    sums: dict[str, list[float]] = {}
    for key in ("bytes_down", "bytes_up", "bytes_down_homlora", "bytes_up_homlora"):
        total, sums[key] = 0.0, []
        for record in run.records:
            total += record.get(key) or 0
            sums[key].append(total)
    rounds = [record["round"] for record in run.records]
    top = max(values[-1] for values in sums.values())
    unit, name = next(((u, n) for u, n in ((1e9, "GB"), (1e6, "MB"), (1e3, "kB")) if top >= u), (1.0, "bytes"))
    rank = f" (r={run.homlora_rank})" if run.homlora_rank else " (largest rank)"
    same = sums["bytes_down_homlora"] == sums["bytes_up_homlora"]
    lines: list[tuple[str, str, dict[str, Any]]] = [
        ("bytes_down_homlora", f"HomLoRA{rank}, " + ("down and up, each" if same else "down"), {"color": GREY, "linestyle": "--"}),
        ("bytes_up_homlora", f"HomLoRA{rank}, up", {"color": "black", "linestyle": ":"}),
        ("bytes_down", "this run, down (server to clients)", {"color": BLUE, "marker": "o", "linewidth": 3}),
        ("bytes_up", "this run, up (clients to server)", {"color": ORANGE, "marker": "^"}),
    ]
    for key, label, look in lines:
        if key == "bytes_up_homlora" and same:
            continue
        values = [value / unit for value in sums[key]]
        axes.plot(rounds, values, markersize=marker_size(rounds), label=f"{label}: {values[-1]:.2f} {name}", **look)
    _round_axis(axes, run)
    axes.set_ylim(bottom=0)
    axes.set_ylabel(f"{name} since the start")
    legend_below(figure, 1 if is_narrow(figure) else 2)
    caption = (
        "Size of the adapter factors that the sampled clients receive and send, computed from their ranks; nothing else that a network adds is counted. "
        "HomLoRA was not run: its lines are what the same clients would move if all had the largest rank."
    )
    spoken = ", ".join(f"{label} {sums[key][-1] / unit:.2f} {name}" for key, label, _ in lines)
    return title, caption, f"{title}: {spoken}"
