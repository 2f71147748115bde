"""Constants that are read or written where data say: each way gives rows to the sequence that they are of, or is refused by the layer's name."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from row_cases import WIDTH, carrying, constants, drawn_rows, right, whole

from hetlora_kernels.peft import client_segments


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
