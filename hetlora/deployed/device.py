"""What a device can hold and how fast it steps, for `ranks = capability:MIN:MAX`: a bounded probe on random tokens, which sees nothing of the client's text.

What takes time is measured once and kept in the user's cache folder, with what it was measured for. How much memory is free is looked up at every start.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from importlib import metadata
from pathlib import Path
from typing import Any

import platformdirs
import torch
from torch import nn

import hetlora_kernels as hk
from hetlora import __version__
from hetlora.client import train_client
from hetlora.config import Config, ConfigError
from hetlora.data import ClientData
from hetlora.memory import SHARE, StepMemory, adapter_bytes, free_memory, refusing_without_memory, step_memory, with_step_tokens
from hetlora.models import checkpointed
from hetlora.ranks import Capability, Device, device_text
from hetlora.run_folder import write_atomic
from hetlora.seeds import probe_generator
from hetlora_kernels._native import build_info

STEPS, SECONDS = 3, 5.0
"""The probe: a first step, which is not counted, then as many as `STEPS`, until `SECONDS` have passed."""
APART = 16
"""Ranks between the two at which the memory of a token is measured; it grows along a straight line."""
ADVICE = "set gradient-checkpointing, max-tokens-per-step or quantize on this node, or free memory"

Shapes = Mapping[str, tuple[int, int]]

_OF_THE_RUN = (
    *("adapter_dtype", "quantize", "seq_len", "batch_size", "max_tokens_per_step", "optimizer", "momentum", "moments_dtype", "dropout"),
    *("padding_free", "gradient_checkpointing"),
)


@dataclass(frozen=True)
class Probe:
    """What is measured once.   memory: of a step at the least rank.   kept: bytes that a token keeps for one more rank row.   seconds: of that step."""

    memory: StepMemory
    kept: float
    seconds: float

    def bytes_at(self, rank: int, tokens: int, cfg: Config, shapes: Shapes, low: int) -> float:
        """Of a step of `tokens` at `rank`, besides the base."""
        memory = replace(self.memory, adapters=adapter_bytes(shapes, rank, cfg), kept=self.memory.kept + self.kept * (rank - low))
        return memory.of(tokens) - memory.base


def measure(cfg: Config, model: nn.Module, shapes: Shapes, base: str) -> tuple[Device, str]:
    """What this device holds and how fast it is, and a line that says so.   base: the digest of the base model.

    Raises `ConfigError` where the memory that is free does not hold a step at the least rank.
    """
    rule = cfg.rank_rule
    assert isinstance(rule, Capability)
    purpose = measured_for(cfg, model, shapes, base, rule)
    path = Path(platformdirs.user_cache_dir("hetlora")) / f"device-{hashlib.blake2b(json.dumps(purpose).encode(), digest_size=8).hexdigest()}.json"
    probe, said = _read(path, purpose)
    free, source = free_memory(next(model.parameters()).device)
    tokens = max(cfg.seq_len, min(cfg.max_tokens_per_step, cfg.seq_len * cfg.batch_size))  # 'auto' (0) goes down to one sequence
    unfit = f"this device does not hold rank {rule.low}, the least of {cfg.ranks!r}"
    refusal = f"{unfit}: its probe at that rank found no memory; {ADVICE}"
    if probe is None:
        with refusing_without_memory(refusal):
            probe = memory_probe(cfg, model, shapes, rule)
    held = [rank for rank in range(rule.low, rule.high + 1) if probe.bytes_at(rank, tokens, cfg, shapes, rule.low) <= SHARE * free]
    gib, needed = 2**30, probe.bytes_at(rule.low, tokens, cfg, shapes, rule.low)
    if not held:
        raise ConfigError(
            f"{unfit}: a step of {tokens} tokens takes {needed / gib:.3g} GiB besides the base, "
            f"and {SHARE:.0%} of the {free / gib:.3g} GiB that are free ({source}) do not hold it; {ADVICE}"
        )
    if not probe.seconds:
        with refusing_without_memory(refusal):
            probe = replace(probe, seconds=step_seconds(cfg, model, shapes, rule.low))
        said += _write(path, purpose, probe)
    device = Device(held[-1], probe.seconds)
    return device, f"this device: {device_text(device)} at rank {rule.low}; {free / gib:.3g} GiB are free ({source}); {said}"


def memory_probe(cfg: Config, model: nn.Module, shapes: Shapes, rule: Capability) -> Probe:
    """All but the seconds."""
    low = step_memory(model, shapes, rule.low, rule.low, cfg)
    above = min(rule.high - rule.low, APART)
    more = step_memory(model, shapes, rule.low + above, rule.low + above, cfg).kept - low.kept if above else 0.0
    return Probe(low, more / max(above, 1), 0.0)


def step_seconds(cfg: Config, model: nn.Module, shapes: Shapes, rank: int) -> float:
    """Seconds of the fastest of a few training steps of a client of this rank, as large as the run's, on random tokens."""
    cfg, _ = with_step_tokens(cfg.model_copy(update={"local_steps": 1, "local_epochs": 0}), model, shapes, [rank])
    device = next(model.parameters()).device
    draw = probe_generator()
    words = int(model.get_input_embeddings().num_embeddings)  # type: ignore[operator]
    text = ClientData("", [torch.randint(words, (cfg.seq_len,), generator=draw) for _ in range(cfg.batch_size)], [])
    bank = hk.AdapterBank(dict(shapes), [rank], dtype=getattr(torch, cfg.adapter_dtype), device=device, generator=draw)
    taken: list[float] = []
    with checkpointed(model, cfg.gradient_checkpointing):
        train_client(model, bank, text, cfg, 0, cfg.lr, {})
        while len(taken) < STEPS and sum(taken) < SECONDS:
            _wait(device)
            start = time.perf_counter()
            train_client(model, bank, text, cfg, 0, cfg.lr, {})
            _wait(device)
            taken.append(time.perf_counter() - start)
    return min(taken)


def _wait(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


# ---------------------------------------------------------------- the cache


def measured_for(cfg: Config, model: nn.Module, shapes: Shapes, base: str, rule: Capability) -> dict[str, Any]:
    """All on which a probe depends. Another value of any of it is another probe."""
    device = next(model.parameters()).device
    return {
        "host": platform.node(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"{device.type} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "kernels": {op: rung for op, (rung, _) in hk.backends(device.type).items()},
        "instruction_set": os.environ.get("HETLORA_INSTRUCTION_SET", ""),
        "build": build_info(),
        "versions": {"hetlora": __version__, "torch": torch.__version__, "transformers": metadata.version("transformers")},
        "base": base,
        "weights": sorted({str(weight.dtype) for weight in model.parameters()}),
        "modules": {name: list(shape) for name, shape in shapes.items()},
        "ranks": [rule.low, rule.high],
        **{name: getattr(cfg, name) for name in _OF_THE_RUN},
    }


def _read(path: Path, purpose: dict[str, Any]) -> tuple[Probe | None, str]:
    """The probe on record and where it is; None where there is none, or what is there cannot be used, and that this is so."""
    if not os.path.exists(path):
        return None, ""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        probe = Probe(StepMemory(**found["memory"]), found["kept"], found["seconds"])
        numbers = [*asdict(probe.memory).values(), probe.kept, probe.seconds]
        sound = all(type(number) in (int, float) and 0 <= number < 2.0**63 for number in numbers) and probe.seconds > 0  # NaN is not
        sound = sound and found["measured_for"] == purpose
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        sound = False
    return (probe, f"measured before, in {path}") if sound else (None, f"what is in {path} cannot be used; ")


def _write(path: Path, purpose: dict[str, Any], probe: Probe) -> str:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps({"measured_for": purpose, **asdict(probe)}, indent=1) + "\n")
    except (OSError, ConfigError) as error:
        return f"measured now, and not kept: {error}"
    return f"measured now, kept in {path}"
