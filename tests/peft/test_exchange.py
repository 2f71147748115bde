"""AdapterBank to and from PEFT adapters, through PEFT's own state dicts and files; strict."""

from __future__ import annotations

import pytest
import torch
from model_cases import tiny_llama, token_batch
from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict, set_peft_model_state_dict
from peft_cases import TARGETS, TIGHT, filled, lora_model
from safetensors.torch import load_file

import hetlora_kernels as hk
from hetlora_kernels.peft import attach, client_segments, fuse


def bank_like(model, ranks):
    shapes = {name: (m.out_features, m.in_features) for name, m in model.named_modules() if name.endswith(tuple(TARGETS))}
    return hk.AdapterBank(shapes, ranks, dtype=torch.float64)


def test_adapters_of_a_fused_model_go_into_a_bank_and_back(tmp_path):
    """Three PEFT adapters of ranks 4, 2, 3 in one bank: attached to the bare model it gives their logits; exported, stock PEFT loads them."""
    peft, tokens = lora_model(), token_batch(3, 6)
    for name, rank in (("b", 2), ("c", 3)):
        peft.add_adapter(name, LoraConfig(r=rank, lora_alpha=rank * 1.5, target_modules=TARGETS))
    filled(peft).to(torch.float64)
    fuse(peft)
    bare = tiny_llama()
    bank = bank_like(bare, [4, 2, 3])
    for k, name in enumerate(("default", "b", "c")):
        bank.load_adapter(k, get_peft_model_state_dict(peft, adapter_name=name))
    attach(bare, bank, scale=1.5)
    with client_segments(bare, [2, 0, 1]), client_segments(peft, ["c", "default", "b"]):
        torch.testing.assert_close(bare(tokens).logits, peft(tokens).logits, **TIGHT)
    with torch.no_grad():
        for factor in bank.parameters():
            factor.mul_(1.25)
    config = LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS)
    fresh = get_peft_model(tiny_llama(), config, autocast_adapter_dtype=False)
    loaded = set_peft_model_state_dict(fresh, bank.adapter(1))
    assert not loaded.unexpected_keys and not [key for key in loaded.missing_keys if "lora_" in key]
    with client_segments(bare, [1, 1, 1]):
        expected = bare(tokens).logits
    torch.testing.assert_close(fresh.eval()(tokens).logits, expected, **TIGHT)
    fresh.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(tiny_llama(), tmp_path, autocast_adapter_dtype=False).eval()
    fuse(again)
    torch.testing.assert_close(again(tokens).logits, expected, rtol=1e-6, atol=1e-6)
    other = bank_like(tiny_llama(), [2])
    other.load_adapter(0, load_file(tmp_path / "adapter_model.safetensors"))
    for name in bank.shapes:
        assert torch.equal(other.a[name], bank.a[name][bank.layouts[name].rows(1)])


WRONG = {
    "unknown": (
        lambda d: d | {"base_model.model.model.embed_tokens.lora_embedding_A": torch.zeros(1)},
        r"unknown keys \['base_model\.model\.model\.embed_tokens",
    ),
    "missing": (
        lambda d: {k: v for k, v in d.items() if "1.mlp.down_proj.lora_B" not in k},
        r"missing keys \['base_model\.model\.model\.layers\.1\.mlp\.down_proj",
    ),
    "lora_bias": (lambda d: d | {k.replace("weight", "bias"): torch.zeros(24) for k in d if "lora_B" in k}, r"unknown keys .*lora_B\.bias"),
    "rank": (lambda d: {k: v[:3] if "lora_A" in k else v for k, v in d.items()}, r"expected shape \(4, 24\) for base_model.*lora_A\.weight, got \(3, 24\)"),
    "width": (lambda d: {k: v[:-1] if "lora_B" in k else v for k, v in d.items()}, r"expected shape \(24, 4\) for base_model.*lora_B\.weight, got \(23, 4\)"),
    "adapter name kept": (lambda d: {k.replace(".weight", ".default.weight"): v for k, v in d.items()}, r"unknown keys .*default\.weight"),
}


@pytest.mark.parametrize("name", WRONG)
def test_a_wrong_adapter_changes_nothing_and_is_named(name):
    change, text = WRONG[name]
    bank = bank_like(tiny_llama(), [4])
    before = {key: value.clone() for key, value in bank.state_dict().items()}
    with pytest.raises(ValueError, match=text):
        bank.load_adapter(0, change(get_peft_model_state_dict(lora_model())))
    assert all(torch.equal(value, before[key]) for key, value in bank.state_dict().items())
