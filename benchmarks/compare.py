"""`hetlora bench compare A.json B.json`: time in B over time in A, row by row. Other devices, versions or load are said first.

`hetlora bench compare B.json --base REV`: A is that file as git's revision REV has it.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from . import figures, saved

TEXTS, COUNTS, NUMBERS = ("op", "shape", "dtype", "provider", "yardstick"), ("clients", "threads"), ("median_s", "p20_s", "p80_s", "ratio", "bytes")


def _is(kind: type | tuple[type, ...], value: Any) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _is_positive(value: Any) -> bool:
    return _is((int, float), value) and 0 < value <= sys.float_info.max


def check_row(record: Mapping[str, Any]) -> None:
    """KeyError or TypeError that says what is wrong with a row."""
    if missing := [name for name in (*TEXTS, *COUNTS, *NUMBERS) if name not in record]:
        raise KeyError(missing[0])
    for name in TEXTS:
        if not isinstance(record[name], str):
            raise TypeError(f"{name} is {record[name]!r}, no text")
    of = f"of {record['op']}, {record['provider']}"
    for name in COUNTS:
        if not _is(int, record[name]) or record[name] < 1:
            raise TypeError(f"{name} {of} is {record[name]!r}, no whole number from 1")
    needed = ("flops",) if (figures.is_ceiling(record) and record["op"] == "product") or record.get("flops") is not None else ()
    for name in (*NUMBERS, *needed):
        if not _is_positive(record.get(name)):
            raise TypeError(f"{name} {of} is {record.get(name)!r}, no positive number")


def check_head(data: Mapping[str, Any]) -> None:
    """TypeError that says what is wrong with what a file says of its run."""
    if not isinstance(data["device"], dict) or not isinstance(data["versions"], dict):
        raise TypeError("device and versions are no objects")
    load = data.get("load_average") or {}
    if not isinstance(load, dict) or not all(_is((int, float), value) for value in load.values()):
        raise TypeError(f"load_average is {load!r}, no object of numbers")
    if not isinstance(data.get("backends") or {}, dict):
        raise TypeError("backends is no object")
    for name in ("refused", "left_out"):
        said = data.get(name) or []
        if not isinstance(said, (list, str)) or (name == "refused" and isinstance(said, str)):
            raise TypeError(f"{name} is {said!r}, no list")


def read(path: Path) -> dict[str, Any]:
    """A file of figures; ValueError, in one line, for anything else."""
    try:
        data = saved.read(path)
        check_head(data)
        for record in data["results"]:
            check_row(record)
            record["gb_per_s"] = record["bytes"] / record["median_s"] / 1e9
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not text; expected a file that --json wrote") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON (line {error.lineno}: {error.msg}); expected a file that --json wrote") from None
    except KeyError as error:
        raise ValueError(f"{path}: no {error} where one is expected; not a file of figures, or of another release") from None
    except (TypeError, AttributeError, ArithmeticError) as error:
        raise ValueError(f"{path}: not a file of figures ({error}); expected one that --json wrote") from None
    if not data["results"]:
        raise ValueError(f"{path}: holds no figures; its run was stopped before the first")
    return data


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """What else differs between two runs, beside what is compared."""
    found = []
    if bool(a.get("cold")) != bool(b.get("cold")):
        found.append(f"caches: overwritten before every call in {'A' if a.get('cold') else 'B'} alone")
    for part in ("device", "versions", "backends"):
        left, right = a.get(part) or {}, b.get(part) or {}
        for name in dict.fromkeys([*left, *right]):
            if left.get(name) != right.get(name):
                found.append(f"{part.removesuffix('s')} {name}: {left.get(name, 'none')} in A, {right.get(name, 'none')} in B")
    return found


def busy(data: Mapping[str, Any]) -> str:
    load, threads = data.get("load_average") or {}, max(record["threads"] for record in data["results"])
    return f"load average {load.get('before', 0.0):.1f} before, {load.get('after', 0.0):.1f} after" if load.get("before", 0.0) > 0.5 * threads else ""


def percent(text: str) -> float:
    try:
        value = float(text.removesuffix("%"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected per cent such as 5%, got {text!r}") from None
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected per cent from 0, got {text!r}")
    return value


def arguments(argv: list[str], prog: str, parser_class: type[argparse.ArgumentParser]) -> argparse.Namespace:
    parser = parser_class(prog=prog, description=__doc__)
    parser.add_argument("files", type=Path, nargs="+", metavar="FILE.json", help="A, what is compared with: before, or another machine; then B")
    parser.add_argument("--base", metavar="REV", help="B alone is named, and A is that file in this revision of git")
    limit = "exit status 1 where a row of hetlora takes longer in B by more than this, or where B says NOT MEASURED"
    parser.add_argument("--fail-above", type=percent, metavar="5%", help=limit)
    options = parser.parse_args(argv)
    if len(options.files) != (1 if options.base else 2):
        raise ValueError(f"expected {'one file with --base' if options.base else 'two files, or one with --base REV'}, got {len(options.files)}")
    return options


def committed(path: Path, revision: str) -> dict[str, Any]:
    """The file's figures as that revision of its repository has them."""
    try:
        done = subprocess.run(["git", "show", "--end-of-options", f"{revision}:./{path.name}"], cwd=path.parent, capture_output=True, check=False)
    except FileNotFoundError:
        raise ValueError(f"--base {revision}: git was not found" if path.parent.is_dir() else f"{path}: no such file or directory") from None
    if done.returncode:
        raise ValueError(f"--base {revision}: git says of {path}: {(done.stderr.decode(errors='replace').strip().splitlines() or ['nothing'])[0]}")
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / f"{path.name} of {revision.replace('/', '-')}"
        held.write_bytes(done.stdout)
        return read(held)


def main(options: argparse.Namespace) -> int:
    path_b = options.files[-1]
    path_a = f"{path_b} of {options.base}" if options.base else options.files[0]
    a, b = committed(path_b, options.base) if options.base else read(path_a), read(path_b)
    for letter, path, data in (("A", path_a, a), ("B", path_b, b)):
        print(f"{letter}  {path}: {data['device'].get('gpu') or data['device'].get('cpu')}; {data.get('date', 'no date')}; {data.get('command', 'no command')}")
    differing = differences(a, b)
    print("\n".join(f"differs: {text}" for text in differing) or "same device, versions and rungs")
    for letter, data in (("A", a), ("B", b)):
        if text := busy(data):
            print(f"{letter} was measured on a busy machine: {text}")
        if data.get("measurement") is False:
            print(f"{letter} has tiny shapes: its figures mean nothing")
    left, right = ({(figures.key(r), r["provider"]): r for r in data["results"]} for data in (a, b))
    both = [name for name in left if name in right]
    if not both:
        raise ValueError(f"{path_a} and {path_b} have no row in common; measure both with the same options")
    print(f"\n{'B / A':>7s}  {'A':>9s} {'B':>9s}  row")
    worse = []
    for name in both:
        one, other = left[name], right[name]
        ratio = other["median_s"] / one["median_s"]
        apart = one["p80_s"] < other["p20_s"] or other["p80_s"] < one["p20_s"]
        bounded = name[1].startswith("hetlora") and options.fail_above is not None and ratio > 1 + options.fail_above / 100
        worse += [ratio] if bounded else []
        mark = "!" if bounded else " " if apart else "~"
        print(f"{ratio:7.3f}{mark} {figures.seconds(one['median_s']):>9s} {figures.seconds(other['median_s']):>9s}  {name[1]}: {figures.title(name[0])}")
    print("~ the spans from the 20th to the 80th percentile overlap")
    for letter, rest in (("A", [name for name in left if name not in right]), ("B", [name for name in right if name not in left])):
        if rest:
            print(f"not compared, only in {letter}: {len(rest)} rows, the first {rest[0][1]}: {figures.title(rest[0][0])}")
    for letter, data in (("A", a), ("B", b)):
        for text in data.get("refused") or []:
            print(f"not measured in {letter}: {text}")
    if options.fail_above is None:
        return 0
    if worse:
        print(f"! {len(worse)} rows of hetlora take longer by more than {options.fail_above:g} %, the worst {max(worse):.3f} times")
    return int(bool(worse or b.get("refused")))
