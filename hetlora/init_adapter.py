"""Where the bank starts from an adapter in PEFT's format (`init_adapter`): the folder is read and checked, and its rows become the bank's leading ones."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

import hetlora_kernels as hk
from hetlora.config import Config, ConfigError
from hetlora.run_folder import ADAPTER_FILE, WEIGHTS_FILE
from hetlora.text_files import parse_json, read_text

_PREFIX, _A, _B = "base_model.model.", ".lora_A.weight", ".lora_B.weight"
_PLAIN = {"use_dora": (None, False), "lora_bias": (None, False), "bias": (None, "none"), "layer_replication": (None,), "alora_invocation_tokens": (None,)}
"""{key of adapter_config.json: the values with which the adapter is s B A and no more}. What else a LoRA can have shows in its tensors' names."""
_STARTS = (None, True, False, "gaussian", "orthogonal", "eva")
"""Values of init_lora_weights that leave the base model as it was."""


@dataclass(frozen=True)
class Start:
    """An adapter.   factors: {module: (A [r, n], B [m, r])}.   scales: {module: s of dW = s B A}.   base: the model that it names, '' for none."""

    folder: Path
    factors: dict[str, tuple[Tensor, Tensor]]
    scales: dict[str, float]
    base: str

    @property
    def rank(self) -> int:
        return max(a.shape[0] for a, _ in self.factors.values())


def read(cfg: Config) -> Start:
    """The adapter in the folder `cfg.init_adapter`. `ConfigError` naming the file and what keeps it from being a plain LoRA."""
    folder = Path(cfg.init_adapter).expanduser()
    what = f"init_adapter {cfg.init_adapter!r}"
    if not (folder / WEIGHTS_FILE).is_file() or not (folder / ADAPTER_FILE).is_file():
        raise ConfigError(f"{what}: expected a folder with {ADAPTER_FILE} and {WEIGHTS_FILE}, as PEFT's save_pretrained and hetlora export write it")
    try:
        config: Any = parse_json(read_text(folder / ADAPTER_FILE))
        tensors = load_file(folder / WEIGHTS_FILE)
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{what}: {WEIGHTS_FILE} cannot be read ({' '.join(str(error).split())})") from None
    except ValueError as error:
        raise ConfigError(f"{what}: {ADAPTER_FILE} cannot be read ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise ConfigError(f"{what}: expected an adapter of peft_type 'LORA', got {config.get('peft_type') if isinstance(config, dict) else config!r:.40}")
    if odd := [key for key, plain in _PLAIN.items() if config.get(key) not in plain]:
        raise ConfigError(f"{what}: {odd[0]} = {config[odd[0]]!r:.40} is no plain LoRA, which is s B A alone")
    if config.get("init_lora_weights") not in _STARTS:
        raise ConfigError(f"{what}: init_lora_weights = {config['init_lora_weights']!r:.40} changed the base model; convert it to a plain LoRA with PEFT")
    factors = _pairs(what, tensors)
    return Start(folder, factors, _scales(what, config, factors), str(config.get("base_model_name_or_path") or ""))


def _pairs(what: str, tensors: Mapping[str, Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    modules = [key[len(_PREFIX) : -len(_A)] for key in tensors if key.startswith(_PREFIX) and key.endswith(_A)]
    odd = sorted({_PREFIX + name + end for name in modules for end in (_A, _B)} ^ set(tensors))
    if odd or not modules:
        raise ConfigError(f"{what}: expected pairs '{_PREFIX}<module>{_A}' and '...{_B}' alone, {f'{odd[0]!r} is none' if odd else 'got no tensor'}")
    factors = {}
    for name in modules:
        a, b = tensors[_PREFIX + name + _A], tensors[_PREFIX + name + _B]
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.shape[0] or not a.is_floating_point() or not b.is_floating_point():
            raise ConfigError(f"{what}: {name}: expected A [r, n] and B [m, r] of floating-point numbers, got {list(a.shape)} and {list(b.shape)}")
        if not bool(a.isfinite().all() and b.isfinite().all()):
            raise ConfigError(f"{what}: {name}: holds numbers that are not finite")
        factors[name] = (a, b)
    return factors


def _scales(what: str, config: Mapping[str, Any], factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """alpha / r of every module, or alpha / sqrt(r) with rsLoRA, as PEFT has them; `ConfigError` where the ranks on record are not the tensors'."""
    from peft.utils.other import get_pattern_key

    scales = {}
    for name, (a, _) in factors.items():
        own = []
        for pattern, common in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):
            others = config.get(pattern) or {}
            own.append(others.get(get_pattern_key(list(others), name), config.get(common)))
        rank, alpha = own
        if rank != a.shape[0]:
            raise ConfigError(f"{what}: {name}: {ADAPTER_FILE} says rank {rank!r:.40}, its tensors have {a.shape[0]}")
        if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not 0 < alpha < math.inf:
            raise ConfigError(f"{what}: {name}: lora_alpha: expected a number > 0, got {alpha!r:.40}")
        scales[name] = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return scales


def check_ranks(start: Start, cfg: Config, rows: int) -> None:
    """`ConfigError` where the adapter has more rank rows in a module than the bank, which has `rows`."""
    name, (a, _) = max(start.factors.items(), key=lambda item: item[1][0].shape[0])
    if a.shape[0] > rows:
        raise ConfigError(
            f"init_adapter {cfg.init_adapter!r}: rank {a.shape[0]} in {name}, and ranks = {cfg.ranks!r} gives the bank {rows} rows; "
            f"give some client rank {a.shape[0]}, or an adapter of at most {rows}"
        )


def check_modules(start: Start, cfg: Config, shapes: Mapping[str, tuple[int, int]]) -> None:
    """`ConfigError` where the adapter has a module that is none of `shapes`, {module: (m, n)}, or has other widths there."""
    what = f"init_adapter {cfg.init_adapter!r}{f' (made for {start.base})' if start.base else ''}"
    if unknown := [name for name in start.factors if name not in shapes]:
        more = f" and {len(unknown) - 1} more" if len(unknown) > 1 else ""
        raise ConfigError(
            f"{what}: it adapts {unknown[0]}{more}, which target_modules = {cfg.target_modules!r} does not choose in this model; "
            "choose the adapter's modules, or an adapter made for this model"
        )
    for name, (a, b) in start.factors.items():
        m, n = shapes[name]
        if (b.shape[0], a.shape[1]) != (m, n):
            made = f"made for a layer of {a.shape[1]} inputs and {b.shape[0]} outputs, this model's has {n} and {m}"
            raise ConfigError(f"{what}: {name}: {made}; give an adapter made for this model")


def rows_of(start: Start, cfg: Config, rows: int) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(module, A [r, n], B^T [r, m]) as a bank of `rows` rank rows holds them: its s B A is the adapter's own dW.

    `ConfigError` where the bank has too few rows, or its type no such numbers.
    """
    check_ranks(start, cfg, rows)
    dtype: torch.dtype = getattr(torch, cfg.adapter_dtype)
    for name, (a, b) in start.factors.items():
        factor = start.scales[name] / cfg.scale_at(rows)
        own, scaled = a.to(dtype), b.to(dtype) if factor == 1 else (b.double() * factor).to(dtype)
        if not bool(own.isfinite().all() and scaled.isfinite().all()):
            raise ConfigError(f"init_adapter {cfg.init_adapter!r}: {name}: its numbers are too large for adapter_dtype = {cfg.adapter_dtype!r}")
        yield name, own, scaled.t()


@torch.no_grad()
def fill(bank: hk.AdapterBank, start: Start, cfg: Config) -> str:
    """Write the adapter into the leading rows of `bank` (of one client), B scaled so that s B A of the bank is the adapter's own dW; what was done, in words.

    Rows past the adapter's rank, and modules that it has not, stay as they are: A drawn, B = 0. `ConfigError` where ranks, modules or widths do not fit.
    """
    check_modules(start, cfg, bank.shapes)
    for name, a, bt in rows_of(start, cfg, len(next(bank.parameters()))):
        bank.a[name][: len(a)], bank.bt[name][: len(bt)] = a, bt
    fresh = len(bank.shapes) - len(start.factors)
    rest = f"; {fresh} modules that it does not adapt start afresh" if fresh else ""
    made = f" (made for {start.base})" if start.base else ""
    return f"starting from the adapter in {start.folder}{made}, rank {start.rank}{rest}"
