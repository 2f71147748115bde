"""Conversations as sequences of tokens: the chat template, which tokens are predicted, what is left out of one that is too long, and packing."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from jinja2 import TemplateSyntaxError
from torch import Tensor

from hetlora.config import Config, ConfigError
from hetlora.text_files import read_text

Message = dict[str, str]  # role, content
Example = tuple[Tensor, tuple[Tensor, str]]  # (sequence, (tokens of the prompt, response)) as in `data.ClientData`

CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


class Chat:
    """How a run writes conversations. `ConfigError` where there is no template to write them with.

    A conversation is written piece by piece: what the model is given before each answer, as the template writes it when it asks for one, then the answer
    with what the template ends it with. Each piece has tokens of its own, so that training has the very tokens that a prompt has in use.
    """

    def __init__(self, cfg: Config, tokenizer: Any) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        self.template = _template(cfg)
        self.counts: Counter[str] = Counter()
        if self.template is None and not getattr(tokenizer, "chat_template", None):
            raise ConfigError(f"messages: the tokenizer of model {cfg.model!r} has no chat template; give --template chatml, or a file in jinja2")
        self._parse()

    def _parse(self) -> None:
        """`ConfigError` naming the template where it is no jinja2: no conversation is at fault then."""
        try:
            self.tokenizer.apply_chat_template([{"role": "user", "content": ""}], tokenize=False, chat_template=self.template)
        except TemplateSyntaxError as error:
            whose = f"that of the tokenizer of model {self.cfg.model!r}" if self.template is None else self.cfg.template
            raise ConfigError(f"template: {whose} is not valid jinja2 (line {error.lineno}: {error.message})") from None
        except Exception:  # it takes no such conversation, and may take those of the data
            return

    def render(self, messages: Sequence[Message], ask: bool) -> str:
        """The conversation as text.   ask: with what asks for the next answer at its end."""
        try:
            text = self.tokenizer.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=ask, chat_template=self.template)
        except Exception as error:  # of jinja2, or raised by the template for roles that it does not take
            raise ConfigError(f"the chat template refuses it ({' '.join(str(error).split())[:160]})") from None
        return str(text)

    def prompt(self, text: str) -> list[int]:
        """Tokens with which a user's `text` asks for an answer."""
        return self._tokens(self.render([*self._system([]), {"role": "user", "content": text}], ask=True))

    def sequence(self, messages: Sequence[Message]) -> Example | None:
        """None where no answer has a token within seq_len. `ConfigError` where the template cannot write the conversation."""
        messages = [*self._system(messages), *messages]
        while True:
            ids, starts = self._written(messages)
            shorter = _without_oldest(messages)
            if len(ids) <= self.cfg.seq_len or self.cfg.truncate != "turns" or shorter is None:
                break
            self.counts["shortened"] += 1
            messages = shorter
        if len(ids) > self.cfg.seq_len:
            self.counts["cut"] += 1
        starts = [(start, text) for start, text in starts if 0 < start < self.cfg.seq_len]
        if not starts:
            self.counts["left out"] += 1
            return None
        found = torch.tensor(ids[: self.cfg.seq_len], dtype=torch.int64)
        last, response = starts[-1]
        prompt = torch.where(found < 0, ~found, found)[:last]
        return found if self.cfg.response_only else torch.where(found < 0, ~found, found), (prompt, response)

    def _written(self, messages: Sequence[Message]) -> tuple[list[int], list[tuple[int, str]]]:
        """(tokens, those of what is no answer as their complements; (place of its first token, text) of every answer)"""
        ids: list[int] = []
        starts: list[tuple[int, str]] = []
        answer: list[int] = []
        done = ""
        for i, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            before, after = self.render(messages[:i], ask=True), self.render(messages[: i + 1], ask=False)
            if not before.startswith(done) or not after.startswith(before):
                raise ConfigError(f"the chat template does not write message {i + 1} behind what it asks with, so the answer is not certain; give --template")
            ids += [~token for token in self._tokens(before[len(done) :])]
            starts.append((len(ids), message["content"]))
            answer = self._tokens(after[len(before) :])
            ids += answer
            done = after
        eos = self.tokenizer.eos_token_id
        return (ids, starts) if eos is None or eos in answer or not ids else ([*ids, eos], starts)

    def _tokens(self, text: str) -> list[int]:
        ids: list[int] = self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        return ids

    def _system(self, messages: Sequence[Message]) -> list[Message]:
        """The message that `system_prompt` puts before a conversation that has no own."""
        own = bool(messages) and messages[0]["role"] == "system"
        return [] if own or not self.cfg.system_prompt else [{"role": "system", "content": self.cfg.system_prompt}]

    def warn(self) -> None:
        """How many conversations did not fit, in one warning for each kind."""
        seq_len = self.cfg.seq_len
        for name, text in (
            ("left out", f"conversations left out: no answer begins within seq_len = {seq_len} tokens"),
            ("shortened", f"oldest exchanges left out of conversations of more than seq_len = {seq_len} tokens"),
            ("cut", f"conversations of more than seq_len = {seq_len} tokens: cut at their end"),
        ):
            if self.counts[name]:
                warnings.warn(f"{self.counts[name]} {text}", stacklevel=3)


def _template(cfg: Config) -> str | None:
    """The text of the template; None for the tokenizer's own."""
    if cfg.template in ("", "tokenizer"):
        return None
    return CHATML if cfg.template == "chatml" else read_text(os.path.expanduser(cfg.template), "template", most=2**20)


def _without_oldest(messages: Sequence[Message]) -> list[Message] | None:
    """The conversation without its first exchange, its system message kept; None where only one answer would be left to drop."""
    system = [message for message in messages[:1] if message["role"] == "system"]
    rest = list(messages[len(system) :])
    answers = [i for i, message in enumerate(rest) if message["role"] == "assistant"]
    following = [i for i, message in enumerate(rest) if message["role"] == "user" and answers and i > answers[0]]
    if len(answers) < 2 or not following or following[0] > answers[-1]:
        return None
    return [*system, *rest[following[0] :]]


def examples(conversations: Sequence[Sequence[Message]], chat: Chat, name: str) -> list[Example]:
    """The sequences of one client, within cfg.max_tokens_per_client."""
    found: list[Example] = []
    total = 0
    for number, messages in enumerate(conversations, 1):
        try:
            own = chat.sequence(messages)
        except ConfigError as error:
            if not chat.cfg.skip_bad_rows:
                raise ConfigError(f"data: conversation {number} of client {name!r}: {error}; or leave such rows out with --skip-bad-rows") from None
            warnings.warn(f"data: conversation {number} of client {name!r} left out: {error}", stacklevel=3)
            continue
        if own is None:
            continue
        total += len(own[0])
        if found and 0 < chat.cfg.max_tokens_per_client < total:
            break
        found.append(own)
    return found


def packed(sequences: Sequence[Tensor], seq_len: int) -> list[Tensor]:
    """Sequences of one client joined, in their order, into as few of at most `seq_len` tokens as that order allows. A joined one sees those before it."""
    packs: list[list[Tensor]] = []
    room = 0
    for sequence in sequences:
        if len(sequence) > room:
            packs.append([])
            room = seq_len
        packs[-1].append(sequence)
        room -= len(sequence)
    return [torch.cat(pack) for pack in packs]
