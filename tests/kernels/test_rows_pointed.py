"""Constants that are read or written where data say: each way gives rows to the sequence that they are of, or is refused by the layer's name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from row_cases import WIDTH, carrying, constants, drawn_rows, right, whole

from hetlora_kernels.peft import client_segments


def zeros(x):
    return torch.zeros(x.shape, dtype=x.dtype, device=x.device)


def marked(x, *index):
    """[batch, seq, n] constants: 0, and 1 where `index` points, of [batch, seq]."""
    mask = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device)
    mask[index] = 1.0
    return mask.flip(0)[..., None].expand_as(x)


def marked_one_by_one(x):
    mask = torch.zeros(x.shape[:2], dtype=x.dtype, device=x.device)
    for row, places in enumerate(whole(x)[:, :2] % x.shape[1]):
        mask[row, places] = 1.0
    return mask.flip(0)[..., None] + x.flip(0)


def set_by_mask(x):
    out = zeros(x)
    out[x > 0] = 1.0
    return out.flip(0)


def table(x):
    """[batch, n, n] constants."""
    return constants(x)[:WIDTH].expand(len(x), WIDTH, WIDTH)


# Read or written within each sequence. The batch is reversed on the way, so that the shape alone would give the rows to others.
WITHIN = {
    "take_along_dim": lambda x: table(x).take_along_dim(x.argsort(-1), 1).flip(0),
    "take_along_dim, broadcast": lambda x: constants(x)[None].take_along_dim(whole(x)[..., None], 1).flip(0),
    "take_along_dim, named": lambda x: torch.take_along_dim(table(x), dim=1, indices=x.argsort(-1)).flip(0),
    "gather": lambda x: table(x).gather(1, x.argsort(-1)).flip(0),
    "embedding": lambda x: F.embedding(whole(x), constants(x)).flip(0),
    "where": lambda x: torch.where(x > 0, constants(x)[0], constants(x)[1]).flip(0),
    "masked_fill": lambda x: zeros(x).masked_fill(x > 0, 1.0).flip(0),
    "set by a mask": set_by_mask,
    "set by a mask of tokens": lambda x: marked(x, x[..., 0] > 0),
    "index_put by a mask": lambda x: zeros(x).index_put((x > 0,), torch.ones((), dtype=x.dtype, device=x.device)).flip(0),
    "set at a place of each": lambda x: marked(x, torch.arange(len(x), device=x.device), whole(x)[:, 0] % x.shape[1]),
    "set row by row, beside data": marked_one_by_one,
    "scatter": lambda x: zeros(x).scatter(1, whole(x)[..., None].expand_as(x) % x.shape[1], 1.0).flip(0),
    "scatter_add": lambda x: zeros(x).scatter_add(2, x.argsort(-1)[..., :2], torch.ones_like(x)).flip(0),
}


@pytest.mark.parametrize("way", WITHIN)
def test_constants_chosen_within_a_sequence(way, device):
    model, _ = carrying(lambda layer, x: layer(WITHIN[way](x)).flip(0), device)
    x, ids = drawn_rows(3, 5, device=device), [2, 0, 1]
    with client_segments(model, ids):
        out = model(x)
    for row, client in enumerate(ids):
        with client_segments(model, [client]):
            torch.testing.assert_close(out[row : row + 1], model(x[row : row + 1]), rtol=1e-10, atol=1e-10)


def order(x):
    return x[:, 0, 0].argsort()


def spread(x):
    return order(x).view(-1, 1, 1).expand_as(x)


def of_batch(x):
    """[batch, seq, n] constants, all different."""
    return torch.linspace(-1, 1, x.numel(), dtype=x.dtype, device=x.device).view_as(x)


# Row i is chosen by an index that is the sequence's at place order[i].
ORDERED = {
    "index": lambda x: of_batch(x)[order(x)],
    "index_select": lambda x: of_batch(x).index_select(0, order(x)),
    "gather": lambda x: of_batch(x).gather(0, spread(x)),
    "take_along_dim": lambda x: torch.take_along_dim(of_batch(x), spread(x), 0),
    "take_along_dim, named": lambda x: torch.take_along_dim(of_batch(x), indices=spread(x), dim=0),
    "take_along_dim, method": lambda x: of_batch(x).take_along_dim(spread(x), 0),
    "take_along_dim, broadcast": lambda x: of_batch(x).take_along_dim(order(x).view(-1, 1, 1), dim=0),
    "take_along_dim of data": lambda x: (x.take_along_dim(spread(x), 0) * 0) + of_batch(x),
}


@pytest.mark.parametrize("way", ORDERED)
def test_constants_chosen_by_an_order_of_the_batch(way, device):
    model, bank = carrying(lambda layer, x: layer(ORDERED[way](x)), device)
    x = drawn_rows(3, 5, device=device)
    x[:, 0, 0] = torch.tensor([3.0, 1.0, 2.0])
    with client_segments(model, [0, 1, 2]):
        right(model, bank, [1, 2, 0], ORDERED[way](x), model(x))


def set_at(x, index, value):
    out = zeros(x)
    out[index] = value
    return out


def counted(x):
    """A whole number, 1, that the data give, as a tensor."""
    return (x[:, 0, 0] > -9).long().min()


REFUSED = {
    "take_along_dim of the whole": lambda x: of_batch(x).take_along_dim(whole(x).flatten()).view(len(x), -1, 1).expand_as(x),
    "take": lambda x: of_batch(x).take(x.argsort(-1)),
    "masked_select": lambda x: of_batch(x).masked_select(x > -9).view_as(x),
    "mask": lambda x: of_batch(x)[x[:, 0, 0] > -9],
    "nonzero": lambda x: of_batch(x)[(x[:, 0, 0] > -9).nonzero()[:, 0]],
    "bucketize": lambda x: of_batch(x)[torch.bucketize(x[:, 0, 0].contiguous(), torch.zeros(1, dtype=x.dtype))],
    "searchsorted": lambda x: of_batch(x)[torch.searchsorted(torch.zeros(1, dtype=x.dtype), x[:, 0, 0].contiguous())],
    "repeat_interleave": lambda x: of_batch(x).repeat_interleave((x[:, 0, 0] > -9).long(), 0),
    "embedding of data": lambda x: F.embedding(torch.arange(x.shape[0] * x.shape[1]).view(x.shape[:2]).flip(0), x.reshape(-1, WIDTH)),
    "set": lambda x: set_at(x, order(x), of_batch(x)),
    "set by a mask, row by row": lambda x: set_at(x, x[..., 0] > -9, of_batch(x).view(-1, WIDTH)),
    "set by constants and data, at one place": lambda x: set_at(x, (torch.zeros(len(x), dtype=torch.int64), order(x)), 1.0),
    "set in a column": lambda x: set_at(x, (order(x), 0), 1.0),
    "set where two numbers say": lambda x: set_at(x, (order(x), order(x)), 1.0),
    "index_put": lambda x: zeros(x).index_put((order(x),), of_batch(x)),
    "index_copy": lambda x: zeros(x).index_copy(0, order(x), of_batch(x)),
    "index_add": lambda x: zeros(x).index_add(0, order(x), of_batch(x)),
    "index_fill": lambda x: zeros(x).index_fill(0, order(x)[:2], 1.0),
    "index_reduce": lambda x: zeros(x).index_reduce(0, order(x), of_batch(x), "amax"),
    "scatter": lambda x: zeros(x).scatter(0, spread(x), of_batch(x)),
    "scatter of a number": lambda x: zeros(x).scatter(0, spread(x)[:2], 1.0),
    "scatter of whole rows": lambda x: zeros(x[:, 0]).scatter(0, spread(x)[:, 0], of_batch(x)[:, 0])[:, None].expand_as(x),
    "scatter_add": lambda x: zeros(x).scatter_add(0, spread(x), of_batch(x)),
    "scatter_reduce": lambda x: zeros(x).scatter_reduce(0, spread(x), of_batch(x), "sum"),
    "masked_scatter": lambda x: zeros(x).masked_scatter(x > -9, of_batch(x)),
    "put": lambda x: zeros(x).put(x.argsort(-1), of_batch(x)),
    "list": lambda x: of_batch(x)[order(x).tolist()],
    "list, second": lambda x: of_batch(x).transpose(0, 1)[:, order(x).tolist()].transpose(0, 1),
    "array": lambda x: of_batch(x)[order(x).numpy()],
    "tensor of a list": lambda x: of_batch(x).index_select(0, torch.tensor(order(x).tolist())),
    "set, list": lambda x: set_at(x, order(x).tolist(), of_batch(x)),
    "set, array": lambda x: set_at(x, order(x).numpy(), of_batch(x)),
    "numbers": lambda x: torch.stack([of_batch(x)[int(row)] for row in order(x)]),
    "rows in a list": lambda x: (lambda rows: torch.stack([rows[row] for row in order(x)]))(list(of_batch(x))),
    "rows sorted": lambda x: torch.stack([of_batch(x).select(0, row) for row in sorted(range(len(x)), key=lambda row: float(x[row, 0, 0]))]),
    "roll": lambda x: of_batch(x).roll(int(counted(x)), 0),
    "roll, from a float": lambda x: of_batch(x).roll(int(x[:, 0, 0].max().item()), 0),
    "narrow": lambda x: of_batch(x).repeat(2, 1, 1).narrow(0, int(counted(x)), len(x)),
    "narrow, tensor": lambda x: of_batch(x).repeat(2, 1, 1).narrow(0, counted(x), len(x)),
    "slice": lambda x: of_batch(x).repeat(2, 1, 1)[counted(x).item() :][: len(x)],
    "slice, tensor": lambda x: of_batch(x).repeat(2, 1, 1)[counted(x) :][: len(x)],
    "split": lambda x: of_batch(x).repeat(2, 1, 1).split([int(counted(x)), len(x), len(x) - int(counted(x))])[1],
    "a range": lambda x: of_batch(x).index_select(0, (torch.arange(len(x)) + counted(x).item()) % len(x)),
}


@pytest.mark.parametrize("way", REFUSED)
def test_constants_of_which_nothing_says_whose_they_are(way):
    model, _ = carrying(lambda layer, x: layer(REFUSED[way](x)))
    x = drawn_rows(3, 5)
    x[:, 0, 0] = torch.tensor([3.0, 1.0, 2.0])
    with client_segments(model, [0, 1, 2]), pytest.raises(ValueError, match=r"whose the rows of layer 'layer' are; name them"):
        model(x)


def test_what_is_the_datas_already_stays_theirs(device):
    """Constants written where data say do not take a row from its sequence, nor do constants beside data."""

    def given(x):
        rows = x.flip(0)
        rows[order(x)[:2], 0] = 1.0
        return rows + of_batch(x)[order(x).tolist()]

    model, bank = carrying(lambda layer, x: layer(given(x)), device)
    x = drawn_rows(3, 5, device=device)
    with client_segments(model, [0, 1, 2]):
        right(model, bank, [2, 1, 0], given(x), model(x))
