"""One run in NVFLARE's own simulator, whose sites are processes and talk to its server over loopback: `make nvflare`.

Four sites of ranks 2, 4, 8 and 2, two rounds. The last one sends NaN in the first round and a wrong shape in the second.
"""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare", reason="NVFLARE is not installed (pip install '.[nvflare]'; make nvflare runs these tests)")

import json
import os
import subprocess
import sys
from pathlib import Path

from nvflare_sites import site_federation
from tiny import lines, tiny_config, tiny_model

from hetlora import server
from hetlora.loop import simulate

pytestmark = [pytest.mark.slow, pytest.mark.matrix]
SIZES = [3, 5, 2, 7]
TESTS = Path(__file__).parent

SCRIPT = f"""
import sys
sys.path.insert(0, {str(TESTS)!r})
import nvflare.client as flare
import torch
from nvflare_sites import site_clients
from tiny import tiny_model
from hetlora.nvflare import run_client

clients = {{client.name: client for client in site_clients({SIZES})}}
send, trained = flare.send, []

def spoiled(model):
    if flare.get_site_name() == "site-4" and flare.get_task_name() == "train":
        trained.append(1)
        rows = torch.from_numpy(model.params["rows"].copy())
        if len(trained) == 1:
            rows.view(torch.float32)[0] = float("nan")
        model.params["rows"] = rows.numpy() if len(trained) == 1 else rows.numpy()[:-4]
    send(model)

flare.send = spoiled
run_client(lambda cfg: tiny_model(), lambda cfg, node: clients[node.client])
"""

JOB = """
import json, sys
from nvflare.job_config.api import FedJob
from nvflare.job_config.script_runner import FrameworkType, ScriptRunner
from hetlora.nvflare import HetLora

if __name__ == "__main__":
    job = FedJob(name="tiny", min_clients=1)
    job.set_app_packages(["hetlora", "hetlora_kernels"])
    job.to_server(HetLora(json.loads(sys.argv[1])))
    for k in range(4):
        job.to(ScriptRunner("client.py", framework=FrameworkType.RAW), f"site-{k + 1}")
    job.simulator_run("workspace")
"""


def test_the_simulator_has_the_bits_of_one_client_after_another_and_names_who_is_refused(tmp_path, monkeypatch):
    cfg = tiny_config(tmp_path / "here", ranks="2,4,8,2", rounds=2, clients_per_round=4, cobatch=False)
    tiny_model().save_pretrained(tmp_path / "base")
    (tmp_path / "client.py").write_text(SCRIPT)
    (tmp_path / "job.py").write_text(JOB)
    settings = {**cfg.model_dump(), "model": str(tmp_path / "base"), "output": str(tmp_path / "there"), "min_clients": 4, "join_timeout": 300}
    done = subprocess.run(
        [sys.executable, "job.py", json.dumps(settings)],
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert (tmp_path / "there/summary.json").is_file(), done.stdout[-5000:] + done.stderr[-5000:]

    refused = server.refused
    monkeypatch.setattr(server, "refused", lambda bank: {**refused(bank), 3: "as in the other run"} if bank.num_clients == 4 else refused(bank))
    simulate(cfg, federation=site_federation(SIZES), quiet=True)
    ours, theirs = lines(tmp_path / "here"), lines(tmp_path / "there")
    reasons = [record.pop("dropped") for record in theirs]
    assert [[drop["name"] for drop in dropped] for dropped in reasons] == [[], ["site-4"], ["site-4"]]
    assert "update has non-finite values" in reasons[1][0]["reason"] and "upload: expected float32 [" in reasons[2][0]["reason"]
    assert [[drop["name"] for drop in record.pop("dropped")] for record in ours] == [[], ["site-4"], ["site-4"]]
    for mine, other in zip(ours, theirs, strict=True):
        one, two = (record.pop("evaluation")["client_text"] for record in (mine, other))
        assert mine == other
        assert (one["tokens"], one["loss"]) == (two["tokens"], pytest.approx(two["loss"], rel=1e-6))
    name = "adapter/adapter_model.safetensors"
    assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()
