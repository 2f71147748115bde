"""examples/notebook.ipynb, run end to end by nbclient in a kernel of its own."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_the_notebook_runs_end_to_end(tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="needs nbclient, of the extra 'test'")
    nbformat = pytest.importorskip("nbformat", reason="needs nbformat, which nbclient brings")
    pytest.importorskip("ipykernel", reason="needs ipykernel, of the extra 'test'")
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))))
    notebook = nbformat.read(ROOT / "examples" / "notebook.ipynb", as_version=4)
    nbclient.NotebookClient(notebook, timeout=None, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}).execute()
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = ["".join(str(output.get("text", "")) + str(output.get("data", "")) for output in cell.outputs) for cell in cells]
    assert "<table>" in shown[1] and "hetlora.Config" in shown[1], "a config is a table"
    assert "round 3/3" in shown[2] and "<table>" in shown[2], "progress, and the result as a table"
    assert (tmp_path / "notebook-run" / "report.html").is_file()
