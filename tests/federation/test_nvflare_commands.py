"""`hetlora nvflare new`, and what is said where NVFLARE is missing: neither needs it."""

from __future__ import annotations

import ast
import importlib.util

import pytest
from click.testing import CliRunner

import hetlora.nvflare
from hetlora.cli import cli
from hetlora.deployed.settings import client_settings, server_settings


def test_without_nvflare_the_error_says_what_to_install(monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "nvflare" else find(name, *rest))
    monkeypatch.delitem(vars(hetlora.nvflare), "HetLora", raising=False)
    with pytest.raises(ImportError, match=r"hetlora.nvflare needs NVFLARE; install it with: pip install '.\[nvflare\]'"):
        _ = hetlora.nvflare.HetLora
    with pytest.raises(AttributeError, match="has no attribute 'Hetlora'"):
        _ = hetlora.nvflare.Hetlora


def test_a_new_job_holds_settings_that_server_and_sites_take(tmp_path):
    done = CliRunner().invoke(cli, ["nvflare", "new", str(tmp_path / "My Job")], standalone_mode=False)
    assert done.output.splitlines() == [f"written: {tmp_path / 'My Job' / name}" for name in ("job.py", "client.py", "README.md")]
    tree = ast.parse((tmp_path / "My Job" / "job.py").read_text())
    values = {node.targets[0].id: ast.literal_eval(node.value) for node in tree.body if isinstance(node, ast.Assign)}  # type: ignore[attr-defined]
    cfg, waiting = server_settings(values["SETTINGS"])
    cfg.check()
    assert (cfg.ranks, waiting.min_clients, len(values["SITES"])) == ("2,4,8", 3, 3)
    for place, (site, setting) in enumerate(values["SITES"].items()):
        assert setting == f"partition-id={place}"
        assert client_settings(values["SETTINGS"], {"client": site, "partition-id": place})[1].client == site
    assert 'FedJob(name="my-job"' in ast.unparse(tree).replace("'", '"')
    again = CliRunner().invoke(cli, ["nvflare", "new", str(tmp_path / "My Job")])
    assert again.exit_code == 2 and "exists and is not empty; choose a new folder" in again.output
