"""Imports within each of the packages: no circle, none hidden in a function either, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hetlora", "hetlora_kernels")
ENTRIES = ("hetlora.cli", "hetlora.__main__")
LIGHT = ("hetlora.cli", "hetlora.config", "hetlora.kinds", "hetlora.ranks", "hetlora.run_folder", "hetlora.compare.methods", "hetlora.report.text")


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def sources() -> dict[str, ast.Module]:
    return {module_name(path): ast.parse(path.read_text(encoding="utf-8")) for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))}


def only_for_types(tree: ast.Module) -> set[ast.AST]:
    """What stands under `if TYPE_CHECKING`: read by type checkers alone."""
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def imports(name: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of these packages that the module `name` imports, at its head or anywhere inside."""
    found: set[str] = set()
    skipped = only_for_types(tree)
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found |= {f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in modules else str(node.module) for alias in node.names}
    return found & modules - {name}


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Modules that reach themselves, as groups: the strongly connected components of more than one module."""

    def reach(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for other in graph[waiting.pop()] - seen:
                seen.add(other)
                waiting.append(other)
        return seen

    reachable = {name: reach(name) for name in graph}
    groups = {tuple(sorted(other for other in reachable[name] if name in reachable[other])) for name in graph if name in reachable[name]}
    return sorted(map(list, groups))


def test_the_search_for_circles_finds_one():
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    tree = ast.parse("def f():\n    from hetlora import cli\n    import hetlora.loop")
    assert imports("x", tree, {"hetlora", "hetlora.cli", "hetlora.loop"}) == {"hetlora.cli", "hetlora.loop"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports_not_even_inside_functions(package):
    trees = sources()
    modules = {name for name in trees if name.startswith(f"{package}.")}
    assert circles({name: imports(name, trees[name], modules) for name in modules}) == []


def test_imports_inside_functions_of_the_federation_are_those_of_commands_and_of_heavy_libraries():
    """The entries load what a command needs when it runs. Elsewhere only libraries that take long, or that an extra installs, are loaded late."""
    late = []
    for name, tree in sources().items():
        if not name.startswith("hetlora.") or name in ENTRIES:
            continue
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                inside = [node for node in ast.walk(function) if isinstance(node, (ast.Import, ast.ImportFrom))]
                late += [f"{name}.{function.name}" for node in inside if any(part.startswith(PACKAGES) for part in _named(node))]
    assert late == []


def _named(node: ast.Import | ast.ImportFrom) -> list[str]:
    return [alias.name for alias in node.names] if isinstance(node, ast.Import) else [str(node.module)]


@pytest.mark.parametrize("module", LIGHT)
def test_settings_and_run_folders_are_read_without_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft', 'matplotlib', 'jinja2'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
