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
from torch.compiler import is_dynamo_compiling

from hetlora_kernels import _native, reference
from hetlora_kernels._torch import entry_of, has_kernel, when_cuda_starts

_SEGMENT_ARGS = "Tensor? seeds, Tensor? row_keys, Tensor? index, int[] ranks, int[] starts, int[] lengths, float dropout"
# segments: one list of 1 + 3 K integers: the number of rows of x, K ranks, K starts, K lengths. transposed: bt is B [m, S], as PEFT keeps its lora_B.
_LAYER_ARGS = "Tensor scale, Tensor? seeds, Tensor? row_keys, Tensor? index, int[] segments, float dropout, bool transposed"
_STEP_ARGS = "Tensor lr, {step}Tensor active, Tensor? clip, Tensor? lam, int[] ranks, int[] keep"

SCHEMAS = {
    "shrink": f"(Tensor x, Tensor rows, Tensor scale, {_SEGMENT_ARGS}) -> Tensor",
    "expand_": f"(Tensor(a!) out, Tensor s, Tensor rows, {_SEGMENT_ARGS}) -> ()",
    "grouped_gram": f"(Tensor s, Tensor x, {_SEGMENT_ARGS}, ScalarType dtype) -> Tensor",
    "lora_forward": f"(Tensor x, Tensor? weight, Tensor? bias, Tensor? base, Tensor a, Tensor bt, {_LAYER_ARGS}) -> (Tensor, Tensor)",
    "lora_backward": f"(Tensor d_y, Tensor x, Tensor? weight, Tensor a, Tensor bt, Tensor s, {_LAYER_ARGS}, bool need_x, bool need_a, bool need_bt, "
    "ScalarType type_a, ScalarType type_bt) -> (Tensor, Tensor, Tensor)",
    "truncate_": "(Tensor(a!)[] out, Tensor[] bank, int[] ranks, bool dense) -> ()",
    "aggregate_": "(Tensor(a!)[] out, Tensor[] rows, Tensor weights, Tensor[] keep, int[] ranks, bool owners) -> ()",
    "accumulate_": "(Tensor(a!)[] total, Tensor[] rows, Tensor weights) -> ()",
    "quantize_rows_": "(Tensor(a!)[] codes, Tensor(b!)[] scales, Tensor[] rows, int bits) -> ()",
    "dequantize_rows_": "(Tensor(a!)[] out, Tensor[] codes, Tensor[] scales, int bits) -> ()",
    "gram": "(Tensor[] rows, int[] ranks, bool exact) -> Tensor[]",
    "delta_norms": "(Tensor[] a, Tensor[] bt, int[] ranks, bool exact) -> Tensor",
    "tail_norms": "(Tensor[] rows, int[] ranks, int[] keep) -> Tensor",
    "adamw_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avg, Tensor(c!)[] exp_avg_sq, Tensor(d!)[] casts, "
    + _STEP_ARGS.format(step="Tensor(e!) step, ")
    + ", float beta1, float beta2, float eps, float weight_decay) -> ()",
    "sgd_": "(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] buffers, Tensor(c!)[] casts, "
    + _STEP_ARGS.format(step="")
    + ", float momentum, float weight_decay) -> ()",
    "cross_entropy_": "(Tensor(a!) logits, Tensor labels, Tensor? weights, float scale, float softcap, float smoothing, float z_loss, bool slopes) -> Tensor",
}

LAYER = ("lora_forward", "lora_backward")  # the others of the layer's ops are its steps, called by tests and by `hetlora tune`

RUNGS = ("reference", "cpu", "cuda", "triton")

_library = torch.library.Library("hetlora", "DEF")
_forced: str | None = None  # one per process, not per thread: the backward pass runs on autograd's own threads
_compiled: dict[str, frozenset[str]] = {}  # rung whose library is loaded -> its ops
_absent: dict[str, str] = {}  # rung whose library is not loaded -> why
_traced: dict[str, Callable] = {}  # op -> the dispatcher's choice, as a traced call has to see it
_entries: dict[str, Callable] = {}  # op -> the same, nearer
_cuda_chosen = False


def _define() -> None:
    for name, schema in SCHEMAS.items():
        _library.define(name + schema)
        _library.impl(name, getattr(reference, name), "CompositeExplicitAutograd")
        _traced[name] = getattr(torch.ops.hetlora, name).default
        _entries[name] = entry_of(_traced[name])
    for name in LAYER:
        # A graph keeps numbers of rows as symbols. Eager calls do not pay for symbols: 0.15 us for each integer of the list.
        _library.define(f"{name}.symbolic{SCHEMAS[name].replace('int[] segments', 'SymInt[] segments')}")
        _library.impl(f"{name}.symbolic", _traced[name], "CompositeExplicitAutograd")
        _traced[name] = getattr(torch.ops.hetlora, name).symbolic
        # Called by the layer's own autograd.Function: the dispatcher's look at what requires gradients is 1 us of a call's 50.
        for op in (name, f"{name}.symbolic"):
            for device in ("CPU", "CUDA"):
                _library.impl(op, torch.library.fallthrough_kernel, f"Autograd{device}")


def _load(rung: str) -> bool:
    """Load the compiled library of a rung, or note why not."""
    reason = _native.load(rung)
    if reason is not None:
        _absent[rung] = reason
        return False
    _compiled[rung] = frozenset(name for name in SCHEMAS if has_kernel(f"hetlora::{name}", rung.upper()))
    return True


def _start_cuda() -> None:
    """Choose what serves CUDA tensors, once this process uses CUDA and not before: a device that was asked is lost to workers forked afterwards.

    The CUDA library has every op that Triton has, so Triton is imported only where that library cannot serve, or to be forced.
    """
    global _cuda_chosen
    if _cuda_chosen:
        return
    _cuda_chosen = True
    if not _load("cuda") and torch.cuda.is_available():
        for name, launch in _triton_ops().items():
            _library.impl(name, launch, "CUDA")


def _ask_cuda() -> None:
    """The same for a question about CUDA before it is in use: starts it where there is a device."""
    if not _cuda_chosen and torch.cuda.is_available():
        torch.cuda.init()
    _start_cuda()


def register_fake(name: str) -> Callable:
    """Decorator: the shape function of `hetlora::name`."""

    def register(function: Callable) -> Callable:
        for overload in (name, f"{name}.symbolic") if name in LAYER else (name,):
            torch.library.register_fake(f"hetlora::{overload}", function, lib=_library)
        return function

    return register


def _triton_absent() -> str | None:
    """Why the Triton rung cannot run here; None when it can."""
    if not (os.environ.get("TRITON_INTERPRET") == "1" or torch.cuda.is_available()):
        return "no CUDA device (TRITON_INTERPRET=1 runs its kernels in Triton's interpreter)"
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    return None


def _triton_ops() -> dict[str, Callable]:
    """{op: launcher} of the Triton rung, each with the arguments of the op in `reference`; empty where it cannot run."""
    if _triton_absent() is not None:
        return {}
    return importlib.import_module("hetlora_kernels.triton").OPS


def absent() -> dict[str, str]:
    """Rungs this process cannot run -> why. Starts CUDA where there is a device."""
    _ask_cuda()
    triton = _triton_absent()
    return dict(_absent) if triton is None else {**_absent, "triton": triton}


def _text(rung: str) -> str:
    if rung == "triton":
        return "Triton kernels" if torch.cuda.is_available() else "Triton kernels in Triton's interpreter"
    return {"reference": "plain PyTorch, always present", "cpu": "C++ kernels for CPU tensors", "cuda": "CUDA C++ kernels"}[rung]


def available() -> dict[str, str]:
    """Rungs this process can run -> what each is. Starts CUDA where there is a device."""
    missing = absent()
    return {rung: _text(rung) for rung in RUNGS if rung not in missing}


def check_rung(rung: str, origin: str) -> str:
    if rung not in RUNGS:
        raise ValueError(f"{origin}: expected one of {', '.join(RUNGS)}, got {rung!r}")
    if rung != "reference" and rung not in _compiled and rung in absent():  # in this order: most have nothing to ask CUDA for
        raise ValueError(f"{origin}: the {rung!r} rung is not available ({absent()[rung]}); present: {', '.join(available())}")
    return rung


def _has(name: str, rung: str) -> bool:
    """Whether `rung` has a kernel of its own for the op."""
    if rung == "triton":
        return name in _triton_ops()
    if rung == "cuda":
        _ask_cuda()
    return rung == "reference" or name in _compiled.get(rung, ())


def call(name: str) -> Callable:
    """The callable that runs op `name` now: the dispatcher's choice, or the rung that `use_backend` or HETLORA_BACKEND forces.

    A forced rung that has no kernel for the op leaves it to the reference, which `backends` reports.
    """
    if _forced is not None:
        if _forced == "reference" or not _has(name, _forced):
            return getattr(reference, name)
        if _forced == "triton":
            return _triton_ops()[name]
    return _traced[name] if is_dynamo_compiling() else _entries[name]


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
    before, _forced = _forced, check_rung(rung, "use_backend")
    try:
        yield
    finally:
        _forced = before


def _chosen(name: str, device: str) -> tuple[str, str]:
    if _forced is not None:
        return (_forced, f"forced to {_forced!r}") if _has(name, _forced) else ("reference", f"forced to {_forced!r}, which has no kernel for this op")
    ladder = ("cuda", "triton") if device == "cuda" else ("cpu",)
    missing = absent() if device == "cuda" else _absent
    for rung in ladder:
        left = "".join(f" ({above}: {missing[above]})" for above in ladder[: ladder.index(rung)] if above in missing)
        if _has(name, rung):
            return rung, _text(rung) + left
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


_define()
_load("cpu")
when_cuda_starts(_start_cuda)
if os.environ.get("HETLORA_BACKEND", "").strip():
    _forced = check_rung(os.environ["HETLORA_BACKEND"].strip(), "environment variable HETLORA_BACKEND")
