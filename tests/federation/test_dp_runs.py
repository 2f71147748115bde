"""Whole runs with differential privacy of clients: epsilon is the accountant's, what has no bound is refused, and a round ends whoever answers."""

from __future__ import annotations

import json
import math
import sys

import pytest
import torch
from click.testing import CliRunner
from test_dp import KINDS, PRIVATE, RISK, config
from test_resume import assert_same
from tiny import SIZES, Interrupt, Stop, lines, tiny_config, tiny_federation

from hetlora import privacy, server, training
from hetlora.cli import cli
from hetlora.config import ConfigError
from hetlora.kinds import MERGES, TRAININGS
from hetlora.loop import simulate
from hetlora.report.page import write_report

# ---------------------------------------------------------------- epsilon


def gaussian_delta(epsilon: float, sigma: float) -> float:
    """delta of one Gaussian mechanism, exact (Balle and Wang, arXiv 1805.06530, theorem 8)."""

    def phi(x: float) -> float:
        return math.erfc(-x / math.sqrt(2)) / 2

    return phi(1 / (2 * sigma) - epsilon * sigma) - math.exp(epsilon) * phi(-1 / (2 * sigma) - epsilon * sigma)


def records(*rounds):
    """Lines of rounds.jsonl with these names; what begins with '-' was left out."""
    return [{"round": 0, "clients": [], "dropped": []}] + [
        {
            "round": i + 1,
            "clients": [{"name": name} for name in names if name[0] != "-"],
            "dropped": [{"name": name[1:], "reason": ""} for name in names if name[0] == "-"],
        }
        for i, names in enumerate(rounds)
    ]


def test_epsilon_is_that_of_the_client_in_most_rounds(tmp_path):
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[dp]')")
    from dp_accounting import rdp

    cfg = config(tmp_path, dp_noise_multiplier=2.0, dp_delta=1e-6)
    history = records("ab", ["b", "-c"], ["-c", "d"], "c")
    accountant = rdp.RdpAccountant()
    accountant.compose(dp.GaussianDpEvent(2.0), 3)  # c, of which an answer that was refused counts too
    found = privacy.epsilon(cfg, history, 5)
    assert found == accountant.get_epsilon(1e-6)
    # between the exact value and the plain conversion of Renyi's divergence n a / 2 sigma^2
    assert gaussian_delta(found, 2.0 / math.sqrt(3)) < 1e-6
    assert found <= min(3 * a / 8 + math.log(1e6) / (a - 1) for a in range(2, 60))
    assert privacy.epsilon(cfg, records(), 5) == 0.0
    assert privacy.epsilon(config(tmp_path), history, 5) is None
    assert privacy.spent(cfg, history, 5) == {"privacy": {"epsilon": found, "delta": 1e-6, "secret": False}}
    assert privacy.spent(tiny_config(tmp_path), history, 5) == {}


def test_coins_give_the_epsilon_of_poisson_sampling(tmp_path):
    dp = pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[dp]')")
    from dp_accounting import rdp

    cfg = config(tmp_path, dp_noise_multiplier=1.5, dp_sampling="poisson", clients_per_round=10)
    history = records("", "a", "", "b")
    accountant = rdp.RdpAccountant()
    accountant.compose(dp.PoissonSampledDpEvent(0.01, dp.GaussianDpEvent(1.5)), 4)
    assert privacy.epsilon(cfg, history, 1000) == pytest.approx(accountant.get_epsilon(1e-5), rel=1e-9)
    assert privacy.epsilon(cfg, history, 1000) < privacy.epsilon(cfg, history, 20)
    assert privacy.epsilon(cfg, history, 5) == privacy.epsilon(cfg.model_copy(update={"dp_sampling": "fixed"}), records(*"aaaa"), 5), "all take part"


def test_a_coin_is_a_clients_own():
    names = [f"c{k}" for k in range(10)]
    rounds = range(1, 1001)
    drawn = [server.toss(names, 0.3, 7, number) for number in rounds]
    for name in names:
        count = sum(name in chosen for chosen in drawn)
        assert abs(count / 1000 - 0.3) <= math.sqrt(RISK / 2000)  # Hoeffding
        assert [server.toss([name], 0.3, 7, number) == [name] for number in rounds] == [name in chosen for chosen in drawn]
    assert server.toss(names, 1.0, 7, 1) == names and len({tuple(chosen) for chosen in drawn}) > 100


# ---------------------------------------------------------------- what is refused


REFUSED = {
    "dp_noise_multiplier = 1.0: only with a clip": {"dp_noise_multiplier": 1.0, "weights": "uniform"},
    "weights = 'sparsity': .* use weights = 'uniform'": {**PRIVATE, "weights": "sparsity"},
    "weights = 'samples': .* use weights = 'uniform'": {**PRIVATE, "weights": "samples"},
    "gamma = 0.5: .* use gamma = 1": {**PRIVATE, "gamma": 0.5},
    "ranks = 'sized:2:8': .* a list or a file": {**PRIVATE, "ranks": "sized:2:8"},
    "ranks = 'column:ram:2:8': .* a list or a file": {**PRIVATE, "ranks": "column:ram:2:8"},
    "cobatch = True: clients that train in one batch .* use cobatch = False": {**PRIVATE, "dp_noise_multiplier": 1.0, "cobatch": True},
    "clip_median = 2.0: .* leave it out": {**PRIVATE, "clip_median": 2.0},
    "clip_update = 1.0: .* leave it out": {**PRIVATE, "clip_update": 1.0},
    "keep_best = True: .* leave it out": {**PRIVATE, "keep_best": True},
    "patience = 2: .* leave it out": {**PRIVATE, "patience": 2},
    "unowned_rows = 'zero': .* leave it out": {**PRIVATE, "train": "b-only", "merge": "factors", "gamma": 0.99, "unowned_rows": "zero"},
}
BOUNDED = [name for name, kind in MERGES.items() if not kind.unbounded]


@pytest.mark.parametrize("message", REFUSED)
def test_what_has_no_bound_is_refused_by_name(tmp_path, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config(tmp_path, **REFUSED[message])


@pytest.mark.parametrize("name", [name for name in MERGES if name not in BOUNDED])
def test_merges_that_are_not_of_the_sum_are_refused(tmp_path, name):
    train = next((kind.name for kind in TRAININGS.values() if kind.merge == name), "adapters")
    own = {"train": train, **({"merge": name} if train == "adapters" else {"merge": "factors", "gamma": 0.99})}
    if TRAININGS[train].no_ranks:
        own["ranks"] = "powerlaw:5:50"
    with pytest.raises(ConfigError, match=rf"dp_clipping_norm = 1.0: merge = '{name}' is no function .* use --method fold, ffa-lora or rolora"):
        tiny_config(tmp_path, **{**PRIVATE, **own})


def test_a_delta_that_lays_a_client_open_and_a_missing_accountant(tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"dp_delta = 0.25: expected less than 1 over the number of clients \(4\)"):
        simulate(config(tmp_path / "run", dp_noise_multiplier=1.0, dp_delta=0.25), federation=tiny_federation(SIZES), quiet=True)
    monkeypatch.setitem(sys.modules, "dp_accounting", None)
    with pytest.raises(ConfigError, match=r"dp-accounting .* install it with: pip install '.\[dp\]'"):
        simulate(config(tmp_path / "run", dp_noise_multiplier=1.0), federation=tiny_federation(SIZES), quiet=True)
    assert not (tmp_path / "run").exists()


def test_the_command_says_it_in_one_line():
    done = CliRunner().invoke(cli, ["run", "--dp-clipping-norm", "1", "--data", "nowhere"])
    assert done.exit_code == 2 and "weights = 'samples': under dp_clipping_norm every client counts the same" in done.output
    assert "Traceback" not in done.output


# ---------------------------------------------------------------- a run


RUN = {"lr": 0.05, "rounds": 4, "ranks": "2,8,4,6", "dp_clipping_norm": 0.5, "dp_noise_multiplier": 0.8}


@pytest.mark.parametrize("own", [{**KINDS["fold"]}, {"dp_sampling": "poisson", "clients_per_round": 1}], ids=["fold", "poisson"])
def test_a_run_that_was_stopped_ends_with_the_same_bits_and_epsilon(tmp_path, own):
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[dp]')")
    cfg, stopped = (config(tmp_path / name, **{**RUN, **own}) for name in ("whole", "stopped"))
    whole = simulate(cfg, federation=tiny_federation(SIZES), quiet=True)
    with pytest.raises(Stop):
        simulate(stopped, federation=tiny_federation(SIZES), observer=Interrupt("evaluate", 4))
    part = lines(tmp_path / "stopped")
    assert 0 < len(part) < 5
    resumed = simulate(stopped, resume=True, federation=tiny_federation(SIZES), quiet=True)
    assert_same(resumed, whole)
    spent = [record["privacy"]["epsilon"] for record in lines(tmp_path / "stopped")]
    assert spent == [record["privacy"]["epsilon"] for record in whole.history]
    assert spent == sorted(spent) and spent[0] == 0 < spent[-1] == resumed.summary["privacy"]["epsilon"]
    assert resumed.summary["privacy"] == json.loads((tmp_path / "stopped" / "summary.json").read_text())["privacy"]
    page = write_report(tmp_path / "stopped").read_text(encoding="utf-8")
    assert f"epsilon {spent[-1]:.2f} at delta 1e-05 (simulated: noise from the run" in page


def test_a_round_whose_answers_are_all_refused_goes_on_with_the_noise(tmp_path, monkeypatch):
    """An end there would tell everybody of the clients' updates."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[dp]')")

    train = training.train_one_by_one

    def spoiled(model, bank, clients, cfg, number, *rest):
        trained, results = train(model, bank, clients, cfg, number, *rest)
        if number == 2:
            with torch.no_grad():
                trained.a["model.layers.0.self_attn.q_proj"].fill_(float("nan"))
        return trained, results

    monkeypatch.setattr(training, "train_one_by_one", spoiled)
    result = simulate(config(tmp_path / "run", **{**RUN, "rounds": 2}), federation=tiny_federation(SIZES), quiet=True)
    first, last = result.history[1:]
    assert len(first["clients"]) == len(last["dropped"]) == 3 and last["clients"] == []
    assert last["privacy"]["epsilon"] > first["privacy"]["epsilon"]
    assert last["evaluation"]["client_text"]["loss"] != first["evaluation"]["client_text"]["loss"]


def test_a_round_without_clients_has_the_noise_of_any_other(tmp_path):
    """Whether nobody was drawn must not show in the bank."""
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[dp]')")
    seen: list = []
    cfg = config(tmp_path / "run", **{**RUN, "rounds": 4, "dp_sampling": "poisson", "clients_per_round": 1, "local_steps": 1, "diagnostics": True})
    result = simulate(cfg, federation=tiny_federation(SIZES), quiet=True, on_round_end=seen.append)
    losses = [record["evaluation"]["client_text"]["loss"] for record in result.history]
    empty = [record["round"] for record in result.history[1:] if not record["clients"]]
    assert 0 < len(empty) < 4, "so it is with this seed"
    assert all(losses[number] != losses[number - 1] for number in empty)
    assert all(record["bytes_up"] == 0 for record in result.history if record["round"] in empty)
    write_report(cfg.output)
