"""Builds the compiled kernels that this machine allows: `_C_cpu.so` with a C++ compiler, `_C_cuda.so` with nvcc; neither is needed to install.

Both are against PyTorch's stable ABI, so one library serves Python 3.10 and torch 2.10 onwards. Only torch's headers and libraries are read, torch is
never imported: an isolated build, which cannot see the environment it installs into, finds them through the interpreter's own paths.

Environment: HETLORA_CUDA=auto (default: with nvcc and a torch that has CUDA) | 0 | 1 (required: fail without);  HETLORA_CUDA_ARCHS="8.0;9.0+PTX";
CUDA_HOME;  CXX;  CXXFLAGS.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
PACKAGE = "hetlora_kernels"
OLDEST_TORCH = (2, 10)
DEFAULT_ARCHS = "8.0;8.6;8.7;8.9;9.0;10.0;11.0;12.0+PTX"
# -fno-math-errno lets sqrt vectorise, -fno-trapping-math lets selects; neither changes a result. Contraction to FMA is stated because compilers differ in
# their default; newer GCCs leave some chains of them apart for the sake of some machines (--param below), and then an element's bits would depend on the
# tile that it falls into. Vectors pass between inlined functions only, so that -Wpsabi, on how they are passed, does not matter.
OPTIMISE = ["-O3", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"]
CXX_FLAGS = ["-std=c++17", "-fPIC", "-fvisibility=hidden", *OPTIMISE, "-Wall", "-Wextra", "-Wno-psabi"]
TARGET = ["-DTORCH_TARGET_VERSION=0x020a000000000000"]


@dataclass(frozen=True)
class Torch:
    root: Path
    version: str
    cuda: str | None  # the CUDA that torch was built for

    @property
    def compile_flags(self) -> list[str]:
        # As system headers, so that warnings are about this project's code only.
        return [*TARGET, "-isystem", str(self.root / "include")]

    @property
    def link_flags(self) -> list[str]:
        # torch opens its libraries locally, so ours must name them; libtorch brings libtorch_cuda with it where there is one.
        return [f"-L{self.root / 'lib'}", "-Wl,--no-as-needed", "-ltorch", "-ltorch_cpu"]


@dataclass
class Plan:
    """What is built, or why not; written to `_build_info.json`."""

    torch: Torch | None
    compiler: str | None
    nvcc: Path | None = None
    archs: list[str] = field(default_factory=list)
    why_no_cpu: str = ""
    why_no_cuda: str = ""
    cuda_required: bool = False

    def record(self) -> dict[str, Any]:
        cuda: dict[str, Any] = {"built": not self.why_no_cuda, "reason": self.why_no_cuda}
        if self.nvcc and not self.why_no_cuda:
            release = re.search(r"release ([\d.]+)", output(self.nvcc, "--version"))
            cuda |= {"nvcc": release[1] if release else "unknown", "archs": self.archs}
        return {
            "torch": self.torch.version if self.torch else None,
            "compiler": version_line(self.compiler) if self.compiler else None,
            "cpu": {"built": not self.why_no_cpu, "reason": self.why_no_cpu},
            "cuda": cuda,
        }


def version_line(program: str) -> str:
    shown = subprocess.run([program, "--version"], capture_output=True, text=True, check=False).stdout.splitlines()
    return shown[0] if shown else program


def output(*command: str | Path) -> str:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=True).stdout


def site_folders() -> list[Path]:
    """Where the torch of the environment installed into may be. Build isolation hides it from `import`, not from these paths."""
    folders = [Path(path) for path in sys.path if path]
    folders += [Path(sysconfig.get_path(name)) for name in ("purelib", "platlib")]
    for variable in ("VIRTUAL_ENV", "CONDA_PREFIX"):  # uv and conda build in an environment of their own
        if os.environ.get(variable):
            folders += [Path(os.environ[variable]) / "lib" / f"python{sys.version_info[0]}.{sys.version_info[1]}" / "site-packages"]
    return folders


def find_torch() -> tuple[Torch | None, str]:
    """(the torch whose headers serve, "" or why there is none)."""
    spec = importlib.util.find_spec("torch")
    roots = [Path(spec.origin).parent] if spec and spec.origin else []
    for root in [*roots, *(folder / "torch" for folder in site_folders())]:
        if (root / "version.py").is_file() and (root / "lib").is_dir():
            values: dict[str, Any] = {}
            exec((root / "version.py").read_text(encoding="utf-8"), values)
            version = str(values["__version__"])
            if tuple(int(part) for part in version.split(".")[:2]) < OLDEST_TORCH:
                return None, f"torch {version} is older than {'.'.join(map(str, OLDEST_TORCH))}"
            return Torch(root, version, values.get("cuda")), ""
    return None, "torch was not installed when hetlora was built; install torch, then hetlora again"


def find_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for found in map(shutil.which, names) if found), None)


def contraction_flags(compiler: str) -> list[str]:
    """What keeps GCC from leaving multiplications and additions apart; other compilers do not know it."""
    about = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False).stdout
    return ["--param=avoid-fma-max-bits=0"] if "Free Software Foundation" in about else []


def find_nvcc() -> Path | None:
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    if home:
        candidates = [Path(home) / "bin" / "nvcc"]
    else:
        on_path = shutil.which("nvcc")
        candidates = [Path(on_path)] if on_path else []
        candidates.append(Path("/usr/local/cuda/bin/nvcc"))
    return next((path for path in candidates if path.is_file()), None)


def choose_archs(nvcc: Path) -> list[str]:
    """["sm_80", ..., "compute_120"] of those wanted that this nvcc knows; PTX stays with the last one, for devices newer than all of them."""
    wanted = os.environ.get("HETLORA_CUDA_ARCHS") or DEFAULT_ARCHS
    known = set(output(nvcc, "--list-gpu-code").split())
    codes, ptx = [], False
    for entry in re.split(r"[;, ]+", wanted.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"HETLORA_CUDA_ARCHS: expected entries such as 8.0 or 12.0+PTX, got {entry!r}")
        code = f"sm_{match[1]}{match[2]}{match[3]}"
        ptx = ptx or bool(match[4])
        if code in known:
            codes.append(code)
        else:
            print(f"hetlora: {nvcc} does not know {code}; left out")
    if not codes:
        raise SystemExit(f"HETLORA_CUDA_ARCHS: {nvcc} knows none of {wanted!r}; it knows {' '.join(sorted(known))}")
    return codes + ([codes[-1].replace("sm_", "compute_")] if ptx else [])


def make_plan() -> Plan:
    """Decide from the machine and the environment; `SystemExit` with one line when something asked for cannot be."""
    wish = os.environ.get("HETLORA_CUDA", "auto").strip() or "auto"
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"HETLORA_CUDA: expected auto, 0 or 1, got {wish!r}")
    torch, why = find_torch()
    plan = Plan(torch, find_compiler(), cuda_required=wish == "1")
    if not sys.platform.startswith("linux"):
        why = f"compiled kernels are built on Linux only, this is {sys.platform}"
    elif torch and not plan.compiler:
        why = "no C++ compiler was found (g++ or clang++; or set CXX)"
    plan.why_no_cpu = plan.why_no_cuda = why
    if not why:
        plan.why_no_cuda = why_no_cuda(plan, wish)
    if plan.cuda_required and plan.why_no_cuda:
        raise SystemExit(f"HETLORA_CUDA=1: {plan.why_no_cuda}")
    if not plan.why_no_cuda:
        assert plan.nvcc is not None
        plan.archs = choose_archs(plan.nvcc)
    return plan


def why_no_cuda(plan: Plan, wish: str) -> str:
    if wish == "0":
        return "turned off by HETLORA_CUDA=0"
    if wish == "auto" and plan.torch and not plan.torch.cuda:
        return f"torch {plan.torch.version} has no CUDA (HETLORA_CUDA=1 builds it all the same)"
    plan.nvcc = find_nvcc()
    if plan.nvcc is None:
        return "no nvcc was found (install the CUDA toolkit or set CUDA_HOME)"
    return "" if list((ROOT / "csrc" / "cuda").glob("*.cu")) else "this source tree has no CUDA kernels"


def run(command: list[str]) -> None:
    print(shlex.join(command), flush=True)
    result = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(result.stdout, end="", flush=True)
    if result.returncode:
        raise RuntimeError(f"{Path(command[0]).name} failed with exit status {result.returncode}")


class BuildKernels(build_ext):
    """Calls the compilers itself: torch's own extension builder refuses CUDA with a torch built without it."""

    plan: Plan

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self.folder().glob("_C_*.so"))] + [str(self.folder() / "_build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def folder(self) -> Path:
        return ROOT / PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib) / PACKAGE

    def run(self) -> None:
        plan, folder = self.plan, self.folder()
        forget_old_build(folder)
        if not plan.why_no_cpu:
            plan.why_no_cpu = self.attempt(self.build_cpu, folder / "_C_cpu.so", required=False)
        if not plan.why_no_cuda:
            plan.why_no_cuda = self.attempt(self.build_cuda, folder / "_C_cuda.so", required=plan.cuda_required)
        write_record(plan, folder)

    def attempt(self, step: Any, target: Path, required: bool) -> str:
        try:
            step(target)
        except RuntimeError as error:
            if required:
                raise SystemExit(f"{target.name}: {error}") from None
            return f"compiling failed when hetlora was built: {error}"
        return ""

    def compile(self, jobs: list[tuple[list[str], Path]]) -> list[str]:
        """Run `command... source -o object` for each (command, source), on all cores; returns the objects."""
        objects = [Path(self.build_temp).resolve() / source.relative_to(ROOT).with_suffix(source.suffix + ".o") for _, source in jobs]
        for path in objects:
            path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(run, [[*command, str(source), "-o", str(path)] for (command, source), path in zip(jobs, objects, strict=True)]))
        return [str(path) for path in objects]

    def cxx(self) -> list[str]:
        assert self.plan.torch is not None and self.plan.compiler is not None
        return [self.plan.compiler, *CXX_FLAGS, *contraction_flags(self.plan.compiler), *shlex.split(os.environ.get("CXXFLAGS", ""))]

    def build_cpu(self, target: Path) -> None:
        torch = self.plan.torch
        assert torch is not None
        sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        objects = self.compile([([*self.cxx(), *torch.compile_flags, "-c"], source) for source in sources])
        run([*self.cxx(), "-shared", *objects, "-o", str(target), *torch.link_flags])

    def build_cuda(self, target: Path) -> None:
        torch, nvcc = self.plan.torch, self.plan.nvcc
        assert torch is not None and nvcc is not None
        codes = [flag for code in self.plan.archs for flag in ("-gencode", f"arch={code.replace('sm_', 'compute_')},code={code}")]
        host = ["-ccbin", str(self.plan.compiler), "-Xcompiler", "-fPIC,-fvisibility=hidden"]
        folder = ROOT / "csrc" / "cuda"
        device = [str(nvcc), "-O3", "-std=c++17", *host, *codes, f"-I{folder}", "-Xptxas", "-v", "--threads", "2", "-c"]
        # The bindings through nvcc too, for its include path: the nvcc found may be a wrapper that lies outside its toolkit.
        bindings = [str(nvcc), "-O3", "-std=c++17", *host, *torch.compile_flags, "-DUSE_CUDA", "-c"]
        jobs = [(device, source) for source in sorted(folder.glob("*.cu"))]
        jobs += [(bindings, source) for source in sorted(folder.glob("*.cpp"))]
        objects = self.compile(jobs)
        link = [flag.replace("-Wl,", "-Xlinker=") for flag in torch.link_flags]
        run([str(nvcc), "-shared", *host[:2], "-cudart", "static", *objects, "-o", str(target), *link])


class BuildPython(build_py):
    """Writes the record where no kernel is built, in which case `build_ext` does not run."""

    plan: Plan

    def run(self) -> None:
        super().run()
        if self.plan.why_no_cpu and self.plan.why_no_cuda and not self.distribution.ext_modules:
            folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
            forget_old_build(folder)
            write_record(self.plan, folder)


def forget_old_build(folder: Path) -> None:
    """A library left by an earlier build would otherwise be packed, or loaded, beside a record that denies it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("_C_*.so"), *folder.glob("_build_info.json")]:
        old.unlink()


def write_record(plan: Plan, folder: Path) -> None:
    record = plan.record()
    (folder / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name in ("cpu", "cuda"):
        print(f"hetlora: {name} kernels {'built' if record[name]['built'] else 'not built: ' + record[name]['reason']}")


def main() -> None:
    plan = BuildKernels.plan = BuildPython.plan = make_plan()
    nothing = plan.why_no_cpu and plan.why_no_cuda
    setup(
        # The source list is for setuptools only, which asks for one; an empty module list makes a pure-Python wheel.
        ext_modules=[] if nothing else [Extension(f"{PACKAGE}._C_cpu", [])],
        cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
        options={} if nothing else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
