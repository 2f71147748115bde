"""From the text of each client (`sources`) to its token sequences.

Way of the text: source -> {client: documents} -> tokens of a client (documents joined with EOS) -> blocks of seq_len -> train | test.
"""

from __future__ import annotations

import warnings
from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetlora.chat import Chat, packed
from hetlora.chat import examples as chat_examples
from hetlora.config import Config, ConfigError
from hetlora.python_text import stdlib_packages
from hetlora.seeds import held_out_generator
from hetlora.sources import Corpus, open_corpus, some

__all__ = ["ClientData", "FederatedData", "Federation", "load_data", "stdlib_packages"]

MIN_TAIL = 16
"""A last block shorter than this is dropped: its few predictions have next to no context."""


@dataclass(frozen=True)
class ClientData:
    """One client's sequences; `train` and `test` never share a token. `capability`: its number from the column of ranks='column:...'.

    A token that is not predicted (of a prompt, where the loss is on responses alone) stands as its complement, ~id: `token_ids` and `predicted` read it.
    """

    name: str
    train: list[Tensor]  # int64 [2..seq_len] each
    test: list[Tensor]  # int64 [2..seq_len] each
    capability: float | None = None
    examples: tuple[tuple[Tensor, str], ...] = ()  # (prompt's tokens, response) of each sequence of `test`, where the data has prompts

    @property
    def sequences(self) -> int:
        """Training sequences."""
        return len(self.train)

    @property
    def device(self) -> None:
        """Text has none: what devices measure (ranks='capability:...') is known of deployed clients alone."""
        return None


def token_ids(sequence: Tensor) -> Tensor:
    """The tokens of a sequence, predicted or not.

    >>> import torch
    >>> token_ids(torch.tensor([~7, ~8, 9])).tolist()
    [7, 8, 9]
    """
    return torch.where(sequence < 0, ~sequence, sequence)


def predicted(sequence: Tensor) -> int:
    """How many tokens of a sequence are predicted: all after the first that are not complements."""
    return int((sequence[1:] >= 0).sum())


@dataclass(frozen=True)
class FederatedData:
    """`clients` train and evaluate; `held_out` only evaluate (their `train` is empty). Both are sorted by name."""

    clients: list[ClientData]
    held_out: list[ClientData]
    source: str


@dataclass
class Federation:
    """What a run works on: one base model in memory and everybody's data. May serve several runs, until one whose merge changes the base."""

    model: torch.nn.Module
    model_name: str
    shapes: dict[str, tuple[int, int]]
    data: FederatedData
    tokenizer: Any = None
    folded_by: Path | None = None  # the run whose updates are in the base weights

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def load_data(cfg: Config, tokenizer: Any) -> FederatedData:
    """Tokenise `cfg.data` and split each client's own text in time: the last `test_fraction` of its blocks is its test.

    cfg.data: a folder (each sub-folder is a client, or each file where there are none), a .jsonl file, 'hub:ORG/NAME', 'stdlib' or 'unicode',
        with ':NAME,NAME' for some of their packages or scripts and ':-NAME,NAME' for the others.
    tokenizer: a transformers tokenizer; one without EOS joins documents directly, with a warning.

    With cfg.prompt_field each row is one sequence: the prompt's tokens, the response's, EOS, cut at seq_len. With cfg.messages_field each row is a
    conversation, written by the chat template (`chat.Chat`). With cfg.pack the training sequences of a client are joined; test sequences never are.

    A client needs at least one training and one test sequence of 16 tokens; one with less is an error, or a warning with `skip_empty`.
    The held-out clients depend on `cfg.seed` and the clients' names alone.
    Raises `ConfigError`: missing or unreadable data, a faulty line or column, no clients, empty clients, too many held out.
    """
    return split_corpus(cfg, tokenizer, open_corpus(cfg))


def split_corpus(cfg: Config, tokenizer: Any, corpus: Corpus) -> FederatedData:
    """`load_data` of documents that are open already; `corpus` is used up."""
    if not corpus.documents:
        raise ConfigError(f"{corpus.source}: no clients in it (no readable text); each client needs at least a file or a row of text")
    blocks: dict[str, list[Tensor]] = {}
    examples: dict[str, list[tuple[Tensor, tuple[Tensor, str]]]] = {}
    if tokenizer.eos_token_id is None:
        warnings.warn("the tokenizer has no EOS token: a client's documents are joined with no mark between them", stacklevel=2)
    chat = Chat(cfg, tokenizer) if cfg.chats else None
    for name in sorted(corpus.documents):
        texts = corpus.documents.pop(name)
        if chat:
            asked = zip(corpus.prompts.get(name, []), texts, strict=True) if cfg.prompt_field else ()
            pairs = [[{"role": "user", "content": prompt}, {"role": "assistant", "content": text}] for prompt, text in asked]
            examples[name] = chat_examples(pairs or corpus.conversations.get(name, []), chat, name)
            blocks[name] = [sequence for sequence, _ in examples[name]]
        elif cfg.prompt_field:
            examples[name] = _examples(corpus.prompts.get(name, []), texts, tokenizer, cfg)
            blocks[name] = [sequence for sequence, _ in examples[name]]
        else:
            blocks[name] = _blocks(_tokens(texts, tokenizer, cfg.max_tokens_per_client), cfg.seq_len, cfg.test_fraction)
    if chat:
        chat.warn()
    empty = [name for name, parts in blocks.items() if len(parts) < 2]
    if empty:
        names = some(empty)
        least = f"need at least {2 * MIN_TAIL} tokens" if cfg.seq_len > MIN_TAIL else f"need at least 2 sequences of {cfg.seq_len} tokens"
        least = "need at least 2 examples" if cfg.prompt_field or cfg.messages_field else least
        if not cfg.skip_empty:
            raise ConfigError(f"{corpus.source}: clients with too little text to train and test on ({least}): {names}; give them more text or use --skip-empty")
        warnings.warn(f"{corpus.source}: clients left out, too little text ({least}): {names}", stacklevel=2)
    usable = [name for name in blocks if name not in set(empty)]
    if not usable:
        raise ConfigError(f"{corpus.source}: no client has enough text; lower --seq-len or give more text")
    held_out = _held_out(usable, cfg)
    clients, evaluators = [], []
    for name in usable:
        parts = blocks[name]
        if name in held_out:
            evaluators.append(ClientData(name, [], parts, corpus.capability.get(name)))
        else:
            tests = min(max(1, round(cfg.test_fraction * len(parts))), len(parts) - 1)
            held = tuple(example for _, example in examples.get(name, [])[-tests:])
            train = packed(parts[:-tests], cfg.seq_len) if cfg.pack else parts[:-tests]
            clients.append(ClientData(name, train, parts[-tests:], corpus.capability.get(name), held))
    return FederatedData(clients, evaluators, corpus.source)


def _held_out(names: list[str], cfg: Config) -> set[str]:
    if cfg.held_out_clients >= len(names):
        raise ConfigError(f"held_out_clients: {cfg.held_out_clients} of {len(names)} clients leaves none to train; at most {len(names) - 1} can be held out")
    return set(held_out_generator(cfg.seed).sample(names, cfg.held_out_clients))


def _tokens(documents: Iterable[str], tokenizer: Any, limit: int) -> array[int]:
    """Token ids of a client, EOS between documents, at most `limit` (0 = all)."""
    eos = tokenizer.eos_token_id
    ids = array("q")
    for text in documents:
        if ids and eos is not None:
            ids.append(eos)
        ids.extend(_encode(tokenizer, text, limit - len(ids) if limit else 0))
        if 0 < limit <= len(ids):
            return ids[:limit]
    return ids


_LONG = 2**20
_SETTLED = 64


def _encode(tokenizer: Any, text: str, limit: int) -> list[int]:
    """Token ids of `text`, at least the first `limit` (0 = all). Of a text over 2^20 characters only as much is tokenised as they need.

    The last 64 tokens in front of a cut are not taken, as what follows could change them.
    """
    taken = len(text) if not limit or len(text) <= _LONG else max(_LONG, 4 * limit)
    while True:
        # verbose=False: documents are longer than the model's context on purpose, they are cut into blocks afterwards
        ids: list[int] = tokenizer(text[:taken], add_special_tokens=False, verbose=False)["input_ids"]
        if taken >= len(text) or len(ids) - _SETTLED >= limit:
            return ids
        taken *= 4


def _blocks(ids: array[int], seq_len: int, test_fraction: float) -> list[Tensor]:
    """Consecutive blocks of `seq_len`; a client with text for one block only gets two shorter ones, cut at `test_fraction`."""
    whole = len(ids) // seq_len * seq_len
    cuts = list(range(seq_len, whole + 1, seq_len))
    if len(ids) - whole >= MIN_TAIL:
        cuts.append(len(ids))
    if len(cuts) < 2 and len(ids) >= 2 * MIN_TAIL:
        test = min(max(MIN_TAIL, round(test_fraction * len(ids))), len(ids) - MIN_TAIL)
        cuts = [len(ids) - test, len(ids)]
    return [torch.tensor(ids[start:stop], dtype=torch.int64) for start, stop in pairwise([0, *cuts])]


def _examples(prompts: list[str], responses: list[str], tokenizer: Any, cfg: Config) -> list[tuple[Tensor, tuple[Tensor, str]]]:
    """(sequence [2..seq_len], (prompt's tokens, response)) of a client, within cfg.max_tokens_per_client.

    Prompts that leave no room are left out, and examples longer than seq_len are cut at their end; a warning says how many.
    """
    found: list[tuple[Tensor, tuple[Tensor, str]]] = []
    total = long = cut = 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for prompt, response in zip(prompts, responses, strict=True):
        before, after = (_encode(tokenizer, text, cfg.seq_len) for text in (prompt, response))
        if not before or len(before) >= cfg.seq_len:
            long += 1
            continue
        sequence = [*before, *after, *end][: cfg.seq_len]
        cut += len(before) + len(after) + len(end) > cfg.seq_len
        total += len(sequence)
        if found and 0 < cfg.max_tokens_per_client < total:
            break
        ids = torch.tensor(sequence, dtype=torch.int64)
        prompt_ids = ids[: len(before)]
        found.append((torch.cat([~prompt_ids, ids[len(before) :]]) if cfg.response_only else ids, (prompt_ids, response)))
    if long:
        warnings.warn(f"{long} examples left out: an empty prompt, or one of seq_len = {cfg.seq_len} tokens or more", stacklevel=3)
    if cut:
        warnings.warn(f"{cut} examples of more than seq_len = {cfg.seq_len} tokens: cut at their end", stacklevel=3)
    return found
