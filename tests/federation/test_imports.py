"""Imports within each of the packages: no circle, none hidden in a function either, and nothing heavy before it is needed."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("hetlora", "hetlora_kernels", "benchmarks")
ENTRIES = ("hetlora.cli", "hetlora.__main__")
LATE = {  # function that imports a module of these packages when it runs -> why
    "hetlora.cli_flower.certificates": "a command: cryptography is of the extra `flower`",
    "hetlora_kernels._library._triton_ops": "triton is loaded when a tensor lies on a GPU",
    "hetlora_kernels.peft.__getattr__": "loads PEFT, which a bank of adapters does not need",
    "benchmarks.kit.page_module": "the page: matplotlib and jinja2, of an extra",
    "benchmarks.flower_round.<module>": "itself, by the name under which Ray's processes find it",
    "benchmarks.federation.settings": "hetlora needs the extra `fed`",
    "benchmarks.federation.through_flower": "Flower, of an extra",
    "benchmarks.federation.environment": "Flower, of an extra",
    "benchmarks.federation.check": "hetlora and PEFT, of extras",
    "benchmarks.peft_suite.model_runs": "`fuse` loads PEFT, of an extra",
    "benchmarks.peft_suite.layer_runs": "`fuse` loads PEFT, of an extra",
    "benchmarks.ranks.__init__": "`fuse` loads PEFT, of an extra",
    "benchmarks.rounds.hetlora_round": "hetlora needs the extra `fed`",
    "benchmarks.rounds.train_peft": "hetlora needs the extra `fed`",
    "benchmarks.rounds.start_of": "hetlora needs the extra `fed`",
    "benchmarks.rounds.frozen_round": "hetlora needs the extra `fed`",
    "benchmarks.rounds.__init__": "hetlora needs the extra `fed`",
    "benchmarks.rounds.steps": "hetlora needs the extra `fed`",
    "benchmarks.study.run": "torch, and matplotlib for pictures: `--page` needs neither",
}
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


def named(node: ast.AST, name: str, modules: set[str]) -> set[str]:
    """Modules that an import statement of the module `name`, or its call of `import_module`, names."""
    if isinstance(node, ast.Import):
        return {alias.name for alias in node.names} & modules
    if isinstance(node, ast.ImportFrom):
        above = package_of(name, modules).split(".")
        origin = ".".join([*above[: len(above) - node.level + 1], *([node.module] if node.module else [])]) if node.level else str(node.module)
        return {found for alias in node.names for found in [f"{origin}.{alias.name}" if f"{origin}.{alias.name}" in modules else origin]} & modules
    if isinstance(node, ast.Call) and ast.unparse(node.func).rpartition(".")[2] == "import_module" and node.args:
        parts = node.args[0].values if isinstance(node.args[0], ast.JoinedStr) else [node.args[0]]
        values = [part.value for part in parts if isinstance(part, (ast.Constant, ast.FormattedValue))]
        own = {"__package__": package_of(name, modules)}
        known = [own.get(ast.unparse(value)) if isinstance(value, ast.AST) else value for value in values]
        return {"".join(map(str, known))} & modules  # what is computed is not seen
    return set()


def package_of(name: str, modules: set[str]) -> str:
    """The package that relative imports of a module start from."""
    return name if any(other.startswith(f"{name}.") for other in modules) or "." not in name else name.rpartition(".")[0]


def imports(name: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """Modules of these packages that the module `name` imports, at its head or anywhere inside."""
    skipped = only_for_types(tree)
    return set().union(*(named(node, name, modules) for node in ast.walk(tree) if node not in skipped)) - {name}


def late_imports(name: str, tree: ast.Module, modules: set[str]) -> set[str]:
    """Functions that import modules of these packages, and `<module>` for a call of `import_module` outside of all functions."""
    functions = [node for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))]
    inside = {inner for function in functions for inner in ast.walk(function)}
    found = {f"{name}.{function.name}" for function in functions if any(named(node, name, modules) for node in ast.walk(function))}
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call) and node not in inside and named(node, name, modules)]
    return found | ({f"{name}.<module>"} if calls else set())


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
    tree = ast.parse("from . import a\nfrom .b import c\nimport_module(f'{__package__}.d')\nimportlib.import_module('p.ef')")
    assert imports("p.x", tree, {"p.a", "p.b", "p.d", "p.ef", "p.x"}) == {"p.a", "p.b", "p.d", "p.ef"}


@pytest.mark.parametrize("package", PACKAGES)
def test_no_circle_of_imports_not_even_inside_functions(package):
    trees = sources()
    modules = {name for name in trees if name.startswith(f"{package}.")}
    assert circles({name: imports(name, trees[name], modules) for name in modules}) == []


def test_imports_inside_functions_are_those_of_commands_and_of_heavy_libraries():
    """The entries load what a command needs when it runs. Elsewhere a module of these packages is imported late only for a reason that `LATE` names."""
    trees = sources()
    late = set().union(*(late_imports(name, tree, set(trees)) for name, tree in trees.items() if name not in ENTRIES))
    assert sorted(late - LATE.keys()) == [], "import at the head, or say in LATE why not"
    assert sorted(LATE.keys() - late) == [], "take these out of LATE"


@pytest.mark.parametrize("module", LIGHT)
def test_settings_and_run_folders_are_read_without_torch(module):
    code = f"import sys, {module}; print(sorted({{'torch', 'transformers', 'peft', 'matplotlib', 'jinja2'}} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "[]"), done.stderr
