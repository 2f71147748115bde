"""PyTorch's private names, each with what is done where a version lacks it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch


def apply_of(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply` without its wrapper in Python. The wrapper serves torch.func and costs 4 us a call, a tenth of a small layer. Where this torch lacks the
    name, the wrapper is taken."""
    return getattr(super(torch.autograd.Function, function), "apply", function.apply)


def entry_of(op: Callable) -> Callable:
    """What an op's overload calls, past its method in Python (0.7 us a call); without the name: the overload."""
    return getattr(op, "_op", op)


def numbered(dtypes: tuple[torch.dtype, ...]) -> dict[torch.dtype, Any]:
    """{dtype: its number, which an op takes in place of a dtype object, 1 us sooner}; where a version takes none or numbers otherwise: the dtype itself."""
    found: dict[torch.dtype, Any] = {dtype: dtype for dtype in dtypes}
    for number in (5, 6, 7, 15):
        try:
            found[torch.ops.aten.empty.memory_format([0], dtype=number, device="cpu").dtype] = number
        except (RuntimeError, TypeError):
            pass
    return {dtype: found[dtype] for dtype in dtypes}


def inside_torch_func() -> bool:
    """Whether a transform of torch.func runs (vmap, grad, ...); without the name: not known, False."""
    active = getattr(torch._C, "_are_functorch_transforms_active", None)
    return active is not None and active()


def has_kernel(op: str, key: str) -> bool:
    """Whether `op` ("namespace::name") has a kernel of its own under the dispatch key; without the name: True, a compiled library has every op."""
    has = getattr(torch._C, "_dispatch_has_kernel_for_dispatch_key", None)
    return has is None or has(op, key)


def unsafe_view(tensor: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """`tensor.view(shape)`, but no view to autograd. Autograd forbids in-place changes of a view that a Function returns. Where this torch lacks the op, it is
    a copy."""
    view = getattr(torch.ops.aten, "_unsafe_view", None)
    return tensor.reshape(shape).clone() if view is None else view(tensor, shape)


def when_cuda_starts(function: Callable[[], None]) -> None:
    """Call `function` when this process starts to use CUDA, at once if it does; without the name, or with a torch without CUDA: at once."""
    queue = getattr(torch.cuda, "_lazy_call", None)
    function() if queue is None or not torch.version.cuda else queue(function)


def in_backward() -> bool:
    """Whether this thread runs a backward pass, as where a checkpoint computes again; without the name: not known, False."""
    task = getattr(torch._C, "_current_graph_task_id", None)
    return task is not None and task() != -1


def multiplies_fast(dtype: torch.dtype, device: str) -> bool:
    """Whether torch has a fast matrix product of this type on that kind of device. On a CPU without instructions for a 16-bit type it has plain loops, many
    times slower than its float32 product. Without the names: True."""
    name = {torch.bfloat16: "bf16", torch.float16: "fp16"}.get(dtype)
    if name is None or device != "cpu":
        return True
    asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{name}_supported", None)
    return asked is None or bool(asked())
