"""The file of a suite's figures: medians and spreads, one line for each provider of a case. `python -m benchmarks.saved FILE ...` writes older files anew.

A file says once what a case is and then, on a line each, what its providers took: median, 20th and 80th percentile, ratios, memory. Single rounds are not
kept. Numbers have six digits. In memory the figures stay one flat record for each case and provider.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

SCHEMA = 2
OF_THE_CASE = ("suite", "op", "shape", "clients", "dtype", "threads", "yardstick", "bytes", "flops", "note")
DERIVED = ("gb_per_s",)  # bytes / median


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _grouped(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, dict[str, Any]]]]:
    """(what the case is, {provider: its figures}), in the order of the records."""
    cases: dict[tuple, tuple[dict[str, Any], dict[str, dict[str, Any]]]] = {}
    for record in records:
        case = {name: record[name] for name in OF_THE_CASE if name in record}
        figures = {name: _short(value) for name, value in record.items() if name not in (*OF_THE_CASE, *DERIVED, "provider")}
        cases.setdefault(tuple(case.values()), (case, {}))[1][record["provider"]] = figures
    return list(cases.values())


def write(result: dict[str, Any], path: Path) -> None:
    """Write a run's `result` (its "results" are flat records) to `path`: the whole file or, where that is stopped, none of it; what was there stays."""
    head = json.dumps({**{name: value for name, value in result.items() if name != "results"}, "schema": SCHEMA}, indent=1)
    cases = []
    for case, providers in _grouped(result["results"]):
        lines = [f"   {json.dumps(name)}: {json.dumps(figures)}" for name, figures in providers.items()]
        cases.append(f'  {json.dumps(case)[:-1]}, "providers": {{\n' + ",\n".join(lines) + "}}")
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(path, f'{head[:-2]},\n "cases": [\n' + ",\n".join(cases) + "\n ]\n}\n")


def replace(path: Path, text: str) -> None:
    """Write the whole file or, where that is stopped, none of it."""
    if path.exists() and not path.is_file():  # a pipe, a device
        path.write_text(text, encoding="utf-8")
        return
    path = path.resolve()  # a link stays
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def read(path: Path) -> dict[str, Any]:
    """What `write` was given, to six digits; also reads files of the first form, whose records are flat."""
    data = json.loads(path.read_text(encoding="utf-8"))
    if data["schema"] == 1:
        return data
    records = data["results"] = []
    for case in data.pop("cases"):
        for provider, figures in case.pop("providers").items():
            records.append({**case, "provider": provider, **figures})
            if "bytes" in case:
                records[-1]["gb_per_s"] = case["bytes"] / figures["median_s"] / 1e9
    return data


def _date_of_commit(path: Path) -> str:
    """The day on which the figures were committed, for files from before the date of the run was written down."""
    done = subprocess.run(["git", "log", "-1", "--format=%cs", "--", path.name], cwd=path.parent, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def main(argv: list[str] | None = None) -> int:
    for name in sys.argv[1:] if argv is None else argv:
        path = Path(name)
        data = read(path)
        if "date" not in data:
            data["date"] = f"committed {_date_of_commit(path)}"
        write(data, path)
        print(f"{path}: {len(data['results'])} figures of {len(_grouped(data['results']))} cases, {path.stat().st_size / 1e3:.0f} kB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
