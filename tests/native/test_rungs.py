"""When and how the rung of CUDA tensors is chosen, in processes with stand-ins for the CUDA runtime and its driver: no GPU is needed, none is used."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
from pathlib import Path

import forked
import pytest

from hetlora_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
CUDA = """
import sys, warnings, torch
started = []
torch.version.cuda = "13.0"
torch.cuda.is_available = lambda: started.append("asked") or True
torch.cuda.init = lambda: started.append("init") or [call() for call, _ in torch.cuda._queued_calls]
torch.cuda._queued_calls.clear()  # torch's own look at the device
torch.cuda.device_count = lambda: 1
torch.cuda.get_device_capability = lambda index=0: (9, 0)
"""


def run(code: str, folder: Path = ROOT, **environment: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("HETLORA_BACKEND", "TRITON_INTERPRET", "PYTHONPATH")}
    done = forked.python(CUDA + code, folder, {**clean, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


def test_the_import_asks_nothing_of_cuda_and_leaves_triton_alone():
    run("import hetlora_kernels as hk, hetlora_kernels.peft\nassert not started and 'triton' not in sys.modules, (started, 'triton' in sys.modules)")


def test_work_on_the_cpu_asks_nothing_of_cuda():
    run(
        "import hetlora_kernels as hk\n"
        "hk.lora_linear(torch.ones(2, 3), torch.ones(4, 3), None, torch.ones(1, 3), torch.ones(1, 4), hk.RankLayout([1]), hk.Segments.from_lengths([2]))\n"
        "with hk.use_backend('reference'):\n    hk.aggregate(torch.ones(3, 4), hk.RankLayout([1, 2]), [1.0, 2.0], 2)\n"
        "assert hk.backends('cpu') and not started and 'triton' not in sys.modules, started"
    )


@pytest.fixture
def package(tmp_path):
    """A copy of the package with a record of a CUDA library, and with the library's file, which is no library."""
    shutil.copytree(ROOT / "hetlora_kernels", tmp_path / "hetlora_kernels", ignore=shutil.ignore_patterns("__pycache__", "*.so", "_build_info.json"))
    record = {"cuda": {"built": True, "reason": "", "nvcc": "13.0", "archs": ["sm_80", "sm_90", "compute_90"]}}
    (tmp_path / "hetlora_kernels" / "_build_info.json").write_text(json.dumps(record))
    (tmp_path / "hetlora_kernels" / "_C_cuda.so").touch()
    return tmp_path


# A library that registers a kernel for every op.
LOADS = """
def load(path):
    started.append(path)
    global registered
    registered = torch.library.Library("hetlora", "IMPL")
    for name in _library.SCHEMAS:
        registered.impl(name, lambda *arguments: None, "CUDA")
torch.ops.load_library = load
from hetlora_kernels import _library, _native
"""


def test_the_library_is_chosen_when_cuda_starts_and_triton_is_not_imported(package):
    run(
        LOADS + "_native.driver_version = lambda: (13, 0)\nassert not started\ntorch.cuda.init()\n"
        "assert any(str(what).endswith('_C_cuda.so') for what in started) and 'cuda' in _library._compiled and 'triton' not in sys.modules, started",
        package,
    )


def test_a_question_about_the_cuda_rung_starts_cuda(package):
    run(LOADS + "_native.driver_version = lambda: (13, 0)\nassert not started and _library._has('gram', 'cuda') and 'init' in started", package)


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize(
    ("driver", "capability", "reason"),
    [
        ((12, 80), (9, 0), "built with CUDA 13.0, the driver serves CUDA 12.8; update the driver"),
        ((13, 0), (8, 0), None),
        ((13, 20), (12, 0), None),
        ((12, 80), (8, 0), "built with CUDA 13.0, the driver serves CUDA 12.8"),
        (None, (9, 0), None),
    ],
)
def test_a_driver_that_does_not_serve_the_library_leaves_it_and_says_why(package, driver, capability, reason):
    shown = run(
        LOADS + f"_native.driver_version = lambda: {driver}\ntorch.cuda.get_device_capability = lambda index=0: {capability}\n"
        "import hetlora_kernels as hk\nprint(hk.backends('cuda')['gram'])",
        package,
    )
    assert (reason in shown and "'triton'" in shown) if reason else "'triton'" not in shown


def test_ptx_needs_a_driver_as_new_as_the_toolkit(monkeypatch):
    for driver, only_ptx, fits in (((13, 0), True, False), ((13, 10), True, True), ((13, 0), False, True), ((14, 0), True, True), ((12, 90), False, False)):
        monkeypatch.setattr(_native, "driver_version", lambda driver=driver: driver)
        assert (_native._unserved({"nvcc": "13.1"}, only_ptx) is None) == fits
    assert _native._unserved({"nvcc": "unknown"}, True) is None


def test_every_device_has_to_be_covered(package):
    shown = run(
        LOADS + "_native.driver_version = lambda: None\ntorch.cuda.device_count = lambda: 2\n"
        "torch.cuda.get_device_capability = lambda index=0: [(9, 0), (7, 5)][index]\nprint(_library.absent()['cuda'])",
        package,
    )
    assert "device 1 is sm_75" in shown


def test_a_run_from_a_checkout_says_loudly_that_it_does_not_see_the_installed_library(package, tmp_path_factory):
    checkout = tmp_path_factory.mktemp("checkout")
    shutil.copytree(package / "hetlora_kernels", checkout / "hetlora_kernels", ignore=shutil.ignore_patterns("*.so", "_build_info.json"))
    code = "import hetlora_kernels as hk\nprint(hk.backends('cuda')['gram'][1])"
    shown = run(code, checkout, PYTHONPATH=str(package))
    assert shown.count(f"_C_cuda.so is in {package / 'hetlora_kernels'}, but {checkout / 'hetlora_kernels'} is imported") == 2, "the warning and the reason"
    assert "RuntimeWarning" in shown and "setup.py build_ext --inplace" in shown


def test_a_torch_before_the_stable_interface_loads_no_library_and_says_why(package):
    (package / "hetlora_kernels" / "_C_cpu.so").touch()
    code = "torch.__version__ = '2.9.1'\ntorch.ops.load_library = started.append\nimport hetlora_kernels as hk\nassert not started, started\n"
    shown = run(code + "print(hk.backends('cpu')['gram'])", package)
    assert shown.count("compiled kernels need torch 2.10 or newer, this is torch 2.9.1") == 2, "the warning and the reason"
    assert "RuntimeWarning" in shown and "'reference'" in shown


def test_a_run_from_the_checkout_uses_the_rung_it_claims():
    """The library beside the imported package is the one whose kernels run: its file is mapped into the process that claims it."""
    code = (
        "import hetlora_kernels as hk\nfrom hetlora_kernels import _native\n"
        "for rung in ('cpu',) if hk.backends('cpu')['gram'][0] == 'cpu' else ():\n"
        "    print(rung, str(_native.FOLDER / f'_C_{rung}.so') in open('/proc/self/maps').read(), _native.FOLDER)"
    )
    if _native.build_info().get("cpu", {}).get("built") and Path("/proc/self/maps").exists():
        assert run(code).split() == ["cpu", "True", str(ROOT / "hetlora_kernels")]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_the_cuda_library_has_every_op_of_the_triton_rung():
    registered = {op for source in (ROOT / "csrc" / "cuda").glob("*.cpp") for op in re.findall(r'm\.impl\("(\w+)"', source.read_text())}
    shown = run("from hetlora_kernels.triton import OPS\nprint(*OPS)")
    assert set(shown.split()) == registered
