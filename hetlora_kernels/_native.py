"""The compiled libraries beside this file: whether each is there, fits this process, and why not."""

from __future__ import annotations

import ctypes
import json
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
# Of csrc/cpu/simd.cpp; HETLORA_INSTRUCTION_SET takes the layer's and Gram's kernels no further than one of them.
INSTRUCTION_SETS = ("base", "avx2", "avx512", "amx")
OLDEST_TORCH = (2, 10)  # the stable interface that the libraries are built against; older ones have plain PyTorch and Triton
REBUILD = "rebuild with `pip install --no-build-isolation .`"


def build_info() -> dict[str, Any]:
    """What the build decided and why, as it recorded it: {"torch", "cpu": {...}, "cuda": {...}}; {} where nothing was ever built (a plain checkout)."""
    try:
        return json.loads((FOLDER / "_build_info.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}


def covers(archs: list[str], capability: tuple[int, int]) -> bool:
    """Whether code for `archs` ("sm_80", or "compute_120" for PTX) runs on a device of `capability`: same major with a minor not above, or older PTX."""
    major, minor = capability
    for arch in archs:
        kind, _, digits = arch.partition("_")
        own = divmod(int(digits.rstrip("af")), 10)
        if (kind == "sm" and own[0] == major and own[1] <= minor) or (kind == "compute" and own <= (major, minor)):
            return True
    return False


def driver_version() -> tuple[int, int] | None:
    """CUDA that the driver serves, (major, minor); None where there is no driver. Asked of the driver itself, which this does not start."""
    try:
        ask = ctypes.CDLL("libcuda.so.1").cuDriverGetVersion
    except (OSError, AttributeError):
        return None
    number = ctypes.c_int(0)
    return divmod(number.value, 1000) if ask(ctypes.byref(number)) == 0 else None


def _unserved(record: dict[str, Any], only_ptx: bool) -> str | None:
    """Why the driver does not serve a library built with the toolkit of `record`; None when it does, or when one of the two versions is not known.

    A driver serves every toolkit of its own major version or an older one, but translates PTX only of toolkits that are not newer than itself.
    """
    toolkit, driver = re.match(r"(\d+)\.(\d+)", str(record.get("nvcc", ""))), driver_version()
    if toolkit is None or driver is None:
        return None
    version = int(toolkit[1]), int(toolkit[2])
    serves = f"the driver serves CUDA {driver[0]}.{driver[1] // 10}"
    if version[0] > driver[0]:
        return f"built with CUDA {toolkit[0]}, {serves}; update the driver, or {REBUILD} and a toolkit of CUDA {driver[0]}"
    if only_ptx and version > (driver[0], driver[1] // 10):
        return f"has PTX of CUDA {toolkit[0]} for this device, {serves}; update the driver, or {REBUILD} and HETLORA_CUDA_ARCHS set"
    return None


def _unfit(name: str) -> str | None:
    """Why library `name` ("cpu" or "cuda") cannot serve here although it may be present; None when it can."""
    if name == "cpu":
        return None
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    record = build_info().get("cuda", {})
    archs, only_ptx = record.get("archs", []), False
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        if archs and not covers(archs, capability):
            return f"built for {', '.join(archs)}, device {index} is sm_{capability[0]}{capability[1]}; {REBUILD} and HETLORA_CUDA_ARCHS set"
        only_ptx = only_ptx or not covers([arch for arch in archs if arch.startswith("sm_")], capability)
    return _unserved(record, only_ptx)


def _too_old() -> str | None:
    """Why this torch can load no compiled library; None where it can."""
    version = re.match(r"(\d+)\.(\d+)", torch.__version__)
    if version is None or (int(version[1]), int(version[2])) >= OLDEST_TORCH:
        return None
    return f"compiled kernels need torch {'.'.join(map(str, OLDEST_TORCH))} or newer, this is torch {torch.__version__}"


def _elsewhere(file: str) -> Path | None:
    """Another folder on the import path that holds this library: one that is installed but hidden by a checkout."""
    places = (Path(entry or ".").resolve() / FOLDER.name for entry in sys.path)
    return next((place for place in places if place != FOLDER and (place / file).is_file()), None)


def load(name: str) -> str | None:
    """Load `_C_<name>.so`, which registers its kernels; None when loaded, else the reason why not. A library that is there but fails to load, or one that is
    installed where this file is of a checkout that was never built, warns."""
    path = FOLDER / f"_C_{name}.so"
    unfit = _unfit(name)
    most = os.environ.get("HETLORA_INSTRUCTION_SET")
    if most is not None and most not in INSTRUCTION_SETS:
        raise ValueError(f"environment variable HETLORA_INSTRUCTION_SET: expected one of {', '.join(INSTRUCTION_SETS)}, got {most!r}")
    if unfit:
        return unfit
    if not path.exists():
        other = None if build_info() else _elsewhere(path.name)  # a build left its reason
        if other is None:
            return build_info().get(name, {}).get("reason") or f"not built; {REBUILD}"
        return _warn(f"{path.name} is in {other}, but {FOLDER} is imported, which has none; run `python setup.py build_ext --inplace` in {FOLDER.parent}")
    if (old := _too_old()) is not None:
        return _warn(old)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        return _warn(f"{path.name} does not load with torch {torch.__version__} ({str(error).splitlines()[0]}); {REBUILD}")
    return None


def _warn(reason: str) -> str:
    warnings.warn(f"hetlora_kernels: {reason}. Slower kernels are used instead.", RuntimeWarning, stacklevel=3)
    return reason
