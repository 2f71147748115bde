"""Bases of torchao: layers that are an nn.Linear by class and whose weight is no plain tensor. The base layer runs as torchao wants it."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import LLAMA_RANKS, filled_bank, tiny_llama, token_batch
from peft import LoraConfig, get_peft_model
from peft_cases import TARGETS, filled, outcome
from torch import nn

from hetlora_kernels.peft import attach, client_segments, detach, fuse

pytest.importorskip("torchao", reason="torchao is not installed: its quantised bases are not tested here")

from torchao.quantization import Int8WeightOnlyConfig, quantize_

WHERE = [("self_attn", "q_proj"), ("self_attn", "v_proj"), ("mlp", "down_proj")]


def quantised_base(device):
    model = tiny_llama(torch.float32, device).requires_grad_(False)
    quantize_(model, Int8WeightOnlyConfig(), filter_fn=lambda module, name: isinstance(module, nn.Linear) and tuple(name.split(".")[-2:]) in WHERE)
    changed = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and type(module.weight.data) is not torch.Tensor]
    assert len(changed) == 6
    return model


def test_a_bank_is_attached_beside_the_product_of_the_base(device):
    """Each client's logits are those of the dequantised base whose weights hold its own product."""
    model, scale = quantised_base(device), 1.5
    tokens = token_batch(3, 7, device)
    before = model(tokens).logits
    bank = filled_bank(tiny_llama(torch.float32, device), LLAMA_RANKS, torch.float32, device)
    expected = []
    for row, client in enumerate((2, 0, 1)):
        own, adapter = tiny_llama(torch.float32, device), bank.adapter(client)
        for name in bank.layouts:
            weight = own.get_submodule(name).weight
            weight.data = model.get_submodule(name).weight.dequantize()
            factors = [adapter.get(f"base_model.model.{name}.lora_{side}.weight") for side in "AB"]
            if factors[0] is not None:
                weight.data += scale * factors[1] @ factors[0]
        expected.append(own(tokens[row : row + 1]).logits)
    attach(model, bank, scale=scale)
    with client_segments(model, [2, 0, 1]):
        logits = model(tokens).logits
        logits.square().sum().backward()
    torch.testing.assert_close(logits, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert all(bool(bank.a[name].grad.any()) and bool(bank.bt[name].grad.any()) for name in bank.layouts)
    detach(model)
    assert torch.equal(model(tokens).logits, before)


def test_a_fused_model_is_stock_peft(device):
    """PEFT has a layer class of its own for such a base: it is left as it is, which is said."""
    model = filled(get_peft_model(quantised_base(device), LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS)))
    tokens = token_batch(3, 7, device)
    expected = outcome(copy.deepcopy(model), tokens)
    with pytest.warns(UserWarning, match="left to PEFT, torchao.TorchaoLoraLinear"):
        report = fuse(model)
    assert len(report.left) == 6 and not report.fused
    result = outcome(model, tokens)
    assert result.keys() == expected.keys() and all(torch.equal(result[name], expected[name]) for name in expected)
