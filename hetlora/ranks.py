"""Which rank each client has: drawn, listed, read from a file or mapped from a capability; and the rank that a pruning client keeps."""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from hetlora.config import ConfigError
from hetlora.data import ClientData
from hetlora.seeds import host_generator

POWER_LAW_EXPONENT = 0.1
ClientRank = int | dict[str, int]  # one rank, or one per module when the pruning scope is 'module'


@dataclass(frozen=True)
class RankPlan:
    """Ranks at the start: r_min and r_max bound pruning and size the bank; `ranks` are {client: rank}."""

    r_min: int
    r_max: int
    ranks: dict[str, int]


def kept_rank(rank: int, gamma: float, r_min: int) -> int:
    """q = max(r_min, floor(gamma * r)), the first row of the tail, exact in decimal; never above `rank` (HETLORA section 3.2)."""
    exact = Fraction(str(gamma)) * rank
    return min(rank, max(r_min, exact.numerator // exact.denominator))


def assign_ranks(spec: str, clients: Sequence[ClientData], seed: int) -> RankPlan:
    """The starting ranks of `clients` (sorted by name).

    spec: 'powerlaw:MIN:MAX[:A]': r = round(MIN + (MAX - MIN) u^(1/A)), u uniform on [0, 1], A = 0.1 by default, drawn once from the run's
    seed in name order; 'fixed:R': R for all; a comma-separated list; a JSON or CSV file client -> rank; 'column:FIELD:MIN:MAX': linear in the
    clients' capability.
    Raises `ConfigError` naming what does not fit.
    """
    kind, _, rest = spec.partition(":")
    if kind == "powerlaw":
        return _power_law(spec, rest, clients, seed)
    if kind == "column":
        return _by_capability(spec, clients)
    if kind == "fixed":
        if not rest.isdecimal() or int(rest) < 1:
            raise ConfigError(f"ranks: expected 'fixed:R' with a whole number R >= 1, got {spec!r}")
        rank = int(rest)
        return RankPlan(rank, rank, {client.name: rank for client in clients})
    listed = Path(spec)
    if listed.suffix.lower() in (".json", ".csv"):
        ranks = _from_file(listed, clients)
    else:
        ranks = _from_list(spec, clients)
    return RankPlan(min(ranks.values()), max(ranks.values()), ranks)


def _bounds(spec: str, low: str, high: str) -> tuple[int, int]:
    try:
        bounds = int(low), int(high)
    except ValueError:
        raise ConfigError(f"ranks: expected whole numbers MIN and MAX, got {spec!r}") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise ConfigError(f"ranks: expected 1 <= MIN <= MAX, got {spec!r}")
    return bounds


def _power_law(spec: str, rest: str, clients: Sequence[ClientData], seed: int) -> RankPlan:
    parts = rest.split(":")
    if len(parts) not in (2, 3):
        raise ConfigError(f"ranks: expected 'powerlaw:MIN:MAX' or 'powerlaw:MIN:MAX:A', got {spec!r}")
    low, high = _bounds(spec, parts[0], parts[1])
    try:
        exponent = float(parts[2]) if len(parts) == 3 else POWER_LAW_EXPONENT
    except ValueError:
        exponent = 0.0
    if not 0 < exponent < float("inf"):
        raise ConfigError(f"ranks: expected a number A > 0 in 'powerlaw:MIN:MAX:A', got {spec!r}")
    draw = host_generator(seed, "ranks")
    ranks = {client.name: round(low + (high - low) * draw.random() ** (1 / exponent)) for client in clients}
    return RankPlan(low, high, ranks)


def _by_capability(spec: str, clients: Sequence[ClientData]) -> RankPlan:
    parts = spec.split(":")
    if len(parts) != 4 or not parts[1]:
        raise ConfigError(f"ranks: expected 'column:FIELD:MIN:MAX', got {spec!r}")
    low, high = _bounds(spec, parts[2], parts[3])
    values = {client.name: client.capability for client in clients}
    missing = [name for name, value in values.items() if value is None]
    if missing:
        raise ConfigError(f"ranks: {spec!r} needs the column {parts[1]!r} in the data; it is missing for {missing[:5]}; use JSONL or hub data that has it")
    least, most = min(values.values()), max(values.values())  # type: ignore[type-var]
    span = (most - least) or 1.0  # type: ignore[operator]
    return RankPlan(low, high, {name: round(low + (high - low) * (value - least) / span) for name, value in values.items()})  # type: ignore[operator]


def _from_list(spec: str, clients: Sequence[ClientData]) -> dict[str, int]:
    try:
        values = [int(part) for part in spec.split(",")]
    except ValueError:
        raise ConfigError(
            f"ranks: expected 'powerlaw:MIN:MAX', 'fixed:R', a comma-separated list, a .json or .csv file, or 'column:FIELD:MIN:MAX', got {spec!r}"
        ) from None
    if len(values) != len(clients):
        raise ConfigError(f"ranks: expected {len(clients)} ranks, one per training client by name order, got {len(values)}")
    return _positive({client.name: rank for client, rank in zip(clients, values, strict=True)}, "ranks")


def _from_file(path: Path, clients: Sequence[ClientData]) -> dict[str, int]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            table = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
        else:
            rows = [row for row in csv.reader(text.splitlines()) if row]
            table = _unique([(row[0].strip(), row[1].strip()) for row in rows if row[:2] != ["client", "rank"]], path)
    except ConfigError:
        raise
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"ranks file {path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    except (ValueError, IndexError):
        raise ConfigError(f"ranks file {path}: expected JSON {{client: rank}} or CSV lines 'client,rank'") from None
    if not isinstance(table, dict):
        raise ConfigError(f"ranks file {path}: expected {{client: rank}}, got {type(table).__name__}")
    missing = [client.name for client in clients if client.name not in table]
    if missing:
        raise ConfigError(f"ranks file {path}: no rank for {len(missing)} of {len(clients)} clients: {missing[:5]}; add them")
    ranks = {}
    for client in clients:
        try:
            ranks[client.name] = int(str(table[client.name]))
        except ValueError:
            raise ConfigError(f"ranks file {path}: expected a whole number for {client.name!r}, got {table[client.name]!r}") from None
    return _positive(ranks, f"ranks file {path}")


def _unique(pairs: Sequence[tuple[str, object]], path: Path) -> dict[str, object]:
    table: dict[str, object] = {}
    for name, rank in pairs:
        if name in table:
            raise ConfigError(f"ranks file {path}: client {name!r} has two ranks, {table[name]} and {rank}; keep one")
        table[name] = rank
    return table


def _positive(ranks: dict[str, int], source: str) -> dict[str, int]:
    for name, rank in ranks.items():
        if rank < 1:
            raise ConfigError(f"{source}: expected ranks >= 1, got {rank} for client {name!r}")
    return ranks


def check_width(plan: RankPlan, shapes: Mapping[str, tuple[int, int]]) -> None:
    """`ConfigError` when the largest rank exceeds the width of a target module: such rank rows could only repeat each other."""
    name, width = min(((name, min(shape)) for name, shape in shapes.items()), key=lambda item: item[1])
    if plan.r_max > width:
        raise ConfigError(f"ranks: rank {plan.r_max} is above the width {width} of module {name!r}; lower the largest rank or choose other target modules")


def bank_ranks(ranks: Sequence[ClientRank], shapes: Mapping[str, tuple[int, int]]) -> list[int] | dict[str, list[int]]:
    """Ranks of several clients in the form that `AdapterBank` takes."""
    if all(isinstance(rank, int) for rank in ranks):
        return [int(rank) for rank in ranks]  # type: ignore[arg-type]
    return {module: [rank if isinstance(rank, int) else rank[module] for rank in ranks] for module in shapes}


def mean_rank(rank: ClientRank) -> float:
    return float(rank) if isinstance(rank, int) else sum(rank.values()) / len(rank)
