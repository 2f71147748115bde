"""The pages as a site: everything is there, links lead somewhere, and Markdown that GitHub and mkdocs read differently is not used."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
mkdocs = pytest.importorskip("mkdocs.commands.build", reason="the site needs mkdocs (the extra `docs`)")


def build(source: Path, target: Path) -> None:
    from mkdocs.config import load_config

    mkdocs.build(load_config(str(source / "mkdocs.yml"), site_dir=str(target), strict=True))


def test_the_site_is_built_without_a_warning(tmp_path: Path) -> None:
    build(ROOT, tmp_path)
    pages = {path.relative_to(tmp_path).as_posix(): path.read_text(encoding="utf-8") for path in tmp_path.rglob("*.html")}
    assert {path.relative_to(ROOT / "docs").with_suffix(".html").as_posix() for path in (ROOT / "docs").rglob("*.md")} < pages.keys()
    assert 'href="figures/peft.html"' in pages["index.html"] and 'href="figures/cpu-peft.json"' in pages["index.html"], "links of README.md"
    for name, page in pages.items():
        assert not re.findall(r'(?:src|<link[^>]* href)="(?:https?:)?//[^"]*"', page), f"{name}: loaded from elsewhere"
        text = re.sub(r"<pre>.*?</pre>", "", page, flags=re.DOTALL)
        assert not re.findall(r"^(?:<p>)?(?:- |\d+\. ).*", text, re.MULTILINE), f"{name}: a list has no blank line before it"
        assert not re.findall(r"^\|.*|.*```.*", text, re.MULTILINE), f"{name}: a table or code that mkdocs does not read as such"


@pytest.mark.parametrize("line", ["[x](nowhere.md)", "[x](maths.md#no-such-heading)", "[x](../setup.py)"])
def test_a_link_that_leads_nowhere_stops_it(line: str, tmp_path: Path) -> None:
    from mkdocs.exceptions import Abort

    docs = tmp_path / "docs"
    docs.mkdir()
    for name in ("docs/pages.py", "docs/maths.md"):
        shutil.copy(ROOT / name, docs)
    (tmp_path / "mkdocs.yml").write_text(re.sub(r"nav:\n  - hetlora.*", "", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), flags=re.DOTALL))
    (tmp_path / "examples").mkdir()
    for name in ("README.md", "README.ko.md", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "examples/jetson.Dockerfile"):
        (tmp_path / name).write_text("# A page\n")
    (docs / "maths.md").write_text("# Maths\n")
    build(tmp_path, tmp_path / "good")
    (docs / "methods.md").write_text(f"# Methods\n\n{line}\n")
    with pytest.raises(Abort, match="1 warnings in strict mode"):
        build(tmp_path, tmp_path / "bad")
