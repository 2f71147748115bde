"""Tables of integers on the device, uploaded once and kept: what a launch knows of modules, clients and tiles.

There is one table a device, whatever the stream. Another stream than the one that uploaded it waits for the upload's event. Inside the capture of a CUDA graph
a table from before the capture is used as it is: `torch.cuda.graph` has waited for the device by then, and an event from outside may not be asked there. A
table that is new in a capture is copied, as part of the graph, from pinned memory that is set aside before and never used again, so that each replay reads it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

KEPT = 1024  # tables; those that a graph reads are kept besides
RESERVE = 1 << 20  # bytes of pinned memory ahead of captures: an optimiser step of 200 modules takes 30 KB


@dataclass
class _Upload:
    table: Tensor
    stream: int  # that of the upload
    arrival: torch.cuda.Event | None  # None: it is known to have arrived
    readers: set[int] = field(default_factory=set)


_uploads: OrderedDict[Hashable, _Upload] = OrderedDict()
_of_graphs: dict[int, Tensor] = {}  # tables and pinned memory that replays read: kept for good
_reserve: Tensor | None = None
_used = 0


def table(key: Hashable, values: Callable[[], Iterable], dtype: torch.dtype, device: torch.device) -> Tensor:
    """`values()` as a tensor on `device`, the one that an equal `key` got before; `values` is asked only where there is none."""
    key = key, dtype, device
    found = _uploads.get(key)
    if found is not None:
        _uploads.move_to_end(key)
    elif device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return _captured(values(), dtype, device)
    else:
        found = _uploads[key] = _send(_host(values(), dtype), device)
        if len(_uploads) > KEPT:
            _uploads.popitem(last=False)
    if device.type == "cuda":
        _read(found, device)
    return found.table


def upload(values: Iterable, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A tensor of `values` on `device`, made once."""
    listed = tuple(values)
    return table(listed, lambda: listed, dtype, device)


def _host(values: Iterable, dtype: torch.dtype) -> Tensor:
    return torch.tensor(list(values), dtype=dtype, device="cpu")  # said, since torch.set_default_device may name another


def _send(host: Tensor, device: torch.device) -> _Upload:
    if device.type != "cuda":
        return _Upload(host.to(device), 0, None)
    _replenish()
    stream = torch.cuda.current_stream(device)
    return _Upload(host.pin_memory().to(device, non_blocking=True), stream.cuda_stream, stream.record_event())


def _read(found: _Upload, device: torch.device) -> None:
    """Let the current stream read a table: wait where it may not have arrived, and keep it from being released too early."""
    capturing = torch.cuda.is_current_stream_capturing()
    if capturing:
        _of_graphs[id(found.table)] = found.table
        return
    stream = torch.cuda.current_stream(device)
    if stream.cuda_stream == found.stream:
        return
    if found.arrival is not None:
        if found.arrival.query():
            found.arrival = None
        else:
            stream.wait_event(found.arrival)
    if stream.cuda_stream not in found.readers:
        found.readers.add(stream.cuda_stream)
        found.table.record_stream(stream)


def _replenish() -> None:
    """Set pinned memory aside for the next capture, which may not allocate any itself."""
    global _reserve, _used
    if _reserve is None or _used > RESERVE // 2:
        _reserve, _used = torch.empty(RESERVE, dtype=torch.uint8, device="cpu", pin_memory=True), 0


def _captured(values: Iterable, dtype: torch.dtype, device: torch.device) -> Tensor:
    """A table that each replay copies anew. Not kept for other calls: outside the graph nothing writes it."""
    global _used
    host = _host(values, dtype)
    first, size = -(-_used // 16) * 16, host.numel() * host.element_size()
    if _reserve is None or first + size > RESERVE:
        raise RuntimeError(
            f"hetlora, triton rung: expected room for a table of {size} bytes in the {RESERVE} set aside before a capture, got "
            f"{0 if _reserve is None else max(0, RESERVE - first)}; call the op once before capturing it in a CUDA graph, and capture less in one"
        )
    pinned = _reserve[first : first + size].view(dtype)
    pinned.copy_(host)
    _used = first + size
    _of_graphs[id(_reserve)] = _reserve
    return torch.empty(host.shape, dtype=dtype, device=device).copy_(pinned, non_blocking=True)
