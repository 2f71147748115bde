"""`python -m benchmarks.plots [--check]`: draw docs/figures/speed.png, the README's picture, from benchmarks/results/cpu-peft.json.

Training steps of whole models: stock PEFT beside this project, medians with their 20th and 80th percentiles. The picture carries what it was drawn from, so
that `--check` can say whether it is that of the file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from typing import Any

from . import saved
from .tables import ROOT

SOURCE, PICTURE = ROOT / "benchmarks" / "results" / "cpu-peft.json", ROOT / "docs" / "figures" / "speed.png"
STOCK, OWN = "PEFT", "hetlora"
GREY, BLUE, INK = "#b9bec6", "#1f6fb4", "#22262b"


def bars(data: dict[str, Any]) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(what was timed, PEFT's figures, ours), one for each training step of a whole model."""
    steps: dict[tuple[str, int, str], dict[str, dict[str, Any]]] = {}
    for r in data["results"]:
        if r["op"].startswith("training step") and " 2 layers" not in r["shape"]:
            steps.setdefault((r["shape"], r["clients"], r["op"].split("p=")[1]), {})[r["provider"]] = r
    found = []
    for (shape, clients, p), both in steps.items():
        adapters = "one adapter" if clients == 1 else f"{clients} adapters of different ranks"
        dropout = "no dropout" if float(p) == 0 else f"dropout {p}"
        found.append((f"{shape.split(' ')[0]} shape\n{adapters}, {dropout}", both[STOCK], both[OWN]))
    return sorted(found, key=lambda one: one[2]["ratio"])


def conditions(data: dict[str, Any]) -> str:
    device, versions = data["device"], data["versions"]
    threads = " and ".join(str(count) for count in sorted({r["threads"] for r in data["results"]}))
    software = ", ".join(f"{name} {versions[name]}" for name in ("torch", "peft", "transformers", "python"))
    machine = f"{device['cpu']}, {device['cores']} cores, {threads} threads; float32, 8 sequences of 32 tokens, random weights"
    return f"{machine}\n{software}; figures {data['date']}; share of PEFT's time: median over rounds that time both"


def digest(data: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps([bars(data), conditions(data)]).encode()).hexdigest()


def draw(data: dict[str, Any]) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = bars(data)
    figure = Figure(figsize=(9, 4.6), dpi=110)
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for place, (_, stock, own) in enumerate(found):
        for shift, record, colour in ((-0.19, stock, GREY), (0.19, own, BLUE)):
            middle = record["median_s"]
            spread = [[middle - record["p20_s"]], [record["p80_s"] - middle]]
            axes.barh(place + shift, middle, 0.36, xerr=spread, color=colour, error_kw={"elinewidth": 1, "ecolor": INK, "capsize": 2})
        axes.text(own["p80_s"] + 0.05, place + 0.19, f"{own['ratio']:.2f} of PEFT's time", va="center", fontsize=9, color=INK)
    axes.set_yticks(range(len(found)), [text for text, _, _ in found], fontsize=9)
    axes.invert_yaxis()
    axes.set_xlabel("seconds for one training step: median, and 20th to 80th percentile", fontsize=9)
    figure.suptitle("Training with LoRA on a CPU: shorter is faster", fontsize=12)
    handles = [axes.barh(0, 0, color=colour) for colour in (GREY, BLUE)]
    names = ["stock PEFT (8 adapters: one after another)", "hetlora (8 adapters: in one batch)"]
    axes.legend(handles, names, fontsize=9, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.text(0.01, 0.01, conditions(data), fontsize=7.5, color=INK, va="bottom")
    figure.tight_layout(rect=(0, 0.075, 1, 1))
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Description": digest(data), "Software": None})


def drawn_from() -> str:
    """The digest of the figures the picture shows; empty where there is no picture."""
    from PIL import Image

    if not PICTURE.is_file():
        return ""
    with Image.open(PICTURE) as image:
        return str(image.info.get("Description", ""))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the picture is that of the file")
    options = parser.parse_args(argv)
    data = saved.read(SOURCE)
    stale = drawn_from() != digest(data)
    if stale and not options.check:
        draw(data)
    name = PICTURE.relative_to(ROOT).as_posix() if stale else "nothing"
    print(f"{'stale' if options.check else 'drawn'}: {name}")
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
