"""`python docs/lists.py [--check]`: write docs/options.md from `Config`, and the table of ops in docs/kernels.md from the sources."""

from __future__ import annotations

import argparse
import ast
import re
import sys
import typing
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
OPTIONS, KERNELS = ROOT / "docs" / "options.md", ROOT / "docs" / "kernels.md"
BEGIN, END = "<!-- ops: python docs/lists.py -->", "<!-- ops end -->"
HEAD = """# Every option of a run

Written by `python docs/lists.py` from `hetlora.Config`. An option of `hetlora run` is the setting's name with `--` in front and `-` for `_`.
A setting of yes or no is switched by `--NAME` and `--no-NAME`. In a file and in Python the names are those below.
A unit, where there is one, is in the meaning. `hetlora run --help` prints the same.

The defaults are those of `hetlora.Config`. `hetlora run` without `--method`, and without a setting that belongs to one method, takes the method `fold` first:
`train = fold`, `weights = samples` ([methods.md](methods.md)).

In the code, a setting is declared in `hetlora/config.py` and made an option by `hetlora/cli_options.py`. `settings_rules.py`, `kinds.py` and `ahead.py`
refuse what does not go together. `grep -rnw NAME hetlora` finds where it is used. Four are read by another name: `train` as `training_kind`, `merge` as
`merge_kind`, `ranks` as `rank_rule`, `scale` through `scale_at`.

Options that are no settings, such as `--config`, `--method`, `--resume` and `--threads`, are in `hetlora run --help` and on [federation.md](federation.md).
"""
ENVIRONMENT = """## Environment variables

Those of this project. `OMP_NUM_THREADS`, compilers' and torch's own variables count as everywhere.

- `HETLORA_DEBUG=1`: a command, and `hetlora bench`, print the whole traceback of an error, not its line alone.
- `HETLORA_BACKEND`, `HETLORA_INSTRUCTION_SET`: the rung of every op, and how far the CPU kernels go ([kernels.md](kernels.md)).
- `HETLORA_CUDA`, `HETLORA_CUDA_ARCHS`: what a build makes ([kernels.md](kernels.md#building)).
- `HETLORA_TEST_DEVICE`, `HETLORA_TEST_SEED`, `HETLORA_TEST_SHARE`, `HETLORA_TEST_CUDA_ARCHS`, `HETLORA_SCHEDULE`: which tests run, on what,
  in which order of an emulated GPU's threads. Only tests read them.
"""


def values(field: Any, auto: bool = False) -> str:
    """What a setting may be: its choices, or its type with its limits.   auto: whether the command takes that word."""
    if auto:
        return "integer or `auto`"
    if typing.get_origin(field.annotation) is typing.Literal:
        return ", ".join(f"`{value}`" for value in typing.get_args(field.annotation))
    kind = {bool: "yes or no", int: "integer", float: "number", str: "text"}.get(field.annotation, str(field.annotation).replace("|", "or"))
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    limits = [f"{sign} {getattr(limit, name)}" for limit in field.metadata for name, sign in signs.items() if getattr(limit, name, None) is not None]
    return " ".join([kind, ", ".join(limits)]).strip()


def options() -> str:
    from hetlora.cli_options import _ConfigOption
    from hetlora.config import Config, setting_group

    groups: dict[str, list[str]] = {}
    for name, field in Config.model_fields.items():
        default = {True: "yes", False: "no"}[field.default] if isinstance(field.default, bool) else str(field.default)
        meaning = (field.description or "").replace("|", chr(92) + "|")
        takes = values(field, "auto" in _ConfigOption(name).type.name)
        groups.setdefault(setting_group(name), []).append(f"| `{name}` | {f'`{default}`' if default else ''} | {takes} | {meaning} |")
    lines = [HEAD]
    for group, rows in groups.items():
        lines += [f"## {group.capitalize()}", "", "| setting | default | values | meaning |", "|---|---|---|---|", *rows, ""]
    return "\n".join([*lines, ENVIRONMENT])


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def holding(text: str, *patterns: str) -> list[Path]:
    """Files that match one of the patterns and have the text."""
    return [path for pattern in patterns for path in sorted(ROOT.glob(pattern)) if text in read(path)]


def public(op: str, path: Path) -> Iterator[str]:
    """Public functions and classes of the file that call the op, by themselves or through others of the file."""
    parts = {node.name: node for node in ast.parse(read(path)).body if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    fakes = {name for name, node in parts.items() if any("register_fake" in ast.unparse(each) for each in node.decorator_list)}
    calling = {name for name, node in parts.items() if f"'{op}'" in ast.unparse(node) and name not in fakes}
    for _ in parts:  # as often as calls may be nested
        calling |= {name for name, node in parts.items() if any(isinstance(inner, ast.Name) and inner.id in calling for inner in ast.walk(node))}
    yield from sorted(name for name in calling if not name.startswith("_"))


def cuda_kernels(op: str, binding: Path) -> list[Path]:
    """The .cu that has the op's launcher, else those whose launchers the binding and the headers beside it call."""
    kernels = sorted(binding.parent.glob("*.cu"))
    name = op.rstrip("_").removesuffix("_rows")
    if own := [path for path in kernels if f"cudaError_t hetlora_{name}(" in read(path)]:
        return own
    headers = [binding.with_name(name) for name in re.findall(r'#include "(\w+\.h)"', read(binding))]
    called = {name for path in [binding, *headers] if path.is_file() for name in re.findall(r"check\((hetlora_\w+)\(", read(path))} - {"hetlora_upload"}
    return [path for path in kernels if any(f"cudaError_t {launcher}(" in read(path) for launcher in called)]


def cpu_kernels(binding: Path) -> list[Path]:
    """The files without an op of their own that share a header with the binding, or with a header it takes; not the headers that all take."""

    def taken(path: Path) -> set[Path]:
        own = {path.with_name(name) for name in re.findall(r'#include "(\w+\.h)"', read(path))} if path.is_file() else set()
        return {header for header in own if header.stem not in ("simd", "tensors", "philox")}

    headers = taken(binding)
    while more := {header for known in headers for header in taken(known)} - headers:
        headers |= more
    files = sorted(binding.parent.glob("*.cpp"), key=lambda path: (not binding.stem.startswith(path.stem), path.name))  # the family's own first
    return [path for path in files if 'impl("' not in read(path) and taken(path) & headers]


def row(op: str) -> list[str]:
    from benchmarks.losses import ON_A_CHUNK
    from benchmarks.providers import PROVIDERS
    from benchmarks.steps import STEPS

    def short(paths: list[Path], start: str) -> str:
        return " ".join(f"`{path.relative_to(ROOT / start).as_posix()}`" for path in paths)

    (own,) = holding(f'@register_fake("{op}")', "hetlora_kernels/ops/*.py", "hetlora_kernels/optim.py")
    names = " ".join(f"`{name}`" for name in public(op, own))
    bindings = holding(f'impl("{op}"', "csrc/cuda/*.cpp")
    cuda = [*bindings, *(kernel for binding in bindings for kernel in cuda_kernels(op, binding))]
    cuda = [path if path.suffix != ".cu" or "__global__" in read(path) else path.with_suffix(".cuh") for path in cuda]
    launchers = [node for node in ast.walk(ast.parse(read(ROOT / "hetlora_kernels/triton/__init__.py"))) if isinstance(node, ast.ImportFrom)]
    imported = {alias.name: node.module for node in launchers for alias in node.names}
    triton = str(imported[op]).rpartition(".")[2]
    assert list(ROOT.glob(f"tests/kernels/test_{own.stem}*.py")), own
    measured = {"providers": PROVIDERS, "steps": STEPS, "losses": ON_A_CHUNK, "lora": ("lora_forward", "lora_backward")}
    benchmark = [f"`{file}.py`" for file, rows in measured.items() if op in rows or op.rstrip("_") in rows]
    pages = [path for path in sorted(ROOT.glob("docs/kernels*.md")) if f"`{op}`" in re.sub(f"{BEGIN}.*?{END}", "", read(path), flags=re.DOTALL)]
    links = " ".join(f"[{path.stem}]({path.name})" for path in pages)
    python, bound = f"{short([own], 'hetlora_kernels')} {names}".strip(), holding(f'impl("{op}"', "csrc/cpu/*.cpp")
    cpu = [*bound, *(kernel for binding in bound for kernel in cpu_kernels(binding))]
    return [f"`{op}`", python, short(cpu, "csrc/cpu"), short(cuda, "csrc/cuda"), f"`{triton}.py`", f"`test_{own.stem}*.py`", " ".join(benchmark), links]


def table() -> str:
    from hetlora_kernels import _library

    head = ["op", "Python", "CPU: `csrc/cpu/`", "CUDA: `csrc/cuda/`", "`triton/`", "`tests/kernels/`", "`benchmarks/`", "docs"]
    lines = [head, ["---"] * len(head), *(row(op) for op in _library.SCHEMAS)]
    return "\n".join([BEGIN, *(f"| {' | '.join(cells)} |" for cells in lines), END])


def _shown(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def pages() -> dict[Path, str]:
    before = KERNELS.read_text(encoding="utf-8")
    start, end = before.index(BEGIN), before.index(END) + len(END)
    return {OPTIONS: options(), KERNELS: before[:start] + table() + before[end:]}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python docs/lists.py", description=__doc__)
    parser.add_argument("--check", action="store_true", help="only say whether the pages are those of the sources")
    arguments = parser.parse_args(argv)
    stale = {path: text for path, text in pages().items() if not path.is_file() or path.read_text(encoding="utf-8") != text}
    if not arguments.check:
        for path, text in stale.items():
            path.write_text(text, encoding="utf-8")
    print(f"{'stale' if arguments.check else 'written'}: {', '.join(map(_shown, stale)) or 'nothing'}")
    return int(arguments.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
