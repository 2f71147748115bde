"""What every Triton launcher needs: its tables, alignment of the pointers in them, launch parameters, the launch itself."""

from __future__ import annotations

import json
import os
import re
import warnings
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from hetlora_kernels.layout import own_list
from hetlora_kernels.triton._tables import upload

TYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.float64: tl.float64}
PARAMS = Path(__file__).parent / "params"


def module_table(device: torch.device, *columns: Sequence[int | Tensor]) -> Tensor:
    """int64 [M, number of columns]; a tensor stands for its address. One upload, none when the same addresses come back."""
    plain = [[value.data_ptr() if isinstance(value, Tensor) else int(value) for value in column] for column in columns]
    return upload((value for row in zip(*plain, strict=True) for value in row), torch.int64, device)


def split_ranks(ranks: Sequence[int], modules: int) -> list[tuple[int, ...]]:
    """The K ranks (or cuts) of each module."""
    return [tuple(own_list(ranks, module, modules)) for module in range(modules)]


def layout_table(device: torch.device, layouts: Sequence[tuple], *sections: Any) -> tuple[Tensor, list[int], list[int]]:
    """(int32 table, position of each module's layout in it, position of each section in a layout).

    layouts: one hashable description per module; equal ones are stored once.   sections: functions from a description to a list of integers;
    each section is as long as the longest of it.
    """
    distinct = list(dict.fromkeys(layouts))
    built = [[_section(section, layout) for layout in distinct] for section in sections]
    lengths = [max(map(len, own)) for own in built]
    stride = sum(lengths)
    values = (v for u in range(len(distinct)) for own, length in zip(built, lengths, strict=True) for v in (*own[u], *[0] * (length - len(own[u]))))
    where = {layout: u * stride for u, layout in enumerate(distinct)}
    return upload(values, torch.int32, device), [where[layout] for layout in layouts], list(accumulate(lengths, initial=0))[:-1]


@lru_cache(maxsize=512)
def _section(section: Any, layout: tuple) -> tuple[int, ...]:
    return tuple(section(layout))


def offsets(ranks: tuple[int, ...]) -> list[int]:
    """First row of each client, and the end: K + 1 integers."""
    return list(accumulate(ranks, initial=0))


def owner_starts(ranks: tuple[int, ...]) -> list[int]:
    """Where each rank row's owners begin in `row_owners`; one more than the largest rank."""
    return list(accumulate((sum(rank > row for rank in ranks) for row in range(max(ranks, default=0))), initial=0))


def row_owners(ranks: tuple[int, ...]) -> list[int]:
    """Clients whose rank exceeds row 0, then row 1, ...: in client order, which is the order of the sums."""
    return [k for row in range(max(ranks, default=0)) for k, rank in enumerate(ranks) if rank > row]


def row_clients(ranks: tuple[int, ...]) -> list[int]:
    """The client of each packed row."""
    return [k for k, rank in enumerate(ranks) for _ in range(rank)]


def alignment(widths: Iterable[int], *groups: Iterable[Tensor]) -> int:
    """How many elements every row start is a multiple of, when 16-byte accesses are legal for every tensor of `groups`; else 1."""
    tensors = [t for group in groups for t in group]
    elements = 16 // min(t.element_size() for t in tensors)
    legal = all(t.data_ptr() % 16 == 0 for t in tensors) and all(width % elements == 0 for width in widths)
    return elements if legal else 1


def contiguous(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [t.contiguous() for t in tensors]


def require_contiguous(**lists: Sequence[Tensor]) -> None:
    """In-place operands must be contiguous: a copy would lose what the kernel writes."""
    for name, tensors in lists.items():
        for position, tensor in enumerate(tensors):
            if not tensor.is_contiguous():
                raise ValueError(f"{name}[{position}]: expected a contiguous tensor, got strides {tensor.stride()} for shape {tuple(tensor.shape)}")


def params_file(device_name: str) -> str:
    """Name of the file with a device's measured parameters."""
    return re.sub(r"[^a-z0-9]+", "_", device_name.lower()).strip("_") + ".json"


def user_params() -> Path:
    """Where `hetlora tune` writes when the package's own folder cannot be written; read before that folder."""
    return Path(os.environ.get("XDG_CONFIG_HOME") or Path.home() / ".config") / "hetlora" / "triton"


@lru_cache(maxsize=8)
def _named_params(device_name: str | None) -> dict[str, dict[str, Any]]:
    default = json.loads((PARAMS / "default.json").read_text())
    tables = default["kernels"] | {"layer": default["layer"]}
    if device_name is None:
        return tables
    path = next((path for path in (folder / params_file(device_name) for folder in (user_params(), PARAMS)) if path.exists()), None)
    if path is None:
        text = f"hetlora: no measured Triton launch parameters for {device_name}; using the untuned defaults (`hetlora tune` measures them)"
        warnings.warn(text, RuntimeWarning, stacklevel=6)
        return tables
    measured = json.loads(path.read_text())
    return tables | measured["kernels"] | {"layer": measured.get("layer", default["layer"])}


def device_params(device: torch.device) -> dict[str, dict[str, Any]]:
    """{kernel: launch parameters} and the table "layer" of `device`: measured where a file has them, else the untuned defaults and one warning."""
    return _named_params(torch.cuda.get_device_name(device) if device.type == "cuda" else None)


def params(name: str, device: torch.device) -> dict[str, int]:
    """Launch parameters of one kernel on `device`."""
    return dict(device_params(device)[name])


def block_for(limit: int, width: int) -> int:
    """Columns per program: `limit`, or fewer when the widest row is shorter."""
    return min(limit, max(16, triton.next_power_of_2(width)))


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, num_warps: int, **constants: Any) -> None:
    """Run `kernel` on `device`; nothing when the grid is empty."""
    if min(grid) == 0:
        return
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **constants, num_warps=num_warps)


@triton.jit
def cast(value, TARGET: tl.constexpr):
    """`value` in TARGET; float64 goes to the 16-bit types through float32, as torch's own conversion does."""
    if value.dtype == tl.float64 and TARGET.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value.to(TARGET)


@triton.jit
def divide(numerator, denominator):
    """Correctly rounded quotient; Triton's `/` is 2 ulp off in float32."""
    if numerator.dtype == tl.float64:
        return numerator / denominator
    else:
        return tl.div_rn(numerator, denominator)


@triton.jit
def square_root(value):
    """Correctly rounded square root; Triton's `sqrt` is approximate in float32."""
    if value.dtype == tl.float64:
        return tl.sqrt(value)
    else:
        return tl.sqrt_rn(value)
