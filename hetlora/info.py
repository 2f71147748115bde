"""`hetlora info`: versions, devices, packages, what the build decided, and the backend of each operation."""

from __future__ import annotations

import os
import platform
from importlib import metadata

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

import hetlora_kernels
from hetlora import __version__
from hetlora.report.terminal import make_console
from hetlora_kernels._library import build_info

_PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "pydantic", "rich", "click", "matplotlib", "datasets", "bitsandbytes", "flwr")


def _version_of(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


def _devices() -> list[tuple[str, str]]:
    found = [("cpu", f"{platform.machine()}, {os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads")]
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


def print_info(console: Console | None = None) -> None:
    """Versions, devices, packages, and the backend of each operation with the reason for it."""
    console = console or make_console()
    system = [("hetlora", __version__), ("python", platform.python_version()), ("platform", platform.platform())]
    parts = (("System", system), ("Devices", _devices()), ("Packages", [(p, _version_of(p)) for p in _PACKAGES]), ("Compiled kernels", _compiled_library()))
    for title, rows in parts:
        table = Table(title=title, title_justify="left", show_header=False)
        for name, value in rows:
            table.add_row(Text(name), Text(value))
        console.print(table)
    table = Table("operation", "backend", "reason", title="Backend of each operation", title_justify="left")
    for name, (rung, reason) in hetlora_kernels.backends().items():
        table.add_row(Text(name), Text(rung), Text(reason))
    console.print(table)
