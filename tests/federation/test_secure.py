"""Secure aggregation: sums of masked uploads are those of the plain ones to the step, masks take all of their seed, settings that cannot hold are refused."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import itertools
import json
import re

import numpy as np
import torch
from flwr.common.secure_aggregation.secaggplus_utils import pseudo_rand_gen
from secure_runs import COARSE, FINE, SECURE, SIZES, deployed
from tiny import lines, same_bits, tiny_config, tiny_federation, tiny_state, trained_bank, whole_bank

from hetlora import merge, secure_sum
from hetlora.config import Config, ConfigError
from hetlora.flower import secure
from hetlora.loop import simulate

pytestmark = pytest.mark.usefixtures("no_waiting")


# ---------------------------------------------------------------- the sums

MEANS = {
    "samples": {"weights": "samples"},
    "sparsity": {"weights": "sparsity"},
    "one weight": {"weights": "sparsity", "weight_scope": "client"},
    "owners": {"weights": "samples", "shared_rows": "owners"},
    "zero": {"weights": "uniform", "unowned_rows": "zero"},
    "delta": {"weights": "samples", "merge": "delta"},
    "momentum": {"weights": "uniform", "server_optimizer": "fedavgm"},
}


@pytest.mark.parametrize("point", [FINE, COARSE], ids=["8 bytes", "4 bytes"])
@pytest.mark.parametrize("settings", MEANS.values(), ids=MEANS)
def test_sums_and_merge_are_the_plain_ones_to_the_step(tmp_path, settings, point):
    """Clients of ranks 2, 4 and 8 of a bank of 9 rows. A sum is K h / 2 from the exact one; the merged rows are as far as that divided by a weight allows."""
    ranks, samples = [2, 4, 8], [3, 5, 2]
    own = {"ranks": "2,4,8", "clients_per_round": 3, "adapter_dtype": "float64", "secure_owners": 1}
    cfg = tiny_config(tmp_path / "run", **{**SECURE, **own, **point, **settings})
    federation = tiny_federation(SIZES[:3])
    state = tiny_state(federation, ranks, r_max=9, dtype=torch.float64)
    shapes, everywhere = federation.shapes, [dict.fromkeys(federation.shapes, rank) for rank in ranks]
    uploads, received = trained_bank(shapes, ranks, torch.float64, seed=1), state.bank.truncate(ranks)
    rows = secure_sum.summed_rows(cfg, shapes, everywhere)
    assert rows == [8] * len(shapes)
    total = sum(secure_sum.contribution(cfg, uploads.select([k]), received.select([k]), n / 5, rows) for k, n in enumerate(samples))

    h, scores = 2.0**-cfg.secure_bits, merge.client_scores(uploads, [n / 5 for n in samples], cfg)[0]
    pieces = iter((total.double() * h).split(secure_sum.lengths(shapes, rows)))
    size = max(float(factor.detach().abs().max()) for bank in (uploads, received) for factor in bank.parameters())
    slack = 2.0**-50 * 3 * float(scores.max()) * max(2 * size, 1)  # float64 sums of three, on either side
    least = float(scores.sum(0).min())
    for module, (name, (m, n)) in enumerate(shapes.items()):
        exact = [scores[:, module].sum()[None], torch.zeros(8, n, dtype=torch.float64), torch.zeros(8, m, dtype=torch.float64)]
        for k, rank in enumerate(ranks):
            for part, side in ((1, "a"), (2, "bt")):
                x = getattr(uploads, side)[name].detach()[uploads.layouts[name].rows(k)]
                if cfg.merge == "delta":
                    x = x - getattr(received, side)[name].detach()[received.layouts[name].rows(k)]
                exact[part][:rank] += scores[k, module] * x
        error = [float((next(pieces).view_as(part) - part).abs().max()) for part in exact]
        assert error[0] <= 3 * h / 2 + slack
        assert max(error[1:]) <= 3 * h / 2 * (1 + 2 * size) + slack, "a number by its own rounding, and by that of its weight"
        least = min(least, float(scores[2, module])) if cfg.shared_rows == "owners" else least

    one, _ = secure_sum.mean(cfg, total, state.bank, rows, everywhere, samples, 5)
    plain, masked = (tiny_state(federation, ranks, r_max=9, dtype=torch.float64) for _ in range(2))
    merge.aggregate(plain, uploads, received, samples, cfg.model_copy(update={"secure_aggregation": False}), federation.model)
    merge.aggregate(masked, one, None, samples, cfg, federation.model)
    bound = 3 * h / 2 * (1 + 4 * size) / (least - 3 * h / 2) + 2.0**-46 * size
    for mine, other in zip(masked.bank.parameters(), plain.bank.parameters(), strict=True):
        assert float((mine - other).detach().abs().max()) <= bound
    assert not same_bits(masked.bank, state.bank)


def test_where_nothing_rounds_a_masked_merge_has_the_bits_of_the_plain_one(tmp_path):
    ranks = [2, 4, 8, 8]
    own = {"weights": "uniform", "ranks": "2,4,8,8", "clients_per_round": 4, "adapter_dtype": "float64", "secure_owners": 2}
    cfg, federation = tiny_config(tmp_path / "run", **{**SECURE, **own}), tiny_federation(SIZES[:4])
    everywhere = [dict.fromkeys(federation.shapes, rank) for rank in ranks]
    uploads, rows = whole_bank(federation.shapes, ranks, 1), secure_sum.summed_rows(cfg, federation.shapes, everywhere)
    states = [tiny_state(federation, ranks, r_max=8, dtype=torch.float64) for _ in range(2)]
    for state in states:
        state.bank = whole_bank(federation.shapes, [8], 2)
    received = states[0].bank.truncate(ranks)
    total = sum(secure_sum.contribution(cfg, uploads.select([k]), received.select([k]), 1.0, rows) for k in range(4))
    one, _ = secure_sum.mean(cfg, total, states[0].bank, rows, everywhere, [1] * 4, 1)
    merge.aggregate(states[0], uploads, received, [1] * 4, cfg.model_copy(update={"secure_aggregation": False}), federation.model)
    merge.aggregate(states[1], one, None, [1] * 4, cfg, federation.model)
    assert same_bits(states[0].bank, states[1].bank)


@pytest.mark.parametrize("merge_name", ["factors", "delta"])
def test_how_much_may_be_rounding_is_told(tmp_path, merge_name):
    """The weights of equal clients are whole steps, so that nothing else rounds."""
    own = {"ranks": "4", "clients_per_round": 3, "adapter_dtype": "float64", "weights": "uniform", "secure_bits": 6, "secure_range": 64.0}
    cfg, federation = tiny_config(tmp_path / "run", **{**SECURE, **own, "merge": merge_name}), tiny_federation(SIZES[:3])
    state = tiny_state(federation, [4] * 3, r_max=4, dtype=torch.float64)
    uploads, received = trained_bank(federation.shapes, [4] * 3, torch.float64, seed=1), state.bank.truncate([4] * 3)
    ranks, rows = [dict.fromkeys(federation.shapes, 4)] * 3, [4] * len(federation.shapes)
    total = sum(secure_sum.contribution(cfg, uploads.select([k]), received.select([k]), 1.0, rows) for k in range(3))
    one, rounding = secure_sum.mean(cfg, total, state.bank, rows, ranks, [1] * 3, 1)
    bounds = []
    for side in ("a", "bt"):
        for name in federation.shapes:
            new, old, found = (getattr(bank, side)[name].detach() for bank in (uploads, state.bank, one))
            zero = old if merge_name == "delta" else torch.zeros_like(old)
            exact, mine = new.view(3, 4, -1).mean(0) - zero, found - zero
            bounds.append(min(1, 2.0**-7 * mine.numel() ** 0.5 / float(mine.norm())))
            assert float((mine - exact).norm() / mine.norm()) <= bounds[-1]
    assert rounding == pytest.approx(max(bounds), rel=1e-12) and rounding > 0.01


def test_a_coarse_step_is_named(tmp_path):
    for bits, coarse in ((40, False), (12, True)):
        cfg = tiny_config(tmp_path / str(bits), **{**SECURE, "weights": "sparsity", "secure_bits": bits, "secure_range": 64.0})
        _, said, _ = deployed(cfg)
        assert (lines(tmp_path / str(bits))[-1]["secure_rounding"] > 0.01) == coarse
        named = [line for line in said if re.match(r"round 1: up to 100 % of a module's merged rows may be rounding to the step 2\^-12; raise", line)]
        assert len(named) == coarse


def test_rows_that_a_sum_would_not_hide_are_known():
    shapes = {"one": (4, 4), "two": (4, 4)}
    ranks = [{"one": rank, "two": 2} for rank in (0, 2, 4, 8, 8)]
    of = {owners: Config(**{**SECURE, "ranks": "fixed:4", "secure_owners": owners}) for owners in (1, 2, 3, 5)}
    assert {owners: secure_sum.summed_rows(cfg, shapes, ranks) for owners, cfg in of.items()} == {1: [8, 2], 2: [8, 2], 3: [4, 2], 5: [0, 2]}
    assert secure_sum.summed_rows(of[3], shapes, ranks[:2]) == [0, 0]
    assert secure_sum.lone_rows(of[2], shapes, [8, 2], ranks) == secure_sum.lone_rows(of[3], shapes, [4, 2], ranks[:4]) == []
    assert secure_sum.lone_rows(of[2], shapes, [8, 2], ranks[:4]) == ["one"], "rows 4 to 7 are the fourth client's alone"
    assert secure_sum.lone_rows(of[3], shapes, [4, 2], ranks[3:4]) == ["one", "two"]
    assert secure_sum.lone_rows(of[1], shapes, [8, 2], ranks[:4]) == [], "allowed by name"


@pytest.mark.parametrize(("clients", "steps", "bits"), [(4, 2**29 - 1, 32), (4, 2**29, 64), (3, 2**52, 64), (2047, 2**52, 64), (5, 1, 32)])
def test_no_sum_wraps_around(clients, steps, bits):
    """All clients at the largest number that one may add, and at the least."""
    fraction = 20
    cfg = Config(**{**SECURE, "clients_per_round": clients, "ranks": "fixed:4", "secure_bits": fraction, "secure_range": steps / 2**fraction})
    point = secure_sum.fixed_point(cfg)
    assert (point.bits, point.most) == (bits, steps)
    for sign in (1, -1):
        own = secure.to_ring(point.encode(torch.tensor([sign * steps * point.step], dtype=torch.float64)), bits)
        total = np.zeros(1, dtype=own.dtype)
        for _ in range(clients):
            total += own
        assert secure.from_ring(total).tolist() == [sign * clients * steps]
        assert point.decode(secure.from_ring(total)).tolist() == [sign * clients * steps * point.step]
        with pytest.raises(ConfigError, match="secure_range: expected numbers of at most"):
            point.encode(torch.tensor([sign * (steps + 1) * point.step], dtype=torch.float64))
        with pytest.raises(ConfigError, match="out of the range"):
            point.decode(torch.tensor([sign * (clients * steps + 1)]))


# ---------------------------------------------------------------- masks


def test_a_mask_takes_all_of_its_seed():
    """Flower's takes the xor of its words, 32 bits, and of a pair's key, which is text, 28: why masks are not Flower's here."""
    seed = bytes(range(32))
    turned = seed[4:] + seed[:4]
    assert np.array_equal(pseudo_rand_gen(seed, 2**32, [(9,)])[0], pseudo_rand_gen(turned, 2**32, [(9,)])[0])
    assert not np.array_equal(secure.mask(seed, 9, 64), secure.mask(turned, 9, 64))
    for one, two in itertools.combinations([bytes(32), *(bytes([0] * i + [1 << i % 8] + [0] * (31 - i)) for i in range(32))], 2):
        assert not np.array_equal(secure.mask(one, 9, 32), secure.mask(two, 9, 32))
    assert secure.mask(bytes(32), 2, 64).tobytes().hex() == "dc95c078a2408989ad48a21492842087"  # AES-256 of zeros under zeros: FIPS 197's cipher
    with pytest.raises(ConfigError, match="expected a seed of 32 bytes, got 31"):
        secure.mask(bytes(31), 9, 64)


@pytest.mark.parametrize(("clients", "shares"), [(3, 3), (5, 3), (9, 5), (40, 7)])
def test_neighbours_are_as_many_for_all_and_each_others(clients, shares):
    near = secure.neighbours(clients, shares)
    assert all(place in own and len(own) == shares for place, own in enumerate(near))
    assert all(place in near[other] for place, own in enumerate(near) for other in own)


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"merge": "svd"}, "merge = 'svd' is made of each client's upload by itself"),
        ({"merge": "median", "weights": "uniform"}, "merge = 'median' is made of each client's upload by itself"),
        ({"train": "fold", "gamma": 0.99}, "merge = 'bank' multiplies each client's B with rows of A of its own"),
        ({"clip_median": 3.0}, "clip_median = 3.0: compares each client's update with the round's median"),
        ({"clip_update": 1.0}, "clip_update = 1.0: looks at each client's upload by itself"),
        ({"weights": "sparsity", "weight_cap": 2.0}, "weight_cap = 2.0: looks at each client's upload by itself"),
        ({"diagnostics": True}, "diagnostics = True: compares the bank with the uploads"),
        ({"merge": "delta", "gamma": 1.0, "weights": "uniform", "dp_clipping_norm": 1.0}, "dp_clipping_norm = 1.0: the server clips each client's update"),
        ({"clients_per_round": 2}, "clients_per_round = 2: a sum hides nobody from the others below three clients"),
        ({"shared_rows": "owners", "weights": "sparsity"}, "shared_rows = 'owners': divides by the weight of each row's owners"),
        ({"unowned_rows": "zero"}, "unowned_rows = 'zero': would set rows to zero that clients own and secure_owners = 3 leaves out of the sum"),
        ({"secure_owners": 6}, "secure_owners = 6: expected at most clients_per_round = 5"),
        ({"secure_shares": 4}, "secure_shares: expected 0, or an odd number from 3 on, got 4"),
        ({"secure_threshold": 2}, "secure_threshold: expected 0, or more than half of 5 shares and at most all, got 2"),
        ({"secure_shares": 3, "secure_threshold": 4}, "secure_threshold: expected 0, or more than half of 3 shares and at most all, got 4"),
        ({"secure_shares": 7, "secure_threshold": 6}, "secure_threshold: expected 0, or more than half of 5 shares and at most all, got 6"),
        ({"secure_bits": 52}, "steps; expected 1 to 2^52"),
        ({"clients_per_round": 8192}, "and with clients_per_round = 8192 less than 2^63 in the sum"),
        ({"secure_aggregation": False, "secure_shares": 3}, "secure_shares = 3: of masked sums; set secure_aggregation, or leave it out"),
    ],
)
def test_what_needs_single_uploads_is_refused_by_name(tmp_path, settings, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        tiny_config(tmp_path / "run", **{**SECURE, **settings})


def test_a_simulation_has_no_server_to_hide_from(tmp_path):
    with pytest.raises(ConfigError, match="secure_aggregation = True: hides uploads from a server that is another process"):
        simulate(tiny_config(tmp_path / "run", **SECURE), federation=tiny_federation(SIZES), quiet=True)


def test_the_report_says_why_no_weight_is_shown(tmp_path):
    from hetlora.report.page import write_report

    cfg = tiny_config(tmp_path / "run", **SECURE)
    deployed(cfg)
    assert "secure aggregation hides" in write_report(cfg.output).read_text(encoding="utf-8")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["secure_aggregation"] is True
