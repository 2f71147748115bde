"""The committed figures of the studies of docs/results.md are those of their single runs, and of the recipes as they stand; the page of all is made of them."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest

from benchmarks.study import DATA, page
from hetlora.compare.figures import METRICS
from hetlora.config import Config

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"
RECIPES = {"stdlib": "compare-stdlib", "unicode": "compare-unicode", **{name: f"study-{name}" for name in DATA}}


def single_runs(study: str) -> list[dict[str, str]]:
    with open(RESULTS / study / "comparison.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.mark.parametrize("study", RECIPES)
def test_means_are_those_of_the_single_runs(study):
    rows = single_runs(study)
    lines = (RESULTS / study / "comparison.md").read_text(encoding="utf-8").split("Search:")[0].splitlines()
    titles = [title.strip() for title in lines[0].strip("|").split("|")]
    shown = {cells[0].strip(): cells for line in reversed(lines[2:]) if len(cells := [cell.strip() for cell in line.strip("|").split("|")]) == len(titles)}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        assert [row["seed"] for row in own] == ["0", "1", "2"], "three seeds of every method"
        values = [float(row["global_final"]) for row in own]
        mean, spread = map(float, shown[method][1].split(" ± "))
        assert [mean, spread] == pytest.approx([statistics.fmean(values), statistics.stdev(values)], abs=6e-4), "three decimals, of values with six digits"
    assert titles[1] == METRICS[0].title


@pytest.mark.parametrize("study", RECIPES)
def test_they_were_made_with_the_recipe(study):
    recipe = Config.read(ROOT / "examples" / f"{RECIPES[study]}.yaml")
    made = json.loads((RESULTS / study / "comparison.json").read_text(encoding="utf-8"))
    assert {**made["plan"], **made["config"]} | recipe == {**made["plan"], **made["config"]}


def test_the_page_of_the_study_is_made_of_them():
    text = page()
    assert (RESULTS / "study.md").read_text(encoding="utf-8") == text
    for name in DATA:
        for method in {row["method"] for row in single_runs(name)}:
            values = [float(row["global_final"]) for row in single_runs(name) if row["method"] == method]
            assert f"| {method} | " in text and f" | {statistics.fmean(values):.3f} ± {statistics.stdev(values):.3f} | " in text
