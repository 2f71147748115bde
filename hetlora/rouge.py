"""ROUGE-L of the global adapter's answers to held-out prompts (Lin 2004), by torchmetrics."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch

import hetlora_kernels as hk
from hetlora.config import Config, ConfigError
from hetlora.federation import Federation
from hetlora_kernels.peft import attach, client_segments, detach


def words(text: str) -> list[str]:
    """Runs of letters and digits of any script: the usual English tokenizer of ROUGE would drop all of Korean."""
    return re.findall(r"\w+", text.lower())


def scorer() -> Callable[[list[str], list[str]], float]:
    """score(answers, references): mean F1 of the longest common subsequence of words. `ConfigError` where torchmetrics is not installed."""
    try:
        from torchmetrics.functional.text.rouge import rouge_score
    except ImportError:
        raise ConfigError("rouge_examples: needs the 'torchmetrics' library; pip install '.[rouge]' in a checkout") from None

    def score(answers: list[str], references: list[str]) -> float:
        return float(rouge_score(answers, references, rouge_keys="rougeL", normalizer=str, tokenizer=words)["rougeL_fmeasure"])

    return score


@torch.no_grad()
def evaluate(federation: Federation, bank: hk.AdapterBank, cfg: Config, progress: Callable[[int, int], None] | None = None) -> dict[str, Any]:
    """{"f1": mean ROUGE-L, "examples": how many} of greedy answers to cfg.rouge_examples held-out prompts, one of each client in turn.

    bank: of one client.   An answer ends at EOS or after cfg.rouge_tokens tokens. Raises `ConfigError` when the data has no prompts.
    """
    score = scorer()
    own = [client.examples for client in federation.data.clients]
    examples = [examples[turn] for turn in range(max(map(len, own), default=0)) for examples in own if turn < len(examples)][: cfg.rouge_examples]
    if not examples:
        raise ConfigError("rouge_examples: no client has a held-out prompt")
    tokenizer, model = federation.tokenizer, federation.model
    answers = []
    attach(model, bank, scale=cfg.scale)
    try:
        for done, (prompt, _) in enumerate(examples):
            ids = prompt[None].to(federation.device)
            with client_segments(model, torch.zeros(1, dtype=torch.int64)):
                out = model.generate(  # type: ignore[operator]
                    input_ids=ids,
                    attention_mask=torch.ones_like(ids),
                    max_new_tokens=cfg.rouge_tokens,
                    do_sample=False,
                    use_cache=True,
                    pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
                )
            answers.append(tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True))
            if progress:
                progress(done + 1, len(examples))
    finally:
        detach(model)
    return {"f1": score(answers, [response for _, response in examples]), "examples": len(examples)}
