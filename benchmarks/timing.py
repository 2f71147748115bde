"""Interleaved timing: every callable once a round, so that a disturbance of the machine meets them all and their ratios hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

SLOW_SECONDS = 1.0  # what takes longer than this is timed in three rounds only
ENDLESS_SECONDS = 8.0  # and what takes longer than this in one


@dataclass(frozen=True)
class Timing:
    median: float
    p20: float
    p80: float
    rounds: int
    ratio: float  # median over the rounds of (own time / the yardstick's time in that round)


def _quantile(values: list[float], q: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


def _once(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def interleaved(runs: Mapping[str, Callable[[], object]], yardstick: str, device: torch.device, seconds: float, most_rounds: int = 30) -> dict[str, Timing]:
    """Time `runs` in rounds for about `seconds`, after one round that is not counted; at least three rounds
    of what takes less than ENDLESS_SECONDS."""
    warm = {name: _once(run, device) for name, run in runs.items()}
    rounds = max(3, min(most_rounds, int(seconds / max(sum(warm.values()), 1e-9))))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds):
        for name, run in runs.items():
            if turn < (1 if warm[name] > ENDLESS_SECONDS else 3) or warm[name] < SLOW_SECONDS:
                times[name].append(_once(run, device))
    timings = {}
    for name, own in times.items():
        ratio = statistics.median(t / b for t, b in zip(own, times[yardstick], strict=False))  # a slow one has fewer rounds
        timings[name] = Timing(statistics.median(own), _quantile(own, 0.2), _quantile(own, 0.8), len(own), ratio)
    return timings


def _resident(field: str) -> int | None:
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))
    except (OSError, StopIteration):
        return None


def peak_extra_bytes(run: Callable[[], object], device: torch.device) -> int | None:
    """How far memory rises above what is held before the call; None where the system does not say."""
    if device.type == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated(device) - before
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak of the resident set
    except OSError:
        return None
    start = _resident("VmRSS")
    run()
    peak = _resident("VmHWM")
    return None if start is None or peak is None else max(0, peak - start)
