"""Fresh rows on the folded bank (`train = 'fold'`): everybody computes with the server's whole bank, and trains rows that nobody else has.

The server keeps one bank of rank R. A round, s the scale of the run, m and n the widths of a module:
  1. a client downloads all R rows, quantised row by row, and folds them into W for the time of its training: W + s B_g A_g. They are frozen.
  2. it draws rho_k = floor(r_k (m + n) / m) fresh rows A_k, starts from B_k = 0 and trains B_k alone, as many numbers as a LoRA of rank r_k has.
  3. it sends B_k; the server draws A_k again from the same seed.
  4. bank <- the best approximation of rank R of B_g A_g + sum_k p_k B_k A_k.
Under differential privacy all clients of a round draw the leading rows of one A, so that the sum is one of B alone and takes noise once (`common_rows`).
The base never changes, and the bank is what is exported.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

import hetlora_kernels as hk
from hetlora.cohort import groups_of, moved, train_cohort, train_groups, train_one_by_one
from hetlora.config import Config
from hetlora.merge import MergeCall, Merged, row_weights
from hetlora.privacy import Common
from hetlora.ranks import ClientRanks, bank_ranks
from hetlora.seeds import torch_generator
from hetlora.server import ServerState, refused
from hetlora.server_optimizer import nearest
from hetlora.training import Trained, Work
from hetlora_kernels.linear import linear_weight
from hetlora_kernels.ops.quantize import CODES, code_bytes

Shapes = Mapping[str, tuple[int, int]]
BITS = {"8bit": 8, "4bit": 4}


# ---------------------------------------------------------------- the download


@dataclass(frozen=True)
class Download:
    """What a client receives: the bank as it computes with it, and the bytes that travelled."""

    bank: hk.AdapterBank
    num_bytes: int


def download(bank: hk.AdapterBank, kind: str) -> Download:
    """All rows of the server's bank, in '8bit' or '4bit' with one float32 scale a row of A and of B^T, or 'exact', in the bank's own type."""
    sent = encode(bank, kind)
    rank = len(next(bank.parameters()))
    return Download(decode(sent, bank.shapes, rank, kind, bank.dtype), sum(tensor.nbytes for tensor in sent))


def encode(bank: hk.AdapterBank, kind: str) -> list[Tensor]:
    """What travels of a bank of one client: A of every module, then B^T of every module; quantised, their codes and then their scales."""
    rows = [t.detach() for t in bank.parameters()]
    if kind == "exact":
        return rows
    codes, scales = hk.quantize_rows(rows, BITS[kind])
    return [*codes, *scales]


def decode(sent: Sequence[Tensor], shapes: Shapes, rank: int, kind: str, dtype: torch.dtype) -> hk.AdapterBank:
    """The bank of one client that `encode` was given, as far as its codes tell."""
    widths = [n for _, n in shapes.values()] + [m for m, _ in shapes.values()]
    if kind == "exact":
        back = [rows.clone() for rows in sent]
    else:
        back = hk.dequantize_rows(list(sent[: len(widths)]), list(sent[len(widths) :]), widths, dtype=dtype)
    a, bt = (dict(zip(shapes, side, strict=True)) for side in (back[: len(shapes)], back[len(shapes) :]))
    return hk.AdapterBank.of(shapes, [rank], a, bt)


def sent_shapes(shapes: Shapes, rank: int, kind: str, dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    """(shape, type) of each tensor that `encode` returns for a bank of `rank` rows."""
    widths = [n for _, n in shapes.values()] + [m for m, _ in shapes.values()]
    if kind == "exact":
        return [((rank, width), dtype) for width in widths]
    codes: list[tuple[tuple[int, ...], torch.dtype]] = [((rank, code_bytes(width, BITS[kind])), CODES[BITS[kind]]) for width in widths]
    return codes + [((rank,), torch.float32) for _ in widths]


def download_bytes(shapes: Shapes, rank: int, kind: str, dtype: torch.dtype) -> int:
    """Bytes of one download of `rank` rows."""
    return sum(math.prod(shape) * own.itemsize for shape, own in sent_shapes(shapes, rank, kind, dtype))


@contextmanager
def folded(model: nn.Module, bank: hk.AdapterBank, scale: float) -> Iterator[None]:
    """Inside the block the modules that `bank` (of one client) names compute with W + s B A, frozen.

    A plain weight makes room for one that holds the sum, in its own type; after the block the model has the very tensors it had. A quantised layer keeps its
    weight, and s (x A^T) B^T is added to what it returns. A module whose B is zero is left as it is.
    """
    undo: list[Callable[[], None]] = []
    try:
        for name in bank.shapes:
            a, bt = bank.a[name].detach(), bank.bt[name].detach()
            if not bool(bt.any()):
                continue
            layer = model.get_submodule(name)
            weight = layer._parameters.get("weight")
            if type(weight) is nn.Parameter and weight.is_floating_point():
                undo.append(partial(setattr, layer, "weight", weight))
                layer.weight = nn.Parameter(weight.detach().clone(), requires_grad=False)
                own = linear_weight(layer).detach()
                own.copy_(own + scale * (bt.t() @ a))  # added in the wider of the two types
            else:
                undo.append(layer.register_forward_hook(_beside(a, bt, scale)).remove)
        yield
    finally:
        _run_all(undo)


def _run_all(steps: list[Callable[[], None]]) -> None:
    """Every step, from the last to the first. One that is interrupted is taken again, and the interrupt is raised when all are done.

    Half of a base with the bank in it would serve the next run with wrong results in silence.
    """
    interrupt: KeyboardInterrupt | None = None
    while steps:
        try:
            while steps:
                steps[-1]()
                steps.pop()
        except KeyboardInterrupt as error:
            interrupt = error
    if interrupt is not None:
        raise interrupt


def _beside(a: Tensor, bt: Tensor, scale: float) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], Tensor]:
    def add(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> Tensor:
        x = inputs[0]
        return out + (scale * (x.to(a.dtype) @ a.t()) @ bt).to(out.dtype)

    return add


# ---------------------------------------------------------------- fresh rows


def fresh_ranks(ranks: Mapping[str, Sequence[int]], shapes: Shapes) -> dict[str, list[int]]:
    """rho_k = floor(r_k (m + n) / m), at most n: {module: one per client}.

    B_k [m, rho_k] then has no more numbers than the r_k (m + n) of a LoRA of rank r_k. n rows already span whatever a row of A can be.
    """
    return {name: [min(n, rank * (m + n) // m) for rank in ranks[name]] for name, (m, n) in shapes.items()}


def fresh_bank(
    shapes: Shapes,
    ranks: Mapping[str, Sequence[int]],
    means: Mapping[str, float],
    clients: Sequence[str],
    seed: int,
    round_number: int,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    shared: bool = False,
) -> hk.AdapterBank:
    """The adapters that clients start a round from: A_k drawn, B_k = 0; A is frozen.

    ranks: rho, {module: one per client}.   means: {module: rho_bar}, as `mean_ranks` gives it.   clients: names.
    A_k ~ U(-1, 1) sqrt(rho_bar / (rho_k n)), from the seed of (run, round, client, module): server and client draw the same, on whatever device. The root
    makes the update of one optimiser step about as large at every rank.
    """
    a, bt = {}, {}
    for name, (m, n) in shapes.items():
        rows = []
        for client, rank in zip(clients, ranks[name], strict=True):
            bound = math.sqrt(means[name] / (max(1, rank) * n))
            purpose = ("shared rows", round_number, name) if shared else ("fresh rows", round_number, client, name)
            rows.append(torch.empty(rank, n, dtype=dtype).uniform_(-bound, bound, generator=torch_generator(seed, *purpose)))
        a[name] = torch.cat(rows).to(device)
        bt[name] = torch.zeros(len(a[name]), m, dtype=dtype, device=device)
    return hk.AdapterBank.of(shapes, ranks, a, bt).freeze_a()


def drawn(cfg: Config, state: ServerState, names: Sequence[str], number: int) -> hk.AdapterBank:
    """The fresh bank of the clients `names` in round `number`: what they start from, and what the server draws again to read what they sent."""
    shapes = state.bank.shapes
    means = mean_ranks(fresh_ranks(bank_ranks(list(state.ranks.values()), shapes), shapes))
    ranks = fresh_ranks(bank_ranks([state.ranks[name] for name in names], shapes), shapes)
    return fresh_bank(shapes, ranks, means, names, cfg.seed, number, state.bank.dtype, state.bank.device, bool(cfg.dp_clipping_norm))


def common_rows(state: ServerState, cfg: Config, names: Sequence[str], number: int, uploads: hk.AdapterBank | None) -> Common:
    """The one draw U of A, of bound 1 / sqrt(n), with B = 0. A_k is sqrt(rho_bar / rho_k) times the leading rows of U, so that B_k counts times that root:
    B_k A_k = (sqrt(rho_bar / rho_k) B_k) U.
    """
    shapes = state.bank.shapes
    most = {name: max(own) for name, own in fresh_ranks(bank_ranks([state.ranks[name] for name in names], shapes), shapes).items()}
    start = fresh_bank(shapes, {name: [rank] for name, rank in most.items()}, most, [""], cfg.seed, number, state.bank.dtype, state.bank.device, shared=True)
    means = mean_ranks(fresh_ranks(bank_ranks(list(state.ranks.values()), shapes), shapes))
    layouts = {} if uploads is None else uploads.layouts
    return Common(start, "b", {name: [math.sqrt(means[name] / max(1, rank)) for rank in layout.ranks] for name, layout in layouts.items()})


def mean_ranks(ranks: Mapping[str, Sequence[int]]) -> dict[str, float]:
    """rho_bar of each module: the geometric mean of the fleet's fresh ranks, {module: one per client of the federation}."""
    return {name: math.exp(sum(math.log(max(1, rank)) for rank in own) / len(own)) for name, own in ranks.items()}


# ---------------------------------------------------------------- the round


@contextmanager
def received(state: ServerState, cfg: Config, model: nn.Module, clients: Sequence[str]) -> Iterator[tuple[hk.AdapterBank, list[ClientRanks]]]:
    """Every client has the base with the whole bank folded in, as downloaded, and no rows of its own."""
    with folded(model, download(state.bank, cfg.download).bank, cfg.scale):
        yield state.bank, [dict.fromkeys(state.bank.shapes, 0)] * len(clients)


def train_fold(work: Work) -> Trained:
    """Each client trains B_k over fresh rows A_k, on W with the downloaded bank folded in: once for all of them.

    Uploads have A_k again, as the server draws it; what is counted is the download, scales included, and B_k. The adapters that the folder keeps of clients
    are the rows they downloaded with those they trained behind them, which is what they computed with.
    """
    cfg, state, shapes = work.cfg, work.state, work.state.bank.shapes
    down = download(state.bank, cfg.download)
    fresh = drawn(cfg, state, work.names, work.number)
    ranks = {name: layout.ranks for name, layout in fresh.layouts.items()}
    everyone = range(fresh.num_clients)
    in_turn = cfg.cobatch and len(groups_of(len(everyone), cfg)) > 1
    with folded(work.model, down.bank, cfg.scale):
        if in_turn:
            fresh = moved(fresh, torch.device("cpu"))
            trained, results = train_groups(work.model, fresh, work.clients, cfg, work.number, work.lr, {}, work.progress)
        elif cfg.cobatch:
            trained = fresh.select(everyone)
            results = train_cohort(work.model, trained, work.clients, cfg, work.number, work.lr, {}, work.progress)
        else:
            trained, results = train_one_by_one(work.model, fresh, work.clients, cfg, work.number, work.lr, {}, work.progress)
    sent = hk.AdapterBank.of(shapes, ranks, fresh.a, trained.bt)  # of the clients B alone
    dropped = refused(sent)
    arrived = [k for k in everyone if k not in dropped]
    numbers = [sum(ranks[name][k] * m for name, (m, _) in shapes.items()) for k in everyone]
    uploads, had = (moved(bank.select(arrived), state.bank.device) for bank in (sent, fresh))
    return Trained(
        results,
        dropped,
        ranks=work.ranks,
        tails=[(0.0, 0.0)] * len(results),
        uploads=uploads,
        received=had,
        bytes_down=[down.num_bytes] * len(results),
        bytes_up=[numbers[k] * fresh.dtype.itemsize for k in arrived],
        parameters=sum(numbers),
        beside=down.bank.truncate([state.r_max]) if cfg.save_clients else None,
    )


def merge_bank(call: MergeCall) -> Merged:
    """The bank of rank R nearest to B_g A_g + sum_k p_k B_k A_k, or to what the server's optimiser makes of it. Without one no m x n sum is formed."""
    bank, uploads = call.bank, call.uploads
    stacks, weights = [], []
    for module, name in enumerate(bank.shapes):
        p = row_weights(uploads, call.weights, module, name)
        stacks.append((torch.cat([bank.bt[name].detach(), uploads.bt[name].detach()]), torch.cat([bank.a[name].detach(), uploads.a[name].detach()])))
        weights.append(torch.cat([p.new_ones(len(bank.a[name])), p]))
    merged = dict(zip(bank.shapes, nearest(call.cfg, call.moments, bank, stacks, weights, call.r_max), strict=True))
    bt, a = ({name: factors[side] for name, factors in merged.items()} for side in (0, 1))
    return Merged(hk.AdapterBank.of(bank.shapes, [call.r_max], a, bt), added_to=bank)
