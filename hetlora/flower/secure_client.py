"""The client's stages of secure aggregation. Its secrets of the round lie in the state that its node keeps for the run, and go when their shares are asked for.

The server is taken to follow the protocol and to be curious (docs/privacy.md). What a client can see of a server that does not, it refuses: fewer shares
than the threshold or more than its settings say, keys that come twice, stages out of order, a client of which both secrets are asked.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.fernet import InvalidToken
from flwr.app import ConfigRecord, RecordDict
from flwr.common.secure_aggregation.crypto.shamir import create_shares
from flwr.common.secure_aggregation.crypto.symmetric_encryption import decrypt, encrypt, generate_shared_key
from flwr.common.secure_aggregation.secaggplus_utils import share_keys_plaintext_concat, share_keys_plaintext_separate
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key, generate_key_pairs, private_key_to_bytes, public_key_to_bytes
from torch import Tensor

from hetlora.config import Config, ConfigError
from hetlora.deployed.wire import Arrays, to_array
from hetlora.flower import secure
from hetlora.secure_sum import fixed_point

STATE = "hetlora.secure"


def keys(cfg: Config, content: RecordDict, state: RecordDict) -> RecordDict:
    """Two fresh pairs of keys: the first for masks, the second to encrypt shares."""
    values = secure.record(content)
    if not cfg.secure_aggregation:
        raise ConfigError("the server asks for secure aggregation, and the run's settings have none")
    own: dict[str, Any] = {"after": "keys", "number": secure.read_whole(values, "number")}
    for pair in ("1", "2"):
        private, public = generate_key_pairs()
        own |= {f"private{pair}": private_key_to_bytes(private), f"public{pair}": public_key_to_bytes(public)}
    state.config_records[STATE] = ConfigRecord(own)
    return secure.with_record(RecordDict(), public1=own["public1"], public2=own["public2"])


def shares(cfg: Config, content: RecordDict, state: RecordDict) -> RecordDict:
    """A fresh seed, and shares of it and of the first private key, encrypted for each neighbour."""
    values, own = secure.record(content), _state(state, content, "keys")
    clients, place, places = secure.read_whole(values, "clients"), secure.read_whole(values, "place"), secure.read_places(values, "places")
    first, second = (secure.read_all(values, name, len(places)) for name in ("public1", "public2"))
    how = secure.sharing(cfg, clients)
    if not how.threshold <= len(places) <= how.shares:
        raise ConfigError(f"secure aggregation: {len(places)} clients to share with, expected {how.threshold} to {how.shares}")
    if len({*first, *second}) < 2 * len(places):
        raise ConfigError("secure aggregation: some public keys are the same")
    if place not in places or (first[places.index(place)], second[places.index(place)]) != (own["public1"], own["public2"]):
        raise ConfigError("secure aggregation: the server has other public keys of this client")
    own |= {"seed": os.urandom(32), "place": place, "places": places, "firsts": first, "seconds": second, "threshold": how.threshold}
    made = [create_shares(own[secret], how.threshold, how.shares) for secret in ("seed", "private1")]
    own |= {name: parts[places.index(place)] for name, parts in zip(("seed_share", "key_share"), made, strict=True)}
    sent = [
        encrypt(_for(own, second[i]), share_keys_plaintext_concat(place, other, made[0][i], made[1][i])) for i, other in enumerate(places) if other != place
    ]
    _keep(state, own, "shares")
    return secure.with_record(RecordDict(), shares=sent, fingerprint=secure.fingerprint(own["seed"]))


def open_shares(content: RecordDict, state: RecordDict) -> None:
    """Take in what the neighbours sent: those that are there to mask with."""
    values, own = secure.record(content), _state(state, content, "shares")
    sources = secure.read_places(values, "sources")
    if own["place"] in sources or not set(sources) <= set(own["places"]) or len(sources) + 1 < own["threshold"]:
        raise ConfigError(f"secure aggregation: shares of {len(sources)} neighbours, expected {own['threshold'] - 1} or more of those whose keys came")
    seeds, private = [], []
    for source, sent in zip(sources, secure.read_all(values, "shares", len(sources)), strict=True):
        try:
            origin, goal, seed, key = share_keys_plaintext_separate(decrypt(_for(own, own["seconds"][own["places"].index(source)]), sent))
        except InvalidToken:
            raise ConfigError(f"secure aggregation: the share of the client at place {source} is not its own") from None
        if (origin, goal) != (source, own["place"]):
            raise ConfigError(f"secure aggregation: a share of {origin} for {goal} came as one of {source} for {own['place']}")
        seeds.append(seed)
        private.append(key)
    _keep(state, own | {"sources": sources, "seed_shares": seeds, "key_shares": private}, "opened")


def masked(content: RecordDict, state: RecordDict, cfg: Config, vector: Tensor) -> Arrays:
    """vector: whole numbers.   The vector in the ring, under the client's own mask and one with each neighbour."""
    own, bits = _state(state, content, "opened"), fixed_point(cfg).bits
    hidden = secure.to_ring(vector, bits)
    hidden += secure.mask(own["seed"], len(hidden), bits)
    for source in own["sources"]:
        pair = secure.mask(secure.pair_seed(own["private1"], own["firsts"][own["places"].index(source)]), len(hidden), bits)
        hidden = hidden + pair if own["place"] > source else hidden - pair
    _keep(state, own, "masked")
    return {secure.VECTOR: to_array(secure.from_ring(hidden).to(fixed_point(cfg).dtype))}


def unmask(cfg: Config, content: RecordDict, state: RecordDict) -> RecordDict:
    """Shares of the seeds of clients whose vectors arrived, and of the keys of those whose did not; of no client both, and once."""
    values, own = secure.record(content), _state(state, content, "masked")
    active, gone = secure.read_places(values, "active"), secure.read_places(values, "gone")
    known = {*own["sources"], own["place"]}
    if set(active) & set(gone) or not {*active, *gone} <= known or own["place"] not in active or len(active) < own["threshold"]:
        raise ConfigError(f"secure aggregation: shares of {len(active)} and {len(gone)} clients are asked for, expected {own['threshold']} or more, apart")
    seeds = dict(zip(own["sources"], own["seed_shares"], strict=True)) | {own["place"]: own["seed_share"]}
    private = dict(zip(own["sources"], own["key_shares"], strict=True))
    del state.config_records[STATE]
    return secure.with_record(RecordDict(), seeds=[seeds[place] for place in active], keys=[private[place] for place in gone])


Stage: TypeAlias = Callable[[Config, RecordDict, RecordDict], RecordDict]
STAGES: dict[str, Stage] = {"keys": keys, "shares": shares, "unmask": unmask}
"""Functions of (settings, message, the client's state) to what goes back; `masked` takes what the client trained besides."""


def _for(own: Mapping[str, Any], public: bytes) -> bytes:
    """The key under which shares travel between this client and that of the second public key."""
    try:
        return generate_shared_key(bytes_to_private_key(own["private2"]), bytes_to_public_key(public))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"secure aggregation: a key cannot be used: {error}") from None


def _state(state: RecordDict, content: RecordDict, after: str) -> dict[str, Any]:
    """What the client knows after a stage of the round; `ConfigError` where it is at another."""
    number = secure.read_whole(secure.record(content), "number")
    own = dict(state.config_records[STATE]) if STATE in state.config_records else {"after": "nothing", "number": number}
    if (own["after"], own["number"]) != (after, number):
        raise ConfigError(f"secure aggregation: expected the stage {after!r} of round {number} before, got {own['after']!r} of round {own['number']}")
    return own


def _keep(state: RecordDict, own: dict[str, Any], after: str) -> None:
    state.config_records[STATE] = ConfigRecord({**own, "after": after})
