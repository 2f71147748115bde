"""What is not fused runs PEFT's own forward or lora_add, gives PEFT's results, and is named with its reason."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from model_cases import tiny_llama, token_batch
from peft import LoraConfig, get_peft_model
from peft.helpers import disable_input_dtype_casting
from peft_cases import TARGETS, TIGHT, assert_same, filled, lora_model, outcome
from torch import nn

from hetlora_kernels.peft import fuse

VARIANTS = {
    "DoraLinearVariant": {"use_dora": True},
    "MiCALinearVariant": {"init_lora_weights": "mica"},
    "ALoraLinearVariant": {"alora_invocation_tokens": [3], "task_type": "CAUSAL_LM"},
}


def first_layer(model):
    return model.base_model.model.model.layers[0].self_attn.q_proj


@pytest.mark.parametrize("variant", VARIANTS)
def test_variants_run_pefts_own_forward(variant, calls, device):
    dtype = torch.float32 if variant == "MiCALinearVariant" else torch.float64  # MiCA refuses float64
    model = get_peft_model(tiny_llama(dtype, device), LoraConfig(r=4, target_modules=TARGETS, **VARIANTS[variant])).eval()
    twin, tokens = copy.deepcopy(model), token_batch(3, 7, device)
    tokens[:, 2] = 3
    with pytest.warns(UserWarning, match=f"left to PEFT, adapter 'default' is a LoRA variant, {variant}: 6"):
        report = fuse(twin)
    assert not report.fused and len(report.left) == 6
    with pytest.warns(UserWarning, match=f"a LoRA layer runs PEFT's own forward: .*{variant}"):
        result = outcome(twin, tokens)
    assert_same(result, outcome(model, tokens))
    assert not calls


def test_a_variant_beside_a_plain_adapter(calls, device):
    model = lora_model(device=device)
    model.add_adapter("d", LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    filled(model).to(torch.float64)
    twin, tokens = copy.deepcopy(model), token_batch(3, 7, device)
    with pytest.warns(UserWarning, match="fused 4 of 6"):
        fuse(twin)
    assert_same(outcome(twin, tokens), outcome(model, tokens))
    assert calls == {"lora_linear": 6}  # the plain one is active
    for m in (model, twin):
        m.set_adapter("d")
    with pytest.warns(UserWarning, match="adapter 'd' is a LoRA variant"):
        result = outcome(twin, tokens)
    assert_same(result, outcome(model, tokens))
    assert calls == {"lora_linear": 6}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome(twin, tokens)  # said once


def test_embeddings_and_convolutions_are_left(device):
    model = lora_model(device=device, target_modules=["q_proj", "embed_tokens"])
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match=r"left to PEFT, layer\.Embedding over Embedding is not a lora\.Linear: 1"):
        report = fuse(twin)
    assert list(report.left) == ["base_model.model.model.embed_tokens"] and len(report.fused) == 2
    assert_same(outcome(twin, token_batch(2, 5, device)), outcome(model, token_batch(2, 5, device)))

    convolution = get_peft_model(nn.Sequential(nn.Conv2d(3, 4, 3)), LoraConfig(target_modules=["0"]))
    with pytest.warns(UserWarning, match=r"layer\.Conv2d over Conv2d"):
        assert not fuse(convolution).fused


def test_a_subclass_of_the_lora_layer_is_left(device):
    from peft.tuners.lora.layer import Linear

    class Own(Linear):
        pass

    model = lora_model(device=device)
    first_layer(model).__class__ = Own
    with pytest.warns(UserWarning, match=r"Own over Linear is a subclass of lora\.Linear: 1"):
        assert len(fuse(model).fused) == 5
    assert type(first_layer(model)) is Own


def test_a_patched_forward_is_left(device):
    model = lora_model(device=device)
    layer = first_layer(model)
    layer.forward = lambda x: layer.base_layer(x) * 2
    twin = copy.deepcopy(model)
    with pytest.warns(UserWarning, match="its forward is patched: 1"):
        assert len(fuse(twin).fused) == 5


class OwnDropout(nn.Dropout):
    pass


def with_hook_on_a(layer):
    layer.lora_A["default"].register_forward_hook(lambda module, args, output: output * 2)


def with_hook_on_b(layer):
    layer.lora_B["default"].register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def with_patched_a(layer):
    a = layer.lora_A["default"]
    a.forward = lambda x: nn.functional.linear(x, a.weight) + 1


def with_own_dropout(layer):
    layer.lora_dropout["default"] = OwnDropout(0.0)


def with_dropout_of_one(layer):
    layer.lora_dropout["default"] = nn.Dropout(1.0).train()


def with_hook_on_dropout(layer):
    layer.lora_dropout["default"].register_forward_hook(lambda module, args, output: output * 2)


def with_a_tensor_scaling(layer):
    layer.scaling["default"] = torch.tensor(2.5, dtype=torch.float64)


UNUSUAL = {
    with_hook_on_a: "lora_A or lora_B of adapter 'default' has hooks",
    with_hook_on_b: "lora_A or lora_B of adapter 'default' has hooks",
    with_patched_a: "lora_A or lora_B of adapter 'default' has hooks",
    with_own_dropout: "the dropout of adapter 'default' is not",
    with_dropout_of_one: "the dropout of adapter 'default' is not",
    with_hook_on_dropout: "the dropout of adapter 'default' is not",
    with_a_tensor_scaling: "the scaling of adapter 'default' is a Tensor",
}


@pytest.mark.parametrize("change", UNUSUAL, ids=lambda f: f.__name__)
@pytest.mark.parametrize("after", [False, True])
def test_unusual_adapters_run_pefts_own_forward(change, after, calls, device):
    """Changed before `fuse`, which reports it, or on the fused model, which says so at the next call."""
    model, tokens = lora_model(device=device), token_batch(3, 7, device)
    plain = outcome(model, tokens)["logits"]
    twin = copy.deepcopy(model)
    change(first_layer(model))
    if after:
        assert not fuse(twin).left
        change(first_layer(twin))
    else:
        change(first_layer(twin))
        with pytest.warns(UserWarning, match=UNUSUAL[change]):
            assert list(fuse(twin).left) == ["base_model.model.model.layers.0.self_attn.q_proj"]
    with pytest.warns(UserWarning, match=f"a LoRA layer runs PEFT's own forward: {UNUSUAL[change]}"):
        result = outcome(twin, tokens)
    assert_same(result, outcome(model, tokens))
    assert calls == {"lora_linear": 5}
    if change is not with_own_dropout:
        assert float((result["logits"] - plain).abs().max()) > 1e-4  # the change is one that matters


@pytest.mark.parametrize("where", ["hook", "pre_hook", "forward", "class"])
def test_unusual_base_layers_are_called(where, calls, device):
    model, tokens = lora_model(device=device), token_batch(3, 7, device)
    base = first_layer(model).base_layer
    if where == "hook":
        base.register_forward_hook(lambda module, args, output: output * 2)
    elif where == "pre_hook":
        base.register_forward_pre_hook(lambda module, args: (args[0] + 1,))
    elif where == "forward":
        base.forward = lambda x: nn.functional.linear(x, base.weight) * 2
    else:
        torch.nn.utils.parametrizations.weight_norm(base)
        base.requires_grad_(False)
    twin = copy.deepcopy(model) if where != "forward" else model
    expected = outcome(model, tokens)
    report = fuse(twin)
    assert sum(mode.startswith("lora_add: the base layer") for mode in report.fused.values()) == 1 and not report.left
    assert_same(outcome(twin, tokens), expected)
    assert calls == {"lora_add": 1, "lora_linear": 5}


def test_without_input_casting(calls, device):
    model, tokens = lora_model(device=device), token_batch(2, 5, device)
    fuse(model)
    expected = model(tokens).logits
    calls.clear()
    with disable_input_dtype_casting(model), pytest.warns(UserWarning, match="casting of inputs to the adapter's type is switched off"):
        torch.testing.assert_close(model(tokens).logits, expected, **TIGHT)
    assert not calls


def test_arguments_of_the_base_layer_reach_it(device):
    class Scaled(nn.Linear):
        def forward(self, x, factor=1.0):
            return super().forward(x) * factor

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = Scaled(6, 5)

        def forward(self, x, factor):
            return self.layer(x, factor=factor) + self.layer(x, factor)

    model = lora_model(Model().double().to(device), target_modules=["layer"])
    twin, x = copy.deepcopy(model), torch.randn(3, 6, dtype=torch.float64, device=device)
    assert list(fuse(twin).fused.values()) == ["lora_add: the base layer is a Scaled"]
    torch.testing.assert_close(twin(x, 3.0), model(x, 3.0), **TIGHT)


def test_errors_of_the_base_layer_are_its_own(device):
    model = lora_model(device=device)
    fuse(model)
    with pytest.raises(RuntimeError, match="same dtype"):
        first_layer(model)(torch.randn(2, 24, dtype=torch.float32, device=device))
    with pytest.raises(RuntimeError, match="shapes"):
        first_layer(model)(torch.randn(2, 23, dtype=torch.float64, device=device))
