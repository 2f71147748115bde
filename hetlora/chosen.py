"""Chosen rows in place of leading ones (`train = 'chosen-rows'`): every client computes with the whole bank and trains r_k rows of it.

The server keeps one bank of rank R. A round:
  1. a client downloads all R rows.
  2. of each module it draws r_k of them, which it trains, A and B; the others are frozen (a device folds them into W, which computes the same).
  3. it sends the rows that it trained; the server draws the same choice again from the same seed.
  4. row j of the bank <- sum_k p_k (row j of client k) / P_j over the clients that chose it, A and B apart; a row that nobody chose stays as it is.
Fed-PLoRA (arXiv 2602.16936, ICLR 2026), whose one-rank modules are the rows of a LoRA, and whose weights are equal ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from functools import partial

import torch
from torch import Tensor, nn

import hetlora_kernels as hk
from hetlora.client import LocalResult, train_client
from hetlora.cohort import groups_of, moved, train_cohort, train_groups
from hetlora.config import Config
from hetlora.merge import MergeCall, Merged, row_weights
from hetlora.ranks import ClientRanks
from hetlora.seeds import host_generator
from hetlora.server import ServerState, refused
from hetlora.training import Trained, Work

Choice = dict[str, list[list[int]]]  # {module: of each client, the rows of the bank that it trains, in rising order}


def choice(cfg: Config, names: Sequence[str], ranks: Sequence[ClientRanks], rows: int, number: int) -> Choice:
    """r_k of the bank's `rows` rows for each of the clients `names` in round `number`, uniformly without replacement, each module by itself."""
    return {
        module: [
            sorted(host_generator(cfg.seed, "chosen rows", number, name, module).sample(range(rows), own[module]))
            for name, own in zip(names, ranks, strict=True)
        ]
        for module in ranks[0]
    }


@contextmanager
def received(state: ServerState, cfg: Config, model: nn.Module, clients: Sequence[str]) -> Iterator[tuple[hk.AdapterBank, list[ClientRanks]]]:
    """Every client has all rows of the bank."""
    yield state.bank, [dict.fromkeys(state.bank.shapes, state.r_max)] * len(clients)


def train_chosen(work: Work) -> Trained:
    """Each client trains the rows of its choice beside the frozen others.

    Uploads are those rows alone; `rows` says which rows of the bank they are. What is counted is all rows down, in the adapters' own type, and the chosen
    ones up. The adapters that the folder keeps of clients have all rows, which is what they computed with.
    """
    cfg, state, shapes = work.cfg, work.state, work.state.bank.shapes
    chosen = choice(cfg, work.names, work.ranks, state.r_max, work.number)
    everyone = range(len(work.clients))
    in_turn = cfg.cobatch and len(groups_of(len(everyone), cfg)) > 1
    source = moved(state.bank, torch.device("cpu")) if in_turn else state.bank
    whole = source.truncate([state.r_max] * len(everyone))
    results: list[LocalResult] = []
    if in_turn:

        def own_rows(bank: hk.AdapterBank, group: range) -> AbstractContextManager[None]:
            return only(bank, {name: [rows[k] for k in group] for name, rows in chosen.items()})

        trained, results = train_groups(work.model, whole, work.clients, cfg, work.number, work.lr, {}, work.progress, own_rows)
    elif cfg.cobatch:
        trained = whole.select(everyone)
        with only(trained, chosen):
            results = train_cohort(work.model, trained, work.clients, cfg, work.number, work.lr, {}, work.progress)
    else:
        banks = [whole.select([k]) for k in everyone]
        for k, own in enumerate(banks):
            with only(own, {name: [rows[k]] for name, rows in chosen.items()}):
                results.append(train_client(work.model, own, work.clients[k], cfg, work.number, work.lr, {}))
            if work.progress:
                work.progress(k + 1, len(banks))
        trained = hk.AdapterBank.concat(banks)
    dropped = refused(trained)
    arrived = [k for k in everyone if k not in dropped]
    sent = {name: [rows[k] for k in arrived] for name, rows in chosen.items()}
    uploads, had = (moved(pick(bank.select(arrived), sent), state.bank.device) for bank in (trained, whole))
    numbers = [sum(len(chosen[name][k]) * (m + n) for name, (m, n) in shapes.items()) for k in everyone]
    return Trained(
        results,
        dropped,
        ranks=work.ranks,
        tails=[(0.0, 0.0)] * len(results),
        uploads=uploads,
        received=had,
        bytes_down=[whole.num_bytes(k) for k in everyone],
        bytes_up=[uploads.num_bytes(i) for i in range(len(arrived))],
        parameters=sum(numbers),
        beside=state.bank.truncate([state.r_max]) if cfg.save_clients else None,
        rows=sent,
    )


@contextmanager
def only(bank: hk.AdapterBank, chosen: Choice) -> Iterator[None]:
    """Inside the block the chosen rows of each client alone have gradients: an optimiser without weight decay leaves the others as they are, to the bit."""
    handles = []
    for name, layout in bank.layouts.items():
        mask = torch.zeros(layout.total, 1, dtype=bank.dtype, device=bank.device)
        mask[positions(layout, chosen[name]).to(bank.device)] = 1
        handles += [factor.register_hook(partial(torch.mul, mask)) for factor in (bank.a[name], bank.bt[name])]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def positions(layout: hk.RankLayout, chosen: Sequence[Sequence[int]]) -> Tensor:
    """Where in the packed rows of K clients the chosen rows stand, int64."""
    return torch.tensor([layout.offsets[k] + j for k, rows in enumerate(chosen) for j in rows], dtype=torch.int64)


def pick(bank: hk.AdapterBank, chosen: Choice) -> hk.AdapterBank:
    """The bank of each client's chosen rows alone."""
    index = {name: positions(layout, chosen[name]).to(bank.device) for name, layout in bank.layouts.items()}
    a, bt = ({name: rows.detach()[index[name]] for name, rows in side.items()} for side in (bank.a, bank.bt))
    return hk.AdapterBank.of(bank.shapes, {name: [len(rows) for rows in own] for name, own in chosen.items()}, a, bt)


@torch.no_grad()
def merge_chosen(call: MergeCall) -> Merged:
    """Row j <- sum_k p_k (row j of client k) / P_j over the clients that chose it, P_j the sum of their p_k; a row of P_j = 0 stays as it is.

    So it does under a server optimiser, which steps the rows of P_j > 0 alone.
    """
    uploads, rows = call.uploads, call.rows
    assert rows is not None
    merged = call.bank.to()
    whole = call.bank.truncate([call.r_max] * uploads.num_clients) if call.cfg.diagnostics else None  # what each client ended the round with
    decided = {}
    for module, (name, layout) in enumerate(uploads.layouts.items()):
        p = row_weights(uploads, call.weights, module, name)
        index = [torch.tensor(own, dtype=torch.int64, device=uploads.device) for own in rows[name]]
        chosen_weight = p.new_zeros(call.r_max)  # P_j
        for k, own in enumerate(index):  # client by client: a row comes once in each, so that the order of the sums is fixed
            chosen_weight[own] += p[layout.rows(k)]
        decided[name] = chosen_weight > 0
        for side in ("a", "bt"):
            sent, bank = (getattr(source, side)[name].detach() for source in (uploads, merged))
            total = torch.zeros(bank.shape, dtype=torch.float64, device=bank.device)
            for k, own in enumerate(index):
                total[own] += p[layout.rows(k), None] * sent[layout.rows(k)].double()
                if whole is not None:
                    getattr(whole, side)[name].detach()[k * call.r_max + own] = sent[layout.rows(k)]
            bank[decided[name]] = (total / chosen_weight[:, None])[decided[name]].to(bank.dtype)
    return Merged(merged, ended_with=whole, decided=decided)
