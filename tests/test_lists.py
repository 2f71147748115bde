"""docs/options.md and the table of ops in docs/kernels.md are those of the sources."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

from hetlora.config import Config

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("hetlora_lists", ROOT / "docs" / "lists.py")
lists = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(lists)


def test_the_pages_are_those_of_the_sources(capsys):
    assert lists.main(["--check"]) == 0, capsys.readouterr().out + "run: python docs/lists.py"


def test_an_older_page_is_noticed(tmp_path, monkeypatch, capsys):
    kept = {page: page.read_text(encoding="utf-8") for page in (lists.OPTIONS, lists.KERNELS)}
    for name, page in (("OPTIONS", lists.OPTIONS), ("KERNELS", lists.KERNELS)):
        copy = tmp_path / page.name
        copy.write_text(kept[page], encoding="utf-8")
        monkeypatch.setattr(lists, name, copy)
    monkeypatch.setattr(lists, "_shown", str)
    assert lists.main(["--check"]) == 0
    monkeypatch.setattr(lists, "cuda_kernels", lambda op, binding: [])
    assert lists.main(["--check"]) == 1 and "kernels.md" in capsys.readouterr().out
    monkeypatch.setattr(Config.model_fields["gamma"], "description", "Another meaning.")
    assert lists.main(["--check"]) == 1 and "options.md" in capsys.readouterr().out


def test_every_option_is_on_the_page():
    text = lists.OPTIONS.read_text(encoding="utf-8")
    assert [name for name in Config.model_fields if f"\n| `{name}` |" not in text] == []


def test_files_of_an_op_are_where_the_table_says():
    cells = lists.row("gram")
    assert cells[2:6] == ["`norms.cpp` `gram_kernels.cpp`", "`norms.cpp` `gram.cu`", "`gram.py`", "`test_norms*.py`"] and "`gram`" in cells[1]
    cuda = {op: lists.row(op)[3] for op in ("delta_norms", "tail_norms", "adamw_", "quantize_rows_", "lora_forward")}
    assert cuda["delta_norms"] == "`norms.cpp` `gram.cu`" and cuda["tail_norms"] == "`norms.cpp` `norms.cuh`" and cuda["adamw_"] == "`optim.cpp` `optim.cu`"
    assert cuda["quantize_rows_"] == "`quantize.cpp` `quantize.cu`" and cuda["lora_forward"] == "`lora.cpp` `expand.cu` `grouped_gram.cu` `shrink.cu`"
    assert lists.row("truncate_")[2] == "`truncate.cpp`" and lists.row("adamw_")[2] == "`optim.cpp` `optim_kernels.cpp`"
    assert {"`lora_ops.cpp`", "`lora.cpp`", "`lora_kernels.cpp`", "`lora_small.cpp`", "`base_product.cpp`"} <= {*lists.row("shrink")[2].split()}


def test_every_variable_of_the_project_is_on_the_page():
    files = [path for folder in ("hetlora", "hetlora_kernels", "benchmarks", "tests", "csrc") for path in (ROOT / folder).rglob("*")]
    read = re.compile(r"(?:environ\S*?|getenv)\W+(HETLORA_[A-Z_]+)")
    named = {name for path in [*files, ROOT / "setup.py"] if path.suffix in (".py", ".cpp", ".h") for name in read.findall(path.read_text(encoding="utf-8"))}
    assert len(named) > 4 and [name for name in sorted(named) if f"`{name}" not in lists.ENVIRONMENT] == []
