"""What a run works on: the base model in memory, everybody's data, and settings that fit together."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from hetlora.config import ADAPTER_SETTINGS, Config, ConfigError
from hetlora.data import FederatedData, load_data
from hetlora.models import load_model, load_tokenizer, resolve_model, target_shapes
from hetlora.observer import Observer


@dataclass
class Federation:
    """What a run works on: one base model in memory and everybody's data. May serve several runs, until one that changes the base (`changes_base`)."""

    model: torch.nn.Module
    model_name: str
    shapes: dict[str, tuple[int, int]]
    data: FederatedData
    tokenizer: Any = None
    folded_by: Path | None = None  # the run whose updates are in the base weights

    @property
    def device(self) -> torch.device:
        return next(self.model.parameters()).device


def prepare(cfg: Config, observer: Observer | None = None) -> Federation:
    """Load (or make) the model, and the data; `ConfigError` for anything that does not fit."""
    observer = observer or Observer()
    path = resolve_model(cfg, progress=observer.pretrain)
    tokenizer = load_tokenizer(path)
    data = load_data(cfg, tokenizer)
    model = load_model(cfg, path)
    vocabulary = model.get_input_embeddings().num_embeddings
    for client in (*data.clients, *data.held_out):
        highest = max(int(s.max()) for s in (*client.train, *client.test))
        if highest >= vocabulary:
            raise ConfigError(f"data: client {client.name!r} has token id {highest}, but model {cfg.model!r} knows {vocabulary}; use the model's own tokenizer")
    return Federation(model, path, target_shapes(model, cfg.target_modules), data, tokenizer)


def changes_base(cfg: Config) -> bool:
    """Whether the rounds change the base model in memory, so that no other run can use it afterwards."""
    return cfg.merge == "stack" or cfg.train == "full"


def base_weights(cfg: Config, federation: Federation) -> dict[str, torch.nn.Parameter]:
    """{parameter: weight} of the base that the rounds change: none, those of the target modules (merge = 'stack'), or all (train = 'full')."""
    if cfg.train == "full":
        return dict(federation.model.named_parameters())
    return {f"{name}.weight": federation.model.get_parameter(f"{name}.weight") for name in federation.shapes} if cfg.merge == "stack" else {}


def check_options(cfg: Config) -> None:
    """Options that would be ignored together are refused."""
    if cfg.train == "full":
        ignored = [f"{name} = {getattr(cfg, name)!r}" for name in ADAPTER_SETTINGS if getattr(cfg, name) != Config.model_fields[name].default]
        if ignored:
            raise ConfigError(f"{', '.join(ignored)}: of adapters, and train = 'full' trains none; leave it out")
        if cfg.weights == "sparsity":
            raise ConfigError("weights = 'sparsity' are norms of adapters, and train = 'full' trains none; use weights = 'samples' or 'uniform'")
    if cfg.merge != "factors":
        ignored = [f"{name} = {getattr(cfg, name)!r}" for name, default in (("shared_rows", "none"), ("unowned_rows", "keep")) if getattr(cfg, name) != default]
        if ignored:
            raise ConfigError(f"{', '.join(ignored)}: only for merge = 'factors', got merge = {cfg.merge!r}; leave it out")
    if cfg.merge == "stack" and cfg.quantize != "none":
        raise ConfigError("merge = 'stack' folds updates into the base weights, which a quantised base cannot take; use quantize = 'none'")
    if cfg.weight_cap and cfg.weights != "sparsity":
        raise ConfigError(f"weight_cap: caps ||B A||, only for weights = 'sparsity', got weights = {cfg.weights!r}; leave it out")
    if cfg.weight_scope != "module" and cfg.weights != "sparsity":
        raise ConfigError(f"weight_scope: the scope of ||B A||, only for weights = 'sparsity', got weights = {cfg.weights!r}; leave it out")
    if cfg.dropout and not 0 < round(65536 * cfg.dropout) < 65536:
        raise ConfigError(f"dropout: expected 0, or a probability from 1/65536 to 65535/65536, got {cfg.dropout}")
    if bool(cfg.rouge_examples) and not cfg.prompt_field:
        raise ConfigError("rouge_examples: answers prompts, and prompt_field names none; set --prompt-field, or leave it out")
    if cfg.momentum and cfg.optimizer != "sgd":
        raise ConfigError("momentum: only for optimizer = 'sgd'; leave it out (adamw has its own moments)")
