"""A round's training in several processes: each trains a share of the clients, and process 0 puts the shares together in the clients' order."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

import hetlora_kernels as hk
from hetlora.client import step_batches
from hetlora.config import Config, ConfigError
from hetlora.fleet import LocalFleet, Progress
from hetlora.group import Group
from hetlora.processes import deal
from hetlora.ranks import mean_rank
from hetlora.server import ServerState
from hetlora.training import Trained

_BANKS = ("uploads", "received", "beside")


@dataclass(frozen=True)
class Shares:
    """A round's clients, dealt out.   of: for each process, positions in `names`."""

    names: list[str]
    of: list[list[int]]
    number: int
    lr: float


def shared_out(local: LocalFleet, cfg: Config, state: ServerState, names: Sequence[str], number: int, lr: float, processes: int) -> Shares:
    """The round's clients for `processes`, whose shares cost about the same.

    A client's cost is its tokens in this round, times what one costs: 4 operations a weight of the frozen base (forward, and the gradient of its input), 6 a
    number of the adapter.
    """
    base = sum(p.numel() for p in local.model.parameters())
    widths = sum(m + n for m, n in local.shapes.values())
    costs = []
    for name in names:
        data = local.clients[name]
        tokens = sum(len(data.train[i]) for batch in step_batches(data, cfg, number) for i in batch)
        costs.append(tokens * (4 * base + 6 * widths * mean_rank(state.ranks[name])))
    return Shares(list(names), deal(costs, processes), number, lr)


def train_share(local: LocalFleet, group: Group, cfg: Config, state: ServerState, shares: Shares, progress: Progress) -> Trained | None:
    """Train this process's share and bring all to process 0, which gets the whole; the others get None.

    `ConfigError` in all processes for what one of them cannot train. A process without a client waits.
    """
    mine = [shares.names[k] for k in shares.of[group.at.number]]
    own, fault = None, ""
    try:
        own = local.train(cfg, state, mine, shares.number, shares.lr, progress) if mine else None
    except ConfigError as error:
        fault = str(error) or type(error).__name__
    said = group.agreed((own and _without_banks(own), _ranks(own)), fault)
    if group.at.number:
        for bank in _banks(own).values():
            group.send(list(bank.parameters()))
        return None
    parts = [(shares.of[0], own)] if own else []
    for process, (part, ranks) in enumerate(said[1:], 1):
        if part is not None:
            for name, of in ranks.items():
                bank = empty_bank(local.shapes, of, state.bank.dtype, local.device)
                group.receive(list(bank.parameters()), process)
                setattr(part, name, bank)
            parts.append((shares.of[process], part))
    return joined(parts)


def empty_bank(shapes: Mapping[str, tuple[int, int]], ranks: Mapping[str, Sequence[int]], dtype: torch.dtype, device: torch.device) -> hk.AdapterBank:
    """A bank to receive into.   ranks: {module: one per client}."""
    a, bt = ({name: torch.empty(sum(ranks[name]), shape[side], dtype=dtype, device=device) for name, shape in shapes.items()} for side in (1, 0))
    return hk.AdapterBank.of(shapes, ranks, a, bt)


def _without_banks(trained: Trained) -> Trained:
    copy = dataclasses.replace(trained)
    copy.uploads = copy.received = copy.beside = None
    return copy


def _banks(trained: Trained | None) -> dict[str, hk.AdapterBank]:
    found = {} if trained is None else {name: getattr(trained, name) for name in _BANKS}
    return {name: bank for name, bank in found.items() if bank is not None}


def _ranks(trained: Trained | None) -> dict[str, dict[str, tuple[int, ...]]]:
    return {name: {module: layout.ranks for module, layout in bank.layouts.items()} for name, bank in _banks(trained).items()}


def joined(parts: Sequence[tuple[Sequence[int], Trained]]) -> Trained:
    """The training of a round from that of its shares, in the order of the round's clients.   parts: (positions of the share's clients, its training).

    Uploads that training itself has weighed are means already and cannot be put in an order; `spread.lead` refuses the kind that does.
    """
    of_position = {position: (part, k) for part, (positions, _) in enumerate(parts) for k, position in enumerate(positions)}
    places = [of_position[position] for position in sorted(of_position)]
    trained = [own for _, own in parts]
    received = [(part, k) for part, own in enumerate(trained) for k in own.arrived]  # in the order of the shares
    index = {place: i for i, place in enumerate(received)}
    arrived = [place for place in places if place in index]

    def each(name: str) -> list[Any]:
        return [getattr(trained[part], name)[k] for part, k in places]

    def bank(name: str) -> Any:
        found = [getattr(own, name) for own in trained if own.arrived and getattr(own, name) is not None]
        return hk.AdapterBank.concat(found).select([index[place] for place in arrived]) if found else getattr(trained[0], name)

    def by_upload(lists: Sequence[Sequence[Any]]) -> list[Any]:
        flat = [value for values in lists for value in values]
        return [flat[index[place]] for place in arrived]

    assert all(own.weighed is None for own in trained)
    chosen = [own.rows for own in trained if own.rows is not None]
    return Trained(
        each("results"),
        {position: trained[part].dropped[k] for position, (part, k) in enumerate(places) if k in trained[part].dropped},
        ranks=each("ranks"),
        tails=each("tails"),
        uploads=bank("uploads"),
        received=bank("received"),
        bytes_down=each("bytes_down"),
        bytes_up=by_upload([own.bytes_up for own in trained]),
        parameters=sum(own.parameters for own in trained),
        beside=next((own.beside for own in trained if own.beside is not None), None),
        rows={module: by_upload([own[module] for own in chosen]) for module in chosen[0]} if chosen else None,
    )
