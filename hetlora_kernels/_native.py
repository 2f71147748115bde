"""The compiled libraries beside this file: whether each is there, fits this process, and why not."""

from __future__ import annotations

import json
import os
import warnings
from pathlib import Path
from typing import Any

import torch

FOLDER = Path(__file__).resolve().parent
INSTRUCTION_SETS = ("base", "avx2", "avx512")  # of csrc/cpu/simd.cpp; HETLORA_INSTRUCTION_SET takes the layer's and Gram's kernels no further than one of them
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


def _unfit(name: str) -> str | None:
    """Why library `name` ("cpu" or "cuda") cannot serve here although it may be present; None when it can."""
    if name == "cpu":
        return None
    if not torch.version.cuda:
        return "this torch is built without CUDA"
    if not torch.cuda.is_available():
        return "no CUDA device"
    archs = build_info().get("cuda", {}).get("archs", [])
    capability = torch.cuda.get_device_capability()
    if archs and not covers(archs, capability):
        return f"built for {', '.join(archs)}, this device is sm_{capability[0]}{capability[1]}; {REBUILD} and HETLORA_CUDA_ARCHS set"
    return None


def load(name: str) -> str | None:
    """Load `_C_<name>.so`, which registers its kernels; None when loaded, else the reason why not. A library that is there but fails to load warns."""
    path = FOLDER / f"_C_{name}.so"
    unfit = _unfit(name)
    most = os.environ.get("HETLORA_INSTRUCTION_SET")
    if most is not None and most not in INSTRUCTION_SETS:
        raise ValueError(f"environment variable HETLORA_INSTRUCTION_SET: expected one of {', '.join(INSTRUCTION_SETS)}, got {most!r}")
    if not path.exists():
        return unfit or build_info().get(name, {}).get("reason") or f"not built; {REBUILD}"
    if unfit:
        return unfit
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        reason = f"{path.name} does not load with torch {torch.__version__} ({str(error).splitlines()[0]}); {REBUILD}"
        warnings.warn(f"hetlora_kernels: {reason}. Slower kernels are used instead.", RuntimeWarning, stacklevel=2)
        return reason
    return None
