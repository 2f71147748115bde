"""What the build decides on a given machine, and what it leaves behind."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import forked
import pytest

from hetlora_kernels import _native

ROOT = Path(__file__).resolve().parents[2]
NOT_COPIED = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info", "_build_info.json")


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """setup.py as a module, with nothing of this machine's environment in the way."""
    for name in ("HETLORA_CUDA", "HETLORA_CUDA_ARCHS", "TORCH_CUDA_ARCH_LIST", "MAX_JOBS", "CUDA_HOME", "CUDA_PATH", "CXX", "VIRTUAL_ENV", "CONDA_PREFIX"):
        monkeypatch.delenv(name, raising=False)
    spec = importlib.util.spec_from_file_location("hetlora_setup", ROOT / "setup.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "hetlora_setup", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.sys, "platform", "linux")
    return module


def make_torch(folder: Path, version: str, cuda: str | None = None) -> Path:
    """An installed torch as the build sees it: a version file and folders."""
    (folder / "torch" / "lib").mkdir(parents=True)
    (folder / "torch" / "version.py").write_text(f"from typing import Optional\n__version__ = {version!r}\ncuda: Optional[str] = {cuda!r}\n")
    return folder


def make_nvcc(folder: Path, codes: str = "sm_75 sm_80 sm_86 sm_90") -> Path:
    program = folder / "bin" / "nvcc"
    program.parent.mkdir(parents=True)
    program.write_text(f'#!/bin/sh\ncase "$1" in --list-gpu-code) echo {codes} ;; *) echo "Cuda compilation tools, release 13.0, V13.0.88" ;; esac\n')
    program.chmod(0o755)
    return folder


def only_torch_at(build: ModuleType, monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build, "site_folders", lambda: [folder])


def test_an_isolated_build_finds_the_torch_it_cannot_import(build, monkeypatch, tmp_path):
    make_torch(tmp_path, "2.11.0+cpu")
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(build.sys, "path", [])
    monkeypatch.setattr(build.sysconfig, "get_path", lambda name: str(tmp_path))
    torch, why = build.find_torch()
    assert (torch.root, torch.version, torch.cuda, why) == (tmp_path / "torch", "2.11.0+cpu", None, "")


@pytest.mark.parametrize("wish", ["auto", "1"])
def test_without_torch_nothing_is_compiled_and_the_reason_says_what_to_do(build, monkeypatch, tmp_path, wish):
    only_torch_at(build, monkeypatch, tmp_path)
    monkeypatch.setenv("HETLORA_CUDA", wish)
    if wish == "1":
        with pytest.raises(SystemExit, match="HETLORA_CUDA=1: torch was not installed"):
            build.choose_build()
        return
    record = build.choose_build().record()
    assert not record["cpu"]["built"] and "install torch, then hetlora again" in record["cpu"]["reason"]


def test_a_torch_without_the_stable_interface_is_refused(build, monkeypatch, tmp_path):
    only_torch_at(build, monkeypatch, make_torch(tmp_path, "2.9.1"))
    assert build.choose_build().why_no_cpu == "compiled kernels need torch 2.10 or newer, this is torch 2.9.1"


def test_cuda_is_built_by_itself_only_for_a_torch_that_has_it(build, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc(tmp_path / "toolkit")))
    only_torch_at(build, monkeypatch, make_torch(tmp_path / "with", "2.13.0+cu130", "13.0"))
    monkeypatch.setattr(build, "ROOT", tmp_path)
    assert "no CUDA kernels" in build.choose_build().why_no_cuda  # this tree has none
    (tmp_path / "csrc" / "cuda").mkdir(parents=True)
    (tmp_path / "csrc" / "cuda" / "a.cu").touch()
    choice = build.choose_build()
    assert choice.why_no_cuda == "" and choice.archs == ["sm_80", "sm_86", "sm_90", "compute_90"]
    assert choice.record()["cuda"] == {"built": True, "reason": "", "nvcc": "13.0", "archs": choice.archs}
    monkeypatch.setenv("HETLORA_CUDA", "0")
    assert build.choose_build().why_no_cuda == "turned off by HETLORA_CUDA=0"
    monkeypatch.setenv("HETLORA_CUDA", "auto")
    only_torch_at(build, monkeypatch, make_torch(tmp_path / "without", "2.13.0+cpu"))
    assert "has no CUDA" in build.choose_build().why_no_cuda
    monkeypatch.setenv("HETLORA_CUDA", "1")
    assert build.choose_build().why_no_cuda == ""


def test_cuda_required_without_nvcc_fails_in_one_line(build, monkeypatch, tmp_path):
    only_torch_at(build, monkeypatch, make_torch(tmp_path, "2.13.0+cpu"))
    monkeypatch.setenv("HETLORA_CUDA", "1")
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"^HETLORA_CUDA=1: no nvcc was found \(install the CUDA toolkit or set CUDA_HOME\)$"):
        build.choose_build()


def test_wishes_that_mean_nothing_are_refused(build, monkeypatch, tmp_path):
    monkeypatch.setenv("HETLORA_CUDA", "yes")
    with pytest.raises(SystemExit, match="expected auto, 0 or 1, got 'yes'"):
        build.choose_build()
    nvcc = make_nvcc(tmp_path) / "bin" / "nvcc"
    for archs, message in (("hopper", "got 'hopper'"), ("5.2", "nothing to build for in '5.2'")):
        monkeypatch.setenv("HETLORA_CUDA_ARCHS", archs)
        with pytest.raises(SystemExit, match=f"^HETLORA_CUDA_ARCHS: .*{message}"):
            build.choose_archs(nvcc)
    for jobs in ("many", "0", "-1"):
        monkeypatch.setenv("MAX_JOBS", jobs)
        with pytest.raises(SystemExit, match=f"^MAX_JOBS: expected an integer of at least 1, got '{jobs}'$"):
            build.job_count()


def test_architectures_are_ours_then_torchs_then_those_of_the_gpus_in_place(build, monkeypatch, tmp_path, capsys):
    nvcc = make_nvcc(tmp_path) / "bin" / "nvcc"
    every = ["sm_80", "sm_86", "sm_90", "compute_90"]
    monkeypatch.setattr(build, "local_archs", lambda: "")
    assert build.choose_archs(nvcc, in_place=True) == build.choose_archs(nvcc) == every
    monkeypatch.setattr(build, "local_archs", lambda: "8.6;9.0")
    assert build.choose_archs(nvcc, in_place=True) == ["sm_86", "sm_90"] and build.choose_archs(nvcc) == every, "a wheel is for every machine"
    monkeypatch.setattr(build, "local_archs", lambda: "10.3")
    assert build.choose_archs(nvcc, in_place=True) == every and "does not know sm_103; sm_103 left out" in capsys.readouterr().out
    for torchs, expected in (
        ("7.0;8.0;9.0+PTX", ["sm_80", "sm_90", "compute_90"]),
        ("Ampere Hopper", ["sm_80", "sm_86", "sm_90", "compute_90"]),
        ("All", every),
    ):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", torchs)
        assert build.choose_archs(nvcc, in_place=True) == build.choose_archs(nvcc) == expected
    assert "the kernels need sm_80 or newer; sm_70 left out" in capsys.readouterr().out
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", "7.0")
    with pytest.raises(SystemExit, match=r"^TORCH_CUDA_ARCH_LIST: nothing to build for in '7\.0'"):
        build.choose_archs(nvcc)
    for own, expected in (("9.0", ["sm_90"]), ("all", every)):
        monkeypatch.setenv("HETLORA_CUDA_ARCHS", own)
        assert build.choose_archs(nvcc, in_place=True) == expected
    monkeypatch.setenv("HETLORA_CUDA_ARCHS", "local")
    with pytest.raises(SystemExit, match=r"^this machine's GPUs: nothing to build for in '10\.3'"):
        build.choose_archs(nvcc)
    monkeypatch.setattr(build, "local_archs", lambda: "")
    with pytest.raises(SystemExit, match=r"^HETLORA_CUDA_ARCHS=local: expected a GPU"):
        build.choose_archs(nvcc)


def test_the_gpus_of_this_machine_are_those_that_nvidia_smi_names(build, monkeypatch, tmp_path):
    tool = tmp_path / "nvidia-smi"
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    for text, expected in (("echo 9.0; echo 8.9; echo 9.0", "8.9;9.0"), ("echo '[N/A]'", ""), ("echo 9.0; exit 9", "")):
        tool.write_text(f"#!/bin/sh\n{text}\n")
        tool.chmod(0o755)
        assert build.local_archs() == expected


def test_compilers_at_once_are_bounded_by_the_wish_the_processors_and_free_memory(build, monkeypatch):
    monkeypatch.setattr(build.os, "sched_getaffinity", lambda process: range(16), raising=False)
    monkeypatch.setattr(build, "free_memory", lambda: 64 << 30)
    assert build.job_count() == 16
    for jobs, free, expected in (("4", 64 << 30, 4), ("99", 64 << 30, 16), ("", 3 * build.JOB_BYTES, 3), ("8", build.JOB_BYTES // 2, 1)):
        monkeypatch.setenv("MAX_JOBS", jobs)
        monkeypatch.setattr(build, "free_memory", lambda free=free: free)
        assert build.job_count() == expected
    monkeypatch.undo()
    assert 0 < build.free_memory() < 1 << 50


def test_a_device_is_covered_by_code_of_its_major_or_by_older_ptx():
    archs = ["sm_80", "sm_90", "compute_90"]
    assert [_native.covers(archs, device) for device in ((7, 5), (8, 0), (8, 7), (9, 0), (12, 0))] == [False, True, True, True, True]
    assert not _native.covers(["sm_86"], (8, 0)) and not _native.covers(["sm_90a", "compute_120"], (10, 0))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tree")
    for name in ("hetlora", "hetlora_kernels", "csrc", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=NOT_COPIED)
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def run_setup(tree: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, "setup.py", *arguments], cwd=tree, env={**os.environ, **environment}, capture_output=True, text=True, check=False)


def test_a_build_that_fails_leaves_no_library_and_says_so(tree):
    stale = tree / "hetlora_kernels" / "_C_cuda.so"
    stale.touch()
    result = run_setup(tree, "build_ext", "--inplace", CXX="/bin/false", HETLORA_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "hetlora: cpu kernels not built: compiling failed when hetlora was built" in result.stdout
    record = json.loads((tree / "hetlora_kernels" / "_build_info.json").read_text())
    assert not record["cpu"]["built"] and not list((tree / "hetlora_kernels").glob("_C_*.so"))


def test_without_a_compiler_the_wheel_is_pure_python_and_works(tree, tmp_path):
    result = run_setup(tree, "bdist_wheel", "-d", str(tmp_path), CXX="/nowhere/g++", HETLORA_CUDA="0")
    assert result.returncode == 0, result.stderr
    assert "hetlora: cpu kernels not built: no C++ compiler was found" in result.stdout
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path / "site")
    code = (
        "import torch, hetlora_kernels as hk; from hetlora_kernels import _library\n"
        "assert list(_library.available()) == ['reference'] and 'no C++ compiler' in hk.backends('cpu')['gram'][1], hk.backends('cpu')\n"
        "assert hk.aggregate(torch.ones(3, 4), hk.RankLayout([1, 2]), [1.0, 2.0], 2).tolist() == [[3.0] * 4, [2.0] * 4]"
    )
    clean = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "HETLORA_BACKEND")}
    environment = {**clean, "PYTHONPATH": str(tmp_path / "site"), "CUDA_VISIBLE_DEVICES": ""}
    done = forked.python(code, tmp_path, environment)
    assert done.returncode == 0, done.stderr
