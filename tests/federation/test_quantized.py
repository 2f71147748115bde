"""Training on a 4-bit and on an 8-bit base of bitsandbytes, from loading to trained factors, and a run of fold on it."""

from __future__ import annotations

import pytest
import torch
from tiny import tiny_clients, tiny_config, trained_bank
from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

import hetlora_kernels as hk
from hetlora.client import train_client
from hetlora.config import Config
from hetlora.data import FederatedData
from hetlora.evaluate import evaluate_bank
from hetlora.federation import Federation
from hetlora.fold import folded
from hetlora.loop import simulate
from hetlora.models import load_model, target_shapes
from hetlora_kernels.peft import attach, detach

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


@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_fold_computes_with_the_bank_beside_a_quantised_base_and_leaves_its_integers(quantize, tmp_path):
    """The rows lie beside the layers: what comes out is that of the same rows as an adapter. A run learns a bank, and the weights keep their bits."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, **sizes)).save_pretrained(tmp_path)
    base = {"model": str(tmp_path), "quantize": quantize, "dtype": "float32", "device": "cpu"}
    cfg = tiny_config(tmp_path / "run", **base, train="fold", weights="samples", gamma=0.99, rounds=2, lr=0.05)
    model = load_model(cfg, str(tmp_path)).requires_grad_(False).eval()
    shapes, ids = target_shapes(model, "attention"), torch.arange(24).view(2, 12)
    bank = trained_bank(shapes, [4])

    def logits() -> torch.Tensor:
        with torch.no_grad():
            return model(input_ids=ids, use_cache=False).logits

    plain = logits()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    with folded(model, bank, 2.0):
        inside = logits()
    attach(model, bank, scale=2.0)
    adapted = logits()
    detach(model)
    # An 8-bit base rounds its input to integers, so that a last bit may become a step.
    assert float((inside - adapted).norm() / (adapted - plain).norm()) < (1e-3 if quantize == "4bit" else 2**-5)
    clients = tiny_clients([3, 5, 2, 7])
    result = simulate(cfg, federation=Federation(model, "tiny", shapes, FederatedData(clients, [], "tiny clients")))
    assert all(bool(rows.any()) for rows in result.bank.bt.values())
    assert all(torch.equal(weight, before[name]) for name, weight in model.named_parameters()) and torch.equal(logits(), plain)
