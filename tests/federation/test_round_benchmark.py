"""The round suite of the benchmarks: its forms train the same, a wrong loss is not timed, and Flower's app does what stock PEFT does."""

from __future__ import annotations

import argparse
import importlib.util
import json

import pytest
import torch
from tiny import whole_bank

from benchmarks import rounds, run, saved, tables, timing
from benchmarks.server import WrongResultError

OPTIONS = argparse.Namespace(quick=True, short=False, only=None, seconds=0.01, how=timing.How())
CPU = torch.device("cpu")
CASE = rounds.Case(4, 32)


def factors(bank, k: int) -> rounds.Factors:
    found = {}
    for name, layout in bank.layouts.items():
        rows = layout.rows(k)
        found[name] = (bank.a[name].detach()[rows], bank.bt[name].detach()[rows].t())
    return found


def test_ranks_are_spread_over_the_range():
    assert [rounds.Case(k, 16).ranks for k in (4, 8)] == [[5, 10, 22, 46], [5, 7, 9, 13, 18, 24, 34, 46]]


def test_the_mean_of_stock_peft_is_that_of_the_server():
    """The second client's B A is the first's, its rows in another order and two of B = 0 behind: both weigh a half, and sums of whole numbers are exact."""
    bank = whole_bank({"q": (6, 4), "v": (3, 5)}, [3, 5], 0)
    with torch.no_grad():
        for name in bank.shapes:
            for side in (bank.a[name], bank.bt[name]):
                side[3:6] = side[:3].flip(0)
            bank.bt[name][6:] = 0
    merged = bank.aggregate([0.5, 0.5], 6)
    found = rounds.mean_by_norm([factors(bank, 0), factors(bank, 1)], 6)
    for name, (a, b) in found.items():
        assert torch.equal(a, merged.a[name].detach()) and torch.equal(b, merged.bt[name].detach().t())
    assert bool(found["v"][0][:5].any(1).all())


def test_a_wrong_loss_is_not_timed(monkeypatch):
    real = rounds.hetlora_round
    monkeypatch.setattr(rounds, "hetlora_round", lambda of: lambda: [(first, last * 1.001) for first, last in real(of)()])
    monkeypatch.setattr(rounds, "flower_round", lambda *_: None)
    monkeypatch.setattr(rounds, "interleaved", lambda *arguments, **options: pytest.fail("timed"))
    with pytest.raises(WrongResultError, match=r"hetlora: a loss of .*, K=4 is off by 1.0\de-03; nothing is timed"):
        rounds.measure(CASE, OPTIONS, CPU, torch.get_num_threads())


@pytest.mark.slow
def test_a_quick_run_writes_every_figure(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(rounds, "QUICK", [(4, 32)])
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else real(name, *rest))
    before, file = torch.get_num_threads(), tmp_path / "a.json"
    try:
        assert run.main(["--suite", "round", "--quick", "--seconds", "0.01", "--threads", "1", "--device", "cpu", "--json", str(file)]) == 0
    finally:
        torch.set_num_threads(before)
    data = saved.read(file)
    assert [r["provider"] for r in data["results"]] == ["frozen base", "hetlora", "PEFT one by one"] and all(r["median_s"] > 0 for r in data["results"])
    assert "K=4: not measured, ray not installed (pip install '.[simulation]')" in capsys.readouterr().err
    assert tables.round_table(data)[2].startswith("| 4 | 32 | 1 | ")


def test_ratios_are_quotients_of_the_medians_in_the_line():
    """The median of the ratios of each round, which the file has too, is another number."""
    case = {"clients": 4, "shape": "X, 64 tokens a client", "threads": 2}
    times = {"frozen base": (1.0, 1.0, 3), "hetlora": (0.9, 1.3, 3), "PEFT one by one": (1.8, 2.9, 1)}
    results = [{**case, "provider": name, "median_s": median, "ratio": ratio, "rounds": n} for name, (median, ratio, n) in times.items()]
    row = tables.round_table({"results": results})[2]
    assert row == "| 4 | 64 | 2 | 3; PEFT one by one: 1 | 1 s | 900 ms | 0.90 x | 1.8 s | 2.00 x |"


def test_what_was_timed_before_is_not_warmed_up_again(monkeypatch):
    calls = []
    runs = {name: lambda name=name: calls.append(name) for name in ("short", "long")}
    known = {"short": 1e-3, "long": timing.ENDLESS_SECONDS + 1}
    found = timing.interleaved(runs, "short", CPU, seconds=0.0, known=known)
    assert calls == ["short"] * 3 and found["long"].times == [known["long"]]


def test_a_page_without_its_file_says_so(tmp_path):
    text = "<!-- benchmarks: none.json round -->\n| old |\n<!-- benchmarks end -->\n"
    once = tables.render(text, tmp_path, tmp_path / "x.md")
    assert once == "<!-- benchmarks: none.json round -->\nNot measured yet.\n<!-- benchmarks end -->\n"


@pytest.mark.slow
def test_flowers_clients_train_as_stock_peft_does():
    """Its app in this process, through Flower's messages."""
    from flower_grid import LocalGrid
    from flwr.app import Context, RecordDict

    from benchmarks import flower_round

    before, found = torch.get_num_threads(), {"seconds": [], "losses": []}
    grid = LocalGrid(flower_round.client_app, {}, [{} for _ in range(CASE.clients)])
    try:
        torch.set_num_threads(1)
        flower_round.server(json.dumps([CASE.clients, CASE.tokens, True]), 2, found)(grid, Context(1, 0, {}, RecordDict(), {}))
        stock = rounds.peft_round(rounds.Federation(CASE, True, CPU))()
    finally:
        torch.set_num_threads(before)
    assert len(found["seconds"]) == 2 and [tuple(own) for own in found["losses"]] == stock
    rounds.check(CASE, {"PEFT one by one": stock, "Flower": found["losses"]})
