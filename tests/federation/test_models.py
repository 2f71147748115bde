"""Models: the demo model is made once, safely, and loads as any other; the base is frozen; targets follow the rules; bad input is one line."""

from __future__ import annotations

import os
import re
import shutil
import sys
import types
import warnings
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from hetlora import Config, ConfigError, demo_model, models
from hetlora.demo_model import DemoModel
from hetlora.federation import prepare, resolve_model
from hetlora.models import load_model, load_tokenizer, resolve_device, target_shapes

TINY = DemoModel(hidden=16, layers=1, heads=2, intermediate=16, seq_len=32, batch_size=2, steps=3, warmup=1)


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(demo_model, "public_text", lambda: ["def sort(items): " * 40, "A class is a scope. " * 40])
    return tmp_path / "cache"


def fails(call, *words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


def tiny(kind: str, **settings):
    """A random model of a transformers architecture."""
    from transformers import AutoConfig, AutoModelForCausalLM

    sizes = {"vocab_size": 50, "bos_token_id": 1, "eos_token_id": 1, "pad_token_id": 0}
    sizes |= {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    if kind == "gpt2":
        sizes |= {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_inner": 24}
        sizes = {k: v for k, v in sizes.items() if k not in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes, **settings))


def weights(folder: str) -> bytes:
    return Path(folder, "model.safetensors").read_bytes()


def test_demo_model_is_made_once_and_is_an_ordinary_folder(cache):
    seen = []
    folder = resolve_model(Config(), lambda *step: seen.append(step), TINY)
    assert [step[:2] for step in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[0][2] == pytest.approx(torch.tensor(384.0).log().item(), abs=0.5)
    assert os.path.dirname(os.path.dirname(folder)) == str(cache)
    assert resolve_model(Config(), lambda *step: pytest.fail("trained twice"), TINY) == folder
    assert os.listdir(os.path.dirname(folder)) == [os.path.basename(folder)]

    tokenizer = load_tokenizer(folder)
    assert tokenizer("hé", add_special_tokens=False)["input_ids"] == [107, 198, 172]
    assert tokenizer.eos_token_id == 1
    model = load_model(Config(), folder)
    assert model.config.use_cache is False
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert {p.dtype for p in load_model(Config(dtype="float64"), folder).parameters()} == {torch.float64}


def test_demo_model_learns(cache, monkeypatch):
    demo = DemoModel(hidden=32, layers=1, heads=2, intermediate=32, seq_len=64, steps=40, warmup=4)
    losses = []
    monkeypatch.setattr(demo_model, "public_text", lambda: ["abcdefgh" * 100])
    resolve_model(Config(), lambda done, total, loss: losses.append(loss), demo)
    assert losses[-1] < 0.5 * losses[0]


def test_demo_model_depends_on_its_seed_only(cache):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = weights(resolve_model(Config(), None, TINY))
    assert torch.equal(torch.get_rng_state(), state)
    shutil.rmtree(cache)
    torch.manual_seed(2)
    assert weights(resolve_model(Config(), None, TINY)) == first
    assert weights(resolve_model(Config(), None, replace(TINY, seed=1))) != first


@pytest.mark.parametrize("damage", ["truncated", "no manifest", "empty folder", "manifest is junk"])
def test_damaged_cache_is_made_again(cache, damage):
    folder = resolve_model(Config(), None, TINY)
    good = weights(folder)
    manifest = os.path.join(folder, "hetlora_demo.json")
    if damage == "truncated":
        with open(os.path.join(folder, "model.safetensors"), "r+b") as file:
            file.truncate(len(good) // 2)
    elif damage == "no manifest":
        os.remove(manifest)
    elif damage == "manifest is junk":
        with open(manifest, "w") as file:
            file.write("[1]")
    else:
        for name in os.listdir(folder):
            os.remove(os.path.join(folder, name))
    with pytest.warns(UserWarning, match="damaged"):
        assert resolve_model(Config(), None, TINY) == folder
    assert weights(folder) == good
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        resolve_model(Config(), lambda *_: pytest.fail("trained again"), TINY)


def test_interrupted_training_leaves_no_model(cache):
    def interrupt(done, total, loss):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        resolve_model(Config(), interrupt, TINY)
    assert os.listdir(cache / "hetlora") == []


def test_model_appears_in_one_step(cache, monkeypatch):
    """Until the rename there is nothing under the final name, so a kill while files are written leaves no half model."""

    def refuse(source, target):
        assert (Path(source) / "hetlora_demo.json").is_file()
        assert not Path(target).exists()
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    fails(lambda: resolve_model(Config(), None, TINY), "No space left")
    assert os.listdir(cache / "hetlora") == []


def test_another_process_may_finish_first(cache):
    def other(done, total, loss):
        if done == total:
            other.folder = resolve_model(Config(), None, TINY)

    folder = resolve_model(Config(), other, TINY)
    assert folder == other.folder
    assert os.listdir(cache / "hetlora") == [os.path.basename(folder)]


def test_cache_that_cannot_be_written(cache):
    cache.write_text("a file where the folder should be")
    fails(lambda: resolve_model(Config(), None, TINY), "model 'demo'", "XDG_CACHE_HOME")


def test_a_name_without_a_folder_is_asked_of_the_hub_and_that_is_said(tmp_path, monkeypatch):
    """Without a connection its client tries again for half a minute, and says so five times."""
    import logging

    from hetlora.observer import Observer

    said, enabled, retries = [], [], logging.getLogger("huggingface_hub.utils._http")
    seen = Observer()
    seen.message = said.append

    def read(path, **_):
        enabled.append(retries.isEnabledFor(logging.WARNING))
        raise OSError("no connection")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", read)
    before = retries.isEnabledFor(logging.WARNING)
    fails(lambda: prepare(Config(model="nowhere"), seen), "model 'nowhere': its configuration cannot be loaded (no connection)")
    assert said == ["model nowhere: no folder of that name here; the hub is asked for it"]
    assert enabled == [False] and retries.isEnabledFor(logging.WARNING) == before


def test_resolve_model(tmp_path):
    assert resolve_model(Config(model=str(tmp_path))) == str(tmp_path)
    assert resolve_model(Config(model="org/name")) == "org/name"
    (tmp_path / "file.bin").write_text("x")
    for missing in ("./nope", "/nope/nope", "~/nope", "a/b/c", str(tmp_path / "file.bin")):
        fails(lambda: resolve_model(Config(model=missing)), "no such folder", missing)  # noqa: B023


def test_folders_that_hold_no_causal_model(tmp_path):
    from transformers import BertModel, T5Config

    (tmp_path / "empty").mkdir()
    fails(lambda: load_model(Config(), str(tmp_path / "empty")), "empty", "save_pretrained")
    fails(lambda: load_tokenizer(str(tmp_path / "empty")), "tokenizer", "save_pretrained")
    (tmp_path / "empty" / "config.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ConfigError) as error:
        load_tokenizer(str(tmp_path / "empty"))
    assert not re.search(r":\)", str(error.value)), "a reason that ends where its list would begin"
    T5Config().save_pretrained(tmp_path / "t5")
    fails(lambda: load_model(Config(), str(tmp_path / "t5")), "not a causal language model")
    bert = tiny("bert", initializer_range=0.5)
    bert.save_pretrained(tmp_path / "bert")
    fails(lambda: load_model(Config(), str(tmp_path / "bert")), "not a causal language model", "after it")
    BertModel(bert.config).save_pretrained(tmp_path / "headless")
    fails(lambda: load_model(Config(), str(tmp_path / "headless")), "not in its checkpoint", "cls.predictions")
    fails(lambda: load_model(Config(), "org/not-here"), "org/not-here", "check the hub id")
    llama = tiny("llama")
    llama.save_pretrained(tmp_path / "llama")
    os.truncate(tmp_path / "llama" / "model.safetensors", 100)
    fails(lambda: load_model(Config(), str(tmp_path / "llama")), "cannot be loaded")


def test_devices():
    assert resolve_device("cpu") == torch.device("cpu")
    assert resolve_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    for wrong in ("gpu", "meta", "cuda:99", ""):
        fails(lambda: resolve_device(wrong), f"device {wrong!r}", "'auto'")  # noqa: B023


def test_quantization_says_what_is_missing(monkeypatch):
    found = types.SimpleNamespace(find_spec=lambda name: None)
    monkeypatch.setattr(models.importlib, "util", found)
    fails(lambda: load_model(Config(quantize="4bit"), "org/name"), "quantize '4bit'", "bitsandbytes", "pip install")
    found.find_spec = lambda name: object()
    fails(lambda: load_model(Config(quantize="8bit", dtype="float64"), "org/name"), "float64")


@pytest.mark.parametrize(("kind", "settings"), [("gpt2", {"attn_pdrop": 0.0}), ("llama", {"attention_dropout": 0.1})])
def test_dropout_of_the_base_is_warned_about(tmp_path, kind, settings):
    tiny(kind, **settings).save_pretrained(tmp_path)
    with pytest.warns(UserWarning, match="dropout of its own .*0.1"):
        load_model(Config(), str(tmp_path))


def test_no_dropout_no_warning(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(Config(), str(tmp_path))


ATTENTION = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
    "gpt2": ["c_attn", "c_proj"],
    "gpt_neox": ["query_key_value", "dense"],
    "opt": ["k_proj", "v_proj", "q_proj", "out_proj"],
    "bloom": ["query_key_value", "dense"],
    "phi": ["q_proj", "k_proj", "v_proj", "dense"],
    "mpt": ["Wqkv", "out_proj"],
}


@pytest.mark.parametrize("kind", ATTENTION)
def test_attention_targets(kind):
    sizes = {"d_model": 16, "n_heads": 2, "n_layers": 1} if kind == "mpt" else {}
    sizes |= {"word_embed_proj_dim": 16, "ffn_dim": 24} if kind == "opt" else {}
    model = tiny(kind, **sizes)
    found = target_shapes(model, "attention")
    assert sorted(name.rpartition(".")[2] for name in found) == sorted(ATTENTION[kind])
    assert not any("mlp" in name or "fc" in name for name in found)


def test_conv1d_has_the_shape_of_its_product():
    model = tiny("gpt2")
    shapes = target_shapes(model, "all-linear")
    assert shapes == {
        "transformer.h.0.attn.c_attn": (48, 16),
        "transformer.h.0.attn.c_proj": (16, 16),
        "transformer.h.0.mlp.c_fc": (24, 16),
        "transformer.h.0.mlp.c_proj": (16, 24),
    }
    for name, (wide, narrow) in shapes.items():
        assert model.get_submodule(name)(torch.zeros(2, narrow)).shape == (2, wide)


GPT2_SPECS = {
    "q_proj,down_proj": "c_attn,c_fc",
    "layers.0.self_attn.q_proj": "h.0.attn.c_attn",
    r".*\.layers\.0\..*(q|up)_proj": r".*\.h\.0\..*c_(fc|attn)",
}


@pytest.mark.parametrize("spec", ["all-linear", "peft", "q_proj,down_proj", "layers.0.self_attn.q_proj", r".*\.layers\.0\..*(q|up)_proj", "lm_head"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_targets_are_those_of_peft(kind, spec):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora import LoraLayer

    if kind == "gpt2":
        spec = GPT2_SPECS.get(spec, spec)
    model = tiny(kind)
    shapes = target_shapes(model, spec)
    peft_spec = None if spec == "peft" else spec.split(",") if "*" not in spec and spec != "all-linear" else spec
    adapted = get_peft_model(model, LoraConfig(target_modules=peft_spec, r=2)).base_model.model
    layers = {name: (m.out_features, m.in_features) for name, m in adapted.named_modules() if isinstance(m, LoraLayer)}
    assert shapes == layers
    assert list(shapes) == list(layers)


def test_self_attention_only():
    model = tiny("gpt2", add_cross_attention=True)
    assert list(target_shapes(model, "attention")) == ["transformer.h.0.attn.c_attn", "transformer.h.0.attn.c_proj"]


def test_layer_named_after_its_attention_keeps_its_mlp_out():
    class HybridAttentionDecoderLayer(nn.Module):
        def __init__(self):
            super().__init__()
            self.self_attn = nn.Sequential(nn.Linear(4, 6))
            self.mlp = nn.Sequential(nn.Linear(4, 4))

    assert target_shapes(nn.Sequential(HybridAttentionDecoderLayer()), "attention") == {"0.self_attn.0": (6, 4)}


def test_experts_that_all_linear_leaves_out_are_told():
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2}
    model = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4))
    with pytest.warns(UserWarning, match=r"the experts of 2 layers lie in one parameter and carry no adapter \(model.layers.0.mlp.experts, ...\)"):
        assert all(name.endswith("_proj") for name in target_shapes(model, "all-linear"))


def test_targets_that_match_nothing():
    model = tiny("llama")
    fails(lambda: target_shapes(model, "qproj"), "'qproj'", "q_proj, k_proj")
    fails(lambda: target_shapes(model, "q_proj,embed_tokens"), "'embed_tokens'", "q_proj, k_proj")
    fails(lambda: target_shapes(model, "nothing.*"), "'nothing.*'", "q_proj, k_proj")
    fails(lambda: target_shapes(model, "(q_proj"), "regular expression")
    fails(lambda: target_shapes(nn.Sequential(nn.Linear(2, 2)), "attention"), "matches no linear layer", "0")
    fails(lambda: target_shapes(nn.Sequential(nn.ReLU()), "attention"), "no linear layers")
    model.config.model_type = "unheard-of"
    fails(lambda: target_shapes(model, "peft"), "unheard-of", "all-linear")


def test_the_hash_covers_all_that_the_weights_depend_on(cache, monkeypatch):
    names = {replace(TINY, **{key: 7}).folder() for key in asdict(TINY)}
    monkeypatch.setattr(sys, "version_info", (9, 9, 9))
    names.add(TINY.folder())
    monkeypatch.setattr(torch, "__version__", "0.0")
    names.add(TINY.folder())
    assert len(names) == len(asdict(TINY)) + 2
