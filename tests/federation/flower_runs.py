"""Runs deployed through Flower in one process."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")


import torch
from flower_grid import LocalGrid
from flwr.app import Array, Error, Message
from tiny import tiny_clients, tiny_model

from hetlora.config import Config
from hetlora.deployed import wire
from hetlora.deployed.local import modules_digest
from hetlora.flower import Base, HetLora, Waiting, client_app
from hetlora.models import target_shapes
from hetlora.observer import Observer

SIZES = [3, 5, 2, 7]


def base(cfg: Config) -> Base:
    model = tiny_model()
    shapes = target_shapes(model, cfg.target_modules)
    return Base("tiny", shapes, sum(p.numel() for p in model.parameters()), modules_digest(shapes))


class Said(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def deployed(cfg: Config, spoil=None, waiting: Waiting | None = None, nodes: list[dict] | None = None, grid_of=LocalGrid):
    """(Flower's result, lines for the user, grid) of a run on nodes of this process."""
    clients = tiny_clients(SIZES)
    app = client_app(lambda cfg: tiny_model(), lambda cfg, node: clients[node.partition_id])
    grid = grid_of(app, cfg.model_dump(), nodes or [{"partition-id": k} for k in range(len(SIZES))], spoil)
    said = Said()
    waiting = waiting or Waiting(min_clients=len(SIZES), join_timeout=0)
    return HetLora(cfg, base(cfg), waiting, said).start(grid), said.lines, grid


# ---------------------------------------------------------------- what nodes may do wrong


def to_array(tensor: torch.Tensor) -> Array:
    return Array(*wire.to_array(tensor))


def change(kind: str, reply):
    """A reply of node 12 that is wrong in one way."""
    if kind == "lost":
        return None
    if kind == "crash":
        return Message(Error(0, "it ran out of memory"), reply_to=reply_to(reply))
    if kind == "gone":  # as the SuperLink answers for a node whose heartbeats it misses
        return from_node(1, Message(Error(3, "Node Unavailable"), reply_to=reply_to(reply)))
    content = reply.content
    arrays, metrics, config = content.array_records["arrays"], content.metric_records["metrics"], content.config_records["config"]
    rows = arrays["rows"]
    tensor = torch.frombuffer(bytearray(rows.data), dtype=torch.float32)
    if kind == "nan":
        tensor[3] = float("nan")
        arrays["rows"] = to_array(tensor)
    elif kind == "huge":
        arrays["rows"] = to_array(tensor * 1e38)
    elif kind == "bytes":
        arrays["rows"] = to_array(tensor.repeat(100))
    elif kind == "short":
        arrays["rows"] = Array(rows.dtype, rows.shape, rows.stype, rows.data[:-4])
    elif kind == "type":
        arrays["rows"] = to_array(tensor.double())
    elif kind == "numpy":
        arrays["rows"] = Array(tensor.numpy())
    elif kind == "key":
        del arrays["rows"]
    elif kind == "more":
        arrays["extra"] = rows
    elif kind == "rank":
        config["ranks"] = [rank + 1 for rank in config["ranks"]]
    elif kind == "modules":
        config["ranks"] = config["ranks"][:1]
    elif kind == "no ranks":
        del config["ranks"]
    elif kind == "negative":
        metrics["tokens"] = -5
    elif kind == "no metrics":
        del content["metrics"]
    elif kind == "no arrays":
        del content["arrays"]
    return reply


def from_node(number: int, message):
    message.metadata.__dict__["_src_node_id"] = number
    return message


def reply_to(reply):
    return reply.asked
