"""Full fine-tuning: each client trains its own copy of all weights, and their mean, by samples or uniform, becomes the base."""

from __future__ import annotations

import pytest
import torch
from tiny import SIZES, Interrupt, Stop, lines, tiny_clients, tiny_config, tiny_federation, tiny_model

from hetlora import checkpoint, full_finetuning, server
from hetlora.batches import collate
from hetlora.client import step_batches
from hetlora.config import ConfigError
from hetlora.export import export_adapter
from hetlora.loop import simulate
from hetlora.merge import MergeCall
from hetlora.training import Work

FULL = {"train": "full", "weights": "samples", "ranks": "powerlaw:5:50", "gamma": 0.99, "lr": 0.01}


def config(folder, **settings):
    return tiny_config(folder, **{**FULL, **settings})


def weights_of(model) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def train(cfg, model, clients):
    bank = server.fresh_bank({"lm_head": (50, 16)}, 0, cfg, torch.device("cpu"))
    return full_finetuning.train_full(Work(cfg, model, server.ServerState(bank, {client.name: {"lm_head": 0} for client in clients}, 0, 0), clients, 1, cfg.lr))


def by_hand(client, cfg, number: int = 1) -> dict[str, torch.Tensor]:
    """The client's weights after its local steps, with transformers' own loss and torch's own optimiser."""
    model = tiny_model().requires_grad_(True)
    make = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[cfg.optimizer]
    optimizer = make(model.parameters(), lr=cfg.lr, weight_decay=cfg.weight_decay, **({"momentum": cfg.momentum} if cfg.momentum else {}))
    for batch in step_batches(client, cfg, number):
        ids, labels = collate([client.train[i] for i in batch], torch.device("cpu"))
        optimizer.zero_grad()
        model(input_ids=ids, labels=labels).loss.backward()
        if cfg.clip_norm:
            torch.nn.utils.clip_grad_norm_(model.parameters(), cfg.clip_norm)
        optimizer.step()
    return weights_of(model)


SGD = {"optimizer": "sgd", "momentum": 0.5, "weight_decay": 0.1, "clip_norm": 0.0}


@pytest.mark.parametrize("settings", [{}, SGD, {"weights": "uniform", "clip_norm": 0.05}])
def test_mean_of_the_models_each_client_trains(tmp_path, settings):
    cfg = config(tmp_path, **settings)
    clients = tiny_clients([2, 6, 3])
    model = tiny_model()
    start = weights_of(model)
    update = train(cfg, model, clients)
    assert all(torch.equal(weight, start[name]) for name, weight in model.named_parameters()), "the base stays until the mean is installed"
    assert not any(parameter.requires_grad for parameter in model.parameters())
    share = [1 / 3] * 3 if cfg.weights == "uniform" else [2 / 11, 6 / 11, 3 / 11]
    p, norms = update.weighed
    assert p.flatten().tolist() == pytest.approx(share)
    trained = [by_hand(client, cfg) for client in clients]
    full_finetuning.merge_models(MergeCall(None, update.uploads, p, 0, cfg, model))
    for name, weight in model.named_parameters():
        expected = sum(p * one[name].double() for p, one in zip(share, trained, strict=True))
        torch.testing.assert_close(weight.detach().double(), expected, rtol=1e-4, atol=1e-5)
    assert float(norms[1]) == pytest.approx(sum(float((trained[1][n] - start[n]).square().sum()) for n in start) ** 0.5, rel=1e-3)
    assert [result.steps for result in update.results] == [cfg.local_steps] * 3


def test_a_client_whose_weights_are_not_finite_is_left_out_and_the_others_weigh_one(tmp_path):
    cfg = config(tmp_path)
    clients = tiny_clients([2, 6, 3])
    model = tiny_model()
    steps = full_finetuning.local_steps

    def spoil(model, data, *rest):
        result = steps(model, data, *rest)
        if data.name == "client1":
            with torch.no_grad():
                model.lm_head.weight[3, 2] = float("nan")
        return result

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(full_finetuning, "local_steps", spoil)
        update = train(cfg, model, clients)
    assert list(update.dropped) == [1] and "lm_head.weight" in update.dropped[1]
    assert update.arrived == [0, 2] and update.weighed[0].flatten().tolist() == pytest.approx([2 / 5, 3 / 5])
    expected = 2 / 5 * by_hand(clients[0], cfg)["lm_head.weight"] + 3 / 5 * by_hand(clients[2], cfg)["lm_head.weight"]
    torch.testing.assert_close(update.uploads["lm_head.weight"], expected, rtol=1e-4, atol=1e-5)


def test_a_run_learns_counts_whole_models_and_resumes_to_the_same_bits(tmp_path):
    whole_federation = tiny_federation(SIZES, held_out=1)
    whole = simulate(config(tmp_path / "whole"), federation=whole_federation)
    losses = [record["evaluation"]["client_text"]["loss"] for record in whole.history]
    assert losses[-1] < losses[0]
    size = sum(p.numel() for p in whole_federation.model.parameters())
    assert whole.history[1]["bytes_up"] == whole.history[1]["bytes_down"] == 3 * 4 * size and whole.summary["trained_parameters"] == 9 * size
    with pytest.raises(Stop):
        simulate(config(tmp_path / "part"), federation=tiny_federation(SIZES, held_out=1), observer=Interrupt("local_step", 5))
    federation = tiny_federation(SIZES, held_out=1)
    simulate(config(tmp_path / "part"), resume=True, federation=federation)
    assert lines(tmp_path / "part") == lines(tmp_path / "whole")
    mine, other = weights_of(federation.model), weights_of(whole_federation.model)
    assert all(torch.equal(mine[name], other[name]) for name in other)
    saved = checkpoint.load_checkpoint(tmp_path / "part")[1]
    assert all(torch.equal(saved[f"base.{name}"], other[name]) for name in other)


@pytest.mark.parametrize(("settings", "word"), [({"weights": "sparsity"}, "sparsity"), ({"ranks": "2,2,2,2"}, "ranks"), ({"merge": "svd"}, "merge")])
def test_settings_of_adapters_are_refused(tmp_path, settings, word):
    with pytest.raises(ConfigError, match=word):
        simulate(config(tmp_path / "run", **settings), federation=tiny_federation(SIZES))


def test_the_base_serves_no_other_run_and_there_is_no_adapter_to_export(tmp_path):
    federation = tiny_federation(SIZES)
    simulate(config(tmp_path / "run", rounds=1), federation=federation)
    with pytest.raises(ConfigError, match="base model holds"):
        simulate(tiny_config(tmp_path / "other"), federation=federation)
    with pytest.raises(ConfigError, match="train 'full'"):
        export_adapter(tmp_path / "run", tmp_path / "adapter")
