"""Tensors from the host to a device without a wait, and what a CUDA graph must not hold."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def on_host(values: Any, dtype: torch.dtype | None = None) -> Tensor:
    """A tensor as it is, all else as a tensor on the host, whatever the default device."""
    return values if isinstance(values, Tensor) else torch.as_tensor(values, dtype=dtype, device="cpu")


def capturing(device: torch.device) -> bool:
    """Whether the current stream records a CUDA graph: nothing may wait for the device then."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def uploaded(name: str, tensor: Tensor, device: torch.device) -> Tensor:
    """`tensor` on `device`, without a wait: from pinned memory where it comes from the host. `ValueError` for a copy inside the capture of a CUDA graph."""
    if tensor.device == device or device.type != "cuda" or torch.compiler.is_compiling():
        return tensor.to(device)
    if capturing(device):
        raise ValueError(f"{name}: expected a tensor on {device} inside the capture of a CUDA graph, which would repeat this one for good, got {tensor.device}")
    return (tensor.pin_memory() if tensor.device.type == "cpu" else tensor).to(device, non_blocking=True)
