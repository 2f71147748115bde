"""A run that starts from an adapter in PEFT's format computes what PEFT computes with it, and refuses by name what does not fit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_kinds import RUN_IDS, RUNS
from tiny import SIZES, Interrupt, Stop, lines, row, tiny_config, tiny_federation, tiny_model

from hetlora import init_adapter, server
from hetlora.config import ConfigError
from hetlora.evaluate import evaluate_bank
from hetlora.export import export_adapter
from hetlora.loop import simulate

RANKS = "2,8,4,6"


def peft_adapter(folder: Path, **settings) -> torch.nn.Module:
    """An adapter with a B of its own, written by PEFT, and the model with it."""
    values = {"r": 3, "lora_alpha": 5, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], **settings}
    model = get_peft_model(tiny_model(), LoraConfig(task_type="CAUSAL_LM", **values))
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if ".lora_" in name:
                weight.copy_(0.3 * torch.randn(weight.shape, generator=generator))
    model.save_pretrained(folder)
    return model


def started(tmp_path: Path, **settings):
    """(the bank that a run starts from, its federation)"""
    cfg = tiny_config(tmp_path / "run", ranks=RANKS, init_adapter=str(tmp_path / "adapter"), **settings)
    federation = tiny_federation(SIZES, target=cfg.target_modules)
    bank = server.fresh_bank(federation.shapes, 8, cfg, torch.device("cpu"))
    return bank, federation, init_adapter.fill(bank, init_adapter.read(cfg), cfg)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"rank_pattern": {"q_proj": 8, "layers.1.self_attn.v_proj": 1}, "alpha_pattern": {"k_proj": 11}},
        {"target_modules": ["q_proj", "v_proj"], "init_lora_weights": "gaussian"},
    ],
    ids=["plain", "rslora", "patterns", "some modules"],
)
def test_the_bank_computes_what_peft_computes(tmp_path, settings):
    """Losses of the tiny model in float64, by the bank and by PEFT's own forward."""
    theirs = peft_adapter(tmp_path / "adapter", **settings).double().eval()
    theirs.get_base_model().set_attn_implementation("sdpa")  # as in `tiny_model` of float64
    bank, _, said = started(tmp_path, adapter_dtype="float64")
    own = tiny_federation(SIZES, dtype=torch.float64)
    sequence = own.data.clients[0].test[0]
    with torch.no_grad():
        expected, bare = (
            float(torch.nn.functional.cross_entropy(model(input_ids=sequence[None]).logits[0, :-1], sequence[1:]))
            for model in (theirs, tiny_model(torch.float64))
        )
    found = evaluate_bank(own.model, bank, [sequence], 2.0, 1024)["loss"]
    assert found == pytest.approx(expected, rel=1e-12) and abs(bare - expected) > 1e-3
    assert ("4 modules that it does not adapt start afresh" in said) == ("target_modules" in settings)
    assert f"rank {max(3, *settings.get('rank_pattern', {}).values())}" in said if "rank_pattern" in settings else "rank 3" in said


def test_rows_past_the_adapters_rank_are_those_of_a_fresh_bank(tmp_path):
    peft_adapter(tmp_path / "adapter")
    bank, federation, _ = started(tmp_path)
    fresh = server.fresh_bank(federation.shapes, 8, tiny_config(tmp_path / "run", ranks=RANKS), torch.device("cpu"))
    for name in federation.shapes:
        for j in range(3, 8):
            assert torch.equal(row(bank, "a", name, 0, j), row(fresh, "a", name, 0, j)) and not row(bank, "bt", name, 0, j).any()
        assert all(row(bank, "bt", name, 0, j).any() for j in range(3))


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_every_kind_starts_from_it_or_refuses_by_name(tmp_path, settings):
    peft_adapter(tmp_path / "adapter")
    values = {"lr": 0.01, "rounds": 2, "ranks": RANKS, "init_adapter": str(tmp_path / "adapter"), **settings}
    if settings.get("merge") in ("stack", "energy-stack") or settings.get("train") == "full":
        with pytest.raises(ConfigError, match=r"init_adapter = '.*': .*(merge the adapter into the model|train = 'full' trains none)"):
            tiny_config(tmp_path / "run", **values)
        return
    cfg = tiny_config(tmp_path / "run", **values)
    whole = simulate(cfg, federation=tiny_federation(SIZES), quiet=True)
    bank, federation, _ = started(tmp_path)
    data = [s for turn in range(2) for client in federation.data.clients for s in client.test[turn : turn + 1]]
    first = evaluate_bank(federation.model, bank, data, cfg.scale, cfg.max_tokens_per_step)
    assert whole.history[0]["evaluation"]["client_text"] == first
    other = cfg.model_copy(update={"output": str(tmp_path / "stopped")})
    with pytest.raises(Stop):
        simulate(other, federation=tiny_federation(SIZES), observer=Interrupt("round_end", 2))
    (tmp_path / "adapter").rename(tmp_path / "gone")  # what goes on needs it no more
    simulate(other, resume=True, federation=tiny_federation(SIZES), quiet=True)
    assert lines(tmp_path / "stopped") == lines(tmp_path / "run")


def test_a_frozen_factor_that_was_not_drawn_travels_once(tmp_path):
    """B-only training downloads A with the first visit, since nobody can draw it."""
    peft_adapter(tmp_path / "adapter")
    common = {"train": "b-only", "gamma": 0.99, "ranks": "fixed:8", "rounds": 2, "clients_per_round": 4}
    with_it = simulate(tiny_config(tmp_path / "run", init_adapter=str(tmp_path / "adapter"), **common), federation=tiny_federation(SIZES), quiet=True)
    without = simulate(tiny_config(tmp_path / "plain", **common), federation=tiny_federation(SIZES), quiet=True)
    rows_of_a = sum(8 * n * 4 for _, n in tiny_federation(SIZES).shapes.values())
    down = [[record["bytes_down"] for record in result.history[1:]] for result in (with_it, without)]
    assert down[0][0] == down[1][0] + 4 * rows_of_a and down[0][1] == down[1][1]


def test_an_exported_adapter_starts_another_run(tmp_path):
    first = simulate(tiny_config(tmp_path / "first", ranks=RANKS, lr=0.05), federation=tiny_federation(SIZES), quiet=True)
    export_adapter(tmp_path / "first", tmp_path / "adapter")
    second = simulate(
        tiny_config(tmp_path / "second", ranks=RANKS, init_adapter=str(tmp_path / "adapter"), rounds=1), federation=tiny_federation(SIZES), quiet=True
    )
    assert second.history[0]["evaluation"]["client_text"] == first.history[-1]["evaluation"]["client_text"]


def spoil(folder: Path, kind: str) -> None:
    config, weights = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    settings, tensors = json.loads(config.read_text()), load_file(weights)
    key = next(key for key in tensors if key.endswith("layers.1.self_attn.q_proj.lora_A.weight"))
    if kind == "no folder":
        weights.unlink()
    elif kind == "no json":
        config.write_text("{")
    elif kind == "cut":
        weights.write_bytes(weights.read_bytes()[:100])
    elif kind in ("IA3", "dora", "bias", "layers", "pissa", "alpha", "r"):
        name, value = {
            "IA3": ("peft_type", "IA3"),
            "dora": ("use_dora", True),
            "bias": ("bias", "all"),
            "layers": ("layer_replication", [[0, 2]]),
            "pissa": ("init_lora_weights", "pissa"),
            "alpha": ("lora_alpha", 0),
            "r": ("r", 4),
        }[kind]
        config.write_text(json.dumps({**settings, name: value}))
    else:
        if kind == "one half":
            del tensors[key]
        elif kind == "more":
            tensors["base_model.model.lm_head.weight"] = torch.zeros(2, 2)
        elif kind == "nan":
            tensors[key][0, 0] = float("nan")
        elif kind == "other module":
            config.write_text(json.dumps({**settings, "base_model_name_or_path": "another/model"}))
            for end in ("lora_A", "lora_B"):
                tensors[key.replace("q_proj", "elsewhere").replace("lora_A", end)] = tensors.pop(key.replace("lora_A", end))
        elif kind == "width":
            tensors[key] = torch.zeros(3, 17)
        elif kind == "whole numbers":
            tensors[key] = tensors[key].int()
        save_file(tensors, weights)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("no folder", "expected a folder with adapter_config.json and adapter_model.safetensors"),
        ("no json", "adapter_config.json cannot be read"),
        ("cut", "adapter_model.safetensors cannot be read"),
        ("IA3", "expected an adapter of peft_type 'LORA', got 'IA3'"),
        ("dora", "use_dora = True is no plain LoRA"),
        ("bias", "bias = 'all' is no plain LoRA"),
        ("layers", "layer_replication = .* is no plain LoRA"),
        ("pissa", "init_lora_weights = 'pissa' changed the base model"),
        ("alpha", r"layers\.0\.self_attn\.k_proj: lora_alpha: expected a number > 0, got 0"),
        ("r", "says rank 4, its tensors have 3"),
        ("one half", r"'base_model.model.model.layers.1.self_attn.q_proj.lora_B.weight' is none"),
        ("more", "'base_model.model.lm_head.weight' is none"),
        ("nan", "layers.1.self_attn.q_proj: holds numbers that are not finite"),
        ("other module", r"\(made for another/model\): it adapts .*elsewhere, which target_modules = 'attention' does not choose .* made for this model"),
        ("width", "layers.1.self_attn.q_proj: made for a layer of 17 inputs and 16 outputs, this model's has 16 and 16"),
        ("whole numbers", r"expected A \[r, n\] and B \[m, r\] of floating-point numbers"),
    ],
)
def test_what_does_not_fit_is_named_and_leaves_no_run(tmp_path, kind, reason):
    peft_adapter(tmp_path / "adapter")
    spoil(tmp_path / "adapter", kind)
    cfg = tiny_config(tmp_path / "run", ranks=RANKS, init_adapter=str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=reason) as error:
        simulate(cfg, federation=tiny_federation(SIZES), quiet=True)
    assert str(error.value).startswith("init_adapter ") and "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()


def test_an_adapter_of_more_rank_than_the_bank_is_refused(tmp_path):
    peft_adapter(tmp_path / "adapter", r=9)
    cfg = tiny_config(tmp_path / "run", ranks=RANKS, init_adapter=str(tmp_path / "adapter"))
    with pytest.raises(ConfigError, match=r"rank 9 in model\.layers\.0\.self_attn\.k_proj, and ranks = '2,8,4,6' gives the bank 8 rows"):
        simulate(cfg, federation=tiny_federation(SIZES), quiet=True)
