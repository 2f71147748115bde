"""What lora_linear and lora_add refuse, by the argument's name, and what a refused call leaves as it was."""

from __future__ import annotations

import re

import pytest
import torch
from kernel_cases import leaf_tensors, make_layer
from test_lora_calls import M, N, call_simple

import hetlora_kernels as hk


def good_arguments(device):
    layer = make_layer([2, 3], [0, 1, 1, -1], 6, 5)
    leaves = leaf_tensors(layer, torch.float32, None, device)
    return {**leaves, "layout": layer.layout(), "seg": layer.segments(), "base_out": torch.zeros(4, 5, device=device)}


FROZEN = torch.zeros(5, 6)
BAD = [
    ("x", lambda _: [1.0], TypeError, "list"),
    ("x", lambda _: torch.zeros(4, 6, dtype=torch.int64), TypeError, "int64"),
    ("x", lambda _: torch.zeros(4, 7), ValueError, r"\(4, 7\)"),
    ("x", lambda _: torch.zeros(()), ValueError, r"\(\)"),
    ("weight", lambda w: w.clone().requires_grad_(), ValueError, "frozen"),
    ("weight", lambda _: torch.tensor(1.0), ValueError, r"\(\)"),
    ("weight", lambda w: w[0], ValueError, r"\(6,\)"),
    ("weight", lambda w: w.double(), ValueError, "float64"),
    ("bias", lambda _: torch.zeros(6), ValueError, r"\(6,\)"),
    ("bias", lambda _: torch.zeros(5, dtype=torch.float64), ValueError, "float64"),
    ("bias", lambda _: [0.0] * 5, ValueError, "list"),
    ("a", lambda t: t[:-1], ValueError, r"\(5, 6\), got torch.float32 \(4, 6\)"),
    ("a", lambda t: t.long(), ValueError, "int64"),
    ("a", lambda _: None, ValueError, "NoneType"),
    ("bt", lambda _: torch.zeros(5, 6), ValueError, r"\(5, 5\), got torch.float32 \(5, 6\)"),
    ("layout", lambda _: [2, 3], TypeError, "list"),
    ("seg", lambda _: [2, 3], TypeError, "list"),
    ("seg", lambda _: hk.Segments.from_lengths([2, 3]), ValueError, "4 rows of x, got 5"),
    ("seg", lambda _: hk.Segments.from_lengths([2, 1]), ValueError, "4 rows of x, got 3"),
    ("seg", lambda _: hk.Segments.from_lengths([2, 2, 0]), ValueError, "2 clients, got 3"),
    ("scale", lambda _: [1.0, 2.0, 3.0], ValueError, r"2 numbers, one per client, got shape \(3,\)"),
    ("scale", lambda _: torch.ones(2, 2), ValueError, r"\(2, 2\)"),
    ("dropout", lambda _: 1.0, ValueError, "got 1.0"),
    ("dropout", lambda _: -0.1, ValueError, "got -0.1"),
    ("dropout", lambda _: 1 - 2**-20, ValueError, "got 0.99"),
    ("dropout", lambda _: float("nan"), ValueError, "got nan"),
    ("seeds", lambda _: torch.zeros(3, dtype=torch.int64), ValueError, r"\(2,\), got torch.int64 \(3,\)"),
    ("seeds", lambda _: torch.zeros(2), ValueError, "float32"),
    ("seeds", lambda _: [1, 2], ValueError, "list"),
    ("base_out", lambda t: t[:3], ValueError, r"\(3, 5\)"),
    ("base_out", lambda t: t.long(), TypeError, "int64"),
    ("base_out", lambda _: None, TypeError, "NoneType"),
]


LINEAR_ONLY, ADD_ONLY = ("weight", "bias"), ("base_out",)
LINEAR_ORDER, ADD_ORDER = ("x", "weight", "bias", "a", "bt", "layout", "seg"), ("base_out", "x", "a", "bt", "layout", "seg")


def refusal(op, order, name, spoil, error, device):
    """The message with which `op` refuses the arguments, one of them spoilt."""
    arguments = good_arguments(device)
    spoilt = spoil(arguments.get(name))
    arguments[name] = spoilt.to(device) if isinstance(spoilt, torch.Tensor) else spoilt
    options = {"dropout": 0.5, **{key: arguments[key] for key in ("scale", "dropout", "seeds") if key in arguments}}
    with pytest.raises(error) as caught:
        op(*(arguments[key] for key in order), **options)
    return str(caught.value)


@pytest.mark.parametrize(("name", "spoil", "error", "text"), [case for case in BAD if case[0] not in ADD_ONLY])
def test_lora_linear_names_the_argument(name, spoil, error, text, device):
    message = refusal(hk.lora_linear, LINEAR_ORDER, name, spoil, error, device)
    assert message.startswith(f"{name}: ") and re.search(text, message), message


@pytest.mark.parametrize(("name", "spoil", "error", "text"), [case for case in BAD if case[0] not in LINEAR_ONLY])
def test_lora_add_names_the_argument(name, spoil, error, text, device):
    message = refusal(hk.lora_add, ADD_ORDER, name, spoil, error, device)
    blamed = "a" if name == "x" and text == r"\(4, 7\)" else name  # without a weight, the width of x is the one a is refused for
    assert message.startswith(f"{blamed}: ") and (blamed != name or re.search(text, message)), message


def test_inside_autocast_a_wrong_argument_is_named_and_no_other(device):
    """Not a weight of another type than x, which autocast makes one."""
    given = good_arguments(device) | {"weight": torch.zeros(5, 6, dtype=torch.bfloat16, device=device)}
    with torch.autocast(device.type, dtype=torch.bfloat16), pytest.raises(ValueError, match=r"^bt: "):
        hk.lora_linear(*(given[key] for key in ("x", "weight", "bias", "a", "a", "layout", "seg")))


@pytest.mark.parametrize("name", ["a", "bias", "seg"])
def test_a_refused_call_draws_no_seeds(name, device):
    arguments = good_arguments(device)
    arguments[name] = hk.Segments.from_lengths([1, 1]) if name == "seg" else arguments[name][:-1]
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    with pytest.raises(ValueError, match=f"^{name}: "):
        hk.lora_linear(*(arguments[key] for key in LINEAR_ORDER), dropout=0.5)
    assert torch.equal(states[0], torch.get_rng_state())
    assert device.type != "cuda" or torch.equal(states[1], torch.cuda.get_rng_state(device))


@pytest.mark.parametrize("name", ["weight", "bias", "a", "bt", "base_out"])
@pytest.mark.parametrize("rows", [4, 40])
def test_an_argument_left_on_the_meta_device_is_refused(name, rows, device):
    """Whatever device the dispatcher would choose, no result is made of memory that nobody wrote."""
    layer = make_layer([2], [0] * rows, 5, 3)
    own = {**leaf_tensors(layer, torch.float32, None, device), "base_out": torch.zeros(rows, 3, device=device)}
    own[name] = own[name].detach().to("meta")
    keys = ("base_out", "x", "a", "bt") if name == "base_out" else ("x", "weight", "bias", "a", "bt")
    with pytest.raises(ValueError, match=rf"^{name}: expected .*device.*meta"):
        (hk.lora_add if name == "base_out" else hk.lora_linear)(*(own[key] for key in keys), layer.layout(), layer.segments())


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vmap])
def test_transforms_of_torch_func_are_refused(transform, device):
    layer = make_layer([2], [0] * 4, 5, 3)
    leaves = {name: leaf.detach() for name, leaf in leaf_tensors(layer, torch.float32, None, device).items()}
    layout, segments = layer.layout(), layer.segments()

    def call(x):
        return hk.lora_linear(x, *(leaves[name] for name in ("weight", "bias", "a", "bt")), layout, segments).sum()

    with pytest.raises(RuntimeError, match=r"torch\.func"):
        transform(call)(leaves["x"] if transform is torch.func.grad else leaves["x"][None])


def test_a_frozen_weight_is_only_asked_for_where_gradients_are_recorded(device):
    layer = make_layer([2], [0, 0], 6, 5)
    leaves = leaf_tensors(layer, torch.float32, None, device)
    leaves["weight"].requires_grad_()
    with torch.no_grad():
        assert call_simple(layer, leaves).shape == (2, 5)
    with pytest.raises(ValueError, match=r"^weight: "):
        call_simple(layer, leaves)


def test_a_scale_that_wants_a_gradient_is_refused(device):
    layer = make_layer([3, 2], [0, 1, 0, 1], N, M)
    leaves = leaf_tensors(layer, torch.float32, None, device)
    with pytest.raises(ValueError, match=r"^scale: expected a constant"):
        call_simple(layer, leaves, scale=torch.tensor(0.7, requires_grad=True))
