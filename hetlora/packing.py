"""Whether a model can train without padding: a probe on the model itself decides, for nothing in a configuration says it for certain."""

from __future__ import annotations

import math
from typing import Any, NoReturn
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

import hetlora_kernels as hk
from hetlora.batches import PADDED, Batch, Batching, batches
from hetlora.config import Config, ConfigError
from hetlora.models import first_line, load_model, target_shapes
from hetlora.seeds import probe_generator
from hetlora_kernels.peft import attach, client_segments, detach

LENGTHS = (16, 9, 7, 8, 6)  # of the probe's sequences: one alone in its row, two rows of two, one of them with padding
CLEARER = 16  # times, by which the model's answer without restarting positions must be further off than with them
_ROUNDINGS = 8  # to the model's type, for each product on the way, which add up like the root of their number

_known: WeakKeyDictionary[nn.Module, dict[Any, Batching]] = WeakKeyDictionary()


def batching_of(model: nn.Module, cfg: Config) -> Batching:
    """How `model` takes the sequences of a step, by cfg.padding_free; probed once per model, before a bank is attached to it.

    Raises `ConfigError` for padding_free = 'on' where the model cannot.
    """
    if cfg.padding_free == "off":
        return PADDED
    if cfg.cuda_graph:
        return Batching("padded", "a recorded step (cuda_graph) has one shape")
    key = cfg.seq_len, cfg.target_modules, cfg.adapter_dtype, _attention(model)
    known = _known.setdefault(model, {})
    if key not in known:
        known[key] = probe(model, target_shapes(model, cfg.target_modules), cfg.seq_len, getattr(torch, cfg.adapter_dtype))
    batching = known[key]
    if cfg.padding_free == "on" and batching.name != "packed":
        _refuse(model, batching)
    return batching


def batching_of_path(cfg: Config, path: str) -> Batching:
    """The same of the model at `path`; `ConfigError` where it cannot be loaded."""
    return batching_of(load_model(cfg, path, trains=False), cfg)


def check_reach(model: nn.Module, cfg: Config) -> None:
    """The error of `batching_of`, where the configuration of a model without weights is enough for it."""
    if cfg.padding_free == "on" and (batching := _too_short(model, cfg.seq_len)):
        _refuse(model, batching)


def _refuse(model: nn.Module, batching: Batching) -> NoReturn:
    raise ConfigError(f"padding_free = 'on': {type(model).__name__} {batching.reason}; use 'auto', which sorts sequences by length for it, or 'off'")


def probe(model: nn.Module, shapes: dict[str, tuple[int, int]], seq_len: int, dtype: torch.dtype = torch.float32) -> Batching:
    """The batching of a causal model: 'packed' where five short sequences of two clients have the logits that each has alone, to rounding, else 'sorted'.

    They must also be at least 16 times further off when positions do not restart: else the probe shows nothing.
    seq_len: the longest row of a run. A model with a window (or chunks, or positions scaled by length) shorter than that is not shown by short sequences.
    """
    one_row = "flash" in _attention(model)
    if batching := _too_short(model, seq_len):
        return batching
    try:
        off, unpacked, rounding = _differences(model, shapes, dtype, one_row)
    except Exception as error:  # of the model's own code: an argument it does not take, a shape it does not expect, a layer whose rows are not known
        return Batching("sorted", f"refuses packed rows ({first_line(error)})")
    shown = f"{off:.0e} relative to the logits that each sequence has alone ({unpacked:.0e} with positions that do not restart)"
    if not off <= rounding:
        return Batching("sorted", f"mixes packed sequences: a probe is off by {shown}")
    if not CLEARER * off <= unpacked or not unpacked > 0:
        return Batching("sorted", f"does not show whether it keeps packed sequences apart: a probe is off by {shown}")
    return Batching("packed", f"a probe is off by {shown}", one_row)


@torch.no_grad()
def _differences(model: nn.Module, shapes: dict[str, tuple[int, int]], dtype: torch.dtype, one_row: bool) -> tuple[float, float, float]:
    """(relative error of packed sequences' logits, the same where positions do not restart, what rounding may make of it)."""
    device = next(model.parameters()).device
    draw = probe_generator()
    words = model.get_input_embeddings().num_embeddings  # type: ignore[operator]
    rows = [(place % 2, place, torch.randint(int(words), (length,), generator=draw)) for place, length in enumerate(LENGTHS)]
    bank = hk.AdapterBank(shapes, [1, 1], dtype=dtype, device=device, generator=draw)
    for rank_rows in bank.bt.values():
        rank_rows.copy_(torch.randn(rank_rows.shape, generator=draw) / rank_rows.shape[1] ** 0.5)
    attach(model, bank)
    try:
        alone = [_logits(model, part)[0] for row in rows for part in batches([row], len(row[2]), device)]
        (together,) = batches(rows, len(rows) * max(LENGTHS), device, Batching("packed", one_row=one_row))
        packed, unpacked = (_by_sequence(_logits(model, together, restart), together) for restart in (True, False))
    finally:
        detach(model)
    weights = [parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()]
    eps = max(torch.finfo(own).eps for own in (torch.float32, *weights))  # models in float64 compute some of it in float32
    layers = getattr(getattr(model, "config", None), "num_hidden_layers", 1)
    return _furthest(packed, alone), _furthest(unpacked, alone), _ROUNDINGS * math.sqrt(1 + layers) * eps


def _logits(model: nn.Module, batch: Batch, restart: bool = True) -> Tensor:
    """[rows, length, V]"""
    positions = {"position_ids": batch.positions} if restart and batch.positions is not None else {}
    with client_segments(model, batch.owner, sequence_index=batch.index, positions=batch.positions):
        logits: Tensor = model(input_ids=batch.ids, use_cache=False, **positions).logits
    return logits


def _by_sequence(logits: Tensor, batch: Batch) -> list[Tensor]:
    return [logits[((batch.owner >= 0) & (batch.index == place)).to(logits.device)] for place in range(len(LENGTHS))]


def _furthest(found: list[Tensor], alone: list[Tensor]) -> float:
    return max(float((one.double() - other.double()).norm() / other.double().norm()) for one, other in zip(found, alone, strict=True))


def _attention(model: nn.Module) -> str:
    return str(getattr(getattr(model, "config", None), "_attn_implementation", None) or "")


def _too_short(model: nn.Module, seq_len: int) -> Batching | None:
    """The batching of a model whose window, or the like, is shorter than `seq_len`; None where there is no such thing."""
    name, tokens = min(_reach(model), key=lambda own: own[1], default=("", seq_len))
    if tokens >= seq_len:
        return None
    return Batching("sorted", f"has {name} = {tokens}, shorter than seq_len = {seq_len}, where a probe of short sequences shows nothing")


def _reach(model: nn.Module) -> list[tuple[str, int]]:
    """(name, tokens) of what the model's configuration lets begin only after so many tokens."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = getattr(text, "layer_types", None) or ["sliding_attention", "chunked_attention"]
    names = [name for name, kind in (("sliding_window", "sliding"), ("attention_chunk_size", "chunked")) if any(kind in own for own in kinds)]
    rope = getattr(text, "rope_parameters", None) or {}
    nested = [rope, *(own for own in rope.values() if isinstance(own, dict))]
    scaled = [own.get("original_max_position_embeddings") for own in nested if own.get("rope_type") in ("dynamic", "longrope")]
    found = [(name, getattr(text, name, None)) for name in (*names, "window_size")] + [("original_max_position_embeddings", own) for own in scaled]
    return [(name, tokens) for name, tokens in found if isinstance(tokens, int)]
