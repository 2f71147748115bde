"""Follow whose rows are whose through a forward pass: which sequence of the batch each row of a layer's input comes from.

`Follower` sees every torch function while it is on and keeps, beside each tensor, an `Owners`. Functions that move rows move the owners in the same way;
functions that work row by row keep them. What a function without a rule makes of a sequence's data is `LOST`: nobody guesses its owners. Tensors without an
entry hold no sequence's data (weights, constants). A layer that has been seen to get its rows in one fixed order needs no following any more (`batch.Batch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from hetlora_kernels.peft.moves import rule_of
from hetlora_kernels.peft.owners import LOST, Entry, ForeignRows, Owners, tensors, through_view

# What says something about a tensor, or changes nothing of its elements.
_SILENT = frozenset(
    "__bool__ __deepcopy__ __float__ __format__ __hash__ __index__ __int__ __len__ __repr__ __set__ _has_compatible_shallow_copy_type backward data_ptr dim "
    "element_size get_device is_complex is_contiguous is_floating_point is_inference item nelement numel register_hook requires_grad_ retain_grad size storage "
    "stride tolist ._base ._version .device .dtype .grad .grad_fn .is_cpu .is_cuda .is_hpu .is_leaf .is_meta .is_mkldnn .is_mps .is_nested .is_quantized "
    ".is_sparse .is_vulkan .is_xpu .itemsize .layout .names .nbytes .ndim .requires_grad .shape".split()
)

_NUMBERS = frozenset(("__index__", "__int__", "__iter__", "item", "tolist", "numpy"))


class Follower(TorchFunctionMode):
    """While it is on, `entry(tensor)` says whose data a tensor is."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        """weights: {id of an adapted layer's weight: the layer's name}."""
        super().__init__()
        self.weights = weights
        self._entries: Any = WeakTensorKeyDictionary()
        self.numbers = False  # whether the model has read numbers of its data: what it slices by them looks like slicing by shapes
        self.idle = False  # while an adapted layer computes
        self.unsure = ""  # a layer whose rows are no text, so that whose they are shows only where they meet the text

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While an adapted layer computes: it knows its rows itself."""
        before, self.idle = self.idle, True
        try:
            yield
        finally:
            self.idle = before

    def entry(self, value: Any) -> Entry:
        return self._entries.get(value) if isinstance(value, Tensor) else None

    def input_entry(self, x: Tensor) -> Entry:
        """`entry` of what a layer gets."""
        return self.entry(x)

    def set(self, tensor: Any, entry: Entry) -> None:
        if entry is not None:
            self._entries[tensor] = entry.on(tensor.device) if isinstance(entry, Owners) else entry
        elif tensor in self._entries:
            del self._entries[tensor]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name == "__get__":
            name = f".{getattr(func.__self__, '__name__', '')}"
        if name in _NUMBERS and not (self.numbers or self.idle):
            self.numbers = self.entry(args[0]) is not None or (args[0].dim() == 0 and not args[0].is_floating_point())
        if name not in _SILENT and not self.idle:
            self._follow(name, func, out, args, kwargs)
        return out

    def _follow(self, name: str, func: Any, out: Any, args: Any, kwargs: Any) -> None:
        given = tensors((*args, *kwargs.values()))
        if name not in ("to", "type_as") and any(id(tensor) in self.weights for tensor in given):
            layer = next(self.weights[id(tensor)] for tensor in given if id(tensor) in self.weights)
            raise ValueError(f"model: it reads the weight of layer {layer!r} past the layer ({name}), where no adapter takes part; leave this layer out")
        known = [self.entry(tensor) for tensor in given]
        if all(entry is None for entry in known):
            return
        rule = rule_of(name)
        if isinstance(kwargs.get("out"), Tensor):
            rule = None
        try:
            entry = LOST if rule is None else rule(self.entry, func, out, args, kwargs)
        except ForeignRows as foreign:
            if self.unsure:
                raise ForeignRows(
                    LOST,
                    f"rows: the model writes rows that passed layer {self.unsure!r} into the text, and not, as far as can be seen, into the sequences they "
                    f"were taken for (several pictures in one?); name their clients with client_segments(..., rows={{{self.unsure!r}: ids}})",
                ) from None
            entry = foreign.entry
        except Exception:  # a form of the call that the rule does not know
            entry = LOST
        if name == "__setitem__":
            self._note(args[0], entry, True)
        elif isinstance(out, Tensor):
            self._note(out, entry, bool(args) and out is args[0])
        elif isinstance(out, (tuple, list)):
            for number, tensor in enumerate(tensors(out)):
                self._note(tensor, entry[number] if isinstance(entry, list) else entry)

    def _note(self, tensor: Tensor, entry: Entry, in_place: bool = False) -> None:
        if isinstance(entry, Owners) and not entry.fits(tensor):
            entry = LOST
        self.set(tensor, entry if tensor.dim() and tensor.numel() else None)  # a number belongs to no row
        if in_place and entry is not None and tensor._is_view():
            base = tensor._base
            if base is not None:
                self.set(base, through_view(base, self.entry(base), tensor, entry))
