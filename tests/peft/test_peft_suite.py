"""The peft suite of the benchmarks: a quick run writes every figure, and a wrong gradient is not timed."""

from __future__ import annotations

import argparse
import io

import pytest
import torch

import hetlora_kernels.peft
from benchmarks import peft_suite, ranks, run, saved, tables, timing
from benchmarks.server import WrongResultError
from hetlora_kernels.peft import FusedLinear

OPTIONS = argparse.Namespace(quick=True, short=False, only=["layer"], seconds=0.01, how=timing.How())


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path):
    before, file = torch.get_num_threads(), tmp_path / "a.json"
    try:
        assert run.main(["--suite", "peft", "--quick", "--seconds", "0.01", "--threads", "1", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(before)
    data = saved.read(file)
    assert {record["provider"] for record in data["results"]} == {"PEFT", "hetlora"} and {record["clients"] for record in data["results"]} == {1, 8}
    assert all(record["median_s"] > 0 and record["ratio"] > 0 for record in data["results"]) and data["versions"]["peft"]
    table = "\n".join(tables.peft_table(data))
    assert "SmolLM2-135M" in table and "BERT-base" in table and "1.00 x" in table


@pytest.mark.parametrize("case", [peft_suite.Case("layer", shape=(24, 16), rows=8), peft_suite.Case("BERT-base", 8, layers=1)])
def test_a_wrong_gradient_is_not_timed(case, monkeypatch):
    original = hetlora_kernels.peft.fuse

    def spoiling(model):
        original(model)
        for module in model.modules():
            if isinstance(module, FusedLinear):
                module.scaling = {name: value * 1.01 for name, value in module.scaling.items()}

    monkeypatch.setattr(hetlora_kernels.peft, "fuse", spoiling)
    monkeypatch.setattr(peft_suite, "interleaved", lambda *arguments, **options: pytest.fail("timed"))
    with pytest.raises(WrongResultError, match=r"hetlora: the gradient of .* is off by .*; nothing is timed"):
        peft_suite.measure(case, OPTIONS, torch.device("cpu"), torch.get_num_threads())


def test_the_worker_of_large_ranks_answers_a_case_and_a_turn(monkeypatch, capsys):
    """And a layer whose gradients are not stock PEFT's is not timed."""
    threads = torch.get_num_threads()
    monkeypatch.setattr(ranks, "SECONDS", 1e-9)
    monkeypatch.setattr("sys.stdin", io.StringIO("bfloat16 5 24 96 0.1\n\n\n"))
    try:
        ranks.work(fused=True)
    finally:
        torch.set_num_threads(threads)
    ready, *times = capsys.readouterr().out.splitlines()
    assert ready == "ready" and len(times) == 2 and all(float(time) > 0 for time in times)
    right = ranks.Layer.gradients
    monkeypatch.setattr(ranks.Layer, "gradients", lambda self: [(1.02 if isinstance(self.layer, FusedLinear) else 1) * grad for grad in right(self)])
    with pytest.raises(SystemExit, match=r"5 rows, 24 columns, rank 96, torch.bfloat16: a gradient differs from stock PEFT's by .*; nothing is measured"):
        ranks.check(5, 24, 96, torch.bfloat16)
