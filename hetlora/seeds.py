"""Every random choice is made here. Those of a run are functions of (run seed, purpose, round, client), so a resumed run repeats them bit for bit.

Two kinds are made elsewhere. Keys and masks of secure aggregation are asked of the system, as nobody may repeat them (`flower/secure.py`). The noise of
differential privacy is a function of a secret, the round and the sum that it hides (`privacy.py`).

Torch is loaded by the functions that need it, so that settings can be checked and ranks be drawn without it.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A 63-bit seed for one purpose, independent of every other purpose and of the order in which seeds are asked for."""
    digest = hashlib.blake2b(repr((int(seed), *purpose)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def host_generator(seed: int, *purpose: str | int) -> random.Random:
    return random.Random(derive_seed(seed, *purpose))


def torch_generator(seed: int, *purpose: str | int) -> torch.Generator:
    import torch

    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def held_out_generator(seed: int) -> random.Random:
    """Which clients are held out. Its seed is older than `derive_seed` and stays, so that a data set is split as it always was."""
    return random.Random(f"{seed}:held-out")


def resampling_generator() -> random.Random:
    """The resamples of a bootstrap: the same ones whenever a comparison is looked at."""
    return random.Random(0)


def probe_generator() -> torch.Generator:
    """Tokens and adapters of a probe, which asks a model what a step takes or whether it keeps sequences apart: the same ones for every run and device."""
    import torch

    return torch.Generator().manual_seed(0)


@contextmanager
def pretraining_draws(seed: int) -> Iterator[torch.Generator]:
    """For the demo's base model: torch's own generator for its initial weights, put back afterwards, and one for its batches.

    Both have the plain seed, not a derived one: so were the models made that users have in their cache.
    """
    import torch

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        yield torch.Generator().manual_seed(seed)
