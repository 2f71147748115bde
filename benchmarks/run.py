"""`python -m benchmarks.run --suite server --json FILE`: measure a suite and write its figures with device, versions and command."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.metadata
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

import hetlora_kernels as hk
from hetlora_kernels import _library, _native

from . import ceilings, lora, losses, peft_suite, rounds, saved, server
from .timing import How

SUITES: dict[str, Any] = {"ceilings": ceilings, "server": server, "lora": lora, "loss": losses, "peft": peft_suite, "round": rounds}
Record = dict[str, Any]
Refuse = Callable[[str, str, Exception], None]  # suite, the last case that was measured, what was raised
LINE = "{op:32s} {shape:34.34s} K={clients:<5d}{dtype:9s} t={threads} {provider:26s} {median_s:10.5f} s {gb_per_s:7.1f} GB/s {ratio:6.2f} x {yardstick}"


def device_facts(device: torch.device) -> dict[str, Any]:
    facts: dict[str, Any] = {"type": device.type, "cpu": cpu_name(), "cores": os.cpu_count(), "system": platform.platform(terse=True), **board_facts()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        facts |= {"gpu": properties.name, "capability": f"{properties.major}.{properties.minor}", "memory_gb": round(properties.total_memory / 1e9, 1)}
    return facts


def board_facts(root: Path = Path("/")) -> dict[str, str]:
    """Of a Jetson: the board, its release and its power mode, on which all figures depend; nothing elsewhere."""
    release = root / "etc" / "nv_tegra_release"
    if not release.is_file():
        return {}
    facts = {"release": release.read_text(encoding="utf-8", errors="replace").split("\n")[0].strip("# ")}
    with contextlib.suppress(OSError):
        facts["board"] = (root / "proc" / "device-tree" / "model").read_text(encoding="utf-8", errors="replace").strip("\0\n ")
    facts["power_mode"] = "not said"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(["nvpmodel", "-q"], capture_output=True, text=True, timeout=10, check=False)
        if done.returncode == 0:
            facts["power_mode"] = " ".join(done.stdout.split())
    return facts


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    found = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    name = found.get("model name", platform.machine())
    family = f" (family {found['cpu family']}, model {found['model']})" if "cpu family" in found else ""
    vectors = "AVX-512" if "avx512f" in found.get("flags", "").split() else "AVX2" if "avx2" in found.get("flags", "").split() else ""
    return " ".join(part for part in (name + family, vectors) if part)


def versions() -> dict[str, str]:
    names = ("torch", "triton", "numpy", "peft", "transformers", "flwr", "ray")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=__doc__)
    parser.add_argument("--suite", choices=SUITES, required=True)
    parser.add_argument("--json", type=Path, help="where to write; default: only print")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda; default: cuda where there is one")
    parser.add_argument("--threads", type=int, nargs="*", help="thread counts; default: 1 and all cores on a CPU")
    parser.add_argument("--seconds", type=float, default=4.0, help="time for each case and thread count")
    limit = "begin no case that would end later, were it the longest so far, and say what is left out; default: 7.5 for lora on cuda, else no limit"
    parser.add_argument("--minutes", type=float, help=limit)
    parser.add_argument("--memory-gb", type=float, default=8.0, help="what a case may hold; uploads that need more are streamed")
    parser.add_argument("--only", nargs="*", help="only cases with these names of operation, shape or type; of each kind one")
    parser.add_argument("--rungs", nargs="+", choices=_library.RUNGS, help="of this project, in server and lora; default: that in use, in lora all")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that it runs")
    parser.set_defaults(how=How())
    parser.add_argument("--short", action="store_true", help="the few shapes of `hetlora bench --quick`")
    return parser.parse_args(argv)


def opening(suite: str, command: str, device: torch.device) -> dict[str, Any]:
    """What a file of figures says of its run, before there are any."""
    return {
        "date": f"measured {datetime.date.today()}",
        "suite": suite,
        "command": command,
        "device": device_facts(device),
        "versions": versions(),
        "build": _native.build_info(),
        "backends": {op: rung for op, (rung, _) in hk.backends(device.type).items()},
        "load_average": {"before": os.getloadavg()[0]},
        "left_out": None,
        "results": [],
    }


def measured(suite: str, options: Any, device: torch.device, counts: list[int], minutes: float, refuse: Refuse | None = None) -> Iterator[Record | str]:
    """The figures of every case of a suite, each case checked and then timed with every count of threads; at the end, in words, what the limit leaves out.

    refuse: told of the error of a case that cannot be measured, in place of its figures; None: the error ends the run.
    """
    start, longest, last, done = time.monotonic(), 0.0, "none", 0
    end = start + 60 * minutes
    options.how = dataclasses.replace(options.how, end=end)
    for case in SUITES[suite].cases(options, device):
        begin = time.monotonic()
        if begin >= end or begin + longest > end:
            left = len(SUITES[suite].wanted(options, device)) - done
            what = f"all of its {left} cases" if done == 0 else f"{left} case{'s' * (left > 1)}, those after: {last}"
            yield f"for the limit of {60 * max(0.0, minutes):.0f} s, {what}"
            return
        done += 1
        for threads in counts:
            try:
                records = SUITES[suite].measure(case, options, device, threads)
            except Exception as error:
                if refuse is None:
                    raise
                refuse(suite, last, error)
                records = []
            for record in records:
                last = "{op}, {shape}, {dtype}".format(**record)
                yield record
        longest = max(longest, time.monotonic() - begin)


def main(argv: list[str] | None = None) -> int:
    options = arguments(argv)
    device = torch.device(options.device)
    counts = options.threads or ([1] if device.type == "cuda" else sorted({1, os.cpu_count() or 1}))
    result = opening(options.suite, "python -m benchmarks.run " + shlex.join(argv if argv is not None else sys.argv[1:]), device)
    minutes = options.minutes
    if minutes is None:
        minutes = 7.5 if (options.suite, device.type) == ("lora", "cuda") else float("inf")
    for record in measured(options.suite, options, device, counts, minutes):
        if isinstance(record, str):
            result["left_out"] = record
            print(f"left out {record}", file=sys.stderr)
        else:
            result["results"].append(record)
            modelled = record.get("modelled_s")
            print(LINE.format(**record) + (f" (modelled {modelled:.6f} s)" if modelled else ""), flush=True)
        write(result, options.json)
    return 0


def write(result: dict[str, Any], path: Path | None) -> None:
    """After every figure, so that a run that is stopped leaves what it measured."""
    result["load_average"]["after"] = os.getloadavg()[0]
    if path:
        saved.write(result, path)


if __name__ == "__main__":
    sys.exit(main())
