"""aggregate and Accumulator: the weighted ragged sum, its rows without owners, and the traps of HETLORA's server."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from accuracy import Estimate, assert_exact, unit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import FLOATS, MIXED_RANKS, drawn, guarded, same_bits, scattered

import hetlora_kernels as hk
from hetlora_kernels.ops.aggregate import client_weights
from hetlora_kernels.reference import compute_dtype

ALL = hk.RankLayout(MIXED_RANKS)


def uploads(ranks, width, dtype=torch.float32, seed=0, device="cpu"):
    g = drawn(seed)
    return torch.randn(sum(ranks), width, generator=g, dtype=torch.float64).to(device, dtype)


def plain_sum(rows, ranks, weights, max_rank, owners=False):
    """Zero-pad every upload to max_rank, stack, weigh, sum: the textbook server, in the type of `rows`."""
    padded, weight = rows.new_zeros(len(ranks), max_rank, rows.shape[1]), rows.new_zeros(len(ranks), max_rank, 1)
    for k, own in enumerate(rows.split(list(ranks))):
        padded[k, : ranks[k]] = own
        weight[k, : ranks[k]] = weights[k]
    total = (padded * weight).sum(0)
    return torch.where(weight.sum(0) != 0, total / weight.sum(0), 0) if owners else total


def estimated_sum(rows, ranks, weights, max_rank, owners, stored):
    """`plain_sum` of rows of type `stored` as one sum over the clients an element, in the type of our sums.

    A row of one owner is its upload times one number. In 16 bits an upload has few significands (128 in bfloat16), so the roundings of such a row are no
    independent draws: under a weight just above a power of two all go down. They count as shared, with u itself.
    """
    inside = compute_dtype(stored)
    padded = torch.stack([plain_sum(own, [rank], torch.ones(1), max_rank) for own, rank in zip(rows.split(list(ranks)), ranks, strict=True)])  # [K, R, d]
    total = Estimate(weights[None]).matmul(Estimate(padded.flatten(1)), inside).map(lambda t: t.view(max_rank, -1))
    alone = (torch.tensor(ranks)[:, None] > torch.arange(max_rank)).sum(0) == 1
    if torch.finfo(stored).bits == 16:
        total.shared[alone] += (unit(stored) * total.value[alone]).square()
    if not owners:
        return total
    held = torch.stack([torch.arange(max_rank) < rank for rank in ranks]).double()
    weight = Estimate(weights[None]).matmul(Estimate(held), inside)[0]
    inverse = torch.where(weight.value != 0, 1 / weight.value, 0)[:, None]
    value = total.value * inverse
    return Estimate(value, total.own * inverse.square(), weight.own[:, None] * (inverse * value).square()).rounded(inside, 2)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalize", ["none", "owners"])
def test_against_pad_stack_and_sum(dtype, normalize, device):
    for seed in range(4):
        rows = uploads(MIXED_RANKS, 37, dtype, seed)
        weights = torch.softmax(torch.randn(len(MIXED_RANKS), dtype=torch.float64), 0).float().double()
        owners = normalize == "owners"
        result = hk.aggregate(rows.to(device), ALL, weights, 130, normalize=normalize)
        assert result.dtype == dtype
        assert_exact({"out": result}, {"out": estimated_sum(rows.double(), MIXED_RANKS, weights, 130, owners, dtype)})


@pytest.mark.parametrize("clients", [1, 2, 4, 8])
def test_equal_ranks_and_uniform_weights_are_fedavg(clients, device):
    """Trap 1: exactly the mean of A and of B, on small integers and a power-of-two number of clients."""
    a, bt = torch.randint(-8, 9, (2, clients, 6, 11), device=device).float().unbind()
    weights = torch.full((clients,), 1 / clients)
    out = hk.aggregate([a.flatten(0, 1), bt.flatten(0, 1)], hk.RankLayout([6] * clients), weights, 6)
    assert same_bits(out[0], a.mean(0)) and same_bits(out[1], bt.mean(0))
    owners = hk.aggregate(a.flatten(0, 1), hk.RankLayout([6] * clients), weights, 6, normalize="owners")
    assert same_bits(owners, a.mean(0))


def test_rows_shrink_by_their_owners_weight_unless_divided_by_it(device):
    """Trap 4: the published dilution, and the option that avoids it."""
    rows = torch.full((3, 2), 8.0, device=device)
    layout, weights = hk.RankLayout([1, 2]), [0.75, 0.25]
    assert hk.aggregate(rows, layout, weights, 2).tolist() == [[8, 8], [2, 2]]
    assert hk.aggregate(rows, layout, weights, 2, normalize="owners").tolist() == [[8, 8], [8, 8]]


def test_rows_nobody_owns(device):
    rows, layout, kept = torch.ones(3, 2, device=device), hk.RankLayout([1, 2]), torch.full((4, 2), 7.0, device=device)
    for normalize in ("none", "owners"):
        assert hk.aggregate(rows, layout, [0.5, 0.5], 4, normalize=normalize)[2:].tolist() == [[0, 0], [0, 0]]
        assert hk.aggregate(rows, layout, [0.5, 0.5], 4, normalize=normalize, keep=kept)[2:].tolist() == [[7, 7], [7, 7]]
        assert bool((hk.aggregate(rows, layout, [0.5, 0.5], 4, normalize=normalize, keep=kept)[:2] != 7).all())
    assert kept.unique().tolist() == [7]


@pytest.mark.parametrize("normalize", ["none", "owners"])
def test_an_owned_row_without_weight_is_zero_not_kept(normalize, device):
    """Owned = a rank exceeds the row's index, whatever the weight."""
    rows, kept = torch.ones(5, 2, device=device), torch.full((4, 2), 7.0, device=device)
    out = hk.aggregate(rows, hk.RankLayout([2, 3]), [1.0, 0.0], 4, normalize=normalize, keep=kept)
    assert out.tolist() == [[1, 1], [1, 1], [0, 0], [7, 7]]


def test_weights_of_zero_leave_owners_at_zero(device):
    out = hk.aggregate(torch.ones(2, 3, device=device), hk.RankLayout([1, 1]), [0.0, 0.0], 1, normalize="owners")
    assert out.tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("bad", [-1.0, float("nan"), float("inf"), 1e300])
def test_weights_are_finite_and_not_negative(bad, device):
    rows, layout = torch.ones(2, 3, device=device), hk.RankLayout([1, 1])
    for weights in ([1.0, bad], torch.tensor([[1.0], [bad]], dtype=torch.float64, device=device)):
        with pytest.raises(ValueError, match=r"^weights: expected finite numbers >= 0, got (-1|nan|inf)"):
            hk.aggregate([rows], layout, weights, 1)
    sums = hk.Accumulator([rows], 1)
    sums.add([rows[:1]], 2.0)
    before = sums.result()[0].clone()
    for weight in (bad, torch.tensor([bad], dtype=torch.float64)):
        with pytest.raises(ValueError, match=r"^weights: expected finite numbers >= 0"):
            sums.add([rows[:1]], weight)
    assert sums.count == 1 and torch.equal(sums.result()[0], before)


def test_out_apart_from_what_is_read(device):
    """`out` over the uploads or over `keep`, in part or whole, is refused; beside them in one buffer it is written."""
    buffer, layout = torch.zeros(9, 4, device=device), hk.RankLayout([2, 1])
    buffer[:5] = torch.randn(5, 4)
    rows, keep = buffer[:3], buffer[3:5]
    expected = hk.aggregate(rows.clone(), layout, [1.0, 2.0], 2, keep=keep.clone())
    for at in (0, 2, 3, 4):
        with pytest.raises(ValueError, match=r"^out\[0\]: expected memory of its own"):
            hk.aggregate(rows, layout, [1.0, 2.0], 2, keep=keep, out=buffer[at : at + 2])
    with pytest.raises(ValueError, match=r"^out\[\d\]: expected memory of its own"):
        hk.aggregate([rows, rows], layout, [1.0, 2.0], 2, out=[buffer[5:7], buffer[6:8]])
    assert torch.equal(hk.aggregate(rows, layout, [1.0, 2.0], 2, keep=keep, out=buffer[5:7]), expected)


@pytest.mark.parametrize("clients", [0, 1])
def test_nobody_arrived(clients, device):
    layout = hk.RankLayout([0] * clients)
    assert hk.aggregate(torch.ones(0, 3, device=device), layout, [1.0] * clients, 2).tolist() == [[0, 0, 0]] * 2
    kept = torch.ones(2, 3, device=device)
    assert hk.aggregate(torch.ones(0, 3, device=device), layout, [1.0] * clients, 2, keep=kept).tolist() == [[1, 1, 1]] * 2


def test_sums_go_in_client_order(device):
    """2^25 + 1 - 2^25 in float32 is 0 in this order and 1 in the other."""
    rows = torch.tensor([[2.0**25], [1.0], [-(2.0**25)], [1.0]], device=device)
    assert hk.aggregate(rows, hk.RankLayout([1] * 4), [1.0] * 4, 1).item() == 1
    assert hk.aggregate(rows[[0, 2, 1, 3]], hk.RankLayout([1] * 4), [1.0] * 4, 1).item() == 2


def test_half_uploads_are_summed_in_float32(device):
    """256 ones and a 1: bfloat16 sums would stop at 256."""
    rows = torch.ones(300, 4, dtype=torch.bfloat16, device=device)
    assert hk.aggregate(rows, hk.RankLayout([1] * 300), [1.0] * 300, 1, dtype=torch.float32).tolist() == [[300] * 4]
    assert hk.aggregate(rows, hk.RankLayout([1] * 300), [1.0] * 300, 1).dtype == torch.bfloat16


def test_bitwise_repeatable(device):
    rows, weights = uploads(MIXED_RANKS, 33, device=device), torch.rand(len(MIXED_RANKS))
    assert same_bits(hk.aggregate(rows, ALL, weights, 128), hk.aggregate(rows, ALL, weights, 128))


def test_modules_weights_and_layouts_of_their_own(device):
    layouts = [hk.RankLayout([3, 0, 5]), hk.RankLayout([1, 4, 0])]
    rows = [uploads(own.ranks, width, seed=width, device=device) for own, width in zip(layouts, (7, 12), strict=True)]
    table = torch.rand(3, 2)
    keep = [torch.randn(6, 7, device=device), torch.randn(6, 12, device=device)]
    together = hk.aggregate(rows, layouts, table, 6, keep=keep)
    for module in range(2):
        assert same_bits(together[module], hk.aggregate(rows[module], layouts[module], table[:, module], 6, keep=keep[module]))
    assert isinstance(hk.aggregate(rows[:1], layouts[0], [1.0, 1.0, 1.0], 6), list)


def test_out_is_written_whole_and_nothing_else(device):
    rows, weights = uploads(MIXED_RANKS, 9, torch.bfloat16, device=device), torch.rand(len(MIXED_RANKS))
    out, guards_hold = guarded((131, 9), torch.float32, device)
    out.fill_(float("nan"))
    returned = hk.aggregate(rows, ALL, weights, 131, dtype=torch.float32, out=out)
    guards_hold()
    assert returned.data_ptr() == out.data_ptr() and same_bits(out, hk.aggregate(rows, ALL, weights, 131, dtype=torch.float32))


def test_non_contiguous_uploads_and_parameters(device):
    rows, weights, keep = uploads(MIXED_RANKS, 9, device=device), torch.rand(len(MIXED_RANKS)), torch.randn(130, 9, device=device)
    expected = hk.aggregate(rows, ALL, weights, 130, keep=keep)
    out = hk.aggregate(torch.nn.Parameter(scattered(rows)), ALL, torch.stack((weights, weights), 1)[:, 0], 130, keep=scattered(keep))
    assert same_bits(out, expected) and not out.requires_grad


# ---------------------------------------------------------------- one client at a time


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("normalize", ["none", "owners"])
@pytest.mark.parametrize("keep", [False, True])
def test_accumulator_equals_aggregate(dtype, normalize, keep, device):
    """Bit for bit, in the order of add; asking for the result in between changes nothing."""
    layouts = [hk.RankLayout(MIXED_RANKS), hk.RankLayout(MIXED_RANKS[::-1])]
    rows = [uploads(own.ranks, width, dtype, width, device) for own, width in zip(layouts, (13, 40), strict=True)]
    kept = [torch.randn(132, width, device=device).to(dtype) for width in (13, 40)] if keep else None
    table = torch.rand(len(MIXED_RANKS), 2)
    accumulator = hk.Accumulator(like=[r[:0] for r in rows], max_rank=132)
    for k in range(len(MIXED_RANKS)):
        accumulator.add([r[own.rows(k)] for r, own in zip(rows, layouts, strict=True)], table[k])
        accumulator.result(normalize=normalize)[0].fill_(-1)
    assert accumulator.count == len(MIXED_RANKS)
    expected = hk.aggregate(rows, layouts, table, 132, normalize=normalize, keep=kept)
    for one, other in zip(accumulator.result(normalize=normalize, keep=kept), expected, strict=True):
        assert same_bits(one, other)


def test_accumulator_takes_numbers_and_another_type(device):
    accumulator = hk.Accumulator([torch.zeros(1, 2, dtype=torch.bfloat16, device=device)], max_rank=2)
    for weight in (0.5, torch.tensor(0.25), torch.tensor([0.25])):
        accumulator.add([torch.full((1, 2), 3.0, dtype=torch.bfloat16, device=device)], weight)
    assert accumulator.result()[0].tolist() == [[3, 3], [0, 0]] and accumulator.result()[0].dtype == torch.bfloat16
    assert accumulator.result(dtype=torch.float64)[0].dtype == torch.float64


def test_empty_accumulator_gives_what_is_kept(device):
    like = [torch.zeros(1, 2, device=device)]
    assert hk.Accumulator(like, max_rank=1).result()[0].tolist() == [[0, 0]]
    assert hk.Accumulator(like, max_rank=1).result(keep=[torch.ones(1, 2, device=device)])[0].tolist() == [[1, 1]]


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    clients=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 3)), min_size=1, max_size=6),
    spare=st.integers(0, 3),
    width=st.integers(1, 33),
    seed=st.integers(0, 99),
)
def test_truncate_then_aggregate_by_owners_gives_the_bank_back(device, clients, spare, width, seed):
    """Whatever the ranks and (integer) weights: exact, because the sums are; rows without owners come from keep, rows without weight are zero."""
    ranks, weights = [rank for rank, _ in clients], [float(weight) for _, weight in clients]
    layout, max_rank = hk.RankLayout(ranks), max(ranks) + spare
    bank = torch.randint(-50, 51, (max_rank, width), generator=drawn(seed)).float().to(device)
    sent = hk.truncate(bank, layout)
    expected = bank.clone()
    for row in range(layout.max_rank):
        if not any(weight for rank, weight in clients if rank > row):
            expected[row] = 0
    assert torch.equal(hk.aggregate(sent, layout, weights, max_rank, normalize="owners", keep=bank), expected)
    accumulator = hk.Accumulator([bank], max_rank)
    for k, weight in enumerate(weights):
        accumulator.add([sent[layout.rows(k)]], weight)
    assert torch.equal(accumulator.result(normalize="owners", keep=[bank])[0], expected)


# ---------------------------------------------------------------- errors

ROWS, PAIR = torch.ones(3, 2), hk.RankLayout([1, 2])


def accumulator():
    return hk.Accumulator([ROWS, ROWS], max_rank=3)


BAD = [
    (lambda: hk.aggregate(ROWS, PAIR, [1, 1], 1), ValueError, r"^max_rank: expected at least the largest rank 2, got 1"),
    (lambda: hk.aggregate(ROWS[:2], PAIR, [1, 1], 2), ValueError, r"^rows\[0\]: expected 3 rows .*got 2"),
    (lambda: hk.aggregate("rows", PAIR, [1, 1], 2), TypeError, r"^rows: "),
    (lambda: hk.aggregate(ROWS, PAIR, [1, 1, 1], 2), ValueError, r"^weights: expected shape \(2,\) or \(2, 1\), got \(3,\)"),
    (lambda: hk.aggregate(ROWS, PAIR, torch.ones(2, 2), 2), ValueError, r"^weights: .*\(2, 2\)"),
    (lambda: hk.aggregate(ROWS, PAIR, torch.ones(2, dtype=torch.complex64), 2), ValueError, r"^weights: .*complex64"),
    (lambda: hk.aggregate(ROWS, PAIR, [1, 1], 2, normalize="mean"), ValueError, r"^normalize: .*'mean'"),
    (lambda: hk.aggregate(ROWS, PAIR, [1, 1], 2, keep=torch.ones(3, 2)), ValueError, r"^keep: .*\(3, 2\)"),
    (lambda: hk.aggregate(ROWS, PAIR, [1, 1], 2, dtype=torch.int32), TypeError, r"^dtype: .*int32"),
    (lambda: hk.aggregate(ROWS, PAIR, [1, 1], 2, out=torch.ones(3, 2)), ValueError, r"^out\[0\]: .*\(3, 2\)"),
    (lambda: hk.aggregate(ROWS, hk.RankLayout([3]), [1], 3, dtype=torch.float64, out=torch.ones(3, 2)), ValueError, r"^out\[0\]: .*float64.*float32"),
    (lambda: accumulator().add([ROWS], 1.0), ValueError, r"^rows: expected 2 modules, got 1"),
    (lambda: accumulator().add([ROWS, torch.ones(4, 2)], 1.0), ValueError, r"^rows\[1\]: expected at most 3 rows .*\(4, 2\)"),
    (lambda: accumulator().add([ROWS, torch.ones(3, 1)], 1.0), ValueError, r"^rows\[1\]: .*width 2.*\(3, 1\)"),
    (lambda: accumulator().add([ROWS, ROWS], torch.ones(3)), ValueError, r"^weights: "),
    (lambda: accumulator().result(normalize="mean"), ValueError, r"^normalize: "),
    (lambda: accumulator().result(keep=[ROWS]), ValueError, r"^keep: "),
    (lambda: hk.Accumulator([ROWS[0]], 3), ValueError, r"^like\[0\]: "),
]


@pytest.mark.parametrize(("call", "error", "text"), BAD)
def test_errors(call, error, text):
    with pytest.raises(error, match=text):
        call()


def test_a_refused_upload_leaves_the_sums_alone():
    sums = accumulator()
    sums.add([ROWS, ROWS], 1.0)
    with pytest.raises(ValueError):
        sums.add([ROWS, torch.ones(4, 2)], 1.0)
    assert sums.count == 1 and all(torch.equal(t, torch.ones(3, 2)) for t in sums.result())


def test_weights_go_up_without_a_wait_and_are_not_read_in_a_capture(monkeypatch):
    """With stand-ins for the device."""
    copies, gpu = [], SimpleNamespace(type="cuda")
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda t: SimpleNamespace(to=lambda device, non_blocking: copies.append((device, non_blocking)) or t))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    assert client_weights([1.0, 2.0], 2, 3, gpu, torch.float32).shape == (2, 3) and copies == [(gpu, True)]
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(ValueError, match=r"^weights: expected a tensor on .* inside the capture of a CUDA graph"):
        client_weights([1.0, 2.0], 2, 3, gpu, torch.float32)
    with pytest.raises(ValueError, match=r"^weights: expected finite numbers"):
        client_weights([1.0, -2.0], 2, 3, gpu, torch.float32)


def test_weights_are_numbers_of_the_host_whatever_the_default_device(device):
    rows, layout = torch.randn(5, 8, generator=drawn(9)).to(device), hk.RankLayout([2, 3])
    sums = hk.Accumulator([rows], 5)
    with torch.device("meta"):
        inside = hk.aggregate(rows, layout, [1.0, 2.0], 4)
        sums.add([rows], 0.5)
    assert same_bits(inside, hk.aggregate(rows, layout, [1.0, 2.0], 4)) and same_bits(sums.result()[0], 0.5 * rows)
