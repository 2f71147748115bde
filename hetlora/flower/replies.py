"""Messages out, replies in, one at a time: of Flower's copies the server never holds more than a few."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

from flwr.app import DEFAULT_TTL, Message
from flwr.serverapp import Grid

AT_ONCE = 16
"""Replies that one call takes from the grid, which holds them all until it returns."""

POLL = 0.02, 1.0
"""Least and most seconds between two looks for replies: a tenth of the time waited so far, so that a short round is not much longer for it."""


def lifetime(timeout: float) -> float:
    """Seconds that a message to be answered within `timeout` is good for: at least Flower's own 12 hours, beside which clocks that differ do not matter."""
    return max(DEFAULT_TTL, timeout + 60)


def send(grid: Grid, messages: Sequence[Message]) -> list[str]:
    """Flower's number of each message; '' where the SuperLink did not take it, as of a node that has left."""
    taken = set(grid.push_messages(messages))
    return [number if (number := message.metadata.message_id) in taken else "" for message in messages]


def replies_to(grid: Grid, numbers: Sequence[str], timeout: float) -> Iterator[Message]:
    """What is answered to the messages that were sent, as it comes, until all are answered or `timeout` seconds are over.

    Replies that come later stay with the SuperLink, which forgets them when the message's life ends (`lifetime`). Nobody asks for them: every round has
    messages of its own.
    """
    waiting = [number for number in numbers if number]
    begin = time.monotonic()
    while waiting:
        answered: set[str] = set()
        for start in range(0, len(waiting), AT_ONCE):
            for message in grid.pull_messages(waiting[start : start + AT_ONCE]):
                answered.add(message.metadata.reply_to_message_id)
                yield message
        waiting = [number for number in waiting if number not in answered]
        if (waited := time.monotonic() - begin) >= timeout:
            return
        if waiting:
            time.sleep(min(max(waited / 10, POLL[0]), POLL[1], timeout - waited))
