"""Flower's own commands, written out: `hetlora serve`, `join` and `flower run` print what they start and become that process. No network code is here."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
import sysconfig
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NoReturn

from hetlora.deployed.template import write_template
from hetlora.errors import ConfigError
from hetlora.extras import install
from hetlora.run_folder import write_atomic

TEMPLATE = Path(__file__).with_name("template")
PLACES = {"pyproject.toml.txt": "pyproject.toml", "README.md.txt": "README.md", "apps.py.txt": "federation/apps.py"}
QUIET = {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1", "RAY_USAGE_STATS_ENABLED": "0"}
"""Flower and Ray tell their makers of runs unless told otherwise; a process that hetlora starts does not."""


def write_app(folder: Path) -> list[Path]:
    """A Flower app in the new folder; the files written. `ConfigError` where it exists and is not empty."""
    written = write_template(TEMPLATE, PLACES, folder)
    write_atomic(folder / "federation" / "__init__.py", "")
    return written


def serve_command(host: str, port: int, tls: Path | None, known_clients: bool, database: Path | None, simulation: bool = False) -> list[str]:
    """The SuperLink.   tls: folder with server.pem, server.key and ca.crt.   known_clients: only nodes whose keys were registered may join.

    simulation: clients are in Ray's processes on this machine, and nobody joins.
    """
    if simulation and known_clients:
        raise ConfigError("--known-clients: no node joins a simulation; leave out this or --simulation")
    if simulation and importlib.util.find_spec("ray") is None:
        raise ConfigError(f"--simulation: Flower simulates with Ray, which is not installed; install it with: {install('simulation')}")
    command = [_program("flower-superlink"), "--host", host, "--port", str(port), "--disable-runtime-dependency-installation"]
    if tls is None:
        if host not in LOOPBACK:
            raise ConfigError(f"--host {host}: other machines reach it, and without TLS they read and change all; give --tls DIR, or --host 127.0.0.1")
        command += ["--insecure"]
    else:
        files = {"--ssl-ca-certfile": tls / "ca.crt", "--ssl-certfile": tls / "server.pem", "--ssl-keyfile": tls / "server.key"}
        command += [part for flag, path in files.items() for part in (flag, str(_there(path)))]
    if known_clients:
        if tls is None:
            raise ConfigError("--known-clients: keys are checked under TLS only; give --tls DIR too")
        command += ["--enable-supernode-auth"]
    if database is not None:
        command += ["--database", str(database)]
    return command + (["--simulation"] if simulation else [])


LOOPBACK = ("127.0.0.1", "localhost", "::1")


def join_command(server: str, port: int, settings: Sequence[str], ca: Path | None, key: Path | None) -> list[str]:
    """A SuperNode.   settings: NAME=VALUE of the node.   ca: certificate that the server's is signed by.   key: the node's private key."""
    host = server.rpartition(":")[0].strip("[]")
    if not host or not server.rpartition(":")[2].isdecimal():
        raise ConfigError(f"server: expected HOST:PORT, got {server!r}")
    command = [_program("flower-supernode"), "--superlink", server, "--port", str(port)]
    if ca is None:
        if host not in LOOPBACK:
            raise ConfigError(f"server {server}: on another machine, and without TLS all is read and changed on the way; give --ca FILE of the server")
        command += ["--insecure"]
    else:
        command += ["--root-certificates", str(_there(ca))]
    if key is not None:
        command += ["--auth-supernode-private-key", str(_there(key))]
    if settings:
        command += ["--node-config", " ".join(map(_toml, settings))]
    return command


def run_command(app: Path, server: str, changes: Sequence[str], home: Path, ca: Path | None) -> list[str]:
    """`flwr run`; `home` gets the configuration that names the server, as Flower reads it from nowhere else."""
    if not (app / "pyproject.toml").is_file():
        raise ConfigError(f"{app}: no Flower app there (no pyproject.toml); make one with hetlora flower new DIR")
    trust = f'root-certificates = "{_there(ca).resolve()}"' if ca else "insecure = true"
    home.mkdir(parents=True, exist_ok=True)
    write_atomic(home / "config.toml", f'[superlink]\ndefault = "hetlora"\n\n[superlink.hetlora]\naddress = "{server}"\n{trust}\n')
    command = [_program("flwr"), "run", str(app), "hetlora", "--stream"]
    return command + [part for change in changes for part in ("--run-config", _toml(change))]


def simulation_command(clients: int) -> list[str]:
    """Tells the server of `run_command`, which simulates, how many clients there are."""
    return [_program("flwr"), "federation", "simulation-config", "@none/default", "hetlora", "--num-supernodes", str(clients)]


def _toml(setting: str) -> str:
    """NAME=VALUE as Flower reads it: text in quotes, numbers and truth values bare."""
    name, equals, value = setting.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9_-]+", name):
        raise ConfigError(f"{setting!r}: expected NAME=VALUE")
    if value in ("true", "false") or re.fullmatch(r"[+-]?(\d+(\.\d+)?([eE][+-]?\d+)?)", value):
        return f"{name}={value}"
    if '"' in value or "\\" in value or not value.isprintable():
        raise ConfigError(f"{setting!r}: expected a value without quotes, backslashes and control characters")
    return f'{name}="{value}"'


def _there(path: Path) -> Path:
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; hetlora flower certificates DIR makes certificates for tests, docs/flower.md says how to get real ones")
    return path


def _program(name: str) -> str:
    """Flower's program of this environment, else of the PATH."""
    found = shutil.which(name, path=sysconfig.get_path("scripts")) or shutil.which(name)
    if found is None:
        raise ConfigError(f"{name}: not found; Flower is installed with {install('flower')}")
    return found


def environment() -> dict[str, str]:
    """For Flower's programs: they find each other on the PATH, where an environment that is not activated is missing."""
    return {**os.environ, **QUIET, "PATH": os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])}


def first(command: Sequence[str], more: Mapping[str, str]) -> None:
    """Print the command as one types it, and run it; its exit status, where it fails, is that of this program."""
    print(shlex.join(command), flush=True)
    if status := subprocess.run(command, env={**environment(), **more}).returncode:
        raise SystemExit(status)


def become(command: Sequence[str], more: Mapping[str, str] | None = None) -> NoReturn:
    """Print the command as one types it, and become it: signals, exit status and output are its own."""
    for name, value in (more or {}).items():
        print(f"export {name}={shlex.quote(value)}")
    print(shlex.join(command), flush=True)
    os.execve(command[0], list(command), {**environment(), **(more or {})})
