"""Stacked experts under PEFT's `target_parameters`: values and gradients of each adapter alone, wherever its tokens are routed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from expert_cases import KINDS, PARAMETERS, drawn_model, two_adapters
from model_cases import token_batch
from peft import LoraConfig, get_peft_model
from peft_cases import TIGHT, assert_same, outcome
from torch import nn
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import hetlora_kernels as hk
from hetlora_kernels.peft import attach, client_segments, enable, fuse, fused_experts, unfuse
from hetlora_kernels.peft.experts import run_experts


@pytest.fixture
def ran(monkeypatch):
    """How often stacked experts ran fused."""
    count = []
    monkeypatch.setattr(fused_experts, "run_experts", lambda *given: count.append(1) or run_experts(*given))
    return count


@pytest.mark.parametrize("kind", KINDS)
def test_fused_experts_are_stock_peft(kind, ran):
    stock, tokens = two_adapters(kind), token_batch(3, 7)
    fused = copy.deepcopy(stock)
    keys = list(fused.state_dict())
    report = fuse(fused)
    assert sum("is a stack of experts" in how for how in report.fused.values()) == 4 and not report.left
    assert list(fused.state_dict()) == keys
    for calls, active in enumerate((["default"], ["b"], ["default", "b"]), 1):
        for model in (stock, fused):
            model.base_model.set_adapter(active)
        assert_same(outcome(fused, tokens), outcome(stock, tokens))
        assert len(ran) == 2 * calls  # two layers
    with stock.disable_adapter(), fused.disable_adapter():
        assert torch.equal(fused(tokens).logits, stock(tokens).logits)
    for model in (stock, fused):
        model.base_model.set_adapter("b")
        model.base_model.merge_adapter()
    assert torch.equal(fused(tokens).logits, stock(tokens).logits) and len(ran) == 6
    assert type(unfuse(fused).base_model.model.model.layers[0].mlp.experts).__module__ == "peft.tuners.lora.layer"


@pytest.mark.parametrize("kind", KINDS)
def test_a_mixed_batch_of_experts_is_each_adapter_alone(kind, ran):
    stock, tokens = two_adapters(kind), token_batch(4, 5)
    fused, ids = copy.deepcopy(stock), ["b", "default", "__base__", "b"]
    fuse(fused)
    fused.base_model.set_adapter(["default", "b"])
    alone = {}
    for name in ("default", "b"):
        stock.base_model.set_adapter(name)
        alone[name] = outcome(stock, tokens[[k for k, own in enumerate(ids) if own == name]])
    for call in (1, 2):  # followed, then known
        fused.zero_grad()
        with client_segments(fused, ids):
            logits = fused(tokens).logits
            logits.square().sum().backward()
        assert len(ran) == 2 * call
        for name in ("default", "b"):
            mine = [k for k, own in enumerate(ids) if own == name]
            torch.testing.assert_close(logits[mine], alone[name]["logits"], **TIGHT)
            stock.zero_grad()
            stock.base_model.set_adapter(name)
            stock(tokens[mine]).logits.square().sum().backward()
            for (key, one), (_, other) in zip(fused.named_parameters(), stock.named_parameters(), strict=True):
                if f".{name}." in key and "lora_" in key:
                    torch.testing.assert_close(one.grad, other.grad, **TIGHT)
    with stock.disable_adapter():
        torch.testing.assert_close(logits[2], stock(tokens).logits[2], **TIGHT)


def test_earlier_versions_of_peft_gave_the_factors_each_others_widths(ran):
    """Told from the wrapper's own flag; widths are equal here, so that both ways fit."""
    stock = two_adapters("mixtral", PARAMETERS[:1], intermediate_size=8)
    for module in stock.modules():
        if hasattr(module, "_did_swap_in_out_features"):
            module._did_swap_in_out_features = False
    fused, tokens = copy.deepcopy(stock), token_batch(2, 5)
    for model in (stock, fused):  # as those versions make B A, of weights [E, out, in]
        for layer in model.base_model.model.model.layers:
            wrapper = layer.mlp.experts
            wrapper.get_delta_factors = lambda name, wrapper=wrapper: _earlier(wrapper, name)
    fuse(fused)
    assert_same(outcome(fused, tokens), outcome(stock, tokens))
    assert len(ran) == 2


def _earlier(wrapper, name):
    a, b = wrapper.lora_A[name].weight.unflatten(0, (4, -1)), wrapper.lora_B[name].weight.unflatten(1, (-1, 4))
    return a.transpose(1, 2), b.permute(2, 1, 0), wrapper.scaling[name]


def test_experts_that_are_left_to_peft(ran):
    stock, tokens = two_adapters("mixtral"), token_batch(2, 5)
    fused = copy.deepcopy(stock)
    fuse(fused)
    seen = []
    fused.base_model.model.model.layers[0].mlp.experts.get_base_layer().register_forward_hook(lambda *_: seen.append(1))
    with pytest.warns(UserWarning, match=r"runs PEFT's own forward: MixtralExperts has hooks"):
        assert_same(outcome(fused, tokens), outcome(stock, tokens))
    assert seen and len(ran) == 1  # the other layer
    with pytest.raises(RuntimeError, match=r"client_segments: MixtralExperts has hooks; such an adapter"), client_segments(fused, [0, 1]):
        fused(tokens)
    divided = copy.deepcopy(stock)
    divided.base_model.model.model.layers[0].mlp.experts.get_base_layer()._is_expert_parallel = True
    with pytest.warns(UserWarning, match=r"left to PEFT, the experts of MixtralExperts are divided among devices: 2"):
        assert len(fuse(divided).left) == 2
    with pytest.raises(ValueError, match=r"mlp.experts.* is a ParamWrapper that is not fused"), client_segments(divided, [0, 1]):
        pass
    merged = copy.deepcopy(stock)
    fuse(merged)
    merged.base_model.model.model.layers[1].mlp.experts.base_layer.merge(adapter_names=["b"])
    with pytest.raises(RuntimeError, match=r"adapters \['b'\] are merged into gate_up_proj"), client_segments(merged, [0, 1]):
        merged(tokens)


class ThreeTimes(MixtralExperts):
    def forward(self, *given):
        return 3 * super().forward(*given)


def test_experts_with_another_forward_are_left_to_peft():
    model = two_adapters("mixtral")
    stacks = [layer.mlp.experts.get_base_layer() for layer in model.base_model.model.model.layers]
    stacks[0].__class__ = ThreeTimes
    stacks[1].config = copy.copy(stacks[1].config)
    stacks[1].config._experts_implementation = "deepgemm"
    with pytest.warns(UserWarning, match=r"left to PEFT, ThreeTimes has a forward of its own: 2") as told:
        fuse(model)
    assert "left to PEFT, experts_implementation = 'deepgemm' is chosen for MixtralExperts: 2" in str(told[0].message)
    bank = hk.AdapterBank({"experts.down_proj.0": (16, 24)}, [2], dtype=torch.float64)
    with pytest.raises(ValueError, match=r"down_proj.0' ThreeTimes has a forward of its own; leave it out"):
        attach(nn.ModuleDict({"experts": stacks[0]}), bank)


@pytest.mark.parametrize("how", ["hook", "patched", "inner off", "outer off"])
def test_what_is_done_to_one_of_the_wrappers(how):
    """The inner one is not called where the outer one computes for both."""
    stock, tokens = two_adapters("mixtral"), token_batch(2, 5)
    fused = copy.deepcopy(stock)
    fuse(fused)
    for model in (stock, fused):
        for layer in model.base_model.model.model.layers:
            inner = layer.mlp.experts.base_layer
            if how == "hook":
                inner.register_forward_hook(lambda _module, _given, out: 2 * out)
            elif how == "patched":
                inner.forward = lambda *given, own=inner.forward: 2 * own(*given)
            else:
                (inner if how == "inner off" else layer.mlp.experts)._disable_adapters = True
    if how in ("hook", "patched"):
        with pytest.warns(
            UserWarning, match="runs PEFT's own forward: the adapter of .* has hooks" if how == "hook" else "the forward of the adapter of .* is patched"
        ):
            assert_same(outcome(fused, tokens), outcome(stock, tokens))
        with pytest.raises(RuntimeError, match=r"client_segments: the .*adapter of"), client_segments(fused, ["default", "b"]):
            fused(tokens)
        return
    assert_same(outcome(fused, tokens), outcome(stock, tokens))
    with client_segments(fused, ["default", "b"]):
        logits = fused(tokens).logits
    for k, name in enumerate(("default", "b")):
        stock.base_model.set_adapter(name)
        torch.testing.assert_close(logits[[k]], stock(tokens[[k]]).logits, **TIGHT)


def test_rows_of_wrappers_are_named_as_a_whole():
    fused = two_adapters("mixtral")
    fuse(fused)
    with (
        pytest.raises(ValueError, match=r"a part 'experts.base_layer' has some of the projections"),
        client_segments(fused, [0, 1], rows={"experts.base_layer": torch.zeros(10, dtype=torch.int64)}),
    ):
        pass


def test_enable_makes_fused_experts(ran):
    config = LoraConfig(r=2, target_modules=["q_proj"], target_parameters=PARAMETERS)
    report = enable(config)
    model = get_peft_model(drawn_model("mixtral"), config)
    assert len(report.fused) == 6 and not report.left
    model(token_batch(2, 5))
    assert len(ran) == 2
    model.add_adapter("more", LoraConfig(r=3, target_modules=["q_proj"], target_parameters=PARAMETERS))
    copied = pickle.loads(pickle.dumps(model))
    assert torch.equal(copied(token_batch(2, 5)).logits, model(token_batch(2, 5)).logits) and len(ran) == 6
