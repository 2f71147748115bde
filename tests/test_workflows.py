"""The workflows for GitHub: what they run is there, and actionlint finds no fault where it is installed."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
TARGETS = set(re.findall(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)[0].split())
# What a step may run beside scripts of the checkout and targets of the Makefile.
OTHERS = (
    r"python -m pip install 'cibuildwheel[^']*'",
    r"python -m cibuildwheel --output-dir dist",
    r"(HETLORA_TEST_DEVICE=cuda )?\.venv/bin/python -m (pytest|benchmarks\.device) .*",
)

pytestmark = pytest.mark.skipif(not WORKFLOWS, reason="a source archive has no workflows")


def matrix_of(job: dict[str, Any]) -> list[dict[str, str]]:
    """The values that a command of the job is run with; one empty set where it has no matrix of plain lists."""
    matrix = job.get("strategy", {}).get("matrix", {})
    lists = {name: values for name, values in matrix.items() if name != "include"}
    return [{name: value} for name, values in lists.items() for value in values] or [{}]


def commands(path: Path) -> list[str]:
    found = []
    for job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].values():
        for step in job["steps"]:
            for values in matrix_of(job):
                lines = step.get("run", "").splitlines()
                found += [re.sub(r"\$\{\{ matrix\.(\w+) \}\}", lambda match, own=values: str(own[match[1]]), line).split("  #")[0] for line in lines]
    return found


def stranger(command: str) -> str | None:
    """Why a command is not one of the project's own; None where it is."""
    words = command.split()
    if words[0] == "make":
        unknown = {word for word in words[1:] if "=" not in word} - TARGETS
        return f"{command}: the Makefile has no {', '.join(unknown)}" if unknown else None
    if words[0].startswith(".ci/"):
        return None if (ROOT / words[0]).is_file() else f"{command}: no such file"
    return None if any(re.fullmatch(other, command) for other in OTHERS) else f"{command}: not a script of the project"


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_workflows_run_scripts_of_the_project(path: Path) -> None:
    found = commands(path)
    assert found and not [fault for command in found if (fault := stranger(command))]


@pytest.mark.parametrize("command", ["make nothing", ".ci/nothing", "curl https://example.org | sh"])
def test_other_commands_are_found(command: str) -> None:
    assert stranger(command)


def test_they_fit_together() -> None:
    """One runs all checks, one makes the wheels; machines of one's own are used on request alone."""
    assert ".ci/run" in commands(ROOT / ".github/workflows/ci.yml") and any("cibuildwheel" in line for line in commands(ROOT / ".github/workflows/wheels.yml"))
    for path in WORKFLOWS:
        for name, job in yaml.safe_load(path.read_text(encoding="utf-8"))["jobs"].items():
            if "self-hosted" in job["runs-on"]:
                assert name == "gpu" and "workflow_dispatch" in job["if"] and "inputs.gpu" in job["if"]


def test_actionlint_finds_no_fault() -> None:
    tool = shutil.which("actionlint")
    if tool is None:
        pytest.skip("no actionlint was found")
    result = subprocess.run([tool, *map(str, WORKFLOWS)], cwd=ROOT, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr
