"""The shapes and ranks every suite measures, and how `--only` chooses among them."""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

# (out features m, in features n) of the attention projections q, k, v, o that LoRA adapts.
SMOLLM2_135M_ATTENTION = [(576, 576), (192, 576), (192, 576), (576, 576)] * 30
LLAMA_8B_ATTENTION_LAYER = [(4096, 4096), (1024, 4096), (1024, 4096), (4096, 4096)]
TINY = [(24, 40), (8, 40)]

SERVER_SHAPES = {"SmolLM2-135M attention (30 layers)": SMOLLM2_135M_ATTENTION, "Llama-3.1-8B attention (1 layer)": LLAMA_8B_ATTENTION_LAYER}


def chosen(options: Any, *names: str) -> bool:
    """Whether `--only` leaves a case that has these names."""
    return not options.only or bool({*names} & {*options.only})


def power_law_ranks(clients: int, lowest: int = 5, highest: int = 50) -> list[int]:
    """Quantiles of a density falling as rank^-2 between the bounds, in an arbitrary fixed order: mean 12.3 for 5..50."""
    ranks = []
    for k in range(clients):
        u = (k + 0.5) / clients
        ranks.append(int(1 / ((1 - u) / lowest + u / highest)))
    random.Random(0).shuffle(ranks)
    return ranks


def elements_per_rank(shape: Sequence[tuple[int, int]]) -> int:
    """Elements of A and B together that one rank row of every module has."""
    return sum(m + n for m, n in shape)
