"""Whose rows are whose in one batch: clients of sequences or tokens, the segments of each layer's input, and the dropout seeds of each layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from math import prod
from threading import get_ident
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from hetlora_kernels._torch import in_backward
from hetlora_kernels._uploads import uploaded
from hetlora_kernels.layout import Segments
from hetlora_kernels.ops.lora import KeptSeeds
from hetlora_kernels.peft.follow import Follower
from hetlora_kernels.peft.ids import generated_per_sequence, sequence_index_of
from hetlora_kernels.peft.owners import LOST, Entry, Owners
from hetlora_kernels.peft.seeds import SeedTable

SEQUENCE_STRIDE = 1 << 20  # row key = sequence index in the client's step batch * 2^20 + position


Forms = dict[bool, dict[int, Any]]  # of a layer: {training mode of the model: {dimensions of its leading shape: Form}}
Form = int | str  # the dimension of an input's leading shape that counts the sequences, or "flat": [sequences * length, ..., n]
_FLAT, _ANY, _NONE = "flat", "any", "none"  # none: seen in several orders, so it is followed at every call
MISSED = -1  # key of a layer's forms: how many followed calls of the model went by without it; -1: it is to be followed at the next call
MISSES = 16
_KEPT = 1024  # rows of one batch: a model has some hundreds of layers, and their inputs a few shapes


class Rows(NamedTuple):
    """Whose the rows of one layer's input are."""

    ids: Tensor | None  # int64 [rows], the client of each, -1 = base only
    segments: Segments
    entry: Entry  # the same for a `Follower`


class Batch:
    """The clients of one batch, as `client_segments` names them, and whose the rows of every layer's input are.

    A layer's rows are known in one of four ways:
    1. `given` names them.
    2. They were followed from the model's inputs to the layer (`Follower`).
    3. An earlier call in the same mode (training or not) showed their order. `forms` keeps it.
    4. The first dimension alone has the size of the batch. This counts only where nothing can be followed (a layer called without its model, a compiled model)
       or the input is no sequence's data. Everything else is refused by the name of the layer.
    """

    def __init__(
        self,
        num_clients: int,
        ids: Tensor | None = None,  # int64 [batch] or [batch, seq]; None: one client owns every row
        sequence_index: Tensor | None = None,  # int64 [batch], or [batch, seq] with positions
        seeds: Tensor | None = None,  # int64 [num_clients]
        step: int | Tensor = 0,
        given: Mapping[str, Tensor] | None = None,  # int64 clients of the rows of the layers in a part of the model
        forms: Mapping[str, Forms] | None = None,  # {layer: what is known}; None: the first dimension, as PEFT has it
        positions: Tensor | None = None,  # int64 [batch, seq]: places of tokens in their sequences, of which a row may hold several
    ) -> None:
        # What a graph may not ask of a tensor is asked here: how many rows each client has.
        self.num_clients, self.ids, self.forms = num_clients, ids, forms
        self.segments = Segments.from_lengths([0] * num_clients) if ids is None else Segments.from_ids(ids.reshape(-1), num_clients=num_clients)
        self.sequence_index = sequence_index if ids is None or sequence_index is not None else sequence_index_of(ids)
        self.positions = positions
        self.seeds = None if seeds is None else SeedTable(seeds, step, len(forms or ()))
        self.given = {
            part: (tuple(own.shape), Rows(own.reshape(-1), Segments.from_ids(own.reshape(-1), num_clients=num_clients), LOST))
            for part, own in (given or {}).items()
        }
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
        key = name, tuple(x.shape[:-1])
        if torch.compiler.is_compiling():  # nothing is kept, and nothing noted: what a graph writes it reads again, and is made anew
            return self._find(x, name, key)
        if self.thread is not None and get_ident() != self.thread:
            self.check_thread()
        # A layer may be called twice in a forward, with other rows; of several calls of the model, one computed again must not take another's.
        known = self._rows.get(key) if self.follower is None and len(self.called) < 2 else None
        return known or self._find(x, name, key)

    def passed(self, names: list[str]) -> None:
        """These layers have the rows of one that was asked for."""
        for seen in (self.ran, self.calls):
            seen.update(names)

    def place(self, device: torch.device) -> None:
        """Move what the layers on `device` read there, before the first of them, which may be traced."""
        if self.seeds is not None:
            self.seeds.place(device)
        self.segments.index_on(device)
        if self.sequence_index is not None:
            self.sequence_index = uploaded("sequence_index", self.sequence_index, device)
        if self.positions is not None:
            self.positions = uploaded("positions", self.positions, device)

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

    @property
    def of_one_client(self) -> bool:
        rows, lengths = self.segments.num_rows, self.segments.lengths
        return self.ids is not None and rows > 0 and (not any(lengths) or max(lengths) == rows)

    def set_call(self, size: int, training: bool) -> None:
        """The model is called with so many sequences, in this mode, in which its rows may go another way."""
        if size != self.size:
            self._forms.clear()
        if (size, training) != (self.size, self.training):
            self._rows.clear()
        self.size, self.training = size, training

    @contextmanager
    def as_called(self, size: int, training: bool) -> Iterator[None]:
        """While a checkpoint computes again what it computed in a call of this size and mode."""
        before, repeated = (self.size, self.training), self.repeated
        self.set_call(size, training)
        self.repeated = True
        try:
            yield
        finally:
            self.set_call(*before)
            self.repeated = repeated

    def to_follow(self) -> bool:
        """Whether a layer's order is still to be learnt. Layers that many calls passed by do not count. After a first call, a batch of one
        client without seeds does not count either."""
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
        if not torch.compiler.is_compiling():
            self.ran.add(name)
        if self.ids is None:
            return self._keep(self._rows, key, self._of_one(leading))
        if prod(leading) == 0:
            return Rows(self.ids.new_empty(0), Segments.from_lengths([0] * self.num_clients), LOST)
        part = self._part(name)
        if part is not None:
            return self._keep(self._rows, key, self._as_given(part, leading, name))
        if not torch.compiler.is_compiling() and len(self.called) > 1 and not self.repeated and in_backward():
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
        rows = self._in_form(form, leading, name, x.device)
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
        return self._as_followed(entry, leading, name) if seen is None else self._in_form(seen, leading, name, entry.table.device)

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
        # Not `size not in leading[1:]`: torch.compile takes no symbol of a graph for equal there.
        plain = len(leading) > 1 and leading[0] == size and all(other != size for other in leading[1:]) and "expert" not in name.lower()
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
        rows = prod(leading)
        return Rows(None, Segments(rows, [0], [rows], None, None), LOST)

    def _part(self, name: str) -> str | None:
        """The longest part of the model's name that `given` has for this layer."""
        parts = [part for part in self.given if f".{part}." in f".{name}."]
        return max(parts, key=len) if parts else None

    def _as_given(self, part: str, leading: tuple[int, ...], name: str) -> Rows:
        shape, rows = self.given[part]
        if shape != leading and (len(shape) > 1 or rows.segments.num_rows != prod(leading)):
            raise ValueError(f"rows: expected shape {leading}, the rows of layer {name!r}, got {shape}; name the layers of other rows on their own")
        return rows

    def _in_form(self, form: Form, leading: tuple[int, ...], name: str, device: torch.device) -> Rows:
        known = None if torch.compiler.is_compiling() else self._forms.get((form, leading))
        return known or self._keep(self._forms, (form, leading), self._made_in_form(form, leading, name, device))

    @staticmethod
    def _keep(kept: dict[Any, Rows], key: Any, rows: Rows) -> Rows:
        """Batches that are no block's live as long as their model, and see many shapes: the kept rows are thrown away when they are many."""
        if torch.compiler.is_compiling():
            return rows
        if len(kept) >= _KEPT:
            kept.clear()
        kept[key] = rows
        return rows

    def _made_in_form(self, form: Form, leading: tuple[int, ...], name: str, device: torch.device) -> Rows:
        """From sizes alone, which may be symbols of a graph."""
        assert self.ids is not None
        rows, batch, own = prod(leading), self.ids.shape[0], self.segments
        if form == _ANY:
            if self.positions is not None and rows != own.num_rows:
                raise self._refusal(leading, name)
            whole = batch > 0 and rows % batch == 0
            keys = self._keys(1, rows // batch, device) if whole else torch.arange(rows, device=device)
            lengths = [rows if length else 0 for length in own.lengths]
            return Rows(self.ids.reshape(-1)[:1].expand(rows), Segments(rows, [0] * len(lengths), lengths, None, keys), LOST)
        dim = 0 if form == _FLAT else int(form)
        count = self.size if form == _FLAT else leading[dim]
        owners = self.sequences(count)
        if owners is None or (form == _FLAT and leading[0] % count):
            raise self._refusal(leading, name)
        if form == _FLAT:
            owners = owners.repeat_interleave(leading[0] // count)
        entry = Owners(owners.reshape([len(owners) if d == dim else 1 for d in range(len(leading) + 1)]))
        if count != batch or (self.ids.dim() == 2 and (dim > 0 or rows != own.num_rows)):
            return self._as_followed(entry, leading, name)
        before = prod(leading[:dim])
        after = rows // (batch * before)
        keys = self._keys(before, after, device)
        if self.ids.dim() == 2:
            return Rows(self.ids.reshape(-1), own.expand(1, 1, keys), entry)
        return Rows(self.ids[:, None].expand(before, batch, after).reshape(-1), own.expand(before, after, keys), entry)

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
            assert self.sequence_index is not None
            keys = self.sequence_index.to(self.ids.device)[owners] * SEQUENCE_STRIDE + place
            entry.rows[leading] = ids, Segments.from_ids(ids, keys, num_clients=self.num_clients)
        ids, segments = entry.rows[leading]  # without the entry, which would keep itself alive
        return Rows(ids, segments, entry)

    def _keys(self, before: int, after: int, device: torch.device) -> Tensor:
        """int64 [before * batch * after]: names of the rows in a dropout mask, so that it depends neither on other clients nor on padding or packing."""
        assert self.sequence_index is not None
        sequence = self.sequence_index.to(device)  # [batch] or [batch, seq]
        if self.positions is not None:  # one row of x for each token: all else is refused before
            return (sequence * SEQUENCE_STRIDE + self.positions.to(device)).reshape(-1)
        if sequence.dim() == 1 or before * after * len(sequence) != sequence.numel():  # rows of one client may be others than one for each of its tokens
            sequence = sequence.reshape(len(sequence), -1)[:, :1]
        place = torch.arange(before, device=device)[:, None, None] * after + torch.arange(after, device=device)
        return (sequence * SEQUENCE_STRIDE + place).reshape(-1)


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


def left_is_over(name: str) -> bool:
    """What a layer does at its first call after a `client_segments` block: refuse where a backward pass computes it again, for it would not know the batch."""
    if not torch.compiler.is_compiling() and in_backward():
        raise RuntimeError(
            f"client_segments: layer {name!r} is computed again by a backward pass after its block; call backward() inside `with client_segments(...)`"
        )
    return False
