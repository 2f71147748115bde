"""Tiny PEFT models, and the comparison of a fused one with stock PEFT in float64."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from kernel_cases import drawn
from model_cases import VOCAB, tiny_llama, token_batch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BertConfig, BertForMaskedLM

from hetlora_kernels.peft import fuse

TARGETS = ["q_proj", "v_proj", "down_proj"]
TIGHT = {"rtol": 1e-9, "atol": 1e-11}


def tiny_bert(dtype=torch.float64, device="cpu") -> BertForMaskedLM:
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=VOCAB,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=32,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    return BertForMaskedLM(config).to(device, dtype).eval()


def filled(model: nn.Module, seed: int = 0) -> nn.Module:
    """LoRA factors and biases large enough to be seen in the logits."""
    g = drawn(seed)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data.copy_(torch.randn(parameter.shape, generator=g, dtype=torch.float64) * 0.3)
    return model


def lora_model(base: nn.Module | None = None, device="cpu", **options) -> PeftModel:
    """Stock PEFT with one adapter, "default", on a copy of `base` (default a tiny Llama)."""
    base = tiny_llama(device=device) if base is None else copy.deepcopy(base)
    options = {"r": 4, "lora_alpha": 6, "target_modules": TARGETS, **options}
    return filled(get_peft_model(base, LoraConfig(**options), autocast_adapter_dtype=False)).eval()


def several_adapters(device="cpu", base: nn.Module | None = None, **options) -> PeftModel:
    """Adapters "default", "b", "c" of ranks 4, 2, 7, other scalings, and other targets in "c"."""
    model = lora_model(base, device, **options)
    model.add_adapter("b", LoraConfig(r=2, lora_alpha=5, target_modules=TARGETS, **options))
    model.add_adapter("c", LoraConfig(r=7, lora_alpha=3, target_modules=["q_proj", "up_proj"], **options))
    return filled(model).to(device, torch.float64).eval()


def outcome(model: nn.Module, tokens: Tensor, step: Callable[[nn.Module, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Logits and the gradient of every trained parameter of one step."""
    model.zero_grad()
    logits = model(tokens).logits if step is None else step(model, tokens)
    if any(p.requires_grad for p in model.parameters()):
        F.cross_entropy(logits.flatten(0, 1), tokens.flatten()).backward()
    return {"logits": logits.detach()} | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor], **tolerance) -> None:
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], **(tolerance or TIGHT), msg=lambda text, name=name: f"{name}: {text}")


def assert_same_adapter(one: Path, other: Path) -> None:
    """Two adapter folders hold the same tensors, bit for bit, and the same config; the order of PEFT's sets is chance."""
    configs = [json.loads((folder / "adapter_config.json").read_text(encoding="utf-8")) for folder in (one, other)]
    for config in configs:
        config["target_modules"].sort()
    assert configs[0] == configs[1]
    assert (one / "adapter_model.safetensors").read_bytes() == (other / "adapter_model.safetensors").read_bytes()


def assert_fused_is_stock(model: PeftModel, tokens: Tensor | None = None, step=None) -> nn.Module:
    """A fused copy of `model` has its logits and gradients; returns the copy."""
    tokens = token_batch(3, 7, next(model.parameters()).device) if tokens is None else tokens
    twin = copy.deepcopy(model)
    fuse(twin)
    assert_same(outcome(twin, tokens, step), outcome(model, tokens, step))
    return twin
