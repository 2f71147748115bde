"""best_rank: the truncated SVD of a sum of products, from its factors alone, against the SVD of the dense sum."""

from __future__ import annotations

import pytest
import torch

from hetlora import low_rank
from hetlora.low_rank import best_rank

EPS = torch.finfo(torch.float64).eps


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def product(factors):
    bt, a = factors
    return bt.double().mT @ a.double()


# (S, m, n): fewer parts than either width, more than one of them, more than both; and a rank above all of them
SHAPES = [(7, 20, 12), (15, 20, 12), (30, 20, 12), (1, 5, 9), (40, 16, 16)]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("rank", [1, 4, 12, 50])
def test_it_is_the_truncated_svd_of_the_dense_sum(shape, rank):
    parts, m, n = shape
    x, y = draw(parts, m, seed=1) * torch.logspace(0, -3, parts, dtype=torch.float64)[:, None], draw(parts, n, seed=2)
    bt, a = best_rank([(x, y)], rank)[0]
    assert bt.shape == (rank, m) and a.shape == (rank, n)
    u, s, vh = torch.linalg.svd(x.mT @ y, full_matrices=False)
    kept = min(rank, len(s))
    truth = (u[:, :kept] * s[:kept]) @ vh[:kept]
    assert float((product((bt, a)) - truth).norm()) <= 100 * EPS * float(s[0])
    # Balanced: both sides have rows of norm sqrt(s_i), in falling order, at right angles.
    for side in (bt, a):
        gram = side @ side.mT
        expected = torch.diag(torch.nn.functional.pad(s[:kept], (0, rank - kept)))
        assert float((gram - expected).norm()) <= 1e3 * EPS * float(s[0])


def test_weights_are_those_of_the_parts():
    x, y, p = draw(9, 6, seed=3), draw(9, 8, seed=4), torch.rand(9, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    p[2] = 0
    weighed, by_hand = best_rank([(x, y)], 3, [p])[0], best_rank([(p[:, None] * x, y)], 3)[0]
    for left, right in zip(weighed, by_hand, strict=True):
        torch.testing.assert_close(left, right, rtol=0, atol=1e-13)  # the signs agree too


def assert_same(pair, other):
    """To rounding: some processors' libraries multiply a batch in another order than one matrix."""
    for mine, theirs in zip(pair, other, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-13)


def test_batches_of_any_size_give_the_same(monkeypatch):
    stacks = [(draw(5, 6, seed=i), draw(5, 8, seed=50 + i)) for i in range(5)]
    weights = [torch.rand(5, generator=torch.Generator().manual_seed(i), dtype=torch.float64) for i in range(5)]
    whole = best_rank(stacks, 3, weights)
    for size in (1, 8 * 5 * 14 * 2):
        monkeypatch.setattr(low_rank, "BATCH_BYTES", size)
        for pair in zip(whole, best_rank(stacks, 3, weights), strict=True):
            assert_same(*pair)


def test_modules_in_one_batch_are_what_each_is_alone():
    stacks = [(draw(5, 6, seed=i), draw(5, 8, seed=50 + i)) for i in range(3)] + [(draw(4, 6, seed=9), draw(4, 8, seed=59)), (draw(0, 6), draw(0, 8))]
    for together, (x, y) in zip(best_rank(stacks, 3), stacks, strict=True):
        assert_same(together, best_rank([(x, y)], 3)[0])


def test_zero_and_rank_deficient_sums():
    for x, y in ((torch.zeros(4, 6), draw(4, 8, dtype=torch.float32)), (torch.zeros(4, 6), torch.zeros(4, 8)), (torch.zeros(0, 6), torch.zeros(0, 8))):
        bt, a = best_rank([(x, y)], 3)[0]
        assert bt.shape == (3, 6) and a.shape == (3, 8) and not bt.any() and not a.any()
    # Twelve parts that span two directions: two rows, then zeros, and nothing of the roundings.
    x, y = draw(2, 6, seed=6).repeat(6, 1), draw(2, 8, seed=7).repeat(6, 1)
    bt, a = best_rank([(x, y)], 5)[0]
    assert bool((bt[:2] != 0).any(1).all()) and not bt[2:].any() and not a[2:].any()
    torch.testing.assert_close(product((bt, a)), x.mT @ y, rtol=1e-13, atol=1e-13)


def test_parts_that_cancel_leave_what_is_left():
    x, y = draw(3, 6, seed=8), draw(3, 8, seed=9)
    small = 1e-6
    stack = torch.cat([x, -x * (1 - small)]), torch.cat([y, y])
    truth = small * (x.mT @ y)
    assert float((product(best_rank([stack], 3)[0]) - truth).norm()) <= 100 * EPS * float((x.mT @ y).norm())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_arithmetic_is_float64_and_results_are_rounded_once(dtype):
    x, y = draw(9, 6, seed=3, dtype=dtype), draw(9, 8, seed=4, dtype=dtype)
    wide = best_rank([(x.double(), y.double())], 4)[0]
    for own, side in zip(best_rank([(x, y)], 4)[0], wide, strict=True):
        assert own.dtype == dtype and torch.equal(own, side.to(dtype))


def test_signs_do_not_depend_on_the_order_of_the_parts():
    x, y = draw(9, 6, seed=3), draw(9, 8, seed=4)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(1))
    for one, other in zip(best_rank([(x, y)], 4)[0], best_rank([(-x[order], -y[order])], 4)[0], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-13)
    a = best_rank([(x, y)], 4)[0][1]
    assert bool((a.gather(1, a.abs().argmax(1, keepdim=True)) > 0).all())


def test_sides_of_different_rows_are_refused():
    with pytest.raises(ValueError, match=r"^stacks\[1\]: expected as many rows on both sides, got 2 and 3"):
        best_rank([(torch.ones(1, 2), torch.ones(1, 2)), (torch.ones(2, 2), torch.ones(3, 2))], 1)
