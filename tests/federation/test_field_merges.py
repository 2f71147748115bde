"""Merges of other papers, each against its equation in dense arithmetic. Numbers are small integers and weights powers of two, so that sums are exact."""

from __future__ import annotations

import pytest
import torch
from tiny import dense, row, same_bits, tiny_config, whole_bank

from hetlora import diagnostics, merge, products
from hetlora.merge import MergeCall

SHAPES = {"q": (6, 5), "v": (4, 7)}
RANKS = [2, 5, 3]
WEIGHTS = torch.tensor([[1, 2], [1, 1], [2, 1]], dtype=torch.float64) / 4  # of three clients in two modules
R = 8
EPS = torch.finfo(torch.float64).eps


@pytest.fixture
def old():
    return whole_bank(SHAPES, [R], 2)


@pytest.fixture
def uploads():
    return whole_bank(SHAPES, RANKS, 1)


def call(function, tmp_path, old, uploads, weights=WEIGHTS, model=None, **settings):
    return function(MergeCall(old, uploads, weights, R, tiny_config(tmp_path, **settings), model or torch.nn.Module()))


def test_delta_counts_rows_that_a_client_does_not_own_as_unchanged(tmp_path, old, uploads):
    merged = call(merge.merge_delta, tmp_path, old, uploads, merge="delta").bank
    for i, name in enumerate(SHAPES):
        for side in ("a", "bt"):
            before = getattr(old, side)[name].detach()
            for j in range(R):
                seen = [row(uploads, side, name, k, j) if j < RANKS[k] else before[j] for k in range(3)]  # what each client ends with
                expected = sum(p * own for p, own in zip(WEIGHTS[:, i], seen, strict=True))
                assert torch.equal(getattr(merged, side)[name][j], expected)


def test_delta_at_one_rank_is_the_average_of_the_factors(tmp_path, old):
    uploads = whole_bank(SHAPES, [R] * 3, 3)
    delta, factors = (call(function, tmp_path, old, uploads).bank for function in (merge.merge_delta, merge.merge_factors))
    assert same_bits(delta, factors)


def owners_sum(old, uploads, weights):
    """{module: sum over rank rows of the weighted mean of the owners' pieces, or of the old bank's piece}, dense."""
    sums = {}
    for i, (name, shape) in enumerate(SHAPES.items()):
        sums[name] = torch.zeros(shape, dtype=torch.float64)
        for j in range(old.layouts[name].max_rank):
            owners = [k for k in range(uploads.num_clients) if uploads.layouts[name].ranks[k] > j]
            if not owners:
                sums[name] += torch.outer(old.bt[name].detach()[j], old.a[name].detach()[j])
            elif share := float(weights[owners, i].sum()):
                sums[name] += sum(float(weights[k, i]) * torch.outer(row(uploads, "bt", name, k, j), row(uploads, "a", name, k, j)) for k in owners) / share
    return sums


@pytest.mark.parametrize(("rank", "ranks"), [(8, RANKS), (3, [2, 3, 1]), (4, [1, 2, 1])], ids=["unowned rows, whole sum", "cut", "unowned rows, cut"])
@pytest.mark.parametrize("weights", [WEIGHTS, torch.tensor([[1.0, 1], [0, 0], [0, 0]], dtype=torch.float64)], ids=["all", "owners of weight zero"])
def test_owners_svd_is_the_best_approximation_of_each_rows_mean_product(tmp_path, rank, ranks, weights):
    old, uploads = whole_bank(SHAPES, [rank], 2), whole_bank(SHAPES, ranks, 1)
    merged = products.merge_owners_svd(MergeCall(old, uploads, weights, rank, tiny_config(tmp_path, merge="owners-svd"), torch.nn.Module())).bank
    for name, total in owners_sum(old, uploads, weights).items():
        u, s, vh = torch.linalg.svd(total)
        kept = min(rank, len(s))
        best = u[:, :kept] * s[:kept] @ vh[:kept]
        # a truncation is as certain as the gap behind it (Wedin 1972)
        gap = float(s[kept - 1] - s[kept]) if kept < len(s) and s[kept] > EPS * s[0] else float(s[0])
        assert float((dense(merged, name) - best).norm()) <= 100 * EPS * float(s[0]) ** 2 / gap
        assert float(total.norm()) > 1, "a sum of nothing would be no test"


def test_owners_svd_of_equal_ranks_is_flexloras(tmp_path, old):
    """Everybody owns every row: the sums are the same, to rounding of p / sum p."""
    uploads = whole_bank(SHAPES, [R] * 3, 3)
    one, other = (call(function, tmp_path, old, uploads).bank for function in (products.merge_owners_svd, products.merge_svd))
    for name in SHAPES:
        assert float((dense(one, name) - dense(other, name)).norm()) <= 100 * EPS * float(dense(other, name).norm())


def test_diagnostics_count_the_rows_that_stay_as_part_of_the_sum(tmp_path, old):
    """Clients that own the same rows: the sum of products is FedAvg's, beside the old rows, and what the error says is truncation: none here."""
    uploads = whole_bank(SHAPES, [2, 2, 2], 3)
    merged = call(products.merge_owners_svd, tmp_path, old, uploads)
    assert diagnostics.merge_error(merged.bank, uploads, WEIGHTS, merged.rows, merged.added_to) < (100 * EPS) ** 0.5  # the root of a difference of squares
    assert diagnostics.merge_error(merged.bank, uploads, WEIGHTS) > 0.1


# ---------------------------------------------------------------- FLoRIST


def florist(uploads, weights, energy, most):
    """{module: (the dense approximation, its rank, singular values)} as the paper has it: SVD of sum p_k B_k A_k, cut where the energy is reached."""
    found = {}
    for i, name in enumerate(SHAPES):
        total = sum(
            float(weights[k, i]) * torch.outer(row(uploads, "bt", name, k, j), row(uploads, "a", name, k, j))
            for k in range(uploads.num_clients)
            for j in range(uploads.layouts[name].ranks[k])
        )
        u, s, vh = torch.linalg.svd(total)
        squares, kept = s.square().tolist(), 0
        while kept < most and sum(squares[:kept]) < energy * sum(squares):
            kept += 1
        found[name] = (u[:, :kept] * s[:kept] @ vh[:kept], kept, s)
    return found


@pytest.mark.parametrize("energy", [0.3, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("rank", [2, 8])
def test_energy_keeps_the_singular_values_that_hold_it(tmp_path, energy, rank):
    old, uploads = whole_bank(SHAPES, [rank], 2), whole_bank(SHAPES, [min(r, rank) for r in RANKS], 1)
    merged = products.merge_energy(MergeCall(old, uploads, WEIGHTS, rank, tiny_config(tmp_path, merge="energy", energy=energy), torch.nn.Module())).bank
    ranks = []
    for name, (best, kept, s) in florist(uploads, WEIGHTS, energy, rank).items():
        live = merged.bt[name].detach().any(1)
        if energy < 1:
            assert live.tolist() == [True] * kept + [False] * (rank - kept)
        gap = float(s[kept - 1] - s[kept]) if kept < len(s) and s[kept] > EPS * s[0] else float(s[0])
        assert float((dense(merged, name) - best).norm()) <= 100 * EPS * float(s[0]) ** 2 / gap
        assert torch.equal(merged.a[name][~live], old.a[name][~live]), "rows past it can still be trained: A as it was, B = 0"
        ranks.append(kept)
    if (energy, rank) == (0.8, 8):
        assert len(set(ranks)) == 2, "modules of one rank would not show that each has its own"


def test_energy_one_is_flexloras_merge(tmp_path, old, uploads):
    assert same_bits(*(call(f, tmp_path, old, uploads, merge="energy", energy=1.0).bank for f in (products.merge_energy, products.merge_svd)))


@pytest.mark.parametrize("energy", [0.6, 0.9, 1.0])
def test_energy_on_the_base_adds_it_to_the_weights_and_counts_its_rows(tmp_path, old, uploads, energy):
    """Of any rank: the bank of R = 1 row does not cut it."""
    model = torch.nn.Module()
    for name, (m, n) in SHAPES.items():
        setattr(model, name, torch.nn.Linear(n, m, bias=False, dtype=torch.float64))
        torch.nn.init.zeros_(getattr(model, name).weight).requires_grad_(False)
    cfg = tiny_config(tmp_path, merge="energy-stack", energy=energy, scale=0.5)
    merged = products.merge_energy_stack(MergeCall(whole_bank(SHAPES, [1], 2), uploads, WEIGHTS, 1, cfg, model))
    expected = florist(uploads, WEIGHTS, energy - 100 * EPS, 8)  # of all, rounding may leave a hair
    assert merged.bank is None and merged.follow_bytes == 8 * sum(kept * sum(SHAPES[name]) for name, (_, kept, _) in expected.items())
    for name, (best, kept, s) in expected.items():
        assert kept > 1
        gap = float(s[kept - 1] - s[kept]) if kept < len(s) and s[kept] > EPS * s[0] else float(s[0])
        assert float((getattr(model, name).weight - 0.5 * best).norm()) <= 100 * EPS * float(s[0]) ** 2 / gap
