"""The server's stages of secure aggregation: it passes keys and shares on, adds masked vectors up and takes away the masks of the sum."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from cryptography.exceptions import UnsupportedAlgorithm
from flwr.app import MetricRecord, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import combine_shares
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, public_key_to_bytes
from numpy.typing import NDArray
from torch import Tensor

from hetlora import run_folder
from hetlora.client import LocalResult
from hetlora.config import Config, ConfigError
from hetlora.deployed import messages
from hetlora.deployed.exchange import Reply, ranks_after
from hetlora.deployed.wire import from_array, only_keys, size
from hetlora.flower import secure
from hetlora.secure_sum import fixed_point, length, lone_rows, mean, summed_rows
from hetlora.server import ServerState
from hetlora.training import Trained

Answers: TypeAlias = tuple[dict[int, RecordDict], dict[int, str]]
"""What clients answered, and why others did not, by their places in the round."""
Ask: TypeAlias = Callable[[str, dict[int, RecordDict]], Answers]
Orders: TypeAlias = Callable[[Sequence[int]], dict[int, RecordDict]]


class GivenUp(ConfigError):
    """A round that cannot be unmasked, or that would show one client's rows."""


def train(
    cfg: Config, state: ServerState, names: Sequence[str], number: int, ask: Ask, orders: Orders, sequences: Mapping[str, int], say: Callable[[str], None]
) -> tuple[Trained, MetricRecord]:
    """A round of training, whose uploads are one that stands for all (`secure_sum.mean`), and what Flower keeps of it.

    A round whose sum may have been opened before, by a run that did not live to keep its result, is given up: between two sums of one round lie the uploads
    of the clients that dropped out of one of them.

    ask(kind, contents): what came back of these messages.   orders: the plain orders to train.   sequences: of each client.   say: receives lines for the log.
    """
    shapes, samples = state.bank.shapes, [sequences[name] for name in names]
    folder = Path(cfg.output)
    opened = run_folder.opened_round(folder)

    def opening() -> None:
        run_folder.write_atomic(folder / run_folder.OPENED, json.dumps({"round": number}) + "\n")

    work = Round(cfg, state, names, samples, number, ask, say, opening)
    try:
        if number <= opened:
            raise GivenUp("its sum may have been opened before the run was interrupted, and another one less that could be one client's upload")
        total, rows, reports = work.sums(orders)
        arrived = sorted(reports)
        ranks = [dict(zip(shapes, reports[place].ranks, strict=True)) for place in arrived]
        one, rounding = mean(cfg, total, state.bank, rows, ranks, [samples[place] for place in arrived], max(samples))
        given_up = ""
        if rounding > 0.01:
            say(f"round {number}: up to {100 * rounding:.3g} % of a module's merged rows may be rounding to the step 2^-{cfg.secure_bits}; raise secure_bits")
    except run_folder.WriteError:
        raise
    except ConfigError as error:
        reports, arrived, one, rounding = {}, [], None, None
        every = set(work.lost) == set(range(len(names)))  # then each has a reason of its own
        given_up = "" if every else str(error)
    lost = work.lost if arrived else dict.fromkeys(range(len(names)), "its round is given up") | work.lost
    nothing = Reply([], LocalResult(0, 0, 0, math.nan, math.nan), (0.0, 0.0))
    replies = [reports.get(place, nothing) for place in range(len(names))]
    up = [work.up[place] for place in arrived]
    trained = Trained(
        [reply.result for reply in replies],
        lost,
        [dict(zip(shapes, reply.ranks, strict=True)) if reply.ranks else state.ranks[name] for name, reply in zip(names, replies, strict=True)],
        [reply.tails for reply in replies],
        uploads=one,
        received=None,
        bytes_down=[work.down.get(place, 0) for place in range(len(names))],
        bytes_up=up,
        parameters=sum(rank * sum(shapes[module]) for name in names for module, rank in state.ranks[name].items()),
        given_up=given_up,
        rounding=rounding,
    )
    return trained, MetricRecord({"arrived": len(arrived), "bytes_up": sum(up)})


@dataclass
class Round:
    """A round of `names`; clients are known by their places in it.   samples: training sequences of each.

    opening: called before the sum is opened.   lost: why clients are not in the sum.   up, down: bytes of arrays, keys and shares from and to each client.
    """

    cfg: Config
    state: ServerState
    names: Sequence[str]
    samples: Sequence[int]
    number: int
    ask: Ask
    say: Callable[[str], None]
    opening: Callable[[], None]
    lost: dict[int, str] = field(default_factory=dict)
    up: dict[int, int] = field(default_factory=dict)
    down: dict[int, int] = field(default_factory=dict)
    seeds: dict[int, bytes] = field(default_factory=dict)  # their fingerprints

    def sums(self, orders: Orders) -> tuple[Tensor, list[int], dict[int, Reply]]:
        """(sums of the vectors of `secure_sum`, rows of each module that are in them, what each client in them reports).

        Raises `GivenUp` where fewer clients are left than it takes to open a mask, where the sum falls into sums of fewer clients, or where one client
        alone is left of a row.
        """
        try:
            how = secure.sharing(self.cfg, len(self.names))
        except ConfigError as error:
            raise GivenUp(str(error)) from None
        near = secure.neighbours(how.clients, how.shares)
        public = self._public(how.clients)
        self._enough(how, near, public)
        sent: dict[int, dict[int, bytes]] = self._answered(
            secure.SHARES,
            {place: _keys(how.clients, place, sorted(near[place] & public.keys()), public) for place in public},
            lambda place, found: self._shares(place, found, sorted(near[place] & public.keys() - {place})),
        )
        self._enough(how, near, sent)
        rows = self._rows(sorted(sent))
        sources = {place: sorted(near[place] & sent.keys() - {place}) for place in sent}
        arrived = self._vectors(rows, {place: (own, [sent[other][place] for other in own]) for place, own in sources.items()}, orders(sorted(sent)))
        self._enough(how, near, arrived)
        self._connected(sources, arrived)
        left = [dict(zip(self.state.bank.shapes, reply.ranks, strict=True)) for reply in arrived.values()]
        if lone := lone_rows(self.cfg, self.state.bank.shapes, rows, left):
            raise GivenUp(f"after dropouts and pruning one client alone owns a row of {lone[0]}, which the sum would show")
        gone = sent.keys() - arrived.keys()
        who = {place: (sorted(near[place] & arrived.keys()), sorted(near[place] & gone)) for place in arrived}
        self.opening()
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
                raise GivenUp(f"{len(found)} of {how.threshold} shares that open the mask of {self.names[owner]} arrived")
            secret = self._combined(owner, found[: how.threshold])
            if owner in arrived:
                if secure.fingerprint(secret) != self.seeds[owner]:
                    raise GivenUp(f"the shares of {self.names[owner]} do not fit together")
                self._total -= self._mask(secret)
            else:
                self._without_pairs(owner, secret, [place for place in sources[owner] if place in arrived], public)
        return secure.from_ring(self._total), rows, arrived

    def _rows(self, places: Sequence[int]) -> list[int]:
        """Of each module, the rows that enough of these clients own; the vector's length follows."""
        shapes, ranks = self.state.bank.shapes, [self.state.ranks[self.names[place]] for place in places]
        rows, most = summed_rows(self.cfg, shapes, ranks), max(rank for own in ranks for rank in own.values())
        owners = f"fewer than {self.cfg.secure_owners} of its clients own"
        if not any(rows):
            raise GivenUp(f"{owners} any rank row; secure_owners says so")
        if min(rows) < most:
            self.say(f"round {self.number}: rank rows from {min(rows)} on, which {owners}, stay as they are (secure_owners)")
        self._total = np.zeros(length(shapes, rows), dtype=f"u{fixed_point(self.cfg).bits // 8}")
        return rows

    # ---------------------------------------------------------------- a stage

    def _answered(self, kind: str, asked: Mapping[int, dict[str, Any]], read: Callable[[int, Any], Any]) -> dict[int, Any]:
        """What `read` makes of each answer, by place; the others are on record with a reason."""

        def counted(place: int, content: RecordDict) -> tuple[Any, int]:
            values = secure.record(content)
            return read(place, values), secure.key_bytes(values)

        return self._read(kind, {place: secure.with_record(RecordDict(), number=self.number, **values) for place, values in asked.items()}, counted)

    def _vectors(self, rows: list[int], shares: Mapping[int, tuple[list[int], list[bytes]]], orders: Mapping[int, RecordDict]) -> dict[int, Reply]:
        """What each client reports whose vector has gone into the sum."""
        point = fixed_point(self.cfg)
        asked = {
            place: secure.with_record(
                orders[place], number=self.number, sources=sources, shares=sent, rows=rows, samples=self.samples[place], most=max(self.samples)
            )
            for place, (sources, sent) in shares.items()
        }

        def added(place: int, content: RecordDict) -> tuple[Reply, int]:
            reply = messages.reply(content, len(self.state.bank.shapes))
            ranks_after(self.cfg, self.state, self.names[place], reply)
            if messages.ARRAYS not in content.array_records:
                raise ConfigError(f"its reply has no record {messages.ARRAYS!r}")
            arrays = content.array_records[messages.ARRAYS]
            only_keys(arrays, [secure.VECTOR], "upload")
            vector = from_array(arrays[secure.VECTOR], [len(self._total)], point.dtype, "upload")
            self._total += vector.numpy().view(self._total.dtype)
            return reply, size(arrays)

        return self._read(secure.MASKED, asked, added)

    def _read(self, kind: str, sent: dict[int, RecordDict], read: Callable[[int, RecordDict], tuple[Any, int]]) -> dict[int, Any]:
        for place, content in sent.items():
            self.down[place] = self.down.get(place, 0) + secure.key_bytes(secure.record(content)) + sum(map(size, content.array_records.values()))
        answers, lost = self.ask(kind, sent)
        self.lost |= {place: self._named(reason) for place, reason in lost.items()}
        found: dict[int, Any] = {}
        for place, content in sorted(answers.items()):
            try:
                found[place], received = read(place, content)
            except (ConfigError, ValueError) as error:
                self.lost[place] = " ".join(str(error).split())[:300]
            else:
                self.up[place] = self.up.get(place, 0) + received
        return found

    def _enough(self, how: secure.Sharing, near: list[set[int]], left: Mapping[int, Any]) -> None:
        """Every client that is left needs so many of its neighbours."""
        least = min((len(near[place] & left.keys()) for place in left), default=0)
        if least < how.threshold:
            raise GivenUp(f"{len(left)} of {how.clients} clients are left, of which one reaches {least}, and it takes {how.threshold} to open its mask")

    def _connected(self, sources: Mapping[int, list[int]], arrived: Mapping[int, Any]) -> None:
        """The pairs' masks must join all vectors. Where dropouts cut the ring of neighbours, each piece is a sum that can be read by itself."""
        start = min(arrived)
        reached, new = {start}, [start]
        while new:
            found = {other for place in new for other in sources[place] if other in arrived} - reached
            reached |= found
            new = sorted(found)
        if len(reached) < len(arrived):
            cut = f"between the {len(reached)} clients around {self.names[start]} and the {len(arrived) - len(reached)} others"
            raise GivenUp(f"dropouts left no mask {cut}, so that the sum of each would show; raise secure_shares")

    def _named(self, reason: str) -> str:
        """Clients know each other by their places, and a log by names."""

        def name(found: re.Match[str]) -> str:
            place = int(found[1])
            return self.names[place] if place < len(self.names) else found[0]

        return re.sub(r"the client at place (\d{1,9})\b", name, reason)

    # ---------------------------------------------------------------- keys and masks

    def _public(self, clients: int) -> dict[int, tuple[bytes, bytes]]:
        """The two public keys of each client. One that others could not use would cost the round, so its client alone is left out."""
        seen: set[bytes] = set()

        def read(_: int, found: Mapping[str, Any]) -> tuple[bytes, bytes]:
            first, second = secure.read_public_key(found, "public1"), secure.read_public_key(found, "public2")
            if first == second or {first, second} & seen:
                raise ConfigError("public1, public2: expected fresh keys, got one that is there already")
            seen.update((first, second))
            return first, second

        return self._answered(secure.KEYS, {place: {} for place in range(clients)}, read)

    def _shares(self, place: int, found: Mapping[str, Any], places: Sequence[int]) -> dict[int, bytes]:
        sent = dict(zip(places, secure.read_all(found, "shares", len(places)), strict=True))
        self.seeds[place] = secure.read_bytes(found, "fingerprint")
        return sent

    def _combined(self, owner: int, shares: list[bytes]) -> bytes:
        try:
            return bytes(combine_shares(shares))
        except (ValueError, IndexError):
            raise GivenUp(f"the shares of {self.names[owner]} do not fit together") from None

    def _mask(self, seed: bytes) -> NDArray[Any]:
        return secure.mask(seed, len(self._total), fixed_point(self.cfg).bits)

    def _without_pairs(self, owner: int, private: bytes, places: Sequence[int], public: Mapping[int, tuple[bytes, bytes]]) -> None:
        """Take away what the clients at `places` masked with a client that dropped out."""
        try:
            fits = public_key_to_bytes(bytes_to_private_key(private).public_key()) == public[owner][0]
        except (ValueError, TypeError, UnsupportedAlgorithm):
            fits = False
        if not fits:
            raise GivenUp(f"the shares of {self.names[owner]} do not fit together")
        for place in places:
            pair = self._mask(secure.pair_seed(private, public[place][0]))
            if place > owner:
                self._total -= pair
            else:
                self._total += pair


def _keys(clients: int, place: int, places: list[int], public: Mapping[int, tuple[bytes, bytes]]) -> dict[str, Any]:
    first, second = ([public[other][i] for other in places] for i in (0, 1))
    return {"clients": clients, "place": place, "places": places, "public1": first, "public2": second}
