"""Perplexity: the plain computation, whatever the batches; which held-out text is used; and when a run evaluates."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from tiny import SIZES, lines, tiny_clients, tiny_config, tiny_federation, tiny_model, trained_bank

from hetlora.data import ClientData
from hetlora.evaluate import evaluate_bank, evaluate_clients, pool_text
from hetlora.loop import simulate
from hetlora.models import target_shapes


def plain(model, bank, sequences, scale, rank=None) -> tuple[float, int]:
    """(mean loss, tokens) with W + s B A in the weights, one sequence at a time."""
    ranks = rank if isinstance(rank, dict) else dict.fromkeys(bank.shapes, rank)
    weights = {f"{n}.weight": model.get_submodule(n).weight + scale * bank.bt[n].detach()[: ranks[n]].t() @ bank.a[n].detach()[: ranks[n]] for n in bank.shapes}
    total, tokens = 0.0, 0
    for sequence in sequences:
        logits = torch.func.functional_call(model, weights, (sequence[None],)).logits[0, :-1]
        total += float(F.cross_entropy(logits, sequence[1:], reduction="sum"))
        tokens += len(sequence) - 1
    return total / tokens, tokens


@pytest.fixture(scope="module")
def setting():
    model = tiny_model(torch.float64)
    return model, trained_bank(target_shapes(model, "attention"), [8], torch.float64)


@pytest.mark.parametrize("limit", [1, 25, 10_000])
def test_perplexity_is_the_plain_one(setting, limit):
    model, bank = setting
    sequences = [s for client in tiny_clients(SIZES) for s in client.train]
    loss, tokens = plain(model, bank, sequences, 1.5)
    seen = []
    result = evaluate_bank(model, bank, sequences, 1.5, limit, lambda done, total: seen.append((done, total)))
    assert result == {"loss": pytest.approx(loss, rel=1e-12), "perplexity": pytest.approx(math.exp(loss), rel=1e-12), "tokens": tokens}
    assert seen[-1][0] == seen[-1][1] == len(seen)
    assert abs(loss - plain(model, bank, sequences, 0.0)[0]) > 1e-3, "the adapter must count for this test to say anything"


@pytest.mark.parametrize("clients", [5, 70])
def test_each_client_has_its_own_text_and_rank(setting, clients):
    model, bank = setting
    data = tiny_clients([1] * clients)
    names = list(bank.shapes)
    ranks = [dict.fromkeys(names, 1 + k % 8) if k % 3 else {name: 1 + (k + i) % 8 for i, name in enumerate(names)} for k in range(clients)]
    results = evaluate_clients(model, bank, ranks, data, 1.5, 60)
    assert len(results) == clients
    for k in range(0, clients, 13):
        loss, tokens = plain(model, bank, data[k].test, 1.5, ranks[k])
        assert (results[k]["loss"], results[k]["tokens"]) == (pytest.approx(loss, rel=1e-12), tokens)
        assert abs(loss - plain(model, bank, data[k].test, 1.5, 8 if set(ranks[k].values()) != {8} else 1)[0]) > 1e-6
    assert evaluate_clients(model, bank, ranks[:2], data[:2], 1.5, 60, tokens_per_client=1)[0]["tokens"] == len(data[0].test[0]) - 1


def test_no_text_is_none_and_a_hopeless_loss_is_infinite(setting):
    model, bank = setting
    assert evaluate_bank(model, bank, [], 1.0, 100) is None
    with torch.no_grad():
        steep = tiny_model(torch.float64)
        steep.lm_head.weight *= 1e6
    result = evaluate_bank(steep, bank, [torch.tensor([1, 2, 3])], 1.0, 100)
    assert result["loss"] > 1000 and result["perplexity"] == math.inf


def held_out(*lengths_per_client) -> list[ClientData]:
    """Clients whose sequences are (client, index, 0, 0, ...), so that each can be told apart."""
    return [
        ClientData(f"c{k}", [], [torch.tensor([k, i, *[0] * (length - 2)]) for i, length in enumerate(lengths)]) for k, lengths in enumerate(lengths_per_client)
    ]


@pytest.mark.parametrize(
    ("limit", "expected"),
    [
        (0, [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2)]),
        (100, [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1), (0, 2)]),
        (20, [(0, 0), (1, 0), (2, 0), (0, 1), (2, 1)]),
        (12, [(0, 0), (1, 0), (2, 0)]),
        (11, [(0, 0), (1, 0)]),
        (1, [(0, 0)]),
    ],
)
def test_pooled_text_takes_one_of_each_in_turn_up_to_the_cap(limit, expected):
    clients = held_out([4, 4, 4], [4], [4, 4])
    assert [tuple(s[:2].tolist()) for s in pool_text(clients, limit)] == expected


def test_no_clients_no_text():
    assert pool_text([], 0) == [] and pool_text(held_out([]), 5) == []


def test_a_run_reports_plain_perplexities(tmp_path):
    federation = tiny_federation(SIZES, torch.float64, held_out=2)
    cfg = tiny_config(tmp_path / "run", adapter_dtype="float64", dtype="float64", lr=0.05, rounds=5, eval_every=2, eval_tokens=60)
    result = simulate(cfg, federation=federation)
    records = lines(tmp_path / "run")
    assert [record["evaluation"] is not None for record in records] == [True, False, True, False, True, True]
    last = records[-1]["evaluation"]
    for name, clients in (("client_text", federation.data.clients), ("held_out_clients", federation.data.held_out)):
        text = pool_text(clients, 60)
        loss, tokens = plain(federation.model, result.bank, text, cfg.scale)
        assert last[name] == {"loss": pytest.approx(loss, rel=1e-10), "perplexity": pytest.approx(math.exp(loss), rel=1e-10), "tokens": tokens}
        before, _ = plain(federation.model, result.bank, text, 0.0)
        assert records[0]["evaluation"][name]["loss"] == pytest.approx(before, rel=1e-10)
    assert result.summary["evaluation_before"] == records[0]["evaluation"] and result.summary["evaluation_after"] == last
    for line, client in zip(result.summary["clients"], federation.data.clients, strict=True):
        text = pool_text([client], 15)
        after, _ = plain(federation.model, result.bank, text, cfg.scale, result.ranks[client.name])
        assert line["perplexity_after"] == pytest.approx(math.exp(after), rel=1e-10)
        assert line["perplexity_before"] == pytest.approx(math.exp(plain(federation.model, result.bank, text, 0.0)[0]), rel=1e-10)
        assert line["rank_end"] == result.ranks[client.name] <= line["rank_start"]


def test_no_held_out_clients_no_figure(tmp_path):
    result = simulate(tiny_config(tmp_path / "run", rounds=1), federation=tiny_federation(SIZES))
    assert result.summary["evaluation_after"]["held_out_clients"] is None


def test_bytes_of_a_round_are_those_of_the_factors(tmp_path):
    federation = tiny_federation(SIZES)
    settings = {
        "ranks": "8,4,6,8",
        "gamma": 0.5,
        "prune_lambda": 50.0,
        "lr": 0.05,
        "local_steps": 4,
        "shared_rows": "owners",
        "clients_per_round": 4,
        "rounds": 4,
    }
    result = simulate(tiny_config(tmp_path / "run", **settings), federation=federation)
    a_row = 4 * sum(m + n for m, n in federation.shapes.values())
    for record in result.history[1:]:
        for client in record["clients"]:
            assert client["bytes_down"] == a_row * client["rank_before"] and client["bytes_up"] == a_row * client["rank"]
        assert record["bytes_down"] == sum(client["bytes_down"] for client in record["clients"])
        assert record["bytes_up"] == sum(client["bytes_up"] for client in record["clients"])
        assert record["bytes_down_homlora"] == record["bytes_up_homlora"] == 4 * a_row * 8
        assert record["mean_rank"] == sum(client["rank"] for client in record["clients"]) / 4
    assert any(client["rank"] < client["rank_before"] for record in result.history for client in record["clients"])
    assert result.summary["bytes_up"] == sum(record["bytes_up"] for record in result.history)


@pytest.mark.parametrize(("schedule", "factors"), [("constant", [1, 1, 1, 1]), ("linear", [1, 0.75, 0.5, 0.25]), ("cosine", [1, 0.853553, 0.5, 0.146447])])
def test_learning_rate_over_the_rounds(tmp_path, schedule, factors):
    result = simulate(tiny_config(tmp_path / "run", lr_schedule=schedule, lr=0.1, rounds=4, eval_every=9, local_steps=1), federation=tiny_federation(SIZES))
    assert [record["lr"] for record in result.history[1:]] == pytest.approx([0.1 * factor for factor in factors], rel=1e-5)
