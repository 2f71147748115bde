"""Take an adapter out of a run folder: the global one at any rank, or a client's own, in PEFT's format."""

from __future__ import annotations

import difflib
import json
import math
import warnings
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from hetlora.config import ConfigError

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
Factors = dict[str, tuple[Tensor, Tensor]]  # dotted module name: (A [r, n], B [m, r])


def export_adapter(run_dir: str | Path, out_dir: str | Path, rank: int | None = None, client: str | None = None) -> Path:
    """dW = s * B[:, :rank] A[:rank, :] of every module, written to `out_dir` for `PeftModel.from_pretrained`.

    run_dir: folder of a run.
    out_dir: folder to create; it must not exist or be empty.
    rank: leading rank rows to keep of the global adapter; None = all.
    client: export this client's last trained adapter at its own rank instead. A client that has not trained
        gets the global adapter truncated to its rank, and a warning says so.

    lora_alpha = s * rank, so the scale s stays what it was in training. Returns `out_dir`.
    Raises ConfigError: no run or no adapter there, `rank` out of range, unknown client, both `rank` and `client`, `out_dir` not empty.
    """
    run, out = Path(run_dir), Path(out_dir)
    if rank is not None and client is not None:
        raise ConfigError("export: give a rank or a client, not both (a client's adapter has the client's own rank)")
    if not (run / "config.json").is_file():
        raise ConfigError(f"{run}: no run there (config.json is missing); give the folder that 'hetlora run' wrote")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"{out}: exists and is not an empty folder; give a new one, nothing is overwritten")
    if client is None:
        config, factors, scales = _read_adapter(run / "adapter")
        ranks = _uniform_ranks(factors, rank, run)
    else:
        config, factors, scales, ranks = _client_adapter(run, client)
    _write_adapter(out, config, {name: (a[: ranks[name]], b[:, : ranks[name]]) for name, (a, b) in factors.items()}, scales)
    return out


def base_model_of(run_dir: str | Path) -> str:
    """Folder or hub id of the base model that the run's adapters belong to; '' if the run does not say."""
    try:
        config = json.loads((Path(run_dir) / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    return config.get("base_model_name_or_path") or ""


def _read_adapter(folder: Path) -> tuple[dict[str, Any], Factors, dict[str, float]]:
    """The adapter's config, its factors and each module's scale alpha / r."""
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    for file in (weights, settings):
        if not file.is_file():
            raise ConfigError(f"{file}: missing; the run has not written this adapter, finish it with 'hetlora run --resume --output {folder.parent}'")
    try:
        config = json.loads(settings.read_text(encoding="utf-8"))
        with safe_open(weights, "pt") as file:
            names = list(file.keys())
        tensors = load_file(weights)
    except (ValueError, SafetensorError) as error:
        raise ConfigError(f"{folder}: not a readable adapter ({' '.join(str(error).split())})") from None
    modules = [key[len(_PREFIX) : -len(_A)] for key in names if key.startswith(_PREFIX) and key.endswith(_A)]
    wanted = {_PREFIX + name + end for name in modules for end in (_A, _B)}
    if not modules or wanted != set(names):
        odd = sorted(wanted.symmetric_difference(names))[:1]
        raise ConfigError(f"{weights}: expected pairs '{_PREFIX}<module>{_A}' and '...{_B}'{f', {odd[0]!r} does not fit' if odd else ', got none'}")
    factors = {name: (tensors[_PREFIX + name + _A], tensors[_PREFIX + name + _B]) for name in modules}
    alphas = config.get("alpha_pattern") or {}
    scales = {name: alphas.get(name, config["lora_alpha"]) / a.shape[0] for name, (a, _) in factors.items()}
    return config, factors, scales


def _uniform_ranks(factors: Factors, rank: int | None, run: Path) -> dict[str, int]:
    available = {name: a.shape[0] for name, (a, _) in factors.items()}
    lowest = min(available.values())
    if rank is None:
        return available
    if not 1 <= rank <= lowest:
        raise ConfigError(f"export: rank: expected 1 to {lowest} (the rank of the global adapter in {run}), got {rank}")
    return dict.fromkeys(available, rank)


def _client_adapter(run: Path, client: str) -> tuple[dict[str, Any], Factors, dict[str, float], dict[str, int]]:
    own = run / "clients" / quote(client, safe="")
    if own.is_dir():
        config, factors, scales = _read_adapter(own)
        return config, factors, scales, {name: a.shape[0] for name, (a, _) in factors.items()}
    known = _client_ranks(run)
    if client not in known:
        trained = [unquote(path.name) for path in (run / "clients").glob("*")]
        everyone = sorted({*known, *trained})
        close = difflib.get_close_matches(client, everyone, n=3, cutoff=0.5) or everyone[:3]
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else " (the run has recorded no client yet)"
        raise ConfigError(f"export: unknown client {client!r} in {run}{hint}")
    config, factors, scales = _read_adapter(run / "adapter")
    rank = known[client]
    ranks = {name: rank[name] if isinstance(rank, dict) else rank for name in factors}
    shown = f"rank {rank}" if not isinstance(rank, dict) else "its ranks"
    warnings.warn(f"client {client!r} has no trained adapter in {run}; this is the global adapter truncated to {shown}", stacklevel=3)
    return config, factors, scales, ranks


def _client_ranks(run: Path) -> dict[str, int | dict[str, int]]:
    """Current rank of every client: of the newest checkpoint, else of the summary."""
    for file in (run / "checkpoint" / "state.json", run / "summary.json"):
        try:
            state = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        ranks = state.get("ranks") or {c["name"]: c["rank_end"] for c in state.get("clients", []) if isinstance(c, dict) and "rank_end" in c}
        if ranks and all(isinstance(r, (int, dict)) for r in ranks.values()):
            return dict(ranks)
    return {}


def _whole(value: float) -> float | int:
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-12) else value


def _write_adapter(out: Path, config: dict[str, Any], factors: Factors, scales: dict[str, float]) -> None:
    """Weights first: a folder with adapter_config.json is a complete adapter."""
    ranks = {name: a.shape[0] for name, (a, _) in factors.items()}
    first = next(iter(ranks))
    r, alpha = ranks[first], _whole(scales[first] * ranks[first])
    config = {**config, "r": r, "lora_alpha": alpha, "rank_pattern": {}, "alpha_pattern": {}}
    # PEFT takes the first pattern that matches the end of a module's name, so longer names go first.
    for name in sorted(ranks, key=len, reverse=True):
        if ranks[name] != r or _whole(scales[name] * ranks[name]) != alpha:
            config["rank_pattern"][name] = ranks[name]
            config["alpha_pattern"][name] = _whole(scales[name] * ranks[name])
    tensors = {}
    for name, (a, b) in factors.items():
        tensors[_PREFIX + name + _A], tensors[_PREFIX + name + _B] = a.clone(), b.contiguous()
    out.mkdir(parents=True, exist_ok=True)
    save_file(tensors, out / "adapter_model.safetensors", metadata={"format": "pt"})
    (out / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
