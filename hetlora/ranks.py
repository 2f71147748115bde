"""Which rank each client has: drawn, listed, read from a file or mapped from a capability or a device; and the rank that a pruning client keeps.

Inside the package the ranks of a client have one shape, {module: rank}. A run that prunes whole clients has the same rank in every module.
"""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

from hetlora.errors import ConfigError
from hetlora.seeds import host_generator
from hetlora.text_files import read_text

POWER_LAW_EXPONENT = 0.1
ClientRanks = dict[str, int]  # {module: rank} of one client, in the order of the model
Scope = Literal["client", "module"]


@dataclass(frozen=True)
class StartingRanks:
    """Ranks at the start: r_min and r_max bound pruning and size the bank; `ranks` are {client: rank}."""

    r_min: int
    r_max: int
    ranks: dict[str, int]


@dataclass(frozen=True)
class Device:
    """What a client's device measured of itself.   rank: the largest of the run's that its memory holds.   seconds: of a training step at the least rank."""

    rank: int
    seconds: float


class Member(Protocol):
    """What a rule must know of a client."""

    @property
    def name(self) -> str: ...

    @property
    def capability(self) -> float | None: ...

    @property
    def sequences(self) -> int: ...

    @property
    def device(self) -> Device | None: ...


# ---------------------------------------------------------------- rules: the setting `ranks`, parsed


@dataclass(frozen=True)
class PowerLaw:
    """r = round(MIN + (MAX - MIN) u^(1/A)), u uniform on [0, 1], drawn once from the run's seed in name order."""

    low: int
    high: int
    exponent: float

    def assign(self, clients: Sequence[Member], seed: int) -> StartingRanks:
        draw = host_generator(seed, "ranks")
        ranks = {client.name: round(self.low + (self.high - self.low) * draw.random() ** (1 / self.exponent)) for client in clients}
        return StartingRanks(self.low, self.high, ranks)


@dataclass(frozen=True)
class Dealt:
    """The quantiles of the power law, r = round(MIN + (MAX - MIN) u^(1/A)) at u = (i + 1/2) / K: the same K ranks in every run, dealt out by its seed."""

    low: int
    high: int
    exponent: float

    def quantiles(self, count: int) -> list[int]:
        return [round(self.low + (self.high - self.low) * ((i + 0.5) / count) ** (1 / self.exponent)) for i in range(count)]

    def assign(self, clients: Sequence[Member], seed: int) -> StartingRanks:
        ranks = self.quantiles(len(clients))
        host_generator(seed, "ranks").shuffle(ranks)
        return StartingRanks(self.low, self.high, {client.name: rank for client, rank in zip(clients, ranks, strict=True)})


@dataclass(frozen=True)
class Sized(Dealt):
    """The same quantiles, in the order of the clients' training text: the largest rank to the client with most sequences, the same in every run."""

    def assign(self, clients: Sequence[Member], seed: int) -> StartingRanks:
        by_size = sorted(clients, key=lambda client: (client.sequences, client.name))
        ranks = {client.name: rank for client, rank in zip(by_size, self.quantiles(len(clients)), strict=True)}
        return StartingRanks(self.low, self.high, {client.name: ranks[client.name] for client in clients})


@dataclass(frozen=True)
class Fixed:
    """One rank for all."""

    rank: int

    def assign(self, clients: Sequence[Member], seed: int) -> StartingRanks:
        return StartingRanks(self.rank, self.rank, {client.name: self.rank for client in clients})


@dataclass(frozen=True)
class Listed:
    """One rank per client, by name order."""

    values: tuple[int, ...]

    def assign(self, clients: Sequence[Member], seed: int) -> StartingRanks:
        if len(self.values) != len(clients):
            raise ConfigError(f"ranks: expected {len(clients)} ranks, one per training client by name order, got {len(self.values)}")
        return StartingRanks(min(self.values), max(self.values), {client.name: rank for client, rank in zip(clients, self.values, strict=True)})


@dataclass(frozen=True)
class RankFile:
    """A JSON or CSV file client -> rank."""

    path: Path

    def table(self) -> dict[str, Any]:
        """What the file says, as text or numbers; `ConfigError` where it cannot be read."""
        path = self.path
        try:
            text = read_text(path, "ranks file")
            if path.suffix.lower() == ".json":
                table = json.loads(text, object_pairs_hook=lambda pairs: _unique(pairs, path))
            else:
                rows = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
                table = _unique([(row[0].strip(), row[1].strip()) for row in rows if row[:2] != ["client", "rank"]], path)
        except ConfigError:
            raise
        except (ValueError, IndexError, RecursionError, csv.Error):
            raise ConfigError(f"ranks file {path}: expected JSON {{client: rank}} or CSV lines 'client,rank'") from None
        if not isinstance(table, dict):
            raise ConfigError(f"ranks file {path}: expected {{client: rank}}, got {type(table).__name__}")
        return table

    def assign(self, clients: Sequence[Member], seed: int) -> StartingRanks:
        table = self.table()
        missing = [client.name for client in clients if client.name not in table]
        if missing:
            raise ConfigError(f"ranks file {self.path}: no rank for {len(missing)} of {len(clients)} clients: {missing[:5]}; add them")
        ranks = {}
        for client in clients:
            try:
                ranks[client.name] = int(str(table[client.name]))
            except ValueError:
                raise ConfigError(f"ranks file {self.path}: expected a whole number for {client.name!r}, got {table[client.name]!r}") from None
        for name, rank in ranks.items():
            if rank < 1:
                raise ConfigError(f"ranks file {self.path}: expected ranks >= 1, got {rank} for client {name!r}")
        return StartingRanks(min(ranks.values()), max(ranks.values()), ranks)


@dataclass(frozen=True)
class Column:
    """Linear in the clients' capability, the column `field` of the data."""

    spec: str
    field: str
    low: int
    high: int

    def assign(self, clients: Sequence[Member], seed: int) -> StartingRanks:
        known = {client.name: client.capability for client in clients if client.capability is not None}
        missing = [client.name for client in clients if client.name not in known]
        if missing:
            raise ConfigError(
                f"ranks: {self.spec!r} needs the column {self.field!r} in the data; it is missing for {missing[:5]}; use JSONL or hub data that has it"
            )
        for name, value in known.items():
            if not abs(value) < 2.0**1000:  # NaN neither; no difference of two overflows
                raise ConfigError(f"ranks: {self.spec!r}: expected a finite number for client {name!r}, 1e301 at most, got {value}; correct its {self.field!r}")
        least = min(known.values())
        span = (max(known.values()) - least) or 1.0
        return StartingRanks(self.low, self.high, {name: round(self.low + (self.high - self.low) * (value - least) / span) for name, value in known.items()})


@dataclass(frozen=True)
class Capability:
    """By what the clients' devices measured: r_k = min(h_k, max(MIN, floor(MAX min(1, T / t_k)))).

    h_k: the largest rank that the memory of client k holds, MAX at most.   t_k: seconds that a training step takes it.
    T: `seconds`, or the upper median of all t_k where it is None: one client would move a mean of two as far as it likes. So rank times seconds is the same
    for all that are slower than T, until MIN ends it.
    """

    spec: str
    low: int
    high: int
    seconds: float | None

    def check(self, client: Member) -> Device:
        """What the client measured; `ConfigError` where that is no measure, or too little for the least rank."""
        device = client.device
        if device is None:
            raise self.unmeasured(f"client {client.name!r}")
        if not 0 < device.seconds < math.inf:
            raise ConfigError(f"client {client.name!r} says that a step takes {device.seconds} s; expected a finite number above 0; start its node again")
        if device.rank < self.low:
            raise ConfigError(f"client {client.name!r} holds rank {device.rank}, and the least of {self.spec!r} is {self.low}; lower MIN")
        return device

    def unmeasured(self, who: str) -> ConfigError:
        return ConfigError(
            f"ranks: {self.spec!r} is by what devices measure when they join a Flower deployment, and {who} measured nothing; "
            f"in a simulation use 'column:FIELD:{self.low}:{self.high}', a list or a file"
        )

    def pace(self, clients: Sequence[Member]) -> float:
        """T."""
        return self.seconds or statistics.median_high(self.check(client).seconds for client in clients)

    def assign(self, clients: Sequence[Member], seed: int) -> StartingRanks:
        pace = self.pace(clients)
        return StartingRanks(self.low, self.high, {client.name: self._rank(self.check(client), pace) for client in clients})

    def _rank(self, device: Device, pace: float) -> int:
        kept_up = self.high if device.seconds <= pace else int(self.high * (pace / device.seconds))
        return min(device.rank, self.high, max(self.low, kept_up))

    def told(self, clients: Sequence[Member], ranks: Mapping[str, int]) -> list[str]:
        """The mapping, in words: T, and a line for each client."""
        source = "as given" if self.seconds else f"the median of {len(clients)} clients"
        return [
            f"ranks by what devices measured: {self.high} rows where a step takes {self.pace(clients):.3g} s ({source}) or less, fewer in proportion",
            *(f"device of {client.name}: {device_text(self.check(client))}; rank {ranks[client.name]}" for client in clients),
        ]


def device_text(device: Device) -> str:
    return f"memory for rank {device.rank}, {device.seconds:.3g} s a step"


RankRule = PowerLaw | Dealt | Sized | Fixed | Listed | RankFile | Column | Capability
FROM_DATA = (Sized, Column)
"""Rules by which the data of one client decide ranks of the others too."""


def parse_ranks(spec: str) -> RankRule:
    """The rule that the setting `ranks` stands for; no file is read yet.

    spec: 'powerlaw:MIN:MAX[:A]' with A = 0.1 by default; 'dealt:MIN:MAX[:A]': its quantiles, dealt out by the seed; 'sized:MIN:MAX[:A]': its quantiles, by
    the amount of training text; 'fixed:R': R for all; a comma-separated list; a JSON or CSV file client -> rank; 'column:FIELD:MIN:MAX';
    'capability:MIN:MAX[:SECONDS]': by what devices measure.
    Raises `ConfigError` naming what is wrong.
    """
    kind, _, rest = spec.partition(":")
    if kind in _PARSERS:
        return _PARSERS[kind](spec, rest)
    if Path(spec).suffix.lower() in (".json", ".csv"):
        return RankFile(Path(spec))
    try:
        values = tuple(int(part) for part in spec.split(","))
    except ValueError:
        raise ConfigError(
            "ranks: expected 'powerlaw:MIN:MAX', 'dealt:MIN:MAX', 'sized:MIN:MAX', 'fixed:R', a comma-separated list, a .json or .csv file, "
            f"'column:FIELD:MIN:MAX' or 'capability:MIN:MAX', got {spec!r}"
        ) from None
    if min(values) < 1:
        raise ConfigError(f"ranks: expected ranks >= 1, got {min(values)} in {spec!r}")
    return Listed(values)


def _parse_power_law(spec: str, rest: str) -> PowerLaw:
    return PowerLaw(*_law(spec, rest))


def _parse_dealt(spec: str, rest: str) -> Dealt:
    return Dealt(*_law(spec, rest))


def _parse_sized(spec: str, rest: str) -> Sized:
    return Sized(*_law(spec, rest))


def _law(spec: str, rest: str) -> tuple[int, int, float]:
    """MIN, MAX and A of 'KIND:MIN:MAX[:A]'."""
    kind, parts = spec.partition(":")[0], rest.split(":")
    if len(parts) not in (2, 3):
        raise ConfigError(f"ranks: expected '{kind}:MIN:MAX' or '{kind}:MIN:MAX:A', got {spec!r}")
    low, high = _bounds(spec, parts[0], parts[1])
    try:
        exponent = float(parts[2]) if len(parts) == 3 else POWER_LAW_EXPONENT
    except ValueError:
        exponent = 0.0
    if not 0 < exponent < float("inf"):
        raise ConfigError(f"ranks: expected a number A > 0 in '{kind}:MIN:MAX:A', got {spec!r}")
    return low, high, exponent


def _parse_fixed(spec: str, rest: str) -> Fixed:
    if not rest.isdecimal() or int(rest) < 1:
        raise ConfigError(f"ranks: expected 'fixed:R' with a whole number R >= 1, got {spec!r}")
    return Fixed(int(rest))


def _parse_column(spec: str, rest: str) -> Column:
    field, *bounds = rest.rsplit(":", 2)
    if len(bounds) != 2 or not field:
        raise ConfigError(f"ranks: expected 'column:FIELD:MIN:MAX', got {spec!r}")
    return Column(spec, field, *_bounds(spec, *bounds))


def _parse_capability(spec: str, rest: str) -> Capability:
    parts = rest.split(":")
    if len(parts) not in (2, 3):
        raise ConfigError(f"ranks: expected 'capability:MIN:MAX' or 'capability:MIN:MAX:SECONDS', got {spec!r}")
    low, high = _bounds(spec, parts[0], parts[1])
    try:
        seconds = float(parts[2]) if len(parts) == 3 else None
    except ValueError:
        seconds = math.nan
    if seconds is not None and not 0 < seconds < math.inf:
        raise ConfigError(f"ranks: expected SECONDS > 0 of a step in 'capability:MIN:MAX:SECONDS', got {spec!r}")
    return Capability(spec, low, high, seconds)


_PARSERS: dict[str, Callable[[str, str], RankRule]] = {
    "powerlaw": _parse_power_law,
    "dealt": _parse_dealt,
    "sized": _parse_sized,
    "fixed": _parse_fixed,
    "column": _parse_column,
    "capability": _parse_capability,
}


def _bounds(spec: str, low: str, high: str) -> tuple[int, int]:
    try:
        bounds = int(low), int(high)
    except ValueError:
        raise ConfigError(f"ranks: expected whole numbers MIN and MAX, got {spec!r}") from None
    if not 1 <= bounds[0] <= bounds[1]:
        raise ConfigError(f"ranks: expected 1 <= MIN <= MAX, got {spec!r}")
    return bounds


def _unique(pairs: Sequence[tuple[str, object]], path: Path) -> dict[str, object]:
    table: dict[str, object] = {}
    for name, rank in pairs:
        if name in table:
            raise ConfigError(f"ranks file {path}: client {name!r} has two ranks, {table[name]} and {rank}; keep one")
        table[name] = rank
    return table


# ---------------------------------------------------------------- ranks of a run


def check_width(starting: StartingRanks, shapes: Mapping[str, tuple[int, int]]) -> None:
    """`ConfigError` when the largest rank exceeds the width of a target module: such rank rows could only repeat each other."""
    name, width = min(((name, min(shape)) for name, shape in shapes.items()), key=lambda item: item[1])
    if starting.r_max > width:
        raise ConfigError(f"ranks: rank {starting.r_max} is above the width {width} of module {name!r}; lower the largest rank or choose other target modules")


@cache
def kept_rank(rank: int, gamma: float, r_min: int) -> int:
    """q = max(r_min, floor(gamma * r)), the first row of the tail, exact in decimal; never above `rank` (HETLORA section 3.2)."""
    exact = Fraction(str(gamma)) * rank
    return min(rank, max(r_min, exact.numerator // exact.denominator))


def tail_start(ranks: ClientRanks, gamma: float, r_min: int) -> ClientRanks:
    """q of each module of a client: the first row of its tail."""
    return {module: kept_rank(rank, gamma, r_min) for module, rank in ranks.items()}


def bank_ranks(ranks: Sequence[ClientRanks], modules: Sequence[str] | Mapping[str, Any]) -> dict[str, list[int]]:
    """{module: one rank per client}, as `AdapterBank` takes them."""
    return {module: [own[module] for own in ranks] for module in modules}


def mean_rank(ranks: ClientRanks) -> float:
    return sum(ranks.values()) / len(ranks)


def from_record(saved: Any, scope: Scope, modules: Mapping[str, Any]) -> ClientRanks:
    """Ranks of a client from a checkpoint: one number for all modules where the scope is 'client', else {module: rank}."""
    return dict.fromkeys(modules, saved) if scope == "client" else dict(saved)


def to_record(ranks: ClientRanks, scope: Scope) -> int | dict[str, int]:
    """The form of `from_record`, also that of `Result.ranks`."""
    return next(iter(ranks.values())) if scope == "client" else dict(ranks)
