"""Clocks, power and heat of an NVIDIA GPU beside the figures, as its driver tells them (NVML); a figure is that of its clocks."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

# Bits of nvmlDeviceGetCurrentClocksThrottleReasons that make a figure that of a slower device.
HELD_BACK = {0x4: "power", 0x8: "hardware", 0x20: "heat", 0x40: "heat", 0x80: "power"}

Reading = dict[str, Any]


def reader(device: torch.device) -> tuple[Callable[[], Reading] | None, str]:
    """(what reads the device now, how in words); None where nothing does, with the reason. A CPU has neither: its clocks are not read."""
    if device.type != "cuda":
        return None, ""
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

    return read, f"by NVML after each case: {line(read()) or 'this device tells nothing'}"


def held_back(bits: int) -> str:
    return ", ".join(dict.fromkeys(reason for bit, reason in HELD_BACK.items() if bits & bit))


def line(reading: Reading) -> str:
    forms = {"sm_mhz": "{} MHz", "memory_mhz": "memory {} MHz", "watts": "{:.0f} W", "celsius": "{} C", "held_back": "held back by {}"}
    return ", ".join(form.format(reading[name]) for name, form in forms.items() if reading.get(name))
