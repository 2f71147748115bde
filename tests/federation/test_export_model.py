"""A merged export computes what the run's model computes with its adapter, in any type; every export has a model card without a path of the machine."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file
from test_kinds import RUN_IDS, RUNS
from tiny import SIZES, tiny_clients, tiny_config, tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, ByT5Tokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from hetlora import fleet
from hetlora.cli import cli
from hetlora.config import Config
from hetlora.data import FederatedData
from hetlora.errors import ConfigError
from hetlora.export import export_adapter
from hetlora.export_model import export_merged
from hetlora.federation import Federation
from hetlora.loop import simulate
from hetlora.model_card import card, command, public_name
from hetlora.models import load_model, target_shapes
from hetlora_kernels.peft import attach, client_segments, detach

TOKENS = torch.arange(3, 15)[None]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """The tiny model as a folder, with a tokenizer."""
    folder = tmp_path_factory.mktemp("secret-place") / "base"
    tiny_model().save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    return folder


def finished(output: Path, base: Path, **settings):
    """(result, its federation) of a run on the model in `base`."""
    cfg = tiny_config(output, **{"model": str(base), "rounds": 2, "lr": 0.05, "device": "cpu", **settings})
    model = load_model(cfg, str(base))
    federation = Federation(model, str(base), target_shapes(model, cfg.target_modules), FederatedData(tiny_clients(SIZES), [], "tiny clients"))
    return simulate(cfg, federation=federation, quiet=True), federation


@torch.no_grad()
def logits(model, bank=None, scale: float = 2.0) -> torch.Tensor:
    if bank is None:
        return model(TOKENS).logits
    attach(model, bank, scale=scale)
    try:
        with client_segments(model, torch.zeros(1, dtype=torch.int64)):
            return model(TOKENS).logits
    finally:
        detach(model)


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_the_merged_model_computes_what_the_run_ends_with(tmp_path, base, settings):
    """In float64, so that all that differs is the order of sums."""
    types = {} if settings.get("train") == "full" else {"adapter_dtype": "float64"}
    result, federation = finished(tmp_path / "run", base, dtype="float64", **types, **settings)
    out = export_merged(tmp_path / "run", tmp_path / "out")
    merged = AutoModelForCausalLM.from_pretrained(out)
    assert merged.dtype == torch.float64 and merged.config.use_cache
    expected = logits(federation.model, result.bank)
    torch.testing.assert_close(logits(merged), expected, rtol=1e-10, atol=1e-12)
    assert (logits(tiny_model(torch.float64)) - expected).abs().max() > 1e-4
    assert AutoTokenizer.from_pretrained(out)("a").input_ids == ByT5Tokenizer()("a").input_ids


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_no_folder_of_a_run_holds_an_adapter_that_is_not_what_it_learned(tmp_path, base, settings):
    finished(tmp_path / "run", base, **settings)
    written = list((tmp_path / "run").rglob("adapter_model.safetensors"))
    folded = settings.get("merge") in ("stack", "energy-stack", "residual") or settings.get("train") == "full"
    assert bool(written) != folded
    assert all(any(bool(tensor.any()) for name, tensor in load_file(file).items() if "lora_B" in name) for file in written)


@pytest.fixture(scope="module")
def run(tmp_path_factory, base) -> Path:
    folder = tmp_path_factory.mktemp("hidden-away") / "run"
    finished(folder, base, ranks="2,8,4,6", clients_per_round=9)
    return folder


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_the_sum_is_rounded_once(tmp_path, run, dtype):
    wide = load_file(export_merged(run, tmp_path / "wide") / "model.safetensors")
    kind = getattr(torch, dtype)
    narrow = load_file(export_merged(run, tmp_path / "narrow", dtype=dtype) / "model.safetensors")
    assert wide.keys() == narrow.keys()
    assert all(narrow[name].dtype == kind and torch.equal(narrow[name], tensor.to(kind)) for name, tensor in wide.items())


def delta(folder: Path, name: str) -> torch.Tensor:
    tensors, alpha = load_file(folder / "adapter_model.safetensors"), json.loads((folder / "adapter_config.json").read_text())
    a, b = (tensors[f"base_model.model.{name}.lora_{side}.weight"].double() for side in "AB")
    return alpha["lora_alpha"] / alpha["r"] * b @ a


@pytest.mark.parametrize("choice", [{"rank": 3}, {"client": "client1"}, {}], ids=str)
def test_rank_and_client_are_those_of_the_exported_adapter(tmp_path, run, choice):
    name = "model.layers.1.self_attn.v_proj"
    adapter = export_adapter(run, tmp_path / "adapter", **choice)
    weight = load_file(export_merged(run, tmp_path / "merged", dtype="float64", **choice) / "model.safetensors")[f"{name}.weight"]
    torch.testing.assert_close(weight - tiny_model().get_parameter(f"{name}.weight").double(), delta(adapter, name), rtol=1e-12, atol=1e-15)


def test_a_weight_that_is_stored_transposed(tmp_path):
    torch.manual_seed(0)
    sizes = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "vocab_size": 50, "attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(tmp_path / "base")
    ByT5Tokenizer().save_pretrained(tmp_path / "base")
    result, federation = finished(tmp_path / "run", tmp_path / "base", dtype="float64", adapter_dtype="float64")
    merged = AutoModelForCausalLM.from_pretrained(export_merged(tmp_path / "run", tmp_path / "out"))
    torch.testing.assert_close(logits(merged), logits(federation.model, result.bank), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("settings", [{}, {"merge": "stack"}], ids=["adapter", "base"])
def test_the_best_round_is_exported(tmp_path, base, settings, monkeypatch):
    evaluate = fleet.LocalFleet.evaluate

    def found(self, cfg, state, progress):
        own = evaluate(self, cfg, state, progress)
        return own | {"client_text": own["client_text"] | {"loss": [3.0, 1.0, 2.0][state.round]}}

    monkeypatch.setattr(fleet.LocalFleet, "evaluate", found)
    finished(tmp_path / "run", base, keep_best=True, **settings)
    finished(tmp_path / "short", base, rounds=1, **settings)
    one, two = (load_file(export_merged(tmp_path / name, tmp_path / f"{name}-out") / "model.safetensors") for name in ("run", "short"))
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


# ---------------------------------------------------------------- what cannot be


def refused(run: Path, out: Path, reason: str, **choice) -> None:
    with pytest.raises(ConfigError, match=reason) as error:
        export_merged(run, out, **choice)
    assert "\n" not in str(error.value)
    assert not out.exists() and not list(out.parent.glob(".*staging*"))


def test_wrong_choices_are_named(tmp_path, run, base):
    refused(run, tmp_path / "out", "dtype: expected one of float32, bfloat16, float16, float64, got 'int8'", dtype="int8")
    refused(run, tmp_path / "out", "rank: expected 1 to 8", rank=9)
    refused(run, tmp_path / "out", "unknown client 'nobody'", client="nobody")
    refused(tmp_path, tmp_path / "out", "no run there")
    finished(tmp_path / "folded", base, merge="stack")
    refused(tmp_path / "folded", tmp_path / "out", "has no rank and no clients; leave --rank and --client out", rank=2)
    (tmp_path / "folded" / "checkpoint.safetensors").unlink()
    refused(tmp_path / "folded", tmp_path / "out", "checkpoint.safetensors: missing; finish the run")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(ConfigError, match="exists already; give a new folder"):
        export_merged(run, tmp_path / "full")


def test_a_weight_that_other_layers_use_is_not_changed_behind_their_back(tmp_path):
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, tie_word_embeddings=True)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    ByT5Tokenizer().save_pretrained(tmp_path / "base")
    finished(tmp_path / "run", tmp_path / "base", target_modules="lm_head")
    refused(tmp_path / "run", tmp_path / "out", r"lm_head shares its weight with model\.embed_tokens\.weight")


def test_numbers_that_a_type_cannot_hold_are_refused(tmp_path):
    model = tiny_model()
    with torch.no_grad():
        model.get_parameter("model.layers.0.mlp.up_proj.weight").mul_(1e7)
    model.save_pretrained(tmp_path / "base")
    ByT5Tokenizer().save_pretrained(tmp_path / "base")
    finished(tmp_path / "run", tmp_path / "base", lr=1e-6)
    refused(tmp_path / "run", tmp_path / "out", r"up_proj\.weight has numbers that are not finite in torch\.float16; give --dtype bfloat16", dtype="float16")


def test_the_command_line_writes_both(tmp_path, run):
    done = CliRunner().invoke(cli, ["export", str(run), "-o", str(tmp_path / "adapter"), "--merged", str(tmp_path / "merged"), "--dtype", "bfloat16"])
    assert done.exit_code == 0, done.output
    for name, dtype, reason in (("merged", "float32", "nothing is overwritten"), ("m", "int8", "dtype: expected one")):
        options = ["-o", str(tmp_path / "later"), "--merged", str(tmp_path / name), "--dtype", dtype]
        refused = CliRunner().invoke(cli, ["export", str(run), *options])
        assert refused.exit_code == 2 and reason in refused.output and not (tmp_path / "later").exists(), "before the adapter is written"
    assert f"merged model: {tmp_path / 'merged'}" in done.output and "adapter: " in done.output
    assert json.loads((tmp_path / "merged" / "config.json").read_text())["dtype"] == "bfloat16"
    for wrong, reason in (
        (["--dtype", "float16", "-o", "x"], "--dtype: of the weights that --merged DIR writes"),
        ([], "expected -o DIR for the adapter or --merged"),
    ):
        assert reason in CliRunner().invoke(cli, ["export", str(run), *wrong]).output


def test_a_run_without_an_adapter_is_refused_before_its_model_is_written(tmp_path, base):
    finished(tmp_path / "run", base, merge="stack", rounds=1)
    done = CliRunner().invoke(cli, ["export", str(tmp_path / "run"), "-o", str(tmp_path / "adapter"), "--merged", str(tmp_path / "merged")])
    assert done.exit_code == 2 and "no adapter holds them" in done.output
    assert not (tmp_path / "merged").exists() and not (tmp_path / "adapter").exists()


# ---------------------------------------------------------------- the card


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_the_card_says_what_was_done_and_no_place(tmp_path, run, base, kind):
    (export_adapter if kind == "adapter" else export_merged)(run, tmp_path / "out")
    text = (tmp_path / "out" / "README.md").read_text()
    assert not any(part in text for part in (str(tmp_path), "secret-place", "hidden-away", str(Path.home()), "client1"))
    _, head, body = text.split("---\n", 2)
    assert yaml.safe_load(head)["library_name"] == ("peft" if kind == "adapter" else "transformers")
    summary = json.loads((run / "summary.json").read_text())
    before, after = (summary[f"evaluation_{when}"]["client_text"]["perplexity"] for when in ("before", "after"))
    sequences = sum(client["sequences"] for client in summary["clients"])
    for part in (
        "adapters on the frozen base",
        "average the factors (as published)",
        "Rank of this export: 8",
        f"clients' own | {before:.2f} | {after:.2f}",
        "clients of rank 2 (1, each with what it receives;",
        f"Training sequences: {sequences}",
        "Clients that trained or could: 4",
        "Clients in a round: 4.",
        "Ranks of the clients: 2 to 8, mean 5.0",
        f"torch {torch.__version__}",
        "hetlora run --model base ",
        "--ranks 2,8,4,6",
        *(["Type of the weights: float32"] if kind == "model" else []),
    ):
        assert part in body, part


def test_the_card_says_what_its_figures_are_of(tmp_path, run):
    """The perplexities of the whole global adapter stood, without a word, on the card of one row of it, of a client's adapter and of rounded weights."""
    whole = "Measured by the run, on its global adapter with all its rows in float32."
    exports = {
        "whole": (export_adapter, {}, whole + "\n"),
        "row": (export_adapter, {"rank": 1}, whole + " This export is the rank rows that were asked for: what it reaches was not measured."),
        "client": (export_adapter, {"client": "client1"}, whole + " This export is one client's own adapter: what it reaches was not measured."),
        "merged": (export_merged, {}, whole + "\n"),
        "rounded": (export_merged, {"dtype": "bfloat16"}, whole + " This export is rounded to bfloat16: what it reaches was not measured."),
    }
    for name, (export, asked, said) in exports.items():
        assert said in (export(run, tmp_path / name, **asked) / "README.md").read_text(), name


FULL = {"train": "full", "weights": "samples", "ranks": "powerlaw:5:50", "gamma": 0.99, "prune_lambda": 1e-3}


@pytest.mark.parametrize("settings", [{"merge": "stack"}, {"merge": "residual"}, FULL], ids=["stack", "residual", "full"])
def test_the_card_of_a_run_without_an_adapter_speaks_of_its_model(tmp_path, base, settings):
    finished(tmp_path / "run", base, **settings)
    assert "Measured by the run, on its global model in float32.\n" in (export_merged(tmp_path / "run", tmp_path / "out") / "README.md").read_text()


def test_dropout_of_the_base_is_no_matter_of_an_export(tmp_path):
    """An export trains nothing. It told users of GPT-2 to give --dropout, which it has not."""
    folder = tmp_path / "base"
    GPT2LMHeadModel(GPT2Config(vocab_size=300, n_embd=8, n_layer=1, n_head=1)).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)
    said = []
    for work in (lambda: finished(tmp_path / "run", folder, target_modules="attention"), lambda: export_merged(tmp_path / "run", tmp_path / "out")):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            work()
        said.append(any("dropout of its own" in str(own.message) for own in caught))
    assert said == [True, False]


def test_a_card_of_a_run_whose_log_is_gone_says_so(tmp_path, run):
    import shutil

    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "rounds.jsonl").unlink()
    text = (export_adapter(tmp_path / "run", tmp_path / "out") / "README.md").read_text()
    assert "Not known: the run: the run has no round on record yet" in text and str(tmp_path) not in text


def test_a_card_of_a_private_run_says_what_is_covered_and_what_not(tmp_path, base):
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[dp]')")
    own = {"merge": "delta", "gamma": 1.0, "weights": "uniform", "cobatch": False, "dp_clipping_norm": 0.5, "dp_noise_multiplier": 2.0, "dp_delta": 1e-3}
    result, _ = finished(tmp_path / "private", base, **own)
    finished(tmp_path / "plain", base)
    exports = {"whole": ("private", None), "one": ("private", result.history[-1]["clients"][0]["name"]), "other": ("plain", None)}
    whole, one, plain = ((export_adapter(tmp_path / run, tmp_path / out, client=name) / "README.md").read_text() for out, (run, name) in exports.items())
    spent = result.summary["privacy"]["epsilon"]
    assert f"weights of the global adapter alone: epsilon {spent:.2f} at delta 0.001 (simulated: noise from the run's seed protects nobody)" in whole
    assert "It does not cover this export" in one and "epsilon" not in one
    assert all("The run folder is not private" in text and "figures of this card are without noise" in text for text in (whole, one))
    assert "ifferential privacy" not in plain and "private" not in plain.split("## Command")[0]


def test_a_card_of_full_fine_tuning_has_no_scale_of_an_adapter(tmp_path):
    full = Config(train="full", weights="samples", output=str(tmp_path / "run"))
    assert "Scale s" not in card(full, "no log", "none", 2.0, None, "float32")
    assert "Scale s = 2 in dW = s B A." in card(tiny_config(tmp_path / "run"), "no log", "8", 2.0, None, "float32")


def test_a_folder_here_is_no_base_on_the_hub(tmp_path, base, monkeypatch):
    monkeypatch.chdir(base.parent)
    cfg = tiny_config(tmp_path / "run", model=base.name)
    assert "base_model" not in card(cfg, "no log", "8", 2.0, None, "")
    assert 'base_model: "org/name"' in card(cfg.model_copy(update={"model": "org/name"}), "no log", "8", 2.0, None, "")


def test_command_and_names(tmp_path):
    cfg = tiny_config(tmp_path / "run", model="org/name", data="hub:org/texts", cobatch=False, skip_empty=True, prompt_field="a b", ranks="3", rounds=20)
    assert command(cfg) == (
        "hetlora run --model org/name --data hub:org/texts --prompt-field 'a b' --skip-empty --clients-per-round 3 --ranks 3 --gamma 0.8 "
        "--local-steps 2 --batch-size 2 --no-cobatch --eval-tokens 0"
    )
    (tmp_path / "here").mkdir()
    assert [public_name(str(name)) for name in ("demo", tmp_path / "here", "~/x/texts", "./texts/", "/a/b/", "C:\\x\\texts")] == [
        *("demo", "here", "texts", "texts", "b", "texts"),
    ]
