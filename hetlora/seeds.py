"""Every random choice of a run is a function of (run seed, purpose, round, client), so a resumed run repeats it bit for bit."""

from __future__ import annotations

import hashlib
import random

import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, independent of every other purpose and of the order in which seeds are asked for."""
    digest = hashlib.blake2b(repr((int(seed), *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def host_generator(seed: int, *purpose: str | int) -> random.Random:
    return random.Random(derive_seed(seed, *purpose))


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))
