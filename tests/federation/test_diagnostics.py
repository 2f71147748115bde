"""Diagnostics from Gram matrices say what the dense products say, which only these tests form."""

from __future__ import annotations

import json

import pytest
import torch
from tiny import tiny_config, tiny_federation, trained_bank

import hetlora_kernels as hk
from hetlora import diagnostics, merge, products
from hetlora.loop import simulate
from hetlora.report.page import write_report

SHAPES = {"q": (6, 5), "v": (4, 7)}
RANKS = [2, 5, 3]


def dense(bank: hk.AdapterBank, name: str, client: int = 0) -> torch.Tensor:
    rows = bank.layouts[name].rows(client)
    return bank.bt[name].detach()[rows].double().t() @ bank.a[name].detach()[rows].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_row_energy_is_the_squared_norm_of_each_rank_one_piece(dtype):
    bank = trained_bank(SHAPES, [5], dtype, seed=3)
    pieces = [sum(float(torch.outer(bank.bt[n].detach()[i].double(), bank.a[n].detach()[i].double()).norm() ** 2) for n in SHAPES) for i in range(5)]
    assert diagnostics.row_energy(bank) == pytest.approx(pieces, rel=1e-9)


def test_effective_rank_is_the_entropy_of_the_singular_values():
    bank = trained_bank(SHAPES, [4], torch.float64, seed=4)
    expected = []
    for name in SHAPES:
        share = torch.linalg.svdvals(dense(bank, name))[:4]
        share = share / share.sum()
        expected.append(float(torch.exp(-(share * share.log()).sum())))
    assert diagnostics.effective_rank(bank) == pytest.approx(sum(expected) / 2, rel=1e-6)


def test_effective_rank_counts_directions():
    bank = hk.AdapterBank({"q": (6, 6)}, [4], dtype=torch.float64)
    assert diagnostics.effective_rank(bank) == 0, "B = 0"
    with torch.no_grad():
        bank.a["q"].copy_(torch.eye(4, 6))
        bank.bt["q"][:3].copy_(torch.eye(3, 6))
    assert diagnostics.effective_rank(bank) == pytest.approx(3)
    with torch.no_grad():
        bank.bt["q"].copy_(torch.ones(4, 6))
    assert diagnostics.effective_rank(bank) == pytest.approx(1)


def call(bank, uploads, weights, cfg) -> merge.MergeCall:
    return merge.MergeCall(bank, uploads, weights, bank.ranks[0], cfg, torch.nn.Module())


@pytest.mark.parametrize("shared", ["none", "owners"])
@pytest.mark.parametrize("kept_rows", [5, 8])
def test_merge_error_is_the_distance_from_the_exact_sum(tmp_path, shared, kept_rows):
    """Rows past the largest upload keep old values: they are no part of the error."""
    uploads, old = trained_bank(SHAPES, RANKS, torch.float64, seed=1), trained_bank(SHAPES, [kept_rows], torch.float64, seed=2)
    weights = torch.tensor([[0.2, 0.5], [0.5, 0.1], [0.3, 0.4]], dtype=torch.float64)
    cfg = tiny_config(tmp_path, shared_rows=shared)
    result = merge.merge_factors(call(old, uploads, weights, cfg))
    merged = result.bank
    exact, error = [], []
    for i, name in enumerate(SHAPES):
        total = sum(weights[k, i] * dense(uploads, name, k) for k in range(3))
        cut = merged.bt[name].detach()[:5].t() @ merged.a[name].detach()[:5]
        exact.append(float(total.square().sum()))
        error.append(float((total - cut).square().sum()))
    assert diagnostics.describe(merged, uploads, weights, result.rows)["merge_error"] == pytest.approx((sum(error) / sum(exact)) ** 0.5, rel=1e-9)


def test_merge_error_of_equal_factors_and_of_a_wide_enough_svd_is_zero(tmp_path):
    one = trained_bank(SHAPES, [3], torch.float64)
    uploads = hk.AdapterBank.concat([one, one])
    even = torch.full((2, 2), 0.5, dtype=torch.float64)
    average = merge.merge_factors(call(one, uploads, even, tiny_config(tmp_path))).bank
    assert diagnostics.merge_error(average, uploads, even) == pytest.approx(0, abs=1e-7)
    uploads = trained_bank(SHAPES, [1, 2], torch.float64, seed=5)
    merged = products.merge_svd(call(trained_bank(SHAPES, [4], torch.float64), uploads, even, tiny_config(tmp_path))).bank
    assert diagnostics.merge_error(merged, uploads, even) == pytest.approx(0, abs=1e-7)
    silent = hk.AdapterBank(SHAPES, [1, 2], dtype=torch.float64)
    assert diagnostics.merge_error(merged, silent, even) is None


@pytest.mark.parametrize("merge_by", ["factors", "svd", "stack"])
def test_a_run_records_them_and_its_report_shows_them(tmp_path, merge_by):
    result = simulate(tiny_config(tmp_path / "run", diagnostics=True, merge=merge_by), federation=tiny_federation([3, 5, 2, 7]))
    found = [record.get("diagnostics") for record in result.history]
    assert found[0] is None
    if merge_by == "stack":
        assert found[1:] == [{}] * 3
    else:
        assert found[-1]["row_energy"] == pytest.approx(diagnostics.row_energy(result.bank))
        assert found[-1]["effective_rank"] == pytest.approx(diagnostics.effective_rank(result.bank))
        assert 0 <= found[-1]["merge_error"] < 2
    json.dumps(result.history)
    page = write_report(tmp_path / "run").read_text()
    drawn = (tmp_path / "run" / "diagnostics.png").exists()
    assert drawn == (merge_by != "stack") and drawn == ("diagnostics.png" in page)
