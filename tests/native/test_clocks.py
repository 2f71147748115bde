"""Clocks, power and heat beside the figures, as stand-ins for a GPU's driver and for a Jetson's `tegrastats` tell them."""

from __future__ import annotations

import importlib.util
import sys
import types

import pytest
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


@pytest.fixture(autouse=True)
def no_tools(tmp_path, monkeypatch):
    """No program is found but those that a test puts there."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def put(folder, text):
    tool = folder / "tegrastats"
    tool.write_text(f"#!/bin/sh\n{text}\n")
    tool.chmod(0o755)


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


# As boards of three releases print it, in the form of NVIDIA's documentation.
ORIN_NX = (
    "RAM 3231/15236MB (lfb 6x4MB) SWAP 0/7618MB (cached 0MB) CPU [1%@729,0%@1984,off,off] EMC_FREQ 0%@3199 GR3D_FREQ 0%@[611,305] NVDEC off VIC off APE 174 "
    "cpu@46.7C soc2@42.9C gpu@44.5C tj@47.2C VDD_IN 5240mW/5001mW VDD_CPU_GPU_CV 774mW/774mW VDD_SOC 1452mW/1452mW"
)
AGX_ORIN = (
    "07-25-2026 09:08:28 RAM 20642/62817MB (lfb 1x2MB) CPU [23%@2201,10%@1190] EMC_FREQ 3%@3199 GR3D_FREQ 12%@[1300,1300] VIC off "
    "soc0@49.5C/49.5C tj@53C/53C VDD_GPU_SOC 5139mW/5139mW/5139mW VDD_CPU_CV 3268mW/3268mW/3268mW VIN_SYS_5V0 5500mW/5500mW/5500mW"
)
THOR = "RAM 8353/125749MB CPU [0%,5%,off]@2601 EMC_FREQ @4266 GR3D_FREQ @[off,1574,1574] tj@51C/51C gpu@56.9C/66.6C VDD_GPU 6330mW/1mW/2mW VIN 28906mW/3mW/4mW"
NANO = "RAM 1000/3964MB (lfb 1x4MB) CPU [1%@102] EMC_FREQ 0% GR3D_FREQ 0%@76 PLL@29C GPU@30.5C POM_5V_IN 1500/1600 POM_5V_GPU 0/0"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (ORIN_NX, {"sm_mhz": 611, "cpu_mhz": 1984, "memory_mhz": 3199, "celsius": 44.5, "watts": 5.24, "rails": 3}),
        (AGX_ORIN, {"sm_mhz": 1300, "cpu_mhz": 2201, "memory_mhz": 3199, "celsius": 53.0, "rails": 3}),
        (THOR, {"sm_mhz": 1574, "cpu_mhz": 2601, "memory_mhz": 4266, "celsius": 56.9, "watts": 28.906, "rails": 2}),
        (NANO, {"sm_mhz": 76, "cpu_mhz": 102, "celsius": 30.5, "watts": 1.5, "rails": 2}),
        ("GR3D_FREQ @[N/A,off] EMC_FREQ 101% CPU [off] VDD_IN mW/ VIN 1W", {}),
        ("\ufffd[[[@@@ %%", {}),
        ("", {}),
    ],
)
def test_a_line_of_tegrastats_tells_what_its_board_has(text, told):
    found = clocks.of_line(text)
    rails = found.pop("rails_mw", {})
    assert found | ({"rails": len(rails)} if rails else {}) == told


def test_a_board_is_read_without_a_driver_that_tells(no_tools, monkeypatch):
    put(no_tools, f"echo '{AGX_ORIN}'; while :; do echo later; done")  # it goes on for ever
    read, how = clocks.reader(CPU)
    assert read() == {
        "cpu_mhz": 2201,
        "memory_mhz": 3199,
        "celsius": 53.0,
        "rails_mw": {"VDD_GPU_SOC": 5139, "VDD_CPU_CV": 3268, "VIN_SYS_5V0": 5500},
    }, "and of the GPU, which has nothing to do, no clock"
    assert how == "by tegrastats after each case: CPU 2201 MHz, memory 3199 MHz, 53 C, VDD_GPU_SOC 5.1 W, VDD_CPU_CV 3.3 W, VIN_SYS_5V0 5.5 W"
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="1-2-3"))
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: object() if name == "pynvml" else real(name, *rest))
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(tells=False))
    read, how = clocks.reader(torch.device("cuda"))
    assert how.startswith("by NVML and tegrastats after each case: 1980 MHz, CPU 2201 MHz") and read()["sm_mhz"] == 1980 and read()["celsius"] == 53.0
    monkeypatch.setitem(sys.modules, "pynvml", Nvml(driver=False))
    read, how = clocks.reader(torch.device("cuda"))
    assert how.endswith("(not read: NVML says Driver Not Loaded)") and read()["sm_mhz"] == 1300


@pytest.mark.parametrize("text", ["exit 1", "printf 'no end of line'", "printf '\\377\\376\\n'", "exec /bin/sleep 1000", "echo"])
def test_tegrastats_that_fails_or_says_nothing_ends_no_benchmark(no_tools, monkeypatch, text):
    monkeypatch.setattr(clocks, "TEGRASTATS_SECONDS", 0.3)
    put(no_tools, text)
    read, how = clocks.reader(CPU)
    assert read() == {} and how == "by tegrastats after each case: this device tells nothing"
    (no_tools / "tegrastats").write_bytes(b"\x7fELF broken")
    assert read() == {}
    (no_tools / "tegrastats").unlink()
    assert read() == {}
