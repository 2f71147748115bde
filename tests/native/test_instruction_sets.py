"""The numeric tests with every instruction set of this machine (our kernels' and the libraries' under torch), with more threads and other random numbers.

A test that passes with the sums of one processor's library must pass with another's. `make matrix` runs all tests with all settings, `make test` an eighth
of them with each setting of `PART`, another eighth with each; one of each function is in the first. What changes nothing on this processor is skipped.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from hetlora_kernels import _library

ROOT = Path(__file__).parents[2]
KERNELS = (
    "accuracy",
    "base_product",
    "lora",
    "lora_calls",
    "lora_rounded",
    "lora_small",
    "lora_tiles",
    "norms",
    "dropout",
    "aggregate",
    "optim",
    "optim_clients",
    "truncate",
    "quantize",
    "bank",
    "attach",
    "attach_dropout",
    "client_losses",
    "cross_entropy",
)
FILES = [*(f"tests/kernels/test_{name}.py" for name in KERNELS), *(f"tests/peft/test_{name}.py" for name in ("training", "fuse", "mixed"))]
# What a round computes in float64, against other ways to compute it.
ROUNDS = [f"tests/federation/test_{name}.py" for name in ("cohort", "packing", "scale_rule", "init_adapter", "round", "fold", "merge", "recorded", "evaluate")]
LEFT_OUT = "not compile and not compiles and not trainer"  # no numbers of their own

Settings = dict[str, str]


def of_all(ours: str, aten: str, onednn: str, mkl: str) -> Settings:
    """Instruction sets of our kernels, of ATen's, of oneDNN's and of MKL's; what a machine lacks is its best below."""
    return {"HETLORA_INSTRUCTION_SET": ours, "ATEN_CPU_CAPABILITY": aten, "ONEDNN_MAX_CPU_ISA": onednn, "MKL_ENABLE_INSTRUCTIONS": mkl}


SETTINGS: dict[str, Settings] = {
    "as it is": {},
    "base": {"HETLORA_INSTRUCTION_SET": "base"},
    "avx2": {"HETLORA_INSTRUCTION_SET": "avx2"},
    "everything base": of_all("base", "default", "SSE41", "SSE4_2"),
    "everything avx2": of_all("avx2", "avx2", "AVX2", "AVX2"),
    "everything avx512": of_all("avx512", "avx512", "AVX512_CORE", "AVX512"),  # no AVX512-BF16, no AMX
    "avx512 beside base": of_all("avx512", "default", "SSE41", "SSE4_2"),
    "base beside avx512": of_all("base", "avx512", "AVX512_CORE", "AVX512"),
    "bfloat16 without AMX": {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16"},
    "MKL's reproducible sums": {"MKL_CBWR": "COMPATIBLE"},
}
SETTINGS |= {f"{name}, 2 threads": {**own, "OMP_NUM_THREADS": "2"} for name, own in SETTINGS.items()}
SETTINGS |= {f"seed {seed}": {"HETLORA_TEST_SEED": str(seed)} for seed in range(1, 20)}  # and seed 0 everywhere else
PART = ("avx2", "everything base, 2 threads")
# From the lowest, each with the processor's flag for it. MKL decides by the maker too, so its highest level is not taken for its own choice.
LEVELS = {
    "HETLORA_INSTRUCTION_SET": {"base": "", "avx2": "avx2", "avx512": "avx512f", "amx": "amx_bf16"},
    "ATEN_CPU_CAPABILITY": {"default": "", "avx2": "avx2", "avx512": "avx512f"},
    "ONEDNN_MAX_CPU_ISA": {"SSE41": "", "AVX2": "avx2", "AVX2_VNNI": "avx_vnni", "AVX512_CORE": "avx512f"}
    | {"AVX512_CORE_BF16": "avx512_bf16", "AVX512_CORE_FP16": "avx512_fp16", "AVX512_CORE_AMX": "amx_bf16"},
    "MKL_ENABLE_INSTRUCTIONS": {"SSE4_2": "", "AVX2": "avx2", "AVX512": "avx512f", "its own choice": "no processor's"},
}


def flags() -> set[str]:
    """Of this processor; none where the system does not list them."""
    try:
        return set(next(line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("flags")).split())
    except (OSError, StopIteration):
        return set()


def effect(settings: Settings, has: set[str]) -> Settings:
    """The settings with levels that the processor lacks lowered to its best, and without those that it takes by itself."""
    changed = {}
    for name, value in settings.items():
        if has and name in LEVELS:
            there = [level for level, flag in LEVELS[name].items() if flag in has | {""}]
            upwards = list(LEVELS[name])
            value = [level for level in there if upwards.index(level) <= upwards.index(value)][-1]
            if value == there[-1] and "its own choice" not in LEVELS[name]:
                continue
        changed[name] = value
    return changed


def here(name: str, has: set[str] | None = None) -> Settings:
    """A row of SETTINGS as this processor can run it: ATen takes ATEN_CPU_CAPABILITY at its word, and an instruction that is not there ends the process."""
    return effect(SETTINGS[name], flags() if has is None else has)


def twin(name: str, has: set[str]) -> str | None:
    """An earlier row of SETTINGS that is the same on a processor with these flags."""
    of = {other: here(other, has) for other in SETTINGS}
    first = next(other for other, own in of.items() if own == of[name])
    return None if first == name else first


def run(settings: Settings, *command: str) -> subprocess.CompletedProcess:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")} | {"OMP_WAIT_POLICY": "passive"} | settings
    return subprocess.run([sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.skipif("cpu" not in _library.available(), reason="no compiled kernel for CPU tensors")
@pytest.mark.parametrize(
    ("name", "share"),
    [pytest.param(name, f"{i}/{4 * len(PART)}", id=f"{name}, an eighth") for i, name in enumerate(PART)]
    + [pytest.param(name, "0/1", id=name, marks=pytest.mark.matrix) for name in SETTINGS],
)
def test_the_numeric_tests_pass_with(name, share):
    if same := twin(name, flags()):
        pytest.skip(f"on this processor the same as '{same}'")
    settings = here(name) | {"HETLORA_TEST_SHARE": share}
    done = run(settings, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", "-k", f"not reference and {LEFT_OUT}", *FILES)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "share"),
    [pytest.param("everything avx2", "0/8", id="everything avx2, an eighth")]
    + [pytest.param(name, "0/1", id=name, marks=pytest.mark.matrix) for name in ("everything base", "everything avx2")],
)
def test_rounds_agree_with(name, share):
    """The model's own arithmetic has the library's order of sums, in vectors of 16, 8 and 4 numbers."""
    done = run(here(name) | {"HETLORA_TEST_SHARE": share}, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *ROUNDS)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]


def test_a_row_that_changes_nothing_is_left_out():
    """Never one that a better processor tells from the others."""
    assert twin("avx2", {"avx2"}) == "as it is" and twin("everything avx512", {"avx2"}) == "everything avx2" and twin("everything avx2", {"avx2"}) is None
    assert twin("avx2, 2 threads", {"avx2"}) == "as it is, 2 threads" and twin("bfloat16 without AMX", {"avx2", "avx512f", "avx512_bf16"}) == "as it is"
    everything = {"avx2", "avx512f", "avx512_bf16", "avx512_fp16", "amx_bf16"}
    assert [name for has in (everything, set()) for name in SETTINGS if twin(name, has)] == []
    assert not any(twin(name, {"avx2"}) for name in ("base", "everything base", "avx512 beside base", "base beside avx512", "seed 3"))


def test_no_row_asks_for_what_the_processor_lacks():
    for has, lacks in (({"sse4_2"}, {"avx2", "avx512"}), ({"avx2"}, {"avx512"})):
        assert not {here(name, has).get("ATEN_CPU_CAPABILITY") for name in SETTINGS} & lacks
    assert here("base beside avx512", {"avx2"}) == {"HETLORA_INSTRUCTION_SET": "base", "MKL_ENABLE_INSTRUCTIONS": "AVX2"}


DOTS = """
import torch, hetlora_kernels
draw = torch.Generator().manual_seed(0)
x, a = torch.randn(8, 1001, generator=draw), torch.randn(8, 1001, generator=draw)
print(torch.ops.hetlora.shrink(x, a, torch.ones(1), None, None, None, [8], [0], [8], 0.0).tolist())
"""


def test_the_variable_chooses_and_refuses():
    """In processes of their own, to their end: what forked.py forks skips the end of the interpreter."""
    if "cpu" not in _library.available():
        pytest.skip("no compiled kernel for CPU tensors")
    base, avx512 = (run({"HETLORA_INSTRUCTION_SET": name}, "-c", DOTS) for name in ("base", "avx512"))
    assert base.returncode == avx512.returncode == 0, base.stderr + avx512.stderr
    if torch.backends.cpu.get_cpu_capability().startswith("AVX"):
        assert base.stdout != avx512.stdout  # other widths of vectors add in another order
    wrong = run({"HETLORA_INSTRUCTION_SET": "sse9"}, "-c", "import hetlora_kernels")
    assert wrong.returncode != 0 and "HETLORA_INSTRUCTION_SET: expected one of base, avx2, avx512, amx, got 'sse9'" in wrong.stderr
