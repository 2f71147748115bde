"""`hetlora tune`: what it writes, where, who reads it, and what it says without a device."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


def work(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(HERE.parents[1]), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.run([sys.executable, *command], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("command", [("-m", "hetlora_kernels.triton.tune"), ("-m", "hetlora", "tune")])
def test_without_a_device_it_says_so_in_one_line(command: tuple[str, ...]) -> None:
    done = work(*command, CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "hetlora: error: tune: expected a CUDA device to measure on, found none; the untuned defaults stay in use\n"


def test_the_fastest_right_candidate_is_chosen() -> None:
    """Every step on a tiny shape, with a clock that prefers few warps."""
    done = work(str(HERE / "tune_worker.py"), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(done.stdout)
    kernels = {f"{kernel}{suffix}" for kernel in ("shrink", "expand", "grouped_gram") for suffix in ("", "_float32")} | {"fused"}
    assert set(content["kernels"]) == kernels and all(setting["num_warps"] == 4 for setting in content["kernels"].values())
    assert {(entry["dtype"], entry["way"]) for entry in content["layer"]["measured"]} == {(t, "base_first") for t in ("bfloat16", "float16", "float32")}
    assert not [line for line in content["said"] if "left out" in line]


def test_a_wrong_candidate_is_never_chosen() -> None:
    content = json.loads(work(str(HERE / "tune_worker.py"), "--break", TRITON_INTERPRET="1").stdout)
    assert content["error"] == "shrink: no candidate gave a right result on cpu"
    assert len(content["said"]) == 3 and all("wrong result, left out" in line for line in content["said"])


def test_the_way_of_the_nearest_measured_shape() -> None:
    from hetlora_kernels.triton.lora import nearest

    measured = [
        {"dtype": "bfloat16", "rows": 512, "depth": 4096, "width": 4096, "way": "fused"},
        {"dtype": "bfloat16", "rows": 8192, "depth": 1536, "width": 1536, "way": "base_first"},
    ]
    table = {"default": "lora_first", "measured": measured}
    assert nearest(table, "bfloat16", 700, 4096, 2048) == "fused"
    assert nearest(table, "bfloat16", 100_000, 1536, 576) == "base_first"
    assert nearest(table, "float32", 512, 4096, 4096) == nearest({**table, "measured": []}, "bfloat16", 1, 1, 1) == "lora_first"


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[torch.device]:
    """A CUDA device as far as its name goes, and an empty folder of the user's."""
    from hetlora_kernels.triton import _common

    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA Test GPU-7")
    _common._named_params.cache_clear()
    yield torch.device("cuda", 0)
    _common._named_params.cache_clear()


def test_untuned_defaults_are_said_to_be_so(device: torch.device) -> None:
    from hetlora_kernels.triton._common import device_params

    with pytest.warns(RuntimeWarning, match="no measured Triton launch parameters for NVIDIA Test GPU-7"):
        tables = device_params(device)
    assert tables["layer"] == {"rule": "untuned", "default": "lora_first", "measured": []}


def test_measured_parameters_are_read_over_the_defaults(device: torch.device, recwarn: pytest.WarningsRecorder) -> None:
    from hetlora_kernels.triton._common import device_params, params, user_params
    from hetlora_kernels.triton.tune import target_file

    own = user_params() / "nvidia_test_gpu_7.json"
    assert target_file("NVIDIA Test GPU-7").parent.name == "params"  # this checkout can be written
    own.parent.mkdir(parents=True)
    setting = {"ROWS": 16, "DEPTH": 32, "num_warps": 2, "num_stages": 5}
    own.write_text(json.dumps({"tuned": True, "kernels": {"shrink": setting}, "layer": {"rule": "measured", "default": "fused", "measured": []}}))
    assert params("shrink", device) == setting and device_params(device)["layer"]["default"] == "fused"
    assert params("truncate", device)["BLOCK"] and not recwarn.list
    assert target_file("NVIDIA Test GPU-7") == own


def test_a_folder_that_cannot_be_written_leaves_the_users(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from hetlora_kernels.triton import tune
    from hetlora_kernels.triton._common import user_params

    monkeypatch.setattr(tune.os, "access", lambda *_: False)
    assert tune.target_file("NVIDIA Test GPU-7") == user_params() / "nvidia_test_gpu_7.json"
