"""One call of every op at a benchmark's size, for `pytest benchmarks`: the server's on the rows of eight clients, those of the layer on their tokens."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from hetlora_kernels import _library

from . import steps
from .providers import (
    Problem,
    Run,
    _native,
    accumulate_native,
    aggregate_out,
    delta_native,
    dequantize_native,
    gram_native,
    quantize_native,
    tail_native,
    truncate_out,
)
from .shapes import LLAMA_8B_ATTENTION_LAYER, TINY, power_law_ranks

TOKENS, COLUMNS = 1024, (576, 1536)  # of the layer: rows of x, in and out features
WORDS = 49152  # of the loss, SmolLM2-135M's
DEVICES = {"cpu": ("reference", "cpu"), "cuda": ("reference", "cuda", "triton")}  # type of device -> rungs whose kernels serve it


def problem(dtype: torch.dtype, device: torch.device, tiny: bool = False) -> Problem:
    return Problem(TINY if tiny else LLAMA_8B_ATTENTION_LAYER, power_law_ranks(8), dtype, device)


class Layer:
    """The tensors of the layer's ops: T rows of x in equal parts for the clients, adapters in float32 as PEFT has them, dropout of a tenth."""

    def __init__(self, p: Problem) -> None:
        tiny = p.shape == TINY
        self.tokens, (n, m) = (64, (24, 40)) if tiny else (TOKENS, COLUMNS)
        draw = torch.Generator(p.device).manual_seed(4)

        def normal(*size: int, dtype: torch.dtype = p.dtype) -> torch.Tensor:
            return (torch.randn(*size, generator=draw, device=p.device) * size[-1] ** -0.5).to(dtype)

        clients, rows = len(p.ranks), self.tokens // len(p.ranks)
        self.x, self.d_y, self.weight = normal(self.tokens, n), normal(self.tokens, m), normal(m, n)
        self.a, self.bt = (normal(p.layout.total, width, dtype=torch.float32) for width in (n, m))
        self.scale, self.seeds = torch.ones(clients, device=p.device), torch.arange(clients, device=p.device)
        starts = [k * rows for k in range(clients)]
        self.segments = [p.ranks, starts, [rows] * clients]
        self.drawn = (self.seeds, torch.arange(self.tokens, device=p.device), None)  # seeds, row_keys, index
        self.end = (*self.drawn, [self.tokens, *p.ranks, *starts, *self.segments[2]], 0.1, False)

    def shrunk(self) -> torch.Tensor:
        return _native("shrink", self.x, self.a, self.scale, *self.drawn, *self.segments, 0.1)


def layer_op(op: str, p: Problem) -> Run:
    of, out = Layer(p), []  # type: ignore[var-annotated]
    with_s = () if op in ("shrink", "lora_forward") else (of.shrunk(),)
    y, types = torch.zeros_like(of.d_y), (torch.float32, torch.float32)
    arguments = {
        "shrink": (of.x, of.a, of.scale, *of.drawn, *of.segments, 0.1),
        "expand_": (y, *with_s, of.bt, None, None, None, *of.segments, 0.0),
        "grouped_gram": (*with_s, of.x, *of.drawn, *of.segments, 0.1, torch.float32),
        "lora_forward": (of.x, of.weight, None, None, of.a, of.bt, of.scale, *of.end),
        "lora_backward": (of.d_y, of.x, of.weight, of.a, of.bt, *with_s, of.scale, *of.end, True, True, True, *types),
    }[op]

    def run() -> None:
        found = _native(op, *arguments)
        out[:] = [y] if op == "expand_" else [found] if isinstance(found, torch.Tensor) else found

    return run, lambda: out


def loss_op(p: Problem) -> Run:
    words, tokens = (61, 16) if p.shape == TINY else (WORDS, 128)
    draw = torch.Generator(p.device).manual_seed(5)
    logits = torch.randn(tokens, words, generator=draw, device=p.device).to(p.dtype)
    labels, out = torch.randint(words, (tokens,), generator=draw, device=p.device), []  # type: ignore[var-annotated]

    def run() -> None:
        out[:] = [_native("cross_entropy_", logits, labels, None, 1.0, 0.0, 0.0, 0.0, True), logits]

    return run, lambda: out


WORKS: dict[str, Callable[[Problem], Run]] = {
    **{op: partial(layer_op, op) for op in ("shrink", "expand_", "grouped_gram", "lora_forward", "lora_backward")},
    "truncate_": truncate_out,
    "aggregate_": aggregate_out,
    "accumulate_": accumulate_native,
    "quantize_rows_": lambda p: quantize_native(p, 8),
    "dequantize_rows_": lambda p: dequantize_native(p, 8),
    "gram": gram_native,
    "delta_norms": delta_native,
    "tail_norms": tail_native,
    "adamw_": lambda p: steps.fused(p, False),
    "sgd_": steps.fused_sgd,
    "cross_entropy_": loss_op,
}


def cases() -> list[tuple[str, str, str]]:
    """(op, rung, type of device) of every op on every rung that has a kernel of its own for it here."""
    present, devices = _library.available(), ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]
    return [(op, rung, device) for device in devices for rung in DEVICES[device] if rung in present for op in _library.SCHEMAS if _library._has(op, rung)]
