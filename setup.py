"""Builds the compiled kernels that this machine allows: `_C_cpu.so` with a C++ compiler, `_C_cuda.so` with nvcc; neither is needed to install.

Both are against PyTorch's stable ABI, so one library serves Python 3.10 and torch 2.10 onwards. Only torch's headers and libraries are read, torch is
never imported: an isolated build, which cannot see the environment it installs into, finds them through the interpreter's own paths.

Environment: HETLORA_CUDA=auto (default: with nvcc and a torch that has CUDA) | 0 | 1 (required: fail without);  CUDA_HOME;  CXX;  CXXFLAGS;
HETLORA_CUDA_ARCHS="8.0;9.0+PTX", "local" (of this machine's GPUs) or "all"; without it TORCH_CUDA_ARCH_LIST, as torch's own extensions read it; without
either "local" in a build in place (`build_ext --inplace`, an editable install) where there is a GPU, else "all";
MAX_JOBS: compilers at once, at most; never more than there are processors, nor than free memory has room for.
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
# Peak of one compiler with all its passes: measured 360 MB (g++ on the layer's CPU kernels), 264 MB (nvcc, two architectures at once).
JOB_BYTES = 512 << 20
# Torch's names of generations, as in torch.utils.cpp_extension.
GENERATIONS = {"Ampere": "8.0 8.6+PTX", "Ada": "8.9+PTX", "Hopper": "9.0+PTX", "Blackwell+Tegra": "11.0", "Blackwell": "10.0 10.3 12.0 12.1+PTX"}
OLDEST_ARCH = (8, 0)  # cp.async and bfloat16 products
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
class BuildChoice:
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
                return None, f"compiled kernels need torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is torch {version}"
            return Torch(root, version, values.get("cuda")), ""
    return None, "torch was not installed when hetlora was built; install torch, then hetlora again"


def find_compiler() -> str | None:
    names = [os.environ["CXX"]] if os.environ.get("CXX") else ["g++", "clang++", "c++"]
    return next((found for found in map(shutil.which, names) if found), None)


def file_names(torch: Torch) -> list[str]:
    """So that messages and debuggers name a file csrc/cpu/lora.cpp, and do not say where a wheel was built."""
    return [f"-ffile-prefix-map={folder}/=" for folder in (ROOT, torch.root.parent)]


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


def local_archs() -> str:
    """Of this machine's GPUs, as "8.9;9.0"; "" where none is seen or its tool does not say (older Jetsons)."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return ""
    shown = subprocess.run([tool, "--query-gpu=compute_cap", "--format=csv,noheader"], capture_output=True, text=True, check=False)
    return ";".join(sorted(set(re.findall(r"^\d+\.\d$", shown.stdout, re.MULTILINE)))) if shown.returncode == 0 else ""


def wanted_archs(in_place: bool) -> tuple[str, str]:
    """(the architectures wanted, what said so)."""
    own = os.environ.get("HETLORA_CUDA_ARCHS", "").strip()
    torchs = os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip()
    if own and own.lower() not in ("local", "all"):
        return own, "HETLORA_CUDA_ARCHS"
    if not own and torchs and torchs.lower() not in ("all", "common"):
        return " ".join(GENERATIONS.get(entry, entry) for entry in re.split(r"[;, ]+", torchs)), "TORCH_CUDA_ARCH_LIST"
    local = local_archs() if own.lower() == "local" or (in_place and not own and not torchs) else ""
    if own.lower() == "local" and not local:
        raise SystemExit("HETLORA_CUDA_ARCHS=local: expected a GPU that nvidia-smi names, found none")
    return (local, "this machine's GPUs") if local else (DEFAULT_ARCHS, "every architecture")


def choose_archs(nvcc: Path, in_place: bool = False) -> list[str]:
    """["sm_80", ..., "compute_120"] of those wanted that this nvcc knows; PTX stays with the last one, for devices newer than all of them."""
    wanted, origin = wanted_archs(in_place)
    known = set(output(nvcc, "--list-gpu-code").split())
    codes, ptx = [], False
    for entry in re.split(r"[;, ]+", wanted.strip("; ,")):
        match = re.fullmatch(r"(\d+)\.?(\d)([af]?)(\+PTX)?", entry)
        if match is None:
            raise SystemExit(f"{origin}: expected entries such as 8.0 or 12.0+PTX, got {entry!r}")
        code = f"sm_{match[1]}{match[2]}{match[3]}"
        too_old = (int(match[1]), int(match[2])) < OLDEST_ARCH
        ptx = ptx or bool(match[4])
        if code in known and not too_old:
            codes += [code] if code not in codes else []
        else:
            print(f"hetlora: {'the kernels need sm_80 or newer' if too_old else f'{nvcc} does not know {code}'}; {code} left out")
    if not codes and origin == "this machine's GPUs" and os.environ.get("HETLORA_CUDA_ARCHS", "").strip().lower() != "local":
        print(f"hetlora: building for every architecture instead of {wanted}")
        return choose_archs(nvcc)
    if not codes:
        raise SystemExit(f"{origin}: nothing to build for in {wanted!r}; {nvcc} knows {' '.join(sorted(known))}, and the kernels need sm_80 or newer")
    return codes + ([codes[-1].replace("sm_", "compute_")] if ptx else [])


def free_memory() -> int:
    """Bytes that may still be taken: of the machine, and of the control group that this process is in."""
    limits = []
    meminfo = Path("/proc/meminfo")
    if meminfo.exists() and (found := re.search(r"MemAvailable:\s+(\d+) kB", meminfo.read_text())):
        limits.append(int(found[1]) << 10)
    group = Path("/sys/fs/cgroup")
    for most, used in (("memory.max", "memory.current"), ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes")):
        if (group / most).exists() and (limit := (group / most).read_text().strip()).isdigit():
            limits.append(int(limit) - int((group / used).read_text()))
    return min(limits, default=JOB_BYTES)


def job_count() -> int:
    """How many compilers run at once."""
    asked = os.environ.get("MAX_JOBS", "").strip()
    if asked and not (asked.isdigit() and int(asked)):
        raise SystemExit(f"MAX_JOBS: expected an integer of at least 1, got {asked!r}")
    processors = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(int(asked or processors), processors, free_memory() // JOB_BYTES))


def choose_build() -> BuildChoice:
    """Decide from the machine and the environment; `SystemExit` with one line when something asked for cannot be."""
    wish = os.environ.get("HETLORA_CUDA", "auto").strip() or "auto"
    if wish not in ("auto", "0", "1"):
        raise SystemExit(f"HETLORA_CUDA: expected auto, 0 or 1, got {wish!r}")
    torch, why = find_torch()
    choice = BuildChoice(torch, find_compiler(), cuda_required=wish == "1")
    if not sys.platform.startswith("linux"):
        why = f"compiled kernels are built on Linux only, this is {sys.platform}"
    elif torch and not choice.compiler:
        why = "no C++ compiler was found (g++ or clang++; or set CXX)"
    choice.why_no_cpu = choice.why_no_cuda = why
    if not why:
        choice.why_no_cuda = why_no_cuda(choice, wish)
    if choice.cuda_required and choice.why_no_cuda:
        raise SystemExit(f"HETLORA_CUDA=1: {choice.why_no_cuda}")
    if not choice.why_no_cuda:
        assert choice.nvcc is not None
        choice.archs = choose_archs(choice.nvcc)
    job_count()  # refuses a MAX_JOBS that means nothing
    return choice


def why_no_cuda(choice: BuildChoice, wish: str) -> str:
    if wish == "0":
        return "turned off by HETLORA_CUDA=0"
    if wish == "auto" and choice.torch and not choice.torch.cuda:
        return f"torch {choice.torch.version} has no CUDA (HETLORA_CUDA=1 builds it all the same)"
    choice.nvcc = find_nvcc()
    if choice.nvcc is None:
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

    choice: BuildChoice

    def get_outputs(self) -> list[str]:
        return [str(path) for path in sorted(self.folder().glob("_C_*.so"))] + [str(self.folder() / "_build_info.json")]

    def get_output_mapping(self) -> dict[str, str]:
        return {}

    def folder(self) -> Path:
        return ROOT / PACKAGE if self.inplace or self.editable_mode else Path(self.build_lib) / PACKAGE

    def run(self) -> None:
        choice, folder = self.choice, self.folder()
        forget_old_build(folder)
        if choice.nvcc and not choice.why_no_cuda:
            choice.archs = choose_archs(choice.nvcc, in_place=bool(self.inplace or self.editable_mode))
        if not choice.why_no_cpu:
            choice.why_no_cpu = self.attempt(self.build_cpu, folder / "_C_cpu.so", required=False)
        if not choice.why_no_cuda:
            choice.why_no_cuda = self.attempt(self.build_cuda, folder / "_C_cuda.so", required=choice.cuda_required)
        write_record(choice, folder)

    def attempt(self, step: Any, target: Path, required: bool) -> str:
        try:
            step(target)
        except RuntimeError as error:
            if required:
                raise SystemExit(f"{target.name}: {error}") from None
            return f"compiling failed when hetlora was built: {error}"
        return ""

    def compile(self, jobs: list[tuple[list[str], Path]]) -> list[str]:
        """Run `command... source -o object` for each (command, source), `job_count` at a time; returns the objects."""
        objects = [Path(self.build_temp).resolve() / source.relative_to(ROOT).with_suffix(source.suffix + ".o") for _, source in jobs]
        for path in objects:
            path.parent.mkdir(parents=True, exist_ok=True)
        with ThreadPoolExecutor(job_count()) as pool:
            list(pool.map(run, [[*command, str(source), "-o", str(path)] for (command, source), path in zip(jobs, objects, strict=True)]))
        return [str(path) for path in objects]

    def cxx(self) -> list[str]:
        assert self.choice.torch is not None and self.choice.compiler is not None
        return [self.choice.compiler, *CXX_FLAGS, *contraction_flags(self.choice.compiler), *shlex.split(os.environ.get("CXXFLAGS", ""))]

    def build_cpu(self, target: Path) -> None:
        torch = self.choice.torch
        assert torch is not None
        sources = sorted((ROOT / "csrc" / "cpu").glob("*.cpp"))
        objects = self.compile([([*self.cxx(), *file_names(torch), *torch.compile_flags, "-c"], source) for source in sources])
        run([*self.cxx(), "-shared", *objects, "-o", str(target), *torch.link_flags])

    def build_cuda(self, target: Path) -> None:
        torch, nvcc = self.choice.torch, self.choice.nvcc
        assert torch is not None and nvcc is not None
        codes = [flag for code in self.choice.archs for flag in ("-gencode", f"arch={code.replace('sm_', 'compute_')},code={code}")]
        names = [flag for flag in file_names(torch) if "," not in flag]  # nvcc would divide it there
        host = ["-ccbin", str(self.choice.compiler), "-Xcompiler", ",".join(["-fPIC", "-fvisibility=hidden", *names])]
        folder = ROOT / "csrc" / "cuda"
        device = [str(nvcc), "-O3", "-std=c++17", *host, *codes, f"-I{folder}", "-Xptxas", "-v", "--threads", "2", "-c"]
        # The bindings through nvcc too, for its include path: the nvcc found may be a wrapper that lies outside its toolkit.
        bindings = [str(nvcc), "-O3", "-std=c++17", *host, *torch.compile_flags, f"-I{folder}", "-DUSE_CUDA", "-c"]
        jobs = [(device, source) for source in sorted(folder.glob("*.cu"))]
        jobs += [(bindings, source) for source in sorted(folder.glob("*.cpp"))]
        objects = self.compile(jobs)
        link = [flag.replace("-Wl,", "-Xlinker=") for flag in torch.link_flags]
        run([str(nvcc), "-shared", *host[:2], "-cudart", "static", *objects, "-o", str(target), *link])


class BuildPython(build_py):
    """Writes the record where no kernel is built, in which case `build_ext` does not run."""

    choice: BuildChoice

    def run(self) -> None:
        super().run()
        if self.choice.why_no_cpu and self.choice.why_no_cuda and not self.distribution.ext_modules:
            folder = ROOT / PACKAGE if self.editable_mode else Path(self.build_lib) / PACKAGE
            forget_old_build(folder)
            write_record(self.choice, folder)


def forget_old_build(folder: Path) -> None:
    """A library left by an earlier build would otherwise be packed, or loaded, beside a record that denies it."""
    folder.mkdir(parents=True, exist_ok=True)
    for old in [*folder.glob("_C_*.so"), *folder.glob("_build_info.json")]:
        old.unlink()


def write_record(choice: BuildChoice, folder: Path) -> None:
    record = choice.record()
    (folder / "_build_info.json").write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    for name in ("cpu", "cuda"):
        print(f"hetlora: {name} kernels {'built' if record[name]['built'] else 'not built: ' + record[name]['reason']}")


def main() -> None:
    choice = BuildKernels.choice = BuildPython.choice = choose_build()
    nothing = choice.why_no_cpu and choice.why_no_cuda
    setup(
        # The source list is for setuptools only, which asks for one; an empty module list makes a pure-Python wheel.
        ext_modules=[] if nothing else [Extension(f"{PACKAGE}._C_cpu", [])],
        cmdclass={"build_ext": BuildKernels, "build_py": BuildPython},
        options={} if nothing else {"bdist_wheel": {"py_limited_api": "cp310"}},
    )


if __name__ == "__main__":
    main()
