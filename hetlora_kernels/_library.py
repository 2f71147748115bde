"""The `hetlora` operator library: schemas, the reference kernels, and which rung of the backend ladder serves each op.

Schemas are defined once, here. The dispatcher is the selector: the reference is registered under CompositeExplicitAutograd, so it serves
every device until a faster kernel is registered under that device's key.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hetlora_kernels import reference

_SEGMENT_ARGS = "Tensor? seeds, Tensor? row_keys, Tensor? index, int[] ranks, int[] starts, int[] lengths, float dropout"
_STEP_ARGS = "Tensor lr, {step}Tensor active, Tensor? clip, Tensor? lam, int[] ranks, int[] keep"

SCHEMAS = {
    "shrink": f"(Tensor x, Tensor rows, Tensor scale, {_SEGMENT_ARGS}) -> Tensor",
    "expand_": f"(Tensor(a!) out, Tensor s, Tensor rows, {_SEGMENT_ARGS}) -> ()",
    "grouped_gram": f"(Tensor s, Tensor x, {_SEGMENT_ARGS}, ScalarType dtype) -> Tensor",
    "truncate_": "(Tensor(a!)[] out, Tensor[] bank, int[] ranks, bool dense) -> ()",
    "aggregate_": "(Tensor(a!)[] out, Tensor[] rows, Tensor weights, Tensor[] keep, int[] ranks, bool owners) -> ()",
    "accumulate_": "(Tensor(a!)[] total, Tensor[] rows, Tensor weights) -> ()",
    "gram": "(Tensor[] rows, int[] ranks, bool exact) -> Tensor[]",
    "delta_norms": "(Tensor[] a, Tensor[] bt, int[] ranks, bool exact) -> Tensor",
    "tail_norms": "(Tensor[] rows, int[] ranks, int[] keep) -> Tensor",
    "adamw_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    + _STEP_ARGS.format(step="Tensor step, ")
    + ", float beta1, float beta2, float eps, float weight_decay) -> ()",
    "sgd_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, " + _STEP_ARGS.format(step="") + ", float momentum, float weight_decay) -> ()",
}

RUNGS = ("reference", "cpu", "cuda", "triton")

_library = torch.library.Library("hetlora", "DEF")
_forced: str | None = None  # one per process, not per thread: the backward pass runs on autograd's own threads


def _define() -> None:
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")


def register_fake(name: str) -> Callable:
    """Decorator: the shape function of `hetlora::name`."""
    return torch.library.register_fake(f"hetlora::{name}", lib=_library)


def available() -> dict[str, str]:
    """Rungs this process can run -> why each is, or is not, there."""
    return {"reference": "plain PyTorch, always present"}


def _check_rung(rung: str, origin: str) -> str:
    if rung not in RUNGS:
        raise ValueError(f"{origin}: expected one of {', '.join(RUNGS)}, got {rung!r}")
    if rung not in available():
        raise ValueError(f"{origin}: the {rung!r} rung is not available in this build; present: {', '.join(available())}")
    return rung


def call(name: str) -> Callable:
    """The callable that runs op `name` now: the dispatcher's choice, or the rung that `use_backend` or HETLORA_BACKEND forces."""
    if _forced == "reference":
        return getattr(reference, name)
    return getattr(torch.ops.hetlora, name).default


@contextmanager
def use_backend(rung: str) -> Iterator[None]:
    """Run every op of the process on one rung inside the block: for tests and benchmarks. `ValueError` for an unknown or absent rung."""
    global _forced
    before, _forced = _forced, _check_rung(rung, "use_backend")
    try:
        yield
    finally:
        _forced = before


def backends() -> dict[str, tuple[str, str]]:
    """Which rung serves each op in this process, and why: {op: (rung, reason)}."""
    reason = f"forced to {_forced!r}" if _forced else "no faster kernel is built for this op"
    return {name: ("reference", reason) for name in SCHEMAS}


_define()
if os.environ.get("HETLORA_BACKEND", "").strip():
    _forced = _check_rung(os.environ["HETLORA_BACKEND"].strip(), "environment variable HETLORA_BACKEND")
