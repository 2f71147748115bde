"""Flower's grid in one process: a message is pushed by calling the client's app, through bytes as on the wire."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity

TaskIdentity.task_id = TaskIdentity.run_id = TaskIdentity.node_id = 1  # as Flower sets it in the process of an app


class LocalGrid(Grid):
    """Nodes 1, 2, ...: an app and its node configuration each.   spoil(node, message, reply) may change or lose (None) what a node answers."""

    def __init__(self, app: ClientApp, run_config: dict[str, Any], nodes: list[dict[str, Any]], spoil: Callable[..., Any] | None = None) -> None:
        self.app, self.run_config, self.spoil = app, run_config, spoil
        self.nodes = {11 + i: config for i, config in enumerate(nodes)}
        self.asked: list[tuple[int, str]] = []
        self.sent_objects: set[int] = set()

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        raise NotImplementedError

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        raise NotImplementedError

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        replies = []
        for message in messages:
            message.metadata.__dict__["_message_id"] = f"message {len(self.asked)}"  # as Flower's own grid numbers what it sends
            node = int(message.metadata.dst_node_id)
            self.asked.append((node, message.metadata.message_type))
            if node not in self.nodes:
                continue
            context = Context(1, node, self.nodes[node], RecordDict(), self.run_config)
            try:
                reply = self.app(message, context)
            except Exception as error:  # as Flower answers for an app that fails
                reply = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)
            reply = self.spoil(node, message, reply) if self.spoil else reply
            if reply is not None:
                replies.append(reply)
        return list(reversed(replies))  # in no order that may matter
