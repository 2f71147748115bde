"""4-bit and 8-bit bases of bitsandbytes: the base layer as it is, the adapters by lora_add on top."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import tiny_llama, token_batch
from peft import LoraConfig, get_peft_model
from peft_cases import TARGETS, filled, outcome

from hetlora_kernels.peft import client_segments, enable, fuse, unfuse

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: quantised bases are not tested here")


def quantised(kind, device, enabled=False):
    """A tiny Llama whose adapted layers are quantised, with two adapters."""
    base = tiny_llama(torch.float32, device).requires_grad_(False)
    for block in base.model.layers:
        for parent, name in ((block.self_attn, "q_proj"), (block.self_attn, "v_proj"), (block.mlp, "down_proj")):
            old = getattr(parent, name)
            if kind == "4bit":
                new = bnb.nn.Linear4bit(old.in_features, old.out_features, bias=False, compute_dtype=torch.float32, quant_type="nf4")
                new.weight = bnb.nn.Params4bit(old.weight.data, requires_grad=False, quant_type="nf4")
            else:
                new = bnb.nn.Linear8bitLt(old.in_features, old.out_features, bias=False, has_fp16_weights=False)
                new.weight = bnb.nn.Int8Params(old.weight.data, requires_grad=False, has_fp16_weights=False)
            setattr(parent, name, new.to(device))
    setattr(base, f"is_loaded_in_{kind}", True)
    config = LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)
    report = enable(config) if enabled else None
    model = get_peft_model(base, config)
    model.add_adapter("b", LoraConfig(r=2, target_modules=TARGETS))
    return filled(model).train(), report  # no dropout; in eval mode bitsandbytes packs 4-bit weights for a CPU, which takes widths of 32 only


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
@pytest.mark.parametrize("enabled", [False, True])
def test_a_quantised_base_keeps_its_product(kind, enabled, calls, device):
    """float32 throughout: what differs is the order of sums in the small products."""
    model, report = quantised(kind, device, enabled)
    tokens = token_batch(3, 7, device)
    stock = unfuse(copy.deepcopy(model)) if enabled else copy.deepcopy(model)
    expected = outcome(stock, tokens)
    calls.clear()
    report = report or fuse(model)
    name = {"4bit": "Linear4bit", "8bit": "Linear8bitLt"}[kind]
    assert set(report.fused.values()) == {f"lora_add: the base layer is a {name}"} and len(report.fused) == 6 and not report.left
    result = outcome(model, tokens)
    assert calls == {"lora_add": 6} and result.keys() == expected.keys()
    for key, true in expected.items():
        torch.testing.assert_close(result[key], true, rtol=1e-4, atol=1e-4 * float(true.abs().max()), msg=lambda text, key=key: f"{key}: {text}")
    with client_segments(model, ["b", "__base__", "default"]):
        mixed = model(tokens).logits
    alone = []
    for row, name in enumerate(("b", "__base__", "default")):
        if name == "__base__":
            with stock.disable_adapter():
                alone.append(stock(tokens).logits[row])
        else:
            stock.set_adapter(name)
            alone.append(stock(tokens).logits[row])
    # An 8-bit base rounds its input to integers, so that a last bit may become a step: as much as 8 bits give.
    error = float((mixed - torch.stack(alone)).norm() / mixed.norm())
    assert error < (1e-4 if kind == "4bit" else 2**-8)
