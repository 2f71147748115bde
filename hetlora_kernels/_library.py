"""The `hetlora` operator library: schemas, the reference kernels, and which rung of the backend ladder serves each op.

Schemas are defined once, here. The dispatcher is the selector: the reference is registered under CompositeExplicitAutograd, so it serves
every device until a faster kernel is registered under that device's key: `_C_cpu.so` under CPU, `_C_cuda.so` under CUDA, and the Triton
launchers under CUDA for the ops that `_C_cuda.so` lacks.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from hetlora_kernels import _native, reference
from hetlora_kernels._native import build_info as build_info

_SEGMENT_ARGS = "Tensor? seeds, Tensor? row_keys, Tensor? index, int[] ranks, int[] starts, int[] lengths, float dropout"
_LAYER_ARGS = "Tensor? seeds, Tensor? row_keys, Tensor? index, Tensor plan"
_STEP_ARGS = "Tensor lr, {step}Tensor active, Tensor? clip, Tensor? lam, int[] ranks, int[] keep"

SCHEMAS = {
    "shrink": f"(Tensor x, Tensor rows, Tensor scale, {_SEGMENT_ARGS}) -> Tensor",
    "expand_": f"(Tensor(a!) out, Tensor s, Tensor rows, {_SEGMENT_ARGS}) -> ()",
    "grouped_gram": f"(Tensor s, Tensor x, {_SEGMENT_ARGS}, ScalarType dtype) -> Tensor",
    "lora_forward": f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor a, Tensor bt, Tensor scale, {_SEGMENT_ARGS}) -> (Tensor, Tensor)",
    "lora_backward": "(Tensor d_y, Tensor x, Tensor? weight, Tensor a, Tensor bt, Tensor s, Tensor scale, "
    f"{_SEGMENT_ARGS}, bool need_x, bool need_a, bool need_bt) -> Tensor[]",
    "lora_add_": f"(Tensor(a!) out, Tensor x, Tensor a, Tensor bt, {_LAYER_ARGS}, int elements, float dropout) -> Tensor",
    "lora_grads_": f"(Tensor(a!)? d_x, Tensor d_y, Tensor x, Tensor a, Tensor bt, Tensor s, {_LAYER_ARGS}, float dropout, bool need_a, bool need_bt, "
    "bool as_b) -> (Tensor, Tensor)",
    "lora_small_forward": f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor a, Tensor b, {_LAYER_ARGS}, float dropout, bool own_b) -> Tensor",
    "lora_small_backward": f"(Tensor d_y, Tensor x, Tensor? weight, Tensor a, Tensor b, {_LAYER_ARGS}, float dropout, bool own_b, bool need_x, bool need_a, "
    "bool need_b) -> (Tensor, Tensor, Tensor)",
    "truncate_": "(Tensor(a!)[] out, Tensor[] bank, int[] ranks, bool dense) -> ()",
    "aggregate_": "(Tensor(a!)[] out, Tensor[] rows, Tensor weights, Tensor[] keep, int[] ranks, bool owners) -> ()",
    "accumulate_": "(Tensor(a!)[] total, Tensor[] rows, Tensor weights) -> ()",
    "quantize_rows_": "(Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor[] rows, int bits) -> ()",
    "dequantize_rows_": "(Tensor(a!)[] out, Tensor[] codes, Tensor[] scales, int bits) -> ()",
    "gram": "(Tensor[] rows, int[] ranks, bool exact) -> Tensor[]",
    "delta_norms": "(Tensor[] a, Tensor[] bt, int[] ranks, bool exact) -> Tensor",
    "tail_norms": "(Tensor[] rows, int[] ranks, int[] keep) -> Tensor",
    "adamw_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, "
    + _STEP_ARGS.format(step="Tensor step, ")
    + ", float beta1, float beta2, float eps, float weight_decay) -> ()",
    "sgd_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, " + _STEP_ARGS.format(step="") + ", float momentum, float weight_decay) -> ()",
}

# Two forms of the layer, with its base product inside or beside it; a rung has one of them. Small calls have ops of their own on the CPU alone.
_TWINS = {"lora_forward": "lora_add_", "lora_backward": "lora_grads_", "lora_add_": "lora_forward", "lora_grads_": "lora_backward"}
_TWINS |= {"lora_small_forward": "lora_forward", "lora_small_backward": "lora_backward"}

# Called by the layer's own autograd.Function alone: the dispatcher's look at what requires gradients is 1 us of a call's 70.
_PAST_AUTOGRAD = {"lora_add_", "lora_grads_", "lora_small_forward", "lora_small_backward", "lora_forward", "lora_backward"}

RUNGS = ("reference", "cpu", "cuda", "triton")

_library = torch.library.Library("hetlora", "DEF")
_forced: str | None = None  # one per process, not per thread: the backward pass runs on autograd's own threads
_compiled: dict[str, frozenset[str]] = {}  # rung whose library is loaded -> its ops
_absent: dict[str, str] = {}  # rung whose library is not loaded -> why


def _define() -> None:
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")


def _load() -> None:
    for rung in ("cpu", "cuda"):
        reason = _native.load(rung)
        if reason is None:
            has = torch._C._dispatch_has_kernel_for_dispatch_key
            _compiled[rung] = frozenset(name for name in SCHEMAS if has(f"hetlora::{name}", rung.upper()))
            for name in _PAST_AUTOGRAD & _compiled[rung]:
                _library.impl(name, torch.library.fallthrough_kernel, f"Autograd{rung.upper()}")
        else:
            _absent[rung] = reason
    if torch.cuda.is_available():
        for name, launch in _triton_ops().items():
            if name not in _compiled.get("cuda", ()):
                _library.impl(name, launch, "CUDA")


def register_fake(name: str) -> Callable:
    """Decorator: the shape function of `hetlora::name`."""
    return torch.library.register_fake(f"hetlora::{name}", lib=_library)


def _triton_absent() -> str | None:
    """Why the Triton rung cannot run here; None when it can."""
    if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET") == "1"):
        return "no CUDA device (TRITON_INTERPRET=1 runs its kernels in Triton's interpreter)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if importlib.util.find_spec("hetlora_kernels.triton") is None:
        return "this version has no Triton kernels"
    return None


def _triton_ops() -> dict[str, Callable]:
    """{op: launcher} of the Triton rung, each with the arguments of the op in `reference`; empty where it cannot run."""
    if _triton_absent() is not None:
        return {}
    return importlib.import_module("hetlora_kernels.triton").OPS


def absent() -> dict[str, str]:
    """Rungs this process cannot run -> why."""
    reasons = dict(_absent)
    triton = _triton_absent()
    return reasons if triton is None else {**reasons, "triton": triton}


def available() -> dict[str, str]:
    """Rungs this process can run -> what each is."""
    present = {
        "reference": "plain PyTorch, always present",
        "cpu": "C++ kernels for CPU tensors",
        "cuda": "CUDA C++ kernels",
        "triton": "Triton kernels" if torch.cuda.is_available() else "Triton kernels in Triton's interpreter",
    }
    missing = absent()
    return {rung: text for rung, text in present.items() if rung not in missing}


def _check_rung(rung: str, origin: str) -> str:
    if rung not in RUNGS:
        raise ValueError(f"{origin}: expected one of {', '.join(RUNGS)}, got {rung!r}")
    if rung not in available():
        raise ValueError(f"{origin}: the {rung!r} rung is not available ({absent()[rung]}); present: {', '.join(available())}")
    return rung


def _has(name: str, rung: str) -> bool:
    """Whether `rung` has a kernel of its own for the op."""
    if rung == "triton":
        return name in _triton_ops()
    return rung == "reference" or name in _compiled.get(rung, ())


def layer_ops(on_cpu: bool) -> tuple[Callable, Callable, bool] | None:
    """The two ops that are a layer's forward and backward pass, and whether its base product is inside them; None where it runs as three ops of its own.

    With the base: `lora_forward` and `lora_backward`, on CUDA tensors with the CUDA or Triton rung, or with such a rung forced. Beside it: `lora_add_` and
    `lora_grads_`, on CPU tensors with the C++ rung, unless another is forced.
    """
    if _forced is None:
        return _beside_base if on_cpu else _with_base
    if _forced == "cpu":
        return _beside_base if on_cpu else None
    return (call("lora_forward"), call("lora_backward"), True) if _forced != "reference" and _has("lora_forward", _forced) else None


def call(name: str) -> Callable:
    """The callable that runs op `name` now: the dispatcher's choice, or the rung that `use_backend` or HETLORA_BACKEND forces.

    A forced rung that has no kernel for the op leaves it to the reference, which `backends` reports.
    """
    if _forced is not None and (_forced == "reference" or not _has(name, _forced)):
        return getattr(reference, name)
    if _forced == "triton":
        return _triton_ops()[name]
    return getattr(torch.ops.hetlora, name).default


@contextmanager
def use_backend(rung: str) -> Iterator[None]:
    """Run every op of the process on one rung inside the block: for tests and benchmarks. `ValueError` for an unknown or absent rung.

    Ops that the rung has no kernel for run on the reference; `backends` says which.

    >>> import torch
    >>> import hetlora_kernels as hk
    >>> with hk.use_backend("reference"):
    ...     hk.backends("cpu")["gram"]
    ('reference', "forced to 'reference'")
    """
    global _forced
    before, _forced = _forced, _check_rung(rung, "use_backend")
    try:
        yield
    finally:
        _forced = before


def _chosen(name: str, device: str) -> tuple[str, str]:
    if _forced is not None:
        if not _has(name, _forced) and _has(_TWINS.get(name, name), _forced):
            return _forced, f"forced to {_forced!r}, through {_TWINS[name]}"
        return (_forced, f"forced to {_forced!r}") if _has(name, _forced) else ("reference", f"forced to {_forced!r}, which has no kernel for this op")
    ladder = ("cuda", "triton") if device == "cuda" else ("cpu",)
    missing = absent()
    for rung in ladder:
        if _has(name, rung):
            return rung, available()[rung]
        if _has(_TWINS.get(name, name), rung):
            return rung, f"{available()[rung]}, through {_TWINS[name]}"
    return "reference", "; ".join(f"{rung}: {missing.get(rung, 'no kernel for this op')}" for rung in ladder)


def backends(device: str | None = None) -> dict[str, tuple[str, str]]:
    """Which rung serves each op on tensors of `device` in this process, and why: {op: (rung, reason)}.

    device: "cpu" or "cuda"; default: "cuda" where there is a CUDA device.

    >>> import hetlora_kernels as hk
    >>> rung, reason = hk.backends("cpu")["aggregate_"]  # ('cpu', 'C++ kernels for CPU tensors') where they are built
    >>> rung in ("cpu", "reference")
    True
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    return {name: _chosen(name, device) for name in SCHEMAS}


def small_ops() -> tuple[Callable, Callable] | None:
    """The two ops that are the forward and backward pass of a small call on CPU tensors, base product and all; None where another rung serves the layer."""
    return _small if _forced is None or _forced == "cpu" else None


_define()
_load()
_small: tuple[Callable, Callable] | None = None
if _has("lora_small_forward", "cpu"):
    _small = torch.ops.hetlora.lora_small_forward.default, torch.ops.hetlora.lora_small_backward.default
_beside_base: tuple[Callable, Callable, bool] | None = None
if _has("lora_add_", "cpu"):
    _beside_base = torch.ops.hetlora.lora_add_.default, torch.ops.hetlora.lora_grads_.default, False
_with_base: tuple[Callable, Callable, bool] | None = None
if torch.cuda.is_available() and any(_has("lora_forward", rung) for rung in ("cuda", "triton")):
    _with_base = torch.ops.hetlora.lora_forward.default, torch.ops.hetlora.lora_backward.default, True
if os.environ.get("HETLORA_BACKEND", "").strip():
    _forced = _check_rung(os.environ["HETLORA_BACKEND"].strip(), "environment variable HETLORA_BACKEND")
