"""A run as lines of JSON, for scripts: one object a line, `event` says what it is."""

from __future__ import annotations

import json
import math
import sys
from typing import Any

from hetlora.config import Config
from hetlora.observer import Observer


def plain(value: Any) -> Any:
    """`value` as every JSON parser reads it: numbers that are infinite or not a number become text."""
    if isinstance(value, dict):
        return {str(key): plain(own) for key, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(own) for own in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def print_line(event: str, **content: Any) -> None:
    """One object on standard output, at once."""
    sys.stdout.write(json.dumps({"event": event, **plain(content)}, default=str) + "\n")
    sys.stdout.flush()


class JsonObserver(Observer):
    """Prints `message`, `start`, `round`, `cell` and `summary` events. A round's `record` is its line of rounds.jsonl; `summary` is summary.json.

    `cfg` is the run's config once it has started.
    """

    def __init__(self) -> None:
        self.cfg: Config | None = None

    def message(self, text: str) -> None:
        print_line("message", text=text)

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        self.cfg = cfg
        print_line("start", info=info, config=cfg.model_dump())

    def round_end(self, record: dict[str, Any]) -> None:
        print_line("round", record=record)

    def cell(self, label: str, done: int, total: int, summary: dict[str, Any] | None) -> None:
        print_line("cell", label=label, done=done, total=total, found=summary is None)

    def finish(self, summary: dict[str, Any]) -> None:
        print_line("summary", summary=summary)


class SilentObserver(Observer):
    """Shows nothing. `cfg` is the run's config once it has started."""

    def __init__(self) -> None:
        self.cfg: Config | None = None

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        self.cfg = cfg
