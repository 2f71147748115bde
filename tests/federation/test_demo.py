"""The demo: plain words first, disjoint packages, lambda by its rule, four methods that end with numbers on one page."""

from __future__ import annotations

import math

import pytest

from hetlora import demo
from hetlora.compare import figures
from hetlora.compare.page import write_comparison
from hetlora.observer import Observer
from hetlora.result import Result


class Recorder(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []
        self.worked: list[tuple[str, int, int]] = []
        self.cells: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def work(self, what: str, done: int, total: int) -> None:
        self.worked.append((what, done, total))

    def cell(self, label, done, total, summary) -> None:
        self.cells.append(label)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_calibration_packages_take_no_part_in_the_federation() -> None:
    federated, calibration = demo.packages()
    assert calibration and not set(federated) & set(calibration)


def test_fast_demo_opens_with_plain_words_runs_four_methods_and_can_be_run_again(tmp_path, cache, every_look) -> None:
    seen = Recorder()
    comparison, words = demo.run_demo(seen, fast=True, output=str(tmp_path / "demo"))
    assert seen.messages[: len(words)] == words and words[0].startswith("What is simulated: ") and "Fast: " in words[-1]
    assert not any(symbol in text for text in words for symbol in ("gamma", "lambda", "||")), "symbols come after words"
    assert any(text.startswith("pruning (hetlora): gamma = 0.99") and "lambda = " in text for text in seen.messages[len(words) :])
    assert seen.cells == [f"{name} seed 1" for name in ("homlora-min", "hetlora", "fold", "homlora-max")]
    assert [(done, total) for what, done, total in seen.worked if "lambda = 0" in what] == [(round, 3) for round in range(4)]
    table = figures.tabulate(comparison)
    assert {metric.key for metric in table.metrics} >= set(demo.COLUMNS)
    assert all(math.isfinite(own["global_final"].mean) for own in table.tallies.values())
    page = write_comparison(table, words).read_text()
    assert page.index("What is simulated") < page.index("<h2>") and "What each method reaches" in page and all(name in page for name in demo.METHODS_SHOWN)
    again, _ = demo.run_demo(seen, fast=True, output=str(tmp_path / "demo"), prune_lambda=0.0, rounds=1)
    assert again.folder == tmp_path / "demo-2" and any("lambda = 0, as asked for" in text for text in seen.messages)


@pytest.mark.parametrize(("fast", "model"), [(False, demo.MODEL), (True, demo.FAST_MODEL)], ids=["whole", "fast"])
def test_the_base_model_is_the_demos_own(tmp_path, monkeypatch, fast, model) -> None:
    class AskedFor(Exception):
        pass

    def ask(cfg, progress, wanted):
        raise AskedFor(cfg.model, wanted)

    monkeypatch.setattr(demo, "resolve_model", ask)
    with pytest.raises(AskedFor) as asked:
        demo.run_demo(Recorder(), fast, output=str(tmp_path / "demo"))
    assert asked.value.args == ("demo", model)


def test_the_words_say_how_many_devices_there_are(tmp_path) -> None:
    cfg = demo.Config.create("test", data="stdlib:a,b,c,d,e", held_out_clients=2)
    text = demo.opening(cfg)[0]
    assert "3 packages of Python's library stand for 3 devices" in text and "2 more" in text


@pytest.mark.parametrize(("losses", "expected"), [({1000.0: 2.0, 100.0: 1.004}, 100.0), ({1000.0: 1.0}, 1000.0), (dict.fromkeys(demo.LAMBDAS, 1.1), 0.0)])
def test_lambda_is_the_largest_that_costs_at_most_the_tolerance(monkeypatch, tmp_path, losses, expected) -> None:
    tried = []

    def fake(cfg, observer, federation):
        tried.append(cfg.prune_lambda)
        loss = 1.0 if cfg.prune_lambda == 0 else losses[cfg.prune_lambda]
        return Result([], {"evaluation_after": {"client_text": {"loss": loss}}}, None, {}, tmp_path)

    class Data:
        data = type("D", (), {"clients": []})
        model = model_name = shapes = tokenizer = None

    monkeypatch.setattr(demo, "simulate", fake)
    monkeypatch.setattr(demo, "load_data", lambda cfg, tokenizer: Data.data)
    monkeypatch.setattr(demo, "starting_ranks", lambda *_: type("P", (), {"r_min": 2, "r_max": 8}))
    cfg = demo.Config.create("test", **demo.SETTINGS)
    assert demo.choose_lambda(cfg, ["dbm", "http"], Data, Recorder()) == expected
    assert tried[0] == 0.0 and tried == sorted(tried[:1]) + sorted(tried[1:], reverse=True)
