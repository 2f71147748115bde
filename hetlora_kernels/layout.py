"""Where each client's rank rows and each client's batch rows are: host integers first, device tensors built once and reused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import accumulate
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from hetlora_kernels._uploads import uploaded

_KEPT_PLANS = 256  # of one batch: a model has a few sets of ranks and scales


def int_list(name: str, values: Sequence[int] | Tensor) -> list[int]:
    """`values` as Python integers; `TypeError` naming the argument for anything else."""
    if isinstance(values, Tensor):
        if values.dim() != 1 or values.dtype.is_floating_point or values.dtype in (torch.bool, torch.complex64, torch.complex128):
            raise TypeError(f"{name}: expected a sequence of integers, got a tensor of shape {tuple(values.shape)} and type {values.dtype}")
        return [int(v) for v in values.tolist()]
    # A set has no order, and of a mapping the keys would be taken.
    if isinstance(values, (str, bytes, Mapping, set, frozenset)) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name}: expected a sequence of integers, got {values!r}")
    out = [value if type(value) is int else whole(name, value, what="integers") for value in values]
    if out and not -(2**63) <= min(out) <= max(out) < 2**63:
        raise ValueError(f"{name}: expected integers of 64 bits, got {min(out)} to {max(out)}")
    return out


def whole(name: str, value: Any, least: int = -(2**63), what: str = "an integer") -> int:
    """`value` as a Python integer of 64 bits, at least `least`; `TypeError` or `ValueError` naming the argument."""
    try:
        number = None if isinstance(value, bool) or (isinstance(value, Tensor) and value.is_meta) else int(value.__index__())
    except (AttributeError, TypeError, RuntimeError):  # tensors that are no single integer have the method too
        number = None
    if number is None:
        raise TypeError(f"{name}: expected {what}, got {value!r}")
    if not least <= number < 2**63:
        raise ValueError(f"{name}: expected {what}{f' >= {least}' if least >= 0 else ''} of 64 bits, got {number}")
    return number


def joined(lists: Sequence[Sequence[int]]) -> list[int]:
    """The K integers of each of M modules in one list, as the schemas take them.

    Without shared lists: K integers, module by module. Where modules share a list: -K, then for each module the index of its list among the distinct ones, then
    the distinct lists. A call then takes K + M integers through the dispatcher where it would take K M."""
    places: dict[int, int] = {}  # by the object: equal lists of other objects would have to be compared
    distinct: list[Sequence[int]] = []
    for own in lists:
        if id(own) not in places:
            places[id(own)] = len(distinct)
            distinct.append(own)
    if not lists or not lists[0] or len(distinct) == len(lists):
        return [value for own in lists for value in own]
    return [-len(lists[0]), *(places[id(own)] for own in lists), *(value for own in distinct for value in own)]


def own_list(values: Sequence[int], module: int, modules: int) -> Sequence[int]:
    """The K integers of one module out of what `joined` made."""
    if not modules:
        return values[:0]
    if len(values) and values[0] < 0:
        count = -values[0]
        start = 1 + modules + values[1 + module] * count
    else:
        count = len(values) // modules
        start = module * count
    return values[start : start + count]


def _lasting() -> AbstractContextManager:
    """Tensors made here are kept for later calls, which may train: inference mode would make others."""
    if torch.compiler.is_compiling():  # what is traced is not kept
        return nullcontext()
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def check_int64(name: str, tensor: Any, shape: tuple[int, ...], what: str = "") -> Tensor:
    """The argument; `ValueError` naming it unless it is an int64 tensor of `shape`.   what: words about the shape."""
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int64 or tuple(tensor.shape) != shape:
        raise ValueError(f"{name}: expected an int64 tensor of shape {shape}{what}, got {seen(tensor)}")
    return tensor


def seen(given: Any) -> str:
    """What came, for an error."""
    return f"{given.dtype} {tuple(given.shape)}" if isinstance(given, Tensor) else type(given).__name__


class RankLayout:
    """Ranks of K clients whose rank rows are packed one client after another: client k owns rows `offsets[k] : offsets[k + 1]`.

    ranks: K integers >= 0 (0 = a client without an adapter).

    Attributes
      ranks: tuple of K ints;  offsets: tuple of K + 1 ints, offsets[0] = 0;  total: S = sum of the ranks;  max_rank: R, 0 when there are no clients.

    Immutable and hashable; equal when the ranks are equal. `ValueError` on a negative rank, `TypeError` on anything but integers.

    >>> import hetlora_kernels as hk
    >>> layout = hk.RankLayout([2, 0, 3])
    >>> layout.offsets, layout.total, layout.max_rank
    ((0, 2, 2, 5), 5, 3)
    >>> layout.rows(2)
    slice(2, 5, None)
    """

    __slots__ = ("max_rank", "offsets", "ranks", "total")

    ranks: tuple[int, ...]
    offsets: tuple[int, ...]
    total: int
    max_rank: int

    def __init__(self, ranks: Sequence[int] | Tensor) -> None:
        values = int_list("ranks", ranks)
        for k, rank in enumerate(values):
            if rank < 0:
                raise ValueError(f"ranks: expected integers >= 0, got {rank} for client {k}")
        own = object.__setattr__
        own(self, "ranks", tuple(values))
        own(self, "offsets", (0, *accumulate(values)))
        own(self, "total", self.offsets[-1])
        own(self, "max_rank", max(values, default=0))

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{name}: a RankLayout does not change; make a new one")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{name}: a RankLayout does not change; make a new one")

    def __reduce__(self) -> tuple[type[RankLayout], tuple[tuple[int, ...]]]:
        return RankLayout, (self.ranks,)

    @property
    def num_clients(self) -> int:
        return len(self.ranks)

    def rows(self, client: int) -> slice:
        """Rows of `client` in a packed buffer. `IndexError` unless 0 <= client < K: a negative index would give an empty slice."""
        if not 0 <= whole("client", client) < len(self.ranks):
            raise IndexError(f"client: expected 0 <= client < {len(self.ranks)}, got {client}")
        return slice(self.offsets[client], self.offsets[client + 1])

    def scales(self, scale: float | Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype) -> Tensor:
        """`scale`, one number or [K], as a tensor [K] of `dtype` on `device`."""
        if isinstance(scale, Tensor) and scale.requires_grad and torch.is_grad_enabled():
            raise ValueError("scale: expected a constant, got a tensor that requires a gradient; scale is not trained")
        clients = len(self.ranks)
        if isinstance(scale, (float, int)):
            _check_finite([scale], dtype)
            return torch.full((clients,), scale, dtype=dtype, device=device)
        if isinstance(scale, Tensor):  # copied: the backward pass needs it as it is now
            if scale.is_complex() or scale.is_quantized or scale.layout != torch.strided or (scale.is_meta and device.type != "meta"):
                raise TypeError(f"scale: expected real numbers, got a tensor of type {scale.dtype}, {scale.layout} on {scale.device}")
            values = scale.detach().to(device, dtype, copy=True)
        else:  # a plain number would become float32 first
            try:
                numbers = [value if type(value) is float else float(value) for value in scale]
            except (TypeError, ValueError, RuntimeError, OverflowError):
                raise TypeError(f"scale: expected a number or {clients} numbers, one per client, got {scale!r}") from None
            _check_finite(numbers, dtype)
            values = uploaded("scale", torch.tensor(numbers, dtype=dtype, device="cpu"), device)
        if values.dim() > 1 or (values.dim() == 1 and values.numel() != clients):
            raise ValueError(f"scale: expected a number or {clients} numbers, one per client, got shape {tuple(values.shape)}")
        return values.expand(clients).contiguous()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, RankLayout) and self.ranks == other.ranks

    def __hash__(self) -> int:
        return hash(self.ranks)

    def __repr__(self) -> str:
        return f"RankLayout({list(self.ranks)})"


class Plan(NamedTuple):
    """What stays the same over the calls of a layer on one batch."""

    scale: Tensor  # [K] on the device, in the type of the arithmetic
    gathered: Tensor | None  # the index of the `Segments`, on the device
    segments: list[int]  # the rows of x, the layout's K ranks, then K starts and K lengths as in `Segments`, 0 for clients without a segment


class Segments:
    """Which rows of x belong to which client, and the key of each row (the part of a dropout counter that names the row).

    Build one per batch with `from_lengths` or `from_ids` and pass it to every layer: forward and backward reuse it.

    Attributes
      num_rows: T, rows of x;  num_clients: K;
      starts, lengths: K ints each; client k owns rows `starts[k] : starts[k] + lengths[k]` of x, or of `x[index]` where `index` is given;
      index: int64 [sum(lengths)] or None; None when every client's rows are contiguous in x, so that nothing is gathered;
      row_keys: int64 [T] or None; None means the default keys 0, 1, 2, ... within each client.

    Rows that no client owns are base only: their output is the frozen layer's, their gradient flows through it alone.

    >>> import hetlora_kernels as hk
    >>> hk.Segments.from_lengths([3, 0, 2])
    Segments(num_rows=5, lengths=[3, 0, 2], gathered=False)
    >>> seg = hk.Segments.from_ids([1, 0, -1, 1])
    >>> seg.lengths, seg.index.tolist()
    ([1, 2], [1, 0, 3])
    """

    __slots__ = ("_key_cache", "_plans", "index", "lengths", "num_rows", "row_keys", "starts")

    def __init__(self, num_rows: int, starts: list[int], lengths: list[int], index: Tensor | None, row_keys: Tensor | None) -> None:
        self.num_rows, self.starts, self.lengths = num_rows, starts, lengths
        self.index, self.row_keys = index, row_keys
        self._key_cache: dict[torch.device, Tensor] = {}
        self._plans: dict[tuple | None, Plan] = {}

    @property
    def num_clients(self) -> int:
        return len(self.lengths)

    def plan(self, layout: RankLayout, scale: float | Sequence[float] | Tensor, device: torch.device, dtype: torch.dtype, tracing: bool = False) -> Plan:
        """The `Plan` of these segments beside `layout`, for an x of `dtype` on `device`; the plans of plain numbers, or tuples of them, are kept.

        tracing: make one that is not kept: a graph has its plan as constants, and torch 2.10 refuses to trace what several kept ones share.

        scale: number or [K].   `ValueError` where the layout has fewer clients than the segments, or `scale` another number of them.
        """
        plain = type(scale) in (float, int) or (type(scale) is tuple and all(type(value) in (float, int) for value in scale))
        key = (layout.ranks, scale, device, dtype) if plain else None
        plan = None if tracing else self._plans.get(key)
        if plan is not None:
            return plan
        if self.num_clients > layout.num_clients:
            raise ValueError(f"seg: expected at most the layout's {layout.num_clients} clients, got {self.num_clients}")
        with _lasting():
            scales = layout.scales(scale, device, torch.float64 if dtype == torch.float64 else torch.float32)
            absent = [0] * (layout.num_clients - self.num_clients)
            plan = Plan(scales, self.index_on(device), [self.num_rows, *layout.ranks, *self.starts, *absent, *self.lengths, *absent])
        if plain and not tracing and type(plan.scale) is Tensor:  # not a tracer's
            if len(self._plans) >= _KEPT_PLANS:
                self._plans.clear()
            self._plans[key] = plan
        return plan

    @classmethod
    def from_lengths(cls, lengths: Sequence[int] | Tensor, row_keys: Tensor | None = None) -> Segments:
        """Client k owns the next `lengths[k]` rows of x, in order; 0 is legal.

        row_keys: int64 [sum(lengths)], default 0, 1, 2, ... within each client.
        """
        counts = int_list("lengths", lengths)
        for k, count in enumerate(counts):
            if count < 0:
                raise ValueError(f"lengths: expected integers >= 0, got {count} for client {k}")
        *starts, total = accumulate(counts, initial=0)
        _check_keys(row_keys, total)
        return cls(total, starts, counts, None, row_keys)

    @classmethod
    def from_ids(cls, ids: Sequence[int] | Tensor, row_keys: Tensor | None = None, num_clients: int | None = None) -> Segments:
        """Row t of x belongs to client `ids[t]`, in any order; -1 = base only. Copies `ids` to the host once.

        row_keys: int64 [T], default 0, 1, 2, ... within each client in the order of its rows.
        num_clients: K, default the largest id + 1; an id outside -1 .. K - 1 is a `ValueError`.
        """
        device = ids.device if isinstance(ids, Tensor) else torch.device("cpu")
        flat = torch.tensor(int_list("ids", ids), dtype=torch.int64, device="cpu")
        highest = int(flat.max()) if flat.numel() else -1
        count = highest + 1 if num_clients is None else whole("num_clients", num_clients, 0)
        if flat.numel() and int(flat.min()) < -1:
            raise ValueError(f"ids: expected -1 (base only) or a client >= 0, got {int(flat.min())}")
        if highest >= count:
            raise ValueError(f"ids: expected ids below num_clients = {count}, got {highest}")
        _check_keys(row_keys, flat.numel())
        order = torch.argsort(flat, stable=True)
        sizes = torch.bincount(flat + 1, minlength=count + 1).tolist() if flat.numel() else [0] * (count + 1)
        base_rows, lengths = sizes[0], sizes[1:]
        *starts, _ = accumulate(lengths, initial=0)
        order = order[base_rows:]
        direct = [int(order[s]) if n else 0 for s, n in zip(starts, lengths, strict=True)]
        contiguous = all(n == 0 or int(order[s + n - 1]) - int(order[s]) == n - 1 for s, n in zip(starts, lengths, strict=True))
        if contiguous:
            return cls(flat.numel(), direct, lengths, None, row_keys)
        return cls(flat.numel(), starts, lengths, order.to(device), row_keys)

    def expand(self, before: int, after: int, row_keys: Tensor | None = None) -> Segments:
        """Segments of an x [before, T, after, n], whose clients are those of the middle dimension. The sizes may be symbols of a graph.

        row_keys: int64 [before * T * after], default 0, 1, 2, ... within each client in the order of its rows.

        >>> import hetlora_kernels as hk
        >>> hk.Segments.from_ids([1, 0]).expand(1, 4)
        Segments(num_rows=8, lengths=[4, 4], gathered=False)
        >>> hk.Segments.from_ids([1, 0]).expand(4, 1).index.tolist()
        [1, 3, 5, 7, 0, 2, 4, 6]
        """
        rows, lengths = before * self.num_rows * after, [before * length * after for length in self.lengths]
        longest = max(self.lengths, default=0)
        if longest == 0 or longest == self.num_rows:  # of one client, or of none
            return Segments(rows, [0] * len(lengths), lengths, None, row_keys)
        if before == 1 and self.index is None:
            return Segments(rows, [start * after for start in self.starts], lengths, None, row_keys)
        device = next((tensor.device for tensor in (self.index, row_keys) if tensor is not None), torch.device("cpu"))
        order = torch.arange(self.num_rows, device=device) if self.index is None else self.index
        owned = [order] if before == 1 else [order[start : start + length] for start, length in zip(self.starts, self.lengths, strict=True)]
        outer, inner = torch.arange(before, device=device)[:, None, None] * (self.num_rows * after), torch.arange(after, device=device)
        index = torch.cat([(outer + own[:, None] * after + inner).reshape(-1) for own in owned])
        *starts, _ = accumulate(lengths, initial=0)
        return Segments(rows, starts, lengths, index, row_keys)

    def keys_on(self, device: torch.device) -> Tensor:
        """Row keys in the order of the segments' rows (`x[index]` where `index` is given, else x): int64, built once per device."""
        keys = self._key_cache.get(device)
        if keys is None:
            with _lasting():
                keys = self._keys(device).contiguous()
            if type(keys) is Tensor and not torch.compiler.is_compiling():  # not a tracer's
                self._key_cache[device] = keys
        return keys

    def _keys(self, device: torch.device) -> Tensor:
        if self.row_keys is not None:
            # A copy: the backward pass needs them as they are now.
            keys = self.row_keys.clone() if self.row_keys.device == device else uploaded("row_keys", self.row_keys, device)
            index = self.index_on(device)
            return keys if index is None else keys[index]
        # K launches or one copy; a graph joins launches, and has nothing on the host.
        where = device if torch.compiler.is_compiling() else torch.device("cpu")
        made = torch.zeros(self.num_rows if self.index is None else self.index.numel(), dtype=torch.int64, device=where)
        for start, length in zip(self.starts, self.lengths, strict=True):
            made[start : start + length] = torch.arange(length, device=where)
        return uploaded("row_keys", made, device)

    def index_on(self, device: torch.device) -> Tensor | None:
        """`index` on `device`; moved once."""
        if self.index is not None and self.index.device != device:
            self.index = uploaded("index", self.index, device)
        return self.index

    def __repr__(self) -> str:
        return f"Segments(num_rows={self.num_rows}, lengths={self.lengths}, gathered={self.index is not None})"


def _check_finite(scale: Sequence[float], dtype: torch.dtype) -> None:
    for value in scale:
        if not abs(value) <= torch.finfo(dtype).max:
            raise ValueError(f"scale: expected finite numbers in {dtype}, got {value}")


def _check_keys(row_keys: Tensor | None, rows: int) -> None:
    if row_keys is not None:
        check_int64("row_keys", row_keys, (rows,), ", one per row")
