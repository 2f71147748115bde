"""Answers of the global adapter: greedy text after a prompt, for ROUGE-L and for the samples of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.chat import Chat
from hetlora.config import Config, ConfigError
from hetlora.data import Federation
from hetlora.evaluate import WHOLE, Whole
from hetlora.sources import read_prompts
from hetlora_kernels.peft import attach, client_segments, detach


@torch.no_grad()
def generate(
    federation: Federation,
    bank: hk.AdapterBank,
    prompts: Sequence[Tensor],
    cfg: Config,
    progress: Callable[[int, int], None] | None = None,
    split: Whole = WHOLE,
) -> list[str]:
    """The greedy continuation of each prompt (tokens), up to EOS or cfg.rouge_tokens tokens.   bank: of one client."""
    tokenizer, model = federation.tokenizer, federation.model
    answers: dict[int, str] = {}
    mine = split.mine([1] * len(prompts))
    attach(model, bank, scale=cfg.scale_at(len(next(bank.parameters()))))
    try:
        for done, number in enumerate(mine):
            prompt = prompts[number]
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
            answers[number] = tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True)
            if progress:
                progress(done + 1, len(mine))
    finally:
        detach(model)
    return split.gathered(answers)


def evaluate(
    federation: Federation, bank: hk.AdapterBank, cfg: Config, progress: Callable[[int, int], None] | None = None, split: Whole = WHOLE
) -> list[dict[str, str]]:
    """[{"prompt", "answer"}] for the prompts of cfg.sample_prompts."""
    answers = generate(federation, bank, prompts(cfg, federation.tokenizer), cfg, progress, split)
    return [{"prompt": text, "answer": answer} for text, answer in zip(read_prompts(cfg), answers, strict=True)]


def prompts(cfg: Config, tokenizer: Any) -> list[Tensor]:
    """The tokens of each prompt of cfg.sample_prompts; where a chat template is in force it is written as what a user says."""
    texts = read_prompts(cfg)
    chat = Chat(cfg, tokenizer) if cfg.chats and texts else None
    ids = [chat.prompt(text) if chat else tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    return [torch.tensor(own, dtype=torch.int64) for own in ids]


def check_lengths(cfg: Config, held_out: Sequence[Tensor], shown: Sequence[Tensor], positions: float) -> None:
    """`ConfigError` where a prompt and the longest answer to it do not fit a model that sees so many tokens.   held_out: for ROUGE-L."""
    for setting, own in (("rouge_examples", held_out), ("sample_prompts", shown)):
        longest = max(map(len, own), default=0)
        if own and longest + cfg.rouge_tokens > positions:
            raise ConfigError(
                f"{setting}: a prompt has {longest} tokens, and with an answer of rouge_tokens = {cfg.rouge_tokens} that is above the {positions} that "
                f"model {cfg.model!r} sees; lower --rouge-tokens, or shorten prompts"
            )
