"""Runs in several processes, for test_spread.py: a worker of forked.py, which forks the processes of each run and prints what they ended with."""

from __future__ import annotations

import json
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from typing import Any

import torch
from tiny import SIZES, tiny_config, tiny_federation

sys.path.append(str(Path(__file__).parents[1]))
import forked

from hetlora import spread
from hetlora.errors import ConfigError
from hetlora.fleet import LocalFleet
from hetlora.observer import Observer
from hetlora.spread import follow, lead


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Watched(Observer):
    """Keeps the messages, and kills process `victim` at the start of round `at`."""

    def __init__(self, at: int, victims: list[int]) -> None:
        self.at, self.victims, self.messages = at, victims, []

    def message(self, text: str) -> None:
        self.messages.append(text)

    def round_start(self, round: int, total: int, names: list[str]) -> None:
        if round == self.at:
            for victim in self.victims:
                os.kill(victim, signal.SIGKILL)


class Full(LocalFleet):
    """One with no room left when the second part of an evaluation begins."""

    def own_text(self, *arguments: Any) -> Any:
        raise ConfigError("held-out text: no room")


def process(number: int, run: dict[str, Any], others: list[int], port: int) -> int:
    """One process of the run; its exit status."""
    count = run["processes"]
    names = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()})
    sizes = run.get("sizes", SIZES) if number != run.get("odd") else [2, 2, 2, 2]

    def load(cfg, observer):
        if number == run.get("fails"):
            raise ConfigError("model 'x': not here")
        federation = tiny_federation(sizes, held_out=1)
        if number == run.get("eps"):
            federation.model.config.rms_norm_eps = 0.5
        return federation

    if number == run.get("full"):
        spread.LocalFleet = Full

    if "prompts" in run:  # the text of each process's own prompts.txt
        place = Path(f"{run['folder']}-{number}")
        place.mkdir()
        (place / "prompts.txt").write_text(run["prompts"][number])
        os.chdir(place)
    if number:
        return follow(load)
    observer = Watched(run.get("kill_at", 0), others[: run.get("kills", 1)])
    folder = Path(run["folder"])
    try:
        lead(tiny_config(folder, **run["settings"]), resume=folder.exists(), observer=observer, load=load)
    except ConfigError as error:
        print(json.dumps({"error": str(error)}), flush=True)
        return 2
    finally:
        print(json.dumps({"messages": observer.messages}), flush=True)
    return 0


def fork(run: dict[str, Any]) -> list[int]:
    """The exit statuses of the run's processes, by number; minus the signal for one that was killed."""
    port, children = free_port(), []
    for number in reversed(range(run["processes"])):  # process 0 last: it may kill the others
        child = os.fork()
        if child == 0:
            code = 70
            try:
                code = process(number, run, children, port)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                os._exit(code)
        children.append(child)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in reversed(children)]


def run(runs: list[dict[str, Any]]) -> None:
    torch.set_num_threads(1)
    for one in runs:
        print(json.dumps({"folder": one["folder"], "codes": fork(one)}), flush=True)


if __name__ == "__main__":
    forked.serve(run)
