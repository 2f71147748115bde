"""From a folder, a JSONL file, a hub data set or Python's library to the token sequences of each client.

Way of the text: source -> {client: documents} -> tokens of a client (documents joined with EOS) -> blocks of seq_len -> train | test.
"""

from __future__ import annotations

import json
import math
import numbers
import os
import sys
import unicodedata
import warnings
from array import array
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetlora.config import Config, ConfigError
from hetlora.python_text import stdlib_documents, stdlib_packages, unicode_scripts
from hetlora.ranks import Column
from hetlora.seeds import held_out_generator

__all__ = ["ClientData", "FederatedData", "load_data", "stdlib_packages"]

MIN_TAIL = 16
"""A last block shorter than this is dropped: its few predictions have next to no context."""


@dataclass(frozen=True)
class ClientData:
    """One client's sequences; `train` and `test` never share a token. `capability`: its number from the column of ranks='column:...'."""

    name: str
    train: list[Tensor]  # int64 [2..seq_len] each
    test: list[Tensor]  # int64 [2..seq_len] each
    capability: float | None = None
    examples: tuple[tuple[Tensor, str], ...] = ()  # (prompt's tokens, response) of each sequence of `test`, where the data has prompts


@dataclass(frozen=True)
class FederatedData:
    """`clients` train and evaluate; `held_out` only evaluate (their `train` is empty). Both are sorted by name."""

    clients: list[ClientData]
    held_out: list[ClientData]
    source: str


@dataclass
class _Corpus:
    """Documents per client, in a fixed order."""

    source: str
    documents: dict[str, list[str]] = field(default_factory=dict)
    capability: dict[str, float] = field(default_factory=dict)
    prompts: dict[str, list[str]] = field(default_factory=dict)  # one per document, with cfg.prompt_field


def load_data(cfg: Config, tokenizer: Any) -> FederatedData:
    """Tokenise `cfg.data` and split each client's own text in time: the last `test_fraction` of its blocks is its test.

    cfg.data: a folder (each sub-folder is a client, or each file where there are none), a .jsonl file, 'hub:ORG/NAME', 'stdlib' or 'unicode',
        with ':NAME,NAME' for some of their packages or scripts and ':-NAME,NAME' for the others.
    tokenizer: a transformers tokenizer; one without EOS joins documents directly, with a warning.

    With cfg.prompt_field each row is one sequence: the prompt's tokens, the response's, EOS, cut at seq_len; the loss is over all of it.

    A client needs at least one training and one test sequence of 16 tokens; one with less is an error, or a warning with `skip_empty`.
    The held-out clients depend on `cfg.seed` and the clients' names alone.
    Raises `ConfigError`: missing or unreadable data, a faulty line or column, no clients, empty clients, too many held out.
    """
    column = _capability_column(cfg)
    corpus = _open(cfg, column)
    if not corpus.documents:
        raise ConfigError(f"{corpus.source}: no clients in it (no readable text); each client needs at least a file or a row of text")
    blocks: dict[str, list[Tensor]] = {}
    examples: dict[str, list[tuple[Tensor, tuple[Tensor, str]]]] = {}
    if tokenizer.eos_token_id is None:
        warnings.warn("the tokenizer has no EOS token: a client's documents are joined with no mark between them", stacklevel=2)
    for name in sorted(corpus.documents):
        texts = corpus.documents.pop(name)
        if cfg.prompt_field:
            examples[name] = _examples(corpus.prompts[name], texts, tokenizer, cfg)
            blocks[name] = [sequence for sequence, _ in examples[name]]
        else:
            blocks[name] = _blocks(_tokens(texts, tokenizer, cfg.max_tokens_per_client), cfg.seq_len, cfg.test_fraction)
    empty = [name for name, parts in blocks.items() if len(parts) < 2]
    if empty:
        names = _some(empty)
        least = f"need at least {2 * MIN_TAIL} tokens" if cfg.seq_len > MIN_TAIL else f"need at least 2 sequences of {cfg.seq_len} tokens"
        least = "need at least 2 examples" if cfg.prompt_field else least
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
            clients.append(ClientData(name, parts[:-tests], parts[-tests:], corpus.capability.get(name), held))
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
        # verbose=False: documents are longer than the model's context on purpose, they are cut into blocks afterwards
        ids.extend(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        if 0 < limit <= len(ids):
            return ids[:limit]
    return ids


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
    """(sequence [2..seq_len], (prompt's tokens, response)) of a client, within cfg.max_tokens_per_client; prompts that leave no room are left out."""
    found: list[tuple[Tensor, tuple[Tensor, str]]] = []
    total = long = 0
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for prompt, response in zip(prompts, responses, strict=True):
        before, after = (tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for text in (prompt, response))
        if not before or len(before) >= cfg.seq_len:
            long += 1
            continue
        sequence = [*before, *after, *end][: cfg.seq_len]
        total += len(sequence)
        if found and 0 < cfg.max_tokens_per_client < total:
            break
        ids = torch.tensor(sequence, dtype=torch.int64)
        found.append((ids, (ids[: len(before)], response)))
    if long:
        warnings.warn(f"{long} examples left out: an empty prompt, or one of seq_len = {cfg.seq_len} tokens or more", stacklevel=3)
    return found


def _capability_column(cfg: Config) -> str | None:
    """FIELD of ranks='column:FIELD:MIN:MAX'."""
    rule = cfg.rank_rule
    return rule.field if isinstance(rule, Column) else None


def _open(cfg: Config, column: str | None) -> _Corpus:
    data = cfg.data
    if data.startswith("hub:"):
        return _from_hub(cfg, column)
    path = Path(os.path.expanduser(data))
    is_file = path.suffix.lower() == ".jsonl" and not os.path.isdir(path)
    if column is not None and not is_file:
        raise ConfigError(f"ranks {cfg.ranks!r}: only a .jsonl file or a hub data set has columns, data is {data!r}; give ranks another way")
    if cfg.prompt_field and not is_file:
        raise ConfigError(f"prompt_field {cfg.prompt_field!r}: only a .jsonl file or a hub data set has prompts, data is {data!r}; leave it out")
    if data.partition(":")[0] in ("stdlib", "unicode"):
        return _from_python(data)
    if not os.path.exists(path):
        raise ConfigError(f"data {data!r}: no such file or folder (or not accessible); give a folder, a .jsonl file, 'hub:ORG/NAME' or 'stdlib'")
    if is_file:
        return _from_jsonl(path, cfg, column)
    if os.path.isdir(path):
        return _from_folder(path)
    raise ConfigError(f"data {data!r}: a single file must be .jsonl (one JSON object a line), got {path.suffix or 'no suffix'}; or give its folder")


def _from_python(data: str) -> _Corpus:
    """'stdlib' or 'unicode', alone, with ':NAME,...' (only these), or with ':-NAME,...' (all but these)."""
    kind, _, chosen = data.partition(":")
    documents = stdlib_documents() if kind == "stdlib" else unicode_scripts()
    what = "package" if kind == "stdlib" else "script"
    named = [name.strip() for name in chosen.removeprefix("-").split(",") if name.strip()]
    unknown = [name for name in named if name not in documents]
    if unknown:
        raise ConfigError(f"data {data!r}: no {what} {_some(unknown)} with enough text; there are {', '.join(documents)}")
    wanted = [name for name in documents if name not in named] if chosen.startswith("-") else named or list(documents)
    version = ".".join(map(str, sys.version_info[:2]))
    source = f"packages of Python {version}'s standard library" if kind == "stdlib" else f"scripts of Unicode {unicodedata.unidata_version}"
    return _Corpus(f"{len(wanted)} {source}", {name: documents[name] for name in wanted})


def _from_folder(root: Path) -> _Corpus:
    """Hidden entries are ignored; folders reached twice through links are read once per client."""
    skipped: list[str] = []
    entries = _entries(root)
    folders = [p for p in entries if os.path.isdir(p) and _identity(p) != _identity(root)]
    corpus = _Corpus(f"folder {root} (each {'sub-folder' if folders else 'file'} is a client)")
    files = [p for p in entries if not os.path.isdir(p)]
    if folders:
        for folder in folders:
            # a set of its own per client: two clients may link to the same folder
            corpus.documents[_clean(folder.name)] = list(_documents(_walk(folder, {_identity(root)}), skipped))
        if files:
            warnings.warn(f"{corpus.source}: files beside the sub-folders belong to no client and are ignored: {_some([p.name for p in files])}", stacklevel=4)
    else:
        for file in files:
            if texts := list(_documents([file], skipped)):
                corpus.documents[_clean(file.name)] = texts
    if skipped:
        warnings.warn(f"{corpus.source}: files skipped, not readable UTF-8 text: {_some(skipped, 20)}", stacklevel=4)
    return corpus


def _walk(folder: Path, seen: set[tuple[int, int]]) -> Iterator[Path]:
    """Files under `folder`, depth first in the order of names."""
    if _identity(folder) in seen:
        return
    seen.add(_identity(folder))
    for path in _entries(folder):
        if os.path.isdir(path):  # unlike Path.is_dir it never raises
            yield from _walk(path, seen)
        else:
            yield path


def _documents(files: Iterable[Path], skipped: list[str]) -> Iterator[str]:
    """Text of each file; the names of those that are no text are added to `skipped`."""
    for path in files:
        if not os.path.isfile(path):  # sockets, pipes and broken links
            skipped.append(str(path))
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
        except UnicodeDecodeError:
            skipped.append(str(path))
            continue
        except OSError as error:
            raise ConfigError(f"data: file {path} cannot be read ({error.strerror}); make it readable or take it away") from None
        if "\0" in text:
            skipped.append(str(path))
        elif text.strip():
            yield text


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    except OSError as error:
        raise ConfigError(f"data: folder {folder} cannot be read ({error.strerror}); make it readable or take it away") from None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _from_jsonl(path: Path, cfg: Config, column: str | None) -> _Corpus:
    corpus = _Corpus(f"file {path}")
    try:
        with path.open("rb") as lines:
            _add_rows(corpus, _json_rows(lines, path), cfg, column)
    except OSError as error:
        raise ConfigError(f"data: file {path} cannot be read ({error.strerror}); make it readable") from None
    return corpus


def _json_rows(lines: Iterable[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(lines, 1):
        where = f"file {path} line {number}"
        try:
            text = line.decode("utf-8-sig")
            row = json.loads(text) if text.strip() else None
        except UnicodeDecodeError:
            raise ConfigError(f"{where}: not UTF-8 text") from None
        except (ValueError, RecursionError) as error:
            raise ConfigError(f"{where}: not valid JSON ({getattr(error, 'msg', error)}); expected one object a line") from None
        if text.strip():
            yield where, row


def _from_hub(cfg: Config, column: str | None) -> _Corpus:
    name = cfg.data.removeprefix("hub:")
    if not name:
        raise ConfigError("data 'hub:': no data set named; expected 'hub:ORG/NAME'")
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"data {cfg.data!r}: needs the 'datasets' library; pip install hetlora[hub]") from None
    try:
        rows = datasets.load_dataset(name, split=cfg.split)
    except Exception as error:  # the library raises unrelated types for offline, missing, gated and malformed data sets
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"data {cfg.data!r}, split {cfg.split!r}: cannot be loaded ({reason}); check the name, the split and the connection") from None
    wanted = list(dict.fromkeys(name for name in (cfg.text_field, cfg.client_field, cfg.prompt_field or None, column) if name is not None))
    missing = [key for key in wanted if key not in rows.column_names]
    if missing:
        raise ConfigError(f"data {cfg.data!r}: no column {_some(missing)}; it has {', '.join(rows.column_names)}; set --text-field and --client-field")
    corpus = _Corpus(f"hub data set {name}, split {cfg.split}")
    _add_rows(corpus, ((f"{corpus.source} row {i}", row) for i, row in enumerate(rows.select_columns(wanted))), cfg, column)
    return corpus


def _add_rows(corpus: _Corpus, rows: Iterable[tuple[str, Any]], cfg: Config, column: str | None) -> None:
    """Sort (where, row) pairs into documents and capabilities per client."""
    documents: dict[str, list[str]] = {}
    for where, row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: expected an object with {cfg.text_field!r} and {cfg.client_field!r}, got {type(row).__name__}")
        text = _value(row, cfg.text_field, where, "--text-field")
        if not isinstance(text, str):
            raise ConfigError(f"{where}: {cfg.text_field!r} must be text, got {type(text).__name__}")
        client = _value(row, cfg.client_field, where, "--client-field")
        if isinstance(client, bool) or not isinstance(client, (str, numbers.Integral)) or not str(client).strip():
            raise ConfigError(f"{where}: {cfg.client_field!r} must name a client (text or a whole number), got {client!r}")
        name = _clean(str(client))
        texts = documents.setdefault(name, [])
        if cfg.prompt_field:
            prompt = _value(row, cfg.prompt_field, where, "--prompt-field")
            if not isinstance(prompt, str):
                raise ConfigError(f"{where}: {cfg.prompt_field!r} must be text, got {type(prompt).__name__}")
        if text.strip():
            texts.append(_clean(text))
            if cfg.prompt_field:
                corpus.prompts.setdefault(name, []).append(_clean(prompt))
        if column is not None:
            value = _number(_value(row, column, where, "the column of --ranks"), f"{where}: {column!r} of client {name!r}")
            if corpus.capability.setdefault(name, value) != value:
                raise ConfigError(f"{where}: {column!r} of client {name!r} is {value}, but {corpus.capability[name]} in an earlier row; give one value")
    corpus.documents.update(documents)


def _value(row: dict[str, Any], key: str, where: str, option: str) -> Any:
    if key not in row:
        raise ConfigError(f"{where}: no key {key!r}; it has {_some(list(row))}; set {option}")
    return row[key]


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{what} must be a finite number, got {value!r:.40}")
    return number


def _clean(text: str) -> str:
    """Lone surrogates (broken escapes, undecodable file names) cannot be tokenised or written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    return ", ".join(repr(_clean(str(name))) for name in names[:count]) + more
