"""The events of a run as lines of an engine's log."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hetlora.config import Config
from hetlora.observer import Observer
from hetlora.report.text import round_line


class LogObserver(Observer):
    """Gives each event to `say` as one line."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say

    def message(self, text: str) -> None:
        self._say(text)

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        self._rounds = cfg.rounds
        for name, value in info.items():
            self._say(f"{name.replace('_', ' ')}: {value}")

    def round_start(self, round: int, total: int, names: list[str]) -> None:
        self._say(f"round {round} of {total}: {', '.join(names)}")

    def round_end(self, record: dict[str, Any]) -> None:
        self._say(round_line(record, self._rounds))
