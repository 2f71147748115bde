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


TYPES = ("float32", "bfloat16", "float16", "float64")


def kind_of(word: str) -> str:
    """What a word of `--only` names: a type, tokens ("T=256"), clients ("K=8"), a shape, or else an operation or a model."""
    if word in TYPES:
        return "type"
    if word in (*SERVER_SHAPES, "tiny") or "->" in word:
        return "shape"
    return {"T=": "tokens", "K=": "clients"}.get(word[:2], "operation")


def chosen(options: Any, *names: str) -> bool:
    """Whether `--only` leaves a case that has these names: of each kind that it has words of, one. `gram adamw float32` is both operations in float32."""
    asked: dict[str, set[str]] = {}
    for word in options.only or []:
        asked.setdefault(kind_of(word), set()).add(word)
    return all(words & {*names} for words in asked.values())


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
