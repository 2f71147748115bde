"""Layers computed again in the backward pass: the same run, bit by bit, in less memory."""

from __future__ import annotations

import pytest
import torch
from tiny import SIZES, lines, same_bits, tiny_config, tiny_federation, tiny_model
from torch.utils.checkpoint import checkpoint
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from hetlora.config import ConfigError
from hetlora.loop import simulate
from hetlora.models import checkpointed

RUNS = [
    {"dropout": 0.2},
    {"dropout": 0.2, "cobatch": False},
    {"train": "fold", "weights": "samples", "gamma": 0.99},
    {"train": "full", "weights": "samples", "gamma": 0.99, "ranks": "powerlaw:5:50"},
]


@pytest.mark.parametrize("settings", RUNS, ids=str)
def test_a_run_keeps_its_bits(tmp_path, monkeypatch, settings):
    found, calls = {}, []
    monkeypatch.setattr("hetlora.models.checkpoint", lambda forward, *given, **kinds: calls.append(1) or checkpoint(forward, *given, **kinds))
    for wanted in (False, True):
        cfg = tiny_config(tmp_path / str(wanted), rounds=2, lr=0.05, gradient_checkpointing=wanted, **settings)
        assert not calls
        result = simulate(cfg, federation=tiny_federation(SIZES), quiet=True)
        found[wanted] = result.bank, [{key: value for key, value in line.items() if "seconds" not in key} for line in lines(tmp_path / str(wanted))]
    assert calls, "layers were checkpointed"
    assert same_bits(found[True][0], found[False][0]) and found[True][1] == found[False][1]


def kept_bytes(model, wanted):
    """Bytes of activations that the backward pass of a batch holds, each tensor counted once."""
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept = {}

    def keep(tensor):
        if (place := tensor.untyped_storage().data_ptr()) not in own:
            kept[place] = tensor.untyped_storage().nbytes(), tensor
        return tensor

    tokens = torch.randint(0, 50, (4, 12))
    with checkpointed(model, wanted), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model(inputs_embeds=model.get_input_embeddings()(tokens).requires_grad_(), use_cache=False).logits.sum()
    return sum(size for size, _ in kept.values())


def test_less_is_kept():
    model = tiny_model()
    assert kept_bytes(model, True) < 0.5 * kept_bytes(model, False)


@pytest.mark.parametrize("make", [tiny_model, lambda: GPT2LMHeadModel(GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=32)).eval()])
def test_the_model_is_as_it_was(make):
    model = make()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    with pytest.raises(KeyError), checkpointed(model, True):
        raise KeyError
    assert {name: vars(module).keys() for name, module in model.named_modules()} == {name: own.keys() for name, own in before.items()}


def test_layers_that_drop_out_in_training_mode_do_not():
    """OPT's layers do: in evaluation mode, as all of this project's bases, two passes agree."""
    sizes = {"hidden_size": 16, "ffn_dim": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 16, "dropout": 0.5}
    model = OPTForCausalLM(OPTConfig(vocab_size=50, max_position_embeddings=32, **sizes)).eval()
    embeddings, grads = model.get_input_embeddings()(torch.arange(8)[None]).detach(), []
    for wanted in (True, False):
        leaf = embeddings.clone().requires_grad_()
        with checkpointed(model, wanted):
            model(inputs_embeds=leaf, use_cache=False).logits.square().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def test_a_model_without_such_layers_is_refused(tmp_path, monkeypatch):
    federation = tiny_federation(SIZES)
    monkeypatch.setattr("transformers.modeling_layers.GradientCheckpointingLayer", type("Other", (), {}))
    with pytest.raises(ConfigError, match=r"^gradient_checkpointing: LlamaForCausalLM has no layers that transformers can checkpoint; leave it out$"):
        simulate(tiny_config(tmp_path / "run", gradient_checkpointing=True), federation=federation, quiet=True)
