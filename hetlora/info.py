"""`hetlora info`: versions, devices, packages, what the build decided, and the backend of each operation. Plain text: the kernels alone suffice for it."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from importlib import metadata

import torch

import hetlora_kernels
from hetlora import __version__
from hetlora.report.text import printable, wrap
from hetlora_kernels._native import build_info
from hetlora_kernels._torch import multiplies_fast

_PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "pydantic", "rich", "click", "matplotlib", "datasets", "bitsandbytes", "flwr")


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    found = [("cpu", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
    if slow := [name for name in ("bfloat16", "float16") if not multiplies_fast(getattr(torch, name), "cpu")]:
        found.append(("", f"no instructions for products of {' and '.join(slow)}: float32 is faster, but for layers with adapters"))
    for index in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(index)
        found.append((f"cuda:{index}", f"{device.name}, compute capability {device.major}.{device.minor}, {device.total_memory / 2**30:.1f} GiB"))
    if not torch.cuda.is_available():
        built = getattr(torch.version, "cuda", None) or getattr(torch.version, "hip", None)
        found.append(("cuda", "no usable GPU" if built else "this torch is built without CUDA"))
    return found


def _compiled_library() -> list[tuple[str, str]]:
    """What the build of this installation decided, and why."""
    info = build_info()
    rows = [] if info else [("none", "nothing was built: a plain checkout, or an installation without a C++ compiler")]
    for name, value in info.items():
        if isinstance(value, dict):
            details = ", ".join(f"{key} {' '.join(v) if isinstance(v, list) else v}" for key, v in value.items() if key not in ("built", "reason"))
            value = (f"built{f' ({details})' if details else ''}") if value.get("built") else f"not built: {value.get('reason')}"
        rows.append((str(name), str(value)))
    return rows


def _print_rows(title: str, rows: list[tuple[str, ...]], width: int) -> None:
    """The title, and below it the rows in columns; the last column goes on below itself."""
    print(f"\n{title}")
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]) - 1)]
    for *first, last in rows:
        head = "  " + "".join(f"{cell:<{size}}  " for cell, size in zip(first, widths, strict=True))
        print("\n".join(wrap(head + printable(last), width, indent=" " * len(head))))


def print_info() -> None:
    """Versions, devices, packages, and the backend of each operation with the reason for it."""
    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else 160
    system = [("hetlora", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    parts = (("System", system), ("Devices", _devices()), ("Packages", [(p, _version_of(p)) for p in _PACKAGES]), ("Compiled kernels", _compiled_library()))
    for title, rows in parts:
        _print_rows(title, [(name, value) for name, value in rows], width)
    backends = [(name, rung, reason) for name, (rung, reason) in hetlora_kernels.backends().items()]
    _print_rows("Backend of each operation", [("operation", "backend", "reason"), *backends], width)
    sys.stdout.flush()  # so that a reader that left is noticed here
