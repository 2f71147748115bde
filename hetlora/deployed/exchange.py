"""What travels between server and client in a round, one row per kind of training: both ends of either way stand together.

`down` and `collect` run on the server, `receive` and `up` on the client. A client trains with the very function that simulates it, on a server's state
that holds what it received.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

import hetlora_kernels as hk
from hetlora import fold, server
from hetlora.client import LocalResult
from hetlora.config import Config, ConfigError
from hetlora.deployed.wire import Arrays, ReceivedArrays, from_array, only_keys, pack_rows, row_spans, size, span_key, to_array, unpack_rows
from hetlora.ranks import ClientRanks, bank_ranks, tail_start
from hetlora.server import ServerState
from hetlora.training import Trained

Shapes = dict[str, tuple[int, int]]


@dataclass(frozen=True)
class Order:
    """What a message tells a client besides the arrays.

    name: the client.   number: the round.   ranks: of its modules, in the model's order.   fleet: the rank of every client of the run, by name order.
    place: its own place there.
    """

    name: str
    number: int
    lr: float
    ranks: list[int]
    r_min: int
    r_max: int
    fleet: list[int]
    place: int


@dataclass(frozen=True)
class Reply:
    """What a client reports besides the arrays.   ranks: of its modules after the round.   tails: the scores of its decision to prune."""

    ranks: list[int]
    result: LocalResult
    tails: tuple[float, float]


class Exchange(Protocol):
    def down(self, cfg: Config, state: ServerState, names: Sequence[str]) -> list[Arrays]:
        """The arrays of each client. Equal ones are the same object, sent and stored once."""
        ...

    def receive(self, cfg: Config, arrays: ReceivedArrays, order: Order, shapes: Shapes) -> tuple[Config, ServerState]:
        """What the client's own run of the round works on."""
        ...

    def up(self, trained: Trained) -> Arrays: ...

    def collect(self, cfg: Config, state: ServerState, name: str, number: int, reply: Reply, arrays: ReceivedArrays) -> hk.AdapterBank:
        """The upload as a bank of one client; `ConfigError` where it is not what the client was granted."""
        ...

    def trained(
        self, cfg: Config, state: ServerState, names: Sequence[str], number: int, replies: Sequence[Reply | None], uploads: list[hk.AdapterBank]
    ) -> dict[str, Any]:
        """The fields of `Trained` that depend on the kind: uploads, received, beside, parameters. Empties `uploads`, which are as much memory again."""
        ...


def _dtype(cfg: Config) -> torch.dtype:
    dtype: torch.dtype = getattr(torch, cfg.adapter_dtype)
    return dtype


def _own_ranks(order: Order, shapes: Shapes) -> ClientRanks:
    if len(order.ranks) != len(shapes):
        raise ConfigError(f"the server speaks of {len(order.ranks)} modules, this client's model has {len(shapes)}; check target_modules and the model")
    return dict(zip(shapes, order.ranks, strict=True))


class LeadingRows:
    """Kind 'adapters': down the client's leading rows of the bank, in spans that other clients share; up its rows after the round."""

    def down(self, cfg: Config, state: ServerState, names: Sequence[str]) -> list[Arrays]:
        most = {name: max(state.ranks[name].values()) for name in names}
        spans = row_spans(list(most.values()))
        uniform = all(len(set(state.ranks[name].values())) == 1 for name in names)
        shared = {span: pack_rows(state.bank, span) for span in spans} if uniform else {}
        records = []
        for name in names:
            own = state.bank if uniform else server.distribute(state, [name])
            mine = [span for span in spans if span[1] <= most[name]] if uniform else row_spans([most[name]])
            records.append({span_key(span): shared[span] if uniform else pack_rows(own, span) for span in mine})
        return records

    def receive(self, cfg: Config, arrays: ReceivedArrays, order: Order, shapes: Shapes) -> tuple[Config, ServerState]:
        ranks = _own_ranks(order, shapes)
        spans = _spans(arrays, max(ranks.values()))
        a, bt = unpack_rows({span: arrays[span_key(span)] for span in spans}, shapes, ranks, _dtype(cfg), "download")
        bank = hk.AdapterBank.of(shapes, {name: [rank] for name, rank in ranks.items()}, a, bt)
        return cfg, ServerState(bank, {order.name: ranks}, order.r_min, order.r_max, round=order.number - 1)

    def up(self, trained: Trained) -> Arrays:
        most = max(layout.max_rank for layout in trained.uploads.layouts.values())
        return {"rows": pack_rows(trained.uploads, (0, most))}

    def collect(self, cfg: Config, state: ServerState, name: str, number: int, reply: Reply, arrays: ReceivedArrays) -> hk.AdapterBank:
        shapes = state.bank.shapes
        after = ranks_after(cfg, state, name, reply)
        only_keys(arrays, ["rows"], "upload")
        a, bt = unpack_rows({(0, max(after.values())): arrays["rows"]}, shapes, after, state.bank.dtype, "upload")
        return hk.AdapterBank.of(shapes, {module: [rank] for module, rank in after.items()}, a, bt)

    def trained(
        self, cfg: Config, state: ServerState, names: Sequence[str], number: int, replies: Sequence[Reply | None], uploads: list[hk.AdapterBank]
    ) -> dict[str, Any]:
        shapes = state.bank.shapes
        left = [dict(zip(shapes, reply.ranks, strict=True)) for reply in replies if reply]
        return {
            "uploads": _joined(uploads),
            "received": state.bank.truncate(bank_ranks(left, shapes)),
            "parameters": sum(state.ranks[name][module] * (m + n) for name in names for module, (m, n) in shapes.items()),
        }


def ranks_after(cfg: Config, state: ServerState, name: str, reply: Reply) -> ClientRanks:
    """The ranks that a client ended its round with; `ConfigError` where it could not."""
    before, after = state.ranks[name], dict(zip(state.bank.shapes, reply.ranks, strict=True))
    kept = tail_start(before, cfg.gamma, state.r_min)
    for module, rank in after.items():
        if rank not in (before[module], kept[module]):
            raise ConfigError(f"rank {rank} in {module}, expected {before[module]}, or {kept[module]} after pruning")
    if cfg.prune_scope == "client" and after not in (before, kept):
        raise ConfigError("some modules pruned and some not, where prune_scope = 'client' decides for all")
    return after


def _spans(arrays: ReceivedArrays, rank: int) -> list[tuple[int, int]]:
    """The spans that a download's keys name; they cover the rows up to `rank` without a gap."""
    try:
        spans = sorted((int(start), int(stop)) for start, stop in (str(key).removeprefix("rows ").split(":") for key in arrays))
    except ValueError:
        spans = []
    ends = [0, *(stop for _, stop in spans)]
    if [start for start, _ in spans] != ends[:-1] or ends[-1] != rank or set(map(span_key, spans)) != set(arrays):
        raise ConfigError(f"download: expected the rows 0 to {rank}, got the arrays {sorted(str(key)[:40] for key in arrays)[:5]}")
    return spans


class FoldedRows:
    """Kind 'fold': down the whole bank, quantised, the same for all; up B over rows of A that the server draws again."""

    def down(self, cfg: Config, state: ServerState, names: Sequence[str]) -> list[Arrays]:
        record = {f"{i:05d}": to_array(tensor) for i, tensor in enumerate(fold.encode(state.bank, cfg.download))}
        return [record] * len(names)

    def receive(self, cfg: Config, arrays: ReceivedArrays, order: Order, shapes: Shapes) -> tuple[Config, ServerState]:
        expected = fold.sent_shapes(shapes, order.r_max, cfg.download, _dtype(cfg))
        keys = [f"{i:05d}" for i in range(len(expected))]
        only_keys(arrays, keys, "download")
        sent = [from_array(arrays[key], shape, dtype, f"download, array {key}") for key, (shape, dtype) in zip(keys, expected, strict=True)]
        bank = fold.decode(sent, shapes, order.r_max, cfg.download, _dtype(cfg))
        ranks = {(order.name if i == order.place else f"\0{i}"): dict.fromkeys(shapes, rank) for i, rank in enumerate(order.fleet)}
        return cfg.model_copy(update={"download": "exact"}), ServerState(bank, ranks, order.r_min, order.r_max, round=order.number - 1)

    def up(self, trained: Trained) -> Arrays:
        most = max(layout.max_rank for layout in trained.uploads.layouts.values())
        return {"b": pack_rows(trained.uploads, (0, most), "b")}

    def collect(self, cfg: Config, state: ServerState, name: str, number: int, reply: Reply, arrays: ReceivedArrays) -> hk.AdapterBank:
        shapes = state.bank.shapes
        if reply.ranks != list(state.ranks[name].values()):
            raise ConfigError(f"ranks {reply.ranks[:5]}, expected those it was granted, {list(state.ranks[name].values())[:5]}")
        fresh = fold.drawn(cfg, state, [name], number)
        ranks = {module: layout.ranks[0] for module, layout in fresh.layouts.items()}
        only_keys(arrays, ["b"], "upload")
        _, bt = unpack_rows({(0, max(ranks.values())): arrays["b"]}, shapes, ranks, state.bank.dtype, "upload", "b")
        return hk.AdapterBank.of(shapes, {module: [rank] for module, rank in ranks.items()}, fresh.a, bt)

    def trained(
        self, cfg: Config, state: ServerState, names: Sequence[str], number: int, replies: Sequence[Reply | None], uploads: list[hk.AdapterBank]
    ) -> dict[str, Any]:
        arrived = [k for k, reply in enumerate(replies) if reply]
        together = _joined(uploads)
        fresh = fold.drawn(cfg, state, names, number)
        down = fold.download(state.bank, cfg.download).bank
        widths = [(layout, m) for layout, (m, _) in zip(fresh.layouts.values(), fresh.shapes.values(), strict=True)]
        return {
            "uploads": together,
            "received": fresh.select(arrived),
            "beside": down.truncate([state.r_max]) if cfg.save_clients else None,
            "parameters": sum(rank * m for layout, m in widths for rank in layout.ranks),
        }


def _joined(uploads: list[hk.AdapterBank]) -> hk.AdapterBank:
    together = hk.AdapterBank.concat(uploads)
    uploads.clear()
    return together


EXCHANGES: dict[str, Exchange] = {"adapters": LeadingRows(), "fold": FoldedRows()}


def exchange(cfg: Config) -> Exchange:
    """The exchange of a run; `ConfigError` for runs that only the simulation knows."""
    if cfg.train not in EXCHANGES:
        raise ConfigError(f"train = {cfg.train!r}: runs in simulation only (hetlora run); deployed clients train {' or '.join(map(repr, EXCHANGES))}")
    if cfg.merge_kind.base != "none":
        raise ConfigError(
            f"merge = {cfg.merge_kind.name!r}: changes the base, which every deployed client holds itself; use merge = 'factors' or 'svd', or hetlora run"
        )
    if cfg.dp_noise_multiplier and not cfg.dp_secret:
        raise ConfigError("dp_secret = '': clients have the run's seed and could take the noise away again; give a file of random bytes on the server")
    for name in ("rouge_examples", "held_out_clients", "sample_prompts"):
        if getattr(cfg, name):
            raise ConfigError(f"{name} = {getattr(cfg, name)}: evaluated in simulation only (hetlora run), the server has no text; leave it out")
    return EXCHANGES[cfg.train]


__all__ = ["EXCHANGES", "Exchange", "Order", "Reply", "exchange", "size"]
