"""Every op of the schemas is in every place where CONTRIBUTING's "Add an op" puts it; what is lacking is named."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path

from benchmarks.losses import ON_A_CHUNK
from benchmarks.micro import WORKS
from benchmarks.providers import PROVIDERS
from benchmarks.steps import STEPS
from hetlora_kernels import _library, reference

ROOT = Path(__file__).resolve().parent.parent
OF_THE_LORA_SUITE = {"lora_forward", "lora_backward"}  # through `lora_linear`
LACKING = {
    "shrink": {"benchmark row"},  # the layer's three steps: the layer is measured
    "expand_": {"benchmark row"},
    "grouped_gram": {"benchmark row"},
}


@cache
def text_of(*patterns: str) -> str:
    return "\n".join(path.read_text(encoding="utf-8") for pattern in patterns for path in sorted(ROOT.glob(pattern)))


@cache
def triton_launchers() -> frozenset[str]:
    """What hetlora_kernels/triton/__init__.py imports, read without importing triton."""
    tree = ast.parse(text_of("hetlora_kernels/triton/__init__.py"))
    return frozenset(alias.name for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) for alias in node.names)


def registered(op: str, *patterns: str) -> bool:
    return f'impl("{op}"' in text_of(*patterns)


PLACES = {
    "reference": lambda op: callable(getattr(reference, op, None)),
    "shape function": lambda op: f'@register_fake("{op}")' in text_of("hetlora_kernels/ops/*.py", "hetlora_kernels/optim.py"),
    "CPU kernel": lambda op: registered(op, "csrc/cpu/*.cpp"),
    "CUDA kernel": lambda op: registered(op, "csrc/cuda/*.cpp"),
    "Triton kernel": lambda op: op in triton_launchers(),
    "case of every rung": lambda op: f'"{op}"' in text_of("tests/kernels/test_backends.py"),
    "emulator case": lambda op: f'return "{op}", ' in text_of("tests/gpu/*cases.py"),
    "benchmark row": lambda op: op.rstrip("_") in {*PROVIDERS, *STEPS, *ON_A_CHUNK} or op in OF_THE_LORA_SUITE,
    "micro-benchmark": lambda op: op in WORKS,
    "docs row": lambda op: re.search(rf"`{op}`", text_of("docs/kernels*.md")) is not None,
}


def lacking(op: str) -> set[str]:
    return {place for place, has in PLACES.items() if not has(op)}


def test_every_op_is_in_every_place():
    new = {op: sorted(lacking(op) - LACKING.get(op, set())) for op in _library.SCHEMAS}
    assert not {op: places for op, places in new.items() if places}, 'see "Add an op" in CONTRIBUTING.md'


def test_what_is_excused_is_lacking():
    done = {op: sorted(places - lacking(op)) for op, places in LACKING.items() if op in _library.SCHEMAS}
    assert not {op: places for op, places in done.items() if places}, "take these out of LACKING"


def test_an_op_that_is_nowhere_lacks_everything():
    assert lacking("made_up_") == set(PLACES)
