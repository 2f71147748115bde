"""Training of one factor a round (FFA-LoRA, RoLoRA): the other keeps its bits, the average is that of the products, and half the bytes travel."""

from __future__ import annotations

import itertools

import pytest
import torch
from tiny import SIZES, dense, row, same_bits, tiny_config, tiny_federation, watch_training, whole_bank

from hetlora import merge
from hetlora.config import ConfigError
from hetlora.kinds import TRAININGS
from hetlora.loop import simulate
from hetlora.server import fresh_bank

SHAPES = {"q": (6, 5), "v": (4, 7)}
RANKS = [2, 5, 3]
WEIGHTS = torch.tensor([[1, 2], [1, 1], [2, 1]], dtype=torch.float64) / 4
R = 8
KINDS = {"b-only": "bbbbbb", "alternating": "bababa"}


@pytest.mark.parametrize("factor", ["a", "b"])
@pytest.mark.parametrize("shared", ["none", "owners"])
def test_the_average_of_one_factor_is_the_average_of_the_products(tmp_path, factor, shared):
    """Whoever lacks a row counts as zero there, or not at all."""
    old = whole_bank(SHAPES, [R], 2)
    uploads = old.truncate(RANKS)
    trained = whole_bank(SHAPES, RANKS, 1)
    with torch.no_grad():
        for name in SHAPES:
            (uploads.a if factor == "a" else uploads.bt)[name].copy_((trained.a if factor == "a" else trained.bt)[name])
    settings = {"train": "b-only" if factor == "b" else "alternating", "shared_rows": shared, "weights": "samples", "gamma": 0.99}
    bank = merge.merge_one_factor(merge.MergeCall(old, uploads, WEIGHTS, R, tiny_config(tmp_path, **settings), torch.nn.Module(), factor)).bank
    kept, moved = ("a", "bt") if factor == "b" else ("bt", "a")
    for i, name in enumerate(SHAPES):
        assert torch.equal(getattr(bank, kept)[name], getattr(old, kept)[name])
        total = torch.zeros(SHAPES[name], dtype=torch.float64)
        for j in range(R):
            owners = [k for k in range(3) if RANKS[k] > j]
            share = sum(float(WEIGHTS[k, i]) for k in owners) if shared == "owners" else 1.0
            pieces = [float(WEIGHTS[k, i]) * torch.outer(row(uploads, "bt", name, k, j), row(uploads, "a", name, k, j)) for k in owners]
            if not owners:
                assert torch.equal(getattr(bank, moved)[name][j], getattr(old, moved)[name][j])
                pieces = [torch.outer(old.bt[name].detach()[j], old.a[name].detach()[j])]
                share = 1.0
            total += sum(pieces) / share
        if shared == "none":
            assert torch.equal(dense(bank, name), total)
        else:  # a third is rounded
            assert float((dense(bank, name) - total).norm()) <= 8 * torch.finfo(torch.float64).eps * float(total.norm())


@pytest.mark.parametrize("cobatch", [True, False])
@pytest.mark.parametrize("train", list(KINDS))
def test_clients_train_the_rounds_factor_alone(tmp_path, monkeypatch, train, cobatch):
    federation = tiny_federation(SIZES)
    seen = watch_training(monkeypatch) if cobatch else None
    cfg = tiny_config(tmp_path / "run", train=train, weights="samples", gamma=0.99, rounds=4, lr=0.05, ranks="2,8,4,6", cobatch=cobatch)
    banks = [fresh_bank(federation.shapes, 8, cfg, torch.device("cpu"))]

    aggregate = merge.aggregate

    def watched(state, *rest):
        result = aggregate(state, *rest)
        banks.append(state.bank.to())
        return result

    monkeypatch.setattr("hetlora.loop.aggregate", watched)
    result = simulate(cfg, federation=federation, quiet=True)
    for number, (before, after) in enumerate(itertools.pairwise(banks), 1):
        moved = {"a": not same_rows(before.a, after.a), "b": not same_rows(before.bt, after.bt)}
        assert moved == {factor: factor == KINDS[train][number - 1] for factor in "ab"}
        if seen:
            assert same_rows(seen[number - 1].received.a, seen[number - 1].trained.a) == (KINDS[train][number - 1] == "b")
            assert same_rows(seen[number - 1].received.bt, seen[number - 1].trained.bt) == (KINDS[train][number - 1] == "a")
    assert same_bits(result.bank, banks[-1]) and len(banks) == 5
    losses = [record["evaluation"]["client_text"]["loss"] for record in result.history]
    assert losses[-1] < losses[0]


def same_rows(one, other) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("train", list(KINDS))
def test_traffic_is_the_factors_that_a_client_lacks_down_and_the_trained_one_up(tmp_path, train):
    """A client that was away for an even round and an odd one lacks both; A as drawn never travels."""
    federation = tiny_federation(SIZES)
    cfg = tiny_config(tmp_path / "run", train=train, weights="samples", gamma=0.99, rounds=6, clients_per_round=2, ranks="2,8,4,6", local_steps=1)
    history = simulate(cfg, federation=federation, quiet=True).history
    widths = {"a": sum(n for _, n in federation.shapes.values()), "b": sum(m for m, _ in federation.shapes.values())}
    last, both = {}, 0
    for number, record in enumerate(history[1:], 1):
        for client in record["clients"]:
            lacks = set(KINDS[train][max(last.get(client["name"], 0), 1) - 1 : max(number - 1, 1)])
            assert client["bytes_down"] == 4 * client["rank"] * sum(widths[factor] for factor in lacks)
            assert client["bytes_up"] == 4 * client["rank"] * widths[KINDS[train][number - 1]]
            both += len(lacks) == 2
        last |= {client["name"]: number for client in record["clients"]}
        assert record["trained_parameters"] * 4 == record["bytes_up"]
    assert (both > 0) == (train == "alternating")


@pytest.mark.parametrize("setting", [{"gamma": 0.5}, {"prune_lambda": 0.5}, {"prune_scope": "module"}, {"merge": "svd"}])
@pytest.mark.parametrize("train", list(KINDS))
def test_pruning_and_other_merges_are_refused(tmp_path, train, setting):
    with pytest.raises(ConfigError, match=rf"{next(iter(setting))} = "):
        tiny_config(tmp_path, **{"train": train, "weights": "samples", "gamma": 0.99, **setting})


def test_what_a_client_lacks_is_what_changed_since_its_last_round():
    kind = TRAININGS["alternating"]
    assert [kind.trains(number) for number in (1, 2, 3, 4)] == ["b", "a", "b", "a"]
    assert [kind.changed(0, number) for number in (1, 2, 3, 9)] == ["b", "b", "ab", "ab"], "A as drawn is known"
    assert [kind.changed(since, 9) for since in (8, 7, 6, 1)] == ["a", "ab", "ab", "ab"]
    assert {TRAININGS["b-only"].changed(since, number) for since in (0, 1, 4) for number in (5, 9)} == {"b"}
    assert TRAININGS["adapters"].changed(8, 9) == TRAININGS["adapters"].changed(0, 1) == "ab"
