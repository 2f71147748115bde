"""docs/api.md is that of the docstrings, and every public name has an example in its docstring that runs."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import inspect
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("hetlora_api_page", ROOT / "docs" / "api.py")
api = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(api)
FLOWER = importlib.util.find_spec("flwr") is not None
without_flower = pytest.mark.skipif(not FLOWER, reason="Flower is not installed (pip install '.[flower]'), and hetlora.flower has no names without it")
NAMES = [(path, name) for path in api.MODULES if FLOWER or path != "hetlora.flower" for name, _ in api.public(importlib.import_module(path))]
EXEMPT = {"SEQUENCE_STRIDE"}  # a number


def run_examples(docstring, name):
    """Failures of the examples in a docstring, and how many lines ran."""
    test = doctest.DocTestParser().get_doctest(inspect.cleandoc(docstring), {}, name, None, None)
    said = []
    runner = doctest.DocTestRunner(verbose=False, optionflags=doctest.ELLIPSIS)  # else pytest -v makes it tell of every line
    runner.run(test, out=said.append)
    return "".join(said), runner.tries


@pytest.mark.parametrize(("path", "name"), NAMES, ids=[f"{path}.{name}" for path, name in NAMES])
def test_every_public_name_has_an_example_that_runs(path, name, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    value = getattr(importlib.import_module(path), name)
    if name in EXEMPT:
        assert not callable(value)
        return
    said, lines = run_examples(value.__doc__ or "", f"{path}.{name}")
    assert lines > 0, "no example in the docstring"
    assert not said, said


@without_flower
def test_the_page_is_that_of_the_docstrings(capsys):
    assert api.main(["--check"]) == 0, capsys.readouterr().out + "run: python docs/api.py"


def test_a_wrong_example_and_a_missing_one_are_noticed():
    wrong = SimpleNamespace(__doc__="Adds.\n\n    >>> 1 + 1\n    3\n")
    assert "Expected:\n    3\nGot:\n    2" in run_examples(wrong.__doc__, "wrong")[0]
    assert run_examples("Nothing here.", "none") == ("", 0)
