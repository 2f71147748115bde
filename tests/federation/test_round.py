"""The eleven traps that public copies of HETLORA fell into, each through the functions that a real round runs."""

from __future__ import annotations

import json
import math

import pytest
import torch
from tiny import lines, multiply, same_bits, tiny_config, tiny_federation, tiny_model, tiny_state, trained_bank, watch_training

import hetlora_kernels as hk
from hetlora import checkpoint, merge, run_folder, server
from hetlora.client import prune_decision, tail_scores, train_client
from hetlora.config import ConfigError
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.observer import Observer
from hetlora.ranks import kept_rank, tail_start
from hetlora_kernels.peft import attach, detach

SHAPES = {"q": (6, 5), "v": (4, 7)}


@pytest.fixture(scope="module")
def federation():
    return tiny_federation([3, 5, 2, 7])


def bank_of(ranks, values, shapes=SHAPES, dtype=torch.float32) -> hk.AdapterBank:
    """A bank filled by values(module index, side, layout) -> rows."""
    bank = hk.AdapterBank(shapes, ranks, dtype=dtype)
    with torch.no_grad():
        for factor in bank.parameters():
            factor.copy_(values(factor))
    return bank


def integers(factor) -> torch.Tensor:
    return torch.randint(-8, 9, factor.shape).to(factor.dtype)


def normal(factor) -> torch.Tensor:
    return torch.randn(factor.shape, dtype=torch.float64).to(factor.dtype)


def merged(uploads, cfg, bank=None, samples=None, r_max=8) -> hk.AdapterBank:
    """The bank after `merge.aggregate` of `uploads`."""
    bank = bank or bank_of([r_max], normal, uploads.shapes, uploads.dtype)
    names = [f"c{k}" for k in range(uploads.num_clients)]
    state = server.ServerState(bank, dict.fromkeys(names, dict.fromkeys(uploads.shapes, r_max)), 1, r_max)
    merge.aggregate(state, uploads, uploads, samples or [1] * len(names), cfg, torch.nn.Module())
    return state.bank


def client_factors(bank, k):
    """[(A [r, n], Bt [r, m])] per module."""
    return [(bank.a[name].detach()[layout.rows(k)], bank.bt[name].detach()[layout.rows(k)]) for name, layout in bank.layouts.items()]


@pytest.mark.parametrize("clients", [1, 2, 4, 8])
def test_trap_01_equal_ranks_and_uniform_weights_are_fedavg_exactly(tmp_path, clients):
    uploads = bank_of([3] * clients, integers)
    result = merged(uploads, tiny_config(tmp_path, weights="uniform"), r_max=3)
    for module, (a, bt) in enumerate(client_factors(result, 0)):
        own = [client_factors(uploads, k)[module] for k in range(clients)]
        assert torch.equal(a, sum(pair[0] for pair in own) / clients)
        assert torch.equal(bt, sum(pair[1] for pair in own) / clients)


def test_trap_01_and_to_rounding_in_a_run(tmp_path, federation):
    cfg = tiny_config(tmp_path / "run", ranks="4,4,4,4", weights="uniform", rounds=1, clients_per_round=3, lr=0.05)
    result = simulate(cfg, federation=federation)
    names = [client["name"] for client in result.history[1]["clients"]]
    assert len(names) == 3
    adapters = [load(run_folder.client_folder(result.run_dir, name)) for name in names]
    for key, value in result.bank.adapter(0).items():
        mean = torch.stack([adapter[key].double() for adapter in adapters]).mean(0)
        assert float((value - mean).abs().max()) <= 2 * torch.finfo(torch.float32).eps * float(mean.abs().max())
        assert not torch.equal(value, adapters[0][key]), "clients must differ for this test to say anything"


def load(folder):
    from safetensors.torch import load_file

    return load_file(folder / "adapter_model.safetensors")


def test_trap_02_the_mode_of_aggregation_changes_the_next_download(tmp_path, federation):
    downloads = {}
    for mode in ({"weights": "uniform"}, {"weights": "samples"}, {"weights": "sparsity"}, {"shared_rows": "owners"}, {"merge": "svd"}):
        state = tiny_state(federation, [2, 5, 8, 3])
        uploads = trained_bank(federation.shapes, [2, 5, 3], seed=4)
        merge.aggregate(state, uploads, uploads, [3, 5, 2], tiny_config(tmp_path, **mode), federation.model)
        names = list(state.ranks)
        received = server.distribute(state, names)
        for k, name in enumerate(names):
            for (a, bt), (bank_a, bank_bt), rank in zip(client_factors(received, k), client_factors(state.bank, 0), state.ranks[name].values(), strict=True):
                assert torch.equal(a, bank_a[:rank]) and torch.equal(bt, bank_bt[:rank])
        downloads[str(mode)] = received
    banks = list(downloads.values())
    assert not any(same_bits(one, other) for i, one in enumerate(banks) for other in banks[:i])


def test_trap_02_clients_of_a_run_start_from_the_truncated_bank(tmp_path, federation, monkeypatch):
    seen = watch_training(monkeypatch)
    banks = []
    save = checkpoint.save_checkpoint

    def keep(run, state, bank, *rest):
        banks.append((bank, dict(state["ranks"])))
        save(run, state, bank, *rest)

    monkeypatch.setattr(checkpoint, "save_checkpoint", keep)
    simulate(tiny_config(tmp_path / "run", lr=0.05), federation=federation)
    assert len(seen) == 3 and len(banks) == 4
    for training, (bank, ranks), (after, _) in zip(seen, banks, banks[1:], strict=False):
        assert same_bits(training.received, bank.truncate([ranks[name] for name in training.names]))
        assert not same_bits(bank, after)


def test_trap_02_adapters_load_strictly():
    bank = trained_bank(SHAPES, [3, 2])
    good = bank.adapter(0)
    renamed = {key.replace("lora_A", "lora_A.rank3"): value for key, value in good.items()}
    for bad in (renamed, {}, dict(list(good.items())[1:]), bank.adapter(1)):
        with pytest.raises(ValueError, match="state_dict"):
            bank.load_adapter(0, bad)


@pytest.mark.parametrize("choice", [{"merge": "factors"}, {"merge": "svd"}, {"merge": "stack"}])
def test_trap_03_rows_that_small_clients_do_not_own_can_still_learn(tmp_path, choice, monkeypatch):
    """Round 1 trains three clients of rank 1; a client of rank 6 must then be able to train the rows past what they sum to."""
    federation = tiny_federation([3, 3, 3, 3])
    monkeypatch.setattr(server, "sample", lambda names, count, seed, number: names[:3] if number == 1 else names[3:])
    seen = watch_training(monkeypatch)
    simulate(tiny_config(tmp_path / "run", ranks="1,1,1,6", rounds=2, lr=0.05, **choice), federation=federation)
    last = seen[1]
    assert last.names == ["client3"]
    for (a, bt), (trained_a, trained_bt) in zip(client_factors(last.received, 0), client_factors(last.trained, 0), strict=True):
        assert bool((a[3:].norm(dim=1) > 0.1).all()), "A of an unowned row must not be zero"
        assert bool(((trained_bt - bt)[3:].norm(dim=1) > 0.01).all()) and not torch.equal(a[3:], trained_a[3:]), "the rows must have learned"


def test_trap_04_dilution_as_published_and_its_remedy(tmp_path):
    """Row 3 is owned by weight P = 1/4: it shrinks by P in A and in B, and by P^2 in the product; 'owners' keeps it."""
    uploads = bank_of([2, 2, 2, 4], normal, dtype=torch.float64)
    for choice, shrunk in (("none", 0.25), ("owners", 1.0)):
        result = merged(uploads, tiny_config(tmp_path, weights="uniform", shared_rows=choice), r_max=4)
        for (a, bt), (own_a, own_bt) in zip(client_factors(result, 0), client_factors(uploads, 3), strict=True):
            torch.testing.assert_close(a[3], shrunk * own_a[3], rtol=1e-14, atol=0)
            torch.testing.assert_close(bt[3], shrunk * own_bt[3], rtol=1e-14, atol=0)
            torch.testing.assert_close(torch.outer(bt[3], a[3]), shrunk**2 * torch.outer(own_bt[3], own_a[3]), rtol=1e-14, atol=0)


@pytest.mark.parametrize("gamma", [0.999, 0.99, 0.9, 0.5, 0.01])
def test_trap_05_the_tail_is_never_empty_above_r_min(gamma):
    for r_min in (1, 5):
        for rank in range(r_min + 1, 130):
            assert r_min <= kept_rank(rank, gamma, r_min) < rank
            assert tail_start({"q": rank, "v": r_min}, gamma, r_min) == {"q": kept_rank(rank, gamma, r_min), "v": r_min}
        assert kept_rank(r_min, gamma, r_min) == r_min
        assert kept_rank(40, 1.0, r_min) == 40


def test_trap_05_at_r_min_nothing_is_pruned_in_a_run(tmp_path, federation):
    cfg = tiny_config(
        tmp_path / "run", ranks="3,3,3,8", clients_per_round=4, rounds=5, gamma=0.5, prune_lambda=50.0, lr=0.05, local_steps=4, shared_rows="owners"
    )
    history = simulate(cfg, federation=federation).history
    small = [line for record in history[1:] for line in record["clients"] if line["name"] != "client3"]
    assert all(line["rank"] == 3 and line["tail_before"] == line["tail_after"] == 0 for line in small)
    large = [line["rank"] for record in history[1:] for line in record["clients"] if line["name"] == "client3"]
    assert large[0] == 8 and large[-1] == 3 and min(large) == 3 and 4 in large, "8 -> 4 -> 3, never below r_min"


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_trap_06_the_regulariser_has_a_gradient(tmp_path, federation, optimizer):
    """The gradient itself is held against autograd in test_cohort; here its effect, and that it leaves the head alone."""
    shapes, data = federation.shapes, federation.data.clients[3]
    results = {}
    for weight in (0.0, 1.0):
        bank = trained_bank(shapes, [6])
        cfg = tiny_config(tmp_path, prune_lambda=weight, optimizer=optimizer, clip_norm=0.0, lr=0.01, local_steps=1)
        start = tail_scores(bank, [3]).sum()
        train_client(federation.model, bank, data, cfg, 1, cfg.lr, [3])
        results[weight] = (tail_scores(bank, [3]).sum() - start, client_factors(bank, 0))
    assert results[1.0][0] < 0 and results[1.0][0] < results[0.0][0] - 0.01
    for (a, bt), (other_a, other_bt) in zip(results[0.0][1], results[1.0][1], strict=True):
        assert torch.equal(a[:3], other_a[:3]) and torch.equal(bt[:3], other_bt[:3])
        assert not torch.equal(a[3:], other_a[3:]) and not torch.equal(bt[3:], other_bt[3:])


def test_trap_06_zero_subgradient_at_a_zero_norm(tmp_path, federation):
    """B = 0 in round 1: the first step with the regulariser is the first step without it, and nothing is NaN."""
    steps = []
    for weight in (0.0, 5.0):
        cfg = tiny_config(tmp_path, prune_lambda=weight, local_steps=1)
        bank = server.fresh_bank(federation.shapes, 6, cfg, torch.device("cpu"))
        train_client(federation.model, bank, federation.data.clients[3], cfg, 1, cfg.lr, [3])
        steps.append(bank)
    assert same_bits(*steps) and bool((tail_scores(steps[0], [3]) > 0).all())


def test_trap_07_a_tail_of_zero_cannot_shrink(tmp_path, federation, monkeypatch):
    """Nobody prunes in round 1, however strong the regulariser; a client whose tail rows nobody trained cannot later either."""
    monkeypatch.setattr(server, "sample", lambda names, count, seed, number: {1: names[:2], 2: names[3:], 3: names[3:]}[number])
    cfg = tiny_config(tmp_path / "run", ranks="2,4,3,8", gamma=0.5, prune_lambda=50.0, rounds=3, lr=0.05, local_steps=4)
    result = simulate(cfg, federation=federation)
    one, two, three = (record["clients"] for record in result.history[1:])
    assert [line["tail_before"] for line in one] == [0, 0] and [line["rank"] for line in one] == [2, 4]
    assert one[1]["tail_after"] > 0
    assert two[0]["tail_before"] == 0 and two[0]["rank"] == 8, "rows 4..7 had not been trained by anybody"
    assert three[0]["tail_before"] > 0 and three[0]["rank"] == 4, "now they can shrink, and do"


def test_trap_07_only_a_strict_decrease_prunes(tmp_path, federation):
    cfg = tiny_config(tmp_path / "run", ranks="8,8,8,8", gamma=0.5, lr=1e-30, optimizer="sgd", prune_lambda=1.0, clients_per_round=4, rounds=1)
    same = torch.tensor([0.5, 0.25], dtype=torch.float64)
    eight, four = {"q": 8, "v": 8}, {"q": 4, "v": 4}
    assert prune_decision(eight, four, same, same, "client") == eight
    assert prune_decision(eight, four, same, torch.tensor([0.5, 0.2499999]), "client") == four
    assert prune_decision(eight, four, same, torch.tensor([0.1, 0.7]), "client") == eight
    assert prune_decision(eight, {"q": 4, "v": 3}, same, same, "module") == eight
    assert prune_decision({"q": 8, "v": 6}, {"q": 4, "v": 3}, same, torch.tensor([0.5, 0.2]), "module") == {"q": 8, "v": 3}
    state = tiny_state(federation, [8] * 4)
    received = server.distribute(state, list(state.ranks))
    trained = received.select(range(4))
    train_client(federation.model, trained.select([0]), federation.data.clients[0], cfg, 1, cfg.lr, [4])
    before, after = tail_scores(received, [4] * 4), tail_scores(trained, [4] * 4)
    assert (
        torch.equal(before, after)
        and prune_decision(state.ranks["client0"], dict.fromkeys(federation.shapes, 4), before[0], after[0], "client") == state.ranks["client0"]
    )


def test_trap_08_norms_survive_factors_that_cancel(tmp_path):
    """Pairs a, a + 1e-3 e against b, -b: B A is 1e-3 b e^T. The default loses no more than float32 products must; `exact` loses nothing."""
    cfg = tiny_config(tmp_path)
    shapes = {"q": (64, 64)}
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        a, b = torch.randn(64, generator=generator), torch.randn(64, generator=generator)
        bank = bank_of([2, 2], normal, shapes)
        with torch.no_grad():
            bank.a["q"][:2] = torch.stack([a, a + 1e-3 * torch.eye(64)[0]])
            bank.bt["q"][:2] = torch.stack([b, -b])
            bank.a["q"][2:] = torch.stack([a, a])  # cancels to zero: rounding may go below it
            bank.bt["q"][2:] = torch.stack([b, -b])
        exact = (bank.bt["q"][:2].detach().double().t() @ bank.a["q"][:2].detach().double()).norm()
        products = float(a.square().sum() * b.square().sum())  # each of the four terms of S^2, rounded to the type of the products
        assert abs(float(bank.delta_norms(exact=True)[0, 0]) ** 2 - float(exact) ** 2) <= 8 * torch.finfo(torch.float64).eps * products
        weights, norms = merge.client_weights(bank, [1, 1], cfg)
        assert bool(torch.isfinite(weights).all()) and float(weights.sum()) == pytest.approx(1) and bool((weights >= 0).all())
        assert abs(float(norms[0]) ** 2 - float(exact) ** 2) <= 4 * torch.finfo(torch.float32).eps * products


def test_trap_08_ordinary_norms_are_exact_to_float32(tmp_path):
    bank = bank_of([3, 1, 8], normal)
    dense = torch.tensor([[float((bt.double().t() @ a.double()).norm()) for a, bt in client_factors(bank, k)] for k in range(3)], dtype=torch.float64)
    weights, norms = merge.client_weights(bank, [1, 1, 1], tiny_config(tmp_path))
    torch.testing.assert_close(weights, dense / dense.sum(0), rtol=1e-6, atol=0)
    torch.testing.assert_close(norms, dense.square().sum(1).sqrt(), rtol=1e-6, atol=0)


def test_trap_09_the_scale_does_not_depend_on_the_rank(tmp_path):
    """Rows 2.. of B are zero, so every truncation to 2 or more rows is the same model; and alpha = s * r in what is saved."""
    model = tiny_model(torch.float64)
    bank = trained_bank(target_shapes(model, "attention"), [8], torch.float64)
    with torch.no_grad():
        for rows in bank.bt.values():
            rows[2:] = 0
    tokens = torch.arange(12)[None]
    logits = []
    for rank in (2, 3, 8):
        own = bank.truncate([rank])
        attach(model, own, scale=3.0)
        logits.append(model(tokens).logits)
        detach(model)
        checkpoint.write_adapter(tmp_path / str(rank), own.adapter(0), 3.0, "tiny")
        saved = json.loads((tmp_path / str(rank) / "adapter_config.json").read_text())
        assert saved["lora_alpha"] / saved["r"] == 3.0
    weights = {f"{n}.weight": model.get_submodule(n).weight + 3.0 * bank.bt[n].detach().t() @ bank.a[n].detach() for n in bank.shapes}
    dense = torch.func.functional_call(model, weights, (tokens,)).logits
    for each in logits:
        torch.testing.assert_close(each, dense, rtol=1e-12, atol=1e-12)
    assert not torch.allclose(dense, model(tokens).logits, atol=1e-3)


def poison(k_name, value=math.nan, rounds=(2,)):
    def change(number, names, bank):
        if number in rounds and k_name in names:
            name = list(bank.shapes)[1]
            bank.bt[name][bank.layouts[name].rows(names.index(k_name))][0, 0] = value

    return change


@pytest.mark.parametrize("weights", ["sparsity", "uniform", "samples"])
@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])
def test_trap_10_a_bad_upload_is_left_out_and_the_rest_is_normalised(tmp_path, federation, monkeypatch, weights, value):
    settings = {"weights": weights, "clients_per_round": 4, "lr": 0.05, "rounds": 2, "ranks": "2,8,4,6", "gamma": 1}
    reason = "update has non-finite values in model.layers.0.self_attn.k_proj"
    with monkeypatch.context() as patch:
        seen = watch_training(patch, poison("client1", value))
        messages = []
        observer = Observer()
        observer.message = messages.append
        cfg = tiny_config(tmp_path / "run", **settings)
        result = simulate(cfg, federation=federation, observer=observer)
    record = lines(tmp_path / "run")[2]
    assert [client["name"] for client in record["clients"]] == ["client0", "client2", "client3"]
    assert sum(client["weight"] for client in record["clients"]) == pytest.approx(1)
    assert record["dropped"] == [{"name": "client1", "reason": reason}]
    assert messages == [f"round 2: client1 is left out, {reason}"] and result.summary["notes"] == [f"round 2: client1 left out, {reason}"]
    assert next(c for c in result.summary["clients"] if c["name"] == "client1")["rounds"] == 1
    # the bank is the merge of the other three uploads, weighted among themselves, over the bank after round 1
    samples = torch.tensor([len(client.train) for client in federation.data.clients])
    bank = server.fresh_bank(federation.shapes, 8, cfg, torch.device("cpu"))
    for training, arrived in zip(seen, ([0, 1, 2, 3], [0, 2, 3]), strict=True):
        uploads = training.trained.select(arrived)
        p, _ = merge.client_weights(uploads, samples[arrived].tolist(), cfg)
        bank = uploads.aggregate(p, 8, keep=bank)
    assert same_bits(result.bank, bank)


def test_trap_10_a_client_that_diverges_inside_the_batch_touches_nobody_else(tmp_path, federation):
    """One client starts from NaN and infinity: the others' adapters keep their bits, co-batched and in micro-batches."""
    from hetlora.cohort import train_cohort

    for extra in ({}, {"max_tokens_per_step": 30}):
        cfg = tiny_config(tmp_path, dropout=0.1, prune_lambda=0.1, **extra)
        banks, logged = [], []
        for value in (1.0, math.nan, math.inf):
            bank = trained_bank(federation.shapes, [3, 5, 2, 4])
            with torch.no_grad():
                multiply(bank, 1, value)
            results = train_cohort(federation.model, bank, federation.data.clients, cfg, 1, 0.05, [2, 3, 1, 2])
            banks.append(bank)
            logged.append([result for k, result in enumerate(results) if k != 1])
        assert list(server.refused(banks[0])) == [] and list(server.refused(banks[1])) == list(server.refused(banks[2])) == [1]
        clean, *spoiled = (bank.select([0, 2, 3]) for bank in banks)
        assert all(same_bits(clean, each) for each in spoiled)
        assert logged[0] == logged[1] == logged[2]


def test_trap_10_when_every_upload_is_bad_the_run_stands_at_the_round_before(tmp_path, federation, monkeypatch):
    def spoil(number, names, bank):
        if number == 2:
            for k in range(len(names)):
                multiply(bank, k, math.nan)

    cfg = tiny_config(tmp_path / "run")
    with monkeypatch.context() as patch:
        watch_training(patch, spoil)
        with pytest.raises(ConfigError, match=r"round 2: no clients left, every update was refused .*stands at round 1"):
            simulate(cfg, federation=federation)
    assert [record["round"] for record in lines(tmp_path / "run")] == [0, 1]
    state, _ = checkpoint.load_checkpoint(tmp_path / "run")
    assert state["round"] == 1
    continued = simulate(cfg, resume=True, federation=federation)
    assert same_bits(continued.bank, simulate(tiny_config(tmp_path / "other"), federation=federation).bank)


def test_trap_11_a_huge_upload_takes_over_unless_capped(tmp_path, federation, monkeypatch):
    weights = {}

    def attack(number, names, bank):
        if number == 2:
            multiply(bank, 1, 1e3)  # in A and in B: 1e6 in the product

    for name, choice in {
        "published": {"clip_median": 0},
        "cap": {"clip_median": 0, "weight_cap": 2.0},
        "clip": {"clip_median": 0, "clip_update": 1.0},
        "client cap": {"clip_median": 0, "weight_cap": 2.0, "weight_scope": "client"},
        "default": {},
        "default, client": {"weight_scope": "client"},
    }.items():
        with monkeypatch.context() as patch:
            watch_training(patch, attack)
            cfg = tiny_config(tmp_path / name, ranks="4,4,4,4", clients_per_round=4, rounds=2, lr=0.05, gamma=1, **choice)
            record = simulate(cfg, federation=federation).history[2]
        assert lines(tmp_path / name)[2]["clients"] == record["clients"], "p_k is in the log"
        weights[name] = [client["weight"] for client in record["clients"]]
        assert sum(weights[name]) == pytest.approx(1)
    assert weights["published"][1] > 0.9999
    assert weights["cap"][1] < 0.6 and weights["client cap"][1] < 0.6
    assert weights["clip"][1] < 0.6
    assert weights["default"][1] < 0.3 and weights["default, client"][1] < 0.3, "a fair share is a quarter"
