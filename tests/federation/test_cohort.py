"""Local training: many clients in one batch = one client at a time = a plain PyTorch loop with autograd, hooks and torch.optim."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F
from tiny import tiny_clients, tiny_config, tiny_federation, tiny_model, trained_bank

import hetlora_kernels as hk
from hetlora.batches import micro_batches
from hetlora.client import dropout_seed, step_batches, train_client
from hetlora.cohort import train_cohort, train_one_by_one
from hetlora.federation import starting_ranks
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.ranks import bank_ranks, tail_start
from hetlora.seeds import torch_generator
from hetlora_kernels.peft import SEQUENCE_STRIDE, layer_seeds
from hetlora_kernels.reference import dropout_threshold, keep_mask

RANKS = [3, 8, 1, 5]
SIZES = [1, 4, 3, 6]  # with batches of 2 and two epochs: 2, 4, 4 and 6 steps
LR = 0.01
TARGET = "q_proj,o_proj"


def settings(tmp_path, **values):
    defaults = {"local_epochs": 2, "batch_size": 2, "dropout": 0.2, "prune_lambda": 0.05, "gamma": 0.6, "weight_decay": 0.1, "clip_norm": 0.1}
    return tiny_config(tmp_path, **{**defaults, **values})


def setting(cfg, dtype, ranks=RANKS, sizes=SIZES, seed=0):
    """(model, start bank, clients, {module: first tail row per client})"""
    model = tiny_model(dtype, seed)
    shapes = target_shapes(model, TARGET)
    everywhere = [rank if isinstance(rank, dict) else dict.fromkeys(shapes, rank) for rank in ranks]
    start = trained_bank(shapes, bank_ranks(everywhere, shapes), dtype, seed)
    keep = [tail_start(own, cfg.gamma, 1) for own in everywhere]
    return model, start, tiny_clients(sizes, seed), bank_ranks(keep, shapes)


def plain_client(model, start, k, data, cfg, keep, number=1, lr=LR):
    """{module: (A [r, n], B^T [r, m])} of client k, trained without this project's kernels: one sequence at a time, no padding."""
    seed = torch.tensor([dropout_seed(data.name, cfg, number)])
    factors = {}
    for name, layout in start.layouts.items():
        rows = layout.rows(k)
        factors[name] = tuple(t[name].detach()[rows].clone().requires_grad_() for t in (start.a, start.bt))
    parameters = [factor for pair in factors.values() for factor in pair]
    if cfg.optimizer == "adamw":
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=cfg.weight_decay)
    else:
        optimizer = torch.optim.SGD(parameters, lr=lr, weight_decay=cfg.weight_decay, momentum=cfg.momentum)
    now = {}

    def add_lora(name, position):
        def hook(module, inputs, output):
            x = inputs[0]  # [1, T, n]
            keys = now["sequence"] * SEQUENCE_STRIDE + torch.arange(x.shape[1])
            p = dropout_threshold(cfg.dropout) / 65536
            mask = keep_mask(layer_seeds(seed, now["step"], position)[0], keys, x.shape[2], cfg.dropout)
            a, bt = factors[name]
            return output + cfg.scale * (x * mask / (1 - p)) @ a.t() @ bt

        return hook

    hooks = [model.get_submodule(name).register_forward_hook(add_lora(name, i)) for i, name in enumerate(start.shapes)]
    for step, batch in enumerate(step_batches(data, cfg, number)):
        optimizer.zero_grad()
        losses = []
        for sequence, i in enumerate(batch):
            now.update(step=step, sequence=sequence)
            logits = model(data.train[i][None]).logits[0, :-1]
            losses.append(F.cross_entropy(logits, data.train[i][1:], reduction="none"))
        q = {name: own[k] for name, own in keep.items()}
        tail = sum(bt[q[name] :].norm() * a[q[name] :].norm() for name, (a, bt) in factors.items())
        (torch.cat(losses).mean() + cfg.prune_lambda * tail).backward()
        if cfg.clip_norm:
            torch.nn.utils.clip_grad_norm_(parameters, cfg.clip_norm)
        optimizer.step()
    for hook in hooks:
        hook.remove()
    return {name: (a.detach(), bt.detach()) for name, (a, bt) in factors.items()}


def plain_bank(model, start, clients, cfg, keep) -> hk.AdapterBank:
    banks = []
    for k, data in enumerate(clients):
        own = start.select([k])
        trained = plain_client(model, start, k, data, cfg, keep)
        own.load_state_dict({f"{side}.{name}": pair[i] for name, pair in trained.items() for i, side in enumerate(("a", "bt"))})
        banks.append(own)
    return hk.AdapterBank.concat(banks)


def cohort(model, start, clients, cfg, keep) -> hk.AdapterBank:
    bank = start.select(range(start.num_clients))
    train_cohort(model, bank, clients, cfg, 1, LR, keep)
    return bank


def distance(one: hk.AdapterBank, other: hk.AdapterBank) -> float:
    """Largest difference of an element; those of `trained_bank` are about 0.1."""
    pairs = list(zip(one.parameters(), other.parameters(), strict=True))
    return max(float((a.detach().double() - b.detach().double()).abs().max()) for a, b in pairs)


MODULE_RANKS = "per module"


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"optimizer": "sgd", "momentum": 0.9},
        {"optimizer": "sgd", "clip_norm": 0.0, "weight_decay": 0.0, "prune_lambda": 0.5},
        {"local_epochs": 0, "local_steps": 16, "batch_size": 1},
        {"max_tokens_per_step": 20},
        {"dropout": 0.0, "prune_lambda": 0.0},
        {"ranks": MODULE_RANKS},
    ],
    ids=lambda change: "-".join(f"{k}={v}" for k, v in change.items()) or "default",
)
def test_float64_cohort_alone_and_plain_pytorch_agree(tmp_path, change):
    change = dict(change)
    by_module = change.pop("ranks", None) == MODULE_RANKS
    cfg = settings(tmp_path, **change)
    ranks = RANKS
    if by_module:
        names = list(target_shapes(tiny_model(), TARGET))
        ranks = [{name: 1 + (rank + 3 * i) % 8 for i, name in enumerate(names)} for rank in RANKS]
    model, start, clients, keep = setting(cfg, torch.float64, ranks)
    together = cohort(model, start, clients, cfg, keep)
    alone, _ = train_one_by_one(model, start, clients, cfg, 1, LR, keep)
    plain = plain_bank(model, start, clients, cfg, keep)
    assert distance(together, start) > 0.005, "training must move the factors for this test to say anything"
    assert distance(together, alone) < 1e-12
    assert distance(together, plain) < 1e-12


@pytest.mark.parametrize(
    # at most 2x with AdamW: padding and the order of rows change the sums' rounding, and where a gradient is almost zero its first steps blow that up
    ("change", "limit"),
    [({"optimizer": "sgd", "momentum": 0.9, "clip_norm": 0.0}, 1.1), ({}, 2.0)],
    ids=["sgd", "adamw"],
)
def test_float32_is_as_exact_as_plain_pytorch(tmp_path, change, limit):
    cfg = settings(tmp_path, **change)
    squares = {"cohort": 0.0, "alone": 0.0, "plain": 0.0}
    for seed in range(3):
        model, start, clients, keep = setting(cfg, torch.float32, seed=seed)
        exact_model = tiny_model(torch.float32, seed).double()
        exact = plain_bank(exact_model, start.to(dtype=torch.float64), clients, cfg, keep)
        results = {
            "cohort": cohort(model, start, clients, cfg, keep),
            "alone": train_one_by_one(model, start, clients, cfg, 1, LR, keep)[0],
            "plain": plain_bank(model, start, clients, cfg, keep),
        }
        for name, bank in results.items():
            squares[name] += sum(float((a.detach().double() - b.detach()).square().sum()) for a, b in zip(bank.parameters(), exact.parameters(), strict=True))
    errors = {name: value**0.5 for name, value in squares.items()}
    assert errors["cohort"] <= limit * errors["plain"]
    assert errors["alone"] <= limit * errors["plain"]


def plain_run(federation, cfg, sampled):
    """(bank {module: (A [R, n], B^T [R, m])}, ranks of the sampled clients after each round): HETLORA by its equations, in dense arithmetic."""
    shapes, start = federation.shapes, starting_ranks(cfg, federation.data)
    ranks, data = dict(start.ranks), {client.name: client for client in federation.data.clients}
    first = hk.AdapterBank(shapes, [start.r_max], dtype=torch.float64, generator=torch_generator(cfg.seed, "bank", 0))
    bank = {name: (first.a[name].detach().clone(), first.bt[name].detach().clone()) for name in shapes}
    after_round = []
    for number, names in enumerate(sampled, 1):
        uploads = []
        for name in names:
            rank = ranks[name]
            cut = max(start.r_min, int(cfg.gamma * rank))
            download = {side: {module: pair[i][:rank] for module, pair in bank.items()} for i, side in enumerate(("a", "bt"))}
            own = hk.AdapterBank.of(shapes, [rank], download["a"], download["bt"])
            keep = {module: [cut] for module in shapes}
            trained = plain_client(federation.model, own, 0, data[name], cfg, keep, number, cfg.lr)
            before, after = (sum(float(pair[1][cut:rank].norm() * pair[0][cut:rank].norm()) for pair in factors.values()) for factors in (bank, trained))
            ranks[name] = cut if after < before else rank
            uploads.append({module: (a[: ranks[name]], bt[: ranks[name]]) for module, (a, bt) in trained.items()})
        for module, old in bank.items():
            norms = torch.tensor([float((own[module][1].mT @ own[module][0]).norm()) for own in uploads], dtype=torch.float64)
            weights = norms / norms.sum()
            most = max(len(own[module][0]) for own in uploads)
            for side, rows in enumerate(old):
                rows[:most] = 0.0  # rows that nobody owns stay
                for weight, own in zip(weights, uploads, strict=True):
                    rows[: len(own[module][side])] += weight * own[module][side]
        after_round.append([ranks[name] for name in names])
    return bank, after_round


def test_whole_rounds_of_the_published_method_are_its_equations(tmp_path):
    """`--method hetlora` without the clip: the ranks after every round, and the bank after the last, whatever other methods there are."""
    federation = tiny_federation([3, 5, 2, 7], torch.float64)
    types = {"dtype": "float64", "adapter_dtype": "float64"}
    cfg = tiny_config(tmp_path / "run", **types, ranks="4,7,2,8", lr=LR, prune_lambda=1.0, clip_median=0.0)
    result = simulate(cfg, federation=federation)
    rounds = [record["clients"] for record in result.history[1:]]
    bank, ranks = plain_run(federation, cfg, [[client["name"] for client in clients] for clients in rounds])
    assert [[client["rank"] for client in clients] for clients in rounds] == ranks and len(ranks) == 3
    assert any(client["rank"] < client["rank_before"] for clients in rounds for client in clients), "somebody must prune for this test to say anything"
    plain = hk.AdapterBank.of(federation.shapes, [8], *({name: pair[i] for name, pair in bank.items()} for i in (0, 1)))
    assert all(bool(rows.any()) for rows in plain.bt.values())
    assert distance(result.bank, plain) < 1e-12


def test_order_of_clients_is_irrelevant(tmp_path):
    cfg = settings(tmp_path)
    model, start, clients, keep = setting(cfg, torch.float64)
    order = [2, 0, 3, 1]
    together = cohort(model, start, clients, cfg, keep)
    shuffled = cohort(model, start.select(order), [clients[k] for k in order], cfg, {name: [own[k] for k in order] for name, own in keep.items()})
    assert distance(together.select(order), shuffled) < 1e-12


def test_results_say_what_was_trained_on(tmp_path):
    cfg = settings(tmp_path)
    model, start, clients, keep = setting(cfg, torch.float64)
    bank = start.select(range(4))
    seen = []
    together = train_cohort(model, bank, clients, cfg, 1, LR, keep, lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    assert [r.steps for r in together] == [2, 4, 4, 6]
    assert [r.sequences for r in together] == [2 * size for size in SIZES]
    assert [r.tokens for r in together] == [2 * sum(map(len, c.train)) for c in clients]
    for k, result in enumerate(together):
        own = start.select([k])
        alone = train_client(model, own, clients[k], cfg, 1, LR, {name: [cut[k]] for name, cut in keep.items()})
        assert (alone.steps, alone.sequences, alone.tokens) == (result.steps, result.sequences, result.tokens)
        assert alone.loss_first == pytest.approx(result.loss_first, rel=1e-12)
        assert alone.loss_last == pytest.approx(result.loss_last, rel=1e-12)
        assert result.loss_first != result.loss_last


def test_model_is_given_back_as_it_came(tmp_path):
    cfg = settings(tmp_path)
    model, start, clients, keep = setting(cfg, torch.float32)
    classes = [type(module) for module in model.modules()]
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}

    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_cohort(model, start, clients, cfg, 1, LR, keep, stop)
    cohort(model, start, clients, cfg, keep)
    assert [type(module) for module in model.modules()] == classes
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


def test_plan_covers_each_pass_and_depends_on_client_and_round_only(tmp_path):
    cfg = settings(tmp_path, local_epochs=3, batch_size=5)
    one, other = tiny_clients([12, 12])
    plan = step_batches(one, cfg, 1)
    assert [len(batch) for batch in plan] == [5, 5, 2] * 3
    for start in (0, 3, 6):
        assert sorted(i for batch in plan[start : start + 3] for i in batch) == list(range(12))
    assert plan == step_batches(one, cfg, 1) == step_batches(one, settings(tmp_path, local_epochs=3, batch_size=5, lr=0.5), 1)
    assert plan != step_batches(one, cfg, 2) and plan != step_batches(other, cfg, 1)
    assert plan != step_batches(one, settings(tmp_path, local_epochs=3, batch_size=5, seed=1), 1)
    steps = step_batches(tiny_clients([2])[0], settings(tmp_path, local_epochs=0, local_steps=4, batch_size=5), 1)
    assert [sorted(batch) for batch in steps] == [[0, 1]] * 4, "a small client repeats its data, and a batch holds nothing twice"


def test_dropout_seeds_differ_by_client_round_and_run(tmp_path):
    cfg, other = settings(tmp_path), settings(tmp_path, seed=1)
    seeds = {dropout_seed("a", cfg, 1), dropout_seed("b", cfg, 1), dropout_seed("a", cfg, 2), dropout_seed("a", other, 1)}
    assert len(seeds) == 4 and dropout_seed("a", cfg, 1) in seeds


@pytest.mark.parametrize("limit", [1, 9, 10, 20, 10_000])
def test_micro_batches_keep_order_and_size(limit):
    lengths = [3, 4, 9, 2, 2, 5, 1]
    parts = list(micro_batches(lengths, limit))
    assert [length for part in parts for length in lengths[part]] == lengths
    for part in parts:
        own = lengths[part]
        assert len(own) == 1 or len(own) * max(own) <= limit
    for part, following in itertools.pairwise(parts):
        grown = lengths[part.start : following.start + 1]
        assert len(grown) * max(grown) > limit, "a part must not end early"
