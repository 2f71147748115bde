"""Runs with secure aggregation in one process: what the tests of its sums, rounds and clients share."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")


from collections.abc import Sequence

import torch
from flower_grid import LocalGrid
from flwr.app import Message
from tiny import tiny_clients, tiny_model

from hetlora.config import Config
from hetlora.deployed.local import modules_digest
from hetlora.flower import Base, HetLora, Waiting, client_app
from hetlora.models import target_shapes
from hetlora.observer import Observer

SIZES = [3, 5, 2, 7, 4]
SECURE = {"secure_aggregation": True, "clip_median": 0.0, "weights": "samples", "ranks": "2,4,8,4,2", "clients_per_round": 5, "rounds": 1}
FINE, COARSE = {}, {"secure_range": 64.0, "secure_bits": 20}  # 8 and 4 bytes a number


class Watching(LocalGrid):
    """Keeps every reply as the server gets it, by (node, kind), before `spoil` may lose or change it."""

    def __init__(self, app, run_config, nodes, spoil=None) -> None:
        self.heard: dict[tuple[int, str], Message] = {}

        def kept(node, message, reply):
            self.heard[node, message.metadata.message_type] = reply
            return spoil(node, message, reply) if spoil else reply

        super().__init__(app, run_config, nodes, kept)


def deployed(cfg: Config, spoil=None, waiting: Waiting | None = None, sizes: Sequence[int] = SIZES, through: type[Watching] = Watching):
    clients, model = tiny_clients(sizes), tiny_model(getattr(torch, cfg.dtype))
    shapes = target_shapes(model, cfg.target_modules)
    app = client_app(lambda cfg: model, lambda cfg, node: clients[node.partition_id])
    grid = through(app, cfg.model_dump(), [{"partition-id": k} for k in range(len(sizes))], spoil)
    said: list[str] = []
    observer = Observer()
    observer.message = said.append
    strategy = HetLora(cfg, Base("tiny", shapes, 0, modules_digest(shapes)), waiting or Waiting(min_clients=len(sizes), join_timeout=0), observer)
    return strategy.start(grid), said, grid
