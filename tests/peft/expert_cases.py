"""Tiny models whose experts lie in one parameter, their adapters and banks."""

from __future__ import annotations

import torch
from kernel_cases import drawn
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import GptOssConfig, GptOssForCausalLM, MixtralConfig, MixtralForCausalLM

import hetlora_kernels as hk

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
