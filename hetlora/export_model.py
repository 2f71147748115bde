"""Take the whole model out of a run: the base with what the run learned in its weights, in transformers' format, in any dtype."""

from __future__ import annotations

import os
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hetlora import checkpoint, run_folder
from hetlora.config import Config, ConfigError
from hetlora.export import Factors, choose_factors, from_best
from hetlora.federation import resolve_model
from hetlora.model_card import write_card
from hetlora.models import load_model, load_tokenizer, quiet
from hetlora_kernels.linear import linear_weight

DTYPES = ("float32", "bfloat16", "float16", "float64")


def check_target(out_dir: str | Path, dtype: str | None) -> None:
    """`ConfigError` where `export_merged` could not write there, or not in that type."""
    if dtype is not None and dtype not in DTYPES:
        raise ConfigError(f"dtype: expected one of {', '.join(DTYPES)}, got {dtype!r}")
    run_folder.refuse_existing(Path(out_dir), "give a new folder, nothing is overwritten")


def export_merged(run_dir: str | Path, out_dir: str | Path, rank: int | None = None, client: str | None = None, dtype: str | None = None) -> Path:
    """W + s B A of every module, and all else of the base model, written to `out_dir` for `AutoModelForCausalLM.from_pretrained`, tokenizer included.

    run_dir: folder of a run. Where its merge changes the base (merge 'stack' and 'residual', train 'full'), the weights are those of its checkpoint.
    out_dir: folder to create; it must not exist or be empty.   rank, client: of the adapter, as for `export.export_adapter`.
    dtype: type of the weights written; None = that of the run. The sum is made in float32, or float64 for a base or a dtype of float64, and rounded once.

    Returns `out_dir`. Raises ConfigError: as `export_adapter`; no checkpoint yet; a target that shares its weight with another layer; numbers that `dtype`
    cannot hold. Nothing is left in `out_dir` then.
    """
    run, out = Path(run_dir), Path(out_dir)
    check_target(out, dtype)
    cfg = run_folder.read_config(run)
    if cfg.merge_kind.no_adapter:
        if rank is not None or client is not None:
            raise ConfigError(f"{run}: what this run learned is in the base model, which has no rank and no clients; leave --rank and --client out")
        weights, factors = _folded(run, cfg)
        scale = cfg.scale_at(max((a.shape[0] for a, _ in factors.values()), default=0))
        shown = "none, all is in the weights"
    else:
        factors, scale, _, ranks = choose_factors(run, rank, client)
        factors = {name: (a[: ranks[name]], b[:, : ranks[name]]) for name, (a, b) in factors.items()}
        weights, shown = {}, _ranks_shown(ranks)
    path = resolve_model(cfg)
    model = load_model(cfg.model_copy(update={"device": "cpu", "quantize": "none"}), path, trains=False)
    if cfg.quantize != "none":
        warnings.warn(f"{run}: trained on a base in {cfg.quantize}; the merged model has the base's own weights, not the rounded ones", stacklevel=2)
    kind = getattr(torch, dtype or cfg.dtype)
    _merge(model, weights, factors, scale, kind)
    _write(model, path, cfg, out)
    write_card(run, out, ranks=shown, scale=scale, client=client, merged=dtype or cfg.dtype, part=rank is not None)
    return out


def _ranks_shown(ranks: Mapping[str, int]) -> str:
    low, high = min(ranks.values()), max(ranks.values())
    return str(low) if low == high else f"{low} to {high}, by module"


def _folded(run: Path, cfg: Config) -> tuple[dict[str, Tensor], Factors]:
    """(weights of the base that the run changed, factors of its bank that are not zero)."""
    found = checkpoint.load_checkpoint(run, from_best(run))
    if found is None:
        raise ConfigError(f"{run / run_folder.CHECKPOINT}: missing; finish the run with 'hetlora run --resume --output {run}'")
    tensors = found[1]
    banks = {name.removeprefix("bank.bt."): bt for name, bt in tensors.items() if name.startswith("bank.bt.") and bool(bt.any())}
    return (
        {name.removeprefix("base."): weight for name, weight in tensors.items() if name.startswith("base.")},
        {name: (tensors[f"bank.a.{name}"], bt.t()) for name, bt in banks.items()},
    )


@torch.no_grad()
def _merge(model: Any, weights: Mapping[str, Tensor], factors: Factors, scale: float, dtype: torch.dtype) -> None:
    """Put `weights` in the model's place, add s B A, and give all weights the type `dtype`."""
    own = dict(model.named_parameters(remove_duplicate=False))
    if unknown := [name for name in (*weights, *(f"{name}.weight" for name in factors)) if name not in own]:
        raise ConfigError(f"export: the base model has no weight {unknown[0]!r}; is it the model that the run began with?")
    for name, weight in weights.items():
        own[name].copy_(weight)
    wide = torch.float64 if torch.float64 in (dtype, next(iter(own.values())).dtype) else torch.float32
    model.to(wide)
    for name, (a, b) in factors.items():
        weight = linear_weight(model.get_submodule(name))
        shared = [other for other, tensor in own.items() if other != f"{name}.weight" and tensor.data_ptr() == weight.data_ptr()]
        if shared:
            raise ConfigError(f"export: {name} shares its weight with {shared[0]}, which the adapter does not change; export the adapter instead")
        if weight.shape != (b.shape[0], a.shape[1]):
            raise ConfigError(f"export: {name}: the adapter is for a weight {[b.shape[0], a.shape[1]]}, the base model's is {list(weight.shape)}")
        weight.add_(b.to(wide) @ a.to(wide), alpha=scale)
    model.to(dtype)
    if odd := [name for name, weight in own.items() if not bool(weight.isfinite().all())]:
        raise ConfigError(f"export: {odd[0]} has numbers that are not finite in {dtype}; give --dtype bfloat16 or float32")


def _write(model: Any, path: str, cfg: Config, out: Path) -> None:
    """Model and tokenizer, in one rename."""
    from transformers import AutoConfig

    with quiet(path):
        model.config.use_cache = getattr(AutoConfig.from_pretrained(path, trust_remote_code=cfg.trust_remote_code), "use_cache", True)
    out.parent.mkdir(parents=True, exist_ok=True)
    staging = Path(tempfile.mkdtemp(dir=out.parent, prefix=f".{out.name}.staging-"))
    try:
        staging.chmod(0o755)
        with quiet(path):
            model.save_pretrained(staging)
            load_tokenizer(path, cfg.trust_remote_code).save_pretrained(staging)
        os.replace(staging, out)
    except OSError as error:
        raise run_folder.WriteError(out, error) from None
    finally:
        shutil.rmtree(staging, ignore_errors=True)
