"""Where random numbers come from: `seeds.py` makes every generator, and whatever draws is given one."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2] / "hetlora"
MAKERS = {"Generator", "Random", "manual_seed", "seed", "seed_all", "manual_seed_all", "default_rng", "RandomState", "fork_rng"}
DRAWS = {"rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "normal", "bernoulli", "multinomial", "poisson"}
DRAWS |= {f"{name}_" for name in ("uniform", "normal", "random", "bernoulli", "exponential", "geometric", "cauchy", "log_normal")} | {"AdapterBank"}
OF_THE_SYSTEM = {  # what no seed may repeat
    "flower/secure.py": "places on the ring of shares",
    "flower/secure_client.py": "a client's seed of masks",
    "run_folder.py": "the name of a file that is being written",
    "checkpoint.py": "the same",
}


def drawing(source: str) -> list[str]:
    """What makes or uses random numbers in a source past `seeds.py`; 'the system' for what asks it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            modules = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            names = [alias.name for alias in node.names] if isinstance(node, ast.ImportFrom) else []
            found += [module for module in modules if module.split(".")[0] == "random" or module == "numpy.random"]
            found += ["the system"] * any(module == "secrets" or (module == "os" and "urandom" in names) for module in modules)
        if isinstance(node, ast.Attribute) and node.attr == "urandom":
            found.append("the system")
        if isinstance(node, ast.Attribute) and node.attr == "random" and getattr(node.value, "id", "") in ("np", "numpy", "torch"):
            found.append("a library's random")
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        if name in MAKERS:
            found.append(name)
        if name in DRAWS and "generator" not in {keyword.arg for keyword in node.keywords}:
            of_torch = isinstance(node.func, ast.Attribute)  # a function of the project may be called normal
            found += [f"{name} without a generator"] if of_torch or name == "AdapterBank" else []
    return found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("import random", ["random"]),
        ("from random import Random", ["random"]),
        ("from numpy.random import default_rng", ["numpy.random"]),
        ("def f():\n    np.random.shuffle(x)", ["a library's random"]),
        ("torch.Generator().manual_seed(0)", ["manual_seed", "Generator"]),
        ("torch.randint(3, (4,))", ["randint without a generator"]),
        ("torch.randint(3, (4,), generator=draw)", []),
        ("x.uniform_(0, 1)", ["uniform_ without a generator"]),
        ("hk.AdapterBank(shapes, [1])", ["AdapterBank without a generator"]),
        ("normal(key, side)", []),
        ("import secrets", ["the system"]),
        ("os.urandom(32)", ["the system"]),
    ],
)
def test_the_search_finds_what_draws(source, found):
    assert drawing(source) == found


def test_every_random_choice_goes_through_seeds():
    places = {path.relative_to(ROOT).as_posix(): set(drawing(path.read_text(encoding="utf-8"))) for path in sorted(ROOT.rglob("*.py"))}
    assert places.pop("seeds.py")
    assert {place: found for place, found in places.items() if found} == {place: {"the system"} for place in OF_THE_SYSTEM}
