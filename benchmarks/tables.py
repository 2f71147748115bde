"""`python -m benchmarks.tables [--check]`: write the tables of the pages from benchmarks/results and the model, between markers that name
file and table.

The table `conditions` is the processor, threads, versions, date and command of a file: a page that shows a file's figures shows these once, or, where another
page has them, `machine`: the processor, threads, torch and date.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from . import model, saved

ROOT = Path(__file__).resolve().parent.parent
MARKED = re.compile(r"(<!-- benchmarks: (?P<file>\S+) (?P<kind>\w+) -->\n).*?(?P<end><!-- benchmarks end -->)", re.DOTALL)


def _row(cells: list[str]) -> str:
    return "| " + " | ".join(cells) + " |"


def _seconds(value: float) -> str:
    return f"{value * 1e3:.3g} ms" if value < 1 else f"{value:.3g} s"


def _memory(value: int | None) -> str:
    return "" if value is None else f"{value / 1e6:.0f} MB"


def server_table(data: dict[str, Any]) -> list[str]:
    lines = [_row(["operation", "shapes", "clients", "type", "threads", "who", "median (p20 to p80)", "GB/s", "time / yardstick", "extra memory"])]
    lines.append("|---|---|--:|---|--:|---|---|--:|--:|--:|")
    for r in data["results"]:
        if r["provider"] != r["yardstick"]:
            spread = f"{_seconds(r['median_s'])} ({_seconds(r['p20_s'])} to {_seconds(r['p80_s'])})"
            note = "" if not r["note"] else f" ({r['note']})"
            cells = [r["op"] + note, r["shape"], str(r["clients"]), r["dtype"], str(r["threads"]), r["provider"], spread, f"{r['gb_per_s']:.1f}"]
            lines.append(_row([*cells, f"{r['ratio']:.2f} x {r['yardstick']}", _memory(r["peak_extra_bytes"])]))
    return lines


def summary_table(data: dict[str, Any]) -> list[str]:
    """This project's best form against PyTorch's best, one line for each case."""
    lines = [_row(["operation", "shapes", "clients", "type", "threads", "hetlora", "time / yardstick", "faster than the best of PyTorch"])]
    lines.append("|---|---|--:|---|--:|--:|--:|--:|")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for r in data["results"]:
        groups.setdefault((r["op"], r["shape"], r["clients"], r["dtype"], r["threads"]), []).append(r)
    for key, records in groups.items():
        own = min((r for r in records if r["provider"].startswith("hetlora")), key=lambda r: r["median_s"])
        other = min((r for r in records if r["provider"].startswith("torch")), key=lambda r: r["median_s"])
        cells = [_seconds(own["median_s"]), f"{own['ratio']:.2f} x {own['yardstick']}", f"{other['median_s'] / own['median_s']:.1f} x"]
        lines.append(_row([str(part) for part in key] + cells))
    return lines


def lora_table(data: dict[str, Any]) -> list[str]:
    """Time over the frozen layer of every provider, one line for each case."""
    names = list(dict.fromkeys(r["provider"] for r in data["results"] if r["provider"] != r["yardstick"]))
    lines = [_row(["layer", "shape", "clients", "type", "threads", "frozen layer", *names]), "|---|---|--:|---|--:|" + "--:|" * (1 + len(names))]
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for r in data["results"]:
        groups.setdefault((r["op"], r["shape"], r["clients"], r["dtype"], r["threads"]), {})[r["provider"]] = r
    for key, own in groups.items():
        base = next(r for name, r in own.items() if name == r["yardstick"])
        cells = [_seconds(base["median_s"]), *(f"{own[name]['ratio']:.2f} x" if name in own else "" for name in names)]
        lines.append(_row([str(part) for part in key] + cells))
    return lines


def lora_summary(data: dict[str, Any]) -> list[str]:
    """One line for each load: medians over the shapes, and the range of the ratio to PEFT."""
    others = ["PEFT one by one", "torch addmm one by one", "torch padded bmm"]
    head = ["layer", "rows, ranks", "clients", "type", "threads", "overhead", *(f"overhead, {name}" for name in others), "time / PEFT (range)", "kept / PEFT"]
    lines = [_row(head), "|---|---|--:|---|--:|" + "--:|" * (len(head) - 5)]
    cases: dict[tuple, dict[str, dict[str, dict[str, Any]]]] = {}
    for r in data["results"]:
        shape, load = r["shape"].split(" ", 1)
        cases.setdefault((r["op"], load, r["clients"], r["dtype"], r["threads"]), {}).setdefault(shape, {})[r["provider"]] = r
    for key, shapes in cases.items():
        own = next(name for name in next(iter(shapes.values())) if name.startswith("hetlora"))
        overheads = [statistics.median(100 * (each[name]["ratio"] - 1) for each in shapes.values()) for name in (own, *others)]
        ratios = [each[own]["ratio_to_peft"] for each in shapes.values()]
        kept = statistics.median(each[own]["saved_bytes"] / max(1, each["PEFT one by one"]["saved_bytes"]) for each in shapes.values())
        span = f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        lines.append(_row([*(str(part) for part in key), *(f"{value:.0f} %" for value in overheads), span, f"{kept:.2f}"]))
    return lines


def peft_table(data: dict[str, Any]) -> list[str]:
    """Time and extra memory of every provider, one line for each case; in brackets the time over stock PEFT's in the same rounds."""
    names = list(dict.fromkeys(r["provider"] for r in data["results"]))
    lines = [_row(["what", "shape", "adapters", "threads", *names, *(f"memory, {name}" for name in names)]), "|---|---|--:|--:|" + "--:|" * (2 * len(names))]
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for r in data["results"]:
        groups.setdefault((r["op"], r["shape"], r["clients"], r["threads"]), {})[r["provider"]] = r
    for key, own in groups.items():
        times = [f"{_seconds(own[name]['median_s'])} ({own[name]['ratio']:.2f} x)" if name in own else "" for name in names]
        memory = [_memory(own[name]["peak_extra_bytes"]) if name in own else "" for name in names]
        lines.append(_row([*(str(part) for part in key), *times, *memory]))
    return lines


def _verdict(value: float, limit: float) -> str:
    return f"{'met' if value <= limit else '**missed**'}, {value:.2f}"


SERVER_TARGETS = [  # name, operations, types, limit of the time over the yardstick
    ("aggregate", "aggregate", "float32", 1.15),
    ("aggregate", "aggregate", "bfloat16", 1.6),
    ("truncate", "truncate", "float32", 1.15),
    ("truncate", "truncate", "bfloat16", 1.6),
    ("Gram", "gram", "float32", 2.0),
    ("Gram", "gram", "bfloat16", 2.0),
    ("AdamW", "adamw", "float32", 1.3),
    ("AdamW, clipped and regularised", "adamw, clipped and regularised", "float32", 1.3),
    ("AdamW", "adamw", "bfloat16", 1.3),
    ("AdamW, clipped and regularised", "adamw, clipped and regularised", "bfloat16", 1.3),
]


def server_targets(data: dict[str, Any]) -> list[str]:
    """The server's targets, with `out=` where an operation takes it, at up to 100 clients."""
    own = [r for r in data["results"] if r["provider"] in ("hetlora", "hetlora out=") and r["clients"] <= 100]
    columns = list(dict.fromkeys((r["shape"], r["threads"]) for r in own))
    names = [f"{shape}, {threads} thread{'s' * (threads > 1)}" for shape, threads in columns]
    lines = [_row(["target", *names]), "|---|" + "---|" * len(columns)]
    for label, op, dtype, limit in SERVER_TARGETS:
        found = {(r["shape"], r["threads"]): r for r in own if (r["op"], r["dtype"]) == (op, dtype)}
        unit = next(iter(found.values()))["yardstick"]
        cells = [_verdict(r["ratio"], limit) + ("" if r["clients"] == 100 else f" ({r['clients']} clients)") for r in map(found.__getitem__, columns)]
        lines.append(_row([f"{label}, {dtype}: {limit:g} x {unit}", *cells]))
    return lines


def _over_peft(data: dict[str, Any], wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    return [r for r in data["results"] if r["provider"] == "hetlora cpu" and wanted(r)]


def _rows_of(r: dict[str, Any]) -> int:
    return int(r["shape"].split(" T=")[1].split(" ")[0])


def _elements_of(r: dict[str, Any]) -> int:
    n, m = r["shape"].split(" ")[0].split("->")
    return int(n) * int(m)


def layer_targets(data: dict[str, Any]) -> list[str]:
    """The layer's time over stock PEFT's: a line for each target, and for what has none."""
    layer = "lora_linear p="
    lines = [_row(["time / stock PEFT", "target", "type", "cases", "median", "range", ""]), "|---|---|---|--:|--:|--:|---|"]

    def add(what: str, limit: float | None, worst: bool, dtype: str, records: list[dict[str, Any]]) -> None:
        ratios = sorted(r["ratio_to_peft"] for r in records)
        value = ratios[-1] if worst else statistics.median(ratios)
        target = "" if limit is None else f"{'every case' if worst else 'median'} <= {limit:g}"
        verdict = "" if limit is None else "met" if value <= limit else "**missed**"
        span = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
        lines.append(_row([what, target, dtype, str(len(ratios)), f"{statistics.median(ratios):.2f}", span, verdict]))

    for dtype in ("float32", "bfloat16"):
        for p in ("0.0", "0.1"):
            for threads in (1, 2):
                same = {"dtype": dtype, "threads": threads, "op": layer + p, "clients": 1}
                own = _over_peft(data, lambda r, same=same: same.items() <= r.items() and _rows_of(r) >= 256)
                add(f"one client, 256 rows or more, dropout {p}, {threads} thread{'s' * (threads > 1)}", 1.0 if p == "0.0" else None, False, dtype, own)
    for dtype in ("float32", "bfloat16"):
        plain = _over_peft(data, lambda r, d=dtype: r["op"] == layer + "0.0" and r["dtype"] == d and r["clients"] == 1 and _rows_of(r) >= 256)
        add("one client, 256 rows or more, no dropout", 1.05, True, dtype, plain)
        add("four or eight clients in one batch", 1.0, True, dtype, _over_peft(data, lambda r, d=dtype: r["dtype"] == d and r["clients"] > 1))
        smallest = _over_peft(data, lambda r, d=dtype: r["op"].startswith("smallest") and r["dtype"] == d)
        add("smallest call, with and without dropout", 0.6, True, dtype, smallest)
        four = _over_peft(data, lambda r, d=dtype: r["op"].startswith(layer) and r["dtype"] == d and _rows_of(r) == 4)
        add("four rows, weights of up to 2^18 elements", None, True, dtype, [r for r in four if _elements_of(r) <= 1 << 18])
        add("four rows, larger weights", None, True, dtype, [r for r in four if _elements_of(r) > 1 << 18])
    return lines


def peft_summary(data: dict[str, Any]) -> list[str]:
    """Fused layers over stock PEFT in a few lines: ranges over the shapes of a layer, and each model."""
    lines = [_row(["float32, time / stock PEFT", "no dropout", "dropout 0.1"]), "|---|--:|--:|"]
    own = [r for r in data["results"] if r["provider"] == "hetlora"]

    def cell(records: Iterable[dict[str, Any]]) -> str:
        ratios = sorted(r["ratio"] for r in records)
        ends = dict.fromkeys(f"{ratio:.2f}" for ratio in (ratios[:1] + ratios[-1:]))
        return " to ".join(ends)

    for text, few in (("one fused layer, one row", True), ("one fused layer, 256 and 1024 rows", False)):
        layers = [r for r in own if r["op"].startswith("layer") and (_rows_of(r) == 1) == few]
        lines.append(_row([text, *(cell(r for r in layers if r["op"].endswith(f"p={p}")) for p in ("0.0", "0.1"))]))
    for shape, clients in dict.fromkeys((r["shape"], r["clients"]) for r in own if r["op"].startswith("training")):
        steps = [r for r in own if (r["shape"], r["clients"]) == (shape, clients)]
        what = "one adapter" if clients == 1 else f"{clients} adapters in one batch / one after another"
        lines.append(_row([f"training step, {shape}, {what}", *(cell(r for r in steps if r["op"].endswith(f"p={p}")) for p in ("0.0", "0.1"))]))
    return lines


def round_table(data: dict[str, Any]) -> list[str]:
    """Seconds of a round by every form, one line for each case: medians, and quotients of the medians that stand in the line."""
    names = [name for name in dict.fromkeys(r["provider"] for r in data["results"]) if name not in ("hetlora", "frozen base")]
    head = ["clients", "tokens a client", "threads", "rounds", "frozen base", "hetlora", "hetlora / base", *names, *(f"{name} / hetlora" for name in names)]
    lines = [_row(head), "|" + "--:|" * len(head)]
    groups: dict[tuple, dict[str, dict[str, Any]]] = {}
    for r in data["results"]:
        groups.setdefault((r["clients"], r["shape"].split(", ")[1].split()[0], r["threads"]), {})[r["provider"]] = r
    for key, own in groups.items():
        ours, base = own["hetlora"], own["frozen base"]
        others = [f"{_seconds(own[name]['median_s'])}" if name in own else "" for name in names]
        ratios = [f"{own[name]['median_s'] / ours['median_s']:.2f} x" if name in own else "" for name in names]
        over_base = f"{ours['median_s'] / base['median_s']:.2f} x"
        lines.append(_row([*map(str, key), _rounds(own), _seconds(base["median_s"]), _seconds(ours["median_s"]), over_base, *others, *ratios]))
    return lines


def _rounds(own: dict[str, dict[str, Any]]) -> str:
    """Of how many rounds the medians are: the base's, and what has another number."""
    most = own["frozen base"]["rounds"]
    return "; ".join([str(most), *(f"{name}: {r['rounds']}" for name, r in own.items() if r["rounds"] != most)])


def federation_table(data: dict[str, Any]) -> list[str]:
    """Seconds and bytes of a round by every way that carries it, and what that takes over the clients alone in one process."""
    lines = [_row(["clients", "way", "rounds", "seconds of a round", "over one process", "down", "up"]), "|--:|---|--:|--:|--:|--:|--:|"]
    rounds = [r for r in data["results"] if r["op"] == "federation"]
    for r in rounds:
        alone = next(own["median_s"] for own in rounds if (own["clients"], own["provider"]) == (r["clients"], r["yardstick"]))
        moved = [f"{r[name] / 1e3:.1f} kB" for name in ("bytes_down", "bytes_up")]
        lines.append(_row([str(r["clients"]), r["provider"], str(r["rounds"]), _seconds(r["median_s"]), f"{r['median_s'] / alone:.1f} x", *moved]))
    return lines


def uploads_table(data: dict[str, Any]) -> list[str]:
    """Memory of the server over the uploads of a round."""
    lines = [_row(["uploads of a round", "their bytes", "memory of the server at its peak", "over the uploads", "seconds"]), "|--:|--:|--:|--:|--:|"]
    for r in data["results"]:
        if r["op"] == "server memory":
            more = f"{r['peak_extra_bytes'] / r['upload_bytes']:.2f} x"
            lines.append(_row([str(r["clients"]), _memory(r["upload_bytes"]), _memory(r["peak_extra_bytes"]), more, _seconds(r["median_s"])]))
    return lines


TABLES = {
    "server": server_table,
    "summary": summary_table,
    "server_targets": server_targets,
    "lora": lora_table,
    "layers": lora_summary,
    "layer_targets": layer_targets,
    "peft": peft_table,
    "peft_summary": peft_summary,
    "round": round_table,
    "federation": federation_table,
    "uploads": uploads_table,
}


def facts(data: dict[str, Any], file: Path, page: Path, short: bool = False) -> list[str]:
    device, load = data["device"], data["load_average"]
    name = device.get("gpu") or f"{device['cpu']}, {device['cores']} cores"
    threads = " and ".join(str(count) for count in sorted({r["threads"] for r in data["results"]}))
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    link = Path(os.path.relpath(file, page.parent)).as_posix()
    if short:
        return [f"Conditions: {name}; threads: {threads}; torch {data['versions']['torch']}; figures {data['date']} ([{file.name}]({link}))."]
    return [
        f"{name}; threads: {threads}; {versions}; figures {data['date']}; `{data['command']}`",
        f"([{file.name}]({link}); load average of the machine {load['before']:.1f} before, {load['after']:.1f} after).",
    ]


def render(text: str, results: Path, page: Path) -> str:
    """The text of `page` with every marked table written anew from the files in `results`."""

    def fill(match: re.Match[str]) -> str:
        if match["kind"] == "modelled":
            return match[1] + "\n".join(model.table()) + "\n" + match["end"]
        file = results / match["file"]
        if not file.is_file():
            return f"{match[1]}Not measured yet.\n{match['end']}"
        data = saved.read(file)
        if match["kind"] in ("conditions", "machine"):
            lines = facts(data, file, page, match["kind"] == "machine")
        else:
            lines = TABLES[match["kind"]](data)
        return match[1] + "\n".join(lines) + "\n" + match["end"]

    return MARKED.sub(fill, text)


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the tables are those of the JSON files")
    options = parser.parse_args(argv)
    stale = []
    for path in pages():
        text = path.read_text(encoding="utf-8")
        new = render(text, ROOT / "benchmarks" / "results", path)
        if new != text:
            stale.append(path.relative_to(ROOT).as_posix())
            if not options.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'stale' if options.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
