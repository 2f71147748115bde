"""What is known of a run before the weights of its model are loaded, and what is refused by it: loading can take minutes, and a wrong setting none of them."""

from __future__ import annotations

import warnings
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn

from hetlora import init_adapter, packing, privacy, rouge, samples
from hetlora.config import Config, ConfigError
from hetlora.data import FederatedData, token_ids
from hetlora.memory import check_auto
from hetlora.models import Limits, checkpoint_layers, empty_model, resolve_device, target_shapes
from hetlora.ranks import StartingRanks, check_width


@dataclass(frozen=True)
class Outline:
    """A model without its weights.   shapes: {module that carries an adapter: (m, n)}."""

    model: nn.Module
    shapes: dict[str, tuple[int, int]]


def outline(cfg: Config, path: str) -> Outline | None:
    """The model at `path` without its weights; None where it cannot be made so. `ConfigError` where `cfg.target_modules` chooses no layer of it."""
    try:
        model = empty_model(cfg, path)
    except ConfigError:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # told when the model is loaded
        return Outline(model, target_shapes(model, cfg.target_modules))


@dataclass(frozen=True)
class Known:
    """Of a run, before its weights are loaded.   path: of the model.   outline: None where the model cannot be made without weights.

    start: the adapter that the run starts from; None also where it goes on from a checkpoint, for which that is no longer needed.
    """

    path: str
    outline: Outline | None
    limits: Limits
    tokenizer: Any
    data: FederatedData
    start: init_adapter.Start | None = None

    @cached_property
    def highest(self) -> dict[str, int]:
        return highest_tokens(self.data)


def check(cfg: Config, known: Known, starting: StartingRanks) -> None:
    """`ConfigError` for what would be refused later, with the words of then: ranks, privacy, vocabulary, prompts, ways to compute."""
    check_vocabulary(cfg, known.highest, known.limits.vocabulary)
    privacy.begin(cfg, len(known.data.clients))
    check_graph(cfg, resolve_device(cfg.device))
    check_auto(cfg)
    if cfg.rouge_examples:
        rouge.scorer()
    held_out = [prompt for prompt, _ in rouge.examples(cfg, known.data)]
    samples.check_lengths(cfg, held_out, samples.prompts(cfg, known.tokenizer), known.limits.positions)
    if known.start:
        deque(init_adapter.rows_of(known.start, cfg, starting.r_max), maxlen=0)
    if known.outline is None:
        return
    if cfg.gradient_checkpointing:
        checkpoint_layers(known.outline.model)
    packing.check_reach(known.outline.model, cfg)
    check_width(starting, known.outline.shapes)


def check_graph(cfg: Config, device: torch.device) -> None:
    """`ConfigError` for cuda_graph on what is no GPU."""
    if cfg.cuda_graph and device.type != "cuda":
        raise ConfigError(f"cuda_graph = True: expected a CUDA device, which alone records graphs, got {device}; leave it out, or choose another --device")


def highest_tokens(data: FederatedData) -> dict[str, int]:
    """{client: the highest id of a token that it has}"""
    return {client.name: max(int(token_ids(s).max()) for s in (*client.train, *client.test)) for client in (*data.clients, *data.held_out)}


def check_vocabulary(cfg: Config, highest: Mapping[str, int], vocabulary: float) -> None:
    """`ConfigError` where a client has a token that a model of this vocabulary does not know.   highest: `highest_tokens`."""
    for name, token in highest.items():
        if token >= vocabulary:
            raise ConfigError(f"data: client {name!r} has token id {token}, but model {cfg.model!r} knows {vocabulary}; use the model's own tokenizer")
