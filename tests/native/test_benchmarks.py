"""The benchmark runner: what it writes, that it refuses wrong results, and that the documented tables are those of the JSON files."""

from __future__ import annotations

import argparse
import json
import time

import pytest
import torch

from benchmarks import providers, run, server, tables, timing
from benchmarks.shapes import power_law_ranks

OPTIONS = argparse.Namespace(quick=True, only=["aggregate"], memory_gb=1.0, seconds=0.01)


def test_a_quick_run_writes_every_figure(tmp_path):
    before = torch.get_num_threads()
    file = tmp_path / "a.json"
    try:
        assert run.main(["--suite", "server", "--quick", "--device", "cpu", "--seconds", "0.01", "--threads", "1", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(before)
    data = json.loads(file.read_text())
    assert data["schema"] == run.SCHEMA and data["device"]["cpu"] and data["versions"]["torch"] == torch.__version__ and "--quick" in data["command"]
    assert {record["op"] for record in data["results"]} == {*providers.PROVIDERS, "adamw", "adamw, clipped and regularised"}
    for record in data["results"]:
        assert 0 < record["p20_s"] <= record["median_s"] <= record["p80_s"] and record["ratio"] > 0 and record["bytes"] > 0 and record["rounds"] >= 3
    table = "\n".join(tables.summary_table(data) + tables.server_table(data))
    assert table.count("\n") > 40 and "torch add_ loop" in table


def test_a_limit_of_time_is_kept_and_what_it_leaves_out_is_said(tmp_path, monkeypatch, capsys):
    """A clock that a case moves by a minute: with 2.5 minutes the third case is the first that would end too late."""
    clock, file = [0.0], tmp_path / "a.json"
    record = {"clients": 1, "dtype": "float32", "threads": 1, "provider": "x", "median_s": 1.0, "gb_per_s": 1.0, "ratio": 1.0, "yardstick": "y"}

    def measure(case, *_):
        clock[0] += 60.0
        return [{**record, "op": case, "shape": "s"}]

    monkeypatch.setattr(run.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(server, "cases", lambda *_: iter("abcd"))
    monkeypatch.setattr(server, "measure", measure)
    command = ["--suite", "server", "--device", "cpu", "--threads", "1", "--json", str(file)]
    assert run.main([*command, "--minutes", "2.5"]) == 0
    data = json.loads(file.read_text())
    assert [one["op"] for one in data["results"]] == ["a", "b"]
    assert data["left_out"] == "for the limit of 2.5 minutes, the cases after: b, s, float32" and data["left_out"] in capsys.readouterr().err
    assert run.main(command) == 0
    data = json.loads(file.read_text())
    assert len(data["results"]) == 4 and data["left_out"] is None


def test_a_wrong_result_is_not_timed(monkeypatch):
    def wrong(p):
        work, result = providers.aggregate_out(p)
        return work, lambda: [t * 1.01 for t in result()]

    monkeypatch.setitem(providers.PROVIDERS["aggregate"], "wrong", wrong)
    monkeypatch.setattr(server, "interleaved", lambda *arguments: pytest.fail("timed"))
    case = next(server.cases(OPTIONS, torch.device("cpu")))
    with pytest.raises(server.WrongResultError, match=r"wrong: aggregate .* is off by 1.00e-02; nothing is timed"):
        server.measure(case, OPTIONS, torch.device("cpu"), torch.get_num_threads())


def test_rounds_go_to_and_fro_and_what_stands_aside_has_three():
    turns = []
    runs = {name: lambda name=name: (turns.append(name), time.sleep(0.002)) for name in ("a", "b", "aside")}
    timings = timing.interleaved(runs, "a", torch.device("cpu"), seconds=0.0, least_rounds=5, aside=["aside"])
    a_round, back = ["a", "b", "aside"], ["aside", "b", "a"]
    assert turns == a_round * 2 + a_round + back + a_round + ["b", "a"] + ["a", "b"]
    assert {name: one.rounds for name, one in timings.items()} == {"a": 5, "b": 5, "aside": 3}
    assert timing.Timing([2.0, 4.0, 9.0], 0.0).over(timing.Timing([1.0, 4.0, 3.0], 0.0)) == 2.0


def test_short_calls_are_timed_many_at_a_turn():
    calls = []
    timings = timing.interleaved({"a": lambda: calls.append(0)}, "a", torch.device("cpu"), seconds=0.0)
    assert len(calls) > 100 and timings["a"].rounds == 3 and timings["a"].median < timing.SHORT_SECONDS and timings["a"].ratio == 1.0


def test_uploads_that_do_not_fit_are_streamed():
    shape = [(4096, 4096)]
    assert server.operations(shape, 1000, torch.float32, memory_gb=8)[:2] == ["aggregate", "truncate"]
    assert server.operations(shape, 1000, torch.float32, memory_gb=0.1) == ["accumulate"]


def test_power_law_ranks_are_within_the_bounds_and_mostly_small():
    ranks = power_law_ranks(1000)
    assert min(ranks) == 5 and 45 <= max(ranks) <= 50 and 12 <= sum(ranks) / 1000 <= 13
    assert sum(rank < 10 for rank in ranks) > 500


def test_documented_tables_are_those_of_the_json_files(capsys):
    assert tables.main(["--check"]) == 0, capsys.readouterr().out


def test_a_table_is_written_again_where_it_is_stale():
    files = sorted((tables.ROOT / "benchmarks" / "results").glob("amd-epyc-zen4.json"))
    text = f"before\n<!-- benchmarks: {files[0].name} summary -->\nold\n<!-- benchmarks end -->\nafter\n"
    once = tables.render(text, files[0].parent)
    assert "old" not in once and "| gram |" in once and once.endswith("<!-- benchmarks end -->\nafter\n")
    assert tables.render(once, files[0].parent) == once == tables.render(once.replace("| gram |", "| other |"), files[0].parent)
