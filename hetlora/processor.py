"""How many threads a command computes with, and how they wait: decided before torch is imported, which reads it once. No torch here.

OpenMP's threads wait for each other by spinning. Where another process wants the same cores they spin while it computes, and a step takes many times as long
as its work. So threads sleep where others use the cores, and spin briefly where they are free. Neither changes a bit of the results.
The number of threads does.
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

from hetlora.errors import ConfigError
from hetlora.processes import place

_BRIEFLY = "1000"  # turns of libgomp's loop, some microseconds; its own default is 300,000, or for ever
_SAMPLE = 0.1  # seconds
_SHARED = 0.25  # cores that others use, from which on the machine counts as shared

# The user's own choice of how threads wait, by the libraries' names.
_WAITING = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")


_GROUPS = Path("/sys/fs/cgroup")
_OWN_GROUPS = Path("/proc/self/cgroup")


def _limit(group: Path) -> float | None:
    """Cores that this group of processes may use; None where it has no limit of its own."""
    try:
        allowed, period = (group / "cpu.max").read_text(encoding="ascii").split()
    except (OSError, ValueError):
        try:
            allowed, period = ((group / f"cpu.cfs_{name}_us").read_text(encoding="ascii").strip() for name in ("quota", "period"))
        except OSError:
            return None
    return None if allowed == "max" or int(allowed) <= 0 else int(allowed) / int(period)


def _quota() -> float | None:
    """Cores that this process may use by quotas of CPU time, the least of all groups that it is in; None where there is no limit.

    A container sees its own group as the root of all. A service or a batch job (systemd, Slurm) on the machine itself is in a group further down.
    """
    try:
        lines = _OWN_GROUPS.read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    groups = {_GROUPS, _GROUPS / "cpu"}
    for _, controllers, path in (line.split(":", 2) for line in lines if line.count(":") >= 2):
        if controllers and "cpu" not in controllers.split(","):
            continue
        inside = Path(path.lstrip("/"))
        for root in (_GROUPS / controllers, _GROUPS / "cpu") if controllers else (_GROUPS, _GROUPS / "unified"):
            groups.update(root / part for part in (inside, *inside.parents))
    return min((limit for limit in map(_limit, groups) if limit is not None), default=None)


def cores() -> int:
    """Cores this process may use: those it is bound to, and no more than the quota of CPU time of its container, service or batch job."""
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    quota = _quota()
    return bound if quota is None else max(1, min(bound, int(quota + 0.5)))


def _busy_seconds() -> float | None:
    """CPU seconds of all processes since the machine started; None where the system does not tell."""
    try:
        fields = Path("/proc/stat").read_text(encoding="ascii").split("\n", 1)[0].split()[1:]
    except OSError:
        return None
    user, nice, system, _idle, _wait, irq, softirq = (int(field) for field in fields[:7])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def used_by_others(seconds: float = _SAMPLE) -> float | None:
    """Cores that other processes use just now; None where the system does not tell."""
    before, start = _busy_seconds(), time.monotonic()
    if before is None:
        return None
    time.sleep(seconds)
    after = _busy_seconds()
    return None if after is None else max(0.0, after - before) / (time.monotonic() - start)


def prepare(threads: int | None = None) -> str:
    """Choose threads and their waiting for this process, and say what was chosen.

    threads: of the computation; None: OMP_NUM_THREADS where it is set, else this process's share of `cores()`; among several processes of torchrun, which
    sets OMP_NUM_THREADS to 1 by itself, a 1 counts as not set. Raises `ConfigError` where it is not positive.
    Sets OMP_NUM_THREADS, and OMP_WAIT_POLICY or GOMP_SPINCOUNT unless one of those is set already. Once torch is imported only the number can change.
    """
    if threads is not None and not 1 <= threads <= 1024:
        raise ConfigError(f"--threads: expected a number from 1 to 1024, got {threads}")
    available, here = cores(), place().count_here
    given = os.environ.get("OMP_NUM_THREADS", "").strip()
    if here > 1 and given == "1":
        given = ""  # torchrun sets it where the user has not
    if threads is None and given:
        count, origin = given, "OMP_NUM_THREADS"
    else:
        shared = f", for {here} processes" if here > 1 else ""
        count, origin = str(threads or max(1, available // here)), "--threads" if threads else f"cores here: {available}{shared}"
    chosen = f"threads: {count} ({origin})"
    if "torch" in sys.modules:
        if threads is not None:
            sys.modules["torch"].set_num_threads(threads)
        return f"{chosen}; torch was imported before, so their waiting stays as it was"
    os.environ["OMP_NUM_THREADS"] = count
    own = next((name for name in _WAITING if os.environ.get(name)), None)
    if own is not None:
        return f"{chosen}; they wait as {own}={os.environ[own]} says"
    others = used_by_others()
    if others is not None and others >= _SHARED:
        os.environ["OMP_WAIT_POLICY"] = "passive"
        return f"{chosen}; they sleep while they wait, as other processes use {others:.1f} cores"
    os.environ["GOMP_SPINCOUNT"] = _BRIEFLY
    return f"{chosen}; they spin briefly while they wait, then sleep"
