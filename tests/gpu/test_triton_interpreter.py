"""The Triton kernels in Triton's interpreter, on CPU tensors, against the float64 reference. In a process of their own: the interpreter is chosen at import."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import forked
import pytest

HERE = Path(__file__).parent
OWN_IN_F64 = ("cross_entropy-capped", "quantize-8", "gram")

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def interpret(*arguments: str) -> dict[str, str | None]:
    """{case: None or what is wrong} of interpreter_worker.py."""
    changes = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1"}
    done = forked.call(HERE / "interpreter_worker.py", changes, *arguments)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_server_ops_agree_with_the_float64_reference() -> None:
    wrong = {case: what for case, what in interpret("f32", "small", "truncate", "aggregate", "aggregate-owners-keep", "accumulate").items() if what}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "cases"),
    [("f32", ()), ("bf16", ()), ("f64", OWN_IN_F64), pytest.param("f16", (), marks=pytest.mark.gates), pytest.param("f64", (), marks=pytest.mark.gates)],
)
def test_every_op_agrees_with_the_float64_reference(dtype: str, cases: tuple[str, ...]) -> None:
    """float32, bfloat16, which has a repair of its own, and float64 where it has code of its own in `make test`; all in `make gates`."""
    wrong = {case: what for case, what in interpret(dtype, "small", *cases).items() if what}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["f32", "f16", *(pytest.param(other, marks=pytest.mark.gates) for other in ("bf16", "f64"))])
def test_moments_in_bfloat16_step_as_those_in_float32_or_are_refused(dtype: str) -> None:
    assert interpret(dtype, "moments")["moments"] is None


@pytest.mark.slow
def test_modules_without_columns_or_rows() -> None:
    wrong = {case: what for case, what in interpret("f32", "edge").items() if what}
    assert not wrong


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_layer_ops_agree_with_the_float64_reference(dtype: str) -> None:
    wrong = {case: what for case, what in interpret(dtype, "lora-small").items() if what}
    assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize(("way", "dtype"), [("lora_first", "bf16"), ("base_first", "bf16"), ("fused", "bf16"), ("fused", "f32")])
def test_the_layer_in_each_way(way: str, dtype: str) -> None:
    wrong = {case: what for case, what in interpret(dtype, f"{way}-small,{way}-covered").items() if what}
    assert not wrong


# What is not here adds minutes and nothing else: the types run the same code, long segments differ in their planes alone.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("dtype", "shapes", "cases"),
    [
        ("f32", "mixed,narrow,base-only,no-rows,no-ranks", ()),
        ("bf16", "mixed,aligned", ()),
        ("f16", "small,covered", ()),
        ("f64", "small,covered", ()),
        ("f32", "long", ("shrink", "expand", "grouped_gram-gathered-drop")),
    ],
)
def test_layer_ops_of_every_shape(dtype: str, shapes: str, cases: tuple[str, ...]) -> None:
    wrong = {case: what for case, what in interpret(dtype, ",".join(f"lora-{shape}" for shape in shapes.split(",")), *cases).items() if what}
    assert not wrong


# Minutes in the interpreter each; by hand with the command of docs/kernels-gpu.md.
LEFT_OUT = ("gradcheck", "ragged", "after_another", "any_order", "half_base", "asked_for")


@pytest.mark.slow
@pytest.mark.parametrize(("share", "least"), [("0/10", 25), pytest.param("0/1", 100, marks=pytest.mark.gates)], ids=["a tenth", "all"])
def test_the_kernel_tests_of_the_layer_pass_on_this_rung(share: str, least: int) -> None:
    """tests/kernels on the layer and its dropout with the Triton rung forced, but LEFT_OUT: each function and a tenth in `make test`, all in `make gates`."""
    files = [str(HERE.parent / "kernels" / name) for name in ("test_dropout.py", "test_lora.py", "test_lora_calls.py", "test_lora_errors.py")]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    environment |= {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{HERE}:{HERE.parents[1]}", "OMP_NUM_THREADS": "1", "HETLORA_TEST_SHARE": share}
    chosen = f"triton and not ({' or '.join(LEFT_OUT)})"
    command = [sys.executable, "-m", "pytest", "-q", "-n", "0", "-p", "no:cacheprovider", "-p", "interpreter", "-k", chosen, "--timeout", "600", *files]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=HERE.parents[1])
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    passed = int(done.stdout.rsplit(" passed", 1)[0].split()[-1])
    assert passed >= least, done.stdout[-500:]


def test_a_broken_kernel_is_noticed() -> None:
    assert interpret("f32", "small", "--break", "aggregate")["aggregate"]
    found = interpret("f32", "lora-small", "--break", "shrink", "expand", "grouped_gram")
    assert all(found.values()), found


def test_bfloat16_needs_the_repair() -> None:
    assert interpret("f32", "small", "--no-repair", "truncate-cast")["truncate-cast"], "casts round to nearest without the repair: it can go"
