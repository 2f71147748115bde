"""docs/privacy.md names everything that a client sends."""

from __future__ import annotations

import re
from dataclasses import fields
from pathlib import Path

import pytest

pytest.importorskip("flwr", reason="Flower is not installed (pip install '.[flower]')")

from hetlora.client import LocalResult
from hetlora.deployed import messages
from hetlora.deployed.exchange import Reply

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "privacy.md").read_text(encoding="utf-8")


def listed(heading: str) -> set[str]:
    """The names before the colon of each item of the list under a heading."""
    part = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    return {name for line in part.splitlines() if line.startswith("- `") for name in re.findall(r"`(\w+)`", line.split(": ")[0])}


def test_all_that_travels_is_listed():
    assert listed("When a node joins") == {field.name for field in fields(messages.Introduction)}
    assert listed("In an evaluation") == {field.name for field in fields(messages.Evaluated)}
    sent = messages.reply_message(Reply([1, 2], LocalResult(1, 2, 3, 4.0, 5.0), (0.0, 0.0)), {})
    assert set(sent) == {messages.ARRAYS, messages.METRICS, messages.CONFIG}
    assert listed("In a round") == {*sent[messages.METRICS], *sent[messages.CONFIG]}
