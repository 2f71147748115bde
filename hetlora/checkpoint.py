"""What a run writes with torch: one checkpoint per round, adapters in PEFT's format, the versions. Tensors are safetensors, all else JSON; no pickle."""

from __future__ import annotations

import contextlib
import glob
import hashlib
import json
import os
import platform
import re
import secrets
import shutil
import sys
import tempfile
from collections.abc import Mapping
from functools import cache
from importlib import metadata
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import hetlora_kernels as hk
from hetlora import checkpoint_file
from hetlora.config import Config, ConfigError
from hetlora.data import FederatedData
from hetlora.lock import LOCK, FolderLock
from hetlora.processes import place
from hetlora.ranks import StartingRanks
from hetlora.run_folder import (
    ADAPTER_FILE,
    BEST,
    CHECKPOINT,
    CONFIG,
    CONTINUED,
    SUMMARY,
    VERSIONS,
    WEIGHTS_FILE,
    WriteError,
    origin,
    read_config,
    refuse_existing,
    sync_folder,
    write_atomic,
)
from hetlora.text_files import parse_json, read_text

RESUME_INSTEAD = "choose another folder, or continue that run with --resume (in Python: resume=True)"
STATE = ("round", "ranks", "r_min", "r_max", "ranks_start", "rounds_trained", "perplexity_before", "seen", "stacked_bytes")
"""Of `ServerState`, besides the bank."""


def versions(device: torch.device) -> dict[str, str]:
    """What a repeat of the run needs to match: packages, Python, platform, device, instruction set, threads, processes."""
    packages = {name: _installed(name) for name in ("hetlora", "torch", "transformers", "peft", "safetensors")}
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = {"platform": platform.platform(), "device": f"{device} ({name})", "threads": str(torch.get_num_threads()), "processes": str(place().count)}
    kernels = ", ".join(sorted({rung for rung, _ in hk.backends().values()}))
    limit = os.environ.get("HETLORA_INSTRUCTION_SET")
    instructions = torch.backends.cpu.get_cpu_capability() + (f", kernels limited to {limit}" if limit else "")
    return {**packages, "python": sys.version.split()[0], **machine, "kernels": kernels, "instruction set": instructions}


@cache  # the packages' descriptions are long, and a process makes many runs
def _installed(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "not installed"


_MOST_THREADS = max(64, 4 * (os.cpu_count() or 1))
"""More threads than this are not started, whatever a file says: the runtimes of some platforms end the process."""


def saved_versions(run: Path) -> tuple[dict[str, Any], int]:
    """(versions.json, its number of threads). Raises `ConfigError` naming the file where it is missing or damaged."""
    path = run / VERSIONS
    advice = "restore it from a copy; a run without it cannot be continued to the same bits"
    text = read_text(path)
    try:
        saved = parse_json(text)
        threads = int(saved["threads"])
        if threads < 1:
            raise ValueError(f"threads: expected a number from 1 on, got {threads}")
    except KeyError as error:
        raise ConfigError(f"{path}: damaged (no {error}); {advice}") from None
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{path}: damaged ({error}); {advice}") from None
    return saved, threads


def match_versions(run: Path, device: torch.device) -> list[str]:
    """Use as many threads as the run began with, since sums of another split round otherwise; returns what else differs, as lines for the user.

    Raises as `saved_versions`.
    """
    saved, threads = saved_versions(run)
    lines = []
    if threads > _MOST_THREADS:
        lines.append(f"{run / VERSIONS}: {threads} threads are more than this machine can run; going on with {torch.get_num_threads()}")
    elif threads != torch.get_num_threads():
        lines.append(f"using {threads} threads, as the run began with, instead of {torch.get_num_threads()}")
        torch.set_num_threads(threads)
    saved, now = {"processes": "1", **saved}, versions(device)
    different = [f"{name} was {saved.get(name)}, is {value}" for name, value in now.items() if saved.get(name) != value]
    return lines + ([f"the result may differ in the last bits from that of an uninterrupted run: {'; '.join(different)}"] if different else [])


def create_run(cfg: Config, device: torch.device, lock: FolderLock | None = None, clients: str = "") -> Path:
    """The run's new folder with config.json and versions.json, created in one rename; `ConfigError` when it exists and is not empty.

    lock: taken on the folder before anybody else can see it.   clients: where they were, for the report.
    """
    run = Path(cfg.output)
    refuse_existing(run, RESUME_INSTEAD)
    staging: Path | None = None
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        _clean_stagings(run)
        staging = Path(tempfile.mkdtemp(dir=run.parent, prefix=f".{run.name}.staging-"))
        staging.chmod(0o755)
        if lock is not None:
            lock.take(staging)
        write_atomic(staging / CONFIG, cfg.to_json())
        write_atomic(staging / VERSIONS, json.dumps({**versions(device), **origin(), "clients": clients}, indent=2) + "\n")
        os.replace(staging, run)
        sync_folder(run.parent)
    except BaseException as error:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)  # nothing is there after the rename
        if isinstance(error, WriteError):
            raise WriteError(run / error.path.name, error.error) from None
        if isinstance(error, OSError):
            refuse_existing(run, RESUME_INSTEAD)  # another process has made it meanwhile
            raise ConfigError(f"output: cannot create {run} ({error.strerror}); choose a folder that can be written") from None
        raise
    if lock is not None:
        lock.moved(run)
    return run


def set_rounds(run: Path, rounds: int) -> None:
    """The run has this many rounds from now on; it is no finished one if it was."""
    saved = read_config(run)
    if saved.rounds != rounds:
        (run / SUMMARY).unlink(missing_ok=True)
        write_atomic(run / CONFIG, saved.model_copy(update={"rounds": rounds}).to_json())


def note_continued(run: Path, after: int, rounds: int) -> None:
    """versions.json says that this process goes on with the run after round `after`, to `rounds` of them: one entry a time, for the reader of a report."""
    saved, _ = saved_versions(run)
    before = saved.get(CONTINUED)
    entries = [*(before if isinstance(before, list) else []), {**origin(), "after": after, "rounds": rounds}]
    write_atomic(run / VERSIONS, json.dumps({**saved, CONTINUED: entries}, indent=2) + "\n")


def _clean_stagings(run: Path) -> None:
    """Remove what a kill inside `create_run` left beside the run: folders of its making that no living process holds."""
    for staging in run.parent.glob(f".{glob.escape(run.name)}.staging-*"):
        with FolderLock() as lock, contextlib.suppress(ConfigError, FileNotFoundError):  # held by another process, or renamed by it meanwhile
            names = {path.name for path in staging.iterdir()}
            if LOCK not in names or any(name not in (CONFIG, VERSIONS, LOCK) and not name.endswith(".tmp") for name in names):
                continue
            lock.take(staging)
            if not lock.note:
                shutil.rmtree(staging)


def save_checkpoint(
    run: Path, state: Mapping[str, Any], bank: hk.AdapterBank, base: Mapping[str, Tensor], moments: Mapping[str, Tensor] = MappingProxyType({})
) -> None:
    """The whole state after a round as one file, under a checksum: bank, folded base weights, moments of the server's optimiser and the state's tables as
    tensors, the rest as JSON."""
    tensors = {f"bank.{key}": value.cpu().contiguous() for key, value in bank.state_dict().items()}
    tensors |= {f"base.{key}": value.detach().cpu().contiguous() for key, value in base.items()}
    tensors |= {f"server.{key}": value.cpu().contiguous() for key, value in moments.items()}
    for name, (dtype, shape, data) in checkpoint_file.pack(state).items():
        tensors[name] = torch.frombuffer(bytearray(data), dtype=_DTYPES[dtype]).view(shape)
    tensors[checkpoint_file.CHECKSUM] = torch.zeros(hashlib.sha256().digest_size, dtype=torch.uint8)
    write_atomic(run / CHECKPOINT, checkpoint_file.sealed(save(tensors, metadata=checkpoint_file.metadata())))


def keep_as_best(run: Path) -> None:
    """best.safetensors <- the newest checkpoint: one more name of its file, which is never written again, or a copy where names cannot be shared."""
    temporary = run / f".{BEST}.{secrets.token_hex(8)}.tmp"
    try:
        os.link(run / CHECKPOINT, temporary)
    except OSError:
        write_atomic(run / BEST, (run / CHECKPOINT).read_bytes())
        return
    os.replace(temporary, run / BEST)
    temporary.unlink(missing_ok=True)  # it stays where both were one file before
    sync_folder(run)


_DTYPES = {"U8": torch.uint8, "I32": torch.int32, "F64": torch.float64}


def load_state(run: Path, name: str = CHECKPOINT) -> dict[str, Any] | None:
    """The state in the newest checkpoint, None before the first; `ConfigError` when the file is damaged or not one of ours.   name: of another one."""
    path = run / name
    if not path.is_file():
        return None
    state = checkpoint_file.read_state(path)
    if missing := [name for name in (*STATE, "data", "settings") if name not in state]:
        raise ConfigError(f"{path}: not a readable checkpoint (its state lacks {missing[0]}); restore it from a copy, or start a new run in another folder")
    return state


def load_checkpoint(run: Path, name: str = CHECKPOINT) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(state, tensors of the bank, the base and the server's optimiser) of the newest checkpoint; else as `load_state`."""
    state = load_state(run, name)
    if state is None:
        return None
    try:
        with safe_open(run / name, framework="pt") as file:
            return state, {key: file.get_tensor(key) for key in file.keys() if key.startswith(("bank.", "base.", "server."))}
    except (SafetensorError, OSError, ValueError) as error:
        raise ConfigError(f"{run / name}: not a readable checkpoint ({error}); restore it from a copy, or start a new run") from None


def check_start(run: Path, recorded: Mapping[str, Any], cfg: Config, data: str, starting: StartingRanks) -> None:
    """`ConfigError` where the run's clients are not those that a checkpoint was made with.   recorded: its state.   data: the `fingerprint` of theirs now."""
    if recorded["data"] != data:
        raise ConfigError(f"{run}: the data is not the data this run began with; restore it, or start a new run in another folder")
    now = {"r_min": starting.r_min, "r_max": starting.r_max, "ranks_start": starting.ranks}
    if any(recorded[name] != value for name, value in now.items()):
        raise ConfigError(f"ranks = {cfg.ranks!r}: not the ranks that the run in {run} began with; restore the file, or start a new run")


def fingerprint(data: FederatedData) -> str:
    """Changes when any client's name, tokens or division into sequences change."""
    digest = hashlib.blake2b(digest_size=16)
    for client in (*data.clients, *data.held_out):
        lengths = [[len(sequence) for sequence in part] for part in (client.train, client.test)]
        digest.update(repr((client.name, lengths)).encode())
        for sequence in (*client.train, *client.test):
            digest.update(sequence.numpy().tobytes())
    return digest.hexdigest()


def write_adapter(folder: Path, adapter: Mapping[str, Tensor], scale: float, model: str) -> None:
    """One adapter in PEFT's format: adapter_model.safetensors and adapter_config.json, with alpha = scale * rank in every module."""
    folder.mkdir(parents=True, exist_ok=True)
    suffix = ".lora_A.weight"
    prefix = "base_model.model."
    ranks = {key[len(prefix) : -len(suffix)]: tensor.shape[0] for key, tensor in adapter.items() if key.endswith(suffix)}
    common = max(ranks.values(), default=0)
    # the whole name: PEFT also takes a pattern for the end of a longer name
    others = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != common}
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": model,
        "r": common,
        "lora_alpha": int(scale * common) if float(scale * common).is_integer() else scale * common,
        "rank_pattern": others,
        "alpha_pattern": {pattern: scale * rank for pattern, rank in others.items()},
        "target_modules": list(ranks),
        "lora_dropout": 0.0,
        "bias": "none",
        "inference_mode": True,
        "init_lora_weights": True,
    }
    write_atomic(folder / WEIGHTS_FILE, save({k: v.cpu().contiguous() for k, v in adapter.items()}, metadata={"format": "pt"}))
    write_atomic(folder / ADAPTER_FILE, json.dumps(config, indent=2) + "\n")
