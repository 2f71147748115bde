"""NVFLARE's server and sites in one process: a task is given to a site by calling its client, through NVFLARE's own serialisation both ways.

What stands in for NVFLARE is the way from the controller to a site and back, and nothing else: its models, its check of a result and its conversions are real.
The simulator, with processes and connections, is in test_nvflare_simulator.py.
"""

from __future__ import annotations

import pytest

pytest.importorskip("nvflare", reason="NVFLARE is not installed (pip install '.[nvflare]'; make nvflare runs these tests)")

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from nvflare.apis.signal import Signal
from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.decomposers import common_decomposers
from nvflare.app_common.utils.fl_model_utils import FLModelUtils
from nvflare.fuel.utils import fobs
from tiny import tiny_clients, tiny_federation, tiny_model

from hetlora.config import Config
from hetlora.deployed.local import Client
from hetlora.federation import Federation
from hetlora.nvflare import HetLora
from hetlora.nvflare.client import answer

common_decomposers.register()
Spoil = Callable[[str, str, FLModel], FLModel | None]


def travelled(model: FLModel) -> FLModel:
    """Through bytes, as on the wire."""
    return FLModelUtils.from_shareable(fobs.loads(fobs.dumps(FLModelUtils.to_shareable(model))))


def site_clients(sizes: list[int]) -> list[Any]:
    return [replace(client, name=f"site-{k + 1}") for k, client in enumerate(tiny_clients(sizes))]


def site_federation(sizes: list[int]) -> Federation:
    """What `simulate` runs on: the clients have the names of the sites."""
    federation = tiny_federation(sizes)
    return replace(federation, data=replace(federation.data, clients=site_clients(sizes)))


class Here(HetLora):
    """The workflow, with sites in this process.   spoil(site, task, result) may change or lose (None) what a site sends; its reply is a task's last."""

    def __init__(self, cfg: Config, folder: Path, sizes: list[int], spoil: Spoil | None = None, **waiting: Any) -> None:
        tiny_model().save_pretrained(folder / "base")
        super().__init__({**cfg.model_dump(), "model": str(folder / "base"), "min_clients": len(sizes), "join_timeout": 5, **waiting})
        self.abort_signal, self.spoil, self.lines, self.asked = Signal(), spoil, [], []
        self.results: list[tuple[str, Callable[..., Any], FLModel]] = []
        clients = {client.name: client for client in site_clients(sizes)}
        self.sites = {name: Client(lambda cfg: tiny_model(), lambda cfg, node: clients[node.client], self.lines.append) for name in clients}

    def connected(self) -> list[str]:
        return sorted(self.sites)

    def send_model(self, task_name="train", data=None, targets=None, min_responses=None, timeout=0, callback=None) -> None:
        (site,) = targets
        assert type(timeout) is int and timeout >= 1  # NVFLARE takes whole seconds, and 0 for no end
        received = travelled(data)
        self.asked.append((site, task_name, sum(array.nbytes for array in received.params.values())))
        result = answer(self.sites[site], task_name, received, {"client": site})
        result = self.spoil(site, task_name, result) if self.spoil else result
        if result is not None:
            result = travelled(result)
            result.meta["client_name"] = site  # as NVFLARE's server does, whatever the result says
            self.results.append((site, callback, result))

    def get_num_standing_tasks(self) -> int:
        for _, callback, result in reversed(self.results):  # in no order that may matter
            callback(result)
        self.results = []
        return 0

    def get_run_dir(self) -> str:
        raise AssertionError("the output of tests is absolute")

    def info(self, message: str) -> None:
        self.lines.append(message)

    warning = info

    def panic(self, reason: str) -> None:
        self.lines.append(f"panic: {reason}")
