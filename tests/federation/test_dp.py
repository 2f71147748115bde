"""Differential privacy of clients: one client's influence is bounded whatever it sends, and the noise is what it is said to be."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import same_bits, tiny_config, trained_bank, whole_bank

import hetlora_kernels as hk
from hetlora import fold, merge, privacy, server
from hetlora.config import ConfigError
from hetlora.server import ServerState

SHAPES = {"q": (6, 5), "v": (4, 7)}
R, EPS = 8, torch.finfo(torch.float64).eps
RISK = 20.0  # x: a false alarm has a probability below 2 exp(-x) a comparison, 4.2e-9
PRIVATE = {"weights": "uniform", "gamma": 1.0, "merge": "delta", "dp_clipping_norm": 1.0, "cobatch": False}
KINDS = {"delta": {}, **{train: {"train": train, "merge": "factors", "gamma": 0.99} for train in ("fold", "b-only", "alternating")}}


def config(folder, **own):
    return tiny_config(folder, **{**PRIVATE, **own})


def mid_run(ranks, shapes=SHAPES, seed=0, dtype=torch.float64) -> ServerState:
    """A server before its first round, with a bank of small numbers."""
    everywhere = {f"c{k}": dict.fromkeys(shapes, rank) for k, rank in enumerate(ranks)}
    return ServerState(trained_bank(shapes, [R], dtype, seed), everywhere, 1, R)


def exchanged(cfg, state, draw) -> tuple[hk.AdapterBank, hk.AdapterBank]:
    """(uploads, received) of all clients of `state`; draw(rows, client, name, side) changes an upload's rows in place."""
    names = list(state.ranks)
    received = fold.drawn(cfg, state, names, 1) if cfg.train == "fold" else server.distribute(state, names)
    uploads = received.select(range(len(names)))
    trained = {"fold": "b"}.get(cfg.train, cfg.training_kind.trains(1))
    with torch.no_grad():
        for side in ("a", "bt"):
            if side[0] in trained:
                for name, layout in uploads.layouts.items():
                    for k in range(len(names)):
                        draw(getattr(uploads, side)[name][layout.rows(k)], k, name, side)
    return uploads, received


def difference(one: hk.AdapterBank, other: hk.AdapterBank) -> float:
    return math.sqrt(sum(float((a.detach() - b.detach()).square().sum()) for a, b in zip(one.parameters(), other.parameters(), strict=True)))


# ---------------------------------------------------------------- the clip


@pytest.mark.parametrize("kind", KINDS)
def test_a_clients_whole_update_is_clipped_to_the_norm(tmp_path, kind):
    """Over all modules and both factors together; what is within the norm stays as it is. A fold's update counts in the rows that all share."""
    cfg = config(tmp_path, clients_per_round=1, **KINDS[kind])
    generator = torch.Generator().manual_seed(1)
    for size in (0.01, 3.0):
        state = mid_run([5])
        uploads, received = exchanged(cfg, state, lambda rows, *_, size=size: rows.add_(size * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)))
        private, (clip,) = privacy.private_upload(state, uploads, received, ["c0"], cfg)
        norm = difference(uploads, received)
        start = privacy.common_rows(state, cfg, ["c0"], 1, uploads).start if cfg.train != "fold" else fold.common_rows(state, cfg, ["c0"], 1, uploads).start
        assert (clip < 1) == (norm > 1) == (size == 3.0)
        assert difference(private, start) == pytest.approx(min(norm, 1.0), rel=100 * EPS)
        assert clip == pytest.approx(min(1.0, 1 / norm), rel=10 * EPS) and (size == 3.0 or clip == 1.0)


NASTY = [0.0, 1e-300, -1e-12, 1.0, -7.5, 1e12, -1e150]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_one_client_moves_the_sum_by_no_more_than_the_clip(tmp_path_factory, kind, data):
    """Neighbours: with the client, with its update zero, and without its answer. Ranks differ, values are random or chosen to hurt."""
    cfg = config(tmp_path_factory.getbasetemp() / "unused", clients_per_round=3, dp_clipping_norm=data.draw(st.sampled_from([1e-3, 1.0, 50.0])), **KINDS[kind])
    ranks = data.draw(st.lists(st.integers(1, R), min_size=2, max_size=4))
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**32)))
    sizes = [data.draw(st.sampled_from(NASTY)) for _ in ranks]
    alone = data.draw(st.booleans())  # the whole update in one row

    def draw(rows, k, name, side):
        noise = sizes[k] * torch.randn(rows.shape, generator=generator, dtype=rows.dtype)
        rows.add_(noise * (torch.arange(len(rows))[:, None] == len(rows) - 1) if alone else noise)

    state = mid_run(ranks)
    names = list(state.ranks)
    uploads, received = exchanged(cfg, state, draw)
    gone = data.draw(st.integers(0, len(ranks) - 1))
    others = [k for k in range(len(ranks)) if k != gone]
    zeroed = uploads.select(range(len(ranks)))
    with torch.no_grad():
        for rows, old, layout in zip(zeroed.parameters(), received.parameters(), [*zeroed.layouts.values()] * 2, strict=True):
            rows[layout.rows(gone)] = old[layout.rows(gone)]
    whole, _ = privacy.private_upload(state, uploads, received, names, cfg)
    without, _ = privacy.private_upload(state, uploads.select(others), received.select(others), names, cfg)
    still, _ = privacy.private_upload(state, zeroed, received, names, cfg)
    assert whole.ranks == without.ranks and same_bits(without, still)
    share = cfg.dp_clipping_norm / privacy.expected_clients(cfg, len(ranks))
    # each number is rounded in at most len(ranks) sums, a product, a division and the last sum
    rounding = (len(ranks) + 3) * EPS * (len(ranks) * share + math.sqrt(sum(float(t.detach().square().sum()) for t in whole.parameters())))
    assert difference(whole, without) <= share + rounding


def test_whoever_answers_the_divisor_is_the_expected_number(tmp_path):
    """A client that fails must not show in the weights of the others."""
    cfg, state = config(tmp_path, clients_per_round=2, dp_clipping_norm=1e9), mid_run([2, 2, 2, 2])
    uploads, received = exchanged(cfg, state, lambda rows, k, *_: rows.add_(1.0))
    one, _ = privacy.private_upload(state, uploads.select([0]), received.select([0]), ["c0", "c1"], cfg)
    for new, old in zip(one.parameters(), state.bank.truncate([2]).parameters(), strict=True):
        assert torch.allclose(new - old, torch.full_like(new, 0.5), rtol=0, atol=4 * EPS)


# ---------------------------------------------------------------- the noise


@pytest.mark.parametrize("kind", KINDS)
def test_every_row_takes_the_noise_that_is_said(tmp_path, kind):
    """Sum of squares of n normal numbers, Laurent and Massart (Ann. Statist. 28, 2000, lemma 1). Rows that nobody of the round owns take none."""
    shapes = {"q": (500, 400), "v": (300, 600)}
    cfg = config(tmp_path, clients_per_round=2, dp_clipping_norm=3.0, dp_noise_multiplier=0.7, **KINDS[kind])
    state = mid_run([2, 5, 8, 1], shapes)
    sampled = ["c0", "c1"]  # c1 does not answer, and its rows take noise all the same
    uploads, received = exchanged(cfg, state, lambda rows, *_: None)
    private, _ = privacy.private_upload(state, uploads.select([0]), received.select([0]), sampled, cfg)
    common = cfg.training_kind.load_common()(state, cfg, sampled, 1, None)
    deviation, seen = 0.7 * 3.0 / 2, 0
    for side in ("a", "bt"):
        for name in shapes:
            moved = (getattr(private, side)[name] - getattr(common.start, side)[name]).detach() / deviation
            if side[0] not in common.factors:
                assert not moved.any()
                continue
            n = moved.shape[1]
            for row in moved:
                mean_square = float(row.square().mean()) - 1
                assert -2 * math.sqrt(RISK / n) <= mean_square <= 2 * math.sqrt(RISK / n) + 2 * RISK / n
                assert abs(float(row.mean())) <= math.sqrt(2 * RISK / n)
                seen += 1
    owned = max(layout.max_rank for layout in common.start.layouts.values())
    assert seen == 5 * len(common.factors) * 2 if kind != "fold" else seen > 10
    if kind != "fold":
        assert owned == 5
        merged = merge.aggregate(state, uploads.select([0]), received.select([0]), [1], cfg, torch.nn.Module(), sampled=sampled)
        old = mid_run([2, 5, 8, 1], shapes).bank
        assert all(torch.equal(new[5:], before[5:]) for new, before in zip(state.bank.parameters(), old.parameters(), strict=True))
        assert merged.weights.tolist() == [[0.5, 0.5]]


def test_noise_is_anew_in_every_round_row_and_secret(tmp_path):
    secret = tmp_path / "secret"
    secret.write_bytes(bytes(range(32)))
    seen, square = [], {"q": (40, 40), "v": (40, 40)}  # so that one draw would serve for all
    for number, own in ((0, {}), (1, {}), (0, {"seed": 1}), (0, {"dp_secret": str(secret)}), (0, {"dp_secret": str(secret), "seed": 1})):
        state = mid_run([3, 3], square)
        state.round = number
        private, _ = privacy.private_upload(state, None, None, ["c0", "c1"], config(tmp_path, dp_noise_multiplier=1.0, **own))
        seen.append(private)
    assert same_bits(seen[3], seen[4]), "a secret stands for itself, and one sum has one noise"
    assert len({tuple(bank.a["q"].detach().flatten().tolist()) for bank in seen}) == 4
    start = mid_run([3, 3], square).bank.truncate([3])
    noise = torch.cat([(new - old).detach().flatten() for new, old in zip(seen[0].parameters(), start.parameters(), strict=True)])
    assert len((noise * 1e12).round().unique()) == len(noise), "no number of it twice, in A and in B"
    cfg, state = config(tmp_path, dp_noise_multiplier=1.0, dp_secret=str(secret)), mid_run([3, 3], square)
    uploads, received = exchanged(cfg, state, lambda rows, *_: rows.add_(1e-3))
    with_text, _ = privacy.private_upload(state, uploads, received, ["c0", "c1"], cfg)
    other = torch.cat([(new - old).detach().flatten() for new, old in zip(with_text.parameters(), seen[3].parameters(), strict=True)])
    assert float(other.abs().mean()) > 0.1, "another sum has another noise: the difference of two runs with one secret does not lay a client open"
    secret.write_bytes(b"short")
    with pytest.raises(ConfigError, match=r"dp_secret: .*secret: expected at least 16 random bytes, got 5"):
        privacy.begin(config(tmp_path, dp_noise_multiplier=1.0, dp_secret=str(secret)), 4)
    with pytest.raises(ConfigError, match=r"dp_secret: .*none: no such file"):
        privacy.begin(config(tmp_path, dp_noise_multiplier=1.0, dp_secret=str(tmp_path / "none")), 4)


def test_noise_is_normal_and_of_all_bits_of_its_key():
    """Kolmogorov's distance to the normal distribution (Massart: above sqrt(x / 2n) with a probability below 2 exp(-x)); no 32-bit seed stands for a key."""
    n = 200_001
    drawn = privacy.normal(bytes(32), "a", "q", (n,))
    below = torch.special.ndtr(drawn.sort().values)
    place = torch.arange(n + 1, dtype=torch.float64) / n
    assert float(torch.maximum((below - place[:-1]).abs(), (below - place[1:]).abs()).max()) <= math.sqrt(RISK / (2 * n))
    pairs = drawn[: n // 2], drawn[n // 2 + 1 :]  # from one radius each
    assert abs(float((pairs[0] * pairs[1]).mean())) <= 2 * math.sqrt(RISK / (n // 2))
    keys = [bytes(32), bytes(31) + b"\1", b"\1" + bytes(31)]
    assert len({float(privacy.normal(key, side, "q", (3,))[0]) for key in keys for side in ("a", "bt")}) == 6


# ---------------------------------------------------------------- the merge without noise


@pytest.mark.parametrize("kind", ["delta", "b-only", "alternating"])
def test_without_noise_and_within_the_clip_it_is_the_plain_merge(tmp_path, kind):
    """To the bit on whole numbers and four clients; to rounding else, as the sums are taken in another order and type."""
    ranks = [2, 8, 5, 3] if kind == "delta" else [4] * 4
    state, beside = (ServerState(whole_bank(SHAPES, [R], 0), mid_run(ranks).ranks, 1, R) for _ in range(2))
    cfg = config(tmp_path, clients_per_round=4, dp_clipping_norm=1e6, **KINDS[kind])
    plain = config(tmp_path, clients_per_round=4, dp_clipping_norm=0.0, clip_median=0.0, **KINDS[kind])
    generator = torch.Generator().manual_seed(2)
    uploads, received = exchanged(cfg, state, lambda rows, *_: rows.add_(torch.randint(-4, 5, rows.shape, generator=generator)))
    mine = merge.aggregate(state, uploads, received, [1] * 4, cfg, torch.nn.Module(), sampled=list(state.ranks))
    other = merge.aggregate(beside, uploads, received, [1] * 4, plain, torch.nn.Module())
    assert same_bits(state.bank, beside.bank) and not same_bits(state.bank, whole_bank(SHAPES, [R], 0))
    assert torch.equal(mine.weights, other.weights) and torch.equal(mine.norms, other.norms) and mine.clips == [1.0] * 4


def test_a_fold_sums_the_clients_products_over_one_draw_of_rows(tmp_path):
    """sum_k B_k A_k / m, though only B is summed: A_k are leading rows of one draw, scaled by the client's rank."""
    cfg, state = config(tmp_path, clients_per_round=3, dp_clipping_norm=1e6, **KINDS["fold"]), mid_run([1, 3, 2])
    generator = torch.Generator().manual_seed(3)
    uploads, received = exchanged(cfg, state, lambda rows, *_: rows.add_(torch.randn(rows.shape, generator=generator, dtype=rows.dtype)))
    private, _ = privacy.private_upload(state, uploads, received, list(state.ranks), cfg)
    for name, layout in uploads.layouts.items():
        a, bt = uploads.a[name].detach(), uploads.bt[name].detach()
        expected, size = bt.t() @ a / 3, bt.abs().t() @ a.abs() / 3
        found = private.bt[name].detach().t() @ private.a[name].detach()
        assert bool(((found - expected).abs() <= (layout.total + 12) * EPS * size).all()), "a sum of `total` products, each of a few roundings"
        assert private.ranks == tuple(private.layouts[name].ranks) or private.layouts[name].ranks[0] == layout.max_rank
