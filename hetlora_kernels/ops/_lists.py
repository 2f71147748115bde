"""What the server ops share: one tensor or a list of modules, one layout or one per module."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from hetlora_kernels.layout import RankLayout, int_list, joined

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
Layouts = RankLayout | Sequence[RankLayout]


def module_list(name: str, tensors: Tensor | Sequence[Tensor]) -> tuple[list[Tensor], bool]:
    """(list of 2-D floating-point tensors of one type and device, whether a list came in)."""
    if isinstance(tensors, Tensor):
        listed, many = [tensors], False
    elif isinstance(tensors, (list, tuple)) and tensors and all(isinstance(t, Tensor) for t in tensors):
        listed, many = list(tensors), True
    else:
        raise TypeError(f"{name}: expected a tensor or a non-empty list of tensors, got {type(tensors).__name__}")
    first = listed[0]
    for position, tensor in enumerate(listed):
        where = f"{name}[{position}]" if many else name
        if tensor.dim() != 2:
            raise ValueError(f"{where}: expected 2 dimensions [rows, width], got shape {tuple(tensor.shape)}")
        if tensor.dtype not in FLOATS:
            raise TypeError(f"{where}: expected float32, bfloat16, float16 or float64, got {tensor.dtype}")
        if tensor.layout != torch.strided or tensor.is_nested:
            raise TypeError(f"{where}: expected a dense tensor, got {'a nested one' if tensor.is_nested else tensor.layout}")
        if tensor.dtype != first.dtype or tensor.device != first.device:
            raise ValueError(f"{where}: expected the type and device of the first module ({first.dtype}, {first.device}), got {tensor.dtype}, {tensor.device}")
    return [t.detach() for t in listed], many


def module_layouts(layout: Layouts, modules: int) -> list[RankLayout]:
    """One `RankLayout` per module, all with the same number of clients."""
    layouts = [layout] * modules if isinstance(layout, RankLayout) else list(layout) if isinstance(layout, (list, tuple)) else []
    if not layouts or not all(isinstance(each, RankLayout) for each in layouts):
        got = [type(each).__name__ for each in layouts] or type(layout).__name__
        raise TypeError(f"layout: expected a RankLayout or one per module, got {got}")
    if len(layouts) != modules:
        raise ValueError(f"layout: expected one RankLayout or {modules} of them (one per module), got {len(layouts)}")
    if len({each.num_clients for each in {id(each): each for each in layouts}.values()}) > 1:
        raise ValueError(f"layout: expected the same number of clients in every module, got {[each.num_clients for each in layouts]}")
    return layouts


def flat_ranks(layouts: Sequence[RankLayout]) -> list[int]:
    """The ranks of every module, as the schemas take them."""
    return joined([layout.ranks for layout in layouts])


def check_packed(name: str, tensors: Sequence[Tensor], layouts: Sequence[RankLayout]) -> None:
    for position, (tensor, layout) in enumerate(zip(tensors, layouts, strict=True)):
        if tensor.shape[0] != layout.total:
            raise ValueError(f"{name}[{position}]: expected {layout.total} rows (the sum of the layout's ranks), got {tensor.shape[0]}")


def prepare(name: str, tensors: Tensor | Sequence[Tensor], layout: Layouts) -> tuple[list[Tensor], bool, list[RankLayout]]:
    """Checked modules that hold packed rows, whether a list came in, and one layout per module."""
    listed, many = module_list(name, tensors)
    layouts = module_layouts(layout, len(listed))
    check_packed(name, listed, layouts)
    return listed, many, layouts


def client_integers(name: str, values: Any, layouts: Sequence[RankLayout]) -> list[int]:
    """`values` (one per client, or one sequence per module), integers >= 0, as the schemas take them."""
    clients = layouts[0].num_clients
    nested = isinstance(values, (list, tuple)) and values and isinstance(values[0], (list, tuple))
    per_module = [int_list(name, v) for v in values] if nested else [int_list(name, values)] * len(layouts)
    if len(per_module) != len(layouts):
        raise ValueError(f"{name}: expected one sequence per module ({len(layouts)}), got {len(per_module)}")
    for own in {id(own): own for own in per_module}.values():
        if len(own) != clients:
            raise ValueError(f"{name}: expected {clients} integers, one per client, got {len(own)}")
        if any(value < 0 for value in own):
            raise ValueError(f"{name}: expected integers >= 0, got {min(own)}")
    return joined(per_module)


def outputs(
    name: str,
    out: Tensor | Sequence[Tensor] | None,
    shapes: Sequence[tuple[int, ...]],
    dtype: torch.dtype,
    device: torch.device,
    inputs: Sequence[Tensor] = (),
) -> list[Tensor]:
    """`out` checked against what the op writes, or fresh tensors. `ValueError` where one shares memory with another or with what the op reads, `inputs`."""
    if out is None:
        return [torch.empty(shape, dtype=dtype, device=device) for shape in shapes]
    listed = [out] if isinstance(out, Tensor) else list(out) if isinstance(out, (list, tuple)) else []
    if not all(isinstance(tensor, Tensor) for tensor in listed) or not (listed or isinstance(out, (list, tuple))):
        raise TypeError(f"{name}: expected a tensor or a list of tensors, got {[type(each).__name__ for each in listed] or type(out).__name__}")
    if len(listed) != len(shapes):
        raise ValueError(f"{name}: expected {len(shapes)} tensors, got {len(listed)}")
    for position, (tensor, shape) in enumerate(zip(listed, shapes, strict=True)):
        usable = tensor.layout == torch.strided and tensor.is_contiguous()
        if tuple(tensor.shape) != tuple(shape) or tensor.dtype != dtype or tensor.device != device or not usable:
            raise ValueError(
                f"{name}[{position}]: expected a contiguous {dtype} tensor of shape {tuple(shape)} on {device}, got {tensor.dtype} {tuple(tensor.shape)} "
                f"on {tensor.device}"
            )
    if all(type(tensor) in (Tensor, torch.nn.Parameter) and not tensor.is_meta for tensor in (*listed, *inputs)) and not torch.compiler.is_compiling():
        _check_apart(name, listed, inputs)
    return [t.detach() for t in listed]


def _check_apart(name: str, written: Sequence[Tensor], read: Sequence[Tensor]) -> None:
    """`ValueError` where the memory of a written tensor is also another's. Contiguous tensors take a range each, others at most theirs."""
    spans = []
    for position, tensor in enumerate((*written, *read)):
        if tensor.numel():
            start = tensor.data_ptr()
            extent = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1
            spans.append((start, start + extent * tensor.element_size(), position))
    spans.sort()
    reach: tuple[int, int] | None = None  # the furthest end so far, and whose
    furthest_written: tuple[int, int] | None = None
    for start, end, position in spans:
        before = reach if position < len(written) else furthest_written
        if before is not None and start < before[0]:
            whose = min(position, before[1])
            raise ValueError(f"{name}[{whose}]: expected memory of its own, got a tensor that overlaps another one or what the op reads")
        reach = max(reach or (end, position), (end, position))
        if position < len(written):
            furthest_written = max(furthest_written or (end, position), (end, position))


def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd that an op has changed these tensors in place, as torch's own do: a graph that was recorded before refuses to run on new values."""
    if not torch.compiler.is_compiling():
        torch.autograd.graph.increment_version([tensor for tensor in tensors if not tensor.is_inference()])
