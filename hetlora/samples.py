"""Answers of the global adapter: greedy text after a prompt, for ROUGE-L and for the samples of a report."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.chat import Chat
from hetlora.config import Config
from hetlora.evaluate import WHOLE, Whole
from hetlora.federation import Federation
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
    """[{"prompt", "answer"}] for the prompts of cfg.sample_prompts; where a chat template is in force each is written as what a user says."""
    texts = read_prompts(cfg)
    chat = Chat(cfg, federation.tokenizer) if cfg.chats else None
    ids = [chat.prompt(text) if chat else federation.tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    answers = generate(federation, bank, [torch.tensor(own, dtype=torch.int64) for own in ids], cfg, progress, split)
    return [{"prompt": text, "answer": answer} for text, answer in zip(texts, answers, strict=True)]
