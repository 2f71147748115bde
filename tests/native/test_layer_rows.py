"""Other ways that are measured beside hetlora: grouped products of the layer, the loss suite, Liger's loss; and the roofline drawn of the rows."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional

from hetlora_kernels.benchmarks import figures, kit, lora, losses, roofline, saved

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")
pytestmark = pytest.mark.skipif(bool(lora.no_grouped_mm(CPU, torch.float32)), reason=lora.no_grouped_mm(CPU, torch.float32) or "there is one")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_give_the_gradients_of_the_reference(dtype, monkeypatch):
    """With ranks that are no multiple of 16 bytes; `check` compares every provider of the case with the reference."""
    p = lora.Problem(40, 24, 20, [4, 1, 7, 4], dtype, CPU)
    named = lora.providers(p)
    assert {"torch padded grouped_mm", "torch grouped_mm by rank"} < named.keys()
    lora.check(p)
    real = lora.grouped

    def wrong(problem, by_rank=False):
        run, results = real(problem, by_rank)
        return run, lambda: tuple(1.05 * t for t in results())

    monkeypatch.setattr(lora, "grouped", wrong)
    with pytest.raises(lora.WrongResultError, match="torch padded grouped_mm: d_x of 40->24"):
        lora.check(p)


@pytest.mark.parametrize("ranks", [[4], [4, 1, 7, 4]])
def test_lorafusions_scheme_with_dropout_has_the_gradients_of_its_own_mask(ranks, monkeypatch):
    """`check` compares it without dropout; with dropout autograd does, on the mask that the scheme drew."""
    p = lora.Problem(40, 24, 20, ranks, torch.float32, CPU, p=0.3)
    masks, real = [], torch.native_dropout
    monkeypatch.setattr(torch, "native_dropout", lambda *given: masks.append(real(*given)) or masks[-1])
    run, results = lora.lorafusion(p)
    run()
    ((_, mask),) = masks
    x, a, bt = (t.detach().double().requires_grad_() for t in (p.x, p.a, p.bt))
    kept = (x * mask / 0.7).chunk(len(ranks))
    terms = [part @ own.t() @ other for part, own, other in zip(kept, a.split(ranks), bt.split(ranks), strict=True)]
    (x @ p.weight.double().t() + torch.cat(terms)).backward(p.d_y.double())
    for found, true in zip(results(), (x.grad, a.grad, bt.grad), strict=True):
        assert float((found - true).norm() / true.norm()) < 1e-6


def test_the_products_by_rank_have_no_zero_rows_beyond_whole_16_bytes(monkeypatch):
    seen, real = [], functional.grouped_mm
    monkeypatch.setattr(lora.F, "grouped_mm", lambda left, right, **own: seen.append(tuple(right.shape)) or real(left, right, **own))
    p = lora.Problem(40, 24, 16, [4, 8, 4, 8], torch.float32, CPU)
    for make, shapes in ((partial(lora.grouped, by_rank=True), [(2, 40, 4), (2, 4, 24), (2, 40, 8), (2, 8, 24)]), (lora.grouped, [(4, 40, 8), (4, 8, 24)])):
        make(p)[0]()
        assert seen == shapes
        seen.clear()


def test_without_grouped_mm_its_rows_are_left_out_and_said(monkeypatch):
    monkeypatch.setattr(lora, "no_grouped_mm", lambda device, dtype: "this torch has none")
    assert not [name for name in lora.providers(lora.Problem(40, 24, 16, [4, 1], torch.float32, CPU)) if "grouped" in name]
    suites, why = kit.chosen_suites(kit.arguments(["--suite", "lora"], "hetlora bench"), CPU)
    assert suites == ["lora"] and "lora: its rows of grouped products: this torch has none" in why


def row(provider: str, seconds: float, op: str = "lora_linear", yardstick: str = "frozen layer", **own: object) -> dict[str, object]:
    of = {"op": op, "shape": "s", "clients": 1, "dtype": "float32", "threads": 1, "provider": provider, "yardstick": yardstick}
    return {**of, "median_s": seconds, "flops": 8, "bytes": 2, **own}


def test_the_roof_is_the_lower_of_copy_and_product():
    ceilings = [row("torch", 1.0, "copy", "torch", bytes=10, flops=None), row("torch", 1.0, "product", "torch", flops=30)]
    rows = [*ceilings, row("frozen layer", 0.1), row("hetlora cpu", 1.0), row("PEFT", 2.0), row("addmm", 4.0), row("hetlora", 1.0, "gram", flops=None)]
    rows += [row("hetlora cpu", 1.0, dtype="bfloat16")]
    ((place, roof),) = roofline.roofs(figures.by_case(rows), figures.ceilings(rows)).items()
    assert place == ("float32", 1) and (roof.own, roof.others) == ([(4.0, 8.0)], [(4.0, 4.0)])
    assert (roof.at(1.0), roof.at(3.0), roof.at(100.0)) == (10.0, 30.0, 30.0)


def test_the_loss_suite_times_forms_that_agree_against_the_products_alone(tmp_path, monkeypatch, capsys):
    arguments = ["--tiny", "--device", "cpu", "--threads", "1", "--suite", "loss", "--only", "float32", "--json", str(tmp_path / "a.json")]
    assert kit.main(arguments) == 0
    rows = [r for r in saved.read(tmp_path / "a.json")["results"] if r["suite"] == "loss"]
    assert [r["provider"] for r in rows] == ["frozen head", "hetlora from states", "hetlora from logits", "torch cross_entropy"]
    assert {(r["op"], r["dtype"], r["clients"], r["flops"], r["bytes"]) for r in rows} == {("loss", "float32", 8, 4 * 56 * 64 * 8, 2 * 8 * (64 + 56) * 4)}
    out = capsys.readouterr().out
    assert "% over the frozen head" in out and "x the time of hetlora from states" in out
    assert {*figures.alternatives({r["provider"]: r for r in rows})} == {"torch cross_entropy"}
    real = losses.by_torch
    monkeypatch.setattr(losses, "by_torch", lambda *given: 1.01 * real(*given))
    assert kit.main(arguments) == 1
    assert "NOT MEASURED loss, after none: WrongResultError: torch.float32: the forms states and torch differ by 1.0e-02" in capsys.readouterr().err


def test_a_loss_is_measured_with_as_many_tokens_as_fit():
    """PyTorch holds float32 logits, their softmax and their gradient, and the logits of the type itself: 16 bytes for each."""
    options = argparse.Namespace(quick=False, short=False, only=None, memory_gb=1.0)
    assert [(case.model, case.tokens) for case in losses.wanted(options, CPU)][::2] == [("SmolLM2-135M", 1024), ("Qwen2.5-1.5B", 256)]
    options.memory_gb = 8.0
    assert [(case.model, case.tokens) for case in losses.wanted(options, torch.device("cuda"))] == [
        ("SmolLM2-135M", 2048),
        ("Qwen2.5-1.5B", 2048),
        ("Llama-3.1-8B", 2048),
    ]


LIGER = """
import argparse, sys, torch
from benchmarks import losses
sizes = argparse.Namespace(words=64, columns=8, tokens=32, rounds=2)
losses.on_device(torch.device("cpu"), sizes, ["float32"], budget=0.0)
real = losses.by_liger
losses.by_liger = lambda *own: real(*own) * 1.01
losses.on_device(torch.device("cpu"), sizes, ["float32"], budget=0.0)
"""


@pytest.mark.slow
@pytest.mark.skipif(find_spec("liger_kernel") is None or find_spec("triton") is None, reason="liger-kernel or triton is not installed")
def test_liger_is_measured_after_it_agrees():
    """In Triton's interpreter, in a process of its own: it is chosen when Triton is imported."""
    done = subprocess.run([sys.executable, "-c", LIGER], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True, check=False)
    assert re.search(r"^\| float32 \| Liger \| .* \|$", done.stdout, re.MULTILINE), done.stderr
    assert done.stderr.rstrip().endswith("torch.float32: the forms logits and Liger differ by 1.0e-02; nothing is measured")
