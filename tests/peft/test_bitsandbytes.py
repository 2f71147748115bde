"""4-bit and 8-bit bases of bitsandbytes: the base layer as it is, the adapters by lora_add on top."""

from __future__ import annotations

import copy

import pytest
import torch
from model_cases import VOCAB, tiny_llama, token_batch
from peft import LoraConfig, get_peft_model
from peft_cases import TARGETS, filled, outcome
from transformers import LlamaConfig, LlamaForCausalLM

import hetlora_kernels as hk
from hetlora_kernels.peft import attach, client_losses, client_segments, detach, enable, fuse, unfuse

bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: quantised bases are not tested here")


def quantised_base(kind, device, base=None):
    """A tiny Llama whose adapted layers are quantised."""
    base = (tiny_llama(torch.float32, device) if base is None else base).requires_grad_(False)
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
    return base


def quantised(kind, device, enabled=False):
    """The same with two adapters."""
    base = quantised_base(kind, device)
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


def wide_llama():
    """Widths of 64: what bitsandbytes packs for inference on a CPU."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCAB, use_cache=False, **sizes)).float()


@pytest.mark.parametrize("kind", ["4bit", "8bit"])
def test_a_bank_trains_on_a_base_in_eval_mode(kind, device):
    """Gradients of a bank after an evaluation, the base in eval mode, are stock PEFT's in training mode: nothing was packed for inference."""
    base, tokens = quantised_base(kind, device, wide_llama()), token_batch(3, 7, device)
    stock = get_peft_model(copy.deepcopy(base), LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    filled(stock).train()
    logits = stock(tokens).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten()).backward()
    expected = {name.removeprefix("base_model.model.").replace(".default", ""): p.grad for name, p in stock.named_parameters() if p.grad is not None}
    shapes = {name: (m.out_features, m.in_features) for name, m in base.named_modules() if name.endswith(tuple(TARGETS))}
    bank = hk.AdapterBank(shapes, ranks=[4], device=device)
    bank.load_adapter(0, {key.replace(".default", ""): p.detach() for key, p in stock.state_dict().items() if "lora_" in key})
    attach(base.eval(), bank)
    with torch.no_grad():
        base(tokens)
    with client_segments(base, [0, 0, 0]):
        client_losses(base.eval()(tokens).logits, tokens, [0, 0, 0], 1).sum().backward()
    for name in shapes:
        for mine, theirs in ((bank.a[name].grad, expected[f"{name}.lora_A.weight"]), (bank.bt[name].grad.t(), expected[f"{name}.lora_B.weight"])):
            assert float((mine - theirs).norm() / theirs.norm()) < (1e-4 if kind == "4bit" else 2**-5), name
    detach(base)


def test_a_base_that_was_packed_for_inference_is_refused(device):
    base = quantised_base("4bit", device, wide_llama()).eval()
    with torch.no_grad():
        base(token_batch(2, 5, device))
    if not base.model.layers[0].self_attn.q_proj.weight.quant_state.__dict__.get("packing_format_for_cpu"):
        pytest.skip("bitsandbytes packs 4-bit weights on a CPU with AVX512-BF16 only")
    bank = hk.AdapterBank({"model.layers.1.self_attn.v_proj": (32, 64)}, ranks=[4], device=device)
    with pytest.raises(ValueError, match=r"^model: bitsandbytes has packed .*q_proj' for inference"):
        attach(base, bank)
