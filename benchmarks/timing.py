"""Interleaved timing: every callable once a round, to and fro, so that a disturbance of the machine meets them all and their ratios hold."""

from __future__ import annotations

import ctypes
import gc
import statistics
import sys
import time
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

SLOW_SECONDS = 1.0  # what takes longer than this is timed in the least number of rounds only
SHORT_SECONDS = 1e-3  # what takes less is called again and again until this has passed: a turn of it
ENDLESS_SECONDS = 8.0  # and what takes longer than this in one
FEWEST_ROUNDS = 3  # of what is still timed when the time for it is over
COLD_CALLS = 5  # of a turn, each after the caches were overwritten


@dataclass(frozen=True)
class How:
    """How calls are timed.   end: of `time.monotonic`; from then on no round begins but the first three.   cold: caches are overwritten before every call."""

    end: float = float("inf")
    cold: bool = False


@dataclass(frozen=True)
class Timing:
    times: list[float]  # seconds of one call in each round, by the clock of the host
    ratio: float  # over the yardstick
    device_times: list[float] = field(default_factory=list)  # the same between two events on a GPU; none on a CPU

    @property
    def rounds(self) -> int:
        return len(self.times)

    @property
    def median(self) -> float:
        return statistics.median(self.times)

    @property
    def p20(self) -> float:
        return self._quantile(0.2)

    @property
    def p80(self) -> float:
        return self._quantile(0.8)

    def _quantile(self, q: float) -> float:
        ordered = sorted(self.times)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]

    def figures(self, size: int, scale: float = 1.0) -> dict[str, Any]:
        """What a record says of it.   size: bytes of a call.   scale: of the times, where a call stands for more or less than one."""
        found = {"rounds": self.rounds, "median_s": self.median * scale, "p20_s": self.p20 * scale, "p80_s": self.p80 * scale}
        found |= {"gb_per_s": size / (self.median * scale) / 1e9, "ratio": self.ratio}
        return found | ({"device_s": statistics.median(self.device_times) * scale} if self.device_times else {})

    def over(self, other: Timing) -> float:
        """Median over the rounds of (own time / the other's in that round)."""
        return statistics.median(own / base for own, base in zip(self.times, other.times, strict=False))  # a slow one has fewer rounds


def cache_bytes(device: torch.device, root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Of all last-level caches of the device together; 64 MiB where the system does not say."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    caches: dict[tuple[int, str], int] = {}
    for index in root.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, cores, size = (((index / name).read_text(encoding="ascii").strip()) for name in ("level", "shared_cpu_list", "size"))
            caches[int(level), cores] = int(size[:-1]) * {"K": 1 << 10, "M": 1 << 20, "G": 1 << 30}[size[-1]]
        except (OSError, ValueError, KeyError, IndexError):
            continue
    last = max((level for level, _ in caches), default=0)
    return sum(size for (level, _), size in caches.items() if level == last) or 64 << 20


def overwriter(device: torch.device) -> Callable[[], object]:
    """Reads and writes twice as many bytes as the last-level caches hold, so that nothing else is left in them."""
    buffer = torch.zeros(2 * cache_bytes(device) // 4, device=device)
    return lambda: buffer.add_(1.0)


def _cold_turn(run: Callable[[], object], device: torch.device, calls: int, overwrite: Callable[[], object]) -> tuple[float, float | None]:
    """As `_turn`, with nothing of the calls in the caches: each is timed for itself."""
    turns = []
    for _ in range(calls):
        overwrite()
        turns.append(_turn(run, device))
    by_host, by_device = zip(*turns, strict=True)
    return sum(by_host) / calls, None if by_device[0] is None else sum(by_device) / calls


def _turn(run: Callable[[], object], device: torch.device, calls: int = 1) -> tuple[float, float | None]:
    """Seconds of one of so many calls, by the host's clock and, on a GPU, between an event before the first and one after the last."""
    if device.type != "cuda":
        start = time.perf_counter()
        for _ in range(calls):
            run()
        return (time.perf_counter() - start) / calls, None
    events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
    torch.cuda.synchronize()
    start = time.perf_counter()
    events[0].record()
    for _ in range(calls):
        run()
    events[1].record()
    torch.cuda.synchronize()
    return (time.perf_counter() - start) / calls, events[0].elapsed_time(events[1]) / 1e3 / calls


def interleaved(
    runs: Mapping[str, Callable[[], object]],
    yardstick: str,
    device: torch.device,
    seconds: float,
    most_rounds: int = 30,
    least_rounds: int = 3,
    aside: Collection[str] = (),
    known: Mapping[str, float] | None = None,
    how: How = How(),
) -> dict[str, Timing]:
    """Time `runs` in rounds for about `seconds`, after two calls of each that are not counted.

    At least `least_rounds`, and no more of what takes longer than SLOW_SECONDS; three of what is in `aside`, which does not count for the number of rounds;
    one of what takes longer than ENDLESS_SECONDS.
    known: seconds of a call that was made before, in place of the two; where it took longer than ENDLESS_SECONDS it is the only one.
    """
    if known is None:
        for run in runs.values():
            _turn(run, device)
    warm = known or {name: _turn(run, device)[0] for name, run in runs.items()}
    calls = {name: max(1, min(COLD_CALLS if how.cold else 1 << 30, int(SHORT_SECONDS / max(once, 1e-9)))) for name, once in warm.items()}
    overwrite = overwriter(device) if how.cold else None
    a_round = sum(warm[name] * calls[name] for name in runs if name not in aside)
    rounds = max(least_rounds, min(most_rounds, int(seconds / max(a_round, 1e-9))))
    long = {name for name in known or {} if warm[name] > ENDLESS_SECONDS}
    times: dict[str, list[float]] = {name: [warm[name]] if name in long else [] for name in runs}
    device_times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        if turn >= FEWEST_ROUNDS and time.monotonic() > how.end:
            break
        for name in list(runs) if turn % 2 == 0 else reversed(runs):
            most = 3 if name in aside else least_rounds if warm[name] > SLOW_SECONDS else rounds
            few = 0 if name in long else 1 if warm[name] > ENDLESS_SECONDS else most
            if turn < few:
                by_host, by_device = _cold_turn(runs[name], device, calls[name], overwrite) if overwrite else _turn(runs[name], device, calls[name])
                times[name].append(by_host)
                device_times[name] += [] if by_device is None else [by_device]
    base = Timing(times[yardstick], 1.0)
    return {name: Timing(own, Timing(own, 1.0).over(base), device_times[name]) for name, own in times.items()}


_malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None  # glibc's


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return None


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises above what is held before the call; None where the system does not say.

    `getrusage` is no way to it: a process starts with the peak of the one that started it.
    """
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    gc.collect()
    if _malloc_trim is not None:
        _malloc_trim(0)  # what earlier calls left with the allocator would be used again without a rise
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak of the resident set
    except OSError:
        return None
    start = _resident("VmRSS")
    run()
    peak = _resident("VmHWM")
    return None if start is None or peak is None else max(0, peak - start)


def peak_extra_mib(run: Callable[[], object]) -> float:
    """The same of this process on the CPU, in MiB; ends the program where the system does not say."""
    peak = peak_extra_bytes(run, torch.device("cpu"))
    if peak is None:
        raise SystemExit("this system does not say how much memory a process took; nothing is measured")
    return peak / 2**20
