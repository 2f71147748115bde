"""Messages of `hetlora.deployed` as NVFLARE's models. A tensor travels as its bytes, for numpy's types have no bfloat16."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from nvflare.app_common.abstract.fl_model import FLModel, ParamsType

from hetlora.deployed import messages
from hetlora.deployed.messages import Sent
from hetlora.deployed.wire import Array
from hetlora.errors import ConfigError

KEY = "hetlora"
"""Where in a model's `meta` the words of a message stand: the records CONFIG and METRICS, and under ARRAYS the type, shape and kind of each array."""
SETTINGS = "settings"
"""The run's settings, from the server to a client."""
REFUSED = "refused"
"""Why a client did not do what it was asked, in place of records."""


@dataclass(frozen=True)
class Content:
    """A message that arrived, as `messages.Content`."""

    array_records: Mapping[str, Mapping[str, Array]]
    config_records: Mapping[str, Mapping[str, Any]]
    metric_records: Mapping[str, Mapping[str, Any]]


def to_model(sent: Sent, **more: Any) -> FLModel:
    """`params` are the arrays, {key: bytes as uint8}; `meta[KEY]` has the rest, and `more`."""
    arrays: dict[str, Array] = sent.get(messages.ARRAYS, {})
    words: dict[str, Any] = {name: dict(values) for name, values in sent.items() if name != messages.ARRAYS}
    if messages.ARRAYS in sent:
        words[messages.ARRAYS] = {key: [array.dtype, list(array.shape), array.stype] for key, array in arrays.items()}
    params = {key: np.frombuffer(array.data, np.uint8) for key, array in arrays.items()}
    return FLModel(params_type=ParamsType.FULL, params=params, meta={KEY: words | more})


def words_of(model: FLModel) -> dict[str, Any]:
    """What stands under KEY; `ConfigError` where that is no message of this project."""
    words = (model.meta or {}).get(KEY)
    if not isinstance(words, dict):
        raise ConfigError(f"expected a message with meta[{KEY!r}], got meta with {sorted(str(name)[:40] for name in model.meta or {})[:5]}")
    return words


def content_of(model: FLModel) -> Content:
    """The records of a message that arrived; `ConfigError` where they are none."""
    words = words_of(model)
    records = {name: _record(words, name) for name in (messages.CONFIG, messages.METRICS) if name in words}
    arrays = {messages.ARRAYS: _arrays(_record(words, messages.ARRAYS), model.params)} if messages.ARRAYS in words else {}
    return Content(arrays, {k: v for k, v in records.items() if k == messages.CONFIG}, {k: v for k, v in records.items() if k == messages.METRICS})


def _record(words: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    record = words[name]
    if not isinstance(record, dict) or not all(isinstance(key, str) for key in record):
        raise ConfigError(f"record {name!r}: expected values by name, got {str(record)[:40]}")
    return record


def _arrays(kinds: Mapping[str, Any], params: Any) -> dict[str, Array]:
    """The arrays that `params` holds, with the type and shape that `kinds` says; what they must be is for the reader to check."""
    if not isinstance(params, dict) or set(params) != set(kinds):
        got = sorted(str(key)[:40] for key in params)[:5] if isinstance(params, dict) else str(type(params))
        raise ConfigError(f"params: expected the arrays {sorted(key[:40] for key in kinds)[:5]}, got {got}")
    arrays = {}
    for key, kind in kinds.items():
        value = params[key]
        if not isinstance(value, np.ndarray) or value.dtype != np.uint8 or value.ndim != 1:
            raise ConfigError(f"params {key[:40]!r}: expected bytes (uint8, one dimension), got {str(getattr(value, 'dtype', type(value)))[:40]}")
        try:
            dtype, shape, stype = kind
            if not isinstance(dtype, str) or not isinstance(stype, str) or not all(type(size) is int for size in shape):
                raise TypeError
        except (TypeError, ValueError):
            raise ConfigError(f"record {messages.ARRAYS!r}, {key[:40]!r}: expected type, shape and kind, got {str(kind)[:40]}") from None
        arrays[key] = Array(dtype, tuple(shape), stype, value.tobytes())
    return arrays
