"""Follow whose rows are whose through a forward pass: which sequence of the batch each row of a layer's input comes from.

`Follower` sees every torch function while it is on and keeps, beside each tensor, an `Owners`. Functions that move rows move the owners in the same way;
functions that work row by row keep them. What a function without a rule makes of a sequence's data is `LOST`: nobody guesses its owners. Weights, and what is
made of constants alone, are no sequence's data. A tensor of which neither is known (made by numpy, inside vmap, by a kernel of the model's own) is `LOST` to
the layer that gets it. A layer that has been seen to get its rows in one fixed order needs no following any more (`batch.Batch`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from hetlora_kernels.peft.moves import nothing, rule_of
from hetlora_kernels.peft.owners import LOST, Entry, ForeignRows, Owners, tensors, through_view

# What says something about a tensor, or changes nothing of its elements.
_SILENT = frozenset(
    "__bool__ __deepcopy__ __float__ __format__ __hash__ __index__ __int__ __len__ __repr__ _has_compatible_shallow_copy_type backward data_ptr dim "
    "element_size get_device is_complex is_contiguous is_floating_point is_inference item nelement numel register_hook requires_grad_ retain_grad size storage "
    "stride tolist ._base ._version .device .dtype .grad .grad_fn .is_cpu .is_cuda .is_hpu .is_leaf .is_meta .is_mkldnn .is_mps .is_nested .is_quantized "
    ".is_sparse .is_vulkan .is_xpu .itemsize .layout .names .nbytes .ndim .requires_grad .shape .grad= .requires_grad= ._backward_hooks=".split()
)

_NUMBERS = frozenset(("__float__", "__index__", "__int__", "__iter__", "item", "tolist", "numpy", "__array__"))
_OF_NUMBERS = frozenset(("as_tensor", "asarray", "from_numpy", "frombuffer", "new_tensor", "tensor"))
_CHOOSE = frozenset(  # rows by numbers, or by their places in a list
    "__getitem__ __setitem__ as_strided cat concat concatenate hstack narrow narrow_copy pad roll rot90 select select_scatter slice_scatter split "
    "split_with_sizes stack tensor_split vstack".split()
)
_EMPTY = frozenset(("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"))  # a kernel of the model's own may fill them
_FILLS = frozenset(("fill_", "zero_", "normal_", "uniform_", "random_", "exponential_"))
_CONSTANT = object()  # the entry of what is known to be no sequence's data


class Follower(TorchFunctionMode):
    """While it is on, `entry(tensor)` says whose data a tensor is."""

    def __init__(self, weights: Mapping[int, str], held: frozenset[int] = frozenset()) -> None:
        """weights: {id of an adapted layer's weight: the layer's name}.   held: ids of the model's parameters and buffers."""
        super().__init__()
        self.weights, self.held = weights, held
        self._entries: Any = WeakTensorKeyDictionary()
        self.numbers = False  # whether the model has read numbers of its data: what it slices by them looks like slicing by shapes
        self.idle = False  # while an adapted layer computes
        self._set: list[Any] = []  # what `Tensor.set_` was, for each time it is on
        self.unsure = ""  # a layer whose rows are no text, so that whose they are shows only where they meet the text

    def __enter__(self) -> Any:
        """torch tells no mode of `Tensor.set_`, after which a tensor is another's memory: it tells this one."""
        own = Tensor.set_

        def told(tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            out = own(tensor, *args, **kwargs)
            source = args[0] if len(args) == 1 and isinstance(args[0], Tensor) else None
            entry = LOST if source is None else self.entry(source)
            self._note(tensor, entry, source is not None and self.constant(source))
            return out

        self._set.append(Tensor.__dict__.get("set_"))
        Tensor.set_ = told  # type: ignore[method-assign, assignment]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        before = self._set.pop()
        if before is None:
            del Tensor.set_
        else:
            Tensor.set_ = before  # type: ignore[method-assign]

    @contextmanager
    def paused(self) -> Iterator[None]:
        """While an adapted layer computes: it knows its rows itself."""
        before, self.idle = self.idle, True
        try:
            yield
        finally:
            self.idle = before

    def entry(self, value: Any) -> Entry:
        own = self._entries.get(value) if isinstance(value, Tensor) else None
        return None if own is _CONSTANT else own

    def input_entry(self, x: Tensor) -> Entry:
        """`entry` of what a layer gets: None only where it is known to be no sequence's data."""
        own = self.entry(x)
        return LOST if own is None and not self.constant(x) else own

    def constant(self, tensor: Any) -> bool:
        return isinstance(tensor, Tensor) and (isinstance(tensor, nn.Parameter) or id(tensor) in self.held or self._entries.get(tensor) is _CONSTANT)

    def set(self, tensor: Any, entry: Entry, constant: bool = False) -> None:
        """constant: whether a tensor without an entry is known to be no sequence's data."""
        if entry is not None:
            self._entries[tensor] = entry.on(tensor.device) if isinstance(entry, Owners) else entry
        elif constant:
            self._entries[tensor] = _CONSTANT
        elif tensor in self._entries:
            del self._entries[tensor]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if name in ("__get__", "__set__"):
            name = f".{getattr(func.__self__, '__name__', '')}{'=' if name == '__set__' else ''}"
        if not (self.numbers or self.idle):
            self.numbers = any(self.entry(one) is not None or not self.constant(one) for one in _read(name, args))
        if name not in _SILENT and not self.idle:
            self._follow(name, func, out, args, kwargs)
        return out

    def _follow(self, name: str, func: Any, out: Any, args: Any, kwargs: Any) -> None:
        given = tensors((*args, *kwargs.values()))
        if name == ".data=":
            self._note(args[0], self.entry(args[1]), self.constant(args[1]))
            return
        if name not in ("to", "type_as") and any(id(tensor) in self.weights for tensor in given):
            layer = next(self.weights[id(tensor)] for tensor in given if id(tensor) in self.weights)
            raise ValueError(f"model: it reads the weight of layer {layer!r} past the layer ({name}), where no adapter takes part; leave this layer out")
        known = [self.entry(tensor) for tensor in given]
        constant = self._makes_constants(name, given, known, args, out)
        if all(entry is None for entry in known):
            for tensor in tensors([args[0]] if name == "__setitem__" else out if isinstance(out, (tuple, list)) else [out]):
                self._note(tensor, None, constant, tensor is args[0] if args else False)
            return
        rule = rule_of(name)
        if isinstance(kwargs.get("out"), Tensor):
            rule = None
        if "axis" in kwargs:  # torch's other name
            kwargs = {"dim" if key == "axis" else key: value for key, value in kwargs.items()}
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
        if name == "__setitem__" or name.endswith("="):
            self._note(args[0], entry, constant, True)
        elif isinstance(out, Tensor):
            self._note(out, entry, constant, bool(args) and out is args[0])
        elif isinstance(out, (tuple, list)):
            for number, tensor in enumerate(tensors(out)):
                self._note(tensor, entry[number] if isinstance(entry, list) else entry, constant)

    def _makes_constants(self, name: str, given: Sequence[Tensor], known: Sequence[Entry], args: Any, out: Any) -> bool:
        """Whether what a function makes is no sequence's data where it has no entry."""
        if name in _EMPTY or (self.numbers and (name in _OF_NUMBERS or name in _CHOOSE or _whole(out))):
            return False
        if rule_of(name) is nothing and not name.endswith("_"):
            return True
        return all(entry is not None or self.constant(tensor) or (name in _FILLS and tensor is args[0]) for tensor, entry in zip(given, known, strict=True))

    def _note(self, tensor: Tensor, entry: Entry, constant: bool, in_place: bool = False) -> None:
        if isinstance(entry, Owners) and not entry.fits(tensor):
            entry = LOST
        has_rows = bool(tensor.dim() and tensor.numel())  # a number belongs to no row
        self.set(tensor, entry if has_rows else None, constant and entry is None)
        base = tensor._base if in_place and tensor._is_view() else None
        if base is None:
            return
        if entry is not None:
            self.set(base, through_view(base, self.entry(base), tensor, entry))
        elif not constant:
            self.set(base, self.entry(base))


def _read(name: str, args: Any) -> list[Tensor]:
    """The tensors of which a function reads numbers."""
    if name in ("__getitem__", "__setitem__"):
        return tensors([one for one in (args[1] if isinstance(args[1], tuple) else args[1:2]) if isinstance(one, slice)])
    return tensors(args[:1]) if name in _NUMBERS else tensors(args[2:]) if name == "narrow" else []


def _whole(out: Any) -> bool:
    """Whether these are integers or truth values, which may choose rows."""
    return isinstance(out, Tensor) and not (out.is_floating_point() or out.is_complex())
