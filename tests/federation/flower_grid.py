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
        self.replies: dict[str, Message] = {}
        self.most_held = 0  # replies that one call gave
        self.states: dict[int, RecordDict] = {}  # which a node keeps between the messages of a run

    def set_run(self, run: Any) -> None: ...

    @property
    def run(self) -> Any:
        raise NotImplementedError

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        raise NotImplementedError

    def get_node_ids(self) -> Iterable[int]:
        return list(self.nodes)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str | None]:
        """Their numbers, as Flower's own grid gives them to what it sends; None for a node that is not there."""
        numbers: list[str | None] = []
        for message in messages:
            number = f"message {len(self.asked)}"
            message.metadata.__dict__["_message_id"] = number
            node = int(message.metadata.dst_node_id)
            self.asked.append((node, message.metadata.message_type))
            if node not in self.nodes:
                numbers.append(None)
                continue
            numbers.append(number)
            context = Context(1, node, self.nodes[node], self.states.setdefault(node, RecordDict()), self.run_config)
            try:
                reply = self.app(message, context)
            except Exception as error:  # as Flower answers for an app that fails
                reply = Message(Error(0, f"{type(error).__name__}: {error}"), reply_to=message)
            reply = self.spoil(node, message, reply) if self.spoil else reply
            if reply is not None:
                self.replies[number] = reply
        return numbers

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """What was answered to them, in no order that may matter."""
        found = [self.replies.pop(number) for number in message_ids if number in self.replies]
        self.most_held = max(self.most_held, len(found))
        return found[::-1]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> Iterable[Message]:
        return self.pull_messages([number for number in self.push_messages(messages) if number])


class Clock:
    """In the place of `time`: what sleeps is there at once."""

    now = BOOTED = 1e6  # a machine that has been up for long

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
