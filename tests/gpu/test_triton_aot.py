"""Every Triton kernel variant compiled without a GPU: no spills, shared memory within the architecture's limit, 16-byte accesses. `make test` takes the layer
in float32 and 16 bits for the oldest architecture and in 16 bits for Hopper, the server's kernels and the optimisers for the oldest, those near a limit for
Hopper; `make gates` takes all."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

HERE = Path(__file__).parent
# Bytes of shared memory that one block may have (CUDA C programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 87: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 110: 227 << 10}
STREAMING = {"_truncate_kernel", "_aggregate_kernel", "_accumulate_kernel", "_squares_kernel", "_adamw_kernel", "_sgd_kernel", "_gram_kernel"}
STREAMING |= {"_quantize_kernel", "_dequantize_kernel", "_cross_entropy_kernel"}
LAYER = {"_shrink_kernel", "_expand_kernel", "_grouped_gram_kernel", "_fused_kernel"}
LAYER_OPS = ("shrink", "expand_", "grouped_gram", "fused")


def archs(*tested: int) -> list[Any]:
    """All of them as parameters; those that are not `tested` in `make test` are left to `make gates`."""
    return [pytest.param(arch, marks=() if arch in tested else pytest.mark.gates) for arch in SHARED_LIMIT]


@cache
def launch_cases() -> list[str]:
    """Names of launches.py's cases, read in a process of their own: it imports the kernels, which must not be imported under TRITON_INTERPRET here."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": f"{HERE.parents[1]}:{HERE}"}
    done = subprocess.run([sys.executable, "-c", "import launches; print(*launches.CASES)"], env=environment, capture_output=True, text=True, check=True)
    return done.stdout.split()


pytestmark = [pytest.mark.slow, pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")]


def compiled(arch: int, cache: Path, *cases: str) -> list[dict]:
    """What triton_aot.py says of each kernel that `cases` launch, after the checks that hold for every kernel."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"PYTHONPATH": str(HERE.parents[1]), "TRITON_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, HERE / "triton_aot.py", str(arch), *cases], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    variants = [json.loads(line) for line in done.stdout.splitlines()]
    assert not [v for v in variants if v["local"]], "registers spill"
    assert not [v for v in variants if v["shared"] > SHARED_LIMIT[arch]], "more shared memory than a block may have"
    streaming = [v for v in variants if v["kernel"] in STREAMING | LAYER]
    assert not [v for v in streaming if "odd" not in v["case"] and not v["wide"]], "no 16-byte access"
    assert not [v for v in streaming if "odd" in v["case"] and v["wide"]], "16-byte accesses where rows are not aligned"
    return variants


@pytest.mark.parametrize("arch", archs(80))
def test_kernels_compile_without_spills(arch: int, tmp_path: Path) -> None:
    cases = [case for case in launch_cases() if not case.startswith(LAYER_OPS)]
    variants = compiled(arch, tmp_path, *cases)
    assert {v["kernel"] for v in variants} >= STREAMING
    grams = {v["case"]: v for v in variants if v["kernel"] == "_gram_kernel"}
    assert grams["norms-bf16"]["mma"] and grams["norms-f16"]["mma"], "no tensor-core instruction in the Gram matrices of 16-bit rows"
    assert not (grams["norms-f32"]["mma"] or grams["norms-f32"]["tf32"]), "float32 Gram matrices on tensor cores: TF32"


def test_kernels_near_the_limit_of_registers_on_hopper(tmp_path: Path) -> None:
    """Larger blocks of float64 spill: those of cross_entropy on sm_90, those of quantize on sm_100."""
    variants = compiled(90, tmp_path, "cross_entropy-f64", "quantize-4-f64", "quantize-8-f64")
    assert {v["kernel"] for v in variants} == {"_cross_entropy_kernel", "_quantize_kernel", "_dequantize_kernel"}


@pytest.mark.parametrize(
    ("arch", "types"),
    [
        (80, ("16", "f32")),
        (90, ("16",)),
        *(pytest.param(arch, ("16", "f32"), marks=pytest.mark.gates) for arch in SHARED_LIMIT if arch > 80),
        pytest.param(80, ("f64",), marks=pytest.mark.gates),
    ],
)
def test_layer_kernels_use_tensor_cores_on_16_bit_types_only(arch: int, types: tuple[str, ...], tmp_path: Path) -> None:
    """float64, which is for checks, is compiled on sm_80 alone: it takes minutes."""
    variants = compiled(arch, tmp_path, *[case for case in launch_cases() if case.startswith(LAYER_OPS) and case.endswith(types)])
    assert {v["kernel"] for v in variants} >= LAYER
    products = [v for v in variants if v["kernel"] in LAYER]
    assert not [v for v in products if v["case"].endswith("16") and not v["mma"]], "no tensor-core instruction"
    assert not [v for v in products if v["case"].endswith("f32") and (v["mma"] or v["tf32"])], "float32 products on tensor cores: TF32"
