"""What carries a federation, and what that takes: `python -m benchmarks.federation --json FILE`.

A tiny model that is made here, clients of ranks 2, 4, 8 and 16 in turn, each with text of its own. The ways:

- hetlora run: all clients in one batch; --no-cobatch: one after another;
- Flower deployment: a SuperLink and a SuperNode for each client, on loopback;
- Flower simulation: Ray's processes, where Ray is installed;
- either with stock PEFT clients: Flower's FedAvg, whose clients all have the largest rank.

Checked before a way's figures are written: adapters of hetlora's ways have the bits of `hetlora run --no-cobatch`, those of stock PEFT clients are the mean in
float64 of what the same clients train in this process. A way that cannot be taken here is left out by name. The first round and the last, which is evaluated,
do not count.

At the end: the server's memory for a round of 1000 made-up uploads, in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

import hetlora_kernels

from . import run as suites
from .server import WrongResultError

CLIENTS, UPLOADS, ROUNDS = (8, 32), 1000, 4
RANKS = (2, 4, 8, 16)
GIB_OF_A_NODE = 0.75  # of a SuperNode and what it starts, as it trains: measured 0.73 on Linux
OURS, ALONE, DEPLOYED, SIMULATED = "hetlora run", "hetlora run --no-cobatch", "Flower deployment", "Flower simulation"
WAYS = {OURS: "hetlora", ALONE: "hetlora", DEPLOYED: "hetlora", SIMULATED: "hetlora", f"{DEPLOYED}, stock PEFT": "stock", f"{SIMULATED}, stock PEFT": "stock"}
ADAPTER = "adapter/adapter_model.safetensors"
ROOT = str(Path(hetlora_kernels.__file__).resolve().parents[1])  # of a checkout and of an installation
STOCK = f"from {__package__}.federation_peft import client, server\n\n__all__ = ['client', 'server']\n"


def make_model(folder: Path) -> None:
    from transformers import ByT5Tokenizer, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = LlamaConfig(vocab_size=384, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4)
    LlamaForCausalLM(sizes).save_pretrained(folder)
    ByT5Tokenizer().save_pretrained(folder)


def settings(folder: Path, clients: int, rounds: int) -> dict[str, Any]:
    from hetlora.config import Config
    from hetlora.data import load_data
    from hetlora.models import load_tokenizer

    names = [client.name for client in load_data(Config(data="unicode", seq_len=64), load_tokenizer(str(folder / "model"), False)).clients]
    ranks = ",".join(str(RANKS[k % len(RANKS)]) for k in range(clients))
    length = {"rounds": rounds, "clients-per-round": clients, "eval-every": rounds, "seq-len": 64, "local-steps": 4, "batch-size": 4}
    return {"model": str(folder / "model"), "data": f"unicode:{','.join(names[:clients])}", "ranks": ranks, "method": "hetlora", "device": "cpu", **length}


# ---------------------------------------------------------------- the ways


def in_process(folder: Path, given: dict[str, Any], cobatch: bool) -> Path:
    output = folder / ("run" if cobatch else "alone")
    flags = [f"--{name}={value}" for name, value in {**given, "output": output}.items()]
    command = [sys.executable, "-m", "hetlora", "run", "--cobatch" if cobatch else "--no-cobatch", *flags]
    _ran(subprocess.run(command, env=environment(folder), cwd=folder, capture_output=True, text=True), command)
    return output


def through_flower(folder: Path, given: dict[str, Any], clients: int, simulated: bool, stock: bool) -> Path:
    """The run folder of the app under a SuperLink of its own, which is ended with all that it started."""
    from hetlora.flower import launch

    name = f"{'simulated' if simulated else 'deployed'}{'-stock' if stock else ''}"
    app, output = folder / name / "app", folder / name / "run"
    launch.write_app(app)
    if stock:
        (app / "federation" / "apps.py").write_text(STOCK, encoding="utf-8")
    project = app / "pyproject.toml"
    changes = {**given, "output": str(output), "min-clients": clients}
    kept = [line for line in project.read_text(encoding="utf-8").splitlines() if line.split(" = ")[0] not in changes]
    project.write_text("\n".join([*kept, *(f"{key} = {json.dumps(value)}" for key, value in changes.items())]) + "\n", encoding="utf-8")
    port = _free_port()
    server, home, more = f"127.0.0.1:{port}", app / ".flwr", environment(folder / name)
    command = launch.run_command(app, server, [], home, None)
    with _started(folder / name, more) as start:
        start("server", launch.serve_command("127.0.0.1", port, None, False, None, simulated))
        listing = [command[0], "ls", "hetlora", "--format", "json"]
        while subprocess.run(listing, env=more, capture_output=True).returncode:
            time.sleep(0.5)
        for k in range(0 if simulated else clients):
            start(f"node{k}", launch.join_command(server, _free_port(), [f"partition-id={k}"], None, None))
        if simulated:
            resources = ["--client-resources-num-cpus", "1", "--init-args-num-cpus", str(os.cpu_count() or 1)]
            configure = [*launch.simulation_command(clients), *resources]
            _ran(subprocess.run(configure, env=more, capture_output=True, text=True), configure)
        done = subprocess.run(command, env=more, capture_output=True, text=True)
        last = output / ("stock.json" if stock else "summary.json")
        if not last.is_file():
            raise RuntimeError(f"{name}: no {last.name}; {done.stdout[-3000:]}{done.stderr[-1000:]}")
    return output


def environment(folder: Path) -> dict[str, str]:
    """For processes with one thread each, as the ways share the machine's cores."""
    from hetlora.flower import launch

    path = os.pathsep.join([ROOT, *filter(None, [os.environ.get("PYTHONPATH")])])
    own = {"FLWR_HOME": str(folder / "app" / ".flwr"), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    return {**launch.environment(), **own}


@contextlib.contextmanager
def _started(folder: Path, more: dict[str, str]) -> Iterator[Any]:
    """A function that starts programs, which are ended with all that they started."""
    running: list[subprocess.Popen[bytes]] = []

    def start(name: str, command: list[str]) -> None:
        with (folder / f"{name}.log").open("wb") as log:
            running.append(subprocess.Popen(command, env=more, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL, start_new_session=True))

    try:
        yield start
    finally:
        everyone = [process for own in running for process in (own.pid, *_descendants(own.pid))]
        for own in reversed(running):
            own.terminate()
        for own in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                own.wait(10)
        for process in everyone:
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        for own in running:
            own.wait()


def _descendants(ancestor: int) -> list[int]:
    parents: dict[int, int] = {}
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parents[int(entry.name)] = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
    found, last = [], {ancestor}
    while last:
        last = {child for child, parent in parents.items() if parent in last}
        found += sorted(last)
    return found


def _ran(done: subprocess.CompletedProcess[str], command: list[str]) -> None:
    if done.returncode:
        raise RuntimeError(f"{shlex.join(command)[:300]}: exit status {done.returncode}\n{done.stdout[-1000:]}{done.stderr[-2000:]}")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def impossible(way: str, clients: int) -> str:
    """Why a way cannot be taken here; '' where it can."""
    wanted = ["flwr", "ray"] if way.startswith(SIMULATED) else ["flwr"] if way.startswith(DEPLOYED) else []
    if missing := [name for name in wanted if importlib.util.find_spec(name) is None]:
        return f"{' and '.join(missing)} not installed (pip install '.[simulation]')"
    if way.startswith(DEPLOYED):
        free = next(int(line.split()[1]) for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable")) / 2**20
        if free < clients * GIB_OF_A_NODE:
            return f"{clients} nodes take about {clients * GIB_OF_A_NODE:.0f} GiB, {free:.0f} GiB are free"
    return ""


# ---------------------------------------------------------------- the figures


def record(way: str, clients: int, rounds: list[dict[str, Any]], final: Path, alone: dict[str, Any] | None) -> dict[str, Any]:
    """Of the rounds that count.   alone: the record that it is compared with, None for that itself. `bytes`: what that one sends."""
    seconds = sorted(one["seconds"] for one in rounds)
    median, ends = seconds[len(seconds) // 2], {"p20_s": seconds[0], "p80_s": seconds[-1]}
    moved = {name: sum(one[name] for one in rounds) // len(rounds) for name in ("bytes_down", "bytes_up")}
    case = {"op": "federation", "shape": "tiny Llama, 2 layers of 64", "clients": clients, "dtype": "float32", "threads": 1, "yardstick": ALONE, "note": ""}
    beside = {"bytes": alone["bytes"] if alone else sum(moved.values()), "ratio": median / alone["median_s"] if alone else 1.0}
    return {**case, "provider": way, "rounds": len(rounds), "median_s": median, **ends, **beside, **moved, "adapter_bytes": final.stat().st_size}


def taken(way: str, folder: Path, given: dict[str, Any], clients: int) -> tuple[list[dict[str, Any]], Path]:
    """(rounds of the way, its adapter)."""
    if way in (OURS, ALONE):
        output = in_process(folder, given, way == OURS)
    else:
        output = through_flower(folder, given, clients, way.startswith(SIMULATED), WAYS[way] == "stock")
    if WAYS[way] == "stock":
        return json.loads((output / "stock.json").read_text(encoding="utf-8")), output / "stock.pt"
    lines = (output / "rounds.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines][1:], output / ADAPTER


def check(way: str, adapter: Path, alone: Path, given: dict[str, Any], clients: int) -> None:
    """`WrongResultError` where a way's adapter is not what it has to be. Co-batched clients have other last bits, which the tests of the batch bound."""
    if WAYS[way] == "hetlora":
        if way != OURS and adapter.read_bytes() != alone.read_bytes():
            raise WrongResultError(f"{way}, {clients} clients: its adapter is not that of {ALONE}; nothing is written")
        return
    from hetlora.deployed.settings import server_settings

    from . import federation_peft

    torch.set_num_threads(1)
    truth, found = federation_peft.in_process(server_settings(given)[0], clients), torch.load(adapter)
    for name, own in truth.items():
        error = float((found[name].double() - own.double()).norm() / own.double().norm())
        if not error <= TOLERANCE:
            raise WrongResultError(f"{way}, {clients} clients: {name} is off by {error:.1e}; nothing is written")


TOLERANCE = 1e-4  # relative, as of a loss in `rounds`: means of float32 in another order, through the steps of the rounds that follow


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.federation", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="where to write; default: only print")
    parser.add_argument("--clients", type=int, nargs="*", default=list(CLIENTS), help=f"at most 44 (default {CLIENTS})")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"at least 3 (default {ROUNDS})")
    parser.add_argument("--uploads", type=int, default=UPLOADS, help=f"for the server's memory; 0: not measured (default {UPLOADS})")
    parser.add_argument("--only", nargs="*", choices=list(WAYS), help="these ways (default all)")
    options = parser.parse_args(argv)
    if options.rounds < 3 or not all(2 <= clients <= 44 for clients in options.clients):
        parser.error("expected --rounds of at least 3, and --clients from 2 to 44")
    result = suites.opening("federation", "python -m benchmarks.federation " + shlex.join(argv if argv is not None else sys.argv[1:]), torch.device("cpu"))
    left_out = []
    for clients in options.clients:
        with tempfile.TemporaryDirectory(prefix="federation") as place:
            folder = Path(place)
            make_model(folder / "model")
            given = settings(folder, clients, options.rounds)
            alone, beside = Path(), None
            for way in [ALONE, *(way for way in WAYS if way != ALONE)]:  # what the others are compared with comes first
                if options.only and way not in options.only and way != ALONE:
                    continue
                if why := impossible(way, clients):
                    left_out.append(f"{way}, {clients} clients: {why}")
                    print(f"left out {left_out[-1]}", file=sys.stderr)
                    continue
                rounds, adapter = taken(way, folder, given, clients)
                alone = adapter if way == ALONE else alone
                check(way, adapter, alone, given, clients)
                own = record(way, clients, rounds[1:-1], adapter, beside)
                beside = beside or own
                result["results"].append(own)
                moved = f"{own['bytes_down'] / 1e3:9.1f} kB down {own['bytes_up'] / 1e3:9.1f} kB up"
                print(f"{clients:3d} clients  {way:32s} {own['median_s']:9.3f} s a round {moved}", flush=True)
                suites.write(result, options.json)
    if options.uploads:
        result["results"].append(memory(options.uploads))
    result["left_out"] = "; ".join(left_out) or None
    suites.write(result, options.json)
    return 0


def memory(uploads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", f"{__package__}.federation_memory", str(uploads)]
    done = subprocess.run(command, env={**os.environ, "OMP_NUM_THREADS": "1"}, cwd=ROOT, capture_output=True, text=True)
    _ran(done, command)
    found = json.loads(done.stdout.splitlines()[-1])
    print(f"{uploads} uploads of {found['upload_bytes'] / 2**20:.0f} MiB in all: the server takes {found['peak_extra_bytes'] / 2**20:.0f} MiB more at its peak")
    case = {
        "op": "server memory",
        "shape": "24 modules of 256 x 256, ranks 4 to 32",
        "clients": uploads,
        "dtype": "float32",
        "threads": 1,
        "yardstick": "hetlora",
        "bytes": found["upload_bytes"],
        "note": "",
    }
    times = dict.fromkeys(("median_s", "p20_s", "p80_s"), found.pop("seconds"))
    return {**case, "provider": "hetlora", "rounds": 1, **times, "ratio": 1.0, **found}


if __name__ == "__main__":
    sys.exit(main())
