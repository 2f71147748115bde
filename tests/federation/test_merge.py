"""Every choice of aggregation (specification, section 3) changes what it says and nothing else; folded and exported adapters are exact."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from tiny import multiply, same_bits, tiny_config, tiny_federation, tiny_model, trained_bank, watch_training
from transformers import GPT2Config, GPT2LMHeadModel

import hetlora_kernels as hk
from hetlora import merge, run_folder, server
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora_kernels.peft import attach, detach

SHAPES = {"q": (6, 5), "v": (4, 7)}
RANKS = [2, 5, 3]
SAMPLES = [10, 30, 60]


@pytest.fixture(scope="module")
def federation():
    return tiny_federation([3, 5, 2, 7])


@pytest.fixture
def uploads():
    return trained_bank(SHAPES, RANKS, torch.float64, seed=1)


@pytest.fixture
def old():
    return trained_bank(SHAPES, [8], torch.float64, seed=2)


def aggregate(cfg, uploads, old, received=None, model=None):
    state = server.ServerState(old, {}, 1, 8)
    result = merge.aggregate(state, uploads, received or uploads, SAMPLES, cfg, model or torch.nn.Module())
    return state.bank, result


def padded(bank, k, name, rows=8):
    """(A [R, n], Bt [R, m]) of client k in one module, with zero rows."""
    out = []
    for side in (bank.a, bank.bt):
        own = side[name].detach()[bank.layouts[name].rows(k)]
        out.append(torch.cat([own, own.new_zeros(rows - len(own), own.shape[1])]))
    return out


def deltas(bank, name):
    return [b.t() @ a for a, b in (padded(bank, k, name) for k in range(bank.num_clients))]


def dense_norms(bank) -> torch.Tensor:
    return torch.stack([torch.stack([d.norm() for d in deltas(bank, name)]) for name in bank.shapes], dim=1)


def expected_weights(bank, weights, scope) -> torch.Tensor:
    norms = dense_norms(bank)
    if weights == "uniform":
        norms = torch.ones_like(norms)
    elif weights == "samples":
        norms = torch.tensor(SAMPLES, dtype=torch.float64)[:, None].expand(norms.shape)
    elif scope == "client":
        norms = norms.square().sum(1, keepdim=True).sqrt().expand(norms.shape)
    return norms / norms.sum(0)


@pytest.mark.parametrize(("weights", "scope"), [("sparsity", "module"), ("sparsity", "client"), ("uniform", "module"), ("samples", "module")])
def test_weights_and_their_scope(tmp_path, uploads, old, weights, scope):
    cfg = tiny_config(tmp_path, weights=weights, weight_scope=scope)
    bank, result = aggregate(cfg, uploads, old)
    p = expected_weights(uploads, weights, scope)
    torch.testing.assert_close(result.weights, p, rtol=1e-12, atol=0)
    torch.testing.assert_close(result.norms, dense_norms(uploads).square().sum(1).sqrt(), rtol=1e-12, atol=0)
    for i, name in enumerate(SHAPES):
        pairs = [padded(uploads, k, name) for k in range(3)]
        for side, factor in enumerate((bank.a[name], bank.bt[name])):
            torch.testing.assert_close(factor.detach()[:5], sum(p[k, i] * pairs[k][side] for k in range(3))[:5], rtol=1e-12, atol=1e-15)
    assert (
        len({tuple(expected_weights(uploads, w, s).flatten().tolist()) for w, s in [("sparsity", "module"), ("sparsity", "client"), ("samples", "module")]})
        == 3
    )


def test_all_norms_zero_gives_uniform_weights_in_that_module_only(tmp_path, uploads):
    with torch.no_grad():
        uploads.bt["q"].zero_()
    p, norms = merge.client_weights(uploads, SAMPLES, tiny_config(tmp_path))
    assert p[:, 0].tolist() == [1 / 3] * 3 and len(set(p[:, 1].tolist())) == 3
    assert bool((norms > 0).all())


@pytest.mark.parametrize("scope", ["module", "client"])
def test_weight_cap_clips_at_a_multiple_of_the_median(tmp_path, uploads, scope):
    multiply(uploads, 1, 1e3)
    norms = dense_norms(uploads) if scope == "module" else dense_norms(uploads).square().sum(1, keepdim=True).sqrt().expand(3, 2)
    capped = norms.minimum(1.5 * norms.median(0).values)
    p, _ = merge.client_weights(uploads, SAMPLES, tiny_config(tmp_path, weight_cap=1.5, weight_scope=scope))
    torch.testing.assert_close(p, capped / capped.sum(0), rtol=1e-12, atol=0)
    free, _ = merge.client_weights(uploads, SAMPLES, tiny_config(tmp_path, weight_scope=scope))
    large, _ = merge.client_weights(uploads, SAMPLES, tiny_config(tmp_path, weight_cap=1e9, weight_scope=scope))
    assert torch.equal(free, large) and float(free[1].min()) > 0.99 > float(p[1].max())


def test_clip_update_bounds_the_step_and_touches_no_small_one(tmp_path, uploads, old):
    received = old.truncate(RANKS)
    with torch.no_grad():
        for factor, start in zip(uploads.parameters(), received.parameters(), strict=True):
            factor.copy_(start + 0.01 * factor)
    multiply(uploads, 1, 5.0)
    before = uploads.select(range(3))

    def step(bank, k):
        pairs = zip(bank.select([k]).parameters(), received.select([k]).parameters(), strict=True)
        return torch.cat([(new - start).detach().flatten() for new, start in pairs])

    cfg = tiny_config(tmp_path, clip_update=0.5, clip_median=0, weights="uniform")
    bank, _ = aggregate(cfg, uploads, old, received)
    assert same_bits(uploads, before), "the clients' own adapters stay"
    clipped = uploads.select(range(3))
    factors = merge.clip_updates(clipped, received, 0.5)
    assert factors[0] == factors[2] == 1 > factors[1]
    assert float(step(clipped, 1).norm()) == pytest.approx(0.5)
    torch.testing.assert_close(step(clipped, 1) / 0.5, step(uploads, 1) / step(uploads, 1).norm(), rtol=1e-9, atol=1e-12)
    assert same_bits(clipped.select([0, 2]), uploads.select([0, 2]))
    assert same_bits(bank, aggregate(tiny_config(tmp_path, weights="uniform"), clipped, old)[0])


def test_clip_update_in_a_run_uses_what_each_client_received(tmp_path, federation, monkeypatch):
    """A client that prunes is compared with its download cut to its new rank; no update in this run is above the bound."""
    clips = []
    clip = merge.clip_updates

    def watched(uploads, received, *limits):
        clips.append((uploads, received, clip(uploads, received, *limits)))
        return clips[-1][2]

    monkeypatch.setattr(merge, "clip_updates", watched)
    cfg = tiny_config(
        tmp_path / "run",
        clip_update=0.3,
        clip_median=0,
        lr=0.05,
        ranks="2,8,4,6",
        clients_per_round=4,
        gamma=0.5,
        prune_lambda=50.0,
        local_steps=4,
        shared_rows="owners",
    )
    history = simulate(cfg, federation=federation).history
    assert any(client["rank"] < client["rank_before"] for record in history for client in record["clients"])
    for uploads, received, factors in clips:
        assert uploads.ranks == received.ranks and all(factor < 1 for factor in factors)
        for k in range(uploads.num_clients):
            pairs = zip(uploads.select([k]).parameters(), received.select([k]).parameters(), strict=True)
            assert sum(float((a - b).detach().square().sum()) for a, b in pairs) ** 0.5 == pytest.approx(0.3, rel=1e-5)


@pytest.mark.parametrize("unowned", ["keep", "zero"])
@pytest.mark.parametrize("shared", ["none", "owners"])
def test_shared_and_unowned_rows(tmp_path, uploads, old, unowned, shared):
    bank, result = aggregate(tiny_config(tmp_path, unowned_rows=unowned, shared_rows=shared), uploads, old)
    for i, name in enumerate(SHAPES):
        p = result.weights[:, i]
        for side, factor in enumerate((bank.a[name], bank.bt[name])):
            for row in range(8):
                owners = [k for k in range(3) if RANKS[k] > row]
                total = sum((p[k] * padded(uploads, k, name)[side][row] for k in owners), torch.zeros(factor.shape[1], dtype=torch.float64))
                if not owners:
                    total = (old.a[name], old.bt[name])[side].detach()[row] * (unowned == "keep")
                elif shared == "owners":
                    total = total / sum(p[k] for k in owners)
                torch.testing.assert_close(factor.detach()[row], total, rtol=1e-12, atol=1e-15)


def test_a_row_with_an_owner_of_weight_zero_is_owned(tmp_path, old):
    """owned = the rank exceeds the row's index, whatever the weight: the row becomes zero, not the old value."""
    uploads = trained_bank(SHAPES, [2, 5], torch.float64)
    with torch.no_grad():
        for rows in uploads.bt.values():
            rows[2:] = 0
    state = server.ServerState(old, {}, 1, 8)
    merge.aggregate(state, uploads, uploads, [1, 1], tiny_config(tmp_path), torch.nn.Module())
    for name in SHAPES:
        assert not state.bank.a[name][2:5].any() and torch.equal(state.bank.a[name][5:], old.a[name][5:])


@pytest.mark.parametrize("r_max", [3, 8])
def test_svd_merge_is_the_best_approximation_of_the_exact_sum(tmp_path, uploads, r_max):
    old = trained_bank(SHAPES, [r_max], torch.float64, seed=2)
    if r_max == 3:
        uploads = uploads.prune([2, 3, 3])
    state = server.ServerState(old, {}, 1, r_max)
    result = merge.aggregate(state, uploads, uploads, SAMPLES, tiny_config(tmp_path, merge="svd"), torch.nn.Module())
    for i, name in enumerate(SHAPES):
        exact = sum(p * d for p, d in zip(result.weights[:, i], deltas(uploads, name), strict=True))
        u, s, vh = torch.linalg.svd(exact)
        best = u[:, :r_max] * s[:r_max] @ vh[:r_max] if r_max < len(s) else exact
        a, bt = state.bank.a[name].detach(), state.bank.bt[name].detach()
        torch.testing.assert_close(bt.t() @ a, best, rtol=1e-10, atol=1e-14)
        for rank in range(1, min(r_max, len(s)) + 1):  # a truncated download is the best of its rank
            torch.testing.assert_close(bt[:rank].t() @ a[:rank], u[:, :rank] * s[:rank] @ vh[:rank], rtol=1e-10, atol=1e-14)
        rank = int((s > 1e-12 * s[0]).sum())
        torch.testing.assert_close(a[rank:], old.a[name].detach()[rank:], rtol=0, atol=0)
        assert not bt[rank:].any()


def test_svd_merge_of_nothing_keeps_a_bank_that_can_learn(tmp_path, old):
    uploads = hk.AdapterBank(SHAPES, RANKS, dtype=torch.float64)  # B = 0
    bank, _ = aggregate(tiny_config(tmp_path, merge="svd"), uploads, old)
    assert all(torch.equal(bank.a[name], old.a[name]) and not bank.bt[name].any() for name in SHAPES)


def gpt2(dtype=torch.float64):
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, n_positions=32, bos_token_id=0, eos_token_id=0)
    return GPT2LMHeadModel(config).to(dtype).requires_grad_(False).eval()


@pytest.mark.parametrize("make", [lambda: tiny_model(torch.float64), gpt2], ids=["llama", "gpt2"])
def test_stack_folds_the_exact_sum_into_the_base(tmp_path, make):
    """W + s sum p B A: the logits of the folded base are those of the weighted clients side by side."""
    model, base = make(), make()
    shapes = target_shapes(model, "attention")
    uploads = trained_bank(shapes, RANKS, torch.float64)
    bank, result = aggregate(tiny_config(tmp_path, merge="stack", scale=1.5, adapter_dtype="float64"), uploads, trained_bank(shapes, [8]), model=model)
    assert all(not rows.any() for rows in bank.bt.values()) and all(rows.any(1).all() for rows in bank.a.values())
    for i, name in enumerate(shapes):
        exact = 1.5 * sum(p * d for p, d in zip(result.weights[:, i], deltas(uploads, name), strict=True))
        change = model.get_submodule(name).weight - base.get_submodule(name).weight
        torch.testing.assert_close(change if make is not gpt2 else change.t(), exact, rtol=1e-10, atol=1e-14)
    stacked = hk.AdapterBank(shapes, [sum(RANKS)], dtype=torch.float64)
    with torch.no_grad():
        for i, name in enumerate(shapes):
            stacked.a[name].copy_(uploads.a[name])
            stacked.bt[name].copy_(uploads.bt[name] * torch.repeat_interleave(result.weights[:, i], torch.tensor(RANKS))[:, None])
    tokens = torch.arange(12)[None]
    attach(base, stacked, scale=1.5)
    torch.testing.assert_close(model(tokens).logits, base(tokens).logits, rtol=1e-10, atol=1e-10)
    other = [name for name in dict(model.named_parameters()) if name.rpartition(".")[0] not in shapes]
    assert all(torch.equal(model.get_parameter(name), base.get_parameter(name)) for name in other)


@pytest.mark.parametrize("settings", [{}, {"shared_rows": "owners"}, {"unowned_rows": "zero"}], ids=str)
def test_residual_makes_the_average_exact(tmp_path, settings):
    """FedEx-LoRA: W + s B A of the next round is W + s sum p B A of this one, and the bank is FedAvg's."""
    model, base = gpt2(), gpt2()
    shapes = target_shapes(model, "attention")
    uploads, old = trained_bank(shapes, RANKS, torch.float64), trained_bank(shapes, [8], torch.float64)
    options = {"scale": 1.5, "adapter_dtype": "float64", "weights": "samples", **settings}
    averaged, _ = aggregate(tiny_config(tmp_path, **options), uploads, old)
    bank, result = aggregate(tiny_config(tmp_path, merge="residual", **options), uploads, old, model=model)
    assert same_bits(bank, averaged) and max(RANKS) < 8
    for i, name in enumerate(shapes):
        exact = sum(p * d for p, d in zip(result.weights[:, i], deltas(uploads, name), strict=True))
        unowned = bank.bt[name][max(RANKS) :].t() @ bank.a[name][max(RANKS) :]
        change = (model.get_submodule(name).weight - base.get_submodule(name).weight).t()
        assert change.norm() > 0.1 * exact.norm(), "averaged factors are far from the exact sum, or this says nothing"
        torch.testing.assert_close(change + 1.5 * bank.bt[name].t() @ bank.a[name], 1.5 * (exact + unowned), rtol=1e-10, atol=1e-14)


def test_residual_counts_rows_and_stacks(tmp_path, monkeypatch):
    """A client downloads its rows of the bank and every round's stack since it was here last."""
    seen = watch_training(monkeypatch)
    cfg = tiny_config(tmp_path / "run", merge="residual", ranks="2,3,4,8", rounds=5, clients_per_round=2, gamma=1.0)
    history = simulate(cfg, federation=tiny_federation([3, 5, 2, 7])).history
    last = {}
    for number, (record, training) in enumerate(zip(history[1:], seen, strict=True), 1):
        for client in record["clients"]:
            k = training.names.index(client["name"])
            missed = sum(history[i]["bytes_up"] for i in range(last.get(client["name"], 1), number))
            assert client["bytes_down"] == training.received.num_bytes(k) + missed and client["bytes_up"] == training.trained.num_bytes(k)
        last |= dict.fromkeys(training.names, number)
    assert len(set(last.values())) > 1


def test_stack_counts_every_stack_since_a_client_was_here_last(tmp_path, monkeypatch):
    """One that skipped rounds, or was never here, follows the base through all of them; a refused upload was preceded by a download all the same."""

    def spoil(number, names, bank):
        if number == 3:
            multiply(bank, 0, float("nan"))

    seen = watch_training(monkeypatch, spoil)
    cfg = tiny_config(tmp_path / "run", merge="stack", ranks="2,3,4,8", rounds=7, clients_per_round=2)
    history = simulate(cfg, federation=tiny_federation([3, 5, 2, 7])).history
    last, away = {}, set()
    for number, (record, training) in enumerate(zip(history[1:], seen, strict=True), 1):
        missed = {name: sum(history[i]["bytes_up"] for i in range(last.get(name, 1), number)) for name in training.names}
        assert record["bytes_down"] == sum(missed.values())
        assert {client["name"]: client["bytes_down"] for client in record["clients"]} == {c["name"]: missed[c["name"]] for c in record["clients"]}
        away |= {number - last[name] for name in training.names if name in last}
        last |= dict.fromkeys(training.names, number)
    assert len(history[3]["dropped"]) == 1 and {1, 2} < away, "clients that came back at once, and later, or this says nothing"


def test_prune_scope_module_gives_each_module_its_own_rank(tmp_path, federation, monkeypatch):
    seen = watch_training(monkeypatch)
    settings = {"ranks": "1,8,8,8", "gamma": 0.6, "prune_lambda": 1.0, "lr": 0.05, "clients_per_round": 4, "local_steps": 3, "seed": 2}
    result = simulate(tiny_config(tmp_path / "run", prune_scope="module", **settings), federation=federation)
    assert any(len(set(rank.values())) > 1 for rank in result.ranks.values()), "modules must differ for this test to say anything"
    names = [client.name for client in federation.data.clients]
    for before, after in itertools.pairwise(seen):
        assert before.names == names
        for module, layout in before.trained.layouts.items():
            for k in range(4):
                rows, kept = layout.rows(k), [8, 4, 2, 1].index(layout.ranks[k])
                q = [4, 2, 1, 1][kept]

                def score(bank, rows=rows, module=module, q=q):
                    return bank.a[module][rows][q:].norm() * bank.bt[module][rows][q:].norm()

                fell = bool(score(before.trained) < score(before.received))
                assert after.received.layouts[module].ranks[k] == (q if fell else layout.ranks[k])
    line = next(client for client in result.history[-1]["clients"] if client["name"] == "client1")
    assert line["module_ranks"] == result.ranks["client1"] and line["rank"] == pytest.approx(sum(line["module_ranks"].values()) / 8, abs=1e-3)
    whole = simulate(tiny_config(tmp_path / "client", **settings), federation=federation)
    assert all(isinstance(rank, int) for rank in whole.ranks.values())
    assert whole.history[1]["clients"][0]["loss_first"] == result.history[1]["clients"][0]["loss_first"]


OPTIONS = [
    {"weights": "uniform"},
    {"weight_scope": "client"},
    {"weight_cap": 1.0},
    {"clip_update": 0.1},
    {"shared_rows": "owners"},
    {"merge": "svd"},
    {"merge": "stack"},
    {"unowned_rows": "zero"},
]


def test_options_of_the_server_change_nothing_before_the_first_merge(tmp_path):
    """The first round's training is the same under every option; its outcome is not."""
    results = [
        simulate(tiny_config(tmp_path / f"{i}", rounds=1, lr=0.05, **option), federation=tiny_federation([3, 5, 2, 7]))
        for i, option in enumerate([{}, *OPTIONS])
    ]
    default = results[0]
    trained = ("name", "rank_before", "rank", "steps", "sequences", "tokens", "loss_first", "loss_last", "tail_before", "tail_after", "bytes_up")
    for result, option in zip(results[1:], OPTIONS, strict=True):
        assert result.history[0] | {"seconds": 0, "cpu_seconds": 0} == default.history[0] | {"seconds": 0, "cpu_seconds": 0}
        for mine, theirs in zip(result.history[1]["clients"], default.history[1]["clients"], strict=True):
            assert [mine[key] for key in trained] == [theirs[key] for key in trained], option
        assert not same_bits(result.bank, default.bank), option
        assert result.ranks == default.ranks


def logits_with(model, bank, scale, tokens):
    attach(model, bank, scale=scale)
    try:
        with torch.no_grad():
            return model(tokens).logits
    finally:
        detach(model)


@pytest.mark.parametrize("scope", ["client", "module"])
def test_saved_adapters_load_in_peft_and_give_the_same_logits(tmp_path, federation, scope):
    """The global adapter, and every client's at its own rank, or at its own rank in each module."""
    cfg = tiny_config(tmp_path / "run", prune_scope=scope, gamma=0.6, prune_lambda=1.0, lr=0.05, clients_per_round=4, local_steps=3, ranks="3,8,8,6", seed=2)
    result = simulate(cfg, federation=federation)
    tokens = torch.arange(16).reshape(2, 8)
    plain = logits_with(tiny_model(), hk.AdapterBank(federation.shapes, [1]), 1.0, tokens)
    shown = set()
    for folder in (result.run_dir / "adapter", *(run_folder.client_folder(result.run_dir, f"client{k}") for k in range(4))):
        tensors = load_file(folder / "adapter_model.safetensors")
        ranks = {name: [tensors[f"base_model.model.{name}.lora_A.weight"].shape[0]] for name in federation.shapes}
        bank = hk.AdapterBank(federation.shapes, ranks)
        bank.load_adapter(0, tensors)
        expected = logits_with(tiny_model(), bank, cfg.scale, tokens)
        if folder.name == "adapter":
            assert same_bits(bank, result.bank)
        elif scope == "client":
            assert set(map(tuple, ranks.values())) == {(result.ranks[folder.name],)}
        else:
            assert {name: rank for name, (rank,) in ranks.items()} == result.ranks[folder.name]
            shown.add(bool(json.loads((folder / "adapter_config.json").read_text())["rank_pattern"]))
        with torch.no_grad():
            got = PeftModel.from_pretrained(tiny_model(), str(folder)).eval()(tokens).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
        assert not torch.allclose(got, plain, atol=1e-3)
    assert scope == "client" or True in shown
