"""Whose rows are whose in one batch: clients of sequences or tokens, the segments of each layer's input, and the dropout seeds of each layer."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from math import prod
from threading import get_ident
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hetlora_kernels._torch import in_backward
from hetlora_kernels.layout import Segments
from hetlora_kernels.ops.lora import KeptSeeds
from hetlora_kernels.peft.follow import Follower
from hetlora_kernels.peft.owners import LOST, Entry, Owners
from hetlora_kernels.peft.seeds import SeedTable

SEQUENCE_STRIDE = 1 << 20  # row key = sequence index in the client's step batch * 2^20 + position


Forms = dict[bool, dict[int, Any]]  # of a layer: {training mode of the model: {dimensions of its leading shape: Form}}
Form = int | str  # the dimension of an input's leading shape that counts the sequences, or "flat": [sequences * length, ..., n]
_FLAT, _ANY, _NONE = "flat", "any", "none"  # none: seen in several orders, so it is followed at every call
MISSED = -1  # key of a layer's forms: how many followed calls of the model went by without it; -1: it is to be followed at the next call
MISSES = 16
_KEPT = 1024  # rows of one batch: a model has some hundreds of layers, and their inputs a few shapes


class Rows:
    """Whose the rows of one layer's input are.   ids: int64 [rows], the client of each, -1 = base only.   entry: the same for a `Follower`."""

    __slots__ = ("entry", "ids", "segments")

    def __init__(self, ids: Tensor | None, segments: Segments, entry: Entry = LOST) -> None:
        self.ids, self.segments, self.entry = ids, segments, entry


class Batch:
    """The clients of one batch, as `client_segments` names them, and whose the rows of every layer's input are.

    A layer's rows are known (1) where `given` names them, (2) where they were followed from the model's inputs to the layer (`Follower`), (3) where an
    earlier call in the same mode (training or not) showed their order, which is then kept in `forms`, (4) where nothing can be followed (a layer called
    without its model, a compiled model) or the input is no sequence's data, and the first dimension has the size of the batch and no other has.
    Everything else is refused by the name of the layer.
    """

    def __init__(
        self,
        num_clients: int,
        ids: Tensor | None = None,  # int64 [batch] or [batch, seq]; None: one client owns every row
        sequence_index: Tensor | None = None,  # int64 [batch]
        seeds: Tensor | None = None,  # int64 [num_clients]
        step: int | Tensor = 0,
        given: Mapping[str, Tensor] | None = None,  # int64 clients of the rows of the layers in a part of the model
        forms: Mapping[str, Forms] | None = None,  # {layer: what is known}; None: the first dimension, as PEFT has it
    ) -> None:
        self.num_clients, self.ids, self.sequence_index = num_clients, ids, sequence_index
        self.seeds = None if seeds is None else SeedTable(seeds, step, len(forms or ()))
        self.given, self.forms = given or {}, forms
        self.follower: Follower | None = None  # while one is on
        self.kept_follower: Follower | None = None
        self.size = 0 if ids is None else ids.shape[0]  # sequences in what the model was called with: other than the ids where generation repeats them
        self.fits = False  # whether the ids are known to fit what the model was called with
        self.calls: set[str] = set()  # layers, since the model was called
        self.ran: set[str] = set()
        self.thread: int | None = None  # the block's
        self.training = False  # the mode of what was called as the model
        self.called: set[tuple[int, bool]] = set()  # (sequences, mode) of the calls of the model in this block
        self.repeated = False  # while a layer that is computed again has the size and the mode of its own call
        self.unfollowed = False  # while the model runs and could be followed, but is not, for its layers are known
        self._rows: dict[tuple[str, tuple[int, ...]], Rows] = {}
        self._forms: dict[tuple[Form, tuple[int, ...]], Rows] = {}  # one for all layers of an order and a shape

    def rows(self, x: Tensor, name: str) -> Rows:
        """Whose the rows of `x` [..., n] are, the input of the layer `name`; found once per layer and shape. `ValueError` where nothing says it for certain."""
        if self.thread is not None and not torch.compiler.is_compiling() and get_ident() != self.thread:
            self.check_thread()
        key = name, tuple(x.shape[:-1])
        # A layer may be called twice in a forward, with other rows; of several calls of the model, one computed again must not take another's.
        known = self._rows.get(key) if self.follower is None and len(self.called) < 2 else None
        return known or self._find(x, name, key)

    def layer_seeds(self, position: int, device: torch.device) -> KeptSeeds | None:
        """int64 [K] seeds of the layer at this position, or None where the batch has none."""
        return None if self.seeds is None else self.seeds.row(position, device)

    # -- the calls of the model

    def elsewhere(self) -> bool:
        """Whether another thread runs than the block's: not one of the backward pass, which has threads of its own on a GPU."""
        return get_ident() != self.thread and self.thread is not None and not in_backward()

    def check_thread(self) -> None:
        if self.elsewhere():
            raise RuntimeError("client_segments: another thread runs this model while a block names its clients; give each thread a model of its own")

    @cached_property
    def of_one_client(self) -> bool:
        return self.ids is not None and self.ids.numel() > 0 and bool((self.ids == self.ids.reshape(-1)[0]).all())

    def resize(self, size: int) -> None:
        """The model is called with so many sequences."""
        self.size = size
        self._rows.clear()
        self._forms.clear()

    def set_mode(self, training: bool) -> None:
        """The model is called in this mode, in which its rows may go another way."""
        if training != self.training:
            self.training = training
            self._rows.clear()

    @contextmanager
    def as_called(self, size: int, training: bool) -> Iterator[None]:
        """While a checkpoint computes again what it computed in a call of this size and mode."""
        before = self.size, self.training, self.repeated
        self._become(size, training, True)
        try:
            yield
        finally:
            self._become(*before)

    def _become(self, size: int, training: bool, repeated: bool) -> None:
        if size != self.size:
            self.resize(size)
        self.set_mode(training)
        self.repeated = repeated

    def to_follow(self) -> bool:
        """Whether a layer's order is still to be learnt; no reason are layers that many calls passed by, nor, after a first call, batches of one client."""
        known = [own[self.training] for own in (self.forms or {}).values()]
        if self.of_one_client and self.seeds is None and any(set(own) - {MISSED} for own in known):
            return False
        return any(_to_learn(own) for own in known)

    def missed(self) -> None:
        """A followed call ended."""
        for name, own in (self.forms or {}).items():
            forms = own[self.training]
            if name in self.calls:
                forms.pop(MISSED, None)
            else:
                forms[MISSED] = max(forms.get(MISSED, 0), 0) + 1
        self._rows.clear()

    # -- what is known about a layer

    def _find(self, x: Tensor, name: str, key: tuple[str, tuple[int, ...]]) -> Rows:
        leading = key[1]
        self.ran.add(name)
        if self.ids is None:
            return self._keep(self._rows, key, self._of_one(leading))
        if prod(leading) == 0:
            return Rows(self.ids.new_empty(0), Segments.from_lengths([0] * self.num_clients))
        own = self._given(name)
        if own is not None:
            return self._keep(self._rows, key, self._as_given(own, leading, name))
        if len(self.called) > 1 and not (self.repeated or torch.compiler.is_compiling()) and in_backward():
            raise RuntimeError(
                f"client_segments: layer {name!r} is computed again by a backward pass, and nothing says in which of this block's calls of the model, which "
                f"had several sizes or modes (train, eval); open a block for each of them"
            )
        forms = {} if self.forms is None else self.forms[name][self.training]
        form, entry = forms.get(len(leading)), None
        if self.follower is not None and self.forms is not None:
            self.calls.add(name)
            entry = self.follower.input_entry(x)
            if isinstance(entry, Owners) and bool((entry.table < 0).any()):
                entry = LOST  # rows of constants among them
            if isinstance(entry, Owners):
                return self._as_seen(entry, leading, name, forms)
            form = None if form is None or entry is LOST else form
        if form is None or form == _NONE:
            form = self._by_shape(leading, name, entry if form is None else LOST)
        rows = self._in_form(form, leading, name)
        if self.follower is None:
            self._keep(self._rows, key, rows)
        return rows

    def _as_seen(self, entry: Owners, leading: tuple[int, ...], name: str, forms: dict[int, Any]) -> Rows:
        """Rows that were followed to the layer; an order that follows from shapes alone is learnt."""
        assert self.follower is not None
        if not entry.sure:
            self.follower.unsure = self.follower.unsure or name
        seen, form = self._form(entry, leading), forms.get(len(leading))
        if form is None and seen is not None and entry.sure and self.size > 1 and not self.follower.numbers:
            forms[len(leading)] = seen
        elif form not in (None, seen):  # flat rows of length 1 look like one row of each sequence
            flat = len(leading) == 1 and {form, seen} == {0, _FLAT}
            forms[len(leading)] = _FLAT if flat else _NONE
        return self._as_followed(entry, leading, name) if seen is None else self._in_form(seen, leading, name)

    def _by_shape(self, leading: tuple[int, ...], name: str, entry: Entry) -> Form:
        assert self.ids is not None
        size = self.size
        if self.forms is None:
            return 0
        if size == 1 and (len(leading) == 1 or leading[0] == 1):
            batch = self.ids.shape[0]
            if (batch == 1 and self.ids.dim() == 1) or (self.of_one_client and self.sequences(1) is not None):
                return _ANY
            if batch == 1 and "expert" not in name.lower():  # ids per token
                return _FLAT if len(leading) == 1 else 0
            raise self._refusal(leading, name)
        if self.unfollowed and not self.of_one_client:
            self.forms[name][self.training][MISSED] = -1
            raise self._refusal(leading, name, "; no earlier call came by it in this way: call the model again, the next call follows its rows")
        plain = len(leading) > 1 and leading[0] == size and size not in leading[1:] and "expert" not in name.lower()
        if plain and entry is not LOST:
            return 0
        if self.fits and self.of_one_client:
            return _ANY
        raise self._refusal(leading, name)

    def _form(self, entry: Owners, leading: tuple[int, ...]) -> Form | None:
        """The fixed order that these owners have, None where they have none."""
        varying = [dim for dim in range(len(leading)) if entry.varies(dim)]
        owners = self.sequences(self.size)
        if not entry.fixed or owners is None or entry.varies(-1) or len(varying) != 1:
            return None
        seen, count = entry.table.reshape(-1).to(owners.device), leading[varying[0]]
        if count == self.size and torch.equal(seen, owners):
            return varying[0]
        flat = varying[0] == 0 and count % self.size == 0 and torch.equal(seen, owners.repeat_interleave(count // self.size))
        return _FLAT if flat else None

    def sequences(self, count: int) -> Tensor | None:
        """int64 [count]: the sequence of each entry of a dimension of this size; None where it does not count sequences."""
        assert self.ids is not None
        batch, device = self.ids.shape[0], self.ids.device
        if count == batch:
            return torch.arange(batch, device=device)
        times = generated_per_sequence()
        if times > 1 and count == batch * times:  # ids of the batch before generation repeated it
            return torch.arange(batch, device=device).repeat_interleave(times)
        # ids of the batch after it; the encoder sees the one before
        if times > 1 and count * times == batch and torch.equal(self.ids, self.ids[::times].repeat_interleave(times, 0)):
            return torch.arange(0, batch, times, device=device)
        return None

    def _refusal(self, leading: tuple[int, ...], name: str, how: str = "") -> ValueError:
        assert self.ids is not None
        how = "; run the model once without torch.compile first" if torch.compiler.is_compiling() else how
        return ValueError(
            f"ids: expected one client per sequence, or per token, of an input with leading shape {leading}, got shape {tuple(self.ids.shape)}: nothing says "
            f"for certain whose the rows of layer {name!r} are; name them with client_segments(..., rows={{{name!r}: ids}}){how}"
        )

    # -- segments

    def _of_one(self, leading: tuple[int, ...]) -> Rows:
        if self.num_clients != 1:
            raise RuntimeError(
                f"the attached bank has {self.num_clients} clients: run the model, and its backward pass, inside `with client_segments(model, ids)`"
            )
        return Rows(None, Segments.from_lengths([prod(leading)]))

    def _given(self, name: str) -> Tensor | None:
        """The rows of the longest part of the model's name that `given` has for this layer."""
        parts = [part for part in self.given if f".{part}." in f".{name}."]
        return self.given[max(parts, key=len)] if parts else None

    def _as_given(self, own: Tensor, leading: tuple[int, ...], name: str) -> Rows:
        if tuple(own.shape) != leading and (own.dim() > 1 or own.numel() != prod(leading)):
            raise ValueError(f"rows: expected shape {leading}, the rows of layer {name!r}, got {tuple(own.shape)}; name the layers of other rows on their own")
        ids = own.reshape(-1)
        return Rows(ids, Segments.from_ids(ids, num_clients=self.num_clients))

    def _in_form(self, form: Form, leading: tuple[int, ...], name: str) -> Rows:
        return self._forms.get((form, leading)) or self._keep(self._forms, (form, leading), self._made_in_form(form, leading, name))

    @staticmethod
    def _keep(kept: dict[Any, Rows], key: Any, rows: Rows) -> Rows:
        """Batches that are no block's live as long as their model, and see many shapes: the kept rows are thrown away when they are many."""
        if len(kept) >= _KEPT:
            kept.clear()
        kept[key] = rows
        return rows

    def _made_in_form(self, form: Form, leading: tuple[int, ...], name: str) -> Rows:
        assert self.ids is not None
        rows, (batch, *_) = prod(leading), self.ids.shape
        if form == _ANY:
            ids = self.ids.reshape(-1)[:1].expand(rows)
            keys = self._keys(rows // batch) if batch and rows % batch == 0 else torch.arange(rows, device=ids.device)
            return Rows(ids, Segments.from_ids(ids, keys, num_clients=self.num_clients))
        dim = 0 if form == _FLAT else int(form)
        count = self.size if form == _FLAT else leading[dim]
        owners = self.sequences(count)
        if owners is None or (form == _FLAT and leading[0] % count):
            raise self._refusal(leading, name)
        if form == _FLAT:
            owners = owners.repeat_interleave(leading[0] // count)
        entry = Owners(owners.reshape([len(owners) if d == dim else 1 for d in range(len(leading) + 1)]))
        if dim == 0 and count == batch:
            if self.ids.dim() == 2 and rows != self.ids.numel():
                raise self._refusal(leading, name)
            ids = (self.ids[:, None].expand(batch, rows // batch) if self.ids.dim() == 1 else self.ids).reshape(-1)
            return Rows(ids, Segments.from_ids(ids, self._keys(rows // batch), num_clients=self.num_clients), entry)
        return self._as_followed(entry, leading, name)

    def _as_followed(self, entry: Owners, leading: tuple[int, ...], name: str) -> Rows:
        assert self.ids is not None
        if leading not in entry.rows:
            if entry.varies(-1) or self.ids.dim() == 2:
                raise self._refusal(leading, name)
            owners = entry.table.expand(*leading, 1).reshape(-1).to(self.ids.device)
            ids = self.ids[owners]
            order = torch.argsort(owners, stable=True)
            counts = torch.bincount(owners, minlength=1)
            place = torch.empty_like(owners)
            place[order] = torch.arange(len(owners), device=owners.device) - (counts.cumsum(0) - counts).repeat_interleave(counts)
            keys = self._numbers()[owners] * SEQUENCE_STRIDE + place
            entry.rows[leading] = ids, Segments.from_ids(ids, keys, num_clients=self.num_clients)
        ids, segments = entry.rows[leading]  # without the entry, which would keep itself alive
        return Rows(ids, segments, entry)

    def _numbers(self) -> Tensor:
        assert self.ids is not None
        return _sequence_index(self.ids) if self.sequence_index is None else self.sequence_index.to(self.ids.device)

    def _keys(self, length: int) -> Tensor:
        """int64 [rows]: what names each row in a dropout mask, so that it depends neither on the batch's other clients nor on padding."""
        sequence = self._numbers()
        sequence = sequence[:, None] if sequence.dim() == 1 else sequence
        keys = sequence * SEQUENCE_STRIDE + torch.arange(length, dtype=torch.int64, device=sequence.device)
        return keys.expand(len(sequence), length).reshape(-1)


_known_forms: WeakKeyDictionary[nn.Module, Forms] = WeakKeyDictionary()


def known_forms(layer: nn.Module) -> Forms:
    """{mode of the model: {dimensions of the leading shape of a layer's input: the order of its rows}}, as far as calls showed it; lives with the layer."""
    return _known_forms.setdefault(layer, {False: {}, True: {}})


def _to_learn(own: Mapping[int, Any]) -> bool:
    """Whether a layer with these forms is to be followed."""
    missed = own.get(MISSED, 0)
    if len(own) == (MISSED in own):
        return missed < MISSES
    return missed < 0 or _NONE in own.values()


def left_is_over(left: bool, name: str) -> bool:
    """What a layer does at its first call after a `client_segments` block: refuse where a backward pass computes it again, for it would not know the batch."""
    if left and not torch.compiler.is_compiling() and in_backward():
        raise RuntimeError(
            f"client_segments: layer {name!r} is computed again by a backward pass after its block; call backward() inside `with client_segments(...)`"
        )
    return False


def generated_per_sequence() -> int:
    """Inside transformers' `generate`: how often it repeats each sequence, for beams or several answers; else 1."""
    frame = None if torch.compiler.is_compiling() else sys._getframe(1)
    while frame is not None:
        config = frame.f_locals.get("generation_config") if frame.f_code.co_name == "generate" else None
        if config is not None and hasattr(config, "num_beams"):
            return max(config.num_beams or 1, config.num_return_sequences or 1)
        frame = frame.f_back
    return 1


def _sequence_index(ids: Tensor) -> Tensor:
    """Number of earlier sequences of the batch that hold the same client: [batch], or [batch, seq] for ids per token."""
    if ids.dim() == 1:
        same = ids[None, :] == ids[:, None]
        return same.tril(-1).sum(1)
    out = torch.zeros_like(ids)
    for client in ids.unique().tolist():
        holds = (ids == client).any(1)
        earlier = holds.cumsum(0) - holds.to(torch.int64)
        out = torch.where(ids == client, earlier[:, None], out)
    return out


class KnownClients(NamedTuple):
    """The clients of sequences, int64 [batch], on the model's device: looked at before, so that a recorded step need not read them back."""

    values: Tensor


def client_table(ids: Sequence[int] | Tensor | KnownClients | None, clients: int) -> Tensor:
    """`ids` as int64, [batch] or [batch, seq], each -1 or a client."""
    if type(ids) is KnownClients:
        return ids.values
    if ids is None:
        raise TypeError("ids: expected the client of each sequence, [batch], or token, [batch, seq], got None")
    table = torch.as_tensor(ids)
    if table.numel() and (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool):
        raise TypeError(f"ids: expected integers, got {table.dtype}")
    if table.dim() not in (1, 2):
        raise ValueError(f"ids: expected shape [batch] or [batch, seq], got {tuple(table.shape)}")
    if table.numel() and (int(table.min()) < -1 or int(table.max()) >= clients):
        raise ValueError(f"ids: expected -1 (base only) or a client below {clients}, got values {int(table.min())} .. {int(table.max())}")
    return table.to(torch.int64)


def client_rows(part: str, ids: Any, clients: int) -> Tensor:
    """The clients of the rows of a part of the model as int64, of any shape."""
    table = torch.as_tensor(ids)
    if table.is_floating_point() or table.is_complex() or table.dtype == torch.bool or table.dim() == 0:
        raise TypeError(f"rows: expected integers, the clients of the rows of {part!r}, got {table.dtype} of shape {tuple(table.shape)}")
    if table.numel() and (int(table.min()) < -1 or int(table.max()) >= clients):
        raise ValueError(f"rows: expected -1 (base only) or a client below {clients} for {part!r}, got values {int(table.min())} .. {int(table.max())}")
    return table.to(torch.int64)


def check_step(step: int | Tensor, clients: int) -> None:
    table = torch.as_tensor(step)
    if table.is_floating_point() or table.is_complex() or tuple(table.shape) not in ((), (clients,)):
        raise ValueError(f"step: expected an integer or ({clients},) integers, one per client, got {table.dtype} {tuple(table.shape)}")
