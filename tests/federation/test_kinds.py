"""Rows of data for kinds of training and merges: each says what its function does, and a row and a function are all that a new merge takes."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from tiny import SIZES, Interrupt, Stop, contents, lines, tiny_config, tiny_federation

from hetlora import checkpoint
from hetlora.cli import cli
from hetlora.compare.methods import OWNED
from hetlora.config import Config, ConfigError
from hetlora.export import export_adapter
from hetlora.kinds import MERGE_CHOICES, MERGES, TRAININGS, own_settings
from hetlora.loop import simulate

PACKAGE = Path(__file__).resolve().parents[2] / "hetlora"
UNWEIGHTED = [name for name, kind in MERGES.items() if any("weights" in refusal.settings for refusal in kind.refuses)]
RUNS = [{"merge": name, **({"weights": "uniform"} if name in UNWEIGHTED else {})} for name in MERGE_CHOICES]
RUNS += [
    {"train": name, "weights": "samples", "gamma": 0.99, **({"ranks": "powerlaw:5:50"} if kind.no_ranks else {})}
    for name, kind in TRAININGS.items()
    if kind.merge
]
RUN_IDS = [settings.get("train") or settings["merge"] for settings in RUNS]
OTHER_VALUES = {"shared_rows": "owners", "unowned_rows": "zero", "download": "4bit", "trim": 0.1, "energy": 0.5}  # of the settings that one kind alone reads


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """{settings: (config, folder, history, weights before, weights after)} of a run of two rounds, made once each."""
    made = {}

    def get(settings):
        key = str(settings)
        if key not in made:
            federation = tiny_federation(SIZES)
            before = {name: weight.clone() for name, weight in federation.model.named_parameters()}
            cfg = tiny_config(tmp_path_factory.mktemp("kind") / "run", rounds=2, lr=0.01, **settings)
            history = simulate(cfg, federation=federation).history
            made[key] = cfg, Path(cfg.output), history, before, dict(federation.model.named_parameters()), list(federation.shapes)
        return made[key]

    return get


@pytest.mark.parametrize("kind", [*TRAININGS.values(), *MERGES.values()], ids=lambda kind: kind.name)
def test_every_row_has_its_function_and_its_settings_exist(kind):
    assert callable(kind.load())
    refused = [name for refusal in kind.refuses for name in refusal.settings]
    assert set(kind.settings) | set(refused) <= set(Config.model_fields)
    assert all(refusal.why for refusal in kind.refuses)


def test_every_merge_is_one_that_a_run_can_have():
    assert set(MERGES) == {*MERGE_CHOICES, *(kind.merge for kind in TRAININGS.values() if kind.merge)}
    assert set(own_settings()) == set(OTHER_VALUES) <= set(OWNED)


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_a_row_says_which_weights_of_the_base_change_and_are_saved(finished, settings):
    cfg, folder, _, before, after, targets = finished(settings)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    expected = {"none": set(), "targets": {f"{name}.weight" for name in targets}, "all": set(before)}[cfg.merge_kind.base]
    assert changed == expected
    _, tensors = checkpoint.load_checkpoint(folder)
    assert {key.removeprefix("base.") for key in tensors if key.startswith("base.")} == expected
    assert all(torch.equal(tensors[f"base.{name}"], after[name]) for name in expected)


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_a_row_says_whether_a_bank_lasts(finished, settings):
    """A merged bank has a B. A fresh one has B = 0, which is what the next round of these merges starts from."""
    cfg, folder, history, *_ = finished(settings)
    tensors = checkpoint.load_checkpoint(folder)[1]
    assert any(bool(value.any()) for key, value in tensors.items() if key.startswith("bank.bt.")) == cfg.merge_kind.keeps_bank
    rows_travel = all(client["bytes_down"] > 0 for client in history[1]["clients"])
    assert rows_travel == (cfg.merge_kind.keeps_bank or cfg.train == "full")


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_a_row_says_which_adapters_are_saved_and_exported(finished, tmp_path, settings):
    cfg, folder, history, *_ = finished(settings)
    saves = cfg.saves
    assert (folder / "adapter" / "adapter_model.safetensors").is_file() == ("global" in saves)
    names = {client["name"] for record in history[1:] for client in record["clients"]} if "clients" in saves else set()
    assert {path.name for path in folder.glob("clients/*")} == names
    if cfg.merge_kind.no_adapter:
        with pytest.raises(ConfigError) as error:
            export_adapter(folder, tmp_path / "out")
        assert str(error.value) == f"{folder}: {cfg.merge_kind.no_adapter}"
    else:
        assert (export_adapter(folder, tmp_path / "out") / "adapter_config.json").is_file()


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_every_kind_goes_on_after_a_stop_to_the_same_bits(finished, tmp_path, settings):
    cfg, folder, *_ = finished(settings)
    again = cfg.model_copy(update={"output": str(tmp_path / "run")})
    with pytest.raises(Stop):
        simulate(again, federation=tiny_federation(SIZES), observer=Interrupt("round_end", 2))  # rounds 0 and 1 are closed
    simulate(again, resume=True, federation=tiny_federation(SIZES), quiet=True)
    assert lines(tmp_path / "run") == lines(folder)
    kept = {name: content for name, content in contents(folder).items() if name.startswith(("adapter/", "clients/", "checkpoint."))}
    assert {name: content for name, content in contents(tmp_path / "run").items() if name in kept} == kept


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
@pytest.mark.parametrize("setting", list(OTHER_VALUES))
def test_settings_of_one_kind_are_refused_with_the_others(settings, setting):
    chooser, owners = own_settings()[setting]
    values = {**settings, setting: OTHER_VALUES[setting]}
    cfg = Config.create("here", **settings)
    if {"train": cfg.train, "merge": cfg.merge_kind.name}[chooser] in owners:
        assert getattr(Config.create("here", **values), setting) == OTHER_VALUES[setting]
    else:
        with pytest.raises(ConfigError, match=f"{setting} = {OTHER_VALUES[setting]!r}: "):
            Config.create("here", **values)


def test_help_says_what_every_kind_does():
    text = " ".join(CliRunner().invoke(cli, ["run", "--help"], terminal_width=100_000, max_content_width=100_000).output.split())
    for kind in [*TRAININGS.values(), *(MERGES[name] for name in MERGE_CHOICES)]:
        assert f"'{kind.name}': {kind.text}" in text


def test_no_other_file_asks_for_a_kind_by_its_name():
    """`cfg.train == "full"` and the like would be a second place that a new kind has to touch."""
    asked = []
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Compare):
                parts = [node.left, *node.comparators]
                attributes = {part.attr for part in parts if isinstance(part, ast.Attribute)}
                if attributes & {"train", "merge"} and any(isinstance(part, ast.Constant) for part in parts):
                    asked.append(f"{path.name}:{node.lineno}")
    assert asked == []


NEW_MERGE = """
import sys
from hetlora import kinds

kinds.MERGES["last"] = kinds.MergeKind("last", "the bank of the client that comes last", "new_merge:merge_last", settings=("weight_decay",))
kinds.MERGE_CHOICES = (*kinds.MERGE_CHOICES, "last")


def merge_last(call):
    from hetlora.merge import Merged

    own = call.uploads.select([call.uploads.num_clients - 1])
    return Merged(own.aggregate([1.0], call.r_max), rows=max(layout.max_rank for layout in own.layouts.values()))


if __name__ == "__main__":
    sys.modules["new_merge"] = sys.modules["__main__"]
    from tiny import SIZES, tiny_config, tiny_federation

    from hetlora.config import ConfigError
    from hetlora.loop import simulate

    simulate(tiny_config(sys.argv[1], merge="last", diagnostics=True, weight_decay=0.1, lr=0.05), federation=tiny_federation(SIZES), quiet=True)
    try:
        tiny_config(sys.argv[1], merge="svd", weight_decay=0.1)
    except ConfigError as error:
        print(error)
"""


def test_a_row_and_a_function_add_a_merge(tmp_path):
    (tmp_path / "new_merge.py").write_text(NEW_MERGE)
    paths = f"{Path(__file__).parent}:{PACKAGE.parent}"
    done = subprocess.run([sys.executable, tmp_path / "new_merge.py", tmp_path / "run"], env={"PYTHONPATH": paths}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "test: weight_decay = 0.1: only for merge = 'last', got merge = 'svd'; leave it out"
    _, *trained = lines(tmp_path / "run")
    assert all(record["diagnostics"]["merge_error"] > 0 for record in trained)
    last = trained[-1]["clients"][-1]["name"]
    merged, own = (load_file(tmp_path / "run" / folder / "adapter_model.safetensors") for folder in ("adapter", f"clients/{last}"))
    for name, factor in own.items():
        of_client = merged[name][: len(factor)] if "lora_A" in name else merged[name][:, : factor.shape[1]]
        assert torch.equal(of_client, factor) and factor.any()
