"""Clocks, power and heat beside the figures, as the platform tells them: an NVIDIA GPU's driver (NVML) and, on a Jetson, `tegrastats`.

A figure is that of its clocks. Nothing here ends a benchmark: what is not told is not said.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import select
import shutil
import subprocess
import time
from collections.abc import Callable
from typing import Any

import torch

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons that make a figure that of a slower device.
HELD_BACK = {0x4: "power", 0x8: "hardware", 0x20: "heat", 0x40: "heat", 0x80: "power"}
TEGRASTATS = ("tegrastats", "--interval", "100")  # ms until its first line
TEGRASTATS_SECONDS = 3.0  # and after these it is not waited for
WHOLE_MODULE = ("VIN", "VDD_IN", "POM_5V_IN")  # rails that feed all others: Thor, Orin Nano and NX, Nano. An AGX Orin has none

Reading = dict[str, Any]


def reader(device: torch.device) -> tuple[Callable[[], Reading] | None, str]:
    """(what reads the device now, how in words); None where nothing does, with the reason. The clocks of a CPU are read on a Jetson alone."""
    of_driver, why = nvml(device) if device.type == "cuda" else (None, "")
    of_board = shutil.which(TEGRASTATS[0]) is not None
    if of_driver is None and not of_board:
        return None, why

    def read() -> Reading:
        told = tegrastats() if of_board else {}
        if device.type != "cuda":
            told.pop("sm_mhz", None)  # of a GPU that has nothing to do
        return told | (of_driver() if of_driver else {})

    sources = ["NVML"] * (of_driver is not None) + ["tegrastats"] * of_board
    return read, f"by {' and '.join(sources)} after each case: {line(read()) or 'this device tells nothing'}" + (f" ({why})" if why else "")


def nvml(device: torch.device) -> tuple[Callable[[], Reading] | None, str]:
    """What asks the GPU's driver; None where it cannot be asked, with the reason."""
    if importlib.util.find_spec("pynvml") is None:
        return None, "not read: nvidia-ml-py is not installed (pip install nvidia-ml-py)"
    import pynvml

    try:
        pynvml.nvmlInit()
        # By its own number: CUDA_VISIBLE_DEVICES numbers devices anew, NVML does not.
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError as error:
        return None, f"not read: NVML says {error}"
    calls = {
        "sm_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_SM),
        "memory_mhz": lambda: pynvml.nvmlDeviceGetClockInfo(handle, pynvml.NVML_CLOCK_MEM),
        "watts": lambda: pynvml.nvmlDeviceGetPowerUsage(handle) / 1000,
        "celsius": lambda: pynvml.nvmlDeviceGetTemperature(handle, pynvml.NVML_TEMPERATURE_GPU),
        "held_back": lambda: held_back(pynvml.nvmlDeviceGetCurrentClocksThrottleReasons(handle)),
    }

    def read() -> Reading:
        found = {}
        for name, call in calls.items():
            with contextlib.suppress(pynvml.NVMLError):  # a Jetson tells some of them
                found[name] = call()
        return found

    return read, ""


def held_back(bits: int) -> str:
    return ", ".join(dict.fromkeys(reason for bit, reason in HELD_BACK.items() if bits & bit))


def tegrastats() -> Reading:
    """What the first line of `tegrastats` tells; {} where it gives none in time. It goes on for ever and is ended here."""
    try:
        process = subprocess.Popen(TEGRASTATS, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    except OSError:
        return {}
    assert process.stdout is not None
    said, end = b"", time.monotonic() + TEGRASTATS_SECONDS
    try:
        while b"\n" not in said and (left := end - time.monotonic()) > 0 and select.select([process.stdout], [], [], left)[0]:
            more = os.read(process.stdout.fileno(), 65536)
            if not more:
                break
            said += more
    finally:
        process.kill()
        process.stdout.close()
        process.wait()
    return of_line(said.split(b"\n")[0].decode("utf-8", "replace"))


def of_line(text: str) -> Reading:
    """A line of `tegrastats`, whose fields differ by board and release. Of several clocks the highest, of now, mean and peak what is now.

    `watts` is of the rail that feeds the whole module. Where a board has none, `rails_mw` has what each part takes and nothing adds them up.
    """
    found: Reading = {}
    clocks = {"sm_mhz": r"\bGR3D_FREQ\s+[\d%]*@(\[[^\]]*\]|\d+)", "memory_mhz": r"\bEMC_FREQ\s+[\d%]*@(\d+)", "cpu_mhz": r"\bCPU\s+(\[[^\]]*\](?:@\d+)?)"}
    for name, pattern in clocks.items():
        if match := re.search(pattern, text):
            numbers = re.findall(r"@(\d+)" if name == "cpu_mhz" else r"\b(\d+)\b", match[1])
            if highest := max(map(int, numbers), default=0):
                found[name] = highest
    for sensor in ("gpu", "tj", "cpu"):  # the GPU's, else that of the hottest spot
        if (match := re.search(rf"\b{sensor}@(\d+(?:\.\d+)?)C", text, re.IGNORECASE)) and "celsius" not in found:
            found["celsius"] = float(match[1])
    rails = {name: int(now) for name, now in re.findall(r"\b([A-Z][A-Z0-9_]*) (\d+)(?:mW)?/\d+(?:mW)?(?:/\d+mW)?(?=\s|$)", text)}
    if rails:
        found["rails_mw"] = rails
    if whole := next((rails[name] for name in WHOLE_MODULE if name in rails), 0):
        found["watts"] = whole / 1000
    return found


FORMS = {"sm_mhz": "{} MHz", "cpu_mhz": "CPU {} MHz", "memory_mhz": "memory {} MHz", "watts": "{:.0f} W", "celsius": "{:.0f} C", "held_back": "held back by {}"}


def line(reading: Reading) -> str:
    said = [form.format(reading[name]) for name, form in FORMS.items() if reading.get(name)]
    if "watts" not in reading:
        said += [f"{name} {milliwatts / 1000:.1f} W" for name, milliwatts in reading.get("rails_mw", {}).items()]
    return ", ".join(said)
