"""The server's optimiser where no factor lasts by itself: steps of the product B A, of the model W + s B A, and of the rows that were chosen. Each against its
equation in dense float64."""

from __future__ import annotations

import pytest
import torch
from test_chosen import CHOSEN, ROWS
from test_chosen import RANKS as CHOSEN_RANKS
from test_dp import config as private_config
from test_field_merges import owners_sum
from test_server_optimizer import SETTINGS
from tiny import SIZES, dense, lines, same_bits, tiny_config, tiny_federation, tiny_state, trained_bank, whole_bank

import hetlora_kernels as hk
from hetlora import chosen, merge, privacy, server
from hetlora.loop import simulate
from hetlora.merge import MergeCall
from hetlora.training import Work

SHAPES = {"q": (6, 5), "v": (4, 7)}
R = 3
EPS = torch.finfo(torch.float64).eps
MERGES = {
    "svd": {"merge": "svd"},
    "owners-svd": {"merge": "owners-svd"},
    "energy": {"merge": "energy", "energy": 0.9},
    "bank": {"train": "fold", "gamma": 0.99},
}


class Dense:
    """The optimiser of the papers on whole matrices, one state a name."""

    def __init__(self, cfg):
        self.cfg, self.m, self.v = cfg, {}, {}

    def moves(self, name, change):
        beta, lr = self.cfg.server_momentum, self.cfg.server_lr
        if self.cfg.server_optimizer == "fedavgm":
            self.m[name] = beta * self.m.get(name, 0) + change
            return lr * self.m[name]
        self.m[name] = beta * self.m.get(name, 0) + (1 - beta) * change
        self.v[name] = self.cfg.server_beta2 * self.v.get(name, self.cfg.server_tau**2) + (1 - self.cfg.server_beta2) * change**2
        return lr * self.m[name] / (self.v[name].sqrt() + self.cfg.server_tau)


def sums(kind, old, uploads, share):
    """{module: what the merge would make without cutting it}, dense, all clients of the weight `share`."""
    weights = torch.full((uploads.num_clients, len(SHAPES)), share, dtype=torch.float64)
    if kind == "owners-svd":
        return owners_sum(old, uploads, weights)
    exact = {name: share * dense(uploads, name) for name in SHAPES}
    return {name: total + dense(old, name) for name, total in exact.items()} if kind == "bank" else exact


def cut(whole, rank, energy):
    """(the best approximation, how certain it is)."""
    u, s, vh = torch.linalg.svd(whole)
    kept = min(rank, len(s))
    while energy < 1 and kept > 1 and float(s[: kept - 1].square().sum()) >= energy * float(s.square().sum()):
        kept -= 1
    gap = float(s[kept - 1] - s[kept]) if kept < len(s) else float(s[0])  # a truncation is as certain as the gap behind it (Wedin 1972)
    return u[:, :kept] * s[:kept] @ vh[:kept], float(s[0]) / gap


def config(tmp_path, optimizer, **settings):
    common = {"weights": "uniform", "clip_median": 0, "adapter_dtype": "float64"}
    return tiny_config(tmp_path, **{**common, **SETTINGS.get(optimizer, {}), **settings})


@pytest.mark.parametrize("optimizer", list(SETTINGS))
@pytest.mark.parametrize("kind", list(MERGES))
def test_the_product_takes_the_step_and_is_cut_after_it(tmp_path, kind, optimizer):
    cfg = config(tmp_path, optimizer, **MERGES[kind])
    state, by_hand = server.ServerState(whole_bank(SHAPES, [R], 0), {}, 1, R), Dense(cfg)
    expected = {name: dense(state.bank, name) for name in SHAPES}
    off = dict.fromkeys(SHAPES, 0.0)
    for number in (1, 2, 3):
        uploads, old = whole_bank(SHAPES, [2, 1], number), state.bank
        totals = sums(kind, old, uploads, 0.5)
        merge.aggregate(state, uploads, uploads, [1, 1], cfg, torch.nn.Module())
        for name, total in totals.items():
            whole = expected[name] + by_hand.moves(name, total - expected[name])
            expected[name], certain = cut(whole, R, cfg.energy if kind == "energy" else 1)
            # what was off in the old product goes on through the step; Adam divides by tau at the least
            grows = 1 + cfg.server_lr * (1 if optimizer == "fedavgm" else 1 / cfg.server_tau)
            off[name] = (grows * off[name] + 100 * EPS * float(whole.norm() + total.norm())) * certain
            assert float((dense(state.bank, name) - expected[name]).norm()) <= off[name]
            assert off[name] < 1e-6 * float(expected[name].norm()), "an allowance as large as the product would be no test"
        assert len(next(state.bank.parameters())) == R
    assert {key: tuple(moment.shape) for key, moment in state.moments.items() if key.startswith("m.")} == {
        f"m.product.{name}": shape for name, shape in SHAPES.items()
    }
    assert ("v.product.q" in state.moments) == (optimizer == "fedadam")


@pytest.mark.parametrize("kind", list(MERGES))
def test_without_momentum_at_rate_one_it_is_the_merge(tmp_path, kind):
    """Of float32 banks, whose moments are float32: their roundings are no rows. The sum has fewer parts than the bank has rows."""
    shapes = {"q": (24, 16), "v": (8, 20)}
    plain = config(tmp_path, "none", **{**MERGES[kind], "adapter_dtype": "float32"})
    cfg = config(tmp_path, "none", server_optimizer="fedavgm", server_momentum=0.0, **{**MERGES[kind], "adapter_dtype": "float32"})
    for seed in (1, 2, 3):
        uploads = trained_bank(shapes, [2, 1], seed=seed)
        start = trained_bank(shapes, [6], seed=9)
        with torch.no_grad():
            for bt in start.bt.values():
                bt[2:] = 0
        one, other = (server.ServerState(start.to(), {}, 1, 6) for _ in range(2))
        for state, settings in ((one, plain), (other, cfg)):
            merge.aggregate(state, uploads, uploads, [1, 1], settings, torch.nn.Module())
        assert {moment.dtype for moment in other.moments.values()} == {torch.float32}
        for name in shapes:
            mine, its, before = (dense(bank, name).double() for bank in (other.bank, one.bank, start))
            live = one.bank.bt[name].any(1)
            assert torch.equal(other.bank.bt[name].any(1), live) and 0 < int(live.sum()) < 6
            assert torch.equal(other.bank.a[name][~live], one.bank.a[name][~live])
            # D is rounded once, and both banks round their two factors, of singular values s, once
            singular = torch.linalg.svdvals(its)
            bound = 2.0**-24 * float((its - before).norm() + 4 * singular.sum())
            assert float((mine - its).norm()) <= bound


def test_what_a_round_cuts_comes_back_with_momentum(tmp_path):
    """A direction that is each round's smallest, and grows in the moments until it is among the largest."""
    cfg = config(tmp_path, "none", server_optimizer="fedavgm", server_momentum=0.5, **MERGES["bank"])
    shapes = {"q": (4, 4)}
    state = server.ServerState(hk.AdapterBank(shapes, [1], dtype=torch.float64), {}, 1, 1)
    seen = []
    for large in (0, 1, 0, 1, 0, 1):  # the large ones change sides; the small one stays
        uploads = hk.AdapterBank(shapes, [2], dtype=torch.float64)
        with torch.no_grad():
            uploads.a["q"].zero_()
            uploads.bt["q"].zero_()
            for row, (place, size) in enumerate(((large, 1.0 - 2 * (len(seen) > 1)), (2, 0.9))):
                uploads.a["q"][row, place] = 1
                uploads.bt["q"][row, place] = size
        merge.aggregate(state, uploads, uploads, [1], cfg, torch.nn.Module())
        seen.append(int(dense(state.bank, "q").abs().argmax()) // 4)
    assert seen[0] != 2 and seen[-1] == 2


@pytest.mark.parametrize("optimizer", list(SETTINGS))
@pytest.mark.parametrize("settings", [{}, {"unowned_rows": "zero"}, {"shared_rows": "owners"}], ids=str)
def test_bank_and_base_together_take_one_step(tmp_path, settings, optimizer):
    """FedEx-LoRA: W + s B A of the whole bank steps as one weight, for the change that the merge would make of it; the factors are the average."""
    cfg = config(tmp_path, optimizer, merge="residual", scale=0.5, **settings)
    plain = cfg.model_copy(update={"server_optimizer": "none"})
    model, beside = (torch.nn.Module() for _ in range(2))
    for holder in (model, beside):
        for name, (m, n) in SHAPES.items():
            setattr(holder, name, torch.nn.Linear(n, m, bias=False, dtype=torch.float64).requires_grad_(False))
    state, by_hand = server.ServerState(whole_bank(SHAPES, [4], 0), {}, 1, 4), Dense(cfg)
    for number in (1, 2, 3):
        uploads = whole_bank(SHAPES, [2, 1], number)
        before = {name: getattr(model, name).weight + 0.5 * dense(state.bank, name) for name in SHAPES}
        beside.load_state_dict(model.state_dict())
        other = server.ServerState(state.bank.to(), {}, 1, 4)
        merge.aggregate(other, uploads, uploads, [1, 1], plain, beside)
        merge.aggregate(state, uploads, uploads, [1, 1], cfg, model)
        assert same_bits(state.bank, other.bank), "the factors of the merge"
        for name in SHAPES:
            change = getattr(beside, name).weight + 0.5 * dense(other.bank, name) - before[name]
            found = getattr(model, name).weight + 0.5 * dense(state.bank, name)
            moves = by_hand.moves(name, change)
            # the changes differ by roundings of what they are made of; Adam divides those by tau at the least
            grows = 1 if optimizer == "fedavgm" else 1 / cfg.server_tau
            size = float(before[name].norm() + 0.5 * dense(uploads, name).norm() + dense(state.bank, name).norm())
            assert float((found - before[name] - moves).norm()) <= 100 * EPS * grows * size * number
            assert float(moves.norm()) > 0.1


def test_bank_and_base_without_momentum_at_rate_one_are_the_merge(tmp_path):
    cfg = config(tmp_path, "none", merge="residual", server_optimizer="fedavgm", server_momentum=0.0)
    uploads, weights = whole_bank(SHAPES, [2, 1], 1), []
    for settings in (cfg, cfg.model_copy(update={"server_optimizer": "none"})):
        model = torch.nn.Module()
        for name, (m, n) in SHAPES.items():
            setattr(model, name, torch.nn.Linear(n, m, bias=False, dtype=torch.float64).requires_grad_(False))
            torch.nn.init.ones_(getattr(model, name).weight)
        state = server.ServerState(whole_bank(SHAPES, [4], 0), {}, 1, 4)
        merge.aggregate(state, uploads, uploads, [1, 1], settings, model)
        weights.append((state.bank, model))
    assert same_bits(weights[0][0], weights[1][0])
    for name in SHAPES:
        one, other = (getattr(model, name).weight for _, model in weights)
        size = 1 + 2 * (dense(uploads, name).abs() + dense(weights[0][0], name).abs()).max()
        assert float((one - other).abs().max()) <= 16 * EPS * float(size) and float((one - 1).abs().max()) > 0.1


# ---------------------------------------------------------------- chosen rows


@pytest.mark.parametrize("optimizer", list(SETTINGS))
def test_chosen_rows_step_and_all_others_wait(tmp_path, optimizer):
    """A lazy Adam: a row that nobody chose keeps its numbers and its moments, to the bit."""
    cfg = config(tmp_path, optimizer, **{**CHOSEN, "weights": "uniform"})
    state, by_hand = server.ServerState(whole_bank(SHAPES, [8], 0), {}, 1, 8), Dense(cfg)
    later = {"q": [[3], [3, 7], [4]], "v": [[4], [0], [3, 4]]}
    given = ((ROWS, CHOSEN_RANKS), (later, {"q": [1, 2, 1], "v": [1, 1, 2]}), (ROWS, CHOSEN_RANKS))
    waited = 0
    for number, (rows, ranks) in enumerate(given, 1):
        uploads, old = whole_bank(SHAPES, ranks, number), state.bank
        moments = {key: moment.clone() for key, moment in state.moments.items()}
        beside = server.ServerState(old.to(), {}, 1, 8)
        merge.aggregate(beside, uploads, uploads, [1, 1, 1], cfg.model_copy(update={"server_optimizer": "none"}), torch.nn.Module(), rows=rows)
        merge.aggregate(state, uploads, uploads, [1, 1, 1], cfg, torch.nn.Module(), rows=rows)
        for name in SHAPES:
            for side in ("a", "bt"):
                new, merged, before = (getattr(bank, side)[name].detach() for bank in (state.bank, beside.bank, old))
                for j in range(8):
                    if any(j in own for own in rows[name]):
                        expected = before[j] + by_hand.moves((side, name, j), merged[j] - before[j])
                        grows = 1 if optimizer == "fedavgm" else 1 / cfg.server_tau
                        assert float((new[j] - expected).abs().max()) <= 16 * EPS * grows * float(before[j].abs().max() + merged[j].abs().max() + 1)
                        assert not torch.equal(new[j], before[j])
                    else:
                        waited += 1
                        assert torch.equal(new[j], before[j])
                        for key in (key for key in moments if key.endswith(f".bank.{side}.{name}")):
                            assert torch.equal(state.moments[key][j], moments[key][j])
    assert waited > 8


def test_chosen_rows_under_the_rank_stabilised_scale_are_those_of_a_bank_of_that_many_rows(tmp_path):
    """Every client computes with all R rows, so that s is scale / sqrt(R) for everybody."""
    federation, found = tiny_federation(SIZES, torch.float64), []
    state = tiny_state(federation, [2, 8, 4, 6], dtype=torch.float64)
    for number, settings in enumerate(({"scale_rule": "rslora", "scale": 4.0}, {"scale": 4.0 / 8**0.5})):
        cfg = tiny_config(tmp_path, dtype="float64", adapter_dtype="float64", lr=0.05, **CHOSEN, **settings)
        found.append(chosen.train_chosen(Work(cfg, federation.model, state, federation.data.clients, 1, cfg.lr)).uploads)
        simulate(tiny_config(tmp_path / str(number), **CHOSEN, **settings), federation=tiny_federation(SIZES), quiet=True)
    assert same_bits(*found)
    assert lines(tmp_path / "0") == lines(tmp_path / "1")


# ---------------------------------------------------------------- under privacy


@pytest.mark.parametrize("optimizer", list(SETTINGS))
def test_under_differential_privacy_the_step_is_post_processing(tmp_path, optimizer):
    """Of the noised mean, the old bank and moments that were made of such: what the same merge makes of the one upload that stands for all."""
    cfg = private_config(tmp_path, train="fold", merge="factors", gamma=0.99, dp_noise_multiplier=0.5, **SETTINGS[optimizer])
    federation = tiny_federation(SIZES)
    state = tiny_state(federation, [2, 8, 4, 6])
    names, moments = list(state.ranks), {}
    for _ in (1, 2):
        one, _ = privacy.private_upload(state, None, None, names, cfg)
        call = MergeCall(state.bank, one, torch.ones(1, len(one.shapes), dtype=torch.float64), state.r_max, cfg, federation.model, "b", moments=moments)
        expected = cfg.merge_kind.load()(call).bank
        merge.aggregate(state, None, None, [], cfg, federation.model, sampled=names)
        assert same_bits(state.bank, expected)
        state.round += 1
    assert moments.keys() == state.moments.keys() and all(bool(moment.any()) for moment in moments.values())
