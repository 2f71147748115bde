"""Rows of CSV and Parquet files, one dict each; what is said of rows that are bad."""

from __future__ import annotations

import contextlib
import csv
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hetlora.errors import ConfigError
from hetlora.extras import install
from hetlora.text_files import encoding_mark, kind_of, parse_json

SUFFIXES = (".csv", ".parquet")


def read_rows(path: Path, wanted: Sequence[str], lists: str | None, numbers: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where, row) of every row, the columns `wanted` alone.   lists, numbers: columns whose text in a CSV file is JSON, or a number.

    Raises `ConfigError` naming the file: it cannot be read or parsed, a column is missing or comes twice, a package is not installed.
    """
    if kind := kind_of(path):
        raise ConfigError(f"data: file {path} is {kind}; expected a regular file")
    yield from (_csv if path.suffix.lower() == ".csv" else _parquet)(path, list(wanted), lists, numbers)


def _check_columns(path: Path, columns: Sequence[str], wanted: Sequence[str]) -> None:
    if missing := [name for name in wanted if name not in columns]:
        there = ", ".join(map(repr, columns[:12])) or "none at all"
        if len(columns) == 1 and any(mark in columns[0] for mark in ";\t|"):
            raise ConfigError(f"data: file {path}: no column {missing[0]!r}; it has {there} alone; separate columns by commas")
        raise ConfigError(f"data: file {path}: no column {missing[0]!r}; it has {there}; set --text-field, --client-field and the like")
    if twice := [name for name in wanted if list(columns).count(name) > 1]:
        raise ConfigError(f"data: file {path}: the column {twice[0]!r} comes twice; rename one")


def _csv(path: Path, wanted: list[str], lists: str | None, numbers: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    """RFC 4180: commas, a header line, quotes that may hold line ends. A row of more or fewer cells than the header is a fault of the file."""
    csv.field_size_limit(sys.maxsize)  # a text may be long
    with path.open("rb") as start:
        if mark := encoding_mark(start.read(4)):
            raise ConfigError(f"data: file {path} is {mark} text; save it as UTF-8")
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, strict=True)
        try:
            columns = next(rows, [])
            _check_columns(path, columns, wanted)
            places = {name: columns.index(name) for name in wanted}
            for number, cells in enumerate(rows, 1):
                where = f"file {path} row {number} (line {rows.line_num})"
                if not cells:
                    continue
                if len(cells) != len(columns):
                    raise ConfigError(f"data: {where}: {len(cells)} cells, the header has {len(columns)}; quote texts with commas")
                row: dict[str, Any] = {name: cells[place] for name, place in places.items()}
                with contextlib.suppress(ValueError):  # what is no number or list is told with the row
                    if numbers is not None:
                        row[numbers] = float(row[numbers])
                with contextlib.suppress(ValueError):
                    if lists is not None:
                        row[lists] = parse_json(row[lists])
                yield where, row
        except (csv.Error, UnicodeDecodeError) as error:
            raise ConfigError(f"data: file {path}: no CSV in UTF-8 (near line {rows.line_num + 1}: {error})") from None


def _parquet(path: Path, wanted: list[str], lists: str | None, numbers: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError:
        raise ConfigError(f"data: file {path}: Parquet needs the 'pyarrow' package; {install('parquet')}") from None
    number = 0
    try:
        with parquet.ParquetFile(path) as file:
            _check_columns(path, file.schema_arrow.names, wanted)
            for batch in file.iter_batches(columns=wanted, batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield f"file {path} row {number}", row
    except (pyarrow.ArrowException, OSError) as error:
        raise ConfigError(f"data: file {path}: cannot be read as Parquet ({' '.join(str(error).split())[:160]})") from None


def tell_bad_rows(source: str, bad: int, faults: list[str], skip: bool) -> None:
    """An error, or where such rows are left out a warning, with the first `faults`; a reason that comes again is said once."""
    parts = [fault.partition(": ") for fault in faults]
    told = [f"{parts[i][0]}: the same" if parts[i][2] in [reason for _, _, reason in parts[:i]] else faults[i] for i in range(len(faults))]
    shown = " | ".join(told) + (f" | and {bad - len(faults)} more" if bad > len(faults) else "")
    if skip:
        warnings.warn(f"{source}: {bad} rows left out: {shown}", stacklevel=6)
    elif bad == 1:
        raise ConfigError(f"{shown}; or leave such rows out with --skip-bad-rows")
    else:
        raise ConfigError(f"{source}: {bad} bad rows: {shown}; correct them, or leave them out with --skip-bad-rows")
