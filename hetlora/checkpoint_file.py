"""The checkpoint as a file: safetensors, in which every bit is under a checksum and the state of the run is tensors too. Torch is not needed here.

Its tensors: `bank.*`, `base.*` and `server.*` (`checkpoint`), `state` (the state as UTF-8 JSON), `state.NAME` (the tables of the state as numbers: a table of
12,000 clients by 224 modules would not fit the header), `checksum` (SHA-256 of the whole file, header included, with these 32 bytes as zeros).
The header has one key of metadata alone, as safetensors writes several in another order each time: equal states give equal files.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import sys
from array import array
from collections.abc import Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

from hetlora.config import ConfigError

FORMAT = 3
CHECKSUM, STATE = "checksum", "state"
_METADATA = "hetlora"
_CODES = {"I32": "i", "F64": "d"}  # safetensors' name of a type: that of `array`


class Numbers(NamedTuple):
    """A tensor as bytes, little-endian. `dtype`: safetensors' name of it, 'U8', 'I32' or 'F64'."""

    dtype: str
    shape: list[int]
    data: bytes


# ---------------------------------------------------------------- the state as tensors


def pack(state: Mapping[str, Any]) -> dict[str, Numbers]:
    """{tensor's name: numbers} of a JSON-like state. {client: number} and {client: {module: number}} become tables, all else stays text."""
    rest: dict[str, Any] = {}
    tensors: dict[str, Numbers] = {}
    for name, value in state.items():
        table = _as_table(value)
        if table is None:
            rest[name] = {"value": value}
        else:
            rows, columns, tensors[f"{STATE}.{name}"] = table
            rest[name] = {"rows": rows, "columns": columns}
    text = json.dumps(rest).encode()
    tensors[STATE] = Numbers("U8", [len(text)], text)
    return tensors


def unpack(tensors: Mapping[str, Numbers]) -> dict[str, Any]:
    """The state that `pack` was given."""
    state: dict[str, Any] = {}
    for name, entry in json.loads(tensors[STATE].data).items():
        if "value" in entry:
            state[name] = entry["value"]
            continue
        table, columns = tensors[f"{STATE}.{name}"], entry["columns"]
        numbers = array(_CODES[table.dtype], table.data)
        if sys.byteorder == "big":
            numbers.byteswap()
        values: Iterable[Any] = numbers.tolist()
        if columns is not None:
            width = len(columns)
            values = [dict(zip(columns, numbers[start : start + width].tolist(), strict=True)) for start in range(0, len(numbers), width)]
        state[name] = dict(zip(entry["rows"], values, strict=True))
    return state


def _as_table(value: Any) -> tuple[list[str], list[str] | None, Numbers] | None:
    """(rows, columns, numbers) of {row: number} or {row: {column: number}}; None for anything else."""
    if not isinstance(value, dict) or not value:
        return None
    cells: list[Any] = list(value.values())
    columns: list[str] | None = None
    if isinstance(cells[0], dict):
        columns = list(cells[0])
        if not columns or any(not isinstance(cell, dict) or list(cell) != columns for cell in cells):
            return None
        cells = list(chain.from_iterable(cell.values() for cell in cells))
    kinds = set(map(type, cells))
    dtype = {frozenset({float}): "F64", frozenset({int}): "I32"}.get(frozenset(kinds))
    if dtype is None or (dtype == "I32" and not -(2**31) <= min(cells) <= max(cells) < 2**31):
        return None
    numbers = array(_CODES[dtype], cells)
    if sys.byteorder == "big":
        numbers.byteswap()
    return list(value), columns, Numbers(dtype, [len(value), *([len(columns)] if columns else [])], numbers.tobytes())


# ---------------------------------------------------------------- the file


def metadata() -> dict[str, str]:
    """The header's metadata of a checkpoint."""
    return {_METADATA: json.dumps({"format": FORMAT})}


def sealed(content: bytes) -> list[bytes | memoryview]:
    """`content`, a safetensors file with 32 zeros for its tensor `checksum`, in parts that hold the checksum."""
    begin, end = _place(_header(content), CHECKSUM)
    view = memoryview(content)
    return [view[:begin], hashlib.sha256(content).digest(), view[end:]]


def read_state(path: Path) -> dict[str, Any]:
    """The state in a checkpoint whose checksum holds. Raises `ConfigError` naming the file: another format, damaged, not one of ours."""
    try:
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            header = _header(content)
            _check_format(header, path)
            _check_sum(header, content)
            names = [name for name in header if name == STATE or name.startswith(f"{STATE}.")]
            return unpack({name: _numbers(header, content, name) for name in names})
    except ConfigError:
        raise
    except (OSError, ValueError, KeyError, TypeError, IndexError, OverflowError, AttributeError, RecursionError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(f"{path}: not a readable checkpoint ({reason}); restore it from a copy, or start a new run in another folder") from None


def _check_format(header: dict[str, Any], path: Path) -> None:
    found = header.get("__metadata__", {})
    version = json.loads(found[_METADATA])["format"] if _METADATA in found else found.get("format")
    if version != FORMAT:
        raise ConfigError(f"{path}: not a checkpoint of this version (format {version}, expected {FORMAT}); use the hetlora that wrote it")


def _check_sum(header: dict[str, Any], content: mmap.mmap) -> None:
    begin, end = _place(header, CHECKSUM)
    view = memoryview(content)
    try:
        digest = hashlib.sha256(view[:begin])
        digest.update(bytes(end - begin))
        digest.update(view[end:])
        if end - begin != digest.digest_size or digest.digest() != view[begin:end].tobytes():
            raise ValueError("its checksum does not fit its content: it has been damaged or changed")
    finally:
        view.release()


def _header(content: bytes | mmap.mmap) -> dict[str, Any]:
    size = int.from_bytes(content[:8], "little")
    if size > len(content) - 8:
        raise ValueError("it is cut off, or no safetensors file")
    header = json.loads(content[8 : 8 + size])
    if not isinstance(header, dict):
        raise ValueError("its header is no object")
    return {name: {**entry, "begin": 8 + size} if name != "__metadata__" else entry for name, entry in header.items()}


def _place(header: dict[str, Any], name: str) -> tuple[int, int]:
    """(first byte, byte after the last) of a tensor in the file."""
    if name not in header:
        raise ValueError(f"it has no {name}")
    begin, end = (header[name]["begin"] + int(offset) for offset in header[name]["data_offsets"])
    return begin, end


def _numbers(header: dict[str, Any], content: mmap.mmap, name: str) -> Numbers:
    begin, end = _place(header, name)
    return Numbers(header[name]["dtype"], header[name]["shape"], content[begin:end])
