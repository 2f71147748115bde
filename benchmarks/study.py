"""The study of methods (docs/results.md), by one command: every method on three data sets, then the page of all of them.

    python -m benchmarks.study                         run what `runs/study-*` does not hold yet, and write docs/results
    python -m benchmarks.study --data letters          one data set
    python -m benchmarks.study --methods fold,hetlora  only these methods
    python -m benchmarks.study --page                  the page alone, from the figures in docs/results

A data set is a recipe, `examples/study-NAME.yaml`. Its figures and pictures are copied to `docs/results/NAME`, and `docs/results/study.md` is made of those.
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path
from typing import Any

from hetlora.compare.differences import Difference, difference_head, difference_row
from hetlora.compare.figures import METRICS, Tally, tabulate
from hetlora.compare.methods import METHODS, ComparisonPlan, make_plan
from hetlora.config import Config

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
DATA = {
    "packages": "Packages of Python's library, a mild shift",
    "letters": "Letters by script, a large shift",
    "sized": "Letters by script, the amount of text follows the rank",
}
COLUMNS = ("global_final", "own_final", "own_small", "own_middle", "own_big", "effective_rank", "megabytes_down", "megabytes_up", "cpu_seconds")
FILES = ("comparison.json", "comparison.csv", "comparison.md", "comparison.png", "diagnostics.png")


def run(name: str, methods: str) -> None:
    """Run what is missing of a data set, and copy its figures."""
    from hetlora.compare.page import write_comparison
    from hetlora.compare.run import run_comparison
    from hetlora.report.terminal import ComparisonObserver

    recipe = ROOT / "examples" / f"study-{name}.yaml"
    values = Config.read(recipe)
    plan = {key: values.pop(key) for key in ComparisonPlan.model_fields if key in values}
    with ComparisonObserver() as observer:
        found = run_comparison(Config.create(str(recipe), **values), make_plan(str(recipe), **{**plan, **({"methods": methods} if methods else {})}), observer)
    folder = write_comparison(tabulate(found)).parent
    (RESULTS / name).mkdir(parents=True, exist_ok=True)
    for file in FILES:
        if (folder / file).exists():
            shutil.copyfile(folder / file, RESULTS / name / file)


def page() -> str:
    """docs/results/study.md, from the figures in docs/results."""
    parts = ["# The study of methods: all figures", "Written by `python -m benchmarks.study`. What they mean is in [results.md](../results.md).\n"]
    for name, title in DATA.items():
        if (RESULTS / name / "comparison.json").exists():
            parts += _data_set(name, title, json.loads((RESULTS / name / "comparison.json").read_text(encoding="utf-8")))
    return "\n".join(parts)


def _data_set(name: str, title: str, saved: dict[str, Any]) -> list[str]:
    methods, config, plan = saved["methods"], saved["config"], saved["plan"]
    first = next(iter(methods.values()))
    before = first["curves"]["client_text"][0][0][1]
    shown = [metric for metric in METRICS if metric.key in COLUMNS and any(_known(own, metric.key) for own in methods.values())]
    searched = plan["search"].partition("=")[0]
    rows = [[key, own["searched"] or "-", *(_tally(own, m.key).text(m.digits) for m in shown)] for key, own in methods.items()]
    rows.sort(key=lambda row: _tally(methods[row[0]], "global_final").mean or 0.0)
    lines = [f"\n## {title}\n", f"`{config['data']}`. {config['rounds']} rounds, {config['clients_per_round']} clients a round, {plan['seeds']} seeds."]
    lines += [f"Perplexity before training: {before:.3f}. [Everything](./{name}/comparison.md).\n"]
    lines += _table(["method", searched, *(metric.title for metric in shown)], rows)
    against = saved["against"]
    lines += [f"\nAgainst {against}, in percent, below 0 is better: paired by seed (global) and by client (own).\n"]
    found = {key: Difference(own["global_by_seed"], own["own_by_client"], own["own_by_group"]) for key, own in saved["differences"].items()}
    lines += _table(difference_head(found), [difference_row(key, found[key], found) for row in rows if (key := row[0]) in found])
    lines += [f"\n![Perplexity by round, and at the end against bytes]({name}/comparison.png)\n"]
    return lines


def _tally(method: dict[str, Any], key: str) -> Tally:
    return Tally([float(value) if value is not None else None for value in method["metrics"].get(key, {"values": []})["values"]])


def _known(method: dict[str, Any], key: str) -> bool:
    return bool(_tally(method, key).known)


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return [f"| {' | '.join(line)} |" for line in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=list(DATA), action="append", help="only this data set (may be given several times)")
    parser.add_argument("--methods", default="", help=f"only these methods, comma-separated, of {', '.join(METHODS)}; default: those of the recipe")
    parser.add_argument("--page", action="store_true", help="run nothing")
    args = parser.parse_args()
    if not args.page:
        for name in args.data or DATA:
            run(name, args.methods)
    (RESULTS / "study.md").write_text(page(), encoding="utf-8")
    print(f"written: {(RESULTS / 'study.md').relative_to(ROOT)}")


if __name__ == "__main__":
    main()
