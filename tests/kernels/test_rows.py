"""Whose rows a layer gets: followed through models that move rows about, right where they can be followed, else refused by the layer's name."""

from __future__ import annotations

import copy
import functools
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import hetlora_kernels as hk
from hetlora_kernels.peft import SEQUENCE_STRIDE, attach, client_segments, detach
from hetlora_kernels.peft.attached import attachment
from hetlora_kernels.peft.batch import _KEPT, known_forms
from hetlora_kernels.peft.owners import Owners

WIDTH = 8


def filled(shapes, ranks, seed=0, device="cpu"):
    bank = hk.AdapterBank(shapes, ranks, dtype=torch.float64, device=device)
    g = torch.Generator().manual_seed(seed)
    for factor in bank.parameters():
        factor.data.copy_(torch.randn(factor.shape, generator=g, dtype=torch.float64))
    return bank


def linear():
    return nn.Linear(WIDTH, WIDTH, bias=False)


class Model(nn.Module):
    """`layer`, the adapted one, inside some movement of rows: `way(layer, x)` with x [batch, seq, n]."""

    def __init__(self, way):
        super().__init__()
        self.layer, self.way = linear(), way

    def forward(self, x):
        return self.way(self.layer, x)


def order_of(x):
    """An order of all rows that the data decide, as a router's: [rows] indices."""
    return x.reshape(-1, WIDTH)[:, 0].argsort()


def through_sorted(layer, x):
    flat, order = x.reshape(-1, WIDTH), order_of(x)
    out = torch.zeros_like(flat)
    out[order] = layer(flat[order])
    return out.view_as(x)


def through_index_add(layer, x):
    flat, order = x.reshape(-1, WIDTH), order_of(x)
    half = order[: len(order) // 2]  # as many as batch and length may divide
    return torch.zeros_like(flat).index_add_(0, half, layer(flat.index_select(0, half))).view_as(x)


def through_gather(layer, x):
    flat, order = x.reshape(-1, WIDTH), order_of(x)
    where = order[:, None].expand(-1, WIDTH)
    return torch.zeros_like(flat).scatter_(0, where, layer(F.gelu(flat.gather(0, where)))).view_as(x)


def through_buffers(layer, x):
    """Experts with a fixed capacity: [experts, capacity, n], all written."""
    flat, order = x.reshape(-1, WIDTH), order_of(x)
    slots = torch.zeros(len(x), len(order) // len(x), WIDTH, dtype=x.dtype, device=x.device)
    slots[torch.arange(len(order), device=x.device) % len(x), torch.arange(len(order), device=x.device) // len(x)] = flat[order]
    out = layer(slots).transpose(0, 1).reshape(-1, WIDTH)
    return torch.empty_like(flat).index_copy_(0, order, out).view_as(x)


def mask_of(x):
    return x[..., 0] > 0


def through_mask(layer, x):
    out = x.clone()
    out[mask_of(x)] = layer(x[mask_of(x)])
    return out


def constants(x):
    """[16, n]."""
    return torch.linspace(-1, 1, 16 * WIDTH, dtype=x.dtype, device=x.device).view(16, WIDTH)


def whole(x):
    """int64 [batch, seq]: numbers that the data give."""
    return (x[..., 0].abs() * 4).long().clamp(max=15)


def with_data_set(x):
    out = x.clone()
    out.data = x.flip(0)
    return out


FOLLOWED = {
    "batch first": lambda layer, x: layer(x),
    "sequence first": lambda layer, x: layer(x.transpose(0, 1).contiguous()).transpose(0, 1),
    "flattened": lambda layer, x: layer(torch.relu(x.reshape(-1, WIDTH))).view_as(x),
    "flattened sequence first": lambda layer, x: layer(x.transpose(0, 1).reshape(-1, WIDTH)).view(x.shape[1], x.shape[0], WIDTH).transpose(0, 1),
    "pooled": lambda layer, x: layer(x[:, 0])[:, None] + x,
    "mean": lambda layer, x: layer(x.mean(1)).unsqueeze(1).expand_as(x),
    "reversed batch": lambda layer, x: layer(x.flip(0)).flip(0),
    "heads": lambda layer, x: layer(torch.stack([x, 2 * x], 1)).sum(1),
    "repeated": lambda layer, x: layer(x.repeat_interleave(2, 0)).view(len(x), 2, *x.shape[1:]).sum(1),
    "tiled": lambda layer, x: layer(x.repeat(2, 1, 1)).view(2, *x.shape).sum(0),
    "joined": lambda layer, x: layer(torch.cat([x[1:], x[:1]])).roll(1, 0),
    "packed": lambda layer, x: torch.stack(layer(torch.cat(list(x))).split(x.shape[1])),
    "last of each": lambda layer, x: layer(x[torch.arange(len(x)), -1])[:, None] + x,
    "sorted": through_sorted,
    "index_add": through_index_add,
    "gather and scatter": through_gather,
    "buffers": through_buffers,
    "mask": through_mask,
    "data set": lambda layer, x: layer(with_data_set(x)).flip(0),
    "table indexed": lambda layer, x: layer(constants(x)[whole(x)].flip(0)).flip(0),
    "table indexed by two": lambda layer, x: layer(constants(x).view(4, 4, WIDTH)[whole(x) // 4, whole(x) % 4].flip(0)).flip(0),
    "rows of a table selected": lambda layer, x: layer(constants(x).index_select(0, whole(x).view(-1))).view_as(x),
    "table gathered": lambda layer, x: layer(constants(x)[:8].expand(len(x), 8, 8).gather(1, x.argsort(-1)).flip(0)).flip(0),
    "along an axis": lambda layer, x: layer(torch.stack([x.softmax(axis=2), x], axis=1)).sum(axis=1),
    "normal": lambda layer, x: layer(torch.normal(x, torch.zeros_like(x)).flip(0)).flip(0),
}


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


def right(model, bank, owners, given, out):
    """Whether rows `out` are the layer's of rows `given`, each with its owner's adapter."""
    for client, x, y in zip(owners, given, out, strict=True):
        rows = bank.layouts["layer"].rows(client)
        weight = model.layer.weight + bank.bt["layer"][rows].t() @ bank.a["layer"][rows]
        torch.testing.assert_close(y, x @ weight.t(), rtol=1e-10, atol=1e-10)


def carrying(way, device="cpu", ranks=(3, 2, 4)):
    torch.manual_seed(0)
    model, bank = Model(way).double().to(device), filled({"layer": (WIDTH, WIDTH)}, list(ranks), device=device)
    return attach(model, bank), bank


def drawn_rows(*shape, device="cpu"):
    return torch.randn(*shape, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(3)).to(device)


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


# ---------------------------------------------------------------- what attach takes


class Scaled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


class Router(nn.Linear):
    def forward(self, x):
        out = super().forward(x)
        return out, out.softmax(-1)


class Mixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.A_log, self.out_proj, self.in_proj = nn.Parameter(torch.zeros(WIDTH)), linear(), linear()


class Zoo(nn.Module):
    def __init__(self):
        super().__init__()
        self.good, self.scaled, self.router, self.mixer = linear(), Scaled(WIDTH, WIDTH), Router(WIDTH, 4), Mixer()
        self.table, self.attention = nn.Embedding(WIDTH, WIDTH), nn.MultiheadAttention(WIDTH, 2)


CANNOT = {
    "router": (r"'router' is a Router, which returns a tuple", (4, WIDTH)),
    "table": (r"'table' is a Embedding, no linear layer", (WIDTH, WIDTH)),
    "mixer.out_proj": (r"'mixer\.out_proj' is the Linear of a Mixer, which reads its weight past the layer", (WIDTH, WIDTH)),
    "attention.out_proj": (r"'attention\.out_proj' is the NonDynamicallyQuantizableLinear of a MultiheadAttention, which reads", (WIDTH, WIDTH)),
}


@pytest.mark.parametrize("name", CANNOT)
def test_what_cannot_carry_adapters_is_refused_and_nothing_attached(name):
    model, (text, shape) = Zoo().double(), CANNOT[name]
    before = [(type(module), dict(module.__dict__)) for module in model.modules()]
    with pytest.raises(ValueError, match=rf"^bank: module {text}.*; leave it out"):
        attach(model, hk.AdapterBank({"good": (WIDTH, WIDTH), name: shape}, [2], dtype=torch.float64))
    assert [(type(module), module.__dict__) for module in model.modules()] == before and all(p.requires_grad for p in model.parameters())
    attach(model, hk.AdapterBank({"good": (WIDTH, WIDTH), "scaled": (WIDTH, WIDTH), "mixer.in_proj": (WIDTH, WIDTH)}, [2], dtype=torch.float64))


def test_a_failure_half_way_changes_nothing(monkeypatch):
    """Of layers whose class cannot be swapped."""
    from hetlora_kernels.peft import attached

    model, own = Zoo().double(), attached._attached_class

    def failing(layer):
        if type(layer) is Scaled:
            raise TypeError("__class__ assignment: layouts differ")
        return own(layer)

    monkeypatch.setattr(attached, "_attached_class", failing)
    before = [type(module) for module in model.modules()]
    with pytest.raises(TypeError, match="layouts differ"):
        attach(model, hk.AdapterBank({"good": (WIDTH, WIDTH), "scaled": (WIDTH, WIDTH)}, [2], dtype=torch.float64))
    assert [type(module) for module in model.modules()] == before and all(p.requires_grad for p in model.parameters())
    with pytest.raises(ValueError, match="no bank is attached"):
        detach(model)


def test_a_patched_forward_is_wrapped(device):
    """Python calls the instance's forward, whatever the class says; `detach` gives it back."""
    model = nn.Sequential(linear(), linear()).double().to(device)
    own = model[0].forward
    model[0].forward = lambda x: own(x) + 1
    patched, bank = model[0].__dict__["forward"], filled({"0": (WIDTH, WIDTH), "1": (WIDTH, WIDTH)}, [2, 3], device=device)
    x, first = torch.randn(3, 5, WIDTH, dtype=torch.float64, device=device), model[0]
    base = model(x)
    attach(model, bank)
    with client_segments(model, [1, 0, 1]):
        out = model(x)
        out.sum().backward()
    for row, client in enumerate((1, 0, 1)):
        h = x[row]
        for name, module, shift in (("0", first, 1), ("1", model[1], 0)):
            rows = bank.layouts[name].rows(client)
            h = h @ (module.weight + bank.bt[name][rows].t() @ bank.a[name][rows]).t() + shift
        torch.testing.assert_close(out[row], h, rtol=1e-10, atol=1e-10)
    assert all(bool(factor.grad.any()) for factor in bank.parameters())
    detach(model)
    assert model[0].__dict__["forward"] is patched and torch.equal(model(x), base) and not any("hetlora" in key for m in model.modules() for key in vars(m))


def test_the_copy_of_a_patched_layer_computes_with_its_own_weights(device):
    model = nn.Sequential(linear()).double().to(device)
    model[0].forward = functools.partial(nn.Linear.forward, model[0])
    bank = filled({"0": (WIDTH, WIDTH)}, [2], device=device)
    twin = copy.deepcopy(attach(model, bank))
    x = drawn_rows(3, device=device)
    before = model(x)
    twin[0].weight.data.zero_()
    attachment(twin).bank.bt["0"].data.zero_()
    assert not bool(twin(x).any()) and torch.equal(model(x), before)


def test_a_weight_read_past_its_layer_is_refused(device):
    class Past(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.other = linear(), linear()

        def forward(self, x):
            return self.other(x) @ self.layer.weight.t()

    model = Past().double().to(device)
    attach(model, filled({"layer": (WIDTH, WIDTH), "other": (WIDTH, WIDTH)}, [2, 3], device=device))
    with (
        client_segments(model, [0, 1]),
        pytest.raises(ValueError, match=r"^model: it reads the weight of layer 'layer' past the layer .* leave this layer out"),
    ):
        model(torch.randn(2, 5, WIDTH, dtype=torch.float64, device=device))


def test_a_weight_that_an_embedding_shares(device):
    """The embedding's own look-up is no read past the head, which carries adapters all the same."""

    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.head = nn.Embedding(11, WIDTH), nn.Linear(WIDTH, 11, bias=False)
            self.head.weight = self.table.weight

        def forward(self, ids):
            return self.head(self.table(ids))

    model, tokens = Tied().double().to(device), torch.arange(8, device=device).view(2, 4)
    bank = filled({"head": (11, WIDTH)}, [2, 3], device=device)
    hidden, attached = model.table(tokens), attach(model, bank)
    with client_segments(attached, [1, 0]):
        out = model(tokens)
    for row, client in enumerate((1, 0)):
        rows = bank.layouts["head"].rows(client)
        torch.testing.assert_close(out[row], hidden[row] @ (model.head.weight + bank.bt["head"][rows].t() @ bank.a["head"][rows]).t(), rtol=1e-10, atol=1e-10)


def test_inputs_of_torchs_own_layers(device):
    """Sequence-first, as they are by default: of as many as the batch the shape does not tell; else the ids do not fit, or rows are mixed."""
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(WIDTH, 2, 16, dropout=0.0), 1, enable_nested_tensor=False).double().to(device)
    attach(encoder, filled({"layers.0.linear1": (16, WIDTH), "layers.0.linear2": (WIDTH, 16)}, [2, 3], device=device))
    for shape in ((2, 2), (5, 2), (2, 5)):
        with client_segments(encoder, [0, 1]), pytest.raises(ValueError, match=r"layer 'layers\.0\.linear1'"):
            encoder(torch.randn(*shape, WIDTH, dtype=torch.float64, device=device))


def test_attached_models_are_copied_not_pickled(device):
    model = attach(nn.Sequential(linear()).double().to(device), filled({"0": (WIDTH, WIDTH)}, [2], device=device))
    x = torch.randn(3, WIDTH, dtype=torch.float64, device=device)
    assert torch.equal(copy.deepcopy(model)(x), model(x))
    with pytest.raises(TypeError, match=r"^model: a bank is attached.*detach\(model\)"):
        pickle.dumps(model)
