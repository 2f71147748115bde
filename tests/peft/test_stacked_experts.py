"""Stacked experts themselves, and a bank on them: each expert's projection is a layer whose input are the tokens routed to it."""

from __future__ import annotations

import pytest
import torch
from expert_cases import KINDS, banks, drawn_model, routed, stack
from kernel_cases import drawn
from model_cases import token_batch
from peft_cases import TIGHT
from torch import nn

import hetlora_kernels as hk
from hetlora_kernels.peft import StepGraph, attach, client_segments, detach
from hetlora_kernels.peft.experts import run_experts


@pytest.mark.parametrize("kind", ["gate", "bias", "no gate"])
def test_the_frozen_part_is_the_experts_own_forward(kind):
    experts = stack(kind)
    x = torch.randn(6, 16, generator=drawn(5), dtype=torch.float64, requires_grad=True)
    index, weights = routed(6, 4)
    index[:, 0] = torch.tensor([0, 0, 0, 2, 2, 0])  # nobody chooses 3 first, and 1 is chosen by few
    weights.requires_grad_()
    ours, own = run_experts(experts, x, index, weights, {}), experts(x, index, weights)
    torch.testing.assert_close(ours, own, **TIGHT)
    grads = [torch.autograd.grad(out.square().sum(), (x, weights)) for out in (ours, own)]
    torch.testing.assert_close(*grads, **TIGHT)
    assert run_experts(experts, x[:0], index[:0], weights[:0], {}).shape == (0, 16)
    without = weights.detach().clone()
    without[1, 1] = 0
    expected = experts(x, index, without)
    index[1, 1] = 4  # none
    owners = torch.tensor([0, 1, 1, -1, 0, 1])
    for given in ({}, {"clients": 2, "owners": owners}):
        torch.testing.assert_close(run_experts(experts, x, index, weights, {}, **given), expected, **TIGHT)
        for wrong in (-1, 5, 9):
            index[2, 0] = wrong
            with pytest.raises(ValueError, match=rf"top_k_index: expected experts from 0 to 3, or 4 for none, got {min(wrong, 0)}..{max(wrong, 4)}"):
                run_experts(experts, x, index, weights, {}, **given)
            index[2, 0] = 0


def test_a_wider_input_is_cast_as_by_transformers():
    experts, (index, weights) = stack("gate").bfloat16(), routed(6, 4)
    experts.config._experts_implementation = "grouped_mm"
    x = torch.randn(6, 16, generator=drawn(5), dtype=torch.float64).float()
    ours, own = run_experts(experts, x, index, weights.float(), {}), experts(x, index, weights.float())
    assert ours.dtype == own.dtype and torch.equal(ours, own)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gate", "bias"])
def test_the_grouped_product_is_that_of_expert_after_expert(kind, dtype, monkeypatch):
    experts = stack(kind).to(dtype)
    x = torch.randn(6, 16, generator=drawn(5), dtype=torch.float64).to(dtype).requires_grad_()
    index, weights = routed(6, 4)
    made = []
    monkeypatch.setattr(nn.functional, "grouped_mm", lambda *given, own=nn.functional.grouped_mm, **named: made.append(1) or own(*given, **named))
    grouped = run_experts(experts, x, index, weights.to(dtype), {})
    assert len(made) == 2
    monkeypatch.delattr(nn.functional, "grouped_mm")
    single = run_experts(experts, x, index, weights.to(dtype), {})
    # A bias is added after the product's rounding to the type, not before: one rounding more in each of the two projections.
    rounding = 2 * torch.finfo(dtype).eps if kind == "bias" else 0.0
    assert float((grouped - single).abs().max()) <= rounding * float(single.abs().max())
    one, other = (torch.autograd.grad(out.float().square().sum(), x)[0].double() for out in (grouped, single))
    assert float((one - other).abs().max()) <= 4 * torch.finfo(dtype).eps * float(other.abs().max())


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_a_bank_on_experts_is_each_client_alone(kind, dropout):
    model, tokens, ids = drawn_model(kind), token_batch(4, 5), [1, 0, -1, 1]
    bank, scale, seeds = banks([2, 3], dropped=(".down_proj.1",)), [0.5, 2.0], torch.tensor([11, 12])
    attach(model, bank, scale=scale, dropout=dropout)
    seeded = {"seeds": seeds} if dropout else {}
    for _ in range(2):  # followed, then known
        for parameter in bank.parameters():
            parameter.grad = None
        with client_segments(model, ids, **seeded):
            logits = model(tokens).logits
            logits.square().sum().backward()
    together = {name: (bank.a[name].grad, bank.bt[name].grad) for name in bank.shapes}
    detach(model)
    for k in (0, 1):
        mine = [place for place, own in enumerate(ids) if own == k]
        alone = hk.AdapterBank(bank.shapes, [bank.ranks[k]], dtype=torch.float64)
        alone.load_adapter(0, bank.adapter(k))
        attach(model, alone, scale=scale[k], dropout=dropout)
        with client_segments(model, [0] * len(mine), **({"seeds": seeds[[k]]} if dropout else {})):
            out = model(tokens[mine]).logits
            out.square().sum().backward()
        for place, sequence in enumerate(mine):  # masks do not depend on how a step is split
            index = torch.tensor([place])
            with client_segments(model, [0], sequence_index=index, **({"seeds": seeds[[k]]} if dropout else {})), torch.no_grad():
                torch.testing.assert_close(model(tokens[[sequence]]).logits[0], out[place], **TIGHT)
        detach(model)
        torch.testing.assert_close(logits[mine], out, **TIGHT)
        for name in bank.shapes:
            rows = slice(sum(bank.ranks[:k]), sum(bank.ranks[: k + 1]))
            for one, other in zip(together[name], (alone.a[name].grad, alone.bt[name].grad), strict=True):
                torch.testing.assert_close(one[rows], other, **TIGHT)


def test_a_bank_on_experts_is_separate_linear_layers():
    """The promise of the names: expert e's projection is a layer whose input are the tokens routed to it."""
    model = drawn_model("mixtral")
    bank = banks([2])
    experts, name = model.model.layers[0].mlp.experts, "model.layers.0.mlp.experts"
    x, (index, weights) = torch.randn(6, 16, generator=drawn(7), dtype=torch.float64), routed(6, 4)
    attach(model, bank, scale=2.0)
    out = experts(x, index, weights)
    detach(model)

    def linear(rows, projection, e):
        key = f"{name}.{projection}.{e}"
        return rows @ (getattr(experts, projection)[e] + 2.0 * bank.bt[key].T @ bank.a[key]).T

    expected = torch.zeros_like(x)
    for t in range(6):
        for slot in range(2):
            e = int(index[t, slot])
            gate, up = linear(x[t], "gate_up_proj", e).chunk(2)
            expected[t] += weights[t, slot] * linear(experts.act_fn(gate) * up, "down_proj", e)
    torch.testing.assert_close(out, expected.detach(), **TIGHT)


@pytest.mark.parametrize(
    ("name", "shape", "text"),
    [
        ("model.layers.0.mlp.experts.gate_up_proj.4", (48, 16), r"expected an expert from 0 to 3, got '4'"),
        ("model.layers.0.mlp.experts.gate_up_proj.01", (48, 16), r"expected an expert from 0 to 3, got '01'"),
        ("model.layers.0.mlp.experts.act_fn.0", (48, 16), r"is not in the model"),
        ("model.layers.0.mlp.gate_up_proj.0", (48, 16), r"is not in the model"),
        ("model.layers.0.mlp.experts.down_proj.0", (24, 16), r"expected \(out, in\) = \(16, 24\)"),
    ],
)
def test_names_of_experts_that_do_not_fit(name, shape, text):
    model = drawn_model("mixtral")
    with pytest.raises(ValueError, match=text):
        attach(model, hk.AdapterBank({name: shape}, [2], dtype=torch.float64))
    assert all(parameter.requires_grad for parameter in model.parameters())
    both = {"model.layers.0.mlp.experts": (16, 16), "model.layers.0.mlp.experts.gate_up_proj.0": (48, 16)}
    with pytest.raises(ValueError, match=r"'model.layers.0.mlp.experts' is a stack of experts, and .*gate_up_proj.0' one of its projections; name one"):
        attach(model, hk.AdapterBank(both, [2], dtype=torch.float64))
    experts = model.model.layers[0].mlp.experts
    experts.forward = experts.forward
    with pytest.raises(ValueError, match=r"gate_up_proj.0' the forward of MixtralExperts is patched; leave it out"):
        attach(model, hk.AdapterBank({"model.layers.0.mlp.experts.gate_up_proj.0": (48, 16)}, [2], dtype=torch.float64))


def test_rows_of_a_stack_are_named_as_a_whole():
    model, tokens, own = drawn_model("mixtral"), token_batch(2, 5), torch.zeros(10, dtype=torch.int64)
    attach(model, banks([2, 3]))
    for part in ("experts.down_proj", "gate_up_proj.0", "model.layers.1.mlp.experts.down_proj"):
        with pytest.raises(
            ValueError,
            match=r"some of the projections of experts whose rows come together; name the experts as a whole",
        ):
            with client_segments(model, [0, 1], rows={part: own}):
                pass
    with client_segments(model, [0, 1], rows={"experts": own}):
        all_of_one = model(tokens).logits
    with client_segments(model, [0, 1]):
        assert not torch.allclose(model(tokens).logits[1], all_of_one[1])
    with pytest.raises(ValueError, match=r"stacked experts, whose numbers of rows are read from the device"):
        StepGraph(model, [0, 1], lambda: model(tokens).logits, record=lambda step, device: (step(), step))
