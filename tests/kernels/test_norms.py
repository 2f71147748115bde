"""gram, delta_norms and tail_norms against dense float64 arithmetic, cancellation included."""

from __future__ import annotations

import pytest
import torch
from accuracy import Estimate, assert_exact, cat
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS, MIXED_RANKS, drawn, same_bits, scattered
from torch import Tensor

import hetlora_kernels as hk
from hetlora_kernels import unpack_gram

ALL = hk.RankLayout(MIXED_RANKS)


def result_type(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def draw(ranks, width, dtype, seed):
    return torch.randn(sum(ranks), width, generator=drawn(seed), dtype=torch.float64).to(dtype)


def dense_grams(rows, ranks):
    return torch.cat([torch.einsum("id,jd->ij", own, own).reshape(-1) for own in rows.split(list(ranks))])


def dense_norms(a, bt, ranks):
    pairs = zip(a.split(list(ranks)), bt.split(list(ranks)), strict=True)
    return torch.stack([torch.linalg.norm(b.t() @ own) for own, b in pairs])


def estimated_gram(rows, dtype):
    """[r, r] of one client. Both halves of the symmetric result hold the same errors: counted twice."""
    whole = Estimate(rows).matmul(Estimate(rows.t()), result_type(dtype))
    return Estimate(whole.value, 2 * whole.own)


def estimated_root(squares, dtype):
    """[1]: the root of the sum of an estimate's elements, whose relative error it halves; zero is exact."""
    inside = result_type(dtype)
    total = Estimate(torch.ones(1, squares.value.numel())).matmul(squares.map(lambda t: t.reshape(-1, 1)), inside)[0]
    root = total.value.clamp(min=0).sqrt()
    return Estimate(root, torch.where(root > 0, total.var / (4 * root.square()), 0)).rounded(inside)


def tails(rows, ranks, keep):
    return torch.stack([torch.linalg.norm(own[q:]) for own, q in zip(rows.split(list(ranks)), keep, strict=True)])


@pytest.mark.parametrize("dtype", FLOATS)
def test_gram(dtype, device):
    for seed in range(3):
        rows = draw(MIXED_RANKS, 37, dtype, seed)
        result, blocks = hk.gram(rows.to(device), ALL), [estimated_gram(own.double(), dtype) for own in rows.split(MIXED_RANKS)]
        assert result.dtype == result_type(dtype)
        assert_exact({"g": result}, {"g": cat([block.map(Tensor.flatten) for block in blocks])})


@pytest.mark.parametrize("dtype", FLOATS)
def test_exact_gram_is_float64(dtype, device):
    rows = draw(MIXED_RANKS, 37, dtype, 0)
    exact, truth = hk.gram(rows.to(device), ALL, exact=True), dense_grams(rows.double(), MIXED_RANKS)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact.cpu(), truth, rtol=1e-13, atol=1e-12)


def test_unpack_gram_views_one_matrix_a_client(device):
    rows = draw([2, 0, 3], 5, torch.float64, 0).to(device)
    packed = hk.gram(rows, hk.RankLayout([2, 0, 3]))
    blocks = unpack_gram(packed, hk.RankLayout([2, 0, 3]))
    assert [tuple(b.shape) for b in blocks] == [(2, 2), (0, 0), (3, 3)]
    torch.testing.assert_close(blocks[2], rows[2:] @ rows[2:].t())
    blocks[0].zero_()
    assert packed[:4].tolist() == [0] * 4 and bool((packed[4:] != 0).any())


def test_lists_of_modules(device):
    layouts = [hk.RankLayout([3, 0, 5]), hk.RankLayout([1, 4, 2])]
    a = [draw(own.ranks, 7 + i, torch.float32, i).to(device) for i, own in enumerate(layouts)]
    bt = [draw(own.ranks, 12 - i, torch.float32, 9 + i).to(device) for i, own in enumerate(layouts)]
    grams, norms, cut = hk.gram(a, layouts), hk.delta_norms(a, bt, layouts), hk.tail_norms(a, layouts, [[1, 0, 2], [0, 3, 9]])
    assert isinstance(grams, list) and norms.shape == cut.shape == (3, 2)
    for i, own in enumerate(layouts):
        assert same_bits(grams[i], hk.gram(a[i], own)) and same_bits(norms[:, i], hk.delta_norms(a[i], bt[i], own))
        assert same_bits(cut[:, i], hk.tail_norms(a[i], own, [[1, 0, 2], [0, 3, 9]][i]))
    shared = hk.tail_norms([a[0], a[0]], layouts[0], [1, 0, 2])
    assert same_bits(shared[:, 0], shared[:, 1]) and same_bits(shared[:, 0].contiguous(), hk.tail_norms(a[0], layouts[0], [1, 0, 2]))


@pytest.mark.parametrize("dtype", FLOATS)
def test_delta_norms(dtype, device):
    for seed in range(3):
        a, bt = draw(MIXED_RANKS, 61, dtype, seed), draw(MIXED_RANKS, 43, dtype, 50 + seed)
        truth = dense_norms(a.double(), bt.double(), MIXED_RANKS)
        expected = []
        for own_a, own_bt in zip(a.double().split(MIXED_RANKS), bt.double().split(MIXED_RANKS), strict=True):
            left, right = estimated_gram(own_a, dtype), estimated_gram(own_bt, dtype)
            product = Estimate(left.value * right.value, left.own * right.value.square() + left.value.square() * right.own).rounded(result_type(dtype))
            expected.append(estimated_root(product, dtype))
        result = hk.delta_norms(a.to(device), bt.to(device), ALL)
        assert result.dtype == result_type(dtype)
        assert_exact({"h": result}, {"h": cat(expected)})
        exact = hk.delta_norms(a.to(device), bt.to(device), ALL, exact=True)
        assert exact.dtype == torch.float64
        torch.testing.assert_close(exact.cpu(), truth, rtol=1e-13, atol=0)


def cancelling_pair(device):
    """Trap 8: rows a, a + 1e-3 e against b, -b; B A = -1e-3 b e^T."""
    g = drawn(0)
    first, e, b = torch.randn(256, generator=g), torch.randn(256, generator=g), torch.randn(192, generator=g)
    a, bt = torch.stack((first, first + 1e-3 * e)), torch.stack((b, -b))
    truth = torch.linalg.norm(bt.double().t() @ a.double()).item()
    return a.to(device), bt.to(device), truth


def test_cancelling_factors(device):
    a, bt, truth = cancelling_pair(device)
    layout = hk.RankLayout([2])
    assert hk.delta_norms(a, bt, layout, exact=True).item() == pytest.approx(truth, rel=1e-9)
    documented = hk.delta_norms(a, bt, layout).item()
    assert 0 <= documented == pytest.approx(truth, rel=1.0)  # float32 products: 1e-2 typical, 100 % at worst, never NaN


def test_cancellation_below_rounding_is_small_not_nan(device):
    """Rows that differ by less than float32 tells apart: for many of these seeds the rounded sum is negative, and clamped before the root."""
    for seed in range(40):
        row, e, b = (draw([1], width, torch.float32, 100 * i + seed).to(device) for i, width in enumerate((33, 33, 20)))
        norm = hk.delta_norms(torch.cat((row, row + 1e-6 * e)), torch.cat((b, -b)), hk.RankLayout([2]))
        assert 0 <= norm.item() <= 1e-2 * float(row.norm() * b.norm())


@pytest.mark.parametrize("dtype", FLOATS)
def test_tail_norms(dtype, device):
    keep = [2, 0, 1, 32, 0, 9, 8, 127, 1, 12]  # part, nothing, everything and more than everything
    for seed in range(3):
        rows = draw(MIXED_RANKS, 37, dtype, seed)
        tail = [own[q:].double() for own, q in zip(rows.split(MIXED_RANKS), keep, strict=True)]
        result = hk.tail_norms(rows.to(device), ALL, keep)
        assert result.dtype == result_type(dtype)
        assert_exact({"t": result}, {"t": cat([estimated_root(Estimate(own.square()).rounded(result_type(dtype)), dtype) for own in tail])})
        assert [result[k].item() for k in (1, 2, 5, 6)] == [0, 0, 0, 0]


@pytest.mark.parametrize("scale", [2.0**-80, 2.0**80])
def test_rows_whose_squares_leave_the_range_of_float32(scale, backend, device):
    """tail_norms sums squares in float64, delta_norms does if asked."""
    if backend == "triton" or device.type == "cuda":
        pytest.skip("squares are float32 on a GPU (docs/kernels-gpu.md)")
    layout, draw = hk.RankLayout([3, 5]), drawn(0)
    a, bt = (torch.randn(8, width, generator=draw, dtype=torch.float32) * scale for width in (20, 300))
    tails = hk.tail_norms(a.to(device), layout, [1, 2]).cpu().double()
    torch.testing.assert_close(tails, hk.tail_norms(a.double(), layout, [1, 2]), rtol=2.0**-22, atol=0)
    deltas = hk.delta_norms(a.to(device), bt.to(device), layout, exact=True).cpu()
    torch.testing.assert_close(deltas, hk.delta_norms(a.double(), bt.double(), layout), rtol=1e-12, atol=0)


def test_zero_factor_gives_exactly_zero(device):
    rows, zero = draw([3, 2], 8, torch.float32, 0).to(device), torch.zeros(5, 6, device=device)
    layout = hk.RankLayout([3, 2])
    assert hk.delta_norms(rows, zero, layout).tolist() == [0, 0] and hk.tail_norms(zero, layout, [1, 1]).tolist() == [0, 0]


@pytest.mark.parametrize("ranks", [[], [0], [0, 0]])
def test_clients_without_rows(ranks, device):
    rows, layout = torch.ones(0, 4, device=device), hk.RankLayout(ranks)
    assert hk.gram(rows, layout).shape == (0,) and hk.delta_norms(rows, rows, layout).tolist() == [0.0] * len(ranks)
    assert hk.tail_norms(rows, layout, [0] * len(ranks)).tolist() == [0.0] * len(ranks)
    assert hk.delta_norms([rows, rows], [rows, rows], layout).shape == (len(ranks), 2)


def test_a_nan_stays_with_its_client(device):
    rows = draw([2, 3, 1], 9, torch.float32, 0).to(device)
    rows[3, 4] = float("nan")
    layout = hk.RankLayout([2, 3, 1])
    assert hk.delta_norms(rows, rows, layout).isnan().tolist() == [False, True, False]
    assert hk.tail_norms(rows, layout, [0, 0, 0]).isnan().tolist() == [False, True, False]
    assert hk.tail_norms(rows, layout, [0, 2, 0]).isnan().tolist() == [False, False, False]
    assert [bool(g.isnan().any()) for g in unpack_gram(hk.gram(rows, layout), layout)] == [False, True, False]


def test_non_contiguous_and_parameters(device):
    a, bt = draw(MIXED_RANKS, 21, torch.float32, 0).to(device), draw(MIXED_RANKS, 14, torch.float32, 1).to(device)
    norms = hk.delta_norms(torch.nn.Parameter(scattered(a)), scattered(bt), ALL)
    assert not norms.requires_grad
    torch.testing.assert_close(norms, hk.delta_norms(a, bt, ALL))
    torch.testing.assert_close(hk.gram(scattered(a), ALL), hk.gram(a, ALL), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(hk.tail_norms(scattered(a), ALL, [1] * 10), hk.tail_norms(a, ALL, [1] * 10))


def test_bitwise_repeatable(device):
    a, bt = draw(MIXED_RANKS, 21, torch.float32, 0).to(device), draw(MIXED_RANKS, 14, torch.float32, 1).to(device)
    for op in (lambda: hk.gram(a, ALL), lambda: hk.delta_norms(a, bt, ALL), lambda: hk.tail_norms(a, ALL, [1] * 10)):
        assert same_bits(op(), op())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.lists(st.integers(0, 9), min_size=1, max_size=6), widths=st.tuples(st.integers(1, 40), st.integers(1, 40)), data=st.data())
def test_any_ranks_and_widths(device, ranks, widths, data):
    keep = [data.draw(st.integers(0, 10)) for _ in ranks]
    a, bt = (draw(ranks, width, torch.float64, i).to(device) for i, width in enumerate(widths))
    layout = hk.RankLayout(ranks)
    torch.testing.assert_close(hk.delta_norms(a, bt, layout), dense_norms(a, bt, ranks), rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(hk.gram(a, layout), dense_grams(a, ranks))
    torch.testing.assert_close(hk.tail_norms(a, layout, keep), tails(a, ranks, keep))


ROWS, PAIR = torch.ones(3, 2), hk.RankLayout([1, 2])
BAD = [
    (lambda: hk.gram(ROWS[:2], PAIR), ValueError, r"^rows\[0\]: expected 3 rows .*got 2"),
    (lambda: hk.gram([], PAIR), TypeError, r"^rows: "),
    (lambda: hk.gram(ROWS, (1, 2)), TypeError, r"^layout: "),
    (lambda: hk.delta_norms(ROWS, ROWS[:2], PAIR), ValueError, r"^bt\[0\]: .*got 2"),
    (lambda: hk.delta_norms(ROWS, [ROWS], PAIR), ValueError, r"^bt: expected a tensor"),
    (lambda: hk.delta_norms([ROWS], ROWS, PAIR), ValueError, r"^bt: expected a list"),
    (lambda: hk.delta_norms([ROWS], [ROWS, ROWS], PAIR), ValueError, r"^(bt|layout): "),
    (lambda: hk.delta_norms(ROWS, ROWS.double(), PAIR), ValueError, r"^bt: .*float64"),
    (lambda: hk.tail_norms(ROWS, PAIR, [1]), ValueError, r"^keep: expected 2 integers, one per client, got 1"),
    (lambda: hk.tail_norms(ROWS, PAIR, [1, -1]), ValueError, r"^keep: expected integers >= 0, got -1"),
    (lambda: hk.tail_norms(ROWS, PAIR, [1, 0.5]), TypeError, r"^keep: .*0\.5"),
    (lambda: hk.tail_norms(ROWS, PAIR, 1), TypeError, r"^keep: "),
    (lambda: hk.tail_norms([ROWS, ROWS], PAIR, [[1, 1]]), ValueError, r"^keep: expected one sequence per module \(2\), got 1"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()
