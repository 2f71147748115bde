"""ROUGE-L of the global adapter's answers to held-out prompts (Lin 2004), by torchmetrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from torch import Tensor

import hetlora_kernels as hk
from hetlora.config import Config, ConfigError
from hetlora.data import FederatedData, Federation
from hetlora.evaluate import WHOLE, Whole
from hetlora.extras import install
from hetlora.samples import generate


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script: the usual English tokenizer of ROUGE would drop all of Korean."""
    return re.findall(r"\w+", text.lower())


def scorer() -> Callable[[list[str], list[str]], float]:
    """score(answers, references): mean F1 of the longest common subsequence of words. `ConfigError` where torchmetrics is not installed."""
    try:
        from torchmetrics.functional.text.rouge import rouge_score
    except ImportError:
        raise ConfigError(f"rouge_examples: needs the 'torchmetrics' library; {install('rouge')}") from None

    def score(answers: list[str], references: list[str]) -> float:
        return float(rouge_score(answers, references, rouge_keys="rougeL", normalizer=str, tokenizer=words)["rougeL_fmeasure"])

    return score


def evaluate(
    federation: Federation, bank: hk.AdapterBank, cfg: Config, progress: Callable[[int, int], None] | None = None, split: Whole = WHOLE
) -> dict[str, Any]:
    """{"f1": mean ROUGE-L, "examples": how many} of greedy answers to cfg.rouge_examples held-out prompts, one of each client in turn.

    bank: of one client.   An answer ends at EOS or after cfg.rouge_tokens tokens. Raises `ConfigError` when the data has no prompts.
    """
    score, asked = scorer(), examples(cfg, federation.data)
    answers = generate(federation, bank, [prompt for prompt, _ in asked], cfg, progress, split)
    return {"f1": score(answers, [response for _, response in asked]), "examples": len(asked)}


def examples(cfg: Config, data: FederatedData) -> list[tuple[Tensor, str]]:
    """(tokens of a held-out prompt, response) of cfg.rouge_examples, one of each client in turn; `ConfigError` where some are wanted and none is there."""
    own = [client.examples for client in data.clients]
    found = [held[turn] for turn in range(max(map(len, own), default=0)) for held in own if turn < len(held)][: cfg.rouge_examples]
    if cfg.rouge_examples and not found:
        raise ConfigError("rouge_examples: no client has a held-out prompt")
    return found
