"""The real thing on loopback: a SuperLink under TLS that admits known keys alone, three SuperNodes, a run that is killed and goes on, a node that is killed."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import torch
from click.testing import CliRunner
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from flower_grid import LocalGrid
from flwr.app import Error, Message, MessageType
from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
from flwr.server.superlink.linkstate.utils import NODE_UNAVAILABLE_ERROR_REASON
from tiny import lines
from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

from hetlora.cli import cli
from hetlora.deployed.settings import server_settings
from hetlora.flower import HetLora, client_app, describe_base, launch
from hetlora.flower.certificates import write_certificates

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

SETTINGS = {"ranks": "2,4,8", "rounds": 2, "seq-len": 32, "local-steps": 2, "batch-size": 2, "device": "cpu", "method": "hetlora", "eval-every": 2}
CLIENTS = ("ARABIC", "GREEK", "HEBREW")
DATA = f"unicode:{','.join(CLIENTS)}"
PATIENCE = 1500  # seconds that any step may take on a loaded machine before the test gives up


def descendants(ancestor: int, word: str = "") -> list[int]:
    """Processes that the ancestor started, or that these started, whose command holds `word`; some lead groups of their own."""
    parents: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError):
            if entry.name.isdecimal():
                parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, last = [], {ancestor}
    while last:
        last = {child for child, parent in parents.items() if parent in last}
        found += sorted(last)
    commands = {}
    for process in found:
        with contextlib.suppress(OSError):
            commands[process] = Path(f"/proc/{process}/cmdline").read_bytes()
    return [process for process, command in commands.items() if word.encode() in command]


class Processes:
    """Started programs; each is ended with all that it started."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: dict[str, subprocess.Popen] = {}
        self.environment = {**launch.environment(), "FLWR_HOME": str(folder / "home"), "OMP_NUM_THREADS": "1"}

    def start(self, name: str, command: list[str]) -> subprocess.Popen:
        with (self.folder / f"{name}.log").open("ab") as log:
            self.started[name] = subprocess.Popen(command, env=self.environment, stdout=log, stderr=log, start_new_session=True, cwd=self.folder)
        return self.started[name]

    def end(self, name: str) -> None:
        child = self.started.pop(name)
        for process in [child.pid, *descendants(child.pid)]:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        child.wait()

    def log(self, name: str) -> str:
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def run(self, *command: str) -> dict:
        done = subprocess.run(command, env=self.environment, capture_output=True, text=True, cwd=self.folder, timeout=PATIENCE)
        assert done.returncode == 0, done.stdout + done.stderr
        return json.loads(done.stdout)

    def wait(self, what: str, condition) -> None:
        deadline = time.monotonic() + PATIENCE
        while not condition():
            dead = [name for name, child in self.started.items() if child.poll() is not None and name != "stranger"]
            assert not dead, f"{what}: {dead[0]} has ended\n{self.log(dead[0])[-3000:]}"
            assert time.monotonic() < deadline, f"{what}\n" + "\n".join(f"--- {name}\n{self.log(name)[-1500:]}" for name in self.started)
            time.sleep(0.5)


@pytest.fixture
def processes(tmp_path):
    started = Processes(tmp_path)
    try:
        yield started
    finally:
        for name in list(started.started):
            started.end(name)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def write_key(path: Path) -> Path:
    key = ec.generate_private_key(ec.SECP384R1())
    path.write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()))
    public = path.with_suffix(".pub")
    public.write_bytes(key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH))
    return public


BEATS_OFTEN = """
from flwr.supernode import fleet_http_connection
fleet_http_connection.HEARTBEAT_DEFAULT_INTERVAL = 20  # not 30: a SuperLink gives a node up after two intervals without a beat
from flwr.supernode.cli import flower_supernode
flower_supernode()
"""


def here_without(folder: Path, lost: str) -> Path:
    """The run folder of the app's run in this process, in which the SuperLink says in round 2 that the client `lost` is gone."""
    settings = tomllib.loads((folder / "app" / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
    settings["output"] = str(folder / "here without")
    nodes = [{"partition-id": k} for k in range(len(CLIENTS))]

    def spoil(node, message, reply):
        if message.metadata.group_id == "2" and CLIENTS[grid.nodes[node]["partition-id"]] == lost and message.metadata.message_type == MessageType.TRAIN:
            del grid.nodes[node]
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, NODE_UNAVAILABLE_ERROR_REASON), reply_to=message)
            reply.metadata.__dict__["_src_node_id"] = SUPERLINK_NODE_ID
        return reply

    grid = LocalGrid(client_app(), settings, nodes, spoil)
    cfg, waiting = server_settings(settings)
    HetLora(cfg, describe_base(cfg), waiting).start(grid)
    return Path(settings["output"])


def make_app(folder: Path, output: Path) -> Path:
    model = folder / "model"
    torch.manual_seed(0)
    sizes = LlamaConfig(vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(sizes).save_pretrained(model)
    ByT5Tokenizer().save_pretrained(model)
    launch.write_app(folder / "app")
    project = folder / "app" / "pyproject.toml"
    text = project.read_text()
    waiting = {"min-clients": len(CLIENTS), "join-timeout": PATIENCE, "round-timeout": PATIENCE}
    changes = {"model": str(model), "data": DATA, "output": str(output), **waiting, **SETTINGS}
    kept = [line for line in text.splitlines() if line.split(" = ")[0] not in changes]
    project.write_text("\n".join([*kept, *(f"{name} = {json.dumps(value)}" for name, value in changes.items())]) + "\n")
    return folder / "app"


def same(records: list[dict], others: list[dict]) -> None:
    """Equal but for losses of an evaluation, which sum in another order."""
    for record, other in zip(records, others, strict=True):
        one, two = (each.pop("evaluation") for each in (record, other))
        assert record == other and (one is None) == (two is None) == (record["round"] == 1)
        if one is not None:
            assert one["client_text"]["loss"] == pytest.approx(two["client_text"]["loss"], rel=1e-6)
            assert one["client_text"]["tokens"] == two["client_text"]["tokens"]


@pytest.mark.slow
def test_a_run_over_tls_that_is_killed_goes_on_and_loses_a_killed_node_alone(tmp_path, processes):
    """Round 1 is that of the simulation, then the server's app is killed. In round 2 a node is killed as it trains, and the round is that of the others."""
    output, port = tmp_path / "there", free_port()
    app = make_app(tmp_path, output)
    write_certificates(tmp_path / "tls", ["localhost", "127.0.0.1"])
    server, ca = f"127.0.0.1:{port}", tmp_path / "tls" / "ca.crt"
    processes.start("server", launch.serve_command("127.0.0.1", port, tmp_path / "tls", True, None))
    command = launch.run_command(app, server, [], tmp_path / "home", ca)
    run = [part for part in command if part != "--stream"] + ["--format", "json"]
    listing = [command[0], "ls", "hetlora", "--format", "json"]
    processes.wait("the server did not answer", lambda: subprocess.run(listing, env=processes.environment, capture_output=True).returncode == 0)

    for place, name in enumerate(("known0", "known1", "known2", "stranger")):
        public = write_key(tmp_path / name)
        if name != "stranger":
            processes.run(command[0], "supernode", "register", str(public), "hetlora", "--format", "json")
        node = launch.join_command(server, free_port(), [f"partition-id={min(place, 2)}"], ca, tmp_path / name)
        processes.start(name, [sys.executable, "-c", BEATS_OFTEN, *node[1:]] if name == "known1" else node)

    processes.run(*run)
    processes.wait("round 1 was not closed", lambda: (output / "rounds.jsonl").exists() and len(lines(output)) >= 2)
    apps = descendants(processes.started["server"].pid, "flwr-serverapp")
    assert apps, "the server's app was not found"
    for app_process in apps:
        os.kill(app_process, signal.SIGKILL)
    assert not (output / "summary.json").exists(), "the run was over before it was killed"
    assert len(lines(output)) == 2
    number = processes.run(*run, "--run-config", "resume=true")["run-id"]

    node = processes.started["known1"].pid
    training = re.compile(rf"\[RUN {number}, ROUND 2\]\n.*Receiving: train message")  # not that of the run which was killed
    processes.wait("round 2 did not begin", lambda: training.search(processes.log("known1")) and descendants(node, "flwr-clientapp"))
    working = [node, *descendants(node)]
    processes.end("known1")
    processes.wait("the run was not finished", lambda: (output / "summary.json").exists())

    assert not [process for process in working if Path(f"/proc/{process}").exists()]
    assert lines(output)[2]["dropped"] == [{"name": "GREEK", "reason": f"no reply: {NODE_UNAVAILABLE_ERROR_REASON}"}]
    flags = {**SETTINGS, "output": tmp_path / "here", "model": tmp_path / "model", "data": DATA}
    simulated = CliRunner().invoke(cli, ["run", "--no-cobatch", *(f"--{name}={value}" for name, value in flags.items())])
    assert simulated.exit_code == 0, simulated.stderr
    same(lines(output)[:2], lines(tmp_path / "here")[:2])
    without = here_without(tmp_path, "GREEK")
    same(lines(output), lines(without))
    adapter = "adapter/adapter_model.safetensors"
    assert (without / adapter).read_bytes() == (output / adapter).read_bytes()
    assert processes.started["stranger"].poll() is not None or "registered" in processes.log("stranger") or "ermission" in processes.log("stranger")
    assert [client["name"] for client in json.loads((output / "clients.json").read_text())["clients"]] == list(CLIENTS)
