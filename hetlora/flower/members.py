"""The clients behind Flower's grid. A node has a new number when it comes back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from flwr.app import Message, MessageType
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid

from hetlora.deployed import members, messages
from hetlora.deployed.local import Base
from hetlora.deployed.settings import Waiting
from hetlora.errors import ConfigError
from hetlora.flower.records import record_dict
from hetlora.flower.replies import replies_to, send
from hetlora.ranks import RankRule


class Members(members.Members):
    """The clients behind `grid`."""

    def __init__(self, grid: Grid, base: Base, rule: RankRule, waiting: Waiting, folder: Path, say: Callable[[str], None]) -> None:
        super().__init__(base, rule, waiting, folder, say)
        self.grid = grid
        self._known: set[int] = set()  # nodes that were asked who they are

    def _look(self, new: bool) -> list[str]:
        nodes = list(self.grid.get_node_ids())
        for member in self.of.values():
            if member.node not in nodes:
                member.node = None
        if asked := [Message(record_dict(messages.question(measure=new)), node, MessageType.QUERY) for node in nodes if node not in self._known]:
            numbers = send(self.grid, asked)
            node_of = {number: int(message.metadata.dst_node_id) for number, message in zip(numbers, asked, strict=True)}
            answers = replies_to(self.grid, numbers, self.waiting.join_timeout)
            for message in sorted(answers, key=lambda reply: int(reply.metadata.src_node_id)):
                node = int(message.metadata.src_node_id)
                if node == SUPERLINK_NODE_ID:  # in the place of a node that is gone, and is asked again when it is back
                    node = node_of.get(message.metadata.reply_to_message_id, node)
                else:
                    self._known.add(node)
                try:
                    self._meet(node, message, new)
                except ConfigError as error:
                    self.say(f"node {node} takes no part: {' '.join(str(error).split())[:500]}")
        return sorted(name for name, member in self.of.items() if member.node is not None)

    def _meet(self, node: int, message: Message, new: bool) -> None:
        if message.has_error():
            raise ConfigError(f"it failed: {message.error.reason or 'no reason given'}")
        self.meet(node, message.content, new)
