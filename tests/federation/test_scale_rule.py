"""scale_rule = 'rslora': a client of rank r trains with s = scale / sqrt(r); rows travel, are merged and exported in the scale of the bank."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file
from tiny import SIZES, contents, lines, tiny_config, tiny_federation, tiny_state

from hetlora.client import tail_scores, train_client
from hetlora.compare.methods import METHODS, method_config
from hetlora.config import Config, ConfigError
from hetlora.evaluate import evaluate_bank, evaluate_clients
from hetlora.export import export_adapter
from hetlora.export_model import export_merged
from hetlora.kinds import TRAININGS
from hetlora.loop import simulate
from hetlora.merge import MergeCall
from hetlora.products import merge_stack
from hetlora.ranks import StartingRanks
from hetlora.training import Work, train_adapters

RANKS, R = [2, 8, 3, 5], 8
RS = {"scale_rule": "rslora", "scale": 5.0}


def in_float64(tmp_path, **settings):
    federation = tiny_federation(SIZES, torch.float64)
    cfg = tiny_config(tmp_path, dtype="float64", adapter_dtype="float64", lr=0.03, **{**RS, **settings})
    return federation, cfg, tiny_state(federation, RANKS, dtype=torch.float64)


@pytest.mark.parametrize("cobatch", [True, False])
@pytest.mark.parametrize("settings", [{}, {"train": "alternating", "weights": "samples", "gamma": 0.99}], ids=["adapters", "one factor"])
def test_each_client_trains_at_its_own_scale_from_the_banks_products(tmp_path, cobatch, settings):
    """By hand: B_k = B s_R / s_k to start with, s_k = scale / sqrt(r_k), plain training of one client at that constant scale, and B_k s_k / s_R sent."""
    federation, cfg, state = in_float64(tmp_path, cobatch=cobatch, gamma=1.0 if not settings else 0.99, **{k: v for k, v in settings.items() if k != "gamma"})
    clients = federation.data.clients
    for number in (1, 2):
        trained = train_adapters(Work(cfg, federation.model, state, clients, number, cfg.lr))
        for k, (client, rank) in enumerate(zip(clients, RANKS, strict=True)):
            own, factor = state.bank.truncate([rank]), math.sqrt(rank / R)  # s_R / s_k
            with torch.no_grad():
                for bt in own.bt.values():
                    bt.mul_(factor)
            frozen = {"ab": lambda bank: bank, "b": lambda bank: bank.freeze_a(), "a": lambda bank: bank.freeze_b()}[cfg.training_kind.trains(number)]
            constant = cfg.model_copy(update={"scale_rule": "constant", "scale": cfg.scale / math.sqrt(rank)})
            train_client(tiny_federation(SIZES, torch.float64).model, frozen(own), client, constant, number, cfg.lr, {})
            mine = trained.uploads.select([k])
            for name in federation.shapes:
                torch.testing.assert_close(mine.a[name], own.a[name], rtol=1e-9, atol=1e-12)
                torch.testing.assert_close(mine.bt[name].detach(), own.bt[name].detach() / factor, rtol=1e-9, atol=1e-12)
                received = trained.received.select([k])
                assert torch.equal(received.bt[name], state.bank.bt[name][:rank]), "as it travelled"


@pytest.mark.parametrize("cobatch", [True, False])
def test_a_frozen_factor_goes_back_as_it_came(tmp_path, cobatch):
    """In bfloat16, where B s_R / s_k times s_k / s_R is not B."""
    federation = tiny_federation(SIZES)
    cfg = tiny_config(tmp_path, adapter_dtype="bfloat16", train="alternating", weights="samples", gamma=0.99, lr=0.03, cobatch=cobatch, **RS)
    state = tiny_state(federation, RANKS, dtype=torch.bfloat16)
    for number in (1, 2):
        trained, trains = train_adapters(Work(cfg, federation.model, state, federation.data.clients, number, cfg.lr)), cfg.training_kind.trains(number)
        for name in federation.shapes:
            same = [torch.equal(own[name], came[name]) for own, came in ((trained.uploads.a, trained.received.a), (trained.uploads.bt, trained.received.bt))]
            assert same == [trains == "b", trains == "a"], (number, name)


def test_a_client_computes_the_same_whatever_the_rule(tmp_path):
    """s_k B_k A_k at the client's own scale is s_R B A of the bank's leading rows: truncation does not rescale."""
    federation, cfg, state = in_float64(tmp_path)
    client, rank = federation.data.clients[2], RANKS[2]
    shared = evaluate_clients(federation.model, state.bank, [state.ranks[client.name]], [client], cfg.scale_at(R), 4096)[0]
    own = state.bank.truncate([rank])
    with torch.no_grad():
        for bt in own.bt.values():
            bt.mul_(math.sqrt(rank / R))
    alone = evaluate_bank(federation.model, own, client.test, cfg.scale / math.sqrt(rank), 4096)
    assert alone["loss"] == pytest.approx(shared["loss"], rel=1e-12)


def test_the_penalty_and_the_decision_are_those_of_what_the_client_trains(tmp_path):
    federation, cfg, state = in_float64(tmp_path, gamma=0.5, prune_lambda=3.0)
    trained = train_adapters(Work(cfg, federation.model, state, federation.data.clients, 1, cfg.lr))
    own, rank = state.bank.truncate([5]), 5
    with torch.no_grad():
        for bt in own.bt.values():
            bt.mul_(math.sqrt(rank / R))
    assert trained.tails[3][0] == pytest.approx(float(tail_scores(own, {name: [2] for name in federation.shapes}).sum()), rel=1e-12)
    assert any(after[name] < before[name] for after, before in zip(trained.ranks, state.ranks.values(), strict=True) for name in list(after)[:1])


def test_at_one_rank_it_is_a_constant(tmp_path):
    """HomLoRA of rank 4: s = scale / 2, to the bit."""
    runs = {"rs": RS, "constant": {"scale": 2.5}}
    for name, settings in runs.items():
        simulate(
            tiny_config(tmp_path / name, ranks="fixed:4", gamma=1.0, weights="samples", lr=0.02, **settings), federation=tiny_federation(SIZES), quiet=True
        )
    assert lines(tmp_path / "rs") == lines(tmp_path / "constant")
    one, other = (contents(tmp_path / name) for name in runs)
    assert {k: v for k, v in one.items() if k.startswith(("adapter/", "clients/"))} == {
        k: v for k, v in other.items() if k.startswith(("adapter/", "clients/"))
    }


def test_what_goes_into_the_base_has_the_banks_scale(tmp_path):
    federation, cfg, state = in_float64(tmp_path, merge="stack", weights="samples")
    before = {name: federation.model.get_submodule(name).weight.clone() for name in federation.shapes}
    uploads = state.bank.truncate(RANKS)
    weights = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64)[:, None].expand(4, len(before))
    merge_stack(MergeCall(state.bank, uploads, weights, R, cfg, federation.model))
    for name, old in before.items():
        own = uploads.layouts[name]
        total = sum(weights[k, 0] * uploads.bt[name].detach()[own.rows(k)].t() @ uploads.a[name].detach()[own.rows(k)] for k in range(4))
        torch.testing.assert_close(federation.model.get_submodule(name).weight, old + 5.0 / math.sqrt(R) * total, rtol=1e-12, atol=1e-14)


def test_exports_hold_the_banks_scale(tmp_path):
    cfg = tiny_config(tmp_path / "run", lr=0.02, gamma=1.0, **RS)
    result = simulate(cfg, federation=tiny_federation(SIZES), quiet=True)
    rows = len(next(result.bank.parameters()))
    for rank in (rows, 3):
        out = export_adapter(tmp_path / "run", tmp_path / f"out{rank}", rank=rank)
        config = json.loads((out / "adapter_config.json").read_text())
        assert not config.get("use_rslora") and config["lora_alpha"] / config["r"] == pytest.approx(5.0 / math.sqrt(rows), rel=1e-12)
    assert f"Scale s = {5.0 / math.sqrt(rows):g}" in (out / "README.md").read_text()
    name = result.history[-1]["clients"][0]["name"]
    config = json.loads((tmp_path / "run" / "clients" / name / "adapter_config.json").read_text())
    assert config["lora_alpha"] / config["r"] == pytest.approx(5.0 / math.sqrt(rows), rel=1e-12)


def test_the_merged_model_computes_what_the_run_evaluated(tmp_path):
    federation = tiny_federation(SIZES)
    federation.model.save_pretrained(tmp_path / "model")
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path / "model")
    cfg = tiny_config(tmp_path / "run", model=str(tmp_path / "model"), lr=0.02, gamma=1.0, device="cpu", **RS)
    federation.model_name = cfg.model
    result = simulate(cfg, federation=federation, quiet=True)
    export_merged(tmp_path / "run", tmp_path / "whole", dtype="float64")
    written = load_file(tmp_path / "whole" / "model.safetensors")
    for name, bt in result.bank.bt.items():
        before = federation.model.get_submodule(name).weight.double()
        expected = before + 5.0 / math.sqrt(len(bt)) * bt.detach().double().t() @ result.bank.a[name].detach().double()
        torch.testing.assert_close(written[f"{name}.weight"], expected, rtol=1e-12, atol=1e-14)


def test_a_deployed_run_has_the_bits_of_the_simulated_one(tmp_path):
    pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")
    from flower_runs import deployed

    cfg = tiny_config(tmp_path / "here", cobatch=False, evaluate="all", **RS)
    simulate(cfg, federation=tiny_federation(SIZES), quiet=True)
    deployed(cfg.model_copy(update={"output": str(tmp_path / "there")}))
    for mine, other in zip(lines(tmp_path / "here"), lines(tmp_path / "there"), strict=True):
        one, two = (record.pop("evaluation") for record in (mine, other))
        assert mine == other
        assert all(one[part]["loss"] == pytest.approx(two[part]["loss"], rel=1e-6) for part in ("client_text", "own_text"))
    assert (tmp_path / "here/adapter/adapter_model.safetensors").read_bytes() == (tmp_path / "there/adapter/adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("settings", [{"train": "fold"}, {"train": "full", "ranks": "powerlaw:5:50"}, {"prune_scope": "module"}])
def test_where_it_has_no_meaning_it_is_refused_by_name(tmp_path, settings):
    known = {"weights": "samples", "gamma": 0.99}
    with pytest.raises(ConfigError, match="scale_rule = 'rslora'"):
        tiny_config(tmp_path, **known, **settings, scale_rule="rslora")
    assert {name for name, kind in TRAININGS.items() if "scale_rule" not in kind.unused} == {"adapters", "b-only", "alternating", "chosen-rows"}


def test_a_comparison_runs_methods_without_it_where_they_refuse_it():
    plan = StartingRanks(2, 8, {"a": 2, "b": 8})
    taken = {
        name: method_config(METHODS[name], Config(**RS), plan).scale_rule for name in ("hetlora", "homlora-max", "rolora", "fold", "fed-plora", "fedavg-full")
    }
    assert taken == {**dict.fromkeys(("hetlora", "homlora-max", "rolora", "fed-plora"), "rslora"), **dict.fromkeys(("fold", "fedavg-full"), "constant")}
    with pytest.raises(ConfigError, match=r"weight_decay = 0\.1: reaches rows"):  # no setting that says nothing: left out, the run would be another
        method_config(METHODS["fed-plora"], Config(weight_decay=0.1), plan)
