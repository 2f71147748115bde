"""The server's stages of secure aggregation: it passes keys and shares on, adds masked vectors up and takes away the masks of the sum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
from flwr.app import MetricRecord, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, public_key_to_bytes
from numpy.typing import NDArray
from torch import Tensor

from hetlora.client import LocalResult
from hetlora.config import Config, ConfigError
from hetlora.deployed import messages
from hetlora.deployed.exchange import Reply, ranks_after
from hetlora.deployed.wire import from_array, only_keys, size
from hetlora.flower import secure
from hetlora.secure_sum import fixed_point, lengths, mean
from hetlora.server import ServerState
from hetlora.training import Trained

Answers: TypeAlias = tuple[dict[int, RecordDict], dict[int, str]]
"""What clients answered, and why others did not, by their places in the round."""
Ask: TypeAlias = Callable[[str, dict[int, RecordDict]], Answers]


Orders: TypeAlias = Callable[[Sequence[int]], dict[int, RecordDict]]


def train(
    cfg: Config, state: ServerState, names: Sequence[str], number: int, ask: Ask, orders: Orders, sequences: Mapping[str, int]
) -> tuple[Trained, MetricRecord]:
    """A round of training, whose uploads are one that stands for all (`secure_sum.mean`), and what Flower keeps of it.

    ask(kind, contents): what came back of these messages.   orders: the plain orders to train.   sequences: of each client.
    """
    shapes = state.bank.shapes

    def read(place: int, content: RecordDict) -> Reply:
        reply = messages.reply(content, len(shapes))
        ranks_after(cfg, state, names[place], reply)
        return reply

    found = Round(cfg, names, number, sum(lengths(shapes, state.r_max)), ask, read).sums(orders, max(sequences.values()))
    arrived = sorted(found.arrived)
    replies = [found.arrived.get(place) for place in range(len(names))]
    ranks = [dict(zip(shapes, reply.ranks, strict=True)) if reply else state.ranks[name] for name, reply in zip(names, replies, strict=True)]
    owned = {module: max(ranks[place][module] for place in arrived) for module in shapes}
    nothing = LocalResult(0, 0, 0, math.nan, math.nan)
    up = [found.bytes_up[place] for place in arrived]
    trained = Trained(
        [reply.result if reply else nothing for reply in replies],
        found.lost,
        ranks,
        [reply.tails if reply else (0.0, 0.0) for reply in replies],
        uploads=mean(cfg, found.total, state.bank, owned),
        received=None,
        bytes_down=[found.bytes_down[place] for place in range(len(names))],
        bytes_up=up,
        parameters=sum(rank * sum(shapes[module]) for name in names for module, rank in state.ranks[name].items()),
    )
    return trained, MetricRecord({"arrived": len(arrived), "bytes_up": sum(up)})


@dataclass
class Sums:
    """Of a round.   total: of the vectors of the clients in `arrived`, whole numbers.   lost: why others are not in it.   bytes_up, bytes_down: of keys,
    shares and vectors, by place.
    """

    arrived: dict[int, Any]
    lost: dict[int, str]
    total: Tensor
    bytes_up: dict[int, int]
    bytes_down: dict[int, int]


@dataclass
class Round:
    """A round of `names`; clients are known by their places in it.   ask(kind, contents): what came back of the messages to these clients.

    length: numbers of a vector.   read: what else a client reports with its vector; `ConfigError` where that is not as it should be.
    """

    cfg: Config
    names: Sequence[str]
    number: int
    length: int
    ask: Ask
    read: Callable[[int, RecordDict], Any]
    lost: dict[int, str] = field(default_factory=dict)
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._total = np.zeros(self.length, dtype=f"u{fixed_point(self.cfg).bits // 8}")

    def sums(self, orders: Orders, most: int) -> Sums:
        """orders: the plain orders to train.   most: sequences of the client that has most.

        Raises `ConfigError` where fewer clients are left than it takes to open a mask; the server's bank is as it was.
        """
        try:
            how = secure.sharing(self.cfg, len(self.names))
        except ConfigError as error:
            raise ConfigError(self._refusal(str(error))) from None
        near = secure.neighbours(how.clients, how.shares)
        public = self._answered(secure.KEYS, {place: {} for place in range(how.clients)}, lambda _, found: _public(found))
        self._enough(how, near, public)
        sent: dict[int, dict[int, bytes]] = self._answered(
            secure.SHARES,
            {place: _keys(how.clients, place, sorted(near[place] & public.keys()), public) for place in public},
            lambda place, found: _shares(found, sorted(near[place] & public.keys() - {place})),
        )
        self._enough(how, near, sent)
        plain = orders(sorted(sent))
        sources = {place: sorted(near[place] & sent.keys() - {place}) for place in sent}
        arrived = self._answered(
            secure.MASKED,
            {place: {"sources": own, "shares": [sent[other][place] for other in own], "most": most} for place, own in sources.items()},
            self._vector,
            plain,
        )
        self._enough(how, near, arrived)
        gone = sent.keys() - arrived.keys()
        who = {place: (sorted(near[place] & arrived.keys()), sorted(near[place] & gone)) for place in arrived}
        known = dict(self.lost)
        opened = self._answered(
            secure.UNMASK,
            {place: {"active": active, "gone": dead} for place, (active, dead) in who.items()},
            lambda place, found: (secure.read_all(found, "seeds", len(who[place][0])), secure.read_all(found, "keys", len(who[place][1]))),
        )
        self.lost = known  # who is silent now has its vector in the sum
        for owner in sorted(sent):
            asked = 0 if owner in arrived else 1
            found = [opened[place][asked][who[place][asked].index(owner)] for place in sorted(near[owner] & opened.keys())]
            if len(found) < how.threshold:
                raise ConfigError(self._refusal(f"{len(found)} of {how.threshold} shares that open the mask of {self.names[owner]} arrived"))
            secret = self._combined(owner, found[: how.threshold])
            if owner in arrived:
                self._total -= self._mask(secret)
            else:
                self._without_pairs(owner, secret, [place for place in sources[owner] if place in arrived], public)
        return Sums(arrived, self.lost, secure.from_ring(self._total), {place: self.up[place] for place in arrived}, self.down)

    # ---------------------------------------------------------------- a stage

    def _answered(
        self,
        kind: str,
        asked: Mapping[int, dict[str, Any]],
        read: Callable[[int, Any], Any],
        contents: Mapping[int, RecordDict] | None = None,
    ) -> dict[int, Any]:
        """What `read` makes of each answer, by place; the others are on record with a reason."""
        sent = {}
        for place, values in asked.items():
            sent[place] = secure.with_record(contents[place] if contents else RecordDict(), number=self.number, **values)
            arrays = sum(map(size, sent[place].array_records.values()))
            self.down[place] = self.down.get(place, 0) + secure.key_bytes(values) + arrays
        answers, lost = self.ask(kind, sent)
        self.lost |= lost
        found: dict[int, Any] = {}
        for place, content in sorted(answers.items()):
            try:
                if kind == secure.MASKED:
                    found[place], received = read(place, content)
                else:
                    answer = secure.record(content)
                    found[place], received = read(place, answer), secure.key_bytes(answer)
            except (ConfigError, ValueError) as error:
                self.lost[place] = " ".join(str(error).split())[:300]
            else:
                self.up[place] = self.up.get(place, 0) + received
        return found

    def _vector(self, place: int, content: RecordDict) -> tuple[Any, int]:
        """What the client reports; its vector goes into the sum."""
        report = self.read(place, content)
        point = fixed_point(self.cfg)
        if messages.ARRAYS not in content.array_records:
            raise ConfigError(f"its reply has no record {messages.ARRAYS!r}")
        arrays = content.array_records[messages.ARRAYS]
        only_keys(arrays, [secure.VECTOR], "upload")
        vector = from_array(arrays[secure.VECTOR], [self.length], point.dtype, "upload")
        self._total += vector.numpy().view(f"u{point.bits // 8}")
        return report, self.length * point.bits // 8

    def _enough(self, how: secure.Sharing, near: list[set[int]], left: Mapping[int, Any]) -> None:
        """Every client that is left needs so many of its neighbours."""
        least = min((len(near[place] & left.keys()) for place in left), default=0)
        if least < how.threshold:
            raise ConfigError(self._refusal(f"{len(left)} of {how.clients} clients are left, and {least} of {how.threshold} that it takes to open a mask"))

    def _refusal(self, why: str) -> str:
        lost = "; ".join(f"{self.names[place]}: {reason}" for place, reason in sorted(self.lost.items()))[:500]
        return f"round {self.number}: secure aggregation is given up, {why} ({lost or 'none failed'}); the bank is as it was, and resume = true goes on"

    # ---------------------------------------------------------------- masks

    def _combined(self, owner: int, shares: list[bytes]) -> bytes:
        try:
            return bytes(combine_shares(shares))
        except (ValueError, IndexError):
            raise ConfigError(self._refusal(f"the shares of {self.names[owner]} do not fit together")) from None

    def _mask(self, seed: bytes) -> NDArray[Any]:
        return secure.mask(seed, self.length, fixed_point(self.cfg).bits)

    def _without_pairs(self, owner: int, private: bytes, places: Sequence[int], public: Mapping[int, tuple[bytes, bytes]]) -> None:
        """Take away what the clients at `places` masked with a client that dropped out."""
        try:
            fits = public_key_to_bytes(bytes_to_private_key(private).public_key()) == public[owner][0]
        except (ValueError, TypeError):
            fits = False
        if not fits:
            raise ConfigError(self._refusal(f"the shares of {self.names[owner]} do not fit together"))
        for place in places:
            pair = self._mask(secure.pair_seed(private, public[place][0]))
            if place > owner:
                self._total -= pair
            else:
                self._total += pair


def _public(found: Mapping[str, Any]) -> tuple[bytes, bytes]:
    return secure.read_bytes(found, "public1"), secure.read_bytes(found, "public2")


def _keys(clients: int, place: int, places: list[int], public: Mapping[int, tuple[bytes, bytes]]) -> dict[str, Any]:
    first, second = ([public[other][i] for other in places] for i in (0, 1))
    return {"clients": clients, "place": place, "places": places, "public1": first, "public2": second}


def _shares(found: Mapping[str, Any], places: Sequence[int]) -> dict[int, bytes]:
    return dict(zip(places, secure.read_all(found, "shares", len(places)), strict=True))
