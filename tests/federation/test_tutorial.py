"""docs/tutorial.md as its own script: every command and the Python at its end, in an empty folder."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the page's commands are those of a POSIX shell")
def test_every_command_of_the_tutorial_works(tmp_path):
    blocks = re.findall(r"```(bash|python)\n(.*?)```", (ROOT / "docs" / "tutorial.md").read_text(encoding="utf-8"), re.DOTALL)
    assert [kind for kind, _ in blocks] == ["bash", "bash", "bash", "bash", "python"]
    commands = tmp_path / "bin"
    commands.mkdir()
    for name, arguments in (("hetlora", "-m hetlora"), ("python", "")):
        (commands / name).write_text(f'#!/bin/sh\nexec "{sys.executable}" {arguments} "$@"\n', encoding="utf-8")
        (commands / name).chmod(0o755)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    environment = {**os.environ, "PATH": f"{commands}{os.pathsep}{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    for kind, text in blocks:
        command = ["bash", "-ec", text] if kind == "bash" else [sys.executable, "-c", text]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, f"{text}\n{done.stderr}"
    assert done.stdout.startswith("On day 3 Alice") and len(done.stdout) > len("On day 3 Alice\n")
    assert "fell from" in (tmp_path / "runs" / "mine" / "report.html").read_text(encoding="utf-8")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").is_file()
