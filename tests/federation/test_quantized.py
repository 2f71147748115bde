"""Training on a 4-bit and on an 8-bit base of bitsandbytes, from loading to trained factors."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_clients
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import hetlora_kernels as hk
from hetlora.client import train_client
from hetlora.config import Config
from hetlora.evaluate import evaluate_bank
from hetlora.models import load_model, target_shapes

pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed: quantised bases are not tested here")
pytest.importorskip("accelerate", reason="accelerate is not installed: quantised bases are not loaded without it")
KINDS = {"llama": (LlamaForCausalLM, LlamaConfig), "qwen2": (Qwen2ForCausalLM, Qwen2Config)}


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
@pytest.mark.parametrize("name", KINDS)
def test_a_quantised_base_trains(name, quantize, tmp_path):
    """The frozen base is in eval mode and evaluated before. The factors are those of a base in training mode, for which bitsandbytes packs nothing."""
    make, config = KINDS[name]
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
    make(config(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    settings = {"model": str(tmp_path), "quantize": quantize, "dtype": "float32", "device": "cpu", "local_steps": 1, "batch_size": 2, "optimizer": "sgd"}
    cfg = Config.create("test", **settings, output=str(tmp_path / "run"))
    data, trained = tiny_clients([4])[0], []
    for training in (True, False):
        model = load_model(cfg, str(tmp_path))
        shapes = target_shapes(model, "attention")
        bank = hk.AdapterBank(shapes, [4], generator=torch.Generator().manual_seed(0))
        if training:
            model.train()
        else:
            evaluate_bank(model, bank, data.test, cfg.scale, 0)
        result = train_client(model, bank, data, cfg, 1, 0.05, [4])
        assert result.steps == 1
        assert all(bool(bank.bt[layer].any()) for layer in shapes)
        trained.append(torch.cat([factor.detach().flatten() for factor in bank.parameters()]))
    # An 8-bit base rounds its input to integers, so that a last bit may become a step.
    error = float((trained[1] - trained[0]).norm() / trained[0].norm())
    assert error < (1e-3 if quantize == "4bit" else 2**-5), error
