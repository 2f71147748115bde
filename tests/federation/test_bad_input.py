"""Settings and folders that cannot be used: one clear line, before any work, and nothing overwritten."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tiny import SIZES, contents, tiny_config, tiny_federation

from hetlora import checkpoint, loop
from hetlora.config import Config, ConfigError
from hetlora.loop import simulate
from hetlora.models import target_shapes


@pytest.fixture(scope="module")
def federation():
    return tiny_federation(SIZES)


def refused(cfg, federation, message) -> str:
    with pytest.raises(ConfigError, match=message) as error:
        simulate(cfg, federation=federation)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_a_run_is_not_overwritten(tmp_path, federation, monkeypatch):
    cfg = tiny_config(tmp_path / "run", rounds=1)
    simulate(cfg, federation=federation)
    before = contents(tmp_path / "run")
    refused(cfg, federation, "output: .*run exists already; choose another folder, or continue that run with --resume")
    with pytest.raises(ConfigError, match="exists already"):
        checkpoint.create_run(cfg, torch.device("cpu"))
    monkeypatch.setattr(loop, "prepare", lambda *_, **__: pytest.fail("the model was loaded first"))
    refused(cfg, None, "exists already")
    assert contents(tmp_path / "run") == before and [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_something_else_is_not_overwritten(tmp_path, federation, kind):
    mine = tmp_path / "run" if kind == "file" else tmp_path / "run" / "mine.txt"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("mine")
    refused(tiny_config(tmp_path / "run"), federation, "exists already")
    assert mine.read_text() == "mine" and len(list(tmp_path.rglob("*"))) == (1 if kind == "file" else 2)


def test_an_empty_folder_may_be_used(tmp_path, federation):
    (tmp_path / "run").mkdir()
    simulate(tiny_config(tmp_path / "run", rounds=1), federation=federation)
    assert (tmp_path / "run" / "summary.json").is_file()


def test_a_folder_that_cannot_be_made(tmp_path, federation):
    (tmp_path / "file").write_text("mine")
    refused(tiny_config(tmp_path / "file" / "run"), federation, "output: cannot create .*; choose a folder that can be written")


def test_a_folder_that_cannot_be_made_is_told_before_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setattr(loop, "prepare", lambda *_, **__: pytest.fail("the model was loaded first"))
    (tmp_path / "file").write_text("mine")
    refused(tiny_config(tmp_path / "file" / "a" / "run"), None, "output: cannot create .*file is no folder.*; choose a folder that can be written")
    monkeypatch.setattr("os.access", lambda path, _: Path(path) != tmp_path)  # the superuser may write everywhere
    refused(tiny_config(tmp_path / "a" / "run"), None, f"output: cannot create .*{tmp_path.name} may not be written to")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"merge": "svd", "shared_rows": "owners"}, "shared_rows = 'owners': only for merge = 'factors' or 'residual' or 'one-factor', got merge = 'svd'"),
        ({"merge": "stack", "unowned_rows": "zero"}, "unowned_rows = 'zero': only for merge = 'factors' or 'residual' or 'one-factor', got merge = 'stack'"),
        ({"merge": "stack", "quantize": "4bit"}, "quantised base cannot take; use quantize = 'none'"),
        ({"merge": "median"}, "weights = 'sparsity': this merge counts all clients the same, .*use weights = 'uniform'"),
        ({"weights": "uniform", "trim": 0.1}, "trim = 0.1: only for merge = 'trimmed', got merge = 'factors'"),
        ({"train": "full", "weights": "uniform", "clip_median": 1.0}, "clip_median = 1.0.*of adapters, and train = 'full' trains none"),
        ({"weights": "uniform", "weight_cap": 2.0}, "weight_cap = 2.0: only for weights = 'sparsity', got weights = 'uniform'"),
        ({"weights": "samples", "weight_scope": "client"}, "weight_scope = 'client': only for weights = 'sparsity', got weights = 'samples'"),
        ({"momentum": 0.9}, "momentum = 0.9: only for optimizer = 'sgd'"),
        ({"moments_dtype": "bfloat16", "adapter_dtype": "bfloat16"}, "moments_dtype = 'bfloat16': beside adapters in float32, and adapter_dtype = 'bfloat16'"),
        ({"moments_dtype": "bfloat16", "optimizer": "sgd"}, "moments_dtype = 'bfloat16': of SGD's momentum, above 0 and at most 0.95, .* and momentum = 0.0"),
        ({"moments_dtype": "bfloat16", "optimizer": "sgd", "momentum": 0.99}, "at most 0.95, as rounding would hold a slower one still, and momentum = 0.99"),
        ({"train": "full", "weights": "uniform", "moments_dtype": "bfloat16"}, "moments_dtype = 'bfloat16'.*of adapters, and train = 'full' trains none"),
        ({"local_epochs": 2, "local_steps": 3}, "local_steps = 3: local_epochs = 2 counts passes in place of steps; leave one of them out"),
        ({"rouge_tokens": 9}, "rouge_tokens = 9: of answers, and none are asked for; set rouge_examples or sample_prompts, or leave it out"),
        ({"data": "stdlib", "split": "test"}, "split = 'test': of a hub data set, and data = 'stdlib' is none; leave it out"),
        ({"dropout": 1e-6}, "dropout: expected 0, or a probability from 1/65536"),
        ({"dropout": 1 - 1e-9}, "dropout: expected 0, or a probability from 1/65536"),
        ({"ranks": "17,2,2,2"}, "rank 17 is above the width 8 of module 'model.layers.0.self_attn.k_proj'"),
        ({"ranks": "2,2,2"}, "expected 4 ranks, one per training client"),
        ({"ranks": "column:memory:2:4"}, "needs the column 'memory'"),
    ],
)
def test_settings_that_do_not_go_together(tmp_path, federation, settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        simulate(tiny_config(tmp_path / "run", **settings), federation=federation)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gama": 0.9}, r"unknown setting 'gama' \(did you mean 'gamma'\?\)"),
        (
            {"merge": "mean"},
            "merge: .*'factors', 'delta', 'svd', 'owners-svd', 'energy', 'trimmed', 'median', 'stack', 'energy-stack' or 'residual', got 'mean'",
        ),
        ({"gamma": 0}, "gamma: .*greater than 0, got 0"),
        ({"gamma": 1.1}, "gamma: .*less than or equal to 1, got 1.1"),
        ({"clients_per_round": 0}, "clients_per_round: .*greater than or equal to 1, got 0"),
        ({"rounds": "many"}, "rounds: .*got 'many'"),
        ({"prune_lambda": -1}, "prune_lambda: .*got -1"),
        ({"lr": float("nan")}, "lr: .*got nan"),
        ({"lr": float("inf")}, "lr: .*got inf"),
        ({"lr": 0, "rank": 3}, "lr: .*; unknown setting 'rank'|unknown setting 'rank'.*; lr:"),
    ],
)
def test_settings_out_of_range_are_named(settings, message):
    with pytest.raises(ConfigError, match=message) as error:
        Config.create("here", **settings)
    assert str(error.value).startswith("here: ") and "\n" not in str(error.value)


def test_a_smaller_target_sets_the_limit_of_the_rank(tmp_path, federation):
    wide = tiny_federation(SIZES)
    wide.shapes = target_shapes(wide.model, "q_proj")
    simulate(tiny_config(tmp_path / "run", ranks="16,2,2,2", rounds=1), federation=wide)
    refused(tiny_config(tmp_path / "other", ranks="16,2,2,2"), federation, "rank 16 is above the width 8")


def test_more_clients_per_round_than_there_are(tmp_path, federation):
    result = simulate(tiny_config(tmp_path / "run", clients_per_round=50, rounds=1), federation=federation)
    assert [client["name"] for client in result.history[1]["clients"]] == [f"client{k}" for k in range(4)]
