"""The demo: disjoint packages, lambda by its rule, a run that ends with numbers."""

from __future__ import annotations

import math

import pytest

from hetlora import demo
from hetlora.loop import Result
from hetlora.observer import Observer


class Recorder(Observer):
    def __init__(self) -> None:
        self.messages: list[str] = []

    def message(self, text: str) -> None:
        self.messages.append(text)


@pytest.fixture
def cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def test_calibration_packages_take_no_part_in_the_federation() -> None:
    federated, calibration = demo.packages()
    assert calibration and not set(federated) & set(calibration)


def test_fast_demo_runs_reports_its_choices_and_can_be_run_again(tmp_path, cache) -> None:
    seen = Recorder()
    result = demo.run_demo(seen, fast=True, output=str(tmp_path / "demo"))
    assert len(result.history) == 3 and math.isfinite(result.summary["evaluation_after"]["client_text"]["loss"])
    text = "\n".join(seen.messages)
    assert "gamma = 0.99" in text and "lambda = " in text and "fast" in text
    again = demo.run_demo(seen, fast=True, output=str(tmp_path / "demo"), prune_lambda=0.0)
    assert again.run_dir == tmp_path / "demo-2"


@pytest.mark.parametrize(("losses", "expected"), [({1000.0: 2.0, 300.0: 1.004}, 300.0), ({1000.0: 1.0}, 1000.0), (dict.fromkeys(demo.LAMBDAS, 1.1), 0.0)])
def test_lambda_is_the_largest_that_costs_at_most_the_tolerance(monkeypatch, tmp_path, losses, expected) -> None:
    tried = []

    def fake(cfg, federation):
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
