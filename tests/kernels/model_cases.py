"""Tiny transformers models with random weights, and stock PEFT carrying one client of a bank."""

from __future__ import annotations

import copy

import torch
from kernel_cases import drawn
from peft import LoraConfig, get_peft_model, set_peft_model_state_dict
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import hetlora_kernels as hk

VOCAB = 61
LLAMA_RANKS = {"q_proj": [4, 1, 7], "v_proj": [2, 0, 3], "down_proj": [8, 1, 5]}  # another rank in every module, 0 among them


def tiny_llama(dtype=torch.float64, device="cpu", layers=2) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=24, intermediate_size=40, num_hidden_layers=layers, num_attention_heads=4, num_key_value_heads=2, use_cache=False
    )
    return LlamaForCausalLM(config).to(device, dtype).eval()


def tiny_gpt2(dtype=torch.float64, device="cpu") -> GPT2LMHeadModel:
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=VOCAB, n_embd=24, n_layer=2, n_head=4, n_positions=32, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, use_cache=False)
    return GPT2LMHeadModel(config).to(device, dtype).eval()


def filled_bank(model: nn.Module, ranks: dict[str, list[int]], dtype=torch.float64, device="cpu", seed=0) -> hk.AdapterBank:
    """A bank over every module whose last name is in `ranks`, with factors large enough to be seen in the logits."""
    shapes = {}
    for name, module in model.named_modules():
        if name.rsplit(".", 1)[-1] in ranks:
            out_in = module.weight.shape if isinstance(module, nn.Linear) else module.weight.shape[::-1]
            shapes[name] = tuple(out_in)
    g = drawn(seed)
    bank = hk.AdapterBank(shapes, {name: ranks[name.rsplit(".", 1)[-1]] for name in shapes}, dtype=dtype, generator=g, device=device)
    for factor in bank.parameters():
        factor.data.copy_(torch.randn(factor.shape, generator=g, dtype=torch.float64) * 0.5)
    return bank


def peft_client(model: nn.Module, bank: hk.AdapterBank, k: int, scale: float, **options) -> nn.Module:
    """Stock PEFT on a copy of the model, holding client k's adapter as `bank.adapter(k)` gives it; the load must fit key for key."""
    ranks = {name: layout.ranks[k] for name, layout in bank.layouts.items() if layout.ranks[k]}
    config = LoraConfig(
        r=1,
        target_modules=list(ranks),
        rank_pattern=ranks,
        alpha_pattern={name: scale * rank for name, rank in ranks.items()},
        lora_dropout=0.0,
        **options,
    )
    carried = get_peft_model(copy.deepcopy(model), config, autocast_adapter_dtype=False)
    loaded = set_peft_model_state_dict(carried, bank.adapter(k))
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora_" in key]
    return carried.to(next(model.parameters()).device).eval()


def token_batch(rows: int, length: int, device="cpu", seed=0) -> torch.Tensor:
    return torch.randint(0, VOCAB, (rows, length), generator=drawn(seed)).to(device)
