"""Carry a bank of K clients' adapters on a transformers model: attach, name the clients of a batch, take a loss per client."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hetlora_kernels.bank import AdapterBank
from hetlora_kernels.layout import Segments
from hetlora_kernels.ops.lora import lora_add, lora_linear

_ATTACHMENT = "_hetlora_attachment"
_MASK64 = (1 << 64) - 1
SEQUENCE_STRIDE = 1 << 20  # row key = sequence index in the client's step batch * 2^20 + position


class _Attachment:
    """State shared by all attached layers of one model: the bank and the batch's clients."""

    def __init__(self, bank: AdapterBank, scale: float | Sequence[float] | Tensor, dropout: float) -> None:
        shape, clients = tuple(torch.as_tensor(scale).shape), bank.num_clients
        if shape not in ((), (clients,)):
            raise ValueError(f"scale: expected a number or {clients} numbers, one per client, got shape {shape}")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout: expected a probability in [0, 1), got {dropout}")
        self.bank, self.scale, self.dropout = bank, scale, dropout
        self.base_requires_grad: dict[str, bool] = {}
        self.ids: Tensor | None = None  # [batch] or [batch, seq]
        self.sequence_index: Tensor | None = None
        self.seeds: Tensor | None = None
        self.step: int | Tensor = 0
        self._segments: dict[tuple[int, ...], Segments] = {}

    def set_batch(self, ids: Tensor | None, sequence_index: Tensor | None, seeds: Tensor | None, step: int | Tensor) -> None:
        self.ids, self.sequence_index, self.seeds, self.step = ids, sequence_index, seeds, step
        self._segments = {}

    def segments(self, leading: tuple[int, ...]) -> Segments:
        """Segments of an input with this leading shape; built once per shape and batch."""
        if leading not in self._segments:
            self._segments[leading] = self._build(leading)
        return self._segments[leading]

    def _build(self, leading: tuple[int, ...]) -> Segments:
        clients = self.bank.num_clients
        if self.ids is None:
            if clients != 1:
                raise RuntimeError(f"the attached bank has {clients} clients: run the model, and its backward pass, inside `with client_segments(model, ids)`")
            rows = 1
            for size in leading:
                rows *= size
            return Segments.from_lengths([rows])
        ids = self.ids
        batch = ids.shape[0]
        rows = 1
        for size in leading:
            rows *= size
        length = rows // batch if batch else 0
        if rows != length * batch or (ids.dim() == 2 and rows != ids.numel()) or (len(leading) > 1 and leading[0] != batch):
            raise ValueError(f"ids: expected one client per sequence, or per token, of an input with leading shape {leading}, got shape {tuple(ids.shape)}")
        per_token = ids[:, None].expand(batch, length) if ids.dim() == 1 else ids
        sequence = _sequence_index(ids) if self.sequence_index is None else self.sequence_index
        sequence = sequence[:, None] if sequence.dim() == 1 else sequence
        keys = sequence * SEQUENCE_STRIDE + torch.arange(length, dtype=torch.int64, device=ids.device)
        return Segments.from_ids(per_token.reshape(-1), keys.expand(batch, length).reshape(-1), num_clients=clients)


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


def layer_seeds(seeds: Tensor, step: int | Tensor, module: int) -> Tensor:
    """int64 [K]: each client's dropout seed for one step and one module, mixed from (client seed, step, module index) by SplitMix64's finaliser."""
    state = seeds + torch.as_tensor(step, dtype=torch.int64, device=seeds.device) * _signed(0x9E3779B97F4A7C15)
    state = _mix64(state)
    return _mix64(state + _signed((module + 1) * 0x632BE59BD9B4E019))


def _signed(value: int) -> int:
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _mix64(z: Tensor) -> Tensor:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014) on int64 with wrap-around; `>>` made logical by masks."""
    z = (z ^ ((z >> 30) & ((1 << 34) - 1))) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ ((z >> 27) & ((1 << 37) - 1))) * _signed(0x94D049BB133111EB)
    return z ^ ((z >> 31) & ((1 << 33) - 1))


class _AttachedLayer(nn.Module):
    """Mixed in front of a layer's class: its forward adds the clients' LoRA terms. Parameters and state_dict keys stay the layer's own."""

    _plain_linear: bool

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        shared, name, position = self.__dict__[_ATTACHMENT]
        bank = shared.bank
        layout, segments = bank.layouts[name], shared.segments(tuple(x.shape[:-1]))
        training = self.training or shared.seeds is not None
        seeds = None if shared.seeds is None or not shared.dropout else layer_seeds(shared.seeds, shared.step, position)
        options = {"scale": shared.scale, "dropout": shared.dropout, "seeds": seeds, "training": training}
        if type(self)._plain_linear:
            return lora_linear(x, cast(Tensor, self.weight), cast("Tensor | None", self.bias), bank.a[name], bank.bt[name], layout, segments, **options)
        return lora_add(super().forward(x, *args, **kwargs), x, bank.a[name], bank.bt[name], layout, segments, **options)

    def _get_name(self) -> str:
        return type(self).__mro__[2].__name__


_attached_classes: dict[type, type] = {}


def _attached_class(cls: type) -> type:
    if cls not in _attached_classes:
        _attached_classes[cls] = type(f"Attached{cls.__name__}", (_AttachedLayer, cls), {"_plain_linear": cls is nn.Linear, "__module__": __name__})
    return _attached_classes[cls]


def attach(model: nn.Module, bank: AdapterBank, scale: float | Sequence[float] | Tensor = 1.0, dropout: float = 0.0) -> nn.Module:
    """Let every module that `bank` names carry its clients' adapters: y = base(x) + scale_k * (drop(x) A_k^T) B_k^T.

    model: any torch model whose modules have the bank's dotted names; `nn.Linear` runs fused, any other layer (quantised, Conv1D) through
    `lora_add` on its own output.   scale: number or [K].
    dropout: probability on the LoRA branch's input, applied by layers in training mode, and in any mode where `client_segments` gives seeds.

    In place: the class of each layer is swapped for a subclass, its parameters and state_dict keys stay. Freezes every parameter of the model
    (`detach` gives their requires_grad back); the bank's factors are trained. A bank of one client needs no `client_segments`.
    Returns `model`. `ValueError` when a module is missing, has other widths, is on another device, or a bank is attached already.
    """
    if any(_ATTACHMENT in module.__dict__ for module in model.modules()):
        raise ValueError("model: a bank is attached already; call detach(model) first")
    modules = dict(model.named_modules())
    for name, shape in bank.shapes.items():
        if name not in modules:
            raise ValueError(f"bank: module {name!r} is not in the model")
        found = _layer_shape(modules[name])
        if found is not None and found != shape:
            raise ValueError(f"bank: expected (out, in) = {found} for module {name!r} as in the model, got {shape}")
    parameter = next(model.parameters(), None)
    if parameter is not None and parameter.device != bank.device:
        raise ValueError(f"bank: expected device {parameter.device} as the model, got {bank.device}")
    shared = _Attachment(bank, scale, dropout)
    shared.base_requires_grad = {name: p.requires_grad for name, p in model.named_parameters()}
    model.requires_grad_(False)
    for position, name in enumerate(bank.shapes):
        layer = modules[name]
        layer.__dict__[_ATTACHMENT] = (shared, name, position)
        layer.__class__ = _attached_class(type(layer))
    return model


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: the layers' own classes and the parameters' requires_grad come back. `ValueError` when nothing is attached."""
    shared = _attachment(model)
    for module in model.modules():
        if _ATTACHMENT in module.__dict__:
            module.__class__ = type(module).__mro__[2]
            del module.__dict__[_ATTACHMENT]
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(shared.base_requires_grad.get(name, parameter.requires_grad))
    return model


def _layer_shape(layer: Any) -> tuple[int, int] | None:
    if hasattr(layer, "out_features") and hasattr(layer, "in_features"):
        return int(layer.out_features), int(layer.in_features)
    if hasattr(layer, "nf") and getattr(layer, "weight", None) is not None:
        return int(layer.nf), int(layer.weight.shape[0])
    return None


def _attachment(model: nn.Module) -> _Attachment:
    for module in model.modules():
        if _ATTACHMENT in module.__dict__:
            return module.__dict__[_ATTACHMENT][0]
    raise ValueError("model: no bank is attached; call attach(model, bank) first")


def _client_table(ids: Sequence[int] | Tensor, clients: int) -> Tensor:
    """`ids` as int64, [batch] or [batch, seq], each -1 or a client."""
    table = torch.as_tensor(ids)
    if table.numel() and (table.is_floating_point() or table.is_complex() or table.dtype == torch.bool):
        raise TypeError(f"ids: expected integers, got {table.dtype}")
    if table.dim() not in (1, 2):
        raise ValueError(f"ids: expected shape [batch] or [batch, seq], got {tuple(table.shape)}")
    if table.numel() and (int(table.min()) < -1 or int(table.max()) >= clients):
        raise ValueError(f"ids: expected -1 (base only) or a client below {clients}, got values {int(table.min())} .. {int(table.max())}")
    return table.to(torch.int64)


def _check_step(step: int | Tensor, clients: int) -> None:
    table = torch.as_tensor(step)
    if table.is_floating_point() or table.is_complex() or tuple(table.shape) not in ((), (clients,)):
        raise ValueError(f"step: expected an integer or ({clients},) integers, one per client, got {table.dtype} {tuple(table.shape)}")


@contextmanager
def client_segments(
    model: nn.Module,
    ids: Sequence[int] | Tensor,
    seeds: Tensor | None = None,
    step: int | Tensor = 0,
    sequence_index: Tensor | None = None,
) -> Iterator[None]:
    """Name the client of each sequence (or token) of the batch for the attached layers; spans forward and backward.

    ids: [batch] or [batch, seq], -1 = base only, any order.
    seeds: int64 [K], one dropout seed per client; every layer and step mixes its own from them. None: drawn from torch's generator.
    step: the step's number, an integer or int64 [K].
    sequence_index: int64 [batch], each sequence's index in its client's step batch; default its position among the client's sequences here.
    Micro-batches of one step pass it, so that a row's mask does not depend on the split.
    """
    shared = _attachment(model)
    clients = shared.bank.num_clients
    table = _client_table(ids, clients)
    if seeds is not None and (seeds.dtype != torch.int64 or tuple(seeds.shape) != (clients,)):
        raise ValueError(f"seeds: expected an int64 tensor of shape ({clients},), got {seeds.dtype} {tuple(seeds.shape)}")
    _check_step(step, clients)
    if sequence_index is not None and (sequence_index.dtype != torch.int64 or tuple(sequence_index.shape) != (table.shape[0],)):
        got = f"{sequence_index.dtype} {tuple(sequence_index.shape)}"
        raise ValueError(f"sequence_index: expected an int64 tensor of shape ({table.shape[0]},), one per sequence, got {got}")
    before = (shared.ids, shared.sequence_index, shared.seeds, shared.step)
    shared.set_batch(table, sequence_index, None if seeds is None else seeds.to(shared.bank.device), step)
    try:
        yield
    finally:
        shared.set_batch(*before)


def client_losses(
    logits: Tensor,  # [batch, seq, vocab]
    labels: Tensor,  # [batch, seq]
    ids: Sequence[int] | Tensor,  # [batch] or [batch, seq]
    num_clients: int,
    shift: bool = True,
    reduction: str = "mean",
) -> Tensor:
    """[K] loss of each client: the mean (or sum) over its own tokens of -log softmax(logits)[label]; 0 for a client without tokens.

    labels: token ids, -100 = ignored.   ids: client of each sequence or token, -1 = none (its tokens count for nobody).
    shift: True for causal models, the logits at position t predict label t + 1.
    reduction: 'mean' over the client's tokens, or 'sum' (micro-batches divide by the step's own count).

    Differentiable. In float32 (float64 for float64). A non-finite loss of one client does not touch another's.
    """
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    if logits.dim() != 3 or tuple(labels.shape) != tuple(logits.shape[:2]):
        raise ValueError(f"labels: expected shape {tuple(logits.shape[:2])} as logits [batch, seq, vocab], got {tuple(labels.shape)}")
    table = _client_table(ids, num_clients).to(logits.device)
    if table.shape[0] != labels.shape[0] or (table.dim() == 2 and table.shape != labels.shape):
        raise ValueError(f"ids: expected shape ({labels.shape[0]},) or {tuple(labels.shape)}, got {tuple(table.shape)}")
    table = table[:, None].expand(labels.shape) if table.dim() == 1 else table
    if shift:
        logits, labels, table = logits[:, :-1], labels[:, 1:], table[:, 1:]
    dtype = torch.float64 if logits.dtype == torch.float64 else torch.float32
    losses = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).to(dtype), labels.reshape(-1), ignore_index=-100, reduction="none")
    counted = torch.where(labels.reshape(-1) == -100, -1, table.reshape(-1))
    own = counted[None, :] == torch.arange(num_clients, device=logits.device)[:, None]
    sums = torch.where(own, losses[None, :], 0.0).sum(1)
    return sums if reduction == "sum" else sums / own.sum(1).clamp_min(1)
