"""Clocks, power and heat of a GPU beside the figures, as a stand-in for its driver tells them."""

from __future__ import annotations

import importlib.util
import sys
import types

import torch

from hetlora_kernels.benchmarks import clocks, kit, saved

CPU = torch.device("cpu")
TINY = ["--tiny", "--device", "cpu", "--threads", "1"]


class Nvml(types.ModuleType):
    """A stand-in for nvidia-ml-py on a device that tells everything, or, as a Jetson, its clock alone."""

    NVML_CLOCK_SM, NVML_CLOCK_MEM, NVML_TEMPERATURE_GPU = 1, 2, 0

    class NVMLError(Exception): ...

    def __init__(self, tells: bool = True, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.tells, self.driver, self.asked = tells, driver, []

    def _told(self, value):
        if not self.tells:
            raise self.NVMLError("Not Supported")
        return value

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("Driver Not Loaded")

    def nvmlDeviceGetHandleByUUID(self, uuid):
        self.asked.append(uuid)
        return "handle"

    def nvmlDeviceGetClockInfo(self, handle, which):
        return 1980 if which == self.NVML_CLOCK_SM else self._told(2619)

    def nvmlDeviceGetPowerUsage(self, handle):
        return self._told(350_400)

    def nvmlDeviceGetTemperature(self, handle, which):
        return self._told(61)

    def nvmlDeviceGetCurrentClocksThrottleReasons(self, handle):
        return self._told(0x4 | 0x20 | 0x40)


def test_clocks_are_what_the_driver_tells(monkeypatch):
    cuda = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2-3"))
    real = importlib.util.find_spec
    for module, reading, text in (
        (
            Nvml(),
            {"sm_mhz": 1980, "memory_mhz": 2619, "watts": 350.4, "celsius": 61, "held_back": "power, heat"},
            "1980 MHz, memory 2619 MHz, 350 W, 61 C, held back by power, heat",
        ),
        (Nvml(tells=False), {"sm_mhz": 1980}, "1980 MHz"),
    ):
        monkeypatch.setitem(sys.modules, "pynvml", module)
        monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object() if name == "pynvml" else real(name, *rest))
        read, how = clocks.reader(cuda)
        assert read() == reading and how == f"by NVML after each case: {text}" and module.asked == ["GPU-1-2-3"]
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(driver=False))
    assert clocks.reader(cuda) == (None, "not read: NVML says Driver Not Loaded")
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "pynvml" else real(name, *rest))
    assert clocks.reader(cuda) == (None, "not read: nvidia-ml-py is not installed (pip install nvidia-ml-py)")
    assert clocks.reader(CPU) == (None, ""), "a processor's clocks are not read"


def test_each_case_has_the_clocks_after_it(tmp_path, monkeypatch, capsys):
    turns = iter(range(1, 100))
    monkeypatch.setattr(clocks, "reader", lambda device: (lambda: {"sm_mhz": 1000 + next(turns)}, "by a stand-in"))
    file = tmp_path / "a.json"
    assert kit.main([*TINY, "--suite", "server", "--only", "gram", "--json", str(file)]) == 0
    data, out = saved.read(file), capsys.readouterr().out
    cases = {}
    for r in data["results"]:
        cases.setdefault((r["op"], r["shape"], r["dtype"]), set()).add(r["clocks"]["sm_mhz"])
    assert all(len(one) == 1 for one in cases.values()) and len(set.union(*cases.values())) == len(cases)
    assert data["clocks"] == "by a stand-in" and "clocks    by a stand-in\n" in out and f"  {1000 + len(cases)} MHz\n" in out
