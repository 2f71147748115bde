"""The server's optimisers against their papers' equations, number by number, on whatever a merge changes; their moments are part of the run's state."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
from tiny import SIZES, Interrupt, Stop, contents, lines, same_bits, tiny_config, tiny_federation, trained_bank, whole_bank

import hetlora_kernels as hk
from hetlora import checkpoint, merge, server, server_optimizer
from hetlora.compare.methods import make_plan
from hetlora.compare.run import run_comparison
from hetlora.config import ConfigError
from hetlora.federation import base_weights
from hetlora.loop import simulate

SHAPES = {"q": (6, 5), "v": (4, 7)}
R = 8
EPS = torch.finfo(torch.float64).eps
# powers of two and their sums, so that moments of whole numbers are exact
SETTINGS = {
    "fedavgm": {"server_optimizer": "fedavgm", "server_lr": 0.5, "server_momentum": 0.75},
    "fedadam": {"server_optimizer": "fedadam", "server_lr": 0.5, "server_momentum": 0.75, "server_beta2": 0.5, "server_tau": 2.0**-6},
}


def steps_by_hand(cfg, changes):
    """How far one number moves at each of its changes, by the papers."""
    m, v, found = 0.0, cfg.server_tau**2, []
    for change in changes:
        if cfg.server_optimizer == "fedavgm":
            m = cfg.server_momentum * m + change
            found.append(cfg.server_lr * m)
        else:
            m = cfg.server_momentum * m + (1 - cfg.server_momentum) * change
            v = cfg.server_beta2 * v + (1 - cfg.server_beta2) * change * change
            found.append(cfg.server_lr * m / (math.sqrt(v) + cfg.server_tau))
    return found


@pytest.mark.parametrize("name", list(SETTINGS))
def test_every_number_moves_as_the_paper_says(tmp_path, name):
    cfg = tiny_config(tmp_path, **SETTINGS[name])
    generator = torch.Generator().manual_seed(0)
    changes = torch.randint(-5, 6, (4, 3, 2), generator=generator).double()
    moments: dict[str, torch.Tensor] = {}
    for number, change in enumerate(changes):
        old = torch.randint(-5, 6, change.shape, generator=generator).double()
        new = {"x": old + change}
        server_optimizer.step(cfg, moments, {"x": old}, new)
        for place in ((row, column) for row in range(3) for column in range(2)):
            own = [float(before[place]) for before in changes[: number + 1]]
            assert float(new["x"][place]) == float(old[place]) + steps_by_hand(cfg, own)[-1]


def test_the_rate_has_a_default_for_each(tmp_path):
    for name, rate in (("fedavgm", 1.0), ("fedadam", 0.01)):
        moved = []
        for cfg in (tiny_config(tmp_path, server_optimizer=name), tiny_config(tmp_path, server_optimizer=name, server_lr=rate)):
            new = {"x": torch.tensor([3.0], dtype=torch.float64)}
            server_optimizer.step(cfg, {}, {"x": torch.zeros(1, dtype=torch.float64)}, new)
            moved.append(float(new["x"]))
        assert moved[0] == moved[1] > 0


@pytest.mark.parametrize("name", ["fedavgm", "fedadam"])
def test_a_weight_that_is_one_number_steps_as_it_would_among_others(tmp_path, name):
    """As a model's own scalar does in full fine-tuning."""
    cfg, found = tiny_config(tmp_path, server_optimizer=name, server_lr=0.5), {}
    for shape in ((), (1,)):
        moments: dict[str, torch.Tensor] = {}
        for value in (2.0, 2.5, 1.0):
            new = {"w": torch.full(shape, value)}
            server_optimizer.step(cfg, moments, {"w": torch.full(shape, 1.5)}, new)
        found[shape] = [new["w"].reshape(1), *(kept.reshape(1) for kept in moments.values())]
    assert all(torch.equal(one, other) for one, other in zip(*found.values(), strict=True)) and found[()][0] != 1.0


@pytest.mark.parametrize(("settings", "numbers"), [({}, 5 * (6 + 4)), ({"merge": "svd"}, 6 * 4), ({"merge": "stack"}, 6 * 4), ({"merge": "residual"}, 6 * 4)])
def test_what_moments_take_is_what_is_kept(tmp_path, settings, numbers):
    shapes = {"one": (6, 4)}
    sizes = [server_optimizer.moment_bytes(tiny_config(tmp_path, server_optimizer=name, **settings), shapes, 5) for name in ("none", "fedavgm", "fedadam")]
    assert sizes == [0, 4 * numbers, 8 * numbers]


def test_moments_of_bfloat16_factors_are_float32(tmp_path):
    cfg, moments = tiny_config(tmp_path, **SETTINGS["fedadam"]), {}
    new = {"x": torch.ones(2, dtype=torch.bfloat16)}
    server_optimizer.step(cfg, moments, {"x": torch.zeros(2, dtype=torch.bfloat16)}, new)
    assert {moment.dtype for moment in moments.values()} == {torch.float32} and new["x"].dtype == torch.bfloat16


def state_of(bank):
    return {key: value.clone() for key, value in bank.state_dict().items()}


@pytest.mark.parametrize("name", list(SETTINGS))
@pytest.mark.parametrize("merging", ["factors", "delta", "median"])
def test_the_change_is_what_the_merge_makes_of_the_bank(tmp_path, name, merging):
    cfg = tiny_config(tmp_path, weights="uniform", clip_median=0, merge=merging, **SETTINGS[name])
    plain = cfg.model_copy(update={"server_optimizer": "none"})
    state = server.ServerState(whole_bank(SHAPES, [R], 0), {}, 1, R)
    moments: dict[str, torch.Tensor] = {}
    for seed in (1, 2):
        uploads = whole_bank(SHAPES, [R, 3], seed)
        old, beside = state_of(state.bank), server.ServerState(state.bank.to(), {}, 1, R)
        merge.aggregate(beside, uploads, uploads, [1, 1], plain, torch.nn.Module())
        expected = {f"bank.{key}": value for key, value in state_of(beside.bank).items()}
        server_optimizer.step(cfg, moments, {f"bank.{key}": value for key, value in old.items()}, expected)
        merge.aggregate(state, uploads, uploads, [1, 1], cfg, torch.nn.Module())
        assert all(torch.equal(value, expected[f"bank.{key}"]) for key, value in state.bank.state_dict().items())
    assert state.moments.keys() == moments.keys() and all(torch.equal(state.moments[key], value) for key, value in moments.items())
    assert not same_bits(state.bank, beside.bank)


FULL = {"train": "full", "weights": "samples", "gamma": 0.99, "ranks": "powerlaw:5:50"}


@pytest.mark.parametrize("settings", [{"merge": "stack"}, FULL], ids=["stack", "full"])
def test_a_base_that_changes_has_momentum_too(tmp_path, settings):
    """Two rounds of which the second has no change: all that moves the base then is momentum, beta times the first round's step."""
    cfg = tiny_config(tmp_path, server_optimizer="fedavgm", server_momentum=0.5, **settings)
    federation = tiny_federation(SIZES, torch.float64)
    weights = base_weights(cfg, federation.model, federation.shapes)
    start = {name: weight.detach().clone() for name, weight in weights.items()}
    state = server.ServerState(hk.AdapterBank(federation.shapes, [0 if cfg.train == "full" else 4], dtype=torch.float64), {}, 1, 4)
    still = {name: weight.clone() for name, weight in start.items()}
    if cfg.train == "full":
        first = {name: weight.detach() + 1 for name, weight in federation.model.named_parameters()}
        given = [first, lambda: {name: weight.detach().clone() for name, weight in federation.model.named_parameters()}]
        weighed = (torch.ones(1, 1, dtype=torch.float64), torch.ones(1, dtype=torch.float64))
    else:
        nothing = hk.AdapterBank(federation.shapes, [2], dtype=torch.float64)  # B = 0
        given, weighed = [trained_bank(federation.shapes, [2], torch.float64), lambda: nothing], None
    cfg = cfg.model_copy(update={"clip_median": 0.0})
    merge.aggregate(state, given[0], given[0], [1], cfg, federation.model, weighed)
    moved = {name: weight.detach() - still[name] for name, weight in weights.items()}
    middle = {name: weight.detach().clone() for name, weight in weights.items()}
    merge.aggregate(state, given[1](), given[1](), [1], cfg, federation.model, weighed)
    for name, weight in weights.items():
        assert bool(moved[name].any())
        error = (weight.detach() - middle[name] - 0.5 * moved[name]).abs()
        assert bool((error <= 4 * EPS * (weight.detach().abs() + middle[name].abs() + moved[name].abs())).all())
    assert {key.removeprefix("m.base.") for key in state.moments} == set(weights)


def test_a_frozen_factor_does_not_move_on_with_momentum(tmp_path):
    """RoLoRA: moments of A from an even round wait for the next even round."""
    cfg = tiny_config(tmp_path / "run", train="alternating", weights="samples", gamma=0.99, rounds=3, lr=0.05, server_optimizer="fedavgm")
    banks = []

    def keep(record):
        banks.append(checkpoint.load_checkpoint(tmp_path / "run")[1])

    simulate(cfg, federation=tiny_federation(SIZES), quiet=True, on_round_end=keep)
    for number, (before, after) in enumerate(itertools.pairwise(banks), 1):
        moved = {key.split(".")[1] for key in before if key.startswith("bank.") and not torch.equal(before[key], after[key])}
        assert moved == {"bt" if number % 2 else "a"}
    assert {key.split(".")[3] for key in banks[-1] if key.startswith("server.")} == {"a", "bt"}


KINDS = {
    "delta": {"merge": "delta", **SETTINGS["fedadam"]},
    "stack": {"merge": "stack", **SETTINGS["fedavgm"]},
    "full": {**FULL, **SETTINGS["fedadam"]},
    "alternating": {"train": "alternating", "weights": "samples", "gamma": 0.99, **SETTINGS["fedavgm"]},
    "svd": {"merge": "svd", **SETTINGS["fedadam"]},
    "fold": {"train": "fold", "weights": "samples", "gamma": 0.99, **SETTINGS["fedavgm"]},
    "residual": {"merge": "residual", **SETTINGS["fedadam"]},
    "chosen": {"train": "chosen-rows", "weights": "uniform", "gamma": 0.99, **SETTINGS["fedadam"]},
}


@pytest.mark.parametrize("kind", list(KINDS))
def test_a_stopped_run_goes_on_with_its_moments(tmp_path, kind):
    settings = {"rounds": 3, "lr": 0.01, **KINDS[kind]}
    simulate(tiny_config(tmp_path / "whole", **settings), federation=tiny_federation(SIZES), quiet=True)
    with pytest.raises(Stop):
        simulate(tiny_config(tmp_path / "part", **settings), federation=tiny_federation(SIZES), observer=Interrupt("round_end", 3))
    simulate(tiny_config(tmp_path / "part", **settings), resume=True, federation=tiny_federation(SIZES), quiet=True)
    assert lines(tmp_path / "part") == lines(tmp_path / "whole")
    part, whole = contents(tmp_path / "part"), contents(tmp_path / "whole")
    assert part["checkpoint.safetensors"] == whole["checkpoint.safetensors"]
    assert any(key.startswith("server.") and bool(value.any()) for key, value in checkpoint.load_checkpoint(tmp_path / "whole")[1].items())


@pytest.mark.parametrize(("setting", "with_"), [("server_lr", "none"), ("server_momentum", "none"), ("server_beta2", "fedavgm"), ("server_tau", "fedavgm")])
def test_settings_that_no_optimiser_reads_are_refused(tmp_path, setting, with_):
    with pytest.raises(ConfigError, match=rf"{setting} = 0.5: only for server_optimizer = .* got server_optimizer = '{with_}'"):
        tiny_config(tmp_path, server_optimizer=with_, **{setting: 0.5})


def test_a_comparison_takes_them_as_variants(tmp_path):
    methods = "homlora-max,homlora-max+server_optimizer=fedavgm,delta+server_optimizer=fedadam+server_lr=0.002"
    plan = make_plan("test", seeds=1, methods=methods)
    found = run_comparison(tiny_config(tmp_path / "c", rounds=3, lr=0.05), plan, None, tiny_federation(SIZES))
    assert [(cell.cfg.server_optimizer, cell.cfg.server_lr) for cell in found.cells] == [("none", 0.0), ("fedavgm", 0.0), ("fedadam", 0.002)]
    finals = [lines(Path(cell.cfg.output))[-1]["evaluation"]["client_text"]["loss"] for cell in found.cells]
    assert len(set(finals)) == 3
