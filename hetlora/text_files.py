"""Small text files that others may have written or damaged: read without waiting for them, without guessing their encoding, without losing a key.

All text is UTF-8, with or without a byte order mark.
"""

from __future__ import annotations

import codecs
import json
import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hetlora.errors import ConfigError

_OTHER_MARKS = {codecs.BOM_UTF32_LE: "UTF-32", codecs.BOM_UTF32_BE: "UTF-32", codecs.BOM_UTF16_LE: "UTF-16", codecs.BOM_UTF16_BE: "UTF-16"}
_KINDS = ((stat.S_ISDIR, "a folder"), (stat.S_ISFIFO, "a named pipe"), (stat.S_ISSOCK, "a socket"), (stat.S_ISCHR, "a device"), (stat.S_ISBLK, "a device"))


def shortened(text: str, most: int = 80) -> str:
    """What a message shows of a text of any length."""
    return text if len(text) <= most else f"{text[:most]}..."


def kind_of(path: str | Path) -> str:
    """'' for a regular file; else what `path` is instead, in words."""
    return _kind(os.stat(path).st_mode)


def _kind(mode: int) -> str:
    return "" if stat.S_ISREG(mode) else next((name for test, name in _KINDS if test(mode)), "no regular file")


def encoding_mark(start: bytes) -> str:
    """'UTF-16' or 'UTF-32' where the first bytes of a file are the byte order mark of one, else ''."""
    return next((name for mark, name in _OTHER_MARKS.items() if start.startswith(mark)), "")


def read_bytes(path: str | Path) -> bytes:
    """The content of a regular file. Never waits: a pipe or a device is an `OSError` that says what it is."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        if kind := _kind(os.fstat(descriptor).st_mode):
            raise OSError(0, f"it is {kind}", str(path))
        with open(descriptor, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(descriptor)


def decode(content: bytes) -> str:
    """UTF-8 text without its mark; `ValueError` in words where it is none."""
    if mark := encoding_mark(content):
        raise ValueError(f"it is {mark} text, save it as UTF-8")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not UTF-8 text, byte {error.start} is 0x{content[error.start]:02x}") from None


def read_text(path: str | Path, what: str = "", most: int | None = None) -> str:
    """A text file. Raises `ConfigError` naming `what` and the path: missing, no regular file, not UTF-8, larger than `most` bytes."""
    try:
        content = read_bytes(path)
        if most is not None and len(content) > most:
            raise ValueError(f"it has {len(content)} bytes, expected at most {most}")
        return decode(content)
    except (OSError, ValueError) as error:  # ValueError also for a path with a zero byte
        raise ConfigError(f"{what} {path}: cannot be read ({getattr(error, 'strerror', None) or error})".strip()) from None


def parse_json(text: str) -> Any:
    """`json.loads` where no key may come twice; every fault is a `ValueError` in words."""
    try:
        return json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError("nested too deep") from None


def _unique(pairs: Sequence[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} comes twice")
    return table
