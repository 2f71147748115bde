"""`python docs/api.py [--check]`: write docs/api.md, the reference of every public name, from the docstrings."""

from __future__ import annotations

import argparse
import importlib
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
PAGE = ROOT / "docs" / "api.md"
MODULES = ("hetlora_kernels", "hetlora_kernels.peft", "hetlora", "hetlora.flower")
HEAD = """# API reference

Written by `python docs/api.py` from the docstrings, of which the tests run every example. Letters such as K, S, R, n and m are those of [maths.md](maths.md).
"""


def public(module: ModuleType) -> Iterator[tuple[str, Any]]:
    """(name, object) of what the module's `__all__` lists, but for the likes of `__version__`."""
    for name in sorted(module.__all__, key=str.lower):
        if not name.startswith("_"):
            yield name, getattr(module, name)


def _own(cls: type) -> list[type]:
    """The class and those of its bases that are this project's."""
    return [base for base in cls.__mro__ if base.__module__.partition(".")[0] in ("hetlora", "hetlora_kernels")]


def methods(cls: type) -> Iterator[tuple[str, Any]]:
    """(name, attribute) of the public methods and properties with a docstring, in the order of the source."""
    seen = set()
    for base in _own(cls):
        for name, attribute in vars(base).items():
            value = attribute.__func__ if isinstance(attribute, (classmethod, staticmethod)) else attribute
            if not name.startswith("_") and name not in seen and (callable(value) or isinstance(value, property)) and value.__doc__:
                seen.add(name)
                yield name, value


class _Plain(str):
    """An annotation that is shown without quotes."""

    def __repr__(self) -> str:
        return str(self)


def _plain(annotation: Any) -> Any:
    return _Plain(annotation) if isinstance(annotation, str) else annotation


def _default(value: Any) -> Any:
    """A default value; of a function its name, as its address is another in each process."""
    return _Plain(value.__name__) if inspect.isfunction(value) else value


def _signature(name: str, value: Any) -> str:
    """`name(arguments) -> result`, an argument a line where one line would be long."""
    if isinstance(value, property):
        return name
    if isinstance(value, type) and issubclass(value, BaseException):
        return name
    signature = inspect.signature(value)
    if isinstance(value, type):
        signature = signature.replace(return_annotation=inspect.Signature.empty)
    parameters = [
        p.replace(annotation=_plain(p.annotation), default=_default(p.default)) for p in signature.parameters.values() if p.name not in ("self", "cls")
    ]
    signature = signature.replace(parameters=parameters, return_annotation=_plain(signature.return_annotation))
    line = f"{name}{signature}"
    if len(line) <= 120:
        return line
    arguments = [str(p) for p in parameters]
    first = next((at for at, p in enumerate(parameters) if p.kind is p.KEYWORD_ONLY), None)
    if first is not None:
        arguments.insert(first, "*")
    result = "" if signature.return_annotation is inspect.Signature.empty else f" -> {signature.return_annotation}"
    return f"{name}(\n" + "".join(f"    {argument},\n" for argument in arguments) + f"){result}"


def _docstring(value: Any) -> list[str]:
    """The text as it stands, and its examples as code."""
    lines = []
    for number, block in enumerate(re.split(r"(?m)^(?=>>> )(?<=\n\n)", inspect.cleandoc(value.__doc__ or ""), maxsplit=1)):
        lines += ["", "```pycon" if number else "```text", *block.rstrip().splitlines(), "```"]
    return lines


def _settings(cls: type) -> list[str]:
    """A table of a pydantic model's fields."""
    fields = getattr(cls, "model_fields", None)
    if not fields:
        return []
    rows = [f"| `{name}` | `{field.default!r}` | {(field.description or '').replace('|', chr(92) + '|')} |" for name, field in fields.items()]
    return ["", "| setting | default | meaning |", "|---|---|---|", *rows]


def entry(name: str, value: Any) -> list[str]:
    """A section for one public name."""
    if not (isinstance(value, type) or callable(value)):
        return [f"### {name}", "", f"`{name} = {value!r}`", ""]
    lines = [f"### {name}"]
    settings = _settings(value) if isinstance(value, type) else []
    if not settings:
        lines += ["", "```python", _signature(name, value), "```"]
    lines += _docstring(value) + settings
    if isinstance(value, type):
        for base in _own(value)[1:]:
            if base.__doc__ and base.__name__.startswith("_"):
                lines += ["", f"From `{base.__name__}`:", *_docstring(base)]
        for method, attribute in methods(value):
            signature = _signature(method, attribute)
            lines += ["", f"**`{method}`**", "", "```python", signature, "```"] if "\n" in signature else ["", f"**`{signature}`**"]
            lines += _docstring(attribute)
    return [*lines, ""]


def text() -> str:
    lines = [HEAD]
    for path in MODULES:
        module = importlib.import_module(path)
        names = [name for name, _ in public(module)]
        lines += [f"## {path}", "", " · ".join(f"[{name}](#{name.lower()})" for name in names), ""]
        for name, value in public(module):
            lines += entry(name, value)
    return "\n".join(lines).rstrip() + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/api.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the page is that of the docstrings")
    options = parser.parse_args(argv)
    new = text()
    stale = not PAGE.is_file() or PAGE.read_text(encoding="utf-8") != new
    if stale and not options.check:
        PAGE.write_text(new, encoding="utf-8")
    print(f"{'stale' if options.check else 'written'}: {PAGE.relative_to(ROOT).as_posix() if stale else 'nothing'}")
    return int(options.check and stale)


if __name__ == "__main__":
    sys.exit(main())
