"""What mkdocs does to the pages on their way to the site (`hooks` of mkdocs.yml).

On GitHub a page lies where its file does, so README.md links to docs/x.md. The site has docs/ as its root. Pages and files beside docs/ are added under
the names below, and links between pages are made those of the site. One that leads nowhere stays as it is, and `mkdocs build --strict` stops at it.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parent.parent
ADDED = {
    "README.md": "index.md",
    "README.ko.md": "index.ko.md",
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "reporting.md",
    "examples/jetson.Dockerfile": "jetson.Dockerfile",
    **{f"benchmarks/results/{path.name}": f"figures/{path.name}" for path in sorted((ROOT / "benchmarks" / "results").glob("*.json"))},
}
FROM = {there: here for here, there in ADDED.items()}


def github_slug(title: str, separator: str) -> str:
    """The name by which GitHub links to a heading."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", separator)


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    config.mdx_configs["toc"] = {"slugify": github_slug}
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    for here, there in ADDED.items():
        files.append(File.generated(config, there, abs_src_path=str(ROOT / here)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    own = page.file.src_uri
    here = posixpath.dirname(FROM.get(own, f"docs/{own}"))

    def link(match: re.Match[str]) -> str:
        name, mark, heading = match[1].partition("#")
        if not name or "://" in name:
            return match[0]
        repository = posixpath.normpath(posixpath.join(here, name))
        site = "index.md" if repository == "docs" else ADDED.get(repository, repository.removeprefix("docs/"))
        return f"]({posixpath.relpath(site, posixpath.dirname(own) or '.')}{mark}{heading})"

    parts = re.split(r"(^```.*?^```$)", markdown, flags=re.MULTILINE | re.DOTALL)
    return "".join(part if part.startswith("```") else re.sub(r"\]\(([^)\s]+)\)", link, part) for part in parts)
