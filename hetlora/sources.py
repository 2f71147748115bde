"""Where the text comes from: a folder, a JSONL file, a hub data set or Python's library, as documents for each client.

Files are UTF-8, with or without a byte order mark. What cannot be used is named: a file of a folder in a warning, a row in an error or, with
cfg.skip_bad_rows, in a warning.
"""

from __future__ import annotations

import math
import numbers
import os
import sys
import unicodedata
import warnings
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hetlora.config import Config, ConfigError
from hetlora.extras import install
from hetlora.python_text import stdlib_documents, unicode_scripts
from hetlora.ranks import Column
from hetlora.tables import SUFFIXES, read_rows, tell_bad_rows
from hetlora.text_files import decode, encoding_mark, kind_of, parse_json, read_bytes, read_text

IN_MEMORY = "in memory"
"""The setting `data`, or `model`, of a run on what a Python program gave."""
SHOWN_ROWS = 3
"""Bad rows that a message quotes; of the others it says how many."""


@dataclass
class Corpus:
    """Documents per client, in a fixed order."""

    source: str
    documents: dict[str, list[str]] = field(default_factory=dict)
    capability: dict[str, float] = field(default_factory=dict)
    prompts: dict[str, list[str]] = field(default_factory=dict)  # one per document, with cfg.prompt_field
    conversations: dict[str, list[list[dict[str, str]]]] = field(default_factory=dict)  # in place of documents, with cfg.messages_field

    def add(self, name: str, texts: list[str]) -> None:
        """A client of a folder. Undecodable bytes in a name are written out, which could make two names one."""
        if name in self.documents:
            raise ConfigError(f"{self.source}: two entries are named {name!r} once what is not Unicode is written out; rename one")
        self.documents[name] = texts


def _capability_column(cfg: Config) -> str | None:
    """FIELD of ranks='column:FIELD:MIN:MAX'."""
    rule = cfg.rank_rule
    return rule.field if isinstance(rule, Column) else None


def check_source(cfg: Config) -> None:
    """`ConfigError` where `cfg.data` names nothing, or something of another kind than the other settings say. No text is read."""
    data, path = cfg.data, Path(os.path.expanduser(cfg.data))
    if data == IN_MEMORY:
        raise ConfigError(f"data {data!r}: was given by a Python program, and no path leads to it; continue from there with simulate(..., resume=True)")
    if data.startswith("hub:"):
        return
    is_file = path.suffix.lower() in (".jsonl", *SUFFIXES) and not os.path.isdir(path)
    if _capability_column(cfg) is not None and not is_file:
        raise ConfigError(f"ranks {cfg.ranks!r}: only a {_FILES} file or a hub data set has columns, data is {data!r}; give ranks another way")
    for name, what in _OF_ROWS.items():
        if getattr(cfg, name) != type(cfg).model_fields[name].default and not is_file:
            raise ConfigError(f"{name} {getattr(cfg, name)!r}: only a {_FILES} file or a hub data set has {what}, data is {data!r}; leave it out")
    if data.partition(":")[0] in ("stdlib", "unicode"):
        return
    if not os.path.exists(path):
        raise ConfigError(f"data {data!r}: no such file or folder (or not accessible); give a folder, a {_FILES} file, 'hub:ORG/NAME' or 'stdlib'")
    if not is_file and not os.path.isdir(path):
        raise ConfigError(f"data {data!r}: a single file must be {_FILES} (one row a client's text), got {path.suffix or 'no suffix'}; or give its folder")


def open_corpus(cfg: Config) -> Corpus:
    """The documents that `cfg.data` names; see `data.load_data`."""
    check_source(cfg)
    data, column = cfg.data, _capability_column(cfg)
    if data.startswith("hub:"):
        return _from_hub(cfg, column)
    if data.partition(":")[0] in ("stdlib", "unicode"):
        return _from_python(data)
    path = Path(os.path.expanduser(data))
    if os.path.isdir(path):
        return _from_folder(path)
    return _from_jsonl(path, cfg, column) if path.suffix.lower() == ".jsonl" else _from_table(path, cfg, column)


_FILES = ".jsonl, .csv or .parquet"
_OF_ROWS = {"prompt_field": "prompts", "messages_field": "conversations", "text_field": "fields", "client_field": "fields", "skip_bad_rows": "rows"}


def _wanted(cfg: Config, column: str | None) -> list[str]:
    """The columns that a run reads."""
    texts = (cfg.messages_field,) if cfg.messages_field else (cfg.text_field, cfg.prompt_field or None)
    return list(dict.fromkeys(name for name in (texts[0], cfg.client_field, *texts[1:], column) if name is not None))


def _from_table(path: Path, cfg: Config, column: str | None) -> Corpus:
    corpus = Corpus(f"file {path}")
    try:
        _add_rows(corpus, read_rows(path, _wanted(cfg, column), cfg.messages_field or None, column), lambda _, row: row, cfg, column)
    except OSError as error:
        raise ConfigError(f"data: file {path} cannot be read ({error.strerror}); make it readable") from None
    return corpus


def rows_in_memory(rows: Iterable[Any], cfg: Config) -> Corpus:
    """Rows of a Python program, as those of a JSONL file."""
    corpus = Corpus(IN_MEMORY)
    _add_rows(corpus, ((f"data row {number}", row) for number, row in enumerate(rows, 1)), lambda _, row: row, cfg, _capability_column(cfg))
    return corpus


def _from_python(data: str) -> Corpus:
    """'stdlib' or 'unicode', alone, with ':NAME,...' (only these), or with ':-NAME,...' (all but these)."""
    kind, _, chosen = data.partition(":")
    documents = stdlib_documents() if kind == "stdlib" else unicode_scripts()
    what = "package" if kind == "stdlib" else "script"
    named = [name.strip() for name in chosen.removeprefix("-").split(",") if name.strip()]
    unknown = [name for name in named if name not in documents]
    if unknown:
        raise ConfigError(f"data {data!r}: no {what} {some(unknown)} with enough text; there are {', '.join(documents)}")
    wanted = [name for name in documents if name not in named] if chosen.startswith("-") else named or list(documents)
    version = ".".join(map(str, sys.version_info[:2]))
    source = f"packages of Python {version}'s standard library" if kind == "stdlib" else f"scripts of Unicode {unicodedata.unidata_version}"
    return Corpus(f"{len(wanted)} {source}", {name: documents[name] for name in wanted})


def _from_folder(root: Path) -> Corpus:
    """Hidden entries are ignored; folders reached twice through links are read once per client; links that lead out of `root` are followed, and named."""
    skipped: list[str] = []
    outside: list[str] = []
    entries = _entries(root)
    folders = [p for p in entries if os.path.isdir(p) and _identity(p) != _identity(root)]
    corpus = Corpus(f"folder {root} (each {'sub-folder' if folders else 'file'} is a client)")
    files = [p for p in entries if not os.path.isdir(p)]
    if folders:
        for folder in folders:
            # a set of its own per client: two clients may link to the same folder
            corpus.add(clean(folder.name), list(_documents(_walk(folder, {_identity(root)}, root, outside), skipped)))
        if files:
            warnings.warn(f"{corpus.source}: files beside the sub-folders belong to no client and are ignored: {some([p.name for p in files])}", stacklevel=5)
    else:
        for file in files:
            _note_link(file, root, outside)
            if texts := list(_documents([file], skipped)):
                corpus.add(clean(file.name), texts)
    if skipped:
        warnings.warn(f"{corpus.source}: files skipped, not readable UTF-8 text: {some(skipped, 20)}", stacklevel=5)
    if outside:
        warnings.warn(f"{corpus.source}: links that lead out of the folder, their text is used: {some(outside, 20)}", stacklevel=5)
    return corpus


def _note_link(path: Path, root: Path, outside: list[str]) -> None:
    """Add a link whose target is not under `root` to `outside`."""
    if os.path.islink(path) and os.path.exists(path):
        target = os.path.realpath(path)
        if os.path.commonpath([target, os.path.realpath(root)]) != os.path.realpath(root):
            outside.append(f"{path} -> {target}")


def _walk(folder: Path, seen: set[tuple[int, int]], root: Path, outside: list[str]) -> Iterator[Path]:
    """Files under `folder`, depth first in the order of names, however deep. Links out of `root` are added to `outside`."""
    waiting = [folder]
    while waiting:
        path = waiting.pop()
        _note_link(path, root, outside)
        if not os.path.isdir(path):  # unlike Path.is_dir it never raises
            yield path
        elif _identity(path) not in seen:
            seen.add(_identity(path))
            waiting += reversed(_entries(path))


def _documents(files: Iterable[Path], skipped: list[str]) -> Iterator[str]:
    """Text of each file; those that are no text are added to `skipped`, with their encoding where a mark tells it."""
    for path in files:
        if not os.path.isfile(path):  # sockets, pipes, broken links, and names longer than the system takes
            skipped.append(str(path))
            continue
        try:
            content = read_bytes(path)
        except OSError as error:
            raise ConfigError(f"data: file {path} cannot be read ({error.strerror}); make it readable or take it away") from None
        try:
            text = decode(content)
        except ValueError:
            skipped.append(f"{path}{f' ({mark})' if (mark := encoding_mark(content)) else ''}")
            continue
        if "\0" in text:
            skipped.append(str(path))
        elif text.strip():
            yield text.replace("\r\n", "\n").replace("\r", "\n")  # as text files are read


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted((p for p in folder.iterdir() if not p.name.startswith(".")), key=lambda p: p.name)
    except OSError as error:
        raise ConfigError(f"data: folder {folder} cannot be read ({error.strerror}); make it readable or take it away") from None


def _identity(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_dev, status.st_ino


def _from_jsonl(path: Path, cfg: Config, column: str | None) -> Corpus:
    corpus = Corpus(f"file {path}")
    try:
        if kind := kind_of(path):
            raise ConfigError(f"data: file {path} is {kind}; expected a regular file, one JSON object a line")
        with path.open("rb") as lines:
            if mark := encoding_mark(lines.read(4)):
                raise ConfigError(f"data: file {path} is {mark} text; save it as UTF-8")
            lines.seek(0)
            _add_rows(corpus, ((f"file {path} line {number}", line) for number, line in enumerate(lines, 1)), _json_row, cfg, column)
    except OSError as error:
        raise ConfigError(f"data: file {path} cannot be read ({error.strerror}); make it readable") from None
    return corpus


def _json_row(where: str, line: bytes) -> Any:
    """The value of a line; `_NO_ROW` for an empty one. Lines end at a line feed alone: U+2028 and its like may stand in a text."""
    try:
        text = decode(line)
    except ValueError as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('it is ')}") from None
    try:
        return parse_json(text) if text.strip() else _NO_ROW
    except ValueError as error:
        raise ConfigError(f"{where}: not valid JSON ({getattr(error, 'msg', error)}); expected one object a line") from None


_NO_ROW = object()


def _from_hub(cfg: Config, column: str | None) -> Corpus:
    name = cfg.data.removeprefix("hub:")
    if not name:
        raise ConfigError("data 'hub:': no data set named; expected 'hub:ORG/NAME'")
    try:
        import datasets
    except ImportError:
        raise ConfigError(f"data {cfg.data!r}: needs the 'datasets' library; {install('hub')}") from None
    try:
        rows = datasets.load_dataset(name, split=cfg.split)
    except Exception as error:  # the library raises unrelated types for offline, missing, gated and malformed data sets
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ConfigError(f"data {cfg.data!r}, split {cfg.split!r}: cannot be loaded ({reason}); check the name, the split and the connection") from None
    wanted = _wanted(cfg, column)
    missing = [key for key in wanted if key not in rows.column_names]
    if missing:
        raise ConfigError(f"data {cfg.data!r}: no column {some(missing)}; it has {', '.join(rows.column_names)}; set --text-field and --client-field")
    corpus = Corpus(f"hub data set {name}, split {cfg.split}")
    numbered = ((f"{corpus.source} row {i}", row) for i, row in enumerate(rows.select_columns(wanted)))
    _add_rows(corpus, numbered, lambda _, row: row, cfg, column)
    return corpus


@dataclass(frozen=True)
class _Row:
    """A row that can be used. `given`: the client's name as the row has it.   messages: None where rows are no conversations; [] for one without an answer."""

    name: str
    given: str
    text: str
    prompt: str
    capability: float | None
    messages: list[dict[str, str]] | None = None


def _add_rows(corpus: Corpus, rows: Iterable[tuple[str, Any]], parse: Callable[[str, Any], Any], cfg: Config, column: str | None) -> None:
    """Sort rows, (where, what `parse` takes), into documents and capabilities per client. One with an empty text adds no document.

    Raises `ConfigError` after the last row: how many are bad and the first of them; with cfg.skip_bad_rows they are left out and a warning says so.
    """
    documents: dict[str, list[str]] = {}
    given: dict[str, str] = {}
    faults: list[str] = []
    bad = total = 0
    for where, raw in rows:
        try:
            value = parse(where, raw)
            if value is _NO_ROW:
                continue
            total += 1
            row = _read_row(value, where, cfg, column)
            if given.setdefault(row.name, row.given) != row.given:
                raise ConfigError(f"{where}: client {row.given!r} cannot be told from {given[row.name]!r}; rename one")
            if row.capability is not None and corpus.capability.setdefault(row.name, row.capability) != row.capability:
                earlier = corpus.capability[row.name]
                raise ConfigError(f"{where}: {column!r} of client {row.name!r} is {row.capability}, but {earlier} in an earlier row; give one value")
        except ConfigError as error:
            bad += 1
            faults += [str(error)] if len(faults) < SHOWN_ROWS else []
            continue
        texts = documents.setdefault(row.name, [])
        if row.messages:
            corpus.conversations.setdefault(row.name, []).append(row.messages)
        if row.text.strip():
            texts.append(clean(row.text))
            corpus.prompts.setdefault(row.name, []).append(clean(row.prompt))
    if bad:
        tell_bad_rows(corpus.source, bad, faults, cfg.skip_bad_rows)
    corpus.documents.update(documents)


def _read_row(row: Any, where: str, cfg: Config, column: str | None) -> _Row:
    if not isinstance(row, dict):
        raise ConfigError(f"{where}: expected an object with {cfg.text_field!r} and {cfg.client_field!r}, got {type(row).__name__}")
    messages = _messages(_value(row, cfg.messages_field, where, "--messages-field"), cfg.messages_field, where) if cfg.messages_field else None
    text = _value(row, cfg.text_field, where, "--text-field") if messages is None else ""
    if not isinstance(text, str):
        raise ConfigError(f"{where}: {cfg.text_field!r} must be text, got {type(text).__name__}")
    client = _value(row, cfg.client_field, where, "--client-field")
    if isinstance(client, bool) or not isinstance(client, (str, numbers.Integral)) or not str(client).strip():
        raise ConfigError(f"{where}: {cfg.client_field!r} must name a client (text or a whole number), got {client!r:.80}")
    prompt = _value(row, cfg.prompt_field, where, "--prompt-field") if cfg.prompt_field else ""
    if not isinstance(prompt, str):
        raise ConfigError(f"{where}: {cfg.prompt_field!r} must be text, got {type(prompt).__name__}")
    name, capability = clean(str(client)), None
    if column is not None:
        capability = _number(_value(row, column, where, "the column of --ranks"), f"{where}: {column!r} of client {name!r}")
    return _Row(name, str(client), text, prompt, capability, messages)


_ROLES = ("system", "user", "assistant", "tool")


def _messages(value: Any, key: str, where: str) -> list[dict[str, str]]:
    """A conversation up to its last answer; [] where nobody answers, or every answer is empty."""
    if not isinstance(value, list):
        raise ConfigError(f"{where}: {key!r} must be a list of messages {{'role', 'content'}}, got {type(value).__name__}")
    found = []
    for number, message in enumerate(value, 1):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str) or not isinstance(message.get("content"), str):
            raise ConfigError(f"{where}: message {number} of {key!r} must have a 'role' and a 'content' that are text, got {message!r:.60}")
        if message["role"] not in _ROLES:
            raise ConfigError(f"{where}: message {number} of {key!r}: role {message['role']!r:.40}, expected one of {', '.join(_ROLES)}")
        found.append({name: clean(message[name]) for name in ("role", "content")})
    answers = [i for i, message in enumerate(found) if message["role"] == "assistant"]
    return found[: answers[-1] + 1] if any(found[i]["content"].strip() for i in answers) else []


def _value(row: dict[str, Any], key: str, where: str, option: str) -> Any:
    if key not in row:
        chats = [name for name, value in row.items() if isinstance(value, list)] if option == "--text-field" else []
        advice = f"give --messages-field {chats[0]} if that is a conversation, or set {option}" if chats else f"set {option}"
        raise ConfigError(f"{where}: no key {key!r}; it has {some(list(row))}; {advice}")
    return row[key]


def _number(value: Any, what: str) -> float:
    try:
        number = math.nan if isinstance(value, (bool, str)) else float(value)
    except (TypeError, OverflowError):
        number = math.nan
    if not math.isfinite(number):
        raise ConfigError(f"{what} must be a finite number, got {value!r:.40}")
    return number


MOST_PROMPTS = 100


def read_prompts(cfg: Config) -> list[str]:
    """The lines of the file `cfg.sample_prompts` that are not empty; [] where no file is named. `ConfigError` where it has none, or more than 100."""
    if not cfg.sample_prompts:
        return []
    text = read_text(os.path.expanduser(cfg.sample_prompts), "sample_prompts", most=2**20)
    prompts = [line.strip() for line in text.split("\n") if line.strip()]
    if not 1 <= len(prompts) <= MOST_PROMPTS:
        raise ConfigError(f"sample_prompts {cfg.sample_prompts}: expected 1 to {MOST_PROMPTS} prompts, one a line, got {len(prompts)}")
    return prompts


def clean(text: str) -> str:
    """Lone surrogates (broken escapes, undecodable file names) cannot be tokenised or written as UTF-8."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def some(names: list[str], count: int = 5) -> str:
    more = f" and {len(names) - count} more" if len(names) > count else ""
    if not names:
        return "none at all"
    return ", ".join(repr(clean(name if len(name) <= 200 else f"{name[:100]}...{name[-90:]}")) for name in map(str, names[:count])) + more
