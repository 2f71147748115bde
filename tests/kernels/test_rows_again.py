"""What a checkpoint computes again has the rows of its own call of the model, or is refused; memory that changes hands is followed."""

from __future__ import annotations

import pytest
import torch
from row_cases import WIDTH, Model, filled, linear, order_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from hetlora_kernels.peft import attach, client_segments


class ByMode(nn.Module):
    """Sequence first in training, batch first in eval mode; its layer is checkpointed by hand or as transformers' modules are."""

    def __init__(self, known: bool):
        super().__init__()
        self.layer = linear()
        if known:
            self._gradient_checkpointing_func = lambda function, *args: checkpoint(function, *args, use_reentrant=False)

    def forward(self, x):
        run = self.__dict__.get("_gradient_checkpointing_func", lambda function, *args: checkpoint(function, *args, use_reentrant=False))
        return run(self.layer, x.transpose(0, 1)).transpose(0, 1) if self.training else run(self.layer, x)


@pytest.mark.parametrize("known", [True, False])
def test_two_calls_in_a_block_of_which_the_first_is_computed_again(known, device):
    """Gradients are those of blocks of their own where it is known which call a layer belongs to (transformers), else refused by the layer's name."""
    model = ByMode(known).double().to(device)
    bank = filled({"layer": (WIDTH, WIDTH)}, [3, 2], device=device)
    attach(model, bank)
    inputs = [torch.randn(3, 3, WIDTH, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2)]
    weight, ids = torch.randn(3, 3, 1, dtype=torch.float64, device=device), [0, 1, 1]

    def call(x, training):
        return (model.train(training)(x) * weight).square().sum()

    for _ in range(2):  # the orders of both modes are learnt at the first calls
        for parameter in bank.parameters():
            parameter.grad = None
        for x, training in zip(inputs, (True, False), strict=True):
            with client_segments(model, ids):
                call(x, training).backward()
    expected = [parameter.grad for parameter in bank.parameters()]
    for parameter in bank.parameters():
        parameter.grad = None
    with client_segments(model, ids):
        losses = call(inputs[0], True), call(inputs[1], False)
        if not known:
            with pytest.raises(RuntimeError, match=r"layer 'layer' is computed again .* open a block for each"):
                losses[0].backward()
            return
        for loss in losses:
            loss.backward()
    for parameter, value in zip(bank.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, value, rtol=1e-10, atol=1e-10)


def through_set(layer, x):
    """Rows in an order of the data, in the memory of a tensor that was the sequences' own."""
    flat = x.reshape(-1, WIDTH)
    order = order_of(x)
    held = flat.detach().clone()
    held.set_(flat.detach()[order])
    out = torch.zeros_like(flat)
    out[order] = layer(held)
    return out.view_as(x)


def test_a_tensor_that_takes_the_memory_of_another_takes_its_rows(device):
    model = Model(through_set).double().to(device)
    bank = filled({"layer": (WIDTH, WIDTH)}, [3, 2], device=device)
    attach(model, bank)
    x = torch.randn(3, 5, WIDTH, dtype=torch.float64, device=device)
    before = torch.Tensor.set_
    with client_segments(model, [0, 1, 1]):
        out = model(x)
    assert torch.Tensor.set_ is before
    for row, client in enumerate([0, 1, 1]):
        rows = bank.layouts["layer"].rows(client)
        weight = model.layer.weight + bank.bt["layer"].detach()[rows].t() @ bank.a["layer"].detach()[rows]
        torch.testing.assert_close(out[row], x[row] @ weight.t(), rtol=1e-10, atol=1e-10)


def test_a_tensor_that_takes_the_memory_of_a_storage_is_nobodys(device):
    def way(layer, x):
        held = x.detach().clone()
        held.set_(x.detach().flip(0).untyped_storage(), 0, x.shape, x.stride())
        return layer(held)

    model = Model(way).double().to(device)
    attach(model, filled({"layer": (WIDTH, WIDTH)}, [3, 2], device=device))
    with client_segments(model, [0, 1, 1]), pytest.raises(ValueError, match="nothing says for certain whose the rows of layer 'layer' are"):
        model(torch.randn(3, 5, WIDTH, dtype=torch.float64, device=device))
