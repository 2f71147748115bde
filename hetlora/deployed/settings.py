"""A run's settings out of an engine's: the run configuration, and on a client its node's own configuration before it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from hetlora.compare.methods import default_method, left_out, method_settings
from hetlora.config import Config, ConfigError
from hetlora.errors import nearest

OF_A_NODE = ("model", "data", "dtype", "device", "quantize", "max_tokens_per_step", "padding_free", "gradient_checkpointing")
"""Settings of a run that a node may have otherwise: where its files lie, and how its machine computes."""


@dataclass(frozen=True)
class Waiting:
    """How long the server waits.

    min_clients: clients that must have joined before the first round.   join_timeout: seconds it waits for them.
    round_timeout: seconds it waits for the replies of a round; who has not replied is left out of the round, and what comes later is not used. With secure
    aggregation a round has four stages, each with as many seconds.
    resume: continue the run in `output`.

    >>> from hetlora.flower import Waiting
    >>> Waiting(min_clients=3)
    Waiting(min_clients=3, join_timeout=600.0, round_timeout=3600.0, resume=False)
    """

    min_clients: int = 2
    join_timeout: float = 600.0
    round_timeout: float = 3600.0
    resume: bool = False


@dataclass(frozen=True)
class Node:
    """Who a node is.   client: its name; '' = the only client of its data, or the one at place `partition_id` by name order."""

    client: str = ""
    partition_id: int | None = None


def server_settings(run_config: Mapping[str, Any]) -> tuple[Config, Waiting]:
    """Settings of `Config`, `method`, and `Waiting` by their names, with '-' or '_'; `ConfigError` for others."""
    values = _underscored(run_config)
    waiting = {name: values.pop(name) for name in list(values) if name in Waiting.__dataclass_fields__}
    if "min_clients" in waiting and (type(waiting["min_clients"]) is not int or waiting["min_clients"] < 1):
        raise ConfigError(f"run config: min_clients: expected a number >= 1, got {waiting['min_clients']!r}")
    if "resume" in waiting and not isinstance(waiting["resume"], bool):
        raise ConfigError(f"run config: resume: expected true or false, got {waiting['resume']!r}")
    for name, zero in (("join_timeout", True), ("round_timeout", False)):
        if name in waiting:
            waiting[name] = seconds(f"run config: {name}", waiting[name], zero)
    cfg = Config.create("run config", **_of_a_method(values))
    if cfg.cuda_graph:
        raise ConfigError("run config: cuda_graph = True: records the step of a cohort, and deployed clients train one at a time; leave it out")
    if cfg.clients_at_once:
        raise ConfigError(f"run config: clients_at_once = {cfg.clients_at_once}: of a cohort, and deployed clients train one at a time; leave it out")
    return cfg, Waiting(**waiting)


def seconds(name: str, value: Any, zero: bool = False) -> float:
    """`value`, where it is a finite number above 0, or 0 where `zero` may be; else `ConfigError`."""
    if type(value) not in (int, float) or not math.isfinite(value) or value < 0 or (value == 0 and not zero):
        raise ConfigError(f"{name}: expected a number of seconds {'>=' if zero else '>'} 0, got {value!r}")
    return float(value)


def client_settings(run_config: Mapping[str, Any], node_config: Mapping[str, Any]) -> tuple[Config, Node]:
    """The run's settings on a node, its own first, and who it is; `ConfigError` for what a node has no say in."""
    values = {name: value for name, value in _underscored(run_config).items() if name not in Waiting.__dataclass_fields__}
    own = _underscored(node_config)
    node = Node(str(own.pop("client", "")), own.pop("partition_id", None))
    own.pop("num_partitions", None)  # Flower's simulation gives it to every node
    if unknown := [name for name in own if name not in OF_A_NODE]:
        known = ["client", "partition_id", *OF_A_NODE]
        raise ConfigError(f"node config: {unknown[0]!r} is not a node's to set{nearest(unknown[0], known)}; a node has {', '.join(known)}")
    if node.partition_id is not None and (not isinstance(node.partition_id, int) or node.partition_id < 0):
        raise ConfigError(f"node config: partition_id: expected a whole number >= 0, got {node.partition_id!r}")
    return Config.create("run config and node config", **{**_of_a_method(values), **own}), node


def _of_a_method(values: dict[str, Any]) -> dict[str, Any]:
    """The settings with the row of their `method`, or of the default one, as `hetlora run` takes them."""
    alone = {"cobatch": False} if values.get("dp_noise_multiplier") else {}  # as every node trains; differential privacy asks for it by name
    values = {**alone, **values}
    name = values.pop("method", None)
    if name is None:
        return default_method(values)[0]
    private = {"weights": values["weights"]} if values.get("dp_clipping_norm") and "weights" in values else {}  # which no method's own are bounded with
    if others := [setting for setting in left_out(name, values) if setting not in private]:
        raise ConfigError(f"run config: method = {name!r} has other values of {', '.join(others)}; leave out one or the other")
    return {**method_settings(name, values), **private}


def _underscored(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {str(name).replace("-", "_"): value for name, value in settings.items()}
