"""The words of the messages: what is asked of a client and what it answers, as records by name, checked when they are read.

A reply comes from a machine of its own. Nothing of it is believed: a value that is missing, of another type or out of range is named, and the reply refused.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from hetlora.client import LocalResult
from hetlora.deployed.exchange import Order, Reply
from hetlora.deployed.wire import Arrays, Received
from hetlora.errors import ConfigError

ARRAYS, CONFIG, METRICS = "arrays", "config", "metrics"
NAME_LENGTH, REASON_LENGTH = 200, 1000

Sent = dict[str, dict[str, Any]]
"""A message as it is handed to an engine: of the records ARRAYS (`wire.Arrays`), CONFIG and METRICS those that it has."""


class Content(Protocol):
    """A message as an engine hands it over, as Flower's `RecordDict`: the arrays, settings and numbers of it, each by the name of its record."""

    @property
    def array_records(self) -> Mapping[str, Mapping[str, Received]]: ...
    @property
    def config_records(self) -> Mapping[str, Mapping[str, Any]]: ...
    @property
    def metric_records(self) -> Mapping[str, Mapping[str, Any]]: ...


@dataclass(frozen=True)
class Introduction:
    """What a node says of itself before it takes part.

    client: its name.   sequences: of its training text.   modules: digest of the names and widths of the modules that carry its adapters.
    base: digest of what of its base model does not depend on how it is quantised.   capability: its number for `ranks = column:...`, NaN where it has none.
    device_rank, step_seconds: what its device measured for `ranks = capability:...` (`ranks.Device`); 0 and NaN where it is not asked, or could not.
    unmeasured: why it could not; '' else.
    version: of hetlora.
    """

    client: str
    sequences: int
    modules: str
    base: str
    capability: float
    device_rank: int
    step_seconds: float
    unmeasured: str
    version: str


@dataclass(frozen=True)
class Evaluated:
    """Summed losses (nats) and predicted tokens of a client's own text: under the whole bank, and under what it receives of it.

    train: the second, of its training text; no tokens where the run does not ask.
    """

    whole: tuple[float, int]
    own: tuple[float, int]
    train: tuple[float, int]


def question(measure: bool) -> Sent:
    """Who are you?   measure: the run has not begun, so that it may grant a rank by what the device measures."""
    return {CONFIG: {"measure": measure}}


def measure_wanted(content: Content) -> bool:
    value = _value(_config(content), "measure")
    if not isinstance(value, bool):
        raise ConfigError(f"measure: expected true or false, got {str(value)[:40]}")
    return value


def introduction(content: Content) -> Introduction:
    values = _config(content)
    found = Introduction(
        _text(values, "client", NAME_LENGTH),
        _whole(values, "sequences", 1),
        _text(values, "modules", 64),
        _text(values, "base", 64),
        _number(values, "capability", finite=False),
        _whole(values, "device_rank", 0),
        _number(values, "step_seconds", finite=False),
        _text(values, "unmeasured", REASON_LENGTH, least=0),
        _text(values, "version", 40),
    )
    if not found.client.strip() or not found.client.isprintable():
        raise ConfigError(f"client: expected a printable name, got {found.client!r}")
    if not found.unmeasured.isprintable():
        raise ConfigError(f"unmeasured: expected printable text, got {found.unmeasured[:40]!r}")
    return found


def introduction_message(own: Introduction) -> Sent:
    return {CONFIG: asdict(own)}


def order_message(order: Order, arrays: Arrays) -> Sent:
    return {ARRAYS: arrays, CONFIG: asdict(order)}


def order(content: Content) -> Order:
    values = _config(content)
    return Order(
        _text(values, "name", NAME_LENGTH),
        _whole(values, "number", 0),
        _number(values, "lr"),
        _wholes(values, "ranks"),
        _whole(values, "r_min", 0),
        _whole(values, "r_max", 0),
        _wholes(values, "fleet"),
        _whole(values, "place", 0),
    )


def reply_message(reply: Reply, arrays: Arrays) -> Sent:
    metrics = {**asdict(reply.result), "tail_before": reply.tails[0], "tail_after": reply.tails[1]}
    return {ARRAYS: arrays, METRICS: metrics, CONFIG: {"ranks": reply.ranks}}


def reply(content: Content, modules: int) -> Reply:
    values = _metrics(content)
    ranks = _wholes(_config(content), "ranks")
    if len(ranks) != modules:
        raise ConfigError(f"ranks: expected one for each of {modules} modules, got {len(ranks)}")
    losses = [_number(values, name, finite=False) for name in ("loss_first", "loss_last")]
    result = LocalResult(*(_whole(values, name, 1) for name in ("steps", "sequences", "tokens")), *losses)
    return Reply(ranks, result, (_number(values, "tail_before"), _number(values, "tail_after")))


def evaluated_message(found: Evaluated) -> Sent:
    return {METRICS: {f"{name}_{what}": value for name, pair in asdict(found).items() for what, value in zip(("loss", "tokens"), pair, strict=True)}}


def evaluated(content: Content) -> Evaluated:
    values = _metrics(content)
    return Evaluated(*(_summed_loss(values, name) for name in ("whole", "own", "train")))


# ---------------------------------------------------------------- reading


def _config(content: Content) -> Mapping[str, Any]:
    if CONFIG not in content.config_records:
        raise ConfigError(f"expected the record {CONFIG!r}, got {_names(content)}")
    return content.config_records[CONFIG]


def _metrics(content: Content) -> Mapping[str, Any]:
    if METRICS not in content.metric_records:
        raise ConfigError(f"expected the record {METRICS!r}, got {_names(content)}")
    return content.metric_records[METRICS]


def _names(content: Content) -> list[str]:
    return sorted(str(name)[:40] for records in (content.array_records, content.config_records, content.metric_records) for name in records)[:5]


def _value(values: Mapping[str, Any], name: str) -> Any:
    if name not in values:
        raise ConfigError(f"{name}: missing")
    return values[name]


def _text(values: Mapping[str, Any], name: str, longest: int, least: int = 1) -> str:
    value = _value(values, name)
    if not isinstance(value, str) or not least <= len(value) <= longest:
        raise ConfigError(f"{name}: expected text of {least} to {longest} characters, got {str(value)[:40]!r}")
    return value


def _whole(values: Mapping[str, Any], name: str, least: int) -> int:
    value = _value(values, name)
    if type(value) is not int or not least <= value < 2**53:
        raise ConfigError(f"{name}: expected a whole number >= {least}, got {str(value)[:40]}")
    return value


def _wholes(values: Mapping[str, Any], name: str) -> list[int]:
    value = _value(values, name)
    if not isinstance(value, list) or not value or not all(type(entry) is int and 0 <= entry < 2**31 for entry in value):
        raise ConfigError(f"{name}: expected whole numbers >= 0, got {str(value)[:40]}")
    return value


def _summed_loss(values: Mapping[str, Any], name: str) -> tuple[float, int]:
    """A cross entropy is not below 0, and 0 without tokens."""
    loss, tokens = _number(values, f"{name}_loss"), _whole(values, f"{name}_tokens", 0)
    if loss < 0 or (loss and not tokens):
        raise ConfigError(f"{name}_loss: expected a sum over {tokens} tokens, at least 0, got {loss:g}")
    return loss, tokens


def _number(values: Mapping[str, Any], name: str, finite: bool = True) -> float:
    value = _value(values, name)
    if type(value) not in (int, float) or (finite and not math.isfinite(value)):
        raise ConfigError(f"{name}: expected a{' finite' if finite else ''} number, got {str(value)[:40]}")
    return float(value)
