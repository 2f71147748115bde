"""enable: models made from a config have fused layers from the start, through PEFT's own registration."""

from __future__ import annotations

import copy
import os
import pickle
from pathlib import Path

import forked
import pytest
import torch
from model_cases import tiny_gpt2, tiny_llama, token_batch
from peft import IA3Config, LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.layer import Linear
from peft_cases import TARGETS, assert_same, assert_same_adapter, filled, lora_model, outcome
from torch import nn

from hetlora_kernels.peft import FusedLinear, enable, fuse, unfuse


def enabled_model(base=None, **options):
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options})
    report = enable(config)
    model = get_peft_model(tiny_llama() if base is None else base, config, autocast_adapter_dtype=False)
    return filled(model).eval(), report, config


def test_a_new_model_is_fused_and_is_the_one_fuse_makes(calls, device):
    model, report, config = enabled_model(tiny_llama(device=device))
    assert len(report.fused) == 6 and not report.left and str(report).startswith("fused 6 of 6")
    assert enable(config) is report
    fused, tokens = lora_model(device=device), token_batch(2, 5, device)
    expected = outcome(fused, tokens)
    fuse(fused)
    assert_same(outcome(model, tokens), expected)
    assert calls == {"lora_linear": 6} and [type(m) for m in model.modules()] == [type(m) for m in fused.modules()]
    model.add_adapter("b", LoraConfig(r=2, target_modules=["q_proj", "up_proj"]))  # this config is not enabled: up_proj is stock, q_proj was fused
    assert isinstance(model.base_model.model.model.layers[0].self_attn.q_proj, FusedLinear)
    assert type(model.base_model.model.model.layers[0].mlp.up_proj) is Linear
    unfuse(model)
    assert not any(isinstance(m, FusedLinear) for m in model.modules())


def test_nothing_of_it_is_saved(tmp_path, device):
    model, _, config = enabled_model()
    model.save_pretrained(tmp_path / "fused")
    lora_model().save_pretrained(tmp_path / "stock")
    assert_same_adapter(tmp_path / "stock", tmp_path / "fused")
    loaded = PeftModel.from_pretrained(tiny_llama(), tmp_path / "fused")
    assert not any(isinstance(m, FusedLinear) for m in loaded.modules())
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path / "fused", config=copy.deepcopy(config))
    assert any(isinstance(m, FusedLinear) for m in again.modules())
    assert any(isinstance(m, FusedLinear) for m in pickle.loads(pickle.dumps(model)).modules())


def test_what_is_left_is_told(device):
    config = LoraConfig(target_modules=["q_proj", "embed_tokens"])
    report = enable(config)
    with pytest.warns(UserWarning, match=r"Embedding over Embedding is not a lora\.Linear"):
        get_peft_model(tiny_llama(device=device), config)
    assert len(report.fused) == 2 and list(report.left) == ["model.embed_tokens"]
    dora = LoraConfig(target_modules=["q_proj"], use_dora=True)
    report = enable(dora)
    with pytest.warns(UserWarning, match="DoraLinearVariant"):
        get_peft_model(tiny_llama(device=device), dora)
    assert len(report.left) == 2 and not report.fused


def test_conv1d_and_a_users_own_layer(device):
    with pytest.warns(UserWarning, match="Setting fan_in_fan_out to True"):
        model, report, config = enabled_model(tiny_gpt2(device=device), target_modules=["c_attn"])
    assert set(report.fused.values()) == {"lora_add: the base layer is a Conv1D"} and config.fan_in_fan_out
    stock = lora_model(tiny_gpt2(device=device), target_modules=["c_attn"], fan_in_fan_out=True)
    assert_same(outcome(model, token_batch(2, 5, device)), outcome(stock, token_batch(2, 5, device)))

    class Own(nn.Module):
        def __init__(self, target, adapter_name, config=None, **kwargs):
            super().__init__()
            self.inner = Linear(target, adapter_name, config=config, **{key: kwargs[key] for key in ("r", "lora_alpha")})

    mine = LoraConfig(target_modules=["0", "1"])
    mine._register_custom_module({nn.Bilinear: Own})
    assert enable(mine).fused == {}
    assert set(mine._custom_modules) == {nn.Bilinear, nn.Module}


def test_refusals():
    with pytest.raises(TypeError, match=r"^config: expected a peft\.LoraConfig, got IA3Config"):
        enable(IA3Config())


def test_peft_is_loaded_at_first_use_only():
    code = "import sys, hetlora_kernels; assert 'hetlora_kernels.peft' not in sys.modules; import hetlora_kernels.peft as p; assert 'peft' not in sys.modules; "
    code += "p.fuse; assert 'peft' in sys.modules; from hetlora_kernels.peft import attach, client_losses, client_segments, detach, enable, unfuse"
    done = forked.python(code, Path.cwd(), os.environ)
    assert done.returncode == 0, done.stderr
    import hetlora_kernels.peft

    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        hetlora_kernels.peft.nothing  # noqa: B018
    assert torch.is_tensor(hetlora_kernels.peft.layer_seeds(torch.tensor([1]), 0, 0))


def test_the_report_says_what_runs_once_the_base_is_frozen(device):
    """PEFT freezes the base after the layers are made; a hook that comes later shows too."""
    model, report, _ = enabled_model(tiny_llama(device=device), target_modules=["q_proj"])
    assert set(report.fused.values()) == {"lora_linear"} and "lora_linear: 2" in str(report)
    model.base_model.model.model.layers[0].self_attn.q_proj.base_layer.register_forward_hook(lambda module, args, out: None)
    assert sorted(report.fused.values()) == ["lora_add: the base layer has hooks or a patched forward", "lora_linear"]
