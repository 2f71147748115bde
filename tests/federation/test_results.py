"""The committed figures of the two studies of docs/results.md are those of their single runs, and of the recipes as they stand."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest

from hetlora.compare.figures import METRICS, Tally
from hetlora.config import Config

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "docs" / "results"


@pytest.mark.parametrize("study", ["stdlib", "unicode"])
def test_means_are_those_of_the_single_runs(study):
    with open(RESULTS / study / "comparison.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    lines = (RESULTS / study / "comparison.md").read_text(encoding="utf-8").split("Search:")[0].splitlines()
    titles = [title.strip() for title in lines[0].strip("|").split("|")]
    shown = {line.split("|")[1].strip(): [value.strip() for value in line.strip("|").split("|")] for line in lines[2:] if line.startswith("|")}
    for method in dict.fromkeys(row["method"] for row in rows):
        own = [row for row in rows if row["method"] == method]
        assert [row["seed"] for row in own] == ["0", "1", "2"], "three seeds of every method"
        values = [float(row["global_final"]) for row in own]
        assert shown[method][1] == Tally(values).text(METRICS[0].digits)
        assert statistics.fmean(values) == pytest.approx(float(shown[method][1].split(" ")[0]), abs=1e-3)
    assert titles[1] == METRICS[0].title


@pytest.mark.parametrize("study", ["stdlib", "unicode"])
def test_they_were_made_with_the_recipe(study):
    recipe = Config.read(ROOT / "examples" / f"compare-{study}.yaml")
    made = json.loads((RESULTS / study / "comparison.json").read_text(encoding="utf-8"))
    assert {**made["plan"], **made["config"]} | recipe == {**made["plan"], **made["config"]}
