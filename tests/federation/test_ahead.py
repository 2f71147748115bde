"""What is wrong with a run and can be known without the weights is one line before they are loaded."""

from __future__ import annotations

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from test_recipes import load_tiny_model
from transformers import AutoModelForCausalLM, ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from hetlora import federation as federation_module
from hetlora import simulate
from hetlora.compare import run as comparisons
from hetlora.compare.methods import make_plan
from hetlora.config import Config, ConfigError
from hetlora.data import ClientData, FederatedData
from hetlora.federation import prepare

SIZES = {"vocab_size": 384, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1}
PRIVATE = {"dp_clipping_norm": 0.5, "weights": "uniform", "cobatch": False, "train": "fold", "ranks": "fixed:4"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A Llama, one twice as wide with two adapters, a Qwen2 with a short window, rows of prompts, a file of prompts."""
    folder = tmp_path_factory.mktemp("base")
    for name, kind, settings in (
        ("llama", LlamaForCausalLM, LlamaConfig(**SIZES, max_position_embeddings=64)),
        ("wide", LlamaForCausalLM, LlamaConfig(**{**SIZES, "hidden_size": 32}, max_position_embeddings=64)),
    ):
        kind(settings).save_pretrained(folder / name)
        ByT5Tokenizer().save_pretrained(folder / name)
    load_tiny_model().write_tiny_model("qwen2", folder / "window")
    config = json.loads((folder / "window" / "config.json").read_text())
    window = {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 2}
    (folder / "window" / "config.json").write_text(json.dumps({**config, **window}))
    for name, targets in (("adapter", ["q_proj", "v_proj"]), ("other", ["up_proj"])):
        model = AutoModelForCausalLM.from_pretrained(folder / "wide")
        get_peft_model(model, LoraConfig(r=2, target_modules=targets)).save_pretrained(folder / name)
    rows = [{"client": name, "ask": "x" * 20, "text": f"answer {k}"} for name in "ab" for k in range(4)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.txt").write_text("short\n" + "y" * 30 + "\n")
    return folder


def settings(base, **values) -> dict:
    """Paths among the values begin with '@'."""
    values = {"model": "@llama", "data": "unicode:GREEK,HEBREW", "seq_len": 32, "ranks": "2,4", "device": "cpu", **values}
    return {name: str(base / value[1:]) if isinstance(value, str) and value.startswith("@") else value for name, value in values.items()}


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(federation_module, "load_model", lambda *_: pytest.fail("the weights were loaded"))


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"ranks": "2,9"}, "ranks: rank 9 is above the width 8 of module"),
        ({"cuda_graph": True}, "cuda_graph = True: expected a CUDA device, which alone records graphs, got cpu"),
        ({"max_tokens_per_step": 0, "train": "full", "ranks": "powerlaw:5:50", "weights": "samples"}, "max_tokens_per_step = 'auto': .* train = 'full'"),
        ({"dp_noise_multiplier": 1.0, "dp_delta": 0.9, **PRIVATE}, "dp_delta = 0.9: expected less than 1 over the number of clients"),
        ({"dp_secret": "@none", "dp_noise_multiplier": 1.0, **PRIVATE}, "dp_secret: .*none: no such file"),
        ({"model": "@window", "padding_free": "on"}, r"padding_free = 'on': Qwen2ForCausalLM has sliding_window = 16, shorter than seq_len = 32"),
        ({"init_adapter": "@adapter"}, r"init_adapter .*\(made for .*wide\): .*q_proj: made for a layer of 32 inputs and 32 outputs, this model's has 16"),
        ({"init_adapter": "@other"}, r"init_adapter .*\(made for .*wide\): it adapts .*up_proj.* which target_modules = 'attention' does not choose"),
        ({"init_adapter": "@adapter", "model": "@wide", "ranks": "1,1"}, "init_adapter .*: rank 2 in .*, and ranks = '1,1' gives the bank 1 rows"),
        (
            {"sample_prompts": "@prompts.txt", "rouge_tokens": 40},
            r"sample_prompts: a prompt has 30 tokens, and with an answer of rouge_tokens = 40 that is above the 64 that model '.*' sees; lower --rouge-tokens",
        ),
        (
            {"data": "@rows.jsonl", "prompt_field": "ask", "rouge_examples": 2, "rouge_tokens": 50},
            "rouge_examples: a prompt has 20 tokens, and with an answer of rouge_tokens = 50 that is above the 64 that model",
        ),
    ],
    ids=["width", "graph", "auto", "delta", "secret", "window", "adapter's widths", "adapter's modules", "adapter's rank", "samples", "rouge"],
)
def test_what_would_stop_a_run_later_is_found_before_the_weights(base, no_weights, values, reason):
    with pytest.raises(ConfigError, match=reason) as error:
        prepare(Config(**settings(base, **values)))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", ["layers", "scorer"])
def test_ways_and_packages_that_are_missing_are_found_before_the_weights(base, no_weights, monkeypatch, case):
    """No model of transformers is without layers that it can checkpoint, and the package is installed here."""

    def missing(*_):
        raise ConfigError("missing")

    values = {"layers": {"gradient_checkpointing": True}, "scorer": {"data": "@rows.jsonl", "prompt_field": "ask", "rouge_examples": 1}}
    monkeypatch.setattr(f"hetlora.{'ahead.checkpoint_layers' if case == 'layers' else 'rouge.scorer'}", missing)
    with pytest.raises(ConfigError, match="missing"):
        prepare(Config(**settings(base, **values[case])))


def test_an_adapter_of_another_model_is_found_before_the_data_too(base, no_weights, monkeypatch):
    monkeypatch.setattr(federation_module, "load_data", lambda *_: pytest.fail("the data was read"))
    with pytest.raises(ConfigError, match="made for a layer of 32 inputs"):
        prepare(Config(**settings(base, init_adapter="@adapter")))


def test_data_that_is_not_there_is_found_before_the_model_is_made(monkeypatch):
    monkeypatch.setattr(federation_module, "resolve_model", lambda *_, **__: pytest.fail("the model was made"))
    with pytest.raises(ConfigError, match="data 'nowhere': no such file or folder"):
        prepare(Config(model="demo", data="nowhere"))


@pytest.mark.parametrize(
    ("methods", "more", "reason"),
    [
        ("hetlora,hetlora+ranks=fixed:9", {}, "ranks: rank 9 is above the width 8 of module"),
        ("hetlora,hetlora+cuda_graph=true", {}, "cuda_graph = True: expected a CUDA device"),
        ("hetlora", {"search": "lr=0.1,-1"}, "lr: .*-1"),
        ("hetlora", {"search": "rouge_tokens=8,60"}, "sample_prompts: a prompt has 30 tokens, and with an answer of rouge_tokens = 60"),
    ],
)
def test_a_method_or_a_searched_value_that_cannot_run_is_found_before_the_weights(base, no_weights, tmp_path, methods, more, reason):
    common = Config(**settings(base, sample_prompts="@prompts.txt", rouge_tokens=8, output=str(tmp_path / "c")))
    with pytest.raises(ConfigError, match=reason) as error:
        comparisons.run_comparison(common, make_plan("here", methods=methods, **more))
    assert "\n" not in str(error.value) and not (tmp_path / "c").exists()


def test_a_run_goes_on_without_its_adapter_and_not_with_other_data(base, tmp_path, monkeypatch):
    texts = tmp_path / "texts"
    for name in ("a", "b"):
        (texts / name).mkdir(parents=True)
        (texts / name / "x.txt").write_text(f"what {name} wrote down. " * 30)
    adapter = tmp_path / "adapter"
    adapter.symlink_to(base / "adapter")
    common = settings(base, model="@wide", data=str(texts), init_adapter=str(adapter), output=str(tmp_path / "run"), local_steps=1, batch_size=1)
    simulate(Config(**common, rounds=1), quiet=True)
    adapter.unlink()
    simulate(Config(**common, rounds=2), resume=True, quiet=True)
    (texts / "a" / "x.txt").write_text("something else. " * 30)
    monkeypatch.setattr(federation_module, "load_model", lambda *_: pytest.fail("the weights were loaded"))
    with pytest.raises(ConfigError, match="the data is not the data this run began with"):
        simulate(Config(**common, rounds=3), resume=True, quiet=True)


def test_a_model_in_memory_is_looked_at_likewise(base, tmp_path):
    """A Llama would go beyond its positions without a word, GPT-2 end in a traceback."""
    model = AutoModelForCausalLM.from_pretrained(base / "llama")
    cfg = Config(**settings(base, model="demo", sample_prompts="@prompts.txt", rouge_tokens=40, output=str(tmp_path / "run")))
    with pytest.raises(ConfigError, match="sample_prompts: a prompt has 30 tokens"):
        simulate(cfg, model=model, tokenizer=ByT5Tokenizer(), quiet=True)
    data = FederatedData([ClientData(name, [torch.arange(9)], [torch.arange(9)]) for name in "ab"], [], "here")
    with pytest.raises(ConfigError, match="tokenizer: sample_prompts are written with it; give it as tokenizer="):
        simulate(cfg, model=model, data=data, quiet=True)
    assert not (tmp_path / "run").exists()
