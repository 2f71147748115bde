"""Clients of a round that train in groups (`clients_at_once`): the others' adapters wait, and what each trains is that of its group alone."""

from __future__ import annotations

import pytest
import torch
from tiny import SIZES, same_bits, tiny_config, tiny_federation, trained_bank

import hetlora_kernels as hk
from hetlora import cohort
from hetlora.cohort import groups_of, train_cohort, train_groups
from hetlora.config import Config, ConfigError
from hetlora.loop import simulate

RANKS = [2, 8, 1, 6]
KEEP = [1, 4, 1, 3]


@pytest.mark.parametrize(("clients", "most", "sizes"), [(8, 0, [8]), (8, 8, [8]), (8, 3, [2, 3, 3]), (10, 8, [5, 5]), (3, 1, [1, 1, 1]), (1, 5, [1])])
def test_groups_are_few_and_of_about_one_size(tmp_path, clients, most, sizes):
    groups = groups_of(clients, tiny_config(tmp_path, clients_at_once=most))
    assert [len(group) for group in groups] == sizes and [k for group in groups for k in group] == list(range(clients))


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_client_has_the_bits_of_its_group_alone(tmp_path, most, frozen, monkeypatch):
    federation = tiny_federation(SIZES)
    cfg = tiny_config(tmp_path, clients_at_once=most, dropout=0.2, local_epochs=1)
    start = trained_bank(federation.shapes, RANKS)
    keep = {name: [rank if frozen else cut for rank, cut in zip(RANKS, KEEP, strict=True)] for name in federation.shapes}
    if frozen:
        start.freeze_a()
        keep = {}
    before, seen, held = start.select(range(4)), [], []

    def watched(model, bank, *rest):
        held.append(bank.num_clients)
        return train_cohort(model, bank, *rest)

    monkeypatch.setattr(cohort, "train_cohort", watched)
    found, results = train_groups(federation.model, start, federation.data.clients, cfg, 1, 0.05, keep, lambda done, total: seen.append((done, total)))
    assert max(held) <= most and same_bits(start, before) and not any(factor.grad is not None for factor in found.parameters())
    for group in groups_of(4, cfg):
        own = start.select(group)
        cuts = {name: [cut[k] for k in group] for name, cut in keep.items()}
        alone = train_cohort(federation.model, own, [federation.data.clients[k] for k in group], cfg, 1, 0.05, cuts)
        assert same_bits(found.select(group), own) and [results[k] for k in group] == alone
    assert not same_bits(found, before) and [done for done, _ in seen] == list(range(1, seen[-1][1] + 1))


BY_SGD = {"optimizer": "sgd", "lr": 0.5}
KINDS = {
    "adapters": {"gamma": 0.8},
    "alternating": {"train": "alternating", "weights": "samples", "gamma": 0.99},
    "fold": {"train": "fold", "gamma": 0.99},
    "chosen-rows": {"train": "chosen-rows", "gamma": 0.99},
    "rslora": {"scale_rule": "rslora"},
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_in_groups_is_that_of_one_batch_to_rounding(tmp_path, kind):
    """To 2 eps of float32, in which transformers has the softmax of attention; all else is in float64. By SGD: AdamW divides gradients that are zero but for
    their rounding by themselves. Ranks and bytes are the same."""
    settings = {"clients_per_round": 4, "rounds": 2, "ranks": "2,8,4,6", "adapter_dtype": "float64", "dropout": 0.1, **BY_SGD, **KINDS[kind]}
    one, *others = (
        simulate(tiny_config(tmp_path / str(most), clients_at_once=most, **settings), federation=tiny_federation(SIZES, torch.float64), quiet=True)
        for most in (0, 1, 3)
    )
    for other in others:
        assert other.ranks == one.ranks and [r["bytes_up"] for r in other.history[1:]] == [r["bytes_up"] for r in one.history[1:]]
        products = [torch.cat([(run.bank.bt[name].detach().mT @ run.bank.a[name].detach()).flatten() for name in run.bank.shapes]) for run in (one, other)]
        size, apart = float(products[0].norm()), float((products[0] - products[1]).norm())
        assert size > 0 and apart <= 2 * torch.finfo(torch.float32).eps * size


def test_what_waits_is_moved_with_its_frozen_factors():
    bank = hk.AdapterBank({"q": (6, 5)}, [2, 3]).freeze_a()
    there = cohort.moved(bank, torch.device("meta"))
    assert there.device.type == "meta" and [factor.requires_grad for factor in there.parameters()] == [False, True]
    assert cohort.moved(bank, bank.device) is bank


def test_settings_that_groups_do_not_go_with(tmp_path):
    with pytest.raises(ConfigError, match="clients_at_once = 2: only for cobatch = True, without which clients train one at a time; leave it out"):
        tiny_config(tmp_path, clients_at_once=2, cobatch=False)
    with pytest.raises(ConfigError, match="clients_at_once = 2: of the step of a cohort, and train = 'full' trains one client at a time; leave it out"):
        Config.create("test", clients_at_once=2, train="full", weights="samples", output=str(tmp_path))
