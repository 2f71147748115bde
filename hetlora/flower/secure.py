"""Secure aggregation (SecAgg+, Bell et al., arXiv 2009.08248) on Flower's Message API: what both sides share.

Four messages a round, each an action of Flower's message type 'train':

    keys      ->  two public keys of each client, fresh
    shares    ->  to each client its neighbours' keys; back, encrypted for each neighbour, a share of its seed and a share of its first private key
    masked    ->  its neighbours' shares and the order to train; back the vector of `secure_sum`, masked
    unmask    ->  who sent a vector and who did not; back the shares of the seeds of the first and of the keys of the second

A vector is masked with PRG(seed), and with PRG(key of the pair) for each neighbour, which one of the two adds and the other subtracts. So all cancel in the
sum but the seeds' masks, which the server takes away, and the pairs of those that dropped out, for which it puts their key together from shares.

Key agreement (ECDH on P-384 with HKDF), encryption of shares (Fernet), Shamir's shares and their packing are Flower's. Masks are not: Flower's
`pseudo_rand_gen` folds a seed to 32 bits, and the text of a pair's key to 28, which can be tried one by one. Here PRG is AES-256 in counter mode, as the
protocol's authors have it, under the whole seed. Its numbers are uniform over the ring.
"""

from __future__ import annotations

import base64
import hashlib
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from flwr.app import ConfigRecord, MessageType, RecordDict
from flwr.common.secure_aggregation.crypto.symmetric_encryption import generate_shared_key
from flwr.supercore.primitives.asymmetric import bytes_to_private_key, bytes_to_public_key, public_key_to_bytes
from numpy.typing import NDArray
from torch import Tensor

from hetlora.config import Config, ConfigError

ACTIONS = ("keys", "shares", "masked", "unmask")
KEYS, SHARES, MASKED, UNMASK = (f"{MessageType.TRAIN}.{action}" for action in ACTIONS)
RECORD = "secure"
VECTOR = "masked"
"""Names of the record beside the plain ones, and of the one array of a masked upload."""


@dataclass(frozen=True)
class Sharing:
    """Of a round of `clients`.   shares: that each client makes, one of them its own.   threshold: that open a secret."""

    clients: int
    shares: int
    threshold: int


def sharing(cfg: Config, clients: int) -> Sharing:
    """`ConfigError` where too few clients are there."""
    shares = min(cfg.secure_shares or clients, clients)
    threshold = cfg.secure_threshold or -(-2 * shares // 3)
    if clients < least_clients(cfg):
        raise ConfigError(f"secure aggregation: there are {clients} clients, expected {least_clients(cfg)} or more")
    return Sharing(clients, shares, threshold)


def least_clients(cfg: Config) -> int:
    """That a round takes. Two thirds of the shares, where no threshold is set, are never more than the clients."""
    return max(3, cfg.secure_threshold, cfg.secure_owners)


def neighbours(clients: int, shares: int) -> list[set[int]]:
    """Of each client, by its place in the round, those that get a share, itself among them: on a ring in random order, as many on either side."""
    everyone = list(range(clients))
    if shares >= clients:
        return [set(everyone) for _ in everyone]
    secrets.SystemRandom().shuffle(everyone)
    found: list[set[int]] = [set()] * clients
    for i, place in enumerate(everyone):
        found[place] = {everyone[(i + offset) % clients] for offset in range(-(shares // 2), shares // 2 + 1)}
    return found


def mask(seed: bytes, count: int, bits: int) -> NDArray[Any]:
    """PRG(seed): `count` numbers of the ring of 2^bits, unsigned. A seed of 32 bytes serves one round."""
    if len(seed) != 32:
        raise ConfigError(f"secure aggregation: expected a seed of 32 bytes, got {len(seed)}")
    stream = Cipher(algorithms.AES(seed), modes.CTR(bytes(16))).encryptor().update(bytes(count * bits // 8))
    return np.frombuffer(stream, dtype=f"<u{bits // 8}")


def fingerprint(seed: bytes) -> bytes:
    """Binds a client to its seed, 256 random bits, without telling it: another seed from false shares would give a wrong sum that may look like one."""
    return hashlib.sha256(seed).digest()


def pair_seed(private_key: bytes, public_key: bytes) -> bytes:
    """What two clients have in common and nobody else knows, 32 bytes."""
    try:
        return base64.urlsafe_b64decode(generate_shared_key(bytes_to_private_key(private_key), bytes_to_public_key(public_key)))
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ConfigError(f"secure aggregation: a key cannot be used: {error}") from None


def to_ring(values: Tensor, bits: int) -> NDArray[Any]:
    """Whole numbers modulo 2^bits, unsigned."""
    return values.numpy().astype(f"u{bits // 8}")


def from_ring(values: NDArray[Any]) -> Tensor:
    """The representative of least size of each, int64."""
    return torch.from_numpy(values.view(f"i{values.dtype.itemsize}").astype(np.int64))


# ---------------------------------------------------------------- records, checked when they are read


def with_record(content: RecordDict, **values: Any) -> RecordDict:
    content.config_records[RECORD] = ConfigRecord(values)
    return content


def record(content: RecordDict) -> Mapping[str, Any]:
    if RECORD not in content.config_records:
        raise ConfigError(f"expected the record {RECORD!r}, got {sorted(map(str, content))[:5]}")
    found: Mapping[str, Any] = content.config_records[RECORD]
    return found


def read_whole(values: Mapping[str, Any], name: str) -> int:
    value = values.get(name)
    if type(value) is not int or not 0 <= value < 2**31:
        raise ConfigError(f"{name}: expected a whole number >= 0, got {str(value)[:40]}")
    return value


def read_wholes(values: Mapping[str, Any], name: str) -> list[int]:
    value = values.get(name)
    if not isinstance(value, list) or not all(type(entry) is int and 0 <= entry < 2**31 for entry in value):
        raise ConfigError(f"{name}: expected whole numbers >= 0, got {str(value)[:40]}")
    return value


def read_bytes(values: Mapping[str, Any], name: str) -> bytes:
    value = values.get(name)
    if not isinstance(value, bytes) or not 0 < len(value) <= LONGEST:
        raise ConfigError(f"{name}: expected 1 to {LONGEST} bytes, got {str(value)[:40]}")
    return value


def read_public_key(values: Mapping[str, Any], name: str) -> bytes:
    """A key on the curve of Flower's key agreement, written as Flower writes it."""
    value = read_bytes(values, name)
    try:
        key = bytes_to_public_key(value)
        fits = isinstance(key, ec.EllipticCurvePublicKey) and isinstance(key.curve, ec.SECP384R1) and public_key_to_bytes(key) == value
    except (ValueError, TypeError, UnsupportedAlgorithm):
        fits = False
    if not fits:
        raise ConfigError(f"{name}: expected a public key on the curve P-384 as PEM, got {str(value)[:40]}")
    return value


def read_places(values: Mapping[str, Any], name: str) -> list[int]:
    """Places of clients in the round, each once, in rising order."""
    value = read_wholes(values, name)
    if value != sorted(set(value)):
        raise ConfigError(f"{name}: expected rising places of clients, got {str(value)[:40]}")
    return value


def read_all(values: Mapping[str, Any], name: str, count: int) -> list[bytes]:
    value = values.get(name)
    if not isinstance(value, list) or len(value) != count or not all(isinstance(own, bytes) and 0 < len(own) <= LONGEST for own in value):
        raise ConfigError(f"{name}: expected {count} byte strings of 1 to {LONGEST} bytes, got {str(value)[:40]}")
    return value


LONGEST = 4096
"""Bytes of a key, a share or a share that is encrypted."""


def key_bytes(values: Mapping[str, Any]) -> int:
    """Bytes of keys and shares in a record."""
    items: list[Any] = [own for value in values.values() for own in (value if isinstance(value, Sequence) and not isinstance(value, bytes) else [value])]
    return sum(len(own) for own in items if isinstance(own, bytes))
