"""The Triton kernels in Triton's interpreter, on CPU tensors, against the float64 reference. In a process of their own: the interpreter is chosen at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DTYPES = ("f32", "bf16", "f16", "f64")

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def interpret(*arguments: str) -> dict[str, str | None]:
    """{case: None or what is wrong} of interpreter_worker.py."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, HERE / "interpreter_worker.py", *arguments], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_server_ops_agree_with_the_float64_reference() -> None:
    wrong = {case: what for case, what in interpret("f32", "small", "truncate", "aggregate", "aggregate-owners-keep", "accumulate").items() if what}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_op_agrees_with_the_float64_reference(dtype: str) -> None:
    wrong = {case: what for case, what in interpret(dtype, "small").items() if what}
    assert not wrong


@pytest.mark.slow
def test_modules_without_columns_or_rows() -> None:
    wrong = {case: what for case, what in interpret("f32", "edge").items() if what}
    assert not wrong


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_layer_ops_agree_with_the_float64_reference(dtype: str) -> None:
    wrong = {case: what for case, what in interpret(dtype, "lora-small").items() if what}
    assert not wrong


@pytest.mark.parametrize("way", ["lora_first", "base_first", "fused"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_layer_in_each_way(way: str, dtype: str) -> None:
    wrong = {f"{shape} {case}": what for shape in ("small", "covered") for case, what in interpret(dtype, f"{way}-{shape}").items() if what}
    assert not wrong


# What is not here is slow and would add nothing: the other types run the same code, long segments differ in their planes alone.
@pytest.mark.slow
@pytest.mark.parametrize("shape", ["mixed", "aligned", "narrow", "base-only", "no-rows", "no-ranks"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_layer_ops_of_every_shape(shape: str, dtype: str) -> None:
    wrong = {case: what for case, what in interpret(dtype, f"lora-{shape}").items() if what}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "shape", "cases"),
    [
        ("f16", "small", ()),
        ("f64", "small", ()),
        ("f16", "aligned", ()),
        ("f64", "aligned", ()),
        ("f32", "long", ("shrink", "expand", "grouped_gram-gathered-drop")),
    ],
)
def test_layer_ops_of_the_other_types_and_of_long_segments(dtype: str, shape: str, cases: tuple[str, ...]) -> None:
    wrong = {case: what for case, what in interpret(dtype, f"lora-{shape}", *cases).items() if what}
    assert not wrong


def test_a_broken_kernel_is_noticed() -> None:
    assert interpret("f32", "small", "--break", "aggregate")["aggregate"]
    found = interpret("f32", "lora-small", "--break", "shrink", "expand", "grouped_gram")
    assert all(found.values()), found


def test_bfloat16_needs_the_repair() -> None:
    assert interpret("f32", "small", "--no-repair", "truncate-cast")["truncate-cast"], "casts round to nearest without the repair: it can go"
