"""Messages of `hetlora.deployed` as Flower's records."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from hetlora.deployed import messages
from hetlora.deployed.messages import Sent
from hetlora.deployed.wire import Arrays


def record_dict(sent: Sent) -> RecordDict:
    makers: dict[str, Callable[[Any], Any]] = {messages.ARRAYS: array_record, messages.CONFIG: ConfigRecord, messages.METRICS: MetricRecord}
    return RecordDict({name: makers[name](values) for name, values in sent.items()})


def array_record(arrays: Arrays) -> ArrayRecord:
    """The bytes are not copied."""
    return ArrayRecord({name: Array(*array) for name, array in arrays.items()})


def array_records(everyone: Sequence[Arrays]) -> list[ArrayRecord]:
    """One for each client. Arrays and records that are one object stay one, which Flower hashes, stores and sends once."""
    made: dict[int, Array] = {}
    records: dict[int, ArrayRecord] = {}
    for arrays in everyone:
        for array in arrays.values():
            made.setdefault(id(array), Array(*array))
        records.setdefault(id(arrays), ArrayRecord({name: made[id(array)] for name, array in arrays.items()}))
    return [records[id(arrays)] for arrays in everyone]
