"""`python -m benchmarks.tables [--check]`: write the tables of docs/ from the JSON files, between markers that name file and table."""

from __future__ import annotations

import argparse
import json
import re
import statistics
import sys
from pathlib import Path
from typing import Any

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


TABLES = {"server": server_table, "summary": summary_table, "lora": lora_table, "layers": lora_summary, "peft": peft_table}


def facts(data: dict[str, Any], file: str) -> list[str]:
    device, load = data["device"], data["load_average"]
    name = device.get("gpu") or f"{device['cpu']}, {device['cores']} cores"
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    return [
        f"{name}; {versions}; `{data['command']}`",
        f"([{file}](../benchmarks/results/{file}); load average of the machine {load['before']:.1f} before, {load['after']:.1f} after).",
        "",
    ]


def render(text: str, results: Path) -> str:
    def fill(match: re.Match[str]) -> str:
        data = json.loads((results / match["file"]).read_text(encoding="utf-8"))
        return match[1] + "\n".join([*facts(data, match["file"]), *TABLES[match["kind"]](data)]) + "\n" + match["end"]

    return MARKED.sub(fill, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tables", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the tables are those of the JSON files")
    options = parser.parse_args(argv)
    stale = []
    for path in sorted((ROOT / "docs").glob("*.md")):
        text = path.read_text(encoding="utf-8")
        new = render(text, ROOT / "benchmarks" / "results")
        if new != text:
            stale.append(path.name)
            if not options.check:
                path.write_text(new, encoding="utf-8")
    print(f"{'stale' if options.check else 'written'}: {', '.join(stale) or 'nothing'}")
    return int(options.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
