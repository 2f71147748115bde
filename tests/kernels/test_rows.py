"""Whose rows a layer gets: followed through models that move rows about, right where they can be followed, else refused by the layer's name."""

from __future__ import annotations

import gc
import threading

import pytest
import torch
import torch.nn.functional as F
from row_cases import FOLLOWED, WIDTH, Model, carrying, drawn_rows, filled, linear, right, through_sorted
from torch import nn

from hetlora_kernels.peft import SEQUENCE_STRIDE, attach, client_segments
from hetlora_kernels.peft.attached import attachment
from hetlora_kernels.peft.batch import _KEPT, known_forms
from hetlora_kernels.peft.owners import Owners


@pytest.mark.parametrize("shape", [(3, 5), (4, 4), (2, 6), (1, 4)])
@pytest.mark.parametrize("way", FOLLOWED)
def test_rows_that_move_keep_their_client(way, shape, device):
    """Output and gradients are those of each sequence alone, several times over and at another batch size; the order may depend on the data."""
    torch.manual_seed(0)
    model = Model(FOLLOWED[way]).double().to(device)
    bank = filled({"layer": (WIDTH, WIDTH)}, [3, 2], device=device)
    attach(model, bank)
    for count, seed in ((shape[0], 0), (shape[0], 1), (shape[0] + 1, 2)):
        x = torch.randn(count, shape[1], WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(device)
        ids = [0, 1, 1, 0, 1][:count]
        alone = [Model(FOLLOWED[way]).double().to(device) for _ in range(2)]
        for client, single in enumerate(alone):
            rows = bank.layouts["layer"].rows(client)
            single.layer.weight.data = model.layer.weight + bank.bt["layer"].detach()[rows].t() @ bank.a["layer"].detach()[rows]
        bank.a["layer"].grad = None
        with client_segments(model, ids):
            out = model(x)
            out[0].square().sum().backward()  # a loss of client 0 alone
        if way != "index_add":  # there half of all rows, whosever they are
            expected = torch.stack([alone[client](x[row : row + 1])[0] for row, client in enumerate(ids)])
            torch.testing.assert_close(out, expected, rtol=1e-10, atol=1e-10)
        else:
            both = torch.stack([alone[client](x)[row] for row, client in enumerate(ids)])
            torch.testing.assert_close(out, both, rtol=1e-10, atol=1e-10)
        assert not bool(bank.a["layer"].grad[bank.layouts["layer"].rows(1)].any())


def test_known_layers_are_followed_no_more(device):
    """What moves in a fixed order is learnt at the first call; what the data move is followed at every call."""
    for way, known in (("batch first", {2: 0}), ("sequence first", {2: 1}), ("flattened", {1: "flat"}), ("sorted", {})):
        model = Model(FOLLOWED[way]).double().to(device)
        attach(model, filled({"layer": (WIDTH, WIDTH)}, [3, 2], device=device))
        for _ in range(2):
            with client_segments(model, [0, 1, 1]):
                model(torch.randn(3, 5, WIDTH, dtype=torch.float64, device=device))
        assert {key: form for key, form in known_forms(model.layer)[model.training].items() if key >= 0} == known


def test_ids_per_token_of_one_sequence(device):
    """Each token has its own client, as in a batch of several sequences; so has each row of a flattened one."""
    for way in (FOLLOWED["batch first"], lambda layer, x: layer(x.reshape(-1, WIDTH)).view_as(x)):
        model, bank = carrying(way, device)
        x = drawn_rows(1, 4, device=device)
        with client_segments(model, [[0, 1, -1, 2]]):
            out = model(x)
        right(model, bank, [0, 1, 2], x[0, [0, 1, 3]], out[0, [0, 1, 3]])
        torch.testing.assert_close(out[0, 2], x[0, 2] @ model.layer.weight.t(), rtol=1e-10, atol=1e-10)


def test_ids_of_more_sequences_than_the_model_is_called_with():
    model, _ = carrying(FOLLOWED["batch first"])
    x = drawn_rows(3, 5)
    with client_segments(model, [0, 1, 2]), pytest.raises(ValueError, match=r"^ids: expected one client per sequence.*got shape \(3,\)"):
        model(x[1:2])


def test_a_layer_called_twice_with_rows_in_other_orders(device):
    """Neither answer stands for the other, in this call or in later ones."""
    model, bank = carrying(lambda layer, x: (layer(x), layer(x.roll(1, 0))), device)
    x = drawn_rows(3, 5, device=device)
    for _ in range(3):
        with client_segments(model, [0, 1, 2]):
            first, second = model(x)
        right(model, bank, [0, 1, 2], x, first)
        right(model, bank, [2, 0, 1], x.roll(1, 0), second)


def test_an_order_is_that_of_its_mode(device):
    model, bank = carrying(lambda layer, x: layer(x.transpose(0, 1)).transpose(0, 1) if model.training else layer(x), device)
    x = drawn_rows(4, 4, device=device)
    for training in (False, True, False, True):
        model.train(training)
        with client_segments(model, [0, 1, 2, 0]):
            right(model, bank, [0, 1, 2, 0], x, model(x))


def test_a_layer_first_reached_after_many_calls(device):
    """It is followed no more, and nothing is assumed: it is refused once and followed again."""

    class Late(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.layer, self.reached = linear(), linear(), False

        def forward(self, x):
            return self.layer(x.flip(0)) if self.reached else self.first(x)

    model = Late().double().to(device)
    bank = filled({"first": (WIDTH, WIDTH), "layer": (WIDTH, WIDTH)}, [3, 2, 4], device=device)
    attach(model, bank)
    x = drawn_rows(3, 5, device=device)
    with client_segments(model, [0, 1, 2]):
        for _ in range(18):
            model(x)
        model.reached = True
        with pytest.raises(ValueError, match=r"whose the rows of layer 'layer' are.*call the model again"):
            model(x)
        for _ in range(2):
            right(model, bank, [2, 1, 0], x.flip(0), model(x))


def test_another_thread_does_not_run_as_the_blocks_clients(device):
    model, bank = carrying(FOLLOWED["batch first"], device)
    x, told = drawn_rows(3, 5, device=device), []

    def other(module):
        try:
            module(x)
        except RuntimeError as error:
            told.append(str(error))

    with client_segments(model, [0, 1, 2]):
        for module in (model, model.layer):
            thread = threading.Thread(target=other, args=(module,))
            thread.start()
            thread.join()
        right(model, bank, [0, 1, 2], x, model(x))
    assert told == ["client_segments: another thread runs this model while a block names its clients; give each thread a model of its own"] * 2


def test_an_interrupt_ends_the_following(device):
    """It goes past torch's hooks: the next call of the model starts anew, with the same answers."""

    def way(layer, x):
        if model.interrupted:
            raise KeyboardInterrupt
        return layer(x.flip(0))

    model, bank = carrying(way, device)
    x = drawn_rows(3, 5, device=device)
    with client_segments(model, [0, 1, 2]):
        model.interrupted = True
        with pytest.raises(KeyboardInterrupt):
            model(x)
        model.interrupted = False
        for _ in range(2):
            right(model, bank, [2, 1, 0], x.flip(0), model(x))
            assert torch.overrides._len_torch_function_stack() == 0


def test_what_is_kept_is_bounded():
    """Of a bank of one client, whose batch lives as long as it does; owners are freed without the collector of cycles."""
    model, _ = carrying(FOLLOWED["batch first"], ranks=[2])
    for length in range(1, _KEPT + 100):
        model(drawn_rows(1, length))
    assert len(attachment(model).batch._rows) <= _KEPT
    model, _ = carrying(through_sorted)

    def alive():
        return sum(type(one) is Owners for one in gc.get_objects())

    gc.collect()
    gc.disable()
    before = alive()
    try:
        for _ in range(3):
            with client_segments(model, [0, 1, 2]), torch.no_grad():
                model(drawn_rows(3, 5))
        assert alive() == before
    finally:
        gc.enable()


def packed_by_length(layer, x):
    """Rows beyond a length that the data give are left out: as many as in a batch without padding, or others."""
    lengths = (x[..., 0] > -9).sum(1).tolist()
    out = layer(torch.cat([row[:length] for row, length in zip(x, lengths, strict=True)]))
    return [part.sum(0) for part in out.split(lengths)]


def test_a_length_that_is_data_is_not_taken_for_a_shape(device):
    """The first batch is full, so that its rows are in the order of a flattened one; in the second it is the same number of rows divided otherwise."""
    model = Model(packed_by_length).double().to(device)
    bank = filled({"layer": (WIDTH, WIDTH)}, [3, 2], device=device)
    attach(model, bank)
    for lengths in ([4, 4], [2, 6], [6, 2]):
        x = torch.randn(2, 4 if lengths == [4, 4] else 6, WIDTH, dtype=torch.float64, device=device)
        for row, length in enumerate(lengths):
            x[row, length:, 0] = -10
        with client_segments(model, [1, 0]):
            out = model(x)
        for row, client in enumerate((1, 0)):
            rows = bank.layouts["layer"].rows(client)
            weight = model.layer.weight + bank.bt["layer"][rows].t() @ bank.a["layer"][rows]
            torch.testing.assert_close(out[row], (x[row, : lengths[row]] @ weight.t()).sum(0), rtol=1e-10, atol=1e-10)


def half_filled(x):
    return torch.zeros(len(x), 7, WIDTH, dtype=x.dtype).index_put_((torch.tensor([1, 0]), torch.tensor([2, 3])), x[:2, 0])


def put_somewhere(x):
    return torch.zeros(len(x), 7, WIDTH, dtype=x.dtype).view(-1).put_(torch.arange(WIDTH), x[0, 0]).view(len(x), 7, WIDTH)


def convolved(x):
    """Without a batch: the sequences are its channels, and are mixed."""
    return F.conv1d(x[..., 0], torch.ones(len(x), len(x), 1, dtype=x.dtype))[..., None].expand_as(x)


REFUSED = {
    "softmax over the batch": lambda layer, x: layer(x.softmax(axis=0)),
    "sums along the batch": lambda layer, x: layer(x.cumsum(axis=0)),
    "greatest of the batch": lambda layer, x: layer(x.topk(len(x), axis=0)[0]),
    "convolution without a batch": lambda layer, x: layer(convolved(x)),
    "numpy": lambda layer, x: layer(torch.from_numpy(x.detach().numpy()[::-1].copy())),
    "lists": lambda layer, x: layer(torch.tensor(x.tolist()[::-1], dtype=x.dtype)),
    "vmap": lambda layer, x: layer(torch.vmap(lambda one: 2 * one)(x).flip(0)),
    "unknown function, then flattened": lambda layer, x: layer(torch.special.i0(x).reshape(-1, WIDTH)),
    "unknown function, a square": lambda layer, x: layer(torch.special.i0(x[:, : len(x)])),
    "constants, as many as data say": lambda layer, x: layer(torch.ones_like(x).repeat_interleave((x[:, 0, 0] > -9).long(), 0)),
    "rows of several sequences added": lambda layer, x: layer(x.sum(0)),
    "constants beside data": lambda layer, x: layer(torch.cat([torch.zeros(len(x), WIDTH, dtype=x.dtype), x[:, 0]])),
    "buffers half filled": lambda layer, x: layer(half_filled(x)),
    "written by an unknown function": lambda layer, x: layer(put_somewhere(x)),
}


@pytest.mark.parametrize("way", REFUSED)
def test_what_cannot_be_followed_is_refused_by_name(way):
    model = Model(REFUSED[way]).double()
    attach(model, filled({"layer": (WIDTH, WIDTH)}, [3, 2]))
    with (
        client_segments(model, [0, 1, 1]),
        pytest.raises(ValueError, match=r"^ids: expected one client per sequence.*whose the rows of layer 'layer' are; name them"),
    ):
        model(torch.randn(3, 5, WIDTH, dtype=torch.float64))


def test_constants_go_by_their_shape(device):
    """What is made of weights and constants alone, as learned queries, is no sequence's data: one for each sequence of the batch."""
    model, bank = carrying(lambda layer, x: layer(model.queries.repeat(len(x), 1, 1) + torch.zeros_like(x)), device)
    model.queries = nn.Parameter(drawn_rows(5, device=device))
    x = drawn_rows(3, 5, device=device)
    for _ in range(2):
        with client_segments(model, [2, 0, 1]):
            right(model, bank, [2, 0, 1], model.queries.expand(3, 5, WIDTH), model(x))


def test_a_layer_called_without_its_model(device):
    """No input names the sequences: only a shape that leaves no choice is taken."""
    model = Model(FOLLOWED["batch first"]).double().to(device)
    attach(model, filled({"layer": (WIDTH, WIDTH)}, [3, 2], device=device))
    with client_segments(model, [0, 1, 1]):
        model.layer(torch.randn(3, 5, WIDTH, dtype=torch.float64, device=device))
        for shape in ((3, 3), (3,), (6,), (5, 3)):
            with pytest.raises(ValueError, match="layer 'layer'"):
                model.layer(torch.randn(*shape, WIDTH, dtype=torch.float64, device=device))


def test_rows_are_named_by_the_user(device):
    """For a part of the model, the longest name first; -1 = base only; ids of its own shape or of all its rows."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.tower = nn.ModuleDict({"first": linear(), "second": linear()})

        def forward(self, x, patches):
            return self.tower["second"](self.tower["first"](patches)).sum() + x.sum()

    model = Two().double().to(device)
    bank = filled({"tower.first": (WIDTH, WIDTH), "tower.second": (WIDTH, WIDTH)}, [3, 2], device=device)
    x, patches = torch.randn(2, 3, WIDTH, dtype=torch.float64, device=device), torch.randn(5, WIDTH, dtype=torch.float64, device=device)
    seen = []
    attach(model, bank)
    for layer in model.tower.values():
        layer.register_forward_hook(lambda module, args, out: seen.append((args[0].detach(), out.detach(), module)))
    owners = {"tower": [0, 1, 1, -1, 0], "tower.second": [1, 1, 0, 0, -1]}
    with client_segments(model, [0, 1], rows=owners):
        model(x, patches)
    for (given, out, module), (name, own) in zip(seen, (("tower.first", owners["tower"]), ("tower.second", owners["tower.second"])), strict=True):
        for row, client in enumerate(own):
            rows = bank.layouts[name].rows(client) if client >= 0 else slice(0, 0)
            weight = module.weight + bank.bt[name].detach()[rows].t() @ bank.a[name].detach()[rows]
            torch.testing.assert_close(out[row], given[row] @ weight.t(), rtol=1e-10, atol=1e-10)
    for bad, error, text in (
        ({"tower": [0, 1]}, ValueError, r"^rows: expected shape \(5,\), the rows of layer 'tower\.first', got \(2,\)"),
        ({"tower": [0, 1, 2, 0, 0]}, ValueError, r"^rows: expected -1 \(base only\) or a client below 2 for 'tower', got values 0 \.\. 2"),
        ({"nowhere": [0]}, ValueError, r"^rows: no adapted layer is in a part 'nowhere'"),
        ({"tower": [0.5] * 5}, TypeError, r"^rows: expected integers, the clients of the rows of 'tower'"),
    ):
        with pytest.raises(error, match=text), client_segments(model, [0, 1], rows=bad):
            model(x, patches)


def test_masks_of_routed_rows_do_not_depend_on_the_batch(device):
    """A row's mask is that of its sequence and its place among the sequence's rows in this call."""
    model = Model(through_sorted).double().to(device)
    attach(model, filled({"layer": (WIDTH, WIDTH)}, [3, 2], device=device), dropout=0.5)
    x = torch.randn(3, 4, WIDTH, dtype=torch.float64, device=device)
    seeds = torch.tensor([5, -6])

    def run(rows, ids):
        with client_segments(model, ids, seeds=seeds):
            return model(x[rows])

    whole = run([0, 1, 2], [1, 0, 1])
    torch.testing.assert_close(run([0, 2], [1, 1]), whole[[0, 2]], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(run([1], [0]), whole[[1]], rtol=1e-10, atol=1e-10)
    assert SEQUENCE_STRIDE > 4


# ---------------------------------------------------------------- backward outside, checkpointing by hand


class Checkpointed(nn.Module):
    def __init__(self, reentrant):
        super().__init__()
        self.layer, self.reentrant = linear(), reentrant

    def forward(self, x):
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=self.reentrant)


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("clients", [1, 2])
def test_recomputation_after_the_block_is_refused(clients, reentrant, device):
    model = Checkpointed(reentrant).double().to(device)
    attach(model, filled({"layer": (WIDTH, WIDTH)}, [3] * clients, device=device), dropout=0.5)
    with client_segments(model, [0, clients - 1], seeds=torch.arange(clients)):
        loss = model(torch.randn(2, 5, WIDTH, dtype=torch.float64, device=device, requires_grad=True)).sum()
    with pytest.raises(RuntimeError, match=r"client_segments"):
        loss.backward()
    with client_segments(model, [0, clients - 1], seeds=torch.arange(clients)):
        model(torch.randn(2, 5, WIDTH, dtype=torch.float64, device=device, requires_grad=True)).sum().backward()
