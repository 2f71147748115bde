"""`python -m benchmarks.federation_memory UPLOADS`: memory that the server takes for a round of many uploads, for `benchmarks.federation`.

The clients are made up: a reply is drawn when the server fetches it, as a network would bring it. Prints one JSON object.
"""

from __future__ import annotations

import json
import math
import sys
import tempfile
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from flwr.app import Message, MessageType
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

from hetlora import __version__
from hetlora.client import LocalResult
from hetlora.config import Config
from hetlora.deployed import messages
from hetlora.deployed.exchange import Reply
from hetlora.deployed.wire import to_array
from hetlora.flower import Base, HetLora, Waiting
from hetlora.flower.records import record_dict

from .timing import peak_extra_bytes

SHAPES = {f"layers.{layer}.{name}_proj": (256, 256) for layer in range(6) for name in "qkvo"}
RANKS = "powerlaw:4:32"


class MadeUp(Grid):
    """A grid whose nodes answer at once."""

    def __init__(self, clients: int) -> None:
        self.clients, self.sent, self.uploads = clients, dict[str, Message](), 0
        self.count = 0

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return range(2, 2 + self.clients)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        numbers = []
        for message in messages:
            self.count += 1
            numbers.append(f"message {self.count}")
            message.metadata.__dict__["_message_id"] = numbers[-1]
            self.sent[numbers[-1]] = message
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._answer(self.sent.pop(number)) for number in message_ids]

    def _answer(self, message: Message) -> Message:
        node, kind = int(message.metadata.dst_node_id), message.metadata.message_type
        if kind == MessageType.QUERY:
            own = messages.Introduction(f"client{node:06d}", 10, "same", "same", math.nan, 0, math.nan, "", __version__)
            return Message(record_dict(messages.introduction_message(own)), reply_to=message)
        if kind == MessageType.EVALUATE:
            return Message(record_dict(messages.evaluated_message(messages.Evaluated((1.0, 1), (1.0, 1), (0.0, 0)))), reply_to=message)
        ranks = messages.order(message.content).ranks
        count = sum(rank * (m + n) for rank, (m, n) in zip(ranks, SHAPES.values(), strict=True))
        rows = to_array(0.01 * torch.randn(count, generator=torch.Generator().manual_seed(node)))
        self.uploads += len(rows.data)
        reply = Reply(ranks, LocalResult(1, 1, 10, 1.0, 0.9), (0.0, 0.0))
        return Message(record_dict(messages.reply_message(reply, {"rows": rows})), reply_to=message)


def main() -> int:
    clients = int(sys.argv[1])
    TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as Flower sets it in the process of an app
    grid = MadeUp(clients)
    with tempfile.TemporaryDirectory() as folder:
        output = str(Path(folder) / "run")
        cfg = Config(ranks=RANKS, clients_per_round=clients, rounds=1, output=output, device="cpu", save_clients=False, train="adapters", eval_every=1)
        strategy = HetLora(cfg, Base("made up", SHAPES, 1, "same"), Waiting(min_clients=clients, join_timeout=0))
        start = time.perf_counter()
        peak = peak_extra_bytes(lambda: strategy.start(grid), torch.device("cpu"))
        seconds = time.perf_counter() - start
    print(json.dumps({"peak_extra_bytes": peak, "upload_bytes": grid.uploads, "seconds": seconds}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
