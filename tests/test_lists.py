"""docs/options.md and the table of ops in docs/kernels.md are those of the sources."""

from __future__ import annotations

import importlib.util
from pathlib import Path

from hetlora.config import Config

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("hetlora_lists", ROOT / "docs" / "lists.py")
lists = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lists)


def test_the_pages_are_those_of_the_sources(capsys):
    assert lists.main(["--check"]) == 0, capsys.readouterr().out + "run: python docs/lists.py"


def test_an_older_page_is_noticed(tmp_path, monkeypatch):
    page = tmp_path / "options.md"
    page.write_text(lists.options().replace("| `gamma` |", "| `gama` |"))
    monkeypatch.setattr(lists, "OPTIONS", page)
    monkeypatch.setattr(lists, "ROOT", tmp_path)
    monkeypatch.setattr(lists, "pages", lambda: {page: lists.options()})
    assert lists.main(["--check"]) == 1


def test_every_option_is_on_the_page():
    text = lists.OPTIONS.read_text(encoding="utf-8")
    assert [name for name in Config.model_fields if f"\n| `{name}` |" not in text] == []


def test_files_of_an_op_are_where_the_table_says():
    cells = lists.row("gram")
    assert cells[2:6] == ["`norms.cpp`", "`norms.cpp` `gram.cu`", "`gram.py`", "`test_norms*.py`"] and "`gram`" in cells[1]
