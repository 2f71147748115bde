"""truncate: each client receives the leading rank rows, bit for bit, packed or zero-masked."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS, MIXED_RANKS, guarded, same_bits, scattered

import hetlora_kernels as hk


def expected_rows(bank, ranks, dtype):
    return torch.cat([bank[:rank] for rank in ranks] or [bank[:0]]).to(dtype)


@pytest.mark.parametrize("source", FLOATS)
@pytest.mark.parametrize("target", [None, *FLOATS])
def test_leading_rows_cast_once(source, target, device):
    bank = torch.randn(130, 37, dtype=torch.float64, device=device).to(source)
    out = hk.truncate(bank, hk.RankLayout(MIXED_RANKS), dtype=target)
    assert same_bits(out, expected_rows(bank, MIXED_RANKS, target or source))


@pytest.mark.parametrize("dtype", FLOATS)
def test_dense_is_zero_beyond_the_rank(dtype, device):
    bank = torch.randn(128, 19, dtype=torch.float64, device=device).to(dtype)
    dense = hk.truncate(bank, hk.RankLayout(MIXED_RANKS), dense=True)
    assert dense.shape == (len(MIXED_RANKS), 128, 19)
    for k, rank in enumerate(MIXED_RANKS):
        assert same_bits(dense[k, :rank], bank[:rank]) and bool((dense[k, rank:] == 0).all())


@pytest.mark.parametrize("dense", [False, True])
def test_modules_with_layouts_of_their_own(dense, device):
    banks = [torch.randn(8, 5, device=device), torch.randn(4, 33, device=device), torch.randn(6, 1, device=device)]
    layouts = [hk.RankLayout([8, 0, 3]), hk.RankLayout([1, 4, 4]), hk.RankLayout([0, 0, 6])]
    together = hk.truncate(banks, layouts, dense=dense)
    assert isinstance(together, list) and all(same_bits(t, hk.truncate(b, own, dense=dense)) for t, b, own in zip(together, banks, layouts, strict=True))
    shared = hk.truncate(banks, hk.RankLayout([2, 4]), dense=dense)
    assert all(same_bits(t, hk.truncate(b, hk.RankLayout([2, 4]), dense=dense)) for t, b in zip(shared, banks, strict=True))
    assert isinstance(hk.truncate(banks[:1], layouts[0]), list)


@pytest.mark.parametrize("dense", [False, True])
def test_out_is_written_whole_and_nothing_else(dense, device):
    bank, layout = torch.randn(9, 7, device=device), hk.RankLayout([3, 0, 9, 1])
    shape = (4, 9, 7) if dense else (13, 7)
    out, guards_hold = guarded(shape, torch.bfloat16, device)
    out.fill_(float("nan"))
    returned = hk.truncate(bank, layout, dtype=torch.bfloat16, dense=dense, out=out)
    guards_hold()
    assert returned.data_ptr() == out.data_ptr() and same_bits(out, hk.truncate(bank, layout, dtype=torch.bfloat16, dense=dense))


def test_non_contiguous_bank_and_parameters(device):
    bank = torch.randn(9, 7, device=device)
    layout = hk.RankLayout([3, 9])
    assert same_bits(hk.truncate(scattered(bank), layout), expected_rows(bank, [3, 9], bank.dtype))
    result = hk.truncate(torch.nn.Parameter(bank), layout)
    assert not result.requires_grad and same_bits(result, expected_rows(bank, [3, 9], bank.dtype))
    result.zero_()
    assert bool((bank != 0).any())  # a copy, not a view of the bank


@pytest.mark.parametrize("ranks", [[], [0], [0, 0]])
def test_nothing_to_send(ranks, device):
    assert hk.truncate(torch.ones(4, 3, device=device), hk.RankLayout(ranks)).shape == (0, 3)
    assert bool((hk.truncate(torch.ones(4, 3, device=device), hk.RankLayout(ranks), dense=True) == torch.zeros(len(ranks), 4, 3, device=device)).all())


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(ranks=st.lists(st.integers(0, 11), max_size=6), spare=st.integers(0, 3), width=st.integers(1, 40), dense=st.booleans())
def test_any_ranks_and_widths(device, ranks, spare, width, dense):
    bank = torch.randn(max(ranks, default=0) + spare, width, device=device)
    out = hk.truncate(bank, hk.RankLayout(ranks), dense=dense)
    if dense:
        out = torch.cat([out[k, :rank] for k, rank in enumerate(ranks)] or [bank[:0]])
    assert same_bits(out, expected_rows(bank, ranks, bank.dtype))


ONES, LAYOUT = torch.ones(4, 3), hk.RankLayout([4, 2])
BAD = [
    (lambda: hk.truncate(ONES, hk.RankLayout([4, 5])), ValueError, r"^layout: expected ranks <= 4 .*got 5"),
    (lambda: hk.truncate(ONES[0], LAYOUT), ValueError, r"^bank_rows: .*\(3,\)"),
    (lambda: hk.truncate([], LAYOUT), TypeError, r"^bank_rows: "),
    (lambda: hk.truncate(ONES.long(), LAYOUT), TypeError, r"^bank_rows: .*int64"),
    (lambda: hk.truncate([ONES, ONES.double()], LAYOUT), ValueError, r"^bank_rows\[1\]: .*float64"),
    (lambda: hk.truncate(ONES, [4, 2]), TypeError, r"^layout: "),
    (lambda: hk.truncate([ONES, ONES], [LAYOUT]), ValueError, r"^layout: .*got 1"),
    (lambda: hk.truncate([ONES, ONES], [LAYOUT, hk.RankLayout([1])]), ValueError, r"^layout: expected the same number of clients"),
    (lambda: hk.truncate(ONES, LAYOUT, dtype=torch.int8), TypeError, r"^dtype: .*int8"),
    (lambda: hk.truncate(ONES, LAYOUT, out=torch.ones(5, 3)), ValueError, r"^out\[0\]: .*\(6, 3\).*\(5, 3\)"),
    (lambda: hk.truncate(ONES, LAYOUT, out=torch.ones(6, 3).double()), ValueError, r"^out\[0\]: .*float64"),
    (lambda: hk.truncate(ONES, LAYOUT, out=torch.ones(3, 6).t()), ValueError, r"^out\[0\]: expected a contiguous"),
    (lambda: hk.truncate(ONES, LAYOUT, out=[torch.ones(6, 3)] * 2), ValueError, r"^out: expected 1 tensors, got 2"),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


@pytest.mark.parametrize(("ranks", "width"), [([2, 6], 5000), ([1, 3], 4)])
@pytest.mark.parametrize("dense", [False, True])
def test_out_over_the_bank_is_refused(ranks, width, dense, device):
    """The rows that are read must not be those that are written, whatever the size; rows beside them in one buffer may be."""
    layout, high = hk.RankLayout(ranks), max(ranks)
    size = (len(ranks), high, width) if dense else (sum(ranks), width)
    count = len(ranks) * high if dense else sum(ranks)
    buffer = torch.randn(high + count + 1, width, device=device)
    bank = buffer[:high]
    expected = hk.truncate(bank.clone(), layout, dense=dense)
    for at in (0, 1, high - 1):
        with pytest.raises(ValueError, match=r"^out\[0\]: expected memory of its own"):
            hk.truncate(bank, layout, dense=dense, out=buffer[at : at + count].view(size))
    assert torch.equal(hk.truncate(bank, layout, dense=dense, out=buffer[high : high + count].view(size)), expected)
