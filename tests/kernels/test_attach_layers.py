"""Which layers of which models `attach` takes: patched, shared and copied ones are right, what cannot carry adapters is refused and nothing attached."""

from __future__ import annotations

import copy
import functools
import pickle

import pytest
import torch
from row_cases import WIDTH, drawn_rows, filled, linear
from torch import nn

import hetlora_kernels as hk
from hetlora_kernels.peft import attach, client_losses, client_segments, detach
from hetlora_kernels.peft.attached import attachment


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


def test_scales_and_clients_are_numbers_of_the_host_whatever_the_default_device(device):
    bank = filled({"0": (WIDTH, WIDTH)}, [2, 3], device=device)
    x, labels = torch.randn(2, 2, WIDTH, dtype=torch.float64, device=device), torch.tensor([[1, 2], [3, 0]], device=device)

    def losses() -> torch.Tensor:
        attach(model, bank, scale=[1.0, 2.0])
        with client_segments(model, [1, 0], step=[3, 4]):
            logits = model(x)
        detach(model)
        return client_losses(logits, labels, [1, 0], 2)

    model = nn.Sequential(linear()).to(device, torch.float64)
    with torch.device("meta"):
        inside = losses()
    assert torch.equal(inside, losses())
