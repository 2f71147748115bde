"""The benchmark runner: what it writes, that it refuses wrong results, and that the documented tables are those of the JSON files."""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest
import torch

from benchmarks import compare, figures, plots, providers, run, saved, server, steps, tables, timing
from benchmarks import compiled as bench_compiled
from benchmarks import losses as bench_losses
from benchmarks import packing as bench_packing
from benchmarks.shapes import power_law_ranks

OPTIONS = argparse.Namespace(quick=True, short=False, only=["aggregate"], memory_gb=1.0, seconds=0.01, rungs=None, how=timing.How())


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path):
    before = torch.get_num_threads()
    file = tmp_path / "a.json"
    try:
        assert run.main(["--suite", "server", "--quick", "--device", "cpu", "--seconds", "0.01", "--threads", "1", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(before)
    data = saved.read(file)
    assert data["schema"] == saved.SCHEMA and data["date"].startswith("measured 20") and data["device"]["cpu"]
    assert data["versions"]["torch"] == torch.__version__ and "--quick" in data["command"]
    assert {record["op"] for record in data["results"]} == {*providers.PROVIDERS, *steps.STEPS}
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
    monkeypatch.setattr(server, "wanted", lambda *_: list("abcd"))
    monkeypatch.setattr(server, "measure", measure)
    command = ["--suite", "server", "--device", "cpu", "--threads", "1", "--json", str(file)]
    assert run.main([*command, "--minutes", "2.5"]) == 0
    data = saved.read(file)
    assert [one["op"] for one in data["results"]] == ["a", "b"]
    assert data["left_out"] == "for the limit of 150 s, 2 cases, those after: b, s, float32" and data["left_out"] in capsys.readouterr().err
    assert run.main([*command, "--minutes", "-1"]) == 0, "as for a suite to which the ones before it have left no time"
    assert "left out for the limit of 0 s, all of its 4 cases" in capsys.readouterr().err
    assert run.main(command) == 0
    data = saved.read(file)
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


def test_when_the_time_is_over_three_rounds_are_enough(monkeypatch):
    clock, calls = [0.0], []

    def work():
        clock[0] += 1.0
        calls.append(0)

    for name in ("monotonic", "perf_counter"):
        monkeypatch.setattr(timing.time, name, lambda: clock[0])
    for end, rounds in ((float("inf"), 20), (13.0, 12), (0.0, 3)):
        clock[0] = 0.0
        timings = timing.interleaved({"a": work}, "a", torch.device("cpu"), seconds=0.0, least_rounds=20, how=timing.How(end=end))
        assert timings["a"].rounds == rounds, "after two calls, the second of which says how long it takes"


def test_a_cold_call_finds_nothing_in_the_caches(monkeypatch):
    calls = []
    monkeypatch.setattr(timing, "overwriter", lambda device: lambda: calls.append("caches"))
    timing.interleaved({"a": lambda: calls.append("a")}, "a", torch.device("cpu"), seconds=0.0, how=timing.How(cold=True))
    timed = calls[3 if calls[2] == "a" else 2 :]
    assert timed == ["caches", "a"] * (3 * timing.COLD_CALLS), "in each of three rounds as many calls as a short one has"
    monkeypatch.undo()
    overwrite = timing.overwriter(torch.device("cpu"))
    assert overwrite().numel() * 4 == 2 * timing.cache_bytes(torch.device("cpu"))


def test_last_level_caches_are_added_up(tmp_path):
    """Four cores; two share a cache of 16 MiB, two another one; the smaller ones before them do not count."""
    assert timing.cache_bytes(torch.device("cpu"), tmp_path) == 64 << 20, "where the system does not say"
    for core, shared in enumerate(("0-1", "0-1", "2-3", "2-3")):
        for index, (level, cores, size) in enumerate((("1", str(core), "32K"), ("2", str(core), "1024K"), ("3", shared, "16M"))):
            folder = tmp_path / f"cpu{core}" / "cache" / f"index{index}"
            folder.mkdir(parents=True)
            for name, text in (("level", level), ("shared_cpu_list", cores), ("size", size)):
                (folder / name).write_text(f"{text}\n")
    (tmp_path / "cpu0" / "cache" / "index9").mkdir()
    assert timing.cache_bytes(torch.device("cpu"), tmp_path) == 32 << 20


def test_a_gpu_has_the_time_between_events_beside_the_hosts(monkeypatch):
    """A stand-in for the device, whose clock goes on by 2 ms at each call, whatever the host takes."""
    queue = []

    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            self.at = len(queue)

        def elapsed_time(self, end):
            return 2.0 * (end.at - self.at)

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    found = timing.interleaved({"a": lambda: queue.append(0)}, "a", torch.device("cuda"), seconds=0.0)["a"]
    assert found.rounds == 3 and len(queue) > 100 and found.device_times == pytest.approx([2e-3] * 3)
    record = found.figures(8, scale=0.5)
    assert record["device_s"] == pytest.approx(1e-3) and record["median_s"] == found.median / 2 < 1e-4
    assert record["gb_per_s"] == pytest.approx(8 / record["median_s"] / 1e9)
    assert "device_s" not in timing.Timing([1.0], 1.0).figures(8)
    line = figures.line({"provider": "x", "yardstick": "x", "op": "gram", "dtype": "float32", **record}, {}, {})
    assert "1.00 ms between events on the device" in line or "1 ms between events on the device" in line


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


RESULTS = sorted((tables.ROOT / "benchmarks" / "results").glob("*.json"))


def test_what_is_read_is_what_was_written_to_six_digits(tmp_path):
    case = {"op": "gram", "shape": "s", "clients": 2, "dtype": "float32", "threads": 1, "yardstick": "read", "bytes": 3 * 10**6, "note": ""}
    own = {"rounds": 3, "median_s": 0.0012345678, "p20_s": 1e-3, "p80_s": 2e-3, "gb_per_s": 2.43, "ratio": 1.5, "peak_extra_bytes": None}
    records = [{**case, "provider": name, **own} for name in ("read", "hetlora")] + [{**case, "threads": 2, "provider": "hetlora", **own}]
    saved.write({"suite": "server", "date": "measured 2026-01-02", "results": records}, tmp_path / "a.json")
    back = saved.read(tmp_path / "a.json")
    expected = [{**record, "median_s": 0.00123457, "gb_per_s": 3 * 10**6 / 0.00123457 / 1e9} for record in records]
    assert back == {"schema": saved.SCHEMA, "suite": "server", "date": "measured 2026-01-02", "results": expected}
    lines = (tmp_path / "a.json").read_text().splitlines()
    assert [line.count("median_s") for line in lines if "median_s" in line] == [1, 1, 1], "a line for each case and provider"


def test_a_write_that_is_stopped_leaves_the_file_of_before(tmp_path, monkeypatch):
    file, real = tmp_path / "a.json", Path.write_text
    saved.write({"date": "first", "results": []}, file)
    link = tmp_path / "link.json"
    link.symlink_to(file)
    saved.write({"date": "second", "results": []}, link)
    assert link.is_symlink() and saved.read(file)["date"] == "second"

    def half(path, text, **options):
        real(path, text[: len(text) // 2], **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(KeyboardInterrupt):
        saved.write({"date": "third", "results": []}, file)
    assert saved.read(file)["date"] == "second" and sorted(tmp_path.iterdir()) == [file, link]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_a_pipe_is_written_into_and_not_replaced(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    end = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    try:
        saved.write({"date": "first", "results": []}, pipe)
        assert pipe.is_fifo() and json.loads(os.read(end, 1 << 16))["date"] == "first"
    finally:
        os.close(end)


def test_files_of_the_first_form_are_read_and_written_anew(tmp_path, capsys):
    record = {"op": "a", "shape": "s", "clients": 1, "dtype": "float32", "threads": 1, "provider": "x", "yardstick": "y", "bytes": 1, "median_s": 2.0}
    old = tmp_path / "old.json"
    old.write_text(json.dumps({"schema": 1, "date": "committed 2026-01-02", "results": [record]}, indent=1))
    assert saved.main([str(old)]) == 0 and "1 figures of 1 cases" in capsys.readouterr().out
    assert json.loads(old.read_text())["schema"] == saved.SCHEMA and saved.read(old)["results"][0]["median_s"] == 2.0


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_files_keep_medians_and_spreads_alone(path):
    data = json.loads(path.read_text())
    assert data["schema"] == saved.SCHEMA, f"python -m benchmarks.saved {path}"
    figures = [own for case in data["cases"] for own in case["providers"].values()]
    assert figures and all(not isinstance(value, (list, dict)) for own in figures for value in own.values())
    assert len(compare.read(path)["results"]) == len(figures), "what `hetlora bench compare` takes"


def test_a_page_with_figures_says_once_how_they_were_measured():
    shown = 0
    for page in tables.pages():
        text = page.read_text(encoding="utf-8")
        pictured = {"cpu-peft.json"} if plots.PICTURE.name in text else set()
        for file in pictured | {match["file"] for match in tables.MARKED.finditer(text) if match["file"].endswith(".json")}:
            assert len(re.findall(f"<!-- benchmarks: {file} (?:conditions|machine) -->", text)) == 1, f"{page.name}: the conditions of {file}"
            shown += 1
    assert shown >= len(RESULTS)


def test_the_picture_is_that_of_the_json_file(capsys):
    assert plots.main(["--check"]) == 0, capsys.readouterr().out


def test_the_picture_has_a_bar_for_every_step_of_a_whole_model():
    record = {"op": "training step p=0.0", "shape": "X 30 layers 8x32", "clients": 8, "ratio": 0.5}
    results = [{**record, "provider": name} for name in ("PEFT", "hetlora")] + [{**record, "shape": "X 2 layers 8x32", "provider": "PEFT"}]
    ((text, stock, own),) = plots.bars({"results": results})
    assert "X shape" in text and "8 adapters" in text and "no dropout" in text and (stock["provider"], own["provider"]) == ("PEFT", "hetlora")


def test_summaries_take_the_records_they_name():
    """Ranges over the shapes of a layer, by rows and dropout; a target is met up to its limit."""
    layer = {"provider": "hetlora", "op": "layer, forward and backward p=0.0", "clients": 1}
    ratios = {"1->1 T=1 r=16": 0.5, "2->2 T=1 r=16": 0.7, "1->1 T=256 r=16": 0.9}
    results = [{**layer, "shape": shape, "ratio": ratio} for shape, ratio in ratios.items()]
    results += [{**layer, "provider": "PEFT", "shape": "1->1 T=1 r=16", "ratio": 1.0}, {**results[2], "op": "layer, forward and backward p=0.1", "ratio": 0.8}]
    results.append({**layer, "op": "training step p=0.0", "shape": "X", "clients": 8, "ratio": 0.4})
    assert tables.peft_summary({"results": results})[2:] == [
        "| one fused layer, one row | 0.50 to 0.70 |  |",
        "| one fused layer, 256 and 1024 rows | 0.90 | 0.80 |",
        "| training step, X, 8 adapters in one batch / one after another | 0.40 |  |",
    ]
    assert (tables._verdict(1.15, 1.15), tables._verdict(1.16, 1.15)) == ("met, 1.15", "**missed**, 1.16")


def test_a_table_is_written_again_where_it_is_stale():
    folder, page = tables.ROOT / "benchmarks" / "results", tables.ROOT / "docs" / "x.md"
    marks = "".join(f"<!-- benchmarks: amd-epyc-zen4.json {kind} -->\nold\n<!-- benchmarks end -->\n" for kind in ("conditions", "summary"))
    once = tables.render(f"before\n{marks}after\n", folder, page)
    assert "(../benchmarks/results/amd-epyc-zen4.json)" in once and "torch" in once
    assert "old" not in once and "| gram |" in once and once.endswith("<!-- benchmarks end -->\nafter\n")
    assert tables.render(once, folder, page) == once == tables.render(once.replace("| gram |", "| other |"), folder, page)


def forked_module(command: list[str], **_) -> subprocess.CompletedProcess[str]:
    """`python -m module arguments`, forked: it need not import torch."""
    assert command[:2] == [sys.executable, "-m"]
    code = f"import runpy, sys; sys.argv[1:] = {command[3:]!r}; runpy.run_module({command[2]!r}, run_name='__main__', alter_sys=True)"
    done = forked.python(code, tables.ROOT, os.environ)
    assert done.returncode == 0, done.stderr
    return done


def test_losses_are_measured_after_they_agree(monkeypatch, capsys):
    sizes = ["--words", "64", "--columns", "8", "--tokens", "32", "--rounds", "2", "--dtype", "float32"]
    monkeypatch.setattr(sys, "argv", ["losses", *sizes])
    monkeypatch.setattr(bench_losses.subprocess, "run", forked_module)
    before = torch.get_num_threads()
    try:
        bench_losses.main()
        *_, row, _, liger = capsys.readouterr().out.splitlines()
        assert liger == "Liger: not measured: its kernels are Triton's and need a GPU"
        assert re.fullmatch(r"\| float32 \| \d+ MiB \| \d+ MiB \| \d+ ms \| \d+ ms \| [\d.]+ \([-\d.]+ to [\d.]+\) \|", row)
        real = bench_losses.client_losses
        monkeypatch.setattr(bench_losses, "client_losses", lambda *given, head=None, **own: real(*given, head=head, **own) * (1.01 if head else 1))
        with pytest.raises(bench_losses.WrongResultError, match=r"torch.float32: the forms logits and states differ by 1.0e-02; nothing is measured"):
            bench_losses.main()
    finally:
        torch.set_num_threads(before)


def test_the_op_of_the_losses_is_measured_after_its_slopes_agree(monkeypatch, capsys):
    monkeypatch.setitem(bench_losses.CHUNK, "cpu", 640)
    monkeypatch.setattr(sys, "argv", ["losses", "--chunk", "--words", "64", "--rounds", "2"])
    before = torch.get_num_threads()
    try:
        bench_losses.main()
        rows = capsys.readouterr().out.splitlines()[-2:]
        for name, row in zip(("float32", "bfloat16"), rows, strict=True):
            assert re.fullmatch(rf"\| {name} \| 64 \|" + r" [\d.]+ ms \|" * 4 + r" [\d.]+ \|" * 3, row)
        monkeypatch.setitem(bench_losses.ON_A_CHUNK["cross_entropy"], "op", lambda chunk, labels: bench_losses.by_operations(chunk, labels).mul_(1.01))
        with pytest.raises(SystemExit, match=r"torch.float32, op: slopes are off by 1.0e-02; nothing is measured"):
            bench_losses.main()
    finally:
        torch.set_num_threads(before)


def test_packing_is_measured_after_the_ways_agree(monkeypatch, capsys):
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setitem(bench_packing.MODELS, "small", shape)
    monkeypatch.setattr(sys, "argv", ["packing", "--clients", "3", "--longest", "40", "--rounds", "2"])
    before = torch.get_num_threads()
    try:
        bench_packing.main()
        probe, *_, even, uniform, tail = capsys.readouterr().out.splitlines()
        assert probe.startswith("probe: packed;") and "| 0 % | 0 % | 0 % |" in even
        for row in (uniform, tail):
            padded, _, packed = (int(cell.removesuffix(" %")) for cell in row.split(" | ")[1:4])
            assert packed < padded
        real = bench_packing.token_losses
        monkeypatch.setattr(bench_packing, "token_losses", lambda *own: real(*own) * (1.0 if own[-1] is None else 1.01))
        with pytest.raises(SystemExit, match=r"packed: gradients differ by 1.0e-02; nothing is measured"):
            bench_packing.main()
    finally:
        torch.set_num_threads(before)


def test_a_compiled_step_is_timed_after_its_gradients_agree(monkeypatch):
    shape = {"vocab_size": 40, "hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 2}
    monkeypatch.setitem(bench_compiled.MODELS, "small", shape)
    monkeypatch.setattr(bench_compiled, "LAYERS", 1)
    try:
        row = bench_compiled.measure("small", 2, 8, 2, "aot_eager")
        assert re.fullmatch(r"\| small \| 2 x 8 \| \d+ ms \| \d+ ms \| [\d.]+ \([\d.]+ to [\d.]+\) \| \d+ s \| (\d+|never) \|", row), row
        monkeypatch.setattr(bench_compiled, "compiled", lambda cohort, backend: (1.0, cohort.step() * 1.01))
        with pytest.raises(SystemExit, match=r"compiled: gradients differ by 1.0e-02; nothing is measured"):
            bench_compiled.measure("small", 2, 8, 2, "aot_eager")
    finally:
        torch._dynamo.reset()
