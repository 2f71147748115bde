"""Local training of a round: what every kind of training is given and returns, and the kind 'adapters'."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora import server
from hetlora.client import LocalResult, prune_decision, tail_scores
from hetlora.cohort import groups_of, moved, train_cohort, train_groups, train_one_by_one
from hetlora.config import Config
from hetlora.data import ClientData
from hetlora.ranks import ClientRanks, bank_ranks, tail_start


@dataclass(frozen=True)
class Work:
    """A round's work for the sampled clients, whose data are `clients`. A kind of training changes nothing of it, the model included."""

    cfg: Config
    model: torch.nn.Module
    state: server.ServerState
    clients: list[ClientData]
    number: int
    lr: float
    progress: Callable[[int, int], None] | None = None

    @property
    def names(self) -> list[str]:
        return [client.name for client in self.clients]

    @property
    def ranks(self) -> list[ClientRanks]:
        return [self.state.ranks[name] for name in self.names]


@dataclass
class Trained:
    """What a round's local training gave, before the merge. Lists are over the sampled clients unless they say 'arrived'.

    results: of each client.   dropped: {position: why its upload is refused}; all others arrived.
    ranks: after the round.   tails: (score before, score after) of the pruning decision.
    uploads, received: what arrived and what the same clients had received, in the form that the merge takes.
    bytes_down; bytes_up (arrived); parameters: numbers trained, of all clients together.
    beside: a bank of one client, the rows that every client computed with besides its upload's, or in whose place the upload's are (`rows`); None: none.
    weighed: (p [K, modules or 1], S [K]), arrived, float64, where training had to weigh the uploads already; else the server does.
    rows: {module: of each upload that arrived, which rows of the bank its rows are}; None: the leading ones.
    given_up: why nothing of the round is merged and the run goes on all the same, where secure aggregation could not open the sum; then nobody arrived.
    rounding: how much of a module's merged rows may be rounding, at most 1, with secure aggregation (`secure_sum.mean`).
    """

    results: list[LocalResult]
    dropped: dict[int, str]
    ranks: list[ClientRanks]
    tails: list[tuple[float, float]]
    uploads: Any
    received: Any
    bytes_down: list[int]
    bytes_up: list[int]
    parameters: int
    beside: hk.AdapterBank | None = None
    weighed: tuple[Tensor, Tensor] | None = None
    rows: Mapping[str, Sequence[Sequence[int]]] | None = None
    given_up: str = ""
    rounding: float | None = None

    @property
    def arrived(self) -> list[int]:
        return [k for k in range(len(self.results)) if k not in self.dropped]

    def adapter(self, i: int) -> dict[str, Tensor]:
        """What the i-th client that arrived computed with, in PEFT's format, for the run folder. The other clients' rows are not touched."""
        own = self.uploads.select([i])
        if self.beside is None:
            whole = own
        elif self.rows is None:
            whole = hk.AdapterBank.stack([self.beside, own])
        else:
            whole = self.beside.select([0])
            for name, rows in self.rows.items():
                whole.a[name].detach()[rows[i]] = own.a[name].detach()
                whole.bt[name].detach()[rows[i]] = own.bt[name].detach()
        found: dict[str, Tensor] = whole.adapter(0)
        return found


@contextmanager
def leading_rows(state: server.ServerState, cfg: Config, model: torch.nn.Module, clients: Sequence[str]) -> Iterator[tuple[hk.AdapterBank, list[ClientRanks]]]:
    """Each client has the leading rows of the server's bank that its rank gives it, on the base."""
    yield state.bank, [state.ranks[name] for name in clients]


def _at_own_scale(bank: hk.AdapterBank, cfg: Config, r_max: int, back: bool = False) -> hk.AdapterBank:
    """B_k <- B_k s_R / s_k, so that s_k B_k A_k is what s_R B_k A_k was; `back`: the other way. The bank itself where all scales are one (`scale_rule`).

    s_R is the scale of the server's bank of `r_max` rows, in which rows travel and are merged: a rank row has the same product for every client.
    """
    if cfg.scale_rule == "constant":
        return bank
    own = bank.select(range(bank.num_clients))
    with torch.no_grad():
        for name, layout in own.layouts.items():
            for k, rank in enumerate(layout.ranks):
                factor = cfg.scale_at(r_max) / cfg.scale_at(rank)
                own.bt[name][layout.rows(k)] *= 1 / factor if back else factor
    return own


def train_adapters(work: Work) -> Trained:
    """Each client trains the factors that are the round's, of its own leading rows of the bank, and decides on pruning (HETLORA sections 3.1 and 3.2).

    Uploads are adapters, cut to the client's rank after the round; of them the trained factors travel. Down travel the client's rows where the server keeps
    a bank, of the factors that changed since it was here last, and what else it needs to follow the base.
    """
    cfg, state, modules, kind = work.cfg, work.state, work.state.bank.shapes, work.cfg.training_kind
    keep = [tail_start(ranks, cfg.gamma, state.r_min) for ranks in work.ranks]
    cuts = bank_ranks(keep, modules) if kind.prunes else {}
    received, factors = server.distribute(state, work.names), kind.trains(work.number)
    if "a" not in factors:
        received.freeze_a()
    if "b" not in factors:
        received.freeze_b()
    everyone = range(received.num_clients)
    in_turn = cfg.cobatch and len(groups_of(len(everyone), cfg)) > 1
    if in_turn:  # the round's rows wait in host memory
        received = moved(received, torch.device("cpu"))
    start = _at_own_scale(received, cfg, state.r_max)
    if in_turn:
        trained, results = train_groups(work.model, start, work.clients, cfg, work.number, work.lr, cuts, work.progress)
    elif cfg.cobatch:
        trained = start.select(everyone)
        results = train_cohort(work.model, trained, work.clients, cfg, work.number, work.lr, cuts, work.progress)
    else:
        trained, results = train_one_by_one(work.model, start, work.clients, cfg, work.number, work.lr, cuts, work.progress)
    ranks, tails = work.ranks, [(0.0, 0.0)] * len(results)
    scores = (tail_scores(start, cuts), tail_scores(trained, cuts)) if kind.prunes else None
    trained = _at_own_scale(trained, cfg, state.r_max, back=True)
    if "b" not in factors:  # as it was received: there and back rounds it twice
        trained = hk.AdapterBank.of(trained.shapes, {name: layout.ranks for name, layout in trained.layouts.items()}, trained.a, received.bt)
    dropped = server.refused(trained)
    if scores:
        before, after = scores
        ranks = [own if k in dropped else prune_decision(own, keep[k], before[k], after[k], cfg.prune_scope) for k, own in enumerate(work.ranks)]
        tails = [(float(old.sum()), float(new.sum())) for old, new in zip(before, after, strict=True)]
    arrived = [k for k in everyone if k not in dropped]
    left = bank_ranks([ranks[k] for k in arrived], modules)
    # Where clients trained in turn, no more than what they send and what they had of it is ever on the device.
    uploads, had = (moved(bank.select(arrived).prune(left), state.bank.device) for bank in (trained, received))
    down = [state.missed_bytes(name) for name in work.names]
    if cfg.merge_kind.keeps_bank:
        lacks = [kind.changed(state.seen.get(name, 0), work.number) for name in work.names]
        if cfg.init_adapter:  # its A is no draw that everybody makes
            lacks = [lack if name in state.seen else "ab" for name, lack in zip(work.names, lacks, strict=True)]
        down = [missed + received.num_bytes(k, lacks[k]) for k, missed in enumerate(down)]
    return Trained(
        results,
        dropped,
        ranks,
        tails,
        uploads,
        had,
        down,
        [uploads.num_bytes(i, factors) for i in range(len(arrived))],
        sum(received.num_bytes(k, factors) for k in everyone) // received.dtype.itemsize,
    )
