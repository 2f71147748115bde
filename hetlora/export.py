"""Take an adapter out of a run folder: the global one at any rank, or a client's own, in PEFT's format."""

from __future__ import annotations

import difflib
import math
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from hetlora.checkpoint import write_adapter
from hetlora.config import ConfigError
from hetlora.model_card import CARD, write_card
from hetlora.run_folder import (
    ADAPTER,
    ADAPTER_FILE,
    BEST,
    CHECKPOINT,
    CLIENTS,
    SUMMARY,
    WEIGHTS_FILE,
    client_folder,
    mean_rank,
    read_config,
    read_json,
    read_summary,
    recorded_ranks,
    refuse_existing,
)

_PREFIX = "base_model.model."
_A, _B = ".lora_A.weight", ".lora_B.weight"
Factors = dict[str, tuple[Tensor, Tensor]]  # dotted module name: (A [r, n], B [m, r])


def export_adapter(run_dir: str | Path, out_dir: str | Path, rank: int | None = None, client: str | None = None) -> Path:
    """dW = s * B[:, :rank] A[:rank, :] of every module, written to `out_dir` for `PeftModel.from_pretrained`.

    run_dir: folder of a run.
    out_dir: folder to create; it must not exist or be empty.
    rank: leading rank rows to keep of the global adapter; None = all but trailing dead rows (a row of A or a column of B that is zero), which add nothing
        to B A. A warning says how many were left out. One row of every module stays, as PEFT has no rank 0.
    client: export this client's last trained adapter at its own rank instead. A client that has not trained
        gets what it would receive: the global adapter truncated to its rank, or with all its rows where the run's training gives every client all of them
        (train 'fold'). A warning says so.

    lora_alpha = s * rank, so the scale s stays what it was in training. Returns `out_dir`.
    Raises ConfigError: no run or no adapter there, `rank` out of range, unknown client, both `rank` and `client`, `out_dir` not empty, a run whose updates
    are in the base weights (`export_model.export_merged` writes these), an adapter that does not read back, or that PEFT loads as another one (some model
    types' names it rewrites on loading): nothing is left in `out_dir` then.
    """
    run, out = Path(run_dir), Path(out_dir)
    if reason := read_config(run).merge_kind.no_adapter:
        raise ConfigError(f"{run}: {reason}")
    refuse_existing(out, "give a new folder, nothing is overwritten")
    factors, scale, model, ranks = choose_factors(run, rank, client)
    tensors: dict[str, Tensor] = {}
    for name, (a, b) in factors.items():
        tensors[_PREFIX + name + _A], tensors[_PREFIX + name + _B] = a[: ranks[name]].clone(), b[:, : ranks[name]].contiguous()
    write_adapter(out, tensors, scale, model)
    try:
        _check_written(out, tensors, scale)
        _check_loads(out, tensors, scale, model)
        low, high = min(ranks.values()), max(ranks.values())
        write_card(run, out, ranks=str(low) if low == high else f"{low} to {high}, by module", scale=scale, client=client, part=rank is not None)
    except BaseException:
        for name in (WEIGHTS_FILE, ADAPTER_FILE, CARD):
            (out / name).unlink(missing_ok=True)
        raise
    return out


def choose_factors(run: Path, rank: int | None, client: str | None) -> tuple[Factors, float, str, dict[str, int]]:
    """(factors, scale, base model, {module: leading rows of it that count}) of the global adapter, or a client's; arguments as for `export_adapter`."""
    if rank is not None and client is not None:
        raise ConfigError("export: give a rank or a client, not both (a client's adapter has the client's own rank)")
    if client is not None:
        return _client_adapter(run, client)
    factors, scale, model = _read_adapter(run / ADAPTER)
    return factors, scale, model, _uniform_ranks(factors, rank, run) if rank is not None else _live_ranks(factors, run)


def from_best(run: Path) -> str:
    """Name of the checkpoint whose adapter is the run's: that of the best round where a finished run returned to it, else the newest."""
    summary = read_summary(run, []) if (run / SUMMARY).is_file() else None
    return BEST if summary and summary.get("best_round") is not None and (run / BEST).is_file() else CHECKPOINT


def _check_written(folder: Path, tensors: Mapping[str, Tensor], scale: float) -> None:
    """`ConfigError` unless the folder holds what was written, to the bit."""
    factors, read_scale, _ = _read_adapter(folder)
    same = all(torch.equal(a, tensors[_PREFIX + name + _A]) and torch.equal(b, tensors[_PREFIX + name + _B]) for name, (a, b) in factors.items())
    if len(factors) * 2 != len(tensors) or not same or not math.isclose(read_scale, scale, rel_tol=1e-12):
        raise ConfigError(f"{folder}: reads back as something else than was written; is the disk sound? Nothing was exported")


def _check_loads(folder: Path, tensors: Mapping[str, Tensor], scale: float, model: str) -> None:
    """`ConfigError` where PEFT loads another adapter than was written, on the base's architecture without weights.

    Not tried where the base is not here, or has code of its own.
    """
    config = read_json(Path(model) / "config.json", []) if model else None
    if config is None or "model_type" not in config or "auto_map" in config:  # not here, or with code of its own, which an export does not run
        return
    kind = config["model_type"]
    from peft import PeftModel
    from transformers import AutoConfig, AutoModelForCausalLM

    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    for module in base.modules():  # weights of one number each, so that the adapter is loaded to where numbers are
        for name, weight in list(module.named_parameters(recurse=False)):
            module._parameters[name] = torch.nn.Parameter(torch.zeros((), dtype=weight.dtype).expand(weight.shape), requires_grad=False)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = PeftModel.from_pretrained(base, str(folder), torch_device="cpu")
    except (ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        odd, why = next(iter(tensors)), f"PEFT refuses it: {' '.join(str(error).split())[:160]}"
    else:
        found = {name: module for name, module in loaded.named_modules() if "default" in getattr(module, "lora_A", ())}
        wrong = [key for key, tensor in tensors.items() if key.endswith(_A) and not _is_loaded(found.get(key[: -len(_A)]), key, tensors, scale)]
        wrong += [name for name in found if name + _A not in tensors]
        if not wrong:
            return
        odd, why = wrong[0], f"PEFT gives {len(wrong)} modules other factors than theirs"
    raise ConfigError(
        f"export: the adapter does not load as it was trained on a model of type {kind!r}: {why} ({odd.removeprefix(_PREFIX).removesuffix(_A)}, ...); train "
        "with --target-modules attention, or take the factors from the run folder"
    )


def _is_loaded(module: Any, key: str, tensors: Mapping[str, Tensor], scale: float) -> bool:
    a, b = tensors[key], tensors[key.removesuffix(_A) + _B]
    if module is None or not math.isclose(module.scaling["default"], scale, rel_tol=1e-6):
        return False
    own = (module.lora_A["default"].weight, a), (module.lora_B["default"].weight, b)
    return all(one.shape == other.shape and not one.is_meta and torch.equal(one.detach().to(other), other) for one, other in own)


def base_model_of(run_dir: str | Path) -> str:
    """Folder or hub id of the base model that the run's adapters belong to; '' if the run does not say."""
    return str((read_json(Path(run_dir) / ADAPTER / ADAPTER_FILE, []) or {}).get("base_model_name_or_path") or "")


def _read_adapter(folder: Path) -> tuple[Factors, float, str]:
    """(factors, scale, base model); the scale alpha / r is the same for every module of a run, whatever its rank."""
    weights, settings = folder / WEIGHTS_FILE, folder / ADAPTER_FILE
    for file in (weights, settings):
        if not file.is_file():
            raise ConfigError(f"{file}: missing; the run has not written this adapter, finish it with 'hetlora run --resume --output {folder.parent}'")
    scale, model = _read_settings(settings)
    try:
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
    return factors, scale, model


def _read_settings(file: Path) -> tuple[float, str]:
    """(scale, base model) of an adapter_config.json; `ConfigError` naming the file and the value that cannot be."""
    problems: list[str] = []
    config = read_json(file, problems)
    if config is None:
        raise ConfigError(f"{file}: not a readable adapter ({problems[0]})")
    rank, alpha, model = (config.get(name) for name in ("r", "lora_alpha", "base_model_name_or_path"))
    if isinstance(rank, bool) or not isinstance(rank, int) or rank < 1:
        raise ConfigError(f"{file}: damaged: r: expected a whole number from 1 on, got {rank!r:.40}")
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < float("inf"):
        raise ConfigError(f"{file}: damaged: lora_alpha: expected a number > 0, got {alpha!r:.40}")
    if model is not None and not isinstance(model, str):
        raise ConfigError(f"{file}: damaged: base_model_name_or_path: expected text, got {model!r:.40}")
    return alpha / rank, model or ""


def _uniform_ranks(factors: Factors, rank: int | None, run: Path) -> dict[str, int]:
    available = {name: a.shape[0] for name, (a, _) in factors.items()}
    lowest = min(available.values())
    if rank is None:
        return available
    if not 1 <= rank <= lowest:
        raise ConfigError(f"export: rank: expected 1 to {lowest} (the rank of the global adapter in {run}), got {rank}")
    return dict.fromkeys(available, rank)


def _live_ranks(factors: Factors, run: Path) -> dict[str, int]:
    """{module: its rank without trailing dead rows, at least 1}. B A stays what it was, as a dead row's product is zero."""
    ranks: dict[str, int] = {}
    nothing = True
    for name, (a, b) in factors.items():
        dead = ((a == 0).all(1) | (b == 0).all(0)) & a.isfinite().all(1) & b.isfinite().all(0)  # 0 times inf is no zero
        live = (~dead).nonzero()
        ranks[name] = int(live[-1]) + 1 if len(live) else 1
        nothing &= not len(live)
    if nothing:
        warnings.warn(f"{run}: the adapter adds nothing to its base model, as B A is zero in every module; one row of each is written", stacklevel=3)
        return ranks
    shorter = sum(ranks[name] < a.shape[0] for name, (a, _) in factors.items())
    if shorter:
        rows = sum(a.shape[0] - ranks[name] for name, (a, _) in factors.items())
        where = f"in {shorter} of {len(ranks)} modules"
        warnings.warn(f"{run}: {rows} trailing rows of the adapter, {where}, are zero and left out; it computes the same", stacklevel=3)
    return ranks


def _client_adapter(run: Path, client: str) -> tuple[Factors, float, str, dict[str, int]]:
    own = client_folder(run, client)
    if (own / ADAPTER_FILE).is_file():
        factors, scale, model = _read_adapter(own)
        return factors, scale, model, {name: a.shape[0] for name, (a, _) in factors.items()}
    known = _client_ranks(run)
    if client not in known:
        trained = [unquote(path.name) for path in (run / CLIENTS).glob("*")]
        everyone = sorted({*known, *trained})
        close = difflib.get_close_matches(client, everyone, n=3, cutoff=0.5) or everyone[:3]
        hint = f" (did you mean {' or '.join(map(repr, close))}?)" if close else " (the run has recorded no client yet)"
        raise ConfigError(f"export: unknown client {client!r} in {run}{hint}")
    factors, scale, model = _read_adapter(run / ADAPTER)
    rank = known[client]
    if read_config(run).training_kind.all_rows:
        ranks = _uniform_ranks(factors, None, run)
        given = "the global adapter with all its rows, which every client of this run receives whatever its rank"
    else:
        ranks = {name: rank[name] if isinstance(rank, dict) else rank for name in factors}
        given = f"the global adapter truncated to {f'rank {rank}' if not isinstance(rank, dict) else 'its ranks'}"
    why = "it has not trained, or the run did not keep it"
    warnings.warn(f"client {client!r} has no adapter of its own in {run} ({why}); this is {given}", stacklevel=3)
    return factors, scale, model, ranks


def _client_ranks(run: Path) -> dict[str, Any]:
    """Current rank of every client: of the newest checkpoint, else of the summary."""
    known = recorded_ranks(run)
    if known:
        return known
    clients = (read_summary(run, []) or {}).get("clients", [])
    return {client["name"]: int(mean_rank(client["rank_end"])) for client in clients if float(mean_rank(client["rank_end"])).is_integer()}
