"""fuse: the same model, parameters and results as stock PEFT, whatever LoRA Linear offers."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from model_cases import tiny_gpt2, tiny_llama, token_batch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from peft_cases import TARGETS, TIGHT, assert_fused_is_stock, assert_same, assert_same_adapter, filled, lora_model, outcome, several_adapters, tiny_bert
from torch import nn

from hetlora_kernels.peft import FusedLinear, FuseReport, fuse, unfuse


def fused_layers(model):
    return [module for module in model.modules() if isinstance(module, FusedLinear)]


# ---------------------------------------------------------------- the swap itself


def test_only_classes_change_and_come_back(device):
    model = lora_model(device=device)
    tokens = token_batch(2, 5, device)
    classes, text, before = [type(m) for m in model.modules()], repr(model), outcome(model, tokens)
    parameters = dict(model.named_parameters())
    keys = list(model.state_dict())
    report = fuse(model)
    assert isinstance(report, FuseReport) and len(report.fused) == 6 and set(report.fused.values()) == {"lora_linear"} and not report.left
    assert str(report).startswith("fused 6 of 6 LoRA layers\n  fused, lora_linear: 6 (base_model.model.model.layers.0.self_attn.q_proj, ...)")
    assert all(model.get_parameter(name) is p for name, p in parameters.items())
    assert list(model.state_dict()) == keys and repr(model) == text and len(fused_layers(model)) == 6
    assert fuse(model) == report
    assert unfuse(model) is model
    assert [type(m) for m in model.modules()] == classes and not any("hetlora" in key for m in model.modules() for key in vars(m))
    assert_same(outcome(model, tokens), before)
    with pytest.raises(ValueError, match=r"^model: expected a model with fused layers, found none"):
        unfuse(model)
    with pytest.raises(ValueError, match=r"^model: expected a model with PEFT LoRA layers, found none"):
        fuse(tiny_llama())


def test_copies_and_pickles_stay_fused(device):
    model = lora_model(device=device)
    fuse(model)
    tokens = token_batch(2, 5, device)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(fused_layers(twin)) == 6
        assert_same(outcome(twin, tokens), outcome(model, tokens))


# ---------------------------------------------------------------- one adapter, in all its forms

CASES = {
    "plain": ({}, "lora_linear"),
    "rank and alpha patterns": ({"rank_pattern": {"q_proj": 7, r"0\.mlp\.down_proj": 1}, "alpha_pattern": {"v_proj": 11}}, "lora_linear"),
    "rslora": ({"use_rslora": True}, "lora_linear"),
    "lora_bias": ({"lora_bias": True}, "lora_linear"),
    "trained biases": ({"bias": "all"}, "lora_linear"),
    "biases of the adapted layers": ({"bias": "lora_only", "lora_bias": True}, "lora_linear"),
    "modules_to_save": ({"modules_to_save": ["lm_head"]}, "lora_linear"),
    "every linear": ({"target_modules": "all-linear"}, "lora_linear"),
    "layers_to_transform": ({"layers_to_transform": [1]}, "lora_linear"),
}


@pytest.mark.parametrize("name", CASES)
def test_one_adapter_is_stock_peft(name, calls, device):
    options, op = CASES[name]
    model = lora_model(device=device, **options)
    twin = assert_fused_is_stock(model)
    layers = fused_layers(twin)
    assert layers and calls == {op: len(layers)}


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}, {"bias": "all"}, {"modules_to_save": ["cls"]}])
def test_an_encoder_with_biases_is_stock_peft(options, calls, device):
    model = lora_model(tiny_bert(device=device), target_modules=["query", "value", "dense"], **options)
    assert_fused_is_stock(model)
    assert set(calls) == {"lora_linear"}


def test_conv1d_goes_through_lora_add(calls, device):
    model = lora_model(tiny_gpt2(device=device), target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)
    twin = assert_fused_is_stock(model)
    assert calls == {"lora_add": 4} and set(fuse(twin).fused.values()) == {"lora_add: the base layer is a Conv1D"}


def test_a_trained_base_weight_goes_through_lora_add(calls, device):
    model = lora_model(device=device)
    for layer in model.base_model.model.model.layers:
        layer.self_attn.q_proj.base_layer.weight.requires_grad_(True)
    twin = assert_fused_is_stock(model)
    assert calls == {"lora_add": 2, "lora_linear": 4}
    assert twin.base_model.model.model.layers[0].self_attn.q_proj.base_layer.weight.grad is not None
    with torch.no_grad():
        twin(token_batch(1, 3, device))
    assert calls["lora_add"] == 2


@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_was_never_loaded_is_refused(factor, device):
    """On the meta device it has no numbers to add; the base's output alone would be a silent wrong result."""
    model = lora_model(device=device)
    fuse(model)
    getattr(fused_layers(model)[0], factor).to("meta")
    with pytest.raises(ValueError, match=r"^(a|bt): expected device .* as x, got meta"):
        model(token_batch(1, 3, device))


def test_shapes_of_the_input(device):
    """One row, one token, no leading dimension, an empty batch, and inputs that are not contiguous."""
    base = nn.Sequential(nn.Linear(6, 5)).double().to(device)
    model = lora_model(base, target_modules=["0"])
    twin = copy.deepcopy(model)
    fuse(twin)
    x = torch.randn(4, 3, 6, dtype=torch.float64, device=device)
    for part in (x, x[0], x[0, 0], x[:0], x.transpose(0, 1), x[..., None, :], x[::2]):
        torch.testing.assert_close(twin(part), model(part), **TIGHT)


def test_hooks_of_the_layer_itself_still_run(device):
    model = lora_model(device=device)
    seen = []
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    layer.register_forward_hook(lambda module, args, output: seen.append(output))
    assert_fused_is_stock(model)
    assert len(seen) == 2


# ---------------------------------------------------------------- several adapters


@pytest.mark.parametrize("active", [["b"], ["default", "b"], ["c", "b", "default"], ["c"]])
def test_any_active_adapters(active, calls, device):
    model = several_adapters(device)
    model.base_model.set_adapter(active)
    twin = assert_fused_is_stock(model)
    assert calls["lora_linear"] and bool(calls["lora_add"]) == (len(active) > 1)
    trained = {name.split(".")[-2] for name, p in twin.named_parameters() if p.grad is not None}
    assert trained == set(active)


def test_several_adapters_with_biases(device):
    model = several_adapters(device, lora_bias=True)
    model.base_model.set_adapter(["default", "c"])
    assert_fused_is_stock(model)


def test_set_disable_add_and_delete_on_a_fused_model(device):
    model = several_adapters(device)
    twin, tokens = copy.deepcopy(model), token_batch(2, 5, device)
    fuse(twin)
    for change in (
        lambda m: m.set_adapter("c"),
        lambda m: m.delete_adapter("c") or m.set_adapter("b"),
        lambda m: filled(m.add_adapter("d", LoraConfig(r=3, target_modules=["q_proj"])) or m.set_adapter("d") or m).to(torch.float64),
        lambda m: m.base_model.disable_adapter_layers(),
        lambda m: m.base_model.enable_adapter_layers(),
        lambda m: m.base_model.model.model.layers[0].self_attn.q_proj.set_scale("d", 3.0),
    ):
        change(model), change(twin)
        assert_same(outcome(twin, tokens), outcome(model, tokens))
    with model.disable_adapter(), twin.disable_adapter():
        torch.testing.assert_close(twin(tokens).logits, model(tokens).logits, **TIGHT)
        torch.testing.assert_close(twin(tokens).logits, tiny_llama(device=device)(tokens).logits, **TIGHT)


@pytest.mark.parametrize("combination", ["linear", "cat", "svd"])
def test_add_weighted_adapter(combination, device):
    model = lora_model(device=device)
    model.add_adapter("b", LoraConfig(r=4 if combination == "linear" else 2, target_modules=TARGETS))
    filled(model).to(device, torch.float64)
    twin = copy.deepcopy(model)
    fuse(twin)
    for m in (model, twin):
        m.add_weighted_adapter(["default", "b"], [0.7, -0.4], "sum", combination_type=combination)
        m.set_adapter("sum")
    assert_same(outcome(twin, token_batch(2, 5, device)), outcome(model, token_batch(2, 5, device)))


# ---------------------------------------------------------------- saving, loading, merging


def test_save_and_load_cross_over(tmp_path, device):
    """What a fused model saves, stock PEFT loads, and the other way; the files are the same."""
    model, tokens = lora_model(device=device, modules_to_save=["lm_head"]), token_batch(2, 5, device)
    twin = copy.deepcopy(model)
    fuse(twin)
    model.save_pretrained(tmp_path / "stock")
    twin.save_pretrained(tmp_path / "fused")
    files = sorted(p.name for p in (tmp_path / "stock").iterdir())
    assert "adapter_model.safetensors" in files and files == sorted(p.name for p in (tmp_path / "fused").iterdir())
    assert_same_adapter(tmp_path / "stock", tmp_path / "fused")
    loaded = PeftModel.from_pretrained(tiny_llama(device=device), tmp_path / "fused", is_trainable=True).to(torch.float64).eval()
    assert not fused_layers(loaded)
    assert_fused_is_stock(loaded)
    torch.testing.assert_close(loaded(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)
    twin.load_adapter(tmp_path / "stock", "again")
    twin.set_adapter("again")
    torch.testing.assert_close(twin(tokens).logits, model(tokens).logits, rtol=1e-6, atol=1e-6)
    assert get_peft_model_state_dict(twin).keys() == get_peft_model_state_dict(model).keys()


@pytest.mark.parametrize("base", [tiny_llama, tiny_bert])
def test_merging(base, device):
    targets = TARGETS if base is tiny_llama else ["query", "dense"]
    model, tokens = lora_model(base(device=device), target_modules=targets), token_batch(2, 5, device)
    if base is tiny_llama:
        model.add_adapter("b", LoraConfig(r=2, target_modules=TARGETS))
        filled(model).to(torch.float64)
        model.base_model.set_adapter(["default", "b"])
    expected = model(tokens).logits
    fuse(model)
    model.merge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, **TIGHT)
    model.unmerge_adapter()
    torch.testing.assert_close(model(tokens).logits, expected, **TIGHT)
    merged = model.merge_and_unload()
    assert not fused_layers(merged) and not any("lora" in name for name, _ in merged.named_modules())
    torch.testing.assert_close(merged(tokens).logits, expected, **TIGHT)


def test_unload_gives_the_base_back(device):
    model, tokens = lora_model(device=device), token_batch(2, 5, device)
    fuse(model)
    torch.testing.assert_close(model.unload()(tokens).logits, tiny_llama(device=device)(tokens).logits, **TIGHT)


# ---------------------------------------------------------------- inference


@pytest.mark.parametrize("lora_bias", [False, True])
def test_adapter_names_in_inference(lora_bias, calls, device):
    model, tokens = several_adapters(device, lora_bias=lora_bias), token_batch(5, 6, device)
    names = ["c", "default", "__base__", "b", "default"]
    twin = copy.deepcopy(model)
    fuse(twin)
    torch.testing.assert_close(twin(tokens, adapter_names=names).logits, model(tokens, adapter_names=names).logits, **TIGHT)
    assert calls["lora_add"] + calls["lora_linear"] == 8  # one for each layer, up_proj among them, whatever the number of adapters
    other = ["b", "b", "c", "c", "__base__"]
    torch.testing.assert_close(twin(tokens, adapter_names=other).logits, model(tokens, adapter_names=other).logits, **TIGHT)
    with pytest.raises(ValueError, match="same as the number of inputs"):
        twin(tokens, adapter_names=names[:2])
    if not lora_bias:  # PEFT does not merge an adapter's bias into a layer without one
        twin.merge_adapter()
        with pytest.raises(ValueError, match="Cannot pass `adapter_names`"):
            twin(tokens, adapter_names=names)


@pytest.mark.parametrize("beams", [1, 2])
def test_generate(beams, device):
    model, tokens = several_adapters(device), token_batch(3, 4, device)
    twin = copy.deepcopy(model)
    fuse(twin)
    options = {"max_new_tokens": 6, "num_beams": beams, "do_sample": False, "use_cache": True, "pad_token_id": 0, "attention_mask": torch.ones_like(tokens)}
    assert torch.equal(twin.generate(input_ids=tokens, **options), model.generate(input_ids=tokens, **options))
    options["adapter_names"] = ["b", "__base__", "c"]
    assert torch.equal(twin.generate(input_ids=tokens, **options), model.generate(input_ids=tokens, **options))


def test_inference_mode_leaves_nothing_behind(device):
    """What inference mode makes must not be saved for a later backward pass."""
    model = lora_model(device=device, lora_dropout=0.25)
    fuse(model)
    tokens = token_batch(3, 11, device)
    with torch.inference_mode():
        model.train()
        model(tokens)
        model.eval()
        model(tokens, adapter_names=["default", "__base__", "default"])
    model.train()
    model(tokens).logits.sum().backward()
    model.eval()
    model(tokens, adapter_names=["default", "__base__", "default"]).logits.sum().backward()


def test_low_level_injection_and_unwrapped_models(device):
    from peft import inject_adapter_in_model

    model = filled(inject_adapter_in_model(LoraConfig(r=3, target_modules=["q_proj"]), tiny_llama(device=device))).to(torch.float64)
    twin = copy.deepcopy(model)
    assert len(fuse(twin).fused) == 2
    assert_same(outcome(twin, token_batch(2, 5, device)), outcome(model, token_batch(2, 5, device)))


def test_an_optimiser_made_before_goes_on(device):
    model = lora_model(device=device)
    twin, tokens = copy.deepcopy(model), token_batch(3, 7, device)
    steps = []
    for m in (model, twin):
        optimiser = torch.optim.AdamW([p for p in m.parameters() if p.requires_grad], lr=1e-2)
        for turn in range(4):
            if m is twin and turn == 2:
                fuse(m)
            result = outcome(m, tokens)
            optimiser.step()
        steps.append(result)
    assert_same(*steps)
