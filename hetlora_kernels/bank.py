"""AdapterBank: the packed LoRA factors of K clients over all target modules."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from hetlora_kernels.casts import Casts
from hetlora_kernels.layout import RankLayout, int_list
from hetlora_kernels.ops._lists import FLOATS
from hetlora_kernels.ops.aggregate import Normalize, aggregate
from hetlora_kernels.ops.norms import delta_norms, tail_norms
from hetlora_kernels.ops.truncate import truncate

Ranks = Sequence[int] | Mapping[str, Sequence[int]]
_PREFIX = "base_model.model."


class AdapterBank:
    """K adapters over the same modules: for each module a [S, n] and bt [S, m] (B transposed), client k owning the rows its layout says.

    shapes: {dotted module name: (out_features m, in_features n)}.
    ranks: one integer >= 0 per client, or {module: one per client}.
    dtype, device: of the factors.   generator: torch generator of the initial draw, default torch's own.

    Initially A is Kaiming-uniform as in PEFT (bound 1 / sqrt(n)) and B is zero, the same for all clients: a client of rank r starts from the
    leading r rows of one common draw. A server bank is a bank of one client.

    Attributes
      a, bt: {module: Parameter};  layouts: {module: RankLayout};  shapes;  num_clients;  device, dtype;
      ranks: tuple of K ints where all modules agree, else {module: tuple}.

    >>> import hetlora_kernels as hk
    >>> server = hk.AdapterBank({"layer.q_proj": (6, 4)}, ranks=[8])
    >>> clients = server.truncate([2, 8, 3])
    >>> clients.ranks, tuple(clients.a["layer.q_proj"].shape), tuple(clients.bt["layer.q_proj"].shape)
    ((2, 8, 3), (13, 4), (13, 6))
    >>> [(key, tuple(value.shape)) for key, value in clients.adapter(2).items()]
    [('base_model.model.layer.q_proj.lora_A.weight', (3, 4)), ('base_model.model.layer.q_proj.lora_B.weight', (6, 3))]
    >>> clients.aggregate([0.5, 0.25, 0.25], max_rank=8).ranks
    (8,)
    """

    casts: Casts | None = None  # set by an optimiser with `cast=`

    def __init__(
        self,
        shapes: Mapping[str, tuple[int, int]],
        ranks: Ranks,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
    ) -> None:
        layouts = _layouts(shapes, ranks)
        a, bt = {}, {}
        for name, (m, n) in shapes.items():
            layout = layouts[name]
            bound = 1 / math.sqrt(n) if n else 0.0
            draw = torch.empty(layout.max_rank, n, dtype=dtype, device=generator.device if generator else device)
            draw = draw.uniform_(-bound, bound, generator=generator).to(device)
            a[name] = truncate([draw], layout)[0]
            bt[name] = torch.zeros(layout.total, m, dtype=dtype, device=device)
        self._set(shapes, layouts, a, bt)

    def _set(self, shapes: Mapping[str, tuple[int, int]], layouts: dict[str, RankLayout], a: Mapping[str, Tensor], bt: Mapping[str, Tensor]) -> None:
        self.shapes = {name: (int(m), int(n)) for name, (m, n) in shapes.items()}
        self.layouts = layouts
        self.a = {name: Parameter(a[name]) for name in shapes}
        self.bt = {name: Parameter(bt[name]) for name in shapes}

    @classmethod
    def _build(cls, shapes: Mapping[str, tuple[int, int]], layouts: dict[str, RankLayout], a: Sequence[Tensor], bt: Sequence[Tensor]) -> AdapterBank:
        bank = cls.__new__(cls)
        bank._set(shapes, layouts, dict(zip(shapes, a, strict=True)), dict(zip(shapes, bt, strict=True)))
        return bank

    @classmethod
    def of(cls, shapes: Mapping[str, tuple[int, int]], ranks: Ranks, a: Mapping[str, Tensor], bt: Mapping[str, Tensor]) -> AdapterBank:
        """The bank that holds these packed rows, not copies: a[name] [S, n], bt[name] [S, m]. `ValueError` where they are not of the shapes and ranks."""
        layouts = _layouts(shapes, ranks)
        for side, rows, width in (("a", a, 1), ("bt", bt, 0)):
            for name, shape in shapes.items():
                expected = layouts[name].total, shape[width]
                if name not in rows or tuple(rows[name].shape) != expected:
                    raise ValueError(f"{side}: expected {expected} for {name!r}, got {tuple(rows[name].shape) if name in rows else 'none'}")
        return cls._build(shapes, layouts, [a[name].detach() for name in shapes], [bt[name].detach() for name in shapes])

    # -- what it is

    @property
    def num_clients(self) -> int:
        return next(iter(self.layouts.values())).num_clients

    @property
    def ranks(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        per_module = {name: layout.ranks for name, layout in self.layouts.items()}
        distinct = set(per_module.values())
        return distinct.pop() if len(distinct) == 1 else per_module

    @property
    def dtype(self) -> torch.dtype:
        return next(iter(self.a.values())).dtype

    @property
    def device(self) -> torch.device:
        return next(iter(self.a.values())).device

    def parameters(self) -> Iterator[Parameter]:
        """Every factor: all A, then all B, in module order."""
        yield from self.a.values()
        yield from self.bt.values()

    def freeze_a(self) -> AdapterBank:
        """Train B alone: A needs no gradient from here on, and layers and optimisers leave out what belongs to it. Copies by `select` are frozen too."""
        return self._freeze(self.a)

    def freeze_b(self) -> AdapterBank:
        """Train A alone, as `freeze_a` for B."""
        return self._freeze(self.bt)

    def _freeze(self, side: Mapping[str, Parameter]) -> AdapterBank:
        for rows in side.values():
            rows.requires_grad_(False)
            rows.grad = None
        return self

    def num_bytes(self, client: int, factors: str = "ab") -> int:
        """Bytes of one client's factors.   factors: 'a', 'b' or 'ab', those that count. `IndexError` for a client that is none."""
        if factors not in ("a", "b", "ab"):
            raise ValueError(f"factors: expected 'a', 'b' or 'ab', got {factors!r}")
        self._client(client)
        widths = {name: m * ("b" in factors) + n * ("a" in factors) for name, (m, n) in self.shapes.items()}
        return sum(self.layouts[name].ranks[client] * width * self.dtype.itemsize for name, width in widths.items())

    def _client(self, client: int) -> int:
        next(iter(self.layouts.values())).rows(client)
        return client

    def __repr__(self) -> str:
        return f"AdapterBank({', '.join(f'{name}: {value}' for name, value in self._lines())})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return "<table>" + "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in self._lines()) + "</table>"

    def _lines(self) -> list[tuple[str, str]]:
        """What it is in a few words, however many clients and modules it has."""
        ranks = [rank for layout in set(self.layouts.values()) for rank in layout.ranks]
        low, high = min(ranks, default=0), max(ranks, default=0)
        numbers = sum(tensor.numel() for tensor in self.parameters())
        return [
            ("clients", str(self.num_clients)),
            ("modules", str(len(self.shapes))),
            ("ranks", str(low) if low == high else f"{low} to {high}"),
            ("parameters", f"{numbers:,}"),
            ("dtype", str(self.dtype).removeprefix("torch.")),
            ("device", str(self.device)),
        ]

    # -- new banks

    def truncate(self, ranks: Ranks) -> AdapterBank:
        """Distribution: from a bank of one client, a bank of K clients that hold its leading `ranks` rows. `ValueError` on a rank above the bank's."""
        if self.num_clients != 1:
            raise ValueError(f"truncate: expected a bank of one client, got {self.num_clients}; `prune` shortens every client of a bank")
        layouts = _layouts(self.shapes, ranks)
        return self._build(self.shapes, layouts, *(truncate(list(rows.values()), list(layouts.values())) for rows in (self.a, self.bt)))

    def prune(self, ranks: Ranks) -> AdapterBank:
        """Each client keeps its leading `ranks[k]` rows. `ValueError` on a rank above the client's present one."""
        layouts = _layouts(self.shapes, ranks)
        a, bt = [], []
        for name, layout in layouts.items():
            old = self.layouts[name]
            if layout.num_clients != old.num_clients:
                raise ValueError(f"ranks: expected {old.num_clients} integers, one per client, got {layout.num_clients}")
            for k, (rank, present) in enumerate(zip(layout.ranks, old.ranks, strict=True)):
                if rank > present:
                    raise ValueError(f"ranks: expected at most {present} for client {k} in {name} (ranks never grow), got {rank}")
            rows = torch.tensor([old.offsets[k] + i for k, rank in enumerate(layout.ranks) for i in range(rank)], dtype=torch.int64, device=self.device)
            a.append(self.a[name].detach()[rows])
            bt.append(self.bt[name].detach()[rows])
        return self._build(self.shapes, layouts, a, bt)

    def select(self, clients: Sequence[int]) -> AdapterBank:
        """A copy of some clients, in the order given; factors that are frozen stay so. `IndexError` for a client that is none."""
        clients = [self._client(client) for client in int_list("clients", clients)]

        def pick(rows: Mapping[str, Tensor]) -> list[Tensor]:
            return [torch.cat([t.detach()[self.layouts[name].rows(k)] for k in clients] or [t.detach()[:0]]) for name, t in rows.items()]

        a, bt = pick(self.a), pick(self.bt)
        picked = self._build(self.shapes, {name: RankLayout([layout.ranks[k] for k in clients]) for name, layout in self.layouts.items()}, a, bt)
        for own, parameter in zip(picked.parameters(), self.parameters(), strict=True):
            own.requires_grad_(parameter.requires_grad)
        return picked

    @classmethod
    def concat(cls, banks: Sequence[AdapterBank]) -> AdapterBank:
        """One bank of all clients of `banks`, in order. `ValueError` when the modules differ."""
        first = _first(banks)
        if any(bank.shapes != first.shapes for bank in banks):
            raise ValueError("banks: expected the same modules and shapes in every bank")
        layouts = {name: RankLayout([r for bank in banks for r in bank.layouts[name].ranks]) for name in first.shapes}
        joined = ([torch.cat([getattr(bank, side)[name].detach() for bank in banks]) for name in first.shapes] for side in ("a", "bt"))
        return cls._build(first.shapes, layouts, *joined)

    @classmethod
    def stack(cls, banks: Sequence[AdapterBank]) -> AdapterBank:
        """Each client's rows of all `banks`, in order: B A of the result is the sum of theirs. `ValueError` when modules or numbers of clients differ."""
        first = _first(banks)
        if any(bank.shapes != first.shapes or bank.num_clients != first.num_clients for bank in banks):
            raise ValueError("banks: expected the same modules, shapes and number of clients in every bank")
        clients = range(first.num_clients)
        layouts = {name: RankLayout([sum(bank.layouts[name].ranks[k] for bank in banks) for k in clients]) for name in first.shapes}

        def rows(side: str, name: str) -> Tensor:
            parts = [getattr(bank, side)[name].detach()[bank.layouts[name].rows(k)] for k in clients for bank in banks]
            return torch.cat(parts or [getattr(first, side)[name].detach()])

        return cls._build(first.shapes, layouts, *([rows(side, name) for name in first.shapes] for side in ("a", "bt")))

    def aggregate(self, weights: Tensor | Sequence[float], max_rank: int, normalize: Normalize = "none", keep: AdapterBank | None = None) -> AdapterBank:
        """Server merge of A and of B separately: a bank of one client of rank `max_rank` (see `hetlora_kernels.aggregate`).

        weights: [K] or [K, modules] in module order.   keep: bank of one client that supplies the rows no client owns; default zero.
        """
        if keep is not None and (keep.num_clients != 1 or keep.shapes != self.shapes):
            raise ValueError("keep: expected a bank of one client over the same modules")
        layouts = list(self.layouts.values())
        merged = []
        for side in ("a", "bt"):
            rows = list(getattr(self, side).values())
            kept = None if keep is None else list(getattr(keep, side).values())
            merged.append(list(aggregate(rows, layouts, weights, max_rank, normalize=normalize, keep=kept)))
        return self._build(self.shapes, {name: RankLayout([max_rank]) for name in self.shapes}, *merged)

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> AdapterBank:
        """A copy on another device or in another type."""
        moved = ([t.detach().to(device=device, dtype=dtype, copy=True) for t in rows.values()] for rows in (self.a, self.bt))
        return self._build(self.shapes, dict(self.layouts), *moved)

    # -- norms

    def delta_norms(self, exact: bool = False) -> Tensor:
        """||B_k A_k||_F, [K, modules] (see `hetlora_kernels.delta_norms`)."""
        return delta_norms(list(self.a.values()), list(self.bt.values()), list(self.layouts.values()), exact)

    def tail_norms(self, keep: Ranks) -> tuple[Tensor, Tensor]:
        """(||A_k[q:]||_F, ||B_k[:, q:]||_F) with q = keep[k], each [K, modules]; their product summed over modules is the tail score."""
        cuts = [list(own) for own in _per_module(self.shapes, keep, "keep").values()]
        layouts = list(self.layouts.values())
        return tail_norms(list(self.a.values()), layouts, cuts), tail_norms(list(self.bt.values()), layouts, cuts)

    # -- in and out

    def adapter(self, client: int) -> dict[str, Tensor]:
        """Client's factors in PEFT's format: `base_model.model.<module>.lora_A.weight` [r, n] and `.lora_B.weight` [m, r]; copies.

        A module in which the client's rank is 0 has no keys.
        """
        out = {}
        for name, layout in self.layouts.items():
            rows = layout.rows(client)
            if layout.ranks[client]:
                out[f"{_PREFIX}{name}.lora_A.weight"] = self.a[name].detach()[rows].clone()
                out[f"{_PREFIX}{name}.lora_B.weight"] = self.bt[name].detach()[rows].t().clone(memory_format=torch.contiguous_format)
        return out

    @torch.no_grad()
    def load_adapter(self, client: int, state_dict: Mapping[str, Tensor]) -> None:
        """Write client's factors from PEFT's format, all or, where one is refused, none.

        `ValueError` or `TypeError` by the key: unknown, missing or mis-shaped; no plain dense float32, float64, bfloat16 or float16 tensor (complex, integers,
        float8, sparse, quantised, without data); a value that is not finite, or is not in the bank's type.
        """
        expected = self.adapter(client)
        _mapping(state_dict)
        unknown, missing = sorted(set(state_dict) - set(expected)), sorted(set(expected) - set(state_dict))
        if unknown or missing:
            raise ValueError(f"state_dict: unknown keys {unknown[:5]}, missing keys {missing[:5]} ({len(unknown)} and {len(missing)} in all)")
        ready = _checked(state_dict, expected)
        for name, layout in self.layouts.items():
            rows = layout.rows(client)
            if layout.ranks[client]:
                self.a[name][rows] = ready[f"{_PREFIX}{name}.lora_A.weight"]
                self.bt[name][rows] = ready[f"{_PREFIX}{name}.lora_B.weight"].t()

    def state_dict(self) -> dict[str, Tensor]:
        """{"a.<module>": [S, n], "bt.<module>": [S, m]}, the packed factors themselves."""
        return {f"{side}.{name}": tensor.detach() for side in ("a", "bt") for name, tensor in getattr(self, side).items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Copy packed factors in, strictly and all or none: same keys, same shapes, dense floating-point tensors; whatever their values."""
        own = self.state_dict()
        if set(own) != set(_mapping(state_dict)):
            raise ValueError(f"state_dict: expected the keys of this bank; unknown or missing: {sorted(set(own) ^ set(state_dict))[:5]}")
        ready = _checked(state_dict, own, finite=False)
        for key, tensor in own.items():
            tensor.copy_(ready[key])


def _first(banks: Sequence[AdapterBank]) -> AdapterBank:
    if not isinstance(banks, (list, tuple)) or not banks or not all(isinstance(bank, AdapterBank) for bank in banks):
        raise TypeError(f"banks: expected a non-empty list of banks, got {banks!r}")
    return banks[0]


def _mapping(state_dict: Any) -> Mapping[str, Any]:
    if not isinstance(state_dict, Mapping) or not all(isinstance(key, str) for key in state_dict):
        raise TypeError(f"state_dict: expected a mapping from names to tensors, got {type(state_dict).__name__}")
    return state_dict


def _checked(state_dict: Mapping[str, Any], expected: Mapping[str, Tensor], finite: bool = True) -> dict[str, Tensor]:
    """The values of the keys of `expected` in the types and on the devices of its tensors."""
    ready = {}
    for key, like in expected.items():
        value = state_dict[key]
        if type(value) not in (Tensor, Parameter) or value.dtype not in FLOATS or value.layout != torch.strided or value.is_nested or value.is_meta:
            got = f"{type(value).__name__} of type {value.dtype}, {value.layout} on {value.device}" if isinstance(value, Tensor) else type(value).__name__
            raise TypeError(f"state_dict: expected a dense float32, float64, bfloat16 or float16 tensor for {key}, got {got}")
        if tuple(value.shape) != tuple(like.shape):
            raise ValueError(f"state_dict: expected shape {tuple(like.shape)} for {key}, got {tuple(value.shape)}")
        ready[key] = value.detach().to(like)
    if ready and finite:
        whole = torch.stack([value.isfinite().all() for value in ready.values()]).tolist()  # fetched once
        for key, good in zip(ready, whole, strict=True):
            if not good:
                raise ValueError(f"state_dict: expected finite numbers in {ready[key].dtype} for {key}, got {int((~ready[key].isfinite()).sum())} others")
    return ready


def _per_module(shapes: Mapping[str, Any], values: Ranks, name: str) -> dict[str, Sequence[int]]:
    if not isinstance(values, Mapping):
        return {module: values for module in shapes}
    if set(values) != set(shapes):
        raise ValueError(f"{name}: expected the modules {list(shapes)[:5]}, unknown or missing: {sorted(set(values) ^ set(shapes))[:5]}")
    return {module: values[module] for module in shapes}


def _layouts(shapes: Mapping[str, Any], ranks: Ranks) -> dict[str, RankLayout]:
    """One layout per module; a common one is shared. `ValueError` when the modules disagree on the number of clients or there are none."""
    if not shapes:
        raise ValueError("shapes: expected at least one module, got none")
    if not isinstance(ranks, Mapping):
        return dict.fromkeys(shapes, RankLayout(ranks))
    layouts: dict[str, RankLayout] = {}
    shared: dict[RankLayout, RankLayout] = {}  # its device tensors are then made once, whichever form the ranks came in
    for module, own in _per_module(shapes, ranks, "ranks").items():
        layout = RankLayout(own)
        layouts[module] = shared.setdefault(layout, layout)
    counts = {layout.num_clients for layout in layouts.values()}
    if len(counts) > 1:
        raise ValueError(f"ranks: expected the same number of clients in every module, got {sorted(counts)}")
    return layouts
