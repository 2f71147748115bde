"""The recipes under examples/ are accepted as they stand, and run from end to end on a tiny model of the same architecture with rows of the same columns."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hetlora.cli import cli
from hetlora.compare.methods import ComparisonPlan, make_plan, method_config, parse_methods
from hetlora.config import Config
from hetlora.data import load_data
from hetlora.python_text import stdlib_documents, unicode_scripts
from hetlora.ranks import StartingRanks

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
RECIPES = sorted(EXAMPLES.glob("*.yaml"))
ARCHITECTURES = {"HuggingFaceTB/SmolLM2-135M": "llama", "Qwen/Qwen2.5-0.5B": "qwen2"}
SMALL = "--device cpu --rounds 1 --seeds 1 --clients-per-round 2 --local-steps 1 --batch-size 1 --seq-len 48 --eval-tokens 200 --max-tokens-per-client 200"
NOT_IN_EVERY_PYTHON = {"distutils", "ensurepip", "idlelib", "lib2to3", "tkinter", "turtledemo"}  # removed since, or packages of their own on some systems


def read(path: Path) -> tuple[Config, ComparisonPlan]:
    values = Config.read(path)
    plan = make_plan(str(path), **{name: values.pop(name) for name in ComparisonPlan.model_fields if name in values})
    return Config.create(str(path), **values), plan


def test_there_are_recipes():
    assert len(RECIPES) == 8


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_method_of_a_recipe_can_run_with_its_settings(path):
    common, plan = read(path)
    assert common.output == f"runs/{path.stem}"
    for method in parse_methods(plan.methods):
        assert method_config(method, common, StartingRanks(5, 50, {"a": 5, "b": 50})).check() is None


@pytest.mark.parametrize("kind", ["compare-stdlib", "compare-unicode", "compare-fold", "study-packages", "study-letters", "study-sized"])
def test_search_clients_are_not_in_the_federation(kind):
    """So that no method's learning rate is chosen on the text that it is judged by."""
    common, plan = read(EXAMPLES / f"{kind}.yaml")
    letters = common.data.startswith("unicode:")
    there = set(unicode_scripts() if letters else stdlib_documents())
    federated, searched = (set(data.partition(":")[2].split(",")) for data in (common.data, plan.search_data))
    assert federated and searched and federated.isdisjoint(searched)
    assert federated | searched <= there | (set() if letters else NOT_IN_EVERY_PYTHON)


def load_tiny_model():
    spec = importlib.util.spec_from_file_location("tiny_model", EXAMPLES / "tiny_model.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dry_run(path: Path, folder: Path, *more: str) -> dict:
    """comparison.json of a recipe on a tiny model of its architecture, with rows of its columns."""
    common, _ = read(path)
    model = load_tiny_model().write_tiny_model(ARCHITECTURES[common.model], folder / "model")
    columns = [common.text_field, *([common.prompt_field] if common.prompt_field else [])]
    rows = [{common.client_field: f"client {k}", **{name: f"{name} {n} of {k}" for name in columns}} for k in range(3) for n in range(12)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--config", path, "--model", model, "--data", folder / "rows.jsonl", "--output", folder / "out", *more]
    arguments += [*SMALL.split(), *(["--rouge-examples", "2", "--rouge-tokens", "3"] if common.prompt_field else [])]
    result = CliRunner().invoke(cli, ["compare", *map(str, arguments)])
    assert result.exit_code == 0, result.output
    assert (folder / "out" / "comparison.html").is_file()
    return json.loads((folder / "out" / "comparison.json").read_text())


GPU = [path for path in RECIPES if path.stem.startswith("gpu-")]


@pytest.mark.parametrize("path", GPU, ids=lambda path: path.stem)
def test_dry_run(path, tmp_path):
    """With every method of the recipe, which are all there are but ablations."""
    common, plan = read(path)
    saved = dry_run(path, tmp_path, "--search", "")
    assert list(saved["methods"]) == [method.name for method in parse_methods(plan.methods)]
    assert saved["methods"].keys() == {method.name for method in parse_methods("main,field")} - {"hetlora-gamma1"}
    for method in saved["methods"].values():
        assert method["metrics"]["global_final"]["values"][0] > 1
        assert (method["metrics"]["rouge_l"]["values"][0] is not None) == bool(common.prompt_field)


def test_dry_run_of_a_search(tmp_path):
    saved = dry_run(EXAMPLES / "gpu-smollm2-oasst1.yaml", tmp_path, "--search", "lr=0.001", "--methods", "fold")
    assert saved["methods"]["fold"]["searched"] == "0.001" and saved["plan"]["search_beyond"] == 4


def test_unicode_clients_are_letters_by_script_and_parts_can_be_named():
    scripts = unicode_scripts()
    assert scripts["GREEK"][0].splitlines()[:2] == ["Ͱ GREEK CAPITAL LETTER HETA", "ͱ GREEK SMALL LETTER HETA"]
    assert not any(name in scripts for name in ("CJK", "DIGIT")) and "HANGUL SYLLABLE" not in scripts["HANGUL"][0]
    for letter_line in scripts["CYRILLIC"][0].splitlines():
        assert letter_line[0].isalpha() and letter_line[2:].startswith("CYRILLIC ")
    from transformers import ByT5Tokenizer

    def names(data: str) -> list[str]:
        return [client.name for client in load_data(Config(data=data, max_tokens_per_client=600), ByT5Tokenizer()).clients]

    assert names("unicode:RUNIC,GREEK") == ["GREEK", "RUNIC"]
    assert names("unicode:-GREEK") == [name for name in scripts if name != "GREEK"]
