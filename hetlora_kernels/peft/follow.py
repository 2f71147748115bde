"""Follow whose rows are whose through a forward pass: which sequence of the batch each row of a layer's input comes from.

`Follower` sees every torch function while it is on and keeps, beside each tensor, an `Owners`. Functions that move rows move the owners in the same way;
functions that work row by row keep them. What a function without a rule makes of a sequence's data is `LOST`: nobody guesses its owners. Tensors without an
entry hold no sequence's data (weights, constants). A layer that has been seen to get its rows in one fixed order needs no following any more (`batch.Batch`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

NOBODY = -1


class Owners:
    """The sequences that the elements of one tensor belong to.

    table: int64, as many dimensions as the tensor, each of its size or 1 (the owner is the same along it); `NOBODY` = no sequence's data.
    fixed: whether the order follows from shapes alone, not from indices that are data.   sure: whether the model's text inputs fix it.
    """

    __slots__ = ("fixed", "rows", "sure", "table")

    def __init__(self, table: Tensor, fixed: bool = True, sure: bool = True) -> None:
        self.table, self.fixed, self.sure = table, fixed, sure
        self.rows: dict[Any, Any] = {}  # what the layers made of it

    def like(self, table: Tensor, fixed: bool = True) -> Owners:
        return Owners(table, self.fixed and fixed, self.sure)

    def on(self, device: torch.device) -> Owners:
        return self if self.table.device == device else self.like(self.table.to(device))

    def varies(self, dim: int) -> bool:
        return self.table.shape[dim] > 1


class _Lost:
    def __repr__(self) -> str:
        return "LOST"


LOST = _Lost()
Entry = Owners | _Lost | None  # None: no sequence's data
Look = Callable[[Any], Entry]


class ForeignRows(ValueError):
    """Rows of one sequence are written where another's belong."""


class Follower(TorchFunctionMode):
    """While it is on, `entry(tensor)` says whose data a tensor is."""

    def __init__(self, weights: Mapping[int, str]) -> None:
        """weights: {id of an adapted layer's weight: the layer's name}."""
        super().__init__()
        self.weights = weights
        self._entries: Any = WeakTensorKeyDictionary()
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
        if name not in _SILENT and not self.idle:
            self._follow(name, func, out, args, kwargs)
        return out

    def _follow(self, name: str, func: Any, out: Any, args: Any, kwargs: Any) -> None:
        tensors = _tensors((*args, *kwargs.values()))
        if name not in ("to", "type_as") and any(id(tensor) in self.weights for tensor in tensors):
            layer = next(self.weights[id(tensor)] for tensor in tensors if id(tensor) in self.weights)
            raise ValueError(f"model: it reads the weight of layer {layer!r} past the layer ({name}), where no adapter takes part; leave this layer out")
        known = [self.entry(tensor) for tensor in tensors]
        if all(entry is None for entry in known):
            return
        rule = _rule(name)
        if isinstance(kwargs.get("out"), Tensor):
            rule = None
        try:
            entry = LOST if rule is None else rule(self.entry, func, out, args, kwargs)
        except ForeignRows:
            raise ForeignRows(
                f"rows: the model writes rows that passed layer {self.unsure!r} into another sequence than the one they were taken for (several pictures in one "
                f"sequence?); name their clients with client_segments(..., rows={{{self.unsure!r}: ids}})"
            ) from None
        except Exception:  # a form of the call that the rule does not know
            entry = LOST
        if name == "__setitem__":
            self.set(args[0], entry)
        elif isinstance(out, Tensor):
            self._note(out, entry)
        elif isinstance(out, (tuple, list)):
            for number, tensor in enumerate(_tensors(out)):
                self._note(tensor, entry[number] if isinstance(entry, list) else entry)

    def _note(self, tensor: Tensor, entry: Entry) -> None:
        self.set(tensor, entry if tensor.dim() and tensor.numel() else None)  # a number belongs to no row


def _tensors(values: Any) -> list[Tensor]:
    found = []
    for value in values:
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, (tuple, list)):
            found += _tensors(value)
    return found


# ---------------------------------------------------------------- owners of what comes out


def _join(entries: Sequence[Entry], dims: int) -> Entry:
    """Owners of what is made element by element, with broadcasting, of tensors with these entries."""
    if any(entry is LOST for entry in entries):
        return LOST
    owners: list[Owners] = [entry for entry in dict.fromkeys(entries) if isinstance(entry, Owners)]
    if not owners:
        return None
    first = owners[0] if owners[0].table.dim() == dims else owners[0].like(_aligned(owners[0].table, dims))
    for other in owners[1:]:
        one, two = first.table, _aligned(other.table, dims)
        if not (one.shape == two.shape and torch.equal(one, two)):
            if bool(((one >= 0) & (two >= 0) & (one != two)).any()):
                return LOST
            mixed = torch.where(one >= 0, one, two)
            same = mixed.shape == one.shape and torch.equal(mixed, one)
            fixed = first.fixed if same else other.fixed if mixed.shape == two.shape and torch.equal(mixed, two) else first.fixed and other.fixed
            first = Owners(one if same else mixed, fixed, first.sure and other.sure)
        elif (other.fixed and not first.fixed) or (first.sure and not other.sure):
            first = Owners(one, True if other.fixed else first.fixed, first.sure and other.sure)
    return first


def _aligned(table: Tensor, dims: int) -> Tensor:
    return table.reshape((1,) * (dims - table.dim()) + tuple(table.shape))


def _compact(table: Tensor) -> Tensor:
    """The same with size 1 along every dimension in which it was only expanded."""
    for dim, (size, stride) in enumerate(zip(table.shape, table.stride(), strict=True)):
        if stride == 0 and size > 1:
            table = table.narrow(dim, 0, 1)
    return table


def _plainer(table: Tensor) -> Tensor:
    """The same with size 1 along every dimension in which nothing changes, by the values."""
    for dim, size in enumerate(table.shape):
        if size > 1 and torch.equal(table, table.narrow(dim, 0, 1).expand_as(table)):
            table = table.narrow(dim, 0, 1)
    return table


def _reshaped(table: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """The owners of a tensor of shape `old`, seen as shape `new`; only dimensions that are merged or split with a varying one grow."""
    grown, shape = list(table.shape), []
    i = j = 0
    while i < len(old) or j < len(new):
        start, begin, left, right = i, j, 1, 1
        if i < len(old):
            left, i = old[i], i + 1
        if j < len(new):
            right, j = new[j], j + 1
        while left != right:
            if left < right:
                left, i = left * old[i], i + 1
            else:
                right, j = right * new[j], j + 1
        if any(table.shape[d] > 1 for d in range(start, i)):
            grown[start:i] = old[start:i]
            shape += new[begin:j]
        else:
            shape += [1] * (j - begin)
    whole = table.expand(grown).reshape(shape)
    return whole if whole.shape == table.shape else _plainer(whole)


def _dims(given: Any, count: int) -> list[int]:
    given = range(count) if given is None else [given] if isinstance(given, int) else given
    return [dim % count for dim in given]


# ---------------------------------------------------------------- rules: (entry of a tensor, func, out, args, kwargs) -> entry of out


def _pointwise(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    return _join([look(tensor) for tensor in _tensors((*args, *kwargs.values()))], out.dim())


def _overwrite(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    return _join([look(args[1])], out.dim())


def _nothing(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    return None


def _shape(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    if not isinstance(own, Owners):
        return own
    return own.like(_reshaped(own.table, args[0].shape, out.shape))


def _view(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
    """Functions that only choose among elements by position."""
    own = look(args[0])
    if not isinstance(own, Owners):
        return own
    moved = func(own.table.expand(args[0].shape), *args[1:], **kwargs)
    if isinstance(moved, Tensor):
        return own.like(_compact(moved))
    return [own.like(_compact(part)) for part in moved]


def _along(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """Functions that mix elements along `dim` and keep the shape up to the size of that dimension."""
    own = look(args[0])
    dim = kwargs.get("dim", args[1] if len(args) > 1 and isinstance(args[1], int) else -1)
    if not isinstance(own, Owners):
        return own
    return LOST if own.varies(dim) else own


def _top(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    dim = kwargs.get("dim", args[2] if len(args) > 2 else -1)
    return own if not isinstance(own, Owners) or not own.varies(dim) else LOST


def _reduce(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    if not isinstance(own, Owners):
        return own
    given = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 and not isinstance(args[1], (bool, Tensor)) else None))
    if len(args) > 1 and isinstance(args[1], Tensor):  # maximum of two
        return _pointwise(look, func, out, args, kwargs)
    dims = _dims(given, own.table.dim())
    if any(own.varies(dim) for dim in dims):
        return LOST
    first = out if isinstance(out, Tensor) else out[0]
    table = own.table if first.dim() == own.table.dim() else own.table.reshape([size for dim, size in enumerate(own.table.shape) if dim not in dims])
    return own.like(table)


def _normalised(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own, shape = look(args[0]), kwargs.get("normalized_shape", args[1] if len(args) > 1 else None)
    if not isinstance(own, Owners):
        return own
    return LOST if any(own.varies(-1 - d) for d in range(len(shape))) else own


def _pad(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own, sizes = look(args[0]), kwargs.get("pad", args[1] if len(args) > 1 else ())
    if not isinstance(own, Owners):
        return own
    return LOST if any(own.varies(-1 - d) for d in range(len(sizes) // 2)) else own


def _per_sample(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """Functions that treat the first dimension sample by sample: convolutions, pooling, group norms."""
    own = look(args[0] if args else kwargs["input"])
    first = out if isinstance(out, Tensor) else out[0]
    if not isinstance(own, Owners) or any(own.varies(d) for d in range(1, own.table.dim())) or first.dim() != own.table.dim():
        return own if not isinstance(own, Owners) else LOST
    return own


def _linear(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    if any(look(other) is not None for other in (*args[1:], *kwargs.values())):
        return LOST
    return LOST if isinstance(own, Owners) and own.varies(-1) else own


def _grouped(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """Rows times the weights of their groups."""
    own = look(args[0])
    return LOST if isinstance(own, Owners) and own.varies(-1) else own


def _product(one: Entry, two: Entry, a: Tensor, b: Tensor, dims: int) -> Entry:
    """a [..., i, k] times b [..., k, j]."""
    parts = []
    for entry, tensor, inner in ((one, a, -1), (two, b, -2)):
        if not isinstance(entry, Owners):
            parts.append(entry)
        elif tensor.dim() < 2 or entry.varies(inner):
            return LOST
        else:
            parts.append(entry)
    return _join(parts, dims)


def _matmul(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    a, b = (args[1], args[0]) if func.__name__ == "__rmatmul__" else args[:2]
    return _product(look(a), look(b), a, b, out.dim())


def _add_product(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    one, two = (kwargs.get(f"batch{at}", kwargs.get(f"mat{at}", args[at] if len(args) > at else None)) for at in (1, 2))
    return _join([look(args[0]), _product(look(one), look(two), one, two, out.dim())], out.dim())


def _attention(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """Rows of a query see the keys of their own sequence only: so all vary in the leading dimensions alone."""
    given = [tensor for tensor in _tensors((*args, *kwargs.values()))]
    entries = [look(tensor) for tensor in given]
    if any(isinstance(entry, Owners) and (entry.varies(-1) or entry.varies(-2)) for entry in entries):
        return LOST
    return _join(entries, out.dim())


def _einsum(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    equation, operands = args[0].replace(" ", ""), _tensors(args[1:])
    terms, result = equation.split("->")
    parts: list[Entry] = []
    for letters, tensor in zip(terms.split(","), operands, strict=True):
        own = look(tensor)
        if isinstance(own, Owners):
            if "." in equation or any(own.varies(d) and letter not in result for d, letter in enumerate(letters)):
                return LOST
            order = [letters.index(letter) for letter in result if letter in letters]
            kept = own.table.reshape([s for d, s in enumerate(own.table.shape) if d in order]) if len(order) < len(letters) else own.table
            left = [letter for letter in letters if letter in result]
            kept = kept.permute([left.index(letter) for letter in result if letter in left])
            sizes = iter(kept.shape)
            own = own.like(kept.reshape([next(sizes) if letter in letters else 1 for letter in result]))
        parts.append(own)
    return _join(parts, out.dim())


def _cat(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    tensors, dim = args[0], kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 else 0)) % out.dim()
    tensors = [tensor for tensor in tensors if tensor.numel()]
    entries = [look(tensor) for tensor in tensors]
    if any(entry is LOST for entry in entries):
        return LOST
    owners = [entry for entry in entries if isinstance(entry, Owners)]
    if not any(own.varies(dim) for own in owners):
        return _join(entries, out.dim())
    parts = [(own.table if isinstance(own, Owners) else out.new_full((1,) * out.dim(), NOBODY, dtype=torch.int64)) for own in entries]
    sizes = [max(part.shape[d] for part in parts) for d in range(out.dim())]
    whole = torch.cat([part.expand([*sizes[:dim], tensor.shape[dim], *sizes[dim + 1 :]]) for part, tensor in zip(parts, tensors, strict=True)], dim)
    return Owners(whole, all(own.fixed for own in owners), all(own.sure for own in owners))


def _stack(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    dim = kwargs.get("dim", args[1] if len(args) > 1 else 0) % out.dim()
    parts: list[Entry] = [own.like(own.table.unsqueeze(dim)) if isinstance(own := look(tensor), Owners) else own for tensor in args[0]]
    return _join(parts, out.dim())


def _embedding(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    return own.like(own.table.unsqueeze(-1)) if isinstance(own, Owners) else own


def _repeat(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    if not isinstance(own, Owners):
        return own
    sizes = list(args[1]) if isinstance(args[1], (tuple, list)) else list(args[1:])
    table = _aligned(own.table, out.dim())
    return own.like(table.repeat([times if size > 1 else 1 for times, size in zip(sizes, table.shape, strict=True)]))


def _repeat_interleave(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own, dim = look(args[0]), kwargs.get("dim", args[2] if len(args) > 2 else None)
    if not isinstance(own, Owners):
        return own
    if dim is None:
        return LOST
    by_data = isinstance(kwargs.get("repeats", args[1] if len(args) > 1 else None), Tensor)
    if not own.varies(dim):
        return own
    own = own.like(own.table, not by_data)
    return own.like(own.table.repeat_interleave(kwargs.get("repeats", args[1] if len(args) > 1 else None), dim=dim))


def _chosen(own: Owners, tensor: Tensor, index: Any) -> Owners:
    """Owners of tensor[index]."""
    index = index if isinstance(index, tuple) else (index,)
    by_data, dim, last = False, 0, tensor.dim() - 1
    taken = sum(1 if isinstance(one, (int, slice, list)) else one.dim() if one.dtype == torch.bool else 1 for one in index if one is not None and one is not ...)
    consumed = set()
    for one in index:
        if one is None:
            continue
        if one is ...:
            dim += tensor.dim() - taken
            continue
        width = one.dim() if isinstance(one, Tensor) and one.dtype == torch.bool else 1
        consumed |= set(range(dim, dim + width))
        if isinstance(one, (Tensor, list)):
            by_data |= any(own.varies(d) for d in range(dim, dim + width))
        dim += width
    table = own.table.expand(tensor.shape if last in consumed or own.varies(-1) else (*tensor.shape[:-1], 1))
    chosen = table[index]
    return own.like(_plainer(chosen) if any(isinstance(one, (Tensor, list)) for one in index) else _compact(chosen), not by_data)


def _index(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    return _chosen(own, args[0], args[1]) if isinstance(own, Owners) else own


def _index_select(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own = look(args[0])
    dim, index = kwargs.get("dim", args[1] if len(args) > 1 else 0), kwargs.get("index", args[2] if len(args) > 2 else None)
    if not isinstance(own, Owners) or not own.varies(dim):
        return own
    return own.like(own.table.index_select(dim, index), False)


def _sorted(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own, order = look(args[0]), out if isinstance(out, Tensor) else out[1]
    dim = kwargs.get("dim", args[1] if len(args) > 1 and type(args[1]) is int else -1)
    if not isinstance(own, Owners) or not own.varies(dim):
        return own
    return own.like(_plainer(own.table.expand(args[0].shape).gather(dim, order)), False)


def _strided(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """Any other look at the same memory."""
    own, tensor = look(args[0]), args[0]
    if not isinstance(own, Owners):
        return own
    memory = torch.empty_strided(tensor.shape, tensor.stride(), dtype=torch.int64, device=tensor.device).copy_(own.table.expand(tensor.shape))
    return own.like(_plainer(memory.as_strided(out.shape, out.stride(), out.storage_offset() - tensor.storage_offset())))


def _transformed(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    """Fourier transforms along `dim`."""
    own = look(args[0])
    if not isinstance(own, Owners):
        return own
    return LOST if any(own.varies(dim) for dim in _dims(kwargs.get("dim"), own.table.dim())) else own


def _multi_head(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Any:
    """torch's own attention: query, key and value are [length, sequences, n]."""
    entries = [look(tensor) for tensor in args[:3]]
    if args[0].dim() != 3 or any(isinstance(entry, Owners) and (entry.varies(0) or entry.varies(2)) for entry in entries):
        return LOST
    return [_join(entries, 3), LOST]


def _gather(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    own, tensor = look(args[0]), args[0]
    dim, index = kwargs.get("dim", args[1] if len(args) > 1 else 0) % tensor.dim(), kwargs.get("index", args[2] if len(args) > 2 else None)
    if not isinstance(own, Owners):
        return own
    if not own.varies(dim):
        return own if all(index.shape[d] == tensor.shape[d] for d in range(tensor.dim()) if own.varies(d)) else LOST
    return own.like(_plainer(own.table.expand(tensor.shape).gather(dim, index)), False)


def _written(target: Entry, tensor: Tensor, index: Any, source: Entry, value: Any) -> Entry:
    """Owners of `tensor` after tensor[index] = value, or += value."""
    if source is None or target is LOST:
        return target
    if isinstance(index, tuple) and len(index) == tensor.dim() == value.dim() and all(isinstance(one, slice) for one in index) and source is not LOST:
        # part of every sequence: the rest of it, filled with constants, is as much its own
        index = (index[0], *(slice(None) if not source.varies(d) else index[d] for d in range(1, len(index))))
    if source is LOST:  # positions keep whose they are; nothing says whose a container's are
        return target if isinstance(target, Owners) else LOST
    assert isinstance(source, Owners)
    before = target.table if isinstance(target, Owners) else source.table.new_full((1,) * tensor.dim(), NOBODY)
    narrow = not source.varies(-1) and not (isinstance(index, tuple) and len(index) >= tensor.dim()) and before.shape[-1] == 1
    table = before.expand((*tensor.shape[:-1], 1) if narrow else tensor.shape).clone()
    region = table[index]
    own = source.table if source.table.dim() == region.dim() else source.table.expand((*value.shape[:-1], 1) if narrow else value.shape)
    own = own.expand_as(region)
    if bool(((region >= 0) & (own >= 0) & (region != own)).any()):
        if not source.sure or (isinstance(target, Owners) and not target.sure):
            raise ForeignRows
        return LOST
    table[index] = torch.where(own >= 0, own, region)
    parts = index if isinstance(index, tuple) else (index,)
    fixed = source.fixed and (not isinstance(target, Owners) or target.fixed) and not any(isinstance(one, (Tensor, list)) for one in parts)
    if isinstance(target, Owners) and torch.equal(table, before.expand_as(table)):
        return target
    return Owners(_plainer(table), fixed, source.sure and (not isinstance(target, Owners) or target.sure))


def _write(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    tensor, index, value = args[:3]
    index = tuple(index) if isinstance(index, list) and any(isinstance(one, Tensor) for one in index) else index
    return _written(look(tensor), tensor, index, look(value), value)


def _write_along(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    tensor, dim, index, value = args[0], *(kwargs.get(name, args[at] if len(args) > at else None) for at, name in ((1, "dim"), (2, "index"), (3, "source")))
    if value is None:
        value = kwargs.get("src")
    if index.dim() > 1:
        parts = [look(tensor), look(index), look(value)]
        if not any(isinstance(part, Owners) and part.varies(dim) for part in parts):  # each row within itself
            return _join(parts, tensor.dim())
        # scatter with one index for a whole row
        if dim != 0 or index.dim() != 2 or not torch.equal(index, index[:, :1].expand_as(index)):
            return LOST
        index = index[:, 0]
    return _written(look(tensor), tensor, (slice(None),) * (dim % tensor.dim()) + (index,), look(value), value)


def _masked_scatter(look: Look, func: Any, out: Any, args: Any, kwargs: Any) -> Entry:
    tensor, mask, value = args[:3]
    own, source = look(tensor), look(value)
    if isinstance(own, Owners) and isinstance(source, Owners):
        wanted = own.table.expand(tensor.shape)[mask.expand(tensor.shape)]
        if not torch.equal(wanted, source.table.expand(value.shape).reshape(-1)[: wanted.numel()]):
            raise ForeignRows
    return own if isinstance(own, Owners) else LOST


_SILENT = frozenset(
    "_has_compatible_shallow_copy_type __len__ size dim stride numel is_floating_point is_complex is_contiguous __repr__ __format__ __bool__ __int__ __float__ __index__ item tolist "
    "__set__ requires_grad_ register_hook backward retain_grad storage data_ptr __hash__ element_size nelement is_inference __deepcopy__ get_device "
    ".shape .dtype .device .layout .requires_grad .grad .grad_fn .is_cuda .is_leaf .ndim ._version .is_sparse .is_quantized .is_meta .is_cpu .itemsize "
    ".is_nested .names ._base .nbytes .is_mkldnn .is_xpu .is_mps .is_hpu .is_vulkan".split()
)

_NAMES: dict[Callable[..., Any], str] = {
    _pointwise: "add sub rsub mul div truediv floordiv floor_divide true_divide mod remainder fmod pow rpow neg exp log log2 log1p expm1 sqrt rsqrt square sigmoid "
    "silu gelu relu relu6 tanh softplus leaky_relu elu selu celu mish hardtanh hardsigmoid hardswish logsigmoid erf sin cos abs sign round floor ceil "
    "reciprocal clamp clip clamp_min clamp_max where masked_fill dropout dropout1d dropout2d dropout3d alpha_dropout feature_dropout eq ne lt le gt ge "
    "equal_to logical_and logical_or logical_not logical_xor bitwise_and bitwise_or bitwise_not invert and or xor to type type_as float half bfloat16 double "
    "long int bool contiguous clone detach cpu cuda nan_to_num maximum minimum addcmul addcdiv lerp isnan isinf isfinite copysign threshold softsign "
    "pin_memory rms_norm_ .data .real prelu abs_ tanhshrink native_dropout",
    _overwrite: "copy",
    _nothing: "fill zero zeros_like ones_like empty_like full_like new_zeros new_ones new_empty new_full new_tensor normal uniform rand_like randn_like random "
    "bernoulli_",
    _shape: "view reshape view_as reshape_as flatten unflatten _unsafe_view",
    _view: "unsqueeze squeeze transpose permute swapaxes swapdims movedim moveaxis t expand expand_as broadcast_to narrow select chunk split unbind split_with_sizes "
    "tensor_split flip roll unfold diagonal rot90 tile hsplit vsplit __iter__",
    _along: "softmax log_softmax cumsum cumprod logcumsumexp glu",
    _sorted: "argsort sort",
    _strided: "as_strided",
    _transformed: "fft_fft fft_fftn fft_fft2 fft_rfft fft_rfftn fft_ifft fft_irfft",
    _multi_head: "multi_head_attention_forward",
    _pad: "pad",
    _top: "topk",
    _reduce: "sum mean max min amax amin argmax argmin any all prod logsumexp norm var std count_nonzero median",
    _normalised: "layer_norm rms_norm",
    _per_sample: "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d max_pool1d max_pool2d max_pool3d avg_pool1d avg_pool2d avg_pool3d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d interpolate pixel_shuffle pixel_unshuffle batch_norm group_norm instance_norm "
    "boolean_dispatch grid_sample native_multi_head_attention transformer_encoder_layer_fwd",
    _linear: "linear",
    _grouped: "grouped_mm",
    _matmul: "matmul rmatmul bmm mm",
    _add_product: "addmm baddbmm",
    _attention: "scaled_dot_product_attention",
    _einsum: "einsum",
    _cat: "cat concat concatenate",
    _stack: "stack",
    _embedding: "embedding one_hot",
    _repeat: "repeat",
    _repeat_interleave: "repeat_interleave",
    _index: "getitem",
    _index_select: "index_select",
    _gather: "gather take_along_dim",
    _write: "setitem index_put",
    _write_along: "index_add index_copy scatter scatter_add",
    _masked_scatter: "masked_scatter",
}
_RULES = {name: rule for rule, names in _NAMES.items() for name in names.split()}
_RULES |= {".T": _view, ".mT": _view, ".H": _view}


def _rule(name: str) -> Callable[..., Any] | None:
    """The rule of a function, of its in-place form and of its operators (`__add__`, `__radd__`, `__iadd__`)."""
    if name in _RULES:
        return _RULES[name]
    plain = name[2:-2] if name.startswith("__") and name.endswith("__") else name.rstrip("_").lstrip("_")
    if plain in _RULES:
        return _RULES[plain]
    return _RULES.get(plain[1:]) if name.startswith("__") and plain[:1] in ("r", "i") else None
