"""The run folder: names of its files, how they are written, and what a run left in them. Torch is not loaded here.

config.json  versions.json     settings and what a repeat needs (`checkpoint.create_run`)
rounds.jsonl                   one line a round
checkpoint.safetensors         the whole state after the newest round (`checkpoint_file`)
opened.json                    the newest round whose sum may have been opened, with secure aggregation
best.safetensors               the same after the best round, with keep_best
adapter/  clients/<name>/      adapters in PEFT's format, of the server and of each client
summary.json                   when the run is complete
report.html and its pictures   (`report.page`)
.lock                          while a process writes to the folder (`lock`)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import secrets
import shlex
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any
from urllib.parse import quote

from hetlora import checkpoint_file, records
from hetlora.config import Config, ConfigError
from hetlora.text_files import parse_json, read_bytes, read_text

CONFIG, VERSIONS, ROUNDS, SUMMARY = "config.json", "versions.json", "rounds.jsonl", "summary.json"
CONTINUED = "continued"  # in versions.json: when, by what command, after which round and to how many the run went on
OPENED = "opened.json"  # the newest round whose masked sum may have been opened
CHECKPOINT, BEST = "checkpoint.safetensors", "best.safetensors"
ADAPTER, CLIENTS = "adapter", "clients"
WEIGHTS_FILE, ADAPTER_FILE = "adapter_model.safetensors", "adapter_config.json"  # PEFT's names
REPORT = "report.html"
PICTURES = ("perplexity.png", "ranks.png", "weights.png", "bytes.png")
DIAGNOSTICS = "diagnostics.png"  # of runs that recorded them


def origin() -> dict[str, str]:
    """When and by what this process made something: for the reader of a report, nothing follows from it."""
    program = Path(sys.argv[0]) if getattr(sys, "argv", None) else Path()
    command = program.stem in ("hetlora", "hetlora-script") or program.parts[-2:] == ("hetlora", "__main__.py")
    now = datetime.now(timezone.utc).isoformat(sep=" ", timespec="seconds")
    return {"started": now, "command": shlex.join(["hetlora", *sys.argv[1:]]) if command else "a call from Python"}


# ---------------------------------------------------------------- is there a run


def is_run(folder: Path) -> bool:
    return (folder / CONFIG).is_file()


def require_run(folder: Path) -> None:
    """`ConfigError` where `folder` is not that of a run."""
    if not is_run(folder):
        raise ConfigError(f"{folder}: no run there ({CONFIG} is missing); give the folder that 'hetlora run' wrote")
    found = read_json(folder / CONFIG, [])
    if isinstance(found, dict) and "model_type" in found and "rounds" not in found:
        raise ConfigError(f"{folder}: no run there ({CONFIG} is that of a model); give the folder that 'hetlora run' wrote")


def refuse_existing(folder: Path, instead: str) -> None:
    """`ConfigError` where `folder` is not free for something new: it must not exist, or be an empty folder.   instead: what to do."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"output: {folder} exists already; {instead}")


def refuse_unwritable(folder: Path) -> None:
    """`ConfigError` where `folder` cannot be made: found before a model is loaded, as far as the nearest folder that is there tells."""
    there = next((parent for parent in folder.absolute().parents if parent.exists()), None)
    if there is None or (there.is_dir() and os.access(there, os.W_OK | os.X_OK)):
        return
    why = f"{there} may not be written to" if there.is_dir() else f"{there} is no folder"
    raise ConfigError(f"output: cannot create {folder} ({why}); choose a folder that can be written")


# ---------------------------------------------------------------- writing


class WriteError(ConfigError):
    """A file that could not be written; whatever stood there before stands whole."""

    def __init__(self, path: Path, error: OSError, then: str = "make room there or mend it, then give the command again") -> None:
        super().__init__(f"{path}: cannot be written ({(error.strerror or str(error)).lower()}); {then}")
        self.path, self.error = path, error


_TEMPORARY = re.compile(r"\.(?P<name>.+?)(?:\.[0-9a-f]{16})?\.tmp")


def write_atomic(path: Path, content: bytes | str | Iterable[bytes | memoryview]) -> None:
    """Write a whole file or nothing: a new file in the same folder, flushed to disk, renamed over `path`, and the folder flushed.

    content: text (UTF-8), bytes, or the parts of the file. Raises `WriteError`.
    """
    parts = [content.encode()] if isinstance(content, str) else [content] if isinstance(content, bytes) else content
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}.tmp")
    try:
        # exclusive, and never through a link that somebody laid there
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0), 0o666)
        with open(descriptor, "wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
        sync_folder(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise WriteError(path, error) from None
        raise


def sync_folder(folder: Path) -> None:
    """Flush the names in a folder to disk, so that a file created or renamed there survives a power cut. Not on Windows, which cannot."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def clean_leftovers(run: Path) -> None:
    """Remove the temporary files that a kill left in a run folder. For the owner of its lock alone."""
    own = {CONFIG, VERSIONS, ROUNDS, SUMMARY, OPENED, CHECKPOINT, BEST, WEIGHTS_FILE, ADAPTER_FILE, REPORT, *PICTURES, DIAGNOSTICS}
    for folder in (run, run / ADAPTER, *(run / CLIENTS).glob("*")):
        for path in folder.glob(".*.tmp") if folder.is_dir() else ():
            found = _TEMPORARY.fullmatch(path.name)
            if found and found["name"] in own:
                path.unlink(missing_ok=True)


def append_round(folder: Path, record: Mapping[str, Any]) -> None:
    """Add a line to rounds.jsonl, flushed to disk. Raises `WriteError`."""
    path = folder / ROUNDS
    new = not path.exists()
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if new:
            sync_folder(folder)
    except OSError as error:
        raise WriteError(path, error) from None


def folder_name(name: str, safe: str = "") -> str:
    """A name for a folder that differs from that of every other `name`, also where a file system ignores case, and never leads elsewhere.

    Capitals, dots at the end and all but ASCII letters, digits, '_', '-', '~', '.' and `safe` are percent-encoded, so that Unicode forms differ too;
    very long names end in a digest.
    """
    quoted = re.sub(r"(?<!%)(?<!%[0-9A-F])[A-Z]", lambda letter: f"%{ord(letter[0]):02X}", quote(name, safe=safe))
    body = quoted.rstrip(".")
    quoted = body + "%2E" * (len(quoted) - len(body))
    if len(quoted) > 200:
        quoted = f"{quoted[:160]}-{hashlib.blake2b(name.encode(), digest_size=8).hexdigest()}"
    return quoted


def client_folder(folder: Path, name: str) -> Path:
    """Folder of one client's adapter."""
    return folder / CLIENTS / folder_name(name)


# ---------------------------------------------------------------- reading


def read_config(folder: Path) -> Config:
    """The config that a run was made with; `ConfigError` when there is none."""
    require_run(folder)
    return Config.from_file(folder / CONFIG)


BITS_ONLY = ("device", "cobatch", "clients_at_once", "cuda_graph", "max_tokens_per_step", "padding_free", "gradient_checkpointing")
"""Settings that change the order of sums and no more: a run may go on with another value, which is said."""
LENGTH = ("rounds",)
"""Settings with another value of which a run goes on as one that had it from the start, where `course.check_length` allows it."""


def method_settings(cfg: Config) -> dict[str, Any]:
    """What a run's result follows from: all settings but the folder's name."""
    return cfg.model_dump(exclude={"output"})


def different_settings(saved: Mapping[str, Any], cfg: Config) -> list[str]:
    """The settings in which `cfg` differs from `saved`. One that `saved` does not know yet had its default, one that `cfg` does not know differs."""
    now = method_settings(cfg)
    defaults = {name: saved.get(name, Config.model_fields[name].default) for name in now}
    return [name for name in now if defaults[name] != now[name]] + [name for name in saved if name not in now]


def check_same_config(folder: Path, cfg: Config, may: tuple[str, ...] = ()) -> list[str]:
    """Compare `cfg` with config.json of the run it is to continue; returns what differs in `BITS_ONLY`, as lines for the user.

    may: further settings that may differ. Raises `ConfigError` naming the settings that differ otherwise.
    """
    saved = method_settings(read_config(folder))
    method, lines = _compare(saved, cfg, may)
    if method:
        raise ConfigError(f"{folder}: cannot resume with other settings ({method}); leave them out, or start a new run in another folder")
    return lines


def check_recorded_config(folder: Path, state: Mapping[str, Any], cfg: Config, may: tuple[str, ...] = ()) -> list[str]:
    """As `check_same_config`, with the settings that the checkpoint was made with: config.json may have been changed after the run began."""
    method, lines = _compare(state["settings"], cfg, may)
    if method:
        raise ConfigError(f"{folder / CONFIG}: not what the checkpoint was made with ({method}); put back the one that was changed, or start a new run")
    return lines


def _compare(saved: Mapping[str, Any], cfg: Config, may: tuple[str, ...]) -> tuple[str, list[str]]:
    """(the settings that change the method, as text; what else differs, as lines for the user)."""
    different = [name for name in different_settings(saved, cfg) if name not in may]
    if method := [name for name in different if name not in BITS_ONLY]:
        return _changes(saved, cfg, method), []
    return "", [f"{_changes(saved, cfg, different)}: the result may differ in the last bits from that of an uninterrupted run"] if different else []


def _changes(saved: Mapping[str, Any], cfg: Config, names: list[str]) -> str:
    return ", ".join(f"{name} was {saved.get(name)!r}, now {getattr(cfg, name, 'unknown')!r}" for name in names[:5])


def read_json(file: Path, problems: list[str]) -> dict[str, Any] | None:
    """An object; None where the file holds none, which is then added to `problems`."""
    try:
        value = parse_json(read_text(file))
    except ConfigError as error:
        problems.append(f"{file.name} cannot be read{str(error).partition('cannot be read')[2]}; what it holds is missing here.")
        return None
    except ValueError:
        problems.append(f"{file.name} cannot be read (not valid JSON); what it holds is missing here.")
        return None
    if isinstance(value, dict):
        return value
    problems.append(f"{file.name} does not hold an object; what it should hold is missing here.")
    return None


def read_summary(folder: Path, problems: list[str]) -> dict[str, Any] | None:
    """summary.json; None where it cannot be read, which is added to `problems`. `ConfigError` where it holds what no run writes."""
    summary = read_json(folder / SUMMARY, problems)
    if summary is not None and (what := records.fault(records.Summary, summary)):
        raise ConfigError(f"{folder / SUMMARY}: damaged ({what}); restore it from a copy, or remove it and finish the run again with --resume")
    return summary


def read_rounds(folder: Path, last: int | None = None, problems: list[str] | None = None) -> list[dict[str, Any]]:
    """Lines of rounds.jsonl in their order, up to round `last`. A line that is not a whole round is left out, and added to `problems`."""
    path = folder / ROUNDS
    try:
        lines = read_bytes(path).decode("utf-8", errors="replace").split("\n") if path.exists() else []
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror})") from None
    lines = lines if not lines or lines[-1] else lines[:-1]
    found: list[dict[str, Any]] = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
            reason = records.fault(records.Round, record)
        except ValueError:
            record, reason = None, "not JSON"
        if reason:
            if problems is not None:
                what = "is cut off" if number == len(lines) and reason == "not JSON" else f"is not valid ({reason})"
                problems.append(f"Line {number} of {ROUNDS} {what} and was left out.")
        elif last is None or record["round"] <= last:
            found.append(record)
    return found


def opened_round(folder: Path) -> int:
    """The newest round whose masked sum may have been opened; 0 where there is none. `ConfigError` where the file is damaged."""
    path = folder / OPENED
    if not path.exists():
        return 0
    found = read_json(path, []) or {}
    if type(number := found.get("round")) is not int or number < 1:
        raise ConfigError(f"{path}: does not say which round was opened last; restore it from a copy, or start a new run")
    return number


def recorded_ranks(folder: Path) -> dict[str, Any]:
    """Client -> rank (or {module: rank}) as of the newest checkpoint; {} where there is none. `ConfigError` where it is damaged."""
    if not (folder / CHECKPOINT).is_file():
        return {}
    ranks = checkpoint_file.read_state(folder / CHECKPOINT).get("ranks")
    return dict(ranks) if isinstance(ranks, dict) else {}


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
    def continued(self) -> list[dict[str, Any]]:
        """`started`, `command`, `after` and `rounds` of each time that the run was continued, as `checkpoint.note_continued` wrote them."""
        there = self.versions.get(CONTINUED)
        kinds = {"started": str, "command": str, "after": int, "rounds": int}
        entries = [entry for entry in there if isinstance(entry, dict)] if isinstance(there, list) else []
        return [entry for entry in entries if all(isinstance(entry.get(name), kind) for name, kind in kinds.items())]

    @property
    def complete(self) -> bool:
        return self.summary is not None

    @property
    def best_round(self) -> int | None:
        """The round whose adapter a finished run ended with, where keep_best chose it."""
        return self.summary.get("best_round") if self.summary else None

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
    summary = read_summary(folder, problems) if (folder / SUMMARY).exists() else None
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
