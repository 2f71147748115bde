"""What a run writes with torch: one checkpoint per round, adapters in PEFT's format, the versions. Tensors are safetensors, all else JSON; no pickle."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import sys
import tempfile
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

import hetlora_kernels as hk
from hetlora.config import Config, ConfigError
from hetlora.data import FederatedData
from hetlora.run_folder import ADAPTER_FILE, CHECKPOINT, CONFIG, VERSIONS, WEIGHTS_FILE, refuse_existing, write_atomic

FORMAT = 1
RESUME_INSTEAD = "choose another folder, or continue that run with --resume"
STATE = ("round", "ranks", "r_min", "r_max", "ranks_start", "rounds_trained", "perplexity_before", "stacked_bytes")  # of `ServerState`, besides the bank


def versions(device: torch.device) -> dict[str, str]:
    """What a repeat of the run needs to match: packages, Python, platform, device, threads."""
    packages = {}
    for name in ("hetlora", "torch", "transformers", "peft", "safetensors"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = "not installed"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    machine = {"platform": platform.platform(), "device": f"{device} ({name})", "threads": str(torch.get_num_threads())}
    kernels = ", ".join(sorted({rung for rung, _ in hk.backends().values()}))
    return {**packages, "python": sys.version.split()[0], **machine, "kernels": kernels}


def match_versions(run: Path, device: torch.device) -> list[str]:
    """Use as many threads as the run began with, since sums of another split round otherwise; returns what else differs, as lines for the user."""
    try:
        saved = json.loads((run / VERSIONS).read_text(encoding="utf-8"))
        threads = int(saved["threads"])
    except (OSError, ValueError, KeyError, TypeError):
        return [f"{run / 'versions.json'} cannot be read: the result may differ in the last bits from that of an uninterrupted run"]
    lines = []
    if threads != torch.get_num_threads():
        lines.append(f"using {threads} threads, as the run began with, instead of {torch.get_num_threads()}")
        torch.set_num_threads(threads)
    now = versions(device)
    different = [f"{name} was {saved.get(name)}, is {value}" for name, value in now.items() if saved.get(name) != value]
    return lines + ([f"the result may differ in the last bits from that of an uninterrupted run: {'; '.join(different)}"] if different else [])


def create_run(cfg: Config, device: torch.device) -> Path:
    """The run's new folder with config.json and versions.json, created in one rename; `ConfigError` when it exists and is not empty."""
    run = Path(cfg.output)
    refuse_existing(run, RESUME_INSTEAD)
    try:
        run.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(dir=run.parent, prefix=f".{run.name}."))
        staging.chmod(0o755)
        write_atomic(staging / CONFIG, cfg.to_json())
        write_atomic(staging / VERSIONS, json.dumps(versions(device), indent=2) + "\n")
        os.replace(staging, run)
    except OSError as error:
        raise ConfigError(f"output: cannot create {run} ({error.strerror}); choose a folder that can be written") from None
    return run


def save_checkpoint(run: Path, state: Mapping[str, Any], bank: hk.AdapterBank, base: Mapping[str, Tensor]) -> None:
    """The whole state after a round as one file: bank and folded base weights as tensors, the rest as JSON in the header."""
    tensors = {f"bank.{key}": value.cpu().contiguous() for key, value in bank.state_dict().items()}
    tensors |= {f"base.{key}": value.detach().cpu().contiguous() for key, value in base.items()}
    write_atomic(run / CHECKPOINT, save(tensors, metadata={"format": str(FORMAT), "state": json.dumps(state)}))


def load_checkpoint(run: Path) -> tuple[dict[str, Any], dict[str, Tensor]] | None:
    """(state, tensors) of the newest checkpoint, None before the first; `ConfigError` when the file is not one of ours."""
    path = run / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            if header.get("format") != str(FORMAT):
                raise ConfigError(f"{path}: not a checkpoint of this version (format {header.get('format')}, expected {FORMAT}); use the hetlora that wrote it")
            state = json.loads(header["state"])
            if missing := [name for name in (*STATE, "data") if name not in state]:
                raise ValueError(f"its state lacks {missing[0]}")
            return state, {key: file.get_tensor(key) for key in file.keys()}
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{path}: not a readable checkpoint ({error}); restore it from a copy, or start a new run in another folder") from None


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
