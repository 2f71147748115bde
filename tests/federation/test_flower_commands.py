"""`hetlora serve`, `join` and `flower`: which commands of Flower they become, and what they refuse."""

from __future__ import annotations

import re
import sys
import types
from pathlib import Path

import pytest
from click.testing import CliRunner

from hetlora.cli import cli
from hetlora.config import Config, ConfigError
from hetlora.flower import launch

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


@pytest.fixture(autouse=True)
def _programs(monkeypatch):
    monkeypatch.setattr(launch, "_program", lambda name: f"/bin/{name}")


def files(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for name in names:
        (folder / name).touch()
    return folder


def test_a_server_on_this_machine_needs_no_tls():
    assert launch.serve_command("127.0.0.1", 8000, None, False, None) == [
        *("/bin/flower-superlink", "--host", "127.0.0.1", "--port", "8000"),
        *("--disable-runtime-dependency-installation", "--insecure"),
    ]


def test_a_server_for_others_needs_tls_and_may_ask_for_keys(tmp_path):
    tls = files(tmp_path / "tls", "ca.crt", "server.pem", "server.key")
    command = launch.serve_command("0.0.0.0", 8000, tls, True, tmp_path / "state.db")
    assert "--insecure" not in command
    assert command[-3:] == ["--enable-supernode-auth", "--database", str(tmp_path / "state.db")]
    assert command[command.index("--ssl-keyfile") + 1] == str(tls / "server.key")


def test_a_simulation_is_told_its_clients_before_it_runs(tmp_path, monkeypatch):
    """The command that configures comes first, and nothing runs where it fails."""
    ray = types.SimpleNamespace(find_spec=lambda name: name)
    monkeypatch.setattr(launch, "importlib", types.SimpleNamespace(util=ray))
    assert launch.serve_command("127.0.0.1", 8000, None, False, None, simulation=True)[-2:] == ["--insecure", "--simulation"]
    with pytest.raises(ConfigError, match="--known-clients: no node joins a simulation"):
        launch.serve_command("127.0.0.1", 8000, None, True, None, simulation=True)
    ray.find_spec = lambda name: None
    with pytest.raises(ConfigError, match=re.escape("Ray, which is not installed; install it with: pip install '.[simulation]'")):
        launch.serve_command("127.0.0.1", 8000, None, False, None, simulation=True)

    (tmp_path / "pyproject.toml").touch()
    ran, status = [], [0, 3]
    monkeypatch.setattr(launch.subprocess, "run", lambda command, env: ran.append(command) or types.SimpleNamespace(returncode=status[len(ran) // 2]))
    monkeypatch.setattr(launch.os, "execve", lambda program, command, env: ran.append(command))
    CliRunner().invoke(cli, ["flower", "run", str(tmp_path), "--simulation", "5"], standalone_mode=False)
    assert [command[:3] for command in ran] == [["/bin/flwr", "federation", "simulation-config"], ["/bin/flwr", "run", str(tmp_path)]]
    assert ran[0][3:] == ["@none/default", "hetlora", "--num-supernodes", "5"]
    failed = CliRunner().invoke(cli, ["flower", "run", str(tmp_path), "--simulation", "5"])
    assert failed.exit_code == 3 and len(ran) == 3


def test_a_node_says_its_settings_as_flower_reads_them(tmp_path):
    ca = files(tmp_path / "tls", "ca.crt") / "ca.crt"
    command = launch.join_command("example.org:8000", 9101, ["client=left ward", "partition-id=3", "device=cpu"], ca, None)
    assert command == [
        *("/bin/flower-supernode", "--superlink", "example.org:8000", "--port", "9101", "--root-certificates", str(ca)),
        *("--node-config", 'client="left ward" partition-id=3 device="cpu"'),
    ]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: launch.serve_command("0.0.0.0", 8000, None, False, None), "--host 0.0.0.0: other machines reach it, and without TLS"),
        (lambda: launch.serve_command("127.0.0.1", 8000, None, True, None), "--known-clients: keys are checked under TLS only"),
        (lambda: launch.serve_command("127.0.0.1", 8000, Path("/nowhere"), False, None), "/nowhere/ca.crt: no such file"),
        (lambda: launch.join_command("10.0.0.1:8000", 9094, [], None, None), "server 10.0.0.1:8000: on another machine, and without TLS"),
        (lambda: launch.join_command("somewhere", 9094, [], None, None), "server: expected HOST:PORT, got 'somewhere'"),
        (lambda: launch.join_command("127.0.0.1:1", 9094, ["a"], None, None), "'a': expected NAME=VALUE"),
        (lambda: launch.join_command("127.0.0.1:1", 9094, ['a="x" lr=3'], None, None), "expected a value without quotes"),
        (lambda: launch.run_command(Path("/nowhere"), "127.0.0.1:1", [], Path("/nowhere/home"), None), "/nowhere: no Flower app there"),
    ],
)
def test_what_would_go_wrong_later_is_refused(call, message):
    with pytest.raises(ConfigError) as caught:
        call()
    assert message in str(caught.value)


def test_a_new_app_holds_settings_that_the_server_takes(tmp_path):
    pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")
    from hetlora.deployed.settings import server_settings

    done = CliRunner().invoke(cli, ["flower", "new", str(tmp_path / "My App")], standalone_mode=False)
    assert done.exit_code == 0, done.output
    project = tomllib.loads((tmp_path / "My App" / "pyproject.toml").read_text())
    cfg, waiting = server_settings(project["tool"]["flwr"]["app"]["config"])
    assert project["project"]["name"] == "my-app" and isinstance(cfg, Config) and waiting.min_clients == 3
    names: dict = {}
    exec((tmp_path / "My App" / "federation" / "apps.py").read_text(), names)
    assert {"client", "server"} <= set(names)
    with pytest.raises(ConfigError, match="exists and is not empty"):
        launch.write_app(tmp_path / "My App")


def test_a_run_names_its_server_where_flower_looks_for_it(tmp_path):
    launch.write_app(tmp_path / "app")
    command = launch.run_command(tmp_path / "app", "127.0.0.1:8000", ["rounds=5", "resume=true"], tmp_path / "home", None)
    assert command == ["/bin/flwr", "run", str(tmp_path / "app"), "hetlora", "--stream", "--run-config", "rounds=5", "--run-config", "resume=true"]
    found = tomllib.loads((tmp_path / "home" / "config.toml").read_text())["superlink"]
    assert found == {"default": "hetlora", "hetlora": {"address": "127.0.0.1:8000", "insecure": True}}
