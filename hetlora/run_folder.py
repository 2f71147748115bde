"""The run folder: names of its files, how they are written, and what a run left in them. Torch is not loaded here.

config.json  versions.json     settings and what a repeat needs (`checkpoint.create_run`)
rounds.jsonl                   one line a round
checkpoint.safetensors         the whole state after the newest round (`checkpoint`)
adapter/  clients/<name>/      adapters in PEFT's format, of the server and of each client
summary.json                   when the run is complete
report.html and its pictures   (`report.page`)
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from safetensors import SafetensorError, safe_open

from hetlora.config import Config, ConfigError

CONFIG, VERSIONS, ROUNDS, SUMMARY = "config.json", "versions.json", "rounds.jsonl", "summary.json"
CHECKPOINT = "checkpoint.safetensors"
ADAPTER, CLIENTS = "adapter", "clients"
WEIGHTS_FILE, ADAPTER_FILE = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
REPORT = "report.html"
PICTURES = ("perplexity.png", "ranks.png", "weights.png", "bytes.png")
DIAGNOSTICS = "diagnostics.png"  # of runs that recorded them


# ---------------------------------------------------------------- is there a run


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def require_run(folder: Path) -> None:
    """`ConfigError` where `folder` is not that of a run."""
    if not is_run(folder):
        raise ConfigError(f"{folder}: no run there ({CONFIG} is missing); give the folder that 'hetlora run' wrote")


def refuse_existing(folder: Path, instead: str) -> None:
    """`ConfigError` where `folder` is not free for something new: it must not exist, or be an empty folder.   instead: what to do."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output: {folder} exists already; {instead}")


# ---------------------------------------------------------------- writing


def write_atomic(path: Path, content: bytes | str) -> None:
    """Write a whole file or nothing: a temporary file in the same folder, flushed to disk, then renamed over `path`."""
    data = content.encode() if isinstance(content, str) else content
    temporary = path.with_name(f".{path.name}.tmp")  # one name, so that what a kill leaves behind goes with the next write
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def append_round(folder: Path, record: Mapping[str, Any]) -> None:
    with open(folder / ROUNDS, "a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
        file.flush()
        os.fsync(file.fileno())


def client_folder(folder: Path, name: str) -> Path:
    """Folder of one client's adapter. Names are quoted so that none can leave `clients`; very long ones end in a digest."""
    quoted = quote(name, safe="").replace(".", "%2E") if set(name) <= {"."} else quote(name, safe="")
    if len(quoted) > 200:
        quoted = f"{quoted[:160]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
    return folder / CLIENTS / quoted


# ---------------------------------------------------------------- reading


def read_config(folder: Path) -> Config:
    """The config that a run was made with; `ConfigError` when there is none."""
    require_run(folder)
    return Config.from_file(folder / CONFIG)


def check_same_config(folder: Path, cfg: Config) -> None:
    """`ConfigError` naming the settings in which `cfg` differs from the run it is to continue."""
    saved = read_config(folder)
    different = [name for name in Config.model_fields if name != "output" and getattr(saved, name) != getattr(cfg, name)]
    if different:
        pairs = ", ".join(f"{name} was {getattr(saved, name)!r}, now {getattr(cfg, name)!r}" for name in different[:5])
        raise ConfigError(f"{folder}: cannot resume with other settings ({pairs}); leave them out, or start a new run in another folder")


def read_json(file: Path, problems: list[str]) -> dict[str, Any] | None:
    """An object; None where the file holds none, which is then added to `problems`."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        problems.append(f"{file.name} cannot be read ({getattr(error, 'strerror', None) or 'not valid JSON'}); what it holds is missing here.")
        return None
    if isinstance(value, dict):
        return value
    problems.append(f"{file.name} does not hold an object; what it should hold is missing here.")
    return None


def read_rounds(folder: Path, last: int | None = None, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Lines of rounds.jsonl in their order, up to round `last`. A line that a kill cut short is left out, and added to `problems`."""
    path = folder / ROUNDS
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.is_file() else []
    records: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
            counts = last is None or record["round"] <= last
            int(record["round"])
        except (ValueError, TypeError, KeyError):
            if problems is not None:
                what = "is cut off" if number == len(lines) else "is not valid"
                problems.append(f"Line {number} of {ROUNDS} {what} and was left out.")
            continue
        if counts:
            records.append(record)
    return records


def recorded_ranks(folder: Path) -> dict[str, Any]:
    """Client -> rank (or {module: rank}) as of the newest checkpoint; {} without a readable one. Reads its header alone."""
    try:
        with safe_open(folder / CHECKPOINT, "np") as file:
            return dict(json.loads((file.metadata() or {})["state"])["ranks"])
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return {}


@dataclass
class Run:
    """What a run folder holds. `records`: one per round, by round; `problems`: what is missing or unreadable, for the reader of the report."""

    folder: Path
    config: dict[str, Any]
    versions: dict[str, Any]
    records: list[dict[str, Any]]
    summary: dict[str, Any] | None
    start_ranks: dict[str, float]
    problems: list[str] = field(default_factory=list)

    @property
    def trained(self) -> list[dict[str, Any]]:
        """The rounds with training: all but round 0."""
        return [record for record in self.records if record["round"] > 0]

    @property
    def complete(self) -> bool:
        return self.summary is not None

    @property
    def homlora_rank(self) -> int | None:
        return self.summary.get("homlora_rank") if self.summary else None


def read_run(run_dir: str | Path) -> Run:
    """Read a run folder, finished or not.

    A last line of rounds.jsonl that was cut off is left out; of two lines of one round (written again by --resume) the later one counts.
    Raises ConfigError: no run there, or no round on record yet.
    """
    folder = Path(run_dir)
    require_run(folder)
    problems: list[str] = []
    config = read_json(folder / CONFIG, problems) or {}
    versions = read_json(folder / VERSIONS, problems) or {}
    by_round = {int(record["round"]): record for record in read_rounds(folder, problems=problems)}
    records = [by_round[number] for number in sorted(by_round)]
    if not records:
        raise ConfigError(f"{folder}: the run has no round on record yet; continue it with 'hetlora run --resume --output {folder}'")
    summary = read_json(folder / SUMMARY, problems) if (folder / SUMMARY).exists() else None
    if summary is None:
        done, planned = records[-1]["round"], config.get("rounds", "?")
        problems.insert(0, f"This run is not complete: {done} of {planned} rounds are on record. Continue it with: hetlora run --resume --output {folder}")
    return Run(folder, config, versions, records, summary, _start_ranks(folder, records, summary), problems)


def mean_rank(rank: Any) -> float:
    """A rank as records have it: a number, or {module: rank}, whose mean it is."""
    return sum(rank.values()) / len(rank) if isinstance(rank, dict) else float(rank)


def _start_ranks(folder: Path, records: list[dict[str, Any]], summary: dict[str, Any] | None) -> dict[str, float]:
    """Rank of every client before its first round. Clients that have not trained are known from the summary or the checkpoint only."""
    ranks: dict[str, float] = {}
    for record in records:
        for client in record.get("clients") or []:
            ranks.setdefault(client["name"], mean_rank(client["rank_before"]))
    others = recorded_ranks(folder) if summary is None else {c["name"]: c["rank_start"] for c in summary["clients"]}
    for name, rank in others.items():
        ranks.setdefault(name, mean_rank(rank))
    return dict(sorted(ranks.items()))
