"""`hetlora bench --quick` and --budget: what a short run measures, that it ends by the clock, and that it says what it leaves out."""

from __future__ import annotations

import argparse
import importlib.util
import re

import pytest
import torch

from hetlora_kernels.benchmarks import ceilings, figures, kit, lora, losses, run, saved

CPU = torch.device("cpu")
TINY = ["--tiny", "--device", "cpu", "--threads", "1"]
RECORD = {"shape": "s", "clients": 1, "dtype": "float32", "threads": 1, "provider": "hetlora", "yardstick": "read", "bytes": 8, "note": "", "rounds": 3}
RECORD |= {"median_s": 1.0, "p20_s": 0.9, "p80_s": 1.1, "ratio": 1.0, "gb_per_s": 1.0, "flops": None}


def test_each_suite_has_an_equal_part_of_what_is_left_of_the_budget(monkeypatch, capsys):
    """Ceilings take no time here, so three suites have a third of 90 seconds each; a suite that ends early leaves its part to the next."""
    parts, clock = {}, [0.0]

    def measured(name, options, device, counts, minutes, refuse):
        parts[name] = round(60 * minutes)
        clock[0] += 10.0 if name == "server" else 0.0
        yield f"for the limit of {60 * minutes:g} s, 3 cases, those after: none"

    monkeypatch.setattr(kit.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(run, "measured", measured)
    assert kit.main([*TINY, "--suite", "server", "lora", "--budget", "90"]) == 0
    assert parts == {"ceilings": 30, "server": 45, "lora": 80}
    out = capsys.readouterr().out
    assert "left out  server: for the limit of 45 s, 3 cases, those after: none" in out
    assert "the same command with --suite server lora --budget 360 measures more of them" in out


@pytest.mark.parametrize("seconds", [0.1, 1.0, 3.0, 20.0, 1000.0])
def test_a_quick_run_ends_by_the_clock_however_slow_the_machine(seconds, monkeypatch, capsys, tmp_path):
    """Every case takes as long: what begins would end in time, but for the first of a suite, of which nothing is known. With 20 s a case each suite has one."""
    clock, begun = [0.0], []

    def taking(name):
        def measure(case, options, device, threads):
            clock[0] += seconds
            begun.append(name)
            return [{**RECORD, "suite": name, "op": f"{name} {len(begun)}"}]

        return measure

    monkeypatch.setattr(kit.time, "monotonic", lambda: clock[0])
    monkeypatch.setattr(kit, "import_others", lambda suites: None)
    for name in ("ceilings", *kit.QUICK):
        monkeypatch.setattr(run.SUITES[name], "measure", taking(name))
        monkeypatch.setattr(run.SUITES[name], "cases", lambda options, device, name=name: iter(run.SUITES[name].wanted(options, device)))
    plan = argparse.Namespace(quick=False, short=True, only=None, memory_gb=8.0)
    wanted = {name: len(run.SUITES[name].wanted(plan, CPU)) for name in ("ceilings", *kit.QUICK)}
    file = tmp_path / "a.json"
    assert kit.main(["--quick", "--device", "cpu", "--threads", "1", "--json", str(file)]) == 0
    assert clock[0] <= max(kit.QUICK_SECONDS, seconds)
    out = capsys.readouterr().out
    counts = {name: begun.count(name) for name in wanted}
    if seconds == 0.1:
        assert counts == wanted and "for the limit of" not in out and "the same command" not in out
    if seconds <= 20.0:
        assert all(counts.values())
    for name, count in counts.items():
        said = re.search(rf"left out  {name}: for the limit of \d+ s, (?:all of its )?(\d+) case", out)
        assert int(said[1]) == wanted[name] - count if count < wanted[name] else said is None, "each case is measured or said to be left out"
    assert saved.read(file)["left_out"] == [line[10:] for line in out.splitlines() if line.startswith("left out")]
    assert "left out  round: not part of a quick run; --suite round measures it" in out and "left out  quick: other shapes" in out
    if slower := [name for name in kit.QUICK if counts[name] < wanted[name]]:
        assert f"the same command with --suite {' '.join(slower)} --budget 440 measures more of" in out


def test_a_quick_run_multiplies_one_size_of_a_type_without_instructions(monkeypatch):
    monkeypatch.setattr(ceilings, "multiplies_fast", lambda dtype, device: dtype == torch.float32)
    for short, sizes in ((True, [512]), (False, [512, 1024, 2048])):
        found = ceilings.cases(argparse.Namespace(quick=False, short=short), CPU)
        assert [case.size for case in found if case.op == "product" and case.dtype == torch.bfloat16] == sizes
        assert len([case for case in found if case.op == "product" and case.dtype == torch.float32]) == (2 if short else 3)


def test_a_quick_run_leaves_out_what_has_no_instructions_and_says_so(monkeypatch):
    """One product of such a type takes as long as fifty others."""
    plan = argparse.Namespace(quick=False, short=True, only=None, memory_gb=8.0)
    options = kit.arguments(["--quick", "--device", "cpu"], "x")
    for fast, layers, losses_of in ((True, 9, ["float32", "bfloat16"]), (False, 1, ["float32"])):
        for module in (lora, losses, kit):
            monkeypatch.setattr(module, "multiplies_fast", lambda dtype, device, fast=fast: fast or dtype == torch.float32)
        found = [arguments for arguments, _ in lora.wanted(plan, CPU) if arguments[4] == torch.bfloat16]
        assert len(found) == layers and len([one for one, _ in lora.wanted(plan, CPU) if one[4] == torch.float32]) == 9
        assert [str(case.dtype).removeprefix("torch.") for case in losses.wanted(plan, CPU)] == losses_of
        assert any("bfloat16 of the loss" in text for text in kit.left_of_quick(options, CPU)) is not fast
    ((n, m, tokens, *_),) = found
    assert 4 * tokens * n * m < 3e7


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_a_quick_run_compiles_nothing(device, monkeypatch):
    """Compiling one layer takes longer than the whole of it may."""
    monkeypatch.setattr(lora, "multiplies_fast", lambda dtype, device: True)
    plan = argparse.Namespace(quick=False, short=True, only=None)
    cases = [arguments for arguments, op in lora.wanted(plan, torch.device(device)) if op.startswith("lora_linear")]
    assert len({(tokens, tuple(ranks)) for _, _, tokens, ranks, *_ in cases}) == 8
    assert not [(n, m) for n, m, tokens, ranks, *_ in cases if (n, m) in lora.COMPILED and tokens in (1024, 8192) and ranks == [16]]


def test_a_quick_run_draws_its_report_where_no_file_is_named(tmp_path, monkeypatch, capsys):
    drawn = []
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(kit, "import_others", lambda suites: None)
    monkeypatch.setattr(kit, "draw", lambda file, folder: drawn.append((str(file), str(folder), file.is_file())))
    for name in ("ceilings", "server"):
        monkeypatch.setattr(run.SUITES[name], "cases", lambda options, device: iter([None]))
        monkeypatch.setattr(run.SUITES[name], "measure", lambda *_: [RECORD | {"op": "gram"}])
    quick = ["--quick", "--suite", "server", "--device", "cpu", "--threads", "1"]
    assert kit.main(quick) == 0 and drawn == [("hetlora-bench/bench.json", "hetlora-bench", True)]
    assert kit.main([*quick, "--json", "a.json"]) == 0 and len(drawn) == 1 and (tmp_path / "a.json").is_file(), "who names a file gets that file alone"
    assert kit.main([*quick, "--json", "b.json", "--report", "pages"]) == 0 and drawn[1] == ("b.json", "pages", True)
    (tmp_path / "in the way").write_text("")
    capsys.readouterr()
    assert kit.main([*quick, "--report", "in the way"]) == 2 and len(drawn) == 2
    assert capsys.readouterr().err == "hetlora bench: error: in the way: file exists\n"


def test_without_what_draws_the_file_is_written_and_the_rest_is_said(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "matplotlib" else real(name, *rest))
    assert kit.main([*TINY, "--suite", "server", "--only", "gram", "--report", str(tmp_path / "out")]) == 0
    assert "no report: not installed: matplotlib (pip install '.[bench]'); then: hetlora bench report " in capsys.readouterr().out
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["bench.json"]


def test_the_model_suite_goes_by_both_names():
    assert kit.arguments(["--suite", "model", "loss"], "x").suite == ["peft", "loss"]


def test_a_line_says_memory_and_the_share_of_the_modelled_floor():
    record = RECORD | {"op": "gram", "yardstick": "frozen layer", "provider": "hetlora cuda", "modelled_s": 0.25, "peak_extra_bytes": 3 << 20}
    case = {"frozen layer": {"median_s": 0.8}}
    assert figures.line(record, case, {}).endswith("25 % of the modelled floor, +25 % over the frozen layer, +3 MiB")
    assert figures.memory(RECORD) == "" and figures.memory({"peak_extra_bytes": 0}) == "0 MiB"
