"""RankLayout and Segments: where the rows are, in any order the batch comes."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hetlora_kernels import RankLayout, Segments
from hetlora_kernels.layout import joined, own_list

pytestmark = pytest.mark.parametrize("backend", ["auto"], indirect=True)  # no op runs here


def owners(seg: Segments) -> list[int]:
    """Client of each row of x as the segments say, -1 = base only; fails on a row that two clients own."""
    out = [-1] * seg.num_rows
    for k, (start, length) in enumerate(zip(seg.starts, seg.lengths, strict=True)):
        rows = range(start, start + length) if seg.index is None else seg.index[start : start + length].tolist()
        for row in rows:
            assert out[row] == -1
            out[row] = k
    return out


def keys_by_row(seg: Segments) -> dict[int, int]:
    keys = seg.keys_on(torch.device("cpu")).tolist()
    return {row: keys[i] for start, length in zip(seg.starts, seg.lengths, strict=True) for i, row in _rows(seg, start, length)}


def _rows(seg: Segments, start: int, length: int) -> list[tuple[int, int]]:
    return [(i, i if seg.index is None else int(seg.index[i])) for i in range(start, start + length)]


def test_layout_offsets_total_and_largest():
    layout = RankLayout([4, 0, 16, 1])
    assert layout.ranks == (4, 0, 16, 1) and layout.offsets == (0, 4, 4, 20, 21)
    assert (layout.total, layout.max_rank, layout.num_clients) == (21, 16, 4)
    assert layout.rows(2) == slice(4, 20) and layout.rows(1) == slice(4, 4)


def test_layout_of_no_clients():
    layout = RankLayout([])
    assert (layout.ranks, layout.offsets, layout.total, layout.max_rank, layout.num_clients) == ((), (0,), 0, 0, 0)


def test_layout_is_a_value():
    assert RankLayout([1, 2]) == RankLayout((1, 2)) == RankLayout(torch.tensor([1, 2])) and hash(RankLayout([1, 2])) == hash(RankLayout([1, 2]))
    assert RankLayout([1, 2]) != RankLayout([2, 1]) and RankLayout([1]) != (1,)


@pytest.mark.parametrize(
    ("ranks", "error", "text"),
    [
        ([4, -1], ValueError, r"^ranks: expected integers >= 0, got -1 for client 1"),
        ([4.0], TypeError, r"^ranks: .*got 4\.0"),
        ([True], TypeError, r"^ranks: .*got True"),
        ("44", TypeError, r"^ranks: .*got '44'"),
        (4, TypeError, r"^ranks: .*got 4"),
        (torch.tensor([1.0]), TypeError, r"^ranks: .*float32"),
        (torch.tensor([[1]]), TypeError, r"^ranks: .*\(1, 1\)"),
    ],
)
def test_layout_refuses(ranks, error, text):
    with pytest.raises(error, match=text):
        RankLayout(ranks)


@pytest.mark.parametrize("client", [-1, 2])
def test_layout_refuses_a_client_it_does_not_have(client):
    with pytest.raises(IndexError, match=rf"^client: expected 0 <= client < 2, got {client}"):
        RankLayout([4, 4]).rows(client)


def test_from_lengths_places_clients_one_after_another():
    seg = Segments.from_lengths([3, 0, 2])
    assert owners(seg) == [0, 0, 0, 2, 2] and seg.index is None and (seg.num_rows, seg.num_clients) == (5, 3)
    assert keys_by_row(seg) == {0: 0, 1: 1, 2: 2, 3: 0, 4: 1}
    keys = torch.tensor([9, 8, 7, 6, 5])
    assert keys_by_row(Segments.from_lengths([3, 0, 2], row_keys=keys)) == {0: 9, 1: 8, 2: 7, 3: 6, 4: 5}


def test_contiguous_clients_in_any_order_need_no_gather():
    seg = Segments.from_ids([2, 2, -1, 0, 0, 0, -1])
    assert seg.index is None and owners(seg) == [2, 2, -1, 0, 0, 0, -1]
    assert keys_by_row(seg) == {0: 0, 1: 1, 3: 0, 4: 1, 5: 2}
    assert Segments.from_ids([0, 1, 0]).index is not None


@pytest.mark.parametrize("ids", [[], [-1], [-1, -1, -1]])
def test_batches_without_clients(ids):
    seg = Segments.from_ids(ids, num_clients=2)
    assert owners(seg) == ids and seg.lengths == [0, 0] and seg.num_rows == len(ids)
    assert Segments.from_ids(ids).num_clients == 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.integers(-1, 4), max_size=40), st.booleans(), st.integers(0, 3))
def test_from_ids_keeps_every_row_with_its_owner_and_key(ids, given_keys, extra_clients):
    keys = [1 << 40 | (17 * i) for i in range(len(ids))]
    count = max(ids, default=-1) + 1 + extra_clients
    seg = Segments.from_ids(ids, row_keys=torch.tensor(keys, dtype=torch.int64) if given_keys else None, num_clients=count)
    assert owners(seg) == ids and seg.num_clients == count
    seen: dict[int, int] = {}
    expected = {}
    for row, k in enumerate(ids):
        if k >= 0:
            expected[row] = keys[row] if given_keys else seen.get(k, 0)
            seen[k] = seen.get(k, 0) + 1
    assert keys_by_row(seg) == expected
    for start, length in zip(seg.starts, seg.lengths, strict=True):
        rows = [row for _, row in _rows(seg, start, length)]
        assert rows == sorted(rows)  # a client's rows keep their order: the order of its sums


@pytest.mark.parametrize(
    ("build", "error", "text"),
    [
        (lambda: Segments.from_lengths([2, -3]), ValueError, r"^lengths: .*got -3 for client 1"),
        (lambda: Segments.from_lengths([2.5]), TypeError, r"^lengths: "),
        (lambda: Segments.from_ids([0, -2]), ValueError, r"^ids: .*got -2"),
        (lambda: Segments.from_ids([0, 3], num_clients=3), ValueError, r"^ids: expected ids below num_clients = 3, got 3"),
        (lambda: Segments.from_ids(torch.tensor([0.5])), TypeError, r"^ids: "),
        (lambda: Segments.from_ids([0, 1], row_keys=torch.zeros(3, dtype=torch.int64)), ValueError, r"^row_keys: .* shape \(2,\).*\(3,\)"),
        (lambda: Segments.from_lengths([2], row_keys=torch.zeros(2)), ValueError, r"^row_keys: .*float32"),
        (lambda: Segments.from_lengths([2], row_keys=[0, 1]), ValueError, r"^row_keys: .*list"),
    ],
)
def test_segments_refuse(build, error, text):
    with pytest.raises(error, match=text):
        build()


def test_a_plain_scale_keeps_all_its_digits_in_float64():
    scale = 8 / 3
    assert RankLayout([2, 3]).scales(scale, torch.device("cpu"), torch.float64).tolist() == [scale, scale]
    assert RankLayout([2, 3]).scales([scale, 0.1], torch.device("cpu"), torch.float64).tolist() == [scale, 0.1]


def test_a_layout_does_not_change():
    layout = RankLayout([4, 0, 2])
    for name in ("ranks", "offsets", "total", "max_rank", "num_clients", "other"):
        with pytest.raises(AttributeError, match=r"RankLayout does not change|has no setter"):
            setattr(layout, name, (1,))
        with pytest.raises(AttributeError):
            delattr(layout, name)
    assert layout.ranks == (4, 0, 2) and layout.offsets == (0, 4, 4, 6) and {layout: 1}[RankLayout([4, 0, 2])] == 1
    assert copy.deepcopy(layout) == layout == pickle.loads(pickle.dumps(layout))


def test_lists_that_modules_share_travel_once():
    one, other = (3, 0, 2), (1, 1, 1)
    lists = [one, other, one, one]
    packed = joined(lists)
    assert packed == [-3, 0, 1, 0, 0, 3, 0, 2, 1, 1, 1]
    assert [tuple(own_list(packed, m, 4)) for m in range(4)] == lists
    assert len(joined([tuple(range(100))] * 240)) == 1 + 240 + 100
    plain = joined([[3, 0], [2, 2]])
    assert plain == [3, 0, 2, 2] and [own_list(plain, m, 2) for m in range(2)] == [[3, 0], [2, 2]]
    assert joined([]) == joined([()] * 3) == [] and list(own_list([], 1, 3)) == []
