"""Uploads of attackers: what the default clip, the trimmed mean and the median bound, and what they do not. docs/security.md says the same."""

from __future__ import annotations

import pytest
import torch
from test_merge import SHAPES, padded
from test_messages import Recorder
from tiny import lines, multiply, same_bits, tiny_config, tiny_federation, trained_bank, watch_training

import hetlora_kernels as hk
from hetlora import fold, merge, robust, server
from hetlora.config import ConfigError
from hetlora.loop import simulate

CLIENTS = 10
MERGES = {"factors": {}, "uniform": {"weights": "uniform"}, "median": {"merge": "median", "weights": "uniform"}}
MERGES["trimmed"] = {"merge": "trimmed", "weights": "uniform", "trim": 0.4}


@pytest.fixture
def server_bank():
    return trained_bank(SHAPES, [4], torch.float64, seed=2)


@pytest.fixture
def honest(server_bank):
    """(received, uploads): each client moves by the same step and some noise of its own, the step three times as long."""
    received = server_bank.truncate([4] * CLIENTS)
    uploads = received.select(range(CLIENTS))
    step = trained_bank(SHAPES, [4], torch.float64, seed=3).truncate([4] * CLIENTS)
    noise = trained_bank(SHAPES, [4] * CLIENTS, torch.float64, seed=4)
    with torch.no_grad():
        for new, common, own in zip(uploads.parameters(), step.parameters(), noise.parameters(), strict=True):
            new.add_(0.3 * common + 0.1 * own)
    return received, uploads


def vector(bank) -> torch.Tensor:
    return torch.cat([factor.detach().flatten() for factor in bank.parameters()])


@torch.no_grad()
def attack(kind: str, received, uploads, attackers: int):
    """The uploads of the first `attackers` clients replaced."""
    bank = uploads.select(range(CLIENTS))
    pairs = list(zip(bank.parameters(), received.parameters(), [*bank.layouts.values()] * 2, strict=True))
    for k in range(attackers):
        for new, old, layout in pairs:
            rows = layout.rows(k)
            if kind.startswith("inflate"):
                new[rows] *= float(kind.split()[1])
            elif kind == "flip":
                new[rows] = -new[rows]
            elif kind == "reverse":
                new[rows] = old[rows] - 10 * (new[rows] - old[rows])
            elif kind == "zeros":
                new[rows] = 0
            elif kind == "copies":
                new[rows] = new[layout.rows(CLIENTS - 1)]
    return bank


ATTACKS = ("inflate 10", "inflate 1e6", "inflate 1e15", "flip", "reverse", "zeros", "copies")


def merged(tmp_path, received, uploads, bank, **settings):
    state = server.ServerState(bank, {}, 1, 4)
    result = merge.aggregate(state, uploads, received, [1] * CLIENTS, tiny_config(tmp_path, **settings), torch.nn.Module())
    return state.bank, result


@pytest.mark.parametrize("settings", MERGES.values(), ids=MERGES)
@pytest.mark.parametrize("attackers", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ATTACKS)
def test_what_a_minority_can_do_is_bounded(tmp_path, server_bank, honest, kind, attackers, settings):
    """The merged step is at most three times the usual one, and under the median and the trimmed mean it goes the honest way."""
    received, uploads = honest
    truth = vector(merged(tmp_path, received, uploads, server_bank, **settings)[0]) - vector(server_bank)
    bank, result = merged(tmp_path, received, attack(kind, received, uploads, attackers), server_bank, **settings)
    step = vector(bank) - vector(server_bank)
    sizes = merge.update_norms(uploads, received)
    assert bool(torch.isfinite(step).all()) and float(step.norm()) <= 3.001 * float(sizes.max())
    assert torch.allclose(result.weights.sum(0), torch.ones(2, dtype=torch.float64))
    if settings.get("merge"):
        assert float(step @ truth / step.norm() / truth.norm()) > 0.8
        assert float(step.norm()) < 2 * float(truth.norm())
    if "merge" not in settings and kind not in ("reverse", "copies"):
        assert float(result.weights[:attackers].sum(0).max()) < 1.1 * attackers / CLIENTS, "no more than the share that is due"
    assert kind == "zeros" or (min(result.clips) == 1) == (kind == "copies"), "here a download is no longer than three usual steps"


def test_an_unclipped_mean_is_lost_to_one_inflated_upload(tmp_path, server_bank, honest):
    received, uploads = honest
    poisoned = attack("inflate 10", received, uploads, 1)
    bank, result = merged(tmp_path, received, poisoned, server_bank, clip_median=0)
    assert float(result.weights[0].min()) > 0.85 and result.clips == []
    assert float((vector(bank) - vector(server_bank)).norm()) > 8 * float(merge.update_norms(uploads, received).max())


def test_three_of_ten_who_reverse_their_updates_turn_the_clipped_mean_and_one_does_not(tmp_path, server_bank, honest):
    """What the clip does not defend against: 7 - 3 * 3 < 0."""
    received, uploads = honest
    truth = vector(merged(tmp_path, received, uploads, server_bank, weights="uniform")[0]) - vector(server_bank)

    def along(attackers):
        bank, _ = merged(tmp_path, received, attack("reverse", received, uploads, attackers), server_bank, weights="uniform")
        return float((vector(bank) - vector(server_bank)) @ truth)

    assert along(1) > 0 > along(3)


@pytest.mark.parametrize("scope", ["module", "client"])
@pytest.mark.parametrize(("zeros", "cap"), [(1, 0), (4, 0), (5, 2.0), (9, 2.0)])
def test_zero_uploads_have_no_weight(tmp_path, server_bank, honest, zeros, cap, scope):
    """With half of the norms zero, their median is that of the others."""
    received, uploads = honest
    _, result = merged(tmp_path, received, attack("zeros", received, uploads, zeros), server_bank, weight_cap=cap, weight_scope=scope)
    assert float(result.weights[:zeros].max()) == 0 and torch.allclose(result.weights.sum(0), torch.ones(2, dtype=torch.float64))
    _, result = merged(tmp_path, received, attack("zeros", received, uploads, CLIENTS), server_bank, weight_cap=cap, weight_scope=scope)
    assert torch.allclose(result.weights, torch.full((CLIENTS, 2), 0.1, dtype=torch.float64)), "nothing else is there"


@pytest.mark.parametrize("scope", ["module", "client"])
def test_zero_uploads_that_are_clipped_back_to_their_download_have_no_weight(tmp_path, server_bank, honest, scope):
    """Here the download is long: after the clip such an upload is nearly the download, whose norm would earn it a share."""
    received, uploads = honest
    with torch.no_grad():
        for bank in (received, uploads):
            for factor, start in zip(bank.parameters(), server_bank.truncate([4] * CLIENTS).parameters(), strict=True):
                factor.add_(20 * start)
        for factor in server_bank.parameters():
            factor.mul_(21)
    _, result = merged(tmp_path, received, attack("zeros", received, uploads, 4), server_bank, weight_scope=scope)
    assert max(result.clips[:4]) < 1 and float(result.weights[:4].max()) == 0


def test_copies_weigh_what_their_original_does(tmp_path, server_bank, honest):
    received, uploads = honest
    _, result = merged(tmp_path, received, attack("copies", received, uploads, 4), server_bank)
    assert all(torch.equal(result.weights[k], result.weights[-1]) for k in range(4))


def test_usual_uploads_keep_the_bits_of_the_published_merge(tmp_path, server_bank, honest):
    received, uploads = honest
    bank, result = merged(tmp_path, received, uploads, server_bank)
    plain, unclipped = merged(tmp_path, received, uploads, server_bank, clip_median=0)
    assert result.clips == [1.0] * CLIENTS and same_bits(bank, plain) and torch.equal(result.weights, unclipped.weights)


def test_an_honest_run_is_not_clipped_and_equals_the_run_without_a_clip(tmp_path):
    runs = [
        simulate(tiny_config(tmp_path / name, clients_per_round=10, lr=0.02, **settings), federation=tiny_federation([3, 5, 2, 7, 9, 4, 6, 1, 8, 5]))
        for name, settings in (("default", {}), ("off", {"clip_median": 0}))
    ]
    assert same_bits(runs[0].bank, runs[1].bank)
    assert [line["clients"] for line in lines(runs[0].run_dir)] == [line["clients"] for line in lines(runs[1].run_dir)]


def test_a_large_rank_is_no_offence(tmp_path):
    """The same change in every entry: at rank 16 its norm is four times that at rank 1."""
    received = hk.AdapterBank(SHAPES, [1] * 6 + [4, 5], dtype=torch.float64)
    uploads = received.select(range(8))
    with torch.no_grad():
        for factor in uploads.parameters():
            factor.add_(0.01)
    sizes = merge.update_norms(uploads, received)
    assert float(sizes.max() / sizes.median()) == pytest.approx(5**0.5)
    limits = merge.usual_limits(sizes, uploads, 1.01)
    assert bool((sizes < limits).all())
    torch.testing.assert_close(limits, 1.01 * sizes, rtol=1e-12, atol=0)


def test_many_steps_are_no_offence(honest):
    """With passes over their own data clients take steps in proportion to it. With three times the median's a client may get three times as far."""
    _, uploads = honest
    sizes = torch.full((uploads.num_clients,), 2.0, dtype=torch.float64)
    steps = [10] * (uploads.num_clients - 2) + [30, 5]
    expected = merge.usual_limits(sizes, uploads, 3.0)
    expected[-2] *= 3
    torch.testing.assert_close(merge.usual_limits(sizes, uploads, 3.0, steps), expected)


def test_a_median_needs_three_uploads_and_no_zero_makes_it(tmp_path, honest):
    received, uploads = honest
    two = merge.update_norms(uploads, received)[:2]
    assert bool(merge.usual_limits(two, uploads.select([0, 1]), 3.0).isinf().all())
    sizes = torch.tensor([0.0] * 6 + [1.0, 2.0, 3.0, 40.0], dtype=torch.float64)
    torch.testing.assert_close(merge.usual_limits(sizes, uploads, 3.0), torch.full_like(sizes, 6.0))
    assert bool(merge.usual_limits(torch.zeros_like(sizes), uploads, 3.0).isinf().all())


@pytest.mark.parametrize("attackers", [1, 2, 3, 4])
def test_one_nan_is_refused(tmp_path, monkeypatch, attackers):
    def spoil(number, names, bank):
        for k in range(attackers):
            bank.bt[next(iter(bank.shapes))][bank.layouts[next(iter(bank.shapes))].offsets[k], 0] = torch.nan

    watch_training(monkeypatch, spoil)
    result = simulate(tiny_config(tmp_path / "run", clients_per_round=10, rounds=1), federation=tiny_federation([3] * CLIENTS))
    assert [drop["name"] for drop in result.history[1]["dropped"]] == [f"client{k}" for k in range(attackers)]
    assert len(result.history[1]["clients"]) == CLIENTS - attackers and bool(torch.isfinite(vector(result.bank)).all())


@pytest.mark.parametrize("settings", MERGES.values(), ids=MERGES)
def test_a_run_under_attack_says_who_was_clipped_and_stays_near_the_honest_one(tmp_path, monkeypatch, settings):
    federation = tiny_federation([3] * CLIENTS)
    common = {"clients_per_round": 10, "ranks": "fixed:4", "gamma": 1, "lr": 0.02, **settings}
    honest = simulate(tiny_config(tmp_path / "honest", **common), federation=federation)
    watch_training(monkeypatch, lambda number, names, bank: multiply(bank, 0, 1e6))
    seen = Recorder()
    poisoned = simulate(tiny_config(tmp_path / "poisoned", **common), federation=federation, observer=seen)
    assert sum("the update of client0 is scaled by" in text for text in seen.messages) == 3
    assert all("clip" in line["clients"][0] and "clip" not in line["clients"][1] for line in lines(poisoned.run_dir)[1:])
    ends = [run.summary["evaluation_after"]["client_text"]["loss"] for run in (honest, poisoned)]
    start = honest.summary["evaluation_before"]["client_text"]["loss"]
    assert start - ends[1] > 0.5 * (start - ends[0]) > 0, "at least half of the honest gain"


def test_under_fold_a_reversed_update_is_of_usual_length_and_not_clipped_but_an_inflated_one_is(tmp_path, monkeypatch):
    common = {"clients_per_round": 10, "ranks": "fixed:4", "train": "fold", "weights": "samples", "gamma": 0.99, "lr": 0.02, "rounds": 1}
    train, clients = fold.train_cohort, {}
    for name, factor in (("honest", 1), ("reversed", -1), ("inflated", 100)):

        def poisoned(model, bank, *rest, factor=factor):
            results = train(model, bank, *rest)
            for name in bank.shapes:
                bank.bt[name].data[bank.layouts[name].rows(0)] *= factor
            return results

        monkeypatch.setattr(fold, "train_cohort", poisoned)
        clients[name] = simulate(tiny_config(tmp_path / name, **common), federation=tiny_federation([3] * CLIENTS)).history[1]["clients"]
    assert not any("clip" in client for client in clients["honest"] + clients["reversed"])
    assert clients["reversed"][0]["norm"] == clients["honest"][0]["norm"] and clients["inflated"][0]["clip"] < 0.1
    for merge_name in ("median", "trimmed"):
        with pytest.raises(ConfigError, match=f"merge = '{merge_name}': of other merges, and train = 'fold' has its own"):
            tiny_config(tmp_path, **{**common, "merge": merge_name, "weights": "uniform"})


# ---------------------------------------------------------------- the merges by rows


@pytest.mark.parametrize("name", ["median", "trimmed"])
@pytest.mark.parametrize("ranks", [[2, 5, 3], [1, 1, 1, 1], [8, 1, 4, 4, 2, 6, 7], [3], [0, 2]])
def test_each_coordinate_of_a_row_is_that_of_its_owners(tmp_path, old, ranks, name):
    uploads = trained_bank(SHAPES, ranks, torch.float64, seed=1)
    cfg = tiny_config(tmp_path, merge=name, weights="uniform", **({"trim": 0.25} if name == "trimmed" else {}))
    state_bank = old
    bank = getattr(robust, f"merge_{name}")(merge.MergeCall(state_bank, uploads, torch.ones(len(ranks), 2), 8, cfg, torch.nn.Module())).bank
    for module in SHAPES:
        for side, factor in enumerate((bank.a[module], bank.bt[module])):
            for row in range(8):
                own = [padded(uploads, k, module)[side][row] for k, rank in enumerate(ranks) if rank > row]
                if not own:
                    expected = (old.a, old.bt)[side][module][row]
                elif name == "median":
                    expected = torch.stack(own).quantile(0.5, dim=0)
                else:
                    out = int(0.25 * len(own))
                    expected = torch.stack(own).sort(0).values[out : len(own) - out].mean(0)
                torch.testing.assert_close(factor[row], expected, rtol=1e-12, atol=1e-15)


@pytest.fixture
def old():
    return trained_bank(SHAPES, [8], torch.float64, seed=2)
