"""Stacked experts (PEFT's `target_parameters`; a bank's modules by expert): values and gradients of each client alone, wherever its tokens are routed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from kernel_cases import drawn
from model_cases import token_batch
from peft import LoraConfig, PeftModel, get_peft_model
from peft_cases import TIGHT, assert_same, outcome
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import hetlora_kernels as hk
from hetlora_kernels.peft import attach, client_segments, detach, enable, fuse, fused_experts, unfuse
from hetlora_kernels.peft.experts import run_experts

PARAMETERS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
SIZES = {
    "vocab_size": 97,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
}
KINDS = {"mixtral": (MixtralForCausalLM, MixtralConfig, {}), "gpt-oss": (GptOssForCausalLM, GptOssConfig, {"head_dim": 8})}


def drawn_model(kind: str, dtype=torch.float64, **more) -> nn.Module:
    """Weights large enough for the experts to show in the logits; GPT-OSS has biases, and weights that lie [in, out]."""
    model_class, config_class, options = KINDS[kind]
    model = model_class(config_class(**SIZES | options | more)).to(torch.float64).eval()
    model.config._experts_implementation = "eager"  # the grouped products of transformers take no float64
    g = drawn(1)
    for parameter in model.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.4)
    return model.to(dtype)


def two_adapters(kind: str, parameters=PARAMETERS, **more) -> PeftModel:
    """Adapters "default" and "b" of ranks 2 and 3 on the experts and on attention."""
    config = {"target_modules": ["q_proj"], "target_parameters": parameters}
    model = get_peft_model(drawn_model(kind, **more), LoraConfig(r=2, lora_alpha=3, **config), autocast_adapter_dtype=False)
    model.add_adapter("b", LoraConfig(r=3, lora_alpha=5, **config))
    g = drawn(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.3
    return model.eval()


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


def routed(tokens: int, experts: int, width: int = 2):
    g = drawn(3)
    index = torch.stack([torch.randperm(experts, generator=g)[:width] for _ in range(tokens)])
    return index, torch.rand(tokens, width, generator=g, dtype=torch.float64)


def stack(kind: str) -> nn.Module:
    """Of a model with no gate (`up_proj`), or with a norm after each expert."""
    if kind == "no gate":
        from transformers.models.nemotron_h.configuration_nemotron_h import NemotronHConfig
        from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

        made = NemotronHExperts(NemotronHConfig(hidden_size=16, moe_intermediate_size=24, n_routed_experts=4, mlp_hidden_act="relu2"))
    else:
        made = drawn_model("mixtral" if kind == "gate" else "gpt-oss").model.layers[0].mlp.experts
    made.config._experts_implementation = "eager"
    g = drawn(4)
    for parameter in made.parameters():
        parameter.data = torch.randn(parameter.shape, generator=g, dtype=torch.float64)
    return made.requires_grad_(False)


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
    with pytest.raises(ValueError, match=r"top_k_index: expected experts below 4, got 4"):
        run_experts(experts, x, index.clamp(min=1) + 1, weights, {})


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


def banks(ranks, dropped=()) -> hk.AdapterBank:
    """Every expert of both layers but those that are dropped, and the attention."""
    shapes = {"model.layers.0.self_attn.q_proj": (16, 16)}
    for layer in (0, 1):
        for expert in range(4):
            shapes |= {f"model.layers.{layer}.mlp.experts.{name}.{expert}": size for name, size in (("gate_up_proj", (48, 16)), ("down_proj", (16, 24)))}
    bank = hk.AdapterBank({name: shape for name, shape in shapes.items() if not name.endswith(tuple(dropped))}, ranks, dtype=torch.float64)
    g = drawn(6)
    for parameter in bank.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.3)
    return bank


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
    experts = model.model.layers[0].mlp.experts
    experts.forward = experts.forward
    with pytest.raises(ValueError, match=r"gate_up_proj.0' the forward of MixtralExperts is patched; leave it out"):
        attach(model, hk.AdapterBank({"model.layers.0.mlp.experts.gate_up_proj.0": (48, 16)}, [2], dtype=torch.float64))
