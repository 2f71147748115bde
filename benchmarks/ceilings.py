"""The ceilings suite: the most that this device does. Copying and reading memory, products of square matrices in each type, and on a GPU what a launch takes.

Shares of a ceiling are of these figures (`figures.share`). Each result is checked before it is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hetlora_kernels._torch import multiplies_fast

from .server import TOLERANCE, WrongResultError
from .timing import interleaved

COPY_BYTES = 128 << 20  # read, and as many written: more than a cache holds
SIZES = {"cpu": (512, 1024, 2048), "cuda": (4096, 8192)}


@dataclass(frozen=True)
class Case:
    op: str  # "copy", "read", "product", "launch"
    size: int  # bytes read, or n of [n, n] [n, n]
    dtype: torch.dtype

    @property
    def shape(self) -> str:
        return {"copy": f"{self.size / 2**20:g} MiB", "read": f"{self.size / 2**20:g} MiB", "product": f"{self.size} cubed"}.get(self.op, "one element")

    @property
    def bytes(self) -> int:
        element = self.dtype.itemsize
        return {"copy": 2 * self.size, "read": self.size, "product": 3 * self.size**2 * element}.get(self.op, 2 * element)

    @property
    def flops(self) -> int | None:
        return 2 * self.size**3 if self.op == "product" else None


def cases(options: Any, device: torch.device) -> list[Case]:
    """All of them whatever `only` says: the other figures are held against them."""
    types = [torch.float32, torch.bfloat16] + ([torch.float16] if device.type == "cuda" else [])
    moved = 1 << 20 if options.quick else COPY_BYTES
    sizes = (64,) if options.quick else SIZES[device.type][:2] if options.short else SIZES[device.type]
    found = []
    for dtype in types:  # both ceilings of a type before the next, in case that the time ends here
        # In a quick run one size is enough of a type without instructions, whose products take some fifty times as long.
        own = sizes if not options.short or multiplies_fast(dtype, device.type) else sizes[:1]
        found += [Case("copy", moved, dtype), *(Case("product", size, dtype) for size in own)]
    found.append(Case("read", moved, torch.float32))
    return found + ([Case("launch", 1, torch.float32)] if device.type == "cuda" else [])


wanted = cases


def make(case: Case, device: torch.device) -> tuple[Callable[[], object], Callable[[], tuple[Tensor, Tensor]]]:
    """(the work, what it made beside what it should be)."""
    draw = torch.Generator(device).manual_seed(0)
    if case.op == "launch":
        one = torch.zeros(1, device=device)
        return lambda: one.add_(0.0), lambda: (one, torch.zeros(1))
    if case.op == "product":
        a, b = ((torch.randn(case.size, case.size, generator=draw, device=device) * case.size**-0.5).to(case.dtype) for _ in range(2))
        out = torch.empty_like(a)
        return lambda: torch.mm(a, b, out=out), lambda: (out[:8, :8], a[:8].double() @ b[:, :8].double())
    source = torch.ones(case.size // case.dtype.itemsize, dtype=case.dtype, device=device)
    if case.op == "read":
        return source.sum, lambda: (source.sum(), torch.tensor(float(source.numel())))
    target = torch.zeros_like(source)
    return lambda: target.copy_(source), lambda: (target, source)


def measure(case: Case, options: Any, device: torch.device, threads: int) -> list[dict[str, Any]]:
    torch.set_num_threads(threads)
    work, made = make(case, device)
    if device.type == "cuda":  # the first call makes the libraries' handles, and no call waits for the device by itself
        work()
        torch.cuda.synchronize()
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize()
    once = time.perf_counter() - start
    own, true = (t.double().cpu() for t in made())
    error = float((own - true).norm() / true.norm().clamp_min(1e-30))
    if not error <= TOLERANCE[case.dtype]:
        raise WrongResultError(f"torch: {case.op} of {case.shape}, {case.dtype} is off by {error:.2e}; nothing is timed")
    # What takes so long is measured in few rounds.
    slow = once > options.seconds / 4
    timing = interleaved({"torch": work}, "torch", device, options.seconds / 4, least_rounds=3 if slow else 7, known={"torch": once} if slow else None)["torch"]
    record = {"op": case.op, "shape": case.shape, "clients": 1, "dtype": str(case.dtype).removeprefix("torch."), "threads": threads}
    record |= {"provider": "torch", "yardstick": "torch", "bytes": case.bytes, "flops": case.flops, "note": ""}
    return [{**record, **timing.figures(case.bytes), "peak_extra_bytes": None}]
