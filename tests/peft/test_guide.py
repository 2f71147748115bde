"""The examples of docs/peft.md run as they are printed, and say what they should."""

from __future__ import annotations

import os
import re
from pathlib import Path

import forked
import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "peft.md").read_text(encoding="utf-8"), re.DOTALL)


def run_example(code, folder):
    environment = dict(os.environ, PYTHONPATH=str(ROOT))
    result = forked.python(code, folder, environment)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_there_are_three():
    assert len(EXAMPLES) == 3


def test_fuse_an_existing_script(tmp_path):
    out = run_example(EXAMPLES[0], tmp_path)
    first, last = map(float, re.search(r"loss (\S+) -> (\S+)", out).groups())
    assert out.startswith("fused 4 of 4 LoRA layers\n  fused, lora_linear: 4") and last < first - 0.1
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").is_file()


def test_train_eight_clients_in_one_batch(tmp_path):
    losses = [float(value) for value in run_example(EXAMPLES[1], tmp_path).split(":")[1].split()]
    assert len(losses) == 5 and losses[-1] < losses[0] - 0.1


def test_export_one_client(tmp_path):
    out = run_example(EXAMPLES[2], tmp_path)
    assert float(out.split(":")[1]) == pytest.approx(0, abs=1e-5) and (tmp_path / "client1" / "adapter_config.json").is_file()
