"""train = 'chosen-rows' (Fed-PLoRA): r_k random rows of the bank are trained beside the frozen others, each is averaged over who chose it."""

from __future__ import annotations

import itertools

import pytest
import torch
from safetensors.torch import load_file
from tiny import SIZES, same_bits, tiny_config, tiny_federation, tiny_state, trained_bank, whole_bank

import hetlora_kernels as hk
from hetlora import chosen, merge
from hetlora.client import train_client
from hetlora.config import ConfigError
from hetlora.diagnostics import merge_error
from hetlora.loop import simulate
from hetlora.merge import MergeCall
from hetlora.training import Work

SHAPES = {"q": (6, 5), "v": (4, 7)}
ROWS = {"q": [[0, 3], [1, 2, 3, 6, 7], [3, 5, 6]], "v": [[4, 7], [0, 1, 2, 4, 5], [2, 4, 6]]}  # of a bank of 8; row 4 of q and row 3 of v are nobody's
WEIGHTS = torch.tensor([[1, 2], [1, 1], [2, 1]], dtype=torch.float64) / 4
R, RANKS = 8, [2, 5, 3]
CHOSEN = {"train": "chosen-rows", "weights": "uniform", "gamma": 0.99}


@pytest.mark.parametrize("weights", [WEIGHTS, torch.tensor([[0.0, 1], [1, 0], [0, 0]], dtype=torch.float64)], ids=["all", "some of weight zero"])
def test_a_row_is_the_weighted_mean_of_those_who_chose_it(tmp_path, weights):
    old, uploads = whole_bank(SHAPES, [R], 2), whole_bank(SHAPES, RANKS, 1)
    merged = chosen.merge_chosen(MergeCall(old, uploads, weights, R, tiny_config(tmp_path, diagnostics=True, **CHOSEN), torch.nn.Module(), rows=ROWS))
    kept = 0
    for i, name in enumerate(SHAPES):
        for side, j in itertools.product(("a", "bt"), range(R)):
            rows = getattr(uploads, side)[name].detach()
            owners = [(float(weights[k, i]), rows[uploads.layouts[name].rows(k)][own.index(j)]) for k, own in enumerate(ROWS[name]) if j in own]
            share = sum(p for p, _ in owners)
            got, before = (getattr(bank, side)[name].detach()[j] for bank in (merged.bank, old))
            if share:
                assert torch.equal(got, sum(p * row for p, row in owners) / share)
            else:
                assert torch.equal(got, before)
                kept += 1
            for k, own in enumerate(ROWS[name]):  # what diagnostics see of a client: its rows, and the bank's beside them
                mine = getattr(merged.ended_with, side)[name][k * R + j]
                assert torch.equal(mine, rows[uploads.layouts[name].rows(k)][own.index(j)] if j in own else before)
    assert kept >= 4


def test_all_rows_chosen_by_all_is_the_average_of_the_factors(tmp_path):
    old, uploads = whole_bank(SHAPES, [R], 2), whole_bank(SHAPES, [R] * 3, 1)
    call = MergeCall(old, uploads, WEIGHTS, R, tiny_config(tmp_path, diagnostics=True), torch.nn.Module(), rows={name: [list(range(R))] * 3 for name in SHAPES})
    merged = chosen.merge_chosen(call)
    assert same_bits(merged.bank, merge.merge_factors(call).bank)
    assert merge_error(merged.bank, merged.ended_with, WEIGHTS) > 0.1, "the error of averaging A and B apart"


def test_the_choice_is_a_clients_own_and_anew_in_every_round_and_module(tmp_path):
    cfg, ranks = tiny_config(tmp_path, **CHOSEN), [dict.fromkeys(SHAPES, rank) for rank in RANKS]
    first, again, later = (chosen.choice(cfg, ["x", "y", "z"], ranks, R, number) for number in (1, 1, 2))
    assert first == again != later and first["q"] != first["v"]
    assert chosen.choice(cfg, ["y"], ranks[1:2], R, 1)["q"] == [first["q"][1]], "whoever else is in the round"
    for own in first.values():
        assert [len(rows) for rows in own] == RANKS and all(rows == sorted(set(rows)) and rows[-1] < R for rows in own)
    counts = [sum(j in rows for number in range(200) for rows in chosen.choice(cfg, ["x"], ranks[:1], R, number)["q"]) for j in range(R)]
    assert sum(counts) == 400 and all(abs(count - 50) < 4 * (50 * 0.75) ** 0.5 for count in counts), "uniform: binomial of 200 and 1/4"


@pytest.mark.parametrize("cobatch", [True, False])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_rows_keep_their_bits_and_chosen_ones_move(tmp_path, cobatch, optimizer):
    federation = tiny_federation(SIZES)
    cfg = tiny_config(tmp_path, cobatch=cobatch, optimizer=optimizer, lr=0.05, **CHOSEN)
    state = tiny_state(federation, [2, 8, 4, 6])
    trained = chosen.train_chosen(Work(cfg, federation.model, state, federation.data.clients, 3, cfg.lr))
    names = [client.name for client in federation.data.clients]
    expected = chosen.choice(cfg, names, list(state.ranks.values()), 8, 3)
    assert trained.rows == expected
    adapters = hk.AdapterBank(federation.shapes, [8] * 4)
    for k in range(4):
        adapters.load_adapter(k, trained.adapter(k))
    for name, layout in adapters.layouts.items():
        for side in ("a", "bt"):
            bank = getattr(state.bank, side)[name]
            for k, rows in enumerate(expected[name]):
                own = getattr(adapters, side)[name][layout.rows(k)]
                assert [j for j in range(8) if not torch.equal(own[j], bank[j])] == rows
                assert torch.equal(own[rows], getattr(trained.uploads, side)[name][trained.uploads.layouts[name].rows(k)])
                assert torch.equal(bank[rows], getattr(trained.received, side)[name][trained.uploads.layouts[name].rows(k)])
    width = 4 * sum(m + n for m, n in federation.shapes.values())
    assert trained.bytes_down == [8 * width] * 4 and trained.bytes_up == [rank * width for rank in (2, 8, 4, 6)]
    assert trained.parameters * 4 == sum(trained.bytes_up)


def test_it_is_training_of_the_rows_on_a_base_with_the_others_folded_in(tmp_path):
    """Select-N-Fold: what a device does, in float64."""
    federation = tiny_federation(SIZES, torch.float64)
    cfg = tiny_config(tmp_path, dtype="float64", adapter_dtype="float64", lr=0.05, **CHOSEN)
    state = tiny_state(federation, [3, 2, 4, 6], dtype=torch.float64)
    clients = federation.data.clients[:2]
    ours = chosen.train_chosen(Work(cfg, federation.model, state, clients, 1, cfg.lr)).uploads
    for k, client in enumerate(clients):
        picked = chosen.choice(cfg, [client.name], [state.ranks[client.name]], 8, 1)
        others = {name: [[j for j in range(8) if j not in rows[0]]] for name, rows in picked.items()}
        device, own, rest = tiny_federation(SIZES, torch.float64).model, chosen.pick(state.bank, picked), chosen.pick(state.bank, others)
        with torch.no_grad():
            for name in federation.shapes:
                device.get_submodule(name).weight += cfg.scale * rest.bt[name].t() @ rest.a[name]
        train_client(device, own, client, cfg, 1, cfg.lr, {})
        mine = ours.select([k])
        for one, other, start in zip(mine.parameters(), own.parameters(), chosen.pick(state.bank, picked).parameters(), strict=True):
            assert float((one - other).detach().norm()) <= 1e-9 * float((other - start).detach().norm())


def test_a_run_learns_and_keeps_whole_adapters_of_clients(tmp_path):
    cfg = tiny_config(tmp_path / "run", rounds=4, lr=0.03, diagnostics=True, evaluate="all", **CHOSEN)
    result = simulate(cfg, federation=tiny_federation(SIZES), quiet=True)
    losses = [record["evaluation"]["client_text"]["loss"] for record in result.history]
    assert losses[-1] < losses[0]
    assert all(0 < record["diagnostics"]["merge_error"] < 1 for record in result.history[2:])
    name = result.history[-1]["clients"][0]["name"]
    ranks = {len(a) for key, a in load_file(tmp_path / "run" / "clients" / name / "adapter_model.safetensors").items() if "lora_A" in key}
    assert ranks == {8}


@pytest.mark.parametrize(
    "setting",
    [
        {"weight_decay": 0.1},
        {"max_tokens_per_step": 0},
        {"cuda_graph": True},
        {"prune_lambda": 0.5},
        {"merge": "svd"},
    ],
)
def test_what_it_cannot_be_is_refused_by_name(tmp_path, setting):
    with pytest.raises(ConfigError, match=f"{next(iter(setting))} = .*chosen-rows|{next(iter(setting))} = .*this kind of training"):
        tiny_config(tmp_path, **{**CHOSEN, **setting})


def test_deployed_clients_refuse_it(tmp_path):
    pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")
    from hetlora.deployed.exchange import exchange

    with pytest.raises(ConfigError, match="train = 'chosen-rows': runs in simulation only"):
        exchange(tiny_config(tmp_path, **CHOSEN))


def test_a_bank_without_hooks_is_left_behind():
    bank = trained_bank(SHAPES, [R])
    with chosen.only(bank, {name: [[1]] for name in SHAPES}):
        sum(factor.sum() for factor in bank.parameters()).backward()
    assert all(factor.grad.sum(1).nonzero().flatten().tolist() == [1] for factor in bank.parameters())
    for factor in bank.parameters():
        factor.grad = None
    sum(factor.sum() for factor in bank.parameters()).backward()
    assert all(bool((factor.grad == 1).all()) for factor in bank.parameters())
