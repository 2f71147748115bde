"""Text that every machine with Python has: its standard library, split into public text (pre-training) and packages (clients), and Unicode's names.

Public text is the docstrings of the library's single-file modules and the language topics of `pydoc_data`: English about Python.
Clients are the library's packages, which are code, or the scripts of Unicode; no file is in both, so the federation is a real shift of domain.
"""

from __future__ import annotations

import ast
import sys
import sysconfig
import unicodedata
import warnings
from pathlib import Path

from hetlora.config import ConfigError

MIN_CHARACTERS = 6144
"""A package with less text than this is no client."""

# lib2to3 and idlelib are left out because some systems ship them as separate packages and some not at all.
_EXCLUDED = frozenset({"test", "tests", "idle_test", "idlelib", "lib2to3", "site-packages", "dist-packages", "pydoc_data", "__pycache__"})


def _library() -> Path:
    return Path(sysconfig.get_paths()["stdlib"])


def _read(path: Path) -> str | None:
    """A few files of the library are deliberately not UTF-8, and some installations hide single files: those are no text."""
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def stdlib_documents() -> dict[str, list[str]]:
    """{package: its source files in the order of their paths}, for packages of at least `MIN_CHARACTERS`, sorted by name.

    Raises `ConfigError` where the installation has no library sources (compiled or zipped libraries).
    """
    root = _library()
    packages = {}
    for folder in sorted(p.parent for p in root.glob("*/__init__.py")):
        if folder.name in _EXCLUDED or not folder.name.isidentifier():
            continue
        files = sorted((p for p in folder.rglob("*.py") if not _EXCLUDED.intersection(p.relative_to(root).parts)), key=lambda p: p.relative_to(root).parts)
        texts = [text for text in map(_read, files) if text]
        if sum(map(len, texts)) >= MIN_CHARACTERS:
            packages[folder.name] = texts
    if not packages:
        raise ConfigError(f"data 'stdlib': no sources of Python's library in {root}; give --data a folder of your own text")
    return packages


def stdlib_packages() -> dict[str, str]:
    """{package name: all its source text}: what `stdlib_documents` gives, one string per package."""
    return {name: "\n".join(texts) for name, texts in stdlib_documents().items()}


MIN_SCRIPT_BYTES = 2048
"""A script with less text than this is no client."""


def unicode_scripts() -> dict[str, list[str]]:
    """{script: one document}, a line 'x LATIN SMALL LETTER X' for each letter, in code point order; scripts of at least `MIN_SCRIPT_BYTES`, by name.

    The script is the first word of the letters' names, as Python's library has no other mark of it. Characters whose names are made by rule
    ('CJK UNIFIED IDEOGRAPH-4E00', 'HANGUL SYLLABLE GA') are left out. Depends on the Unicode version alone, not on how Python was installed.
    """
    scripts: dict[str, list[str]] = {}
    for code in range(sys.maxunicode + 1):
        letter = chr(code)
        name = unicodedata.name(letter, "") if unicodedata.category(letter).startswith("L") else ""
        if name and not name.endswith(f"-{code:04X}") and not name.startswith("HANGUL SYLLABLE "):
            scripts.setdefault(name.split()[0], []).append(f"{letter} {name}\n")
    texts = {script: "".join(lines) for script, lines in sorted(scripts.items())}
    return {script: [text] for script, text in texts.items() if len(text.encode()) >= MIN_SCRIPT_BYTES}


def public_text() -> list[str]:
    """Documents for pre-training: one per single-file module (its docstrings), one per topic of `pydoc_data`; about 1.3 MB.

    Raises `ConfigError` where the installation has neither.
    """
    root = _library()
    texts = []
    for path in sorted(root.glob("*.py")):
        source = _read(path)
        if source and (found := _docstrings(source)):
            texts.append("\n\n".join(found) + "\n")
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some systems package the topics separately
        warnings.warn("pydoc_data.topics is not installed: the demo model is pre-trained on docstrings alone", stacklevel=2)
    else:
        texts += [topics[name] for name in sorted(topics)]
    if not texts:
        raise ConfigError(f"model 'demo': no text to pre-train on in {root}; give --model a local folder or a hub id")
    return texts


def _docstrings(source: str) -> list[str]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # old escapes in the library's strings are not the user's concern
        try:
            tree = ast.parse(source)
        except SyntaxError:
            return []
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    return [text for node in ast.walk(tree) if isinstance(node, documented) and (text := ast.get_docstring(node))]
