"""Differential privacy of clients (DP-FedAvg, McMahan et al., arXiv 1710.06963): clipped updates, noise on their sum, and what that comes to in epsilon.

Neighbours are two federations of which one has the updates of one client replaced by zero. In one round, with C = dp_clipping_norm, sigma =
dp_noise_multiplier and m = the number of clients that a round expects:

    bank <- post-processing of (bank, (1/m) (sum_k min(1, C / ||D_k||_F) D_k + N(0, (sigma C)^2)))

D_k: all that client k changed, over every module and both factors, in rows that all clients share. One client moves the sum by at most C, whatever its rank
and whichever rows it owns, so that noise of one deviation on every row is a Gaussian mechanism of multiplier sigma. Rows that no client of the round can own
have no sum and take no noise. Who is in a round and which ranks there are is public, and does not depend on text.
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.config import Config, ConfigError
from hetlora.extras import install
from hetlora.ranks import bank_ranks
from hetlora.server import ServerState

_SIDES = {"a": "a", "b": "bt"}  # a factor, and where a bank has it


# ---------------------------------------------------------------- the sum


@dataclass(frozen=True)
class Common:
    """The rows in which the clients' updates are summed.

    start: what they add to, a bank of one client; its ranks are the most that a client of the round can own.   factors: those that are trained.
    stretch: {module: of each upload, what its update counts times in these rows}; 1 where it is left out.
    """

    start: hk.AdapterBank
    factors: str
    stretch: Mapping[str, Sequence[float]] = field(default_factory=dict)


def common_rows(state: ServerState, cfg: Config, names: Sequence[str], number: int, uploads: hk.AdapterBank | None) -> Common:
    """The leading rows of the server's bank, as far as one of the clients `names` owns them."""
    most = {name: [max(ranks)] for name, ranks in bank_ranks([state.ranks[name] for name in names], state.bank.shapes).items()}
    return Common(state.bank.truncate(most), cfg.training_kind.trains(number))


def expected_clients(cfg: Config, clients: int) -> int:
    """m: the clients that a round of a federation of `clients` has, on average with dp_sampling = 'poisson'. The divisor, whoever answers."""
    return min(cfg.clients_per_round, clients)


@torch.no_grad()
def private_upload(
    state: ServerState, uploads: hk.AdapterBank | None, received: hk.AdapterBank | None, sampled: Sequence[str], cfg: Config
) -> tuple[hk.AdapterBank, list[float]]:
    """(one upload of weight 1 in place of the round's: start + the noised mean update; the factor that each update was clipped by).

    uploads, received: of the clients that arrived, None for none; the others count as zero.   sampled: all clients of the round.
    Sums and noise are float64, and are rounded to the bank's type once.
    """
    number = state.round + 1
    owners = list(state.ranks) if cfg.dp_sampling == "poisson" else sampled
    common = cfg.training_kind.load_common()(state, cfg, owners, number, uploads)
    start = common.start
    places = [(side, name) for side in (_SIDES[factor] for factor in common.factors) for name in start.shapes]
    total = {place: torch.zeros(getattr(start, place[0])[place[1]].shape, dtype=torch.float64, device=start.device) for place in places}
    clips = []
    for change in [] if uploads is None or received is None else _changes(uploads, received, places, common.stretch):
        norm = math.sqrt(sum(float(rows.square().sum()) for rows in change.values()))
        clips.append(min(1.0, cfg.dp_clipping_norm / norm) if norm else 1.0)
        for place, rows in change.items():
            total[place][: len(rows)].add_(rows, alpha=clips[-1])
    merged = start.to()
    key, expected = noise_key(cfg, number, total), expected_clients(cfg, len(state.ranks))
    for (side, name), rows in total.items():
        if cfg.dp_noise_multiplier:
            rows.add_(normal(key, side, name, rows.shape).to(rows.device), alpha=cfg.dp_noise_multiplier * cfg.dp_clipping_norm)
        target = getattr(merged, side)[name]
        target.copy_(target.double() + rows / expected)
    return merged, clips


def _changes(
    uploads: hk.AdapterBank, received: hk.AdapterBank, places: Sequence[tuple[str, str]], stretch: Mapping[str, Sequence[float]]
) -> Iterator[dict[tuple[str, str], Tensor]]:
    """D_k of each client in the common rows: {(side, module): [r_k, width]}, float64, one client at a time."""
    for k in range(uploads.num_clients):
        found = {}
        for side, name in places:
            rows = uploads.layouts[name].rows(k)
            new, old = (getattr(bank, side)[name].detach()[rows].double() for bank in (uploads, received))
            found[side, name] = (new - old) * (stretch[name][k] if name in stretch else 1.0)
        yield found


def noise_key(cfg: Config, number: int, total: Mapping[tuple[str, str], Tensor]) -> bytes:
    """What a round's noise is a function of: the secret, the round, its clip and noise, and the sum itself.

    Another sum takes noise that has nothing to do with this one's: of a run with other clients, or of a round that is repeated. The same sum takes the same.
    """
    said = hashlib.blake2b(repr((noise_seed(cfg), number, cfg.dp_clipping_norm, cfg.dp_noise_multiplier)).encode(), digest_size=32)
    for rows in total.values() if cfg.dp_noise_multiplier else ():
        said.update(rows.cpu().contiguous().view(torch.uint8).numpy().data)
    return said.digest()


def normal(key: bytes, side: str, name: str, shape: Sequence[int]) -> Tensor:
    """Independent standard normal numbers, float64: SHAKE-256 of the key, of 53 bits each, by Box and Muller. All of the key counts, not a seed of 32 bits."""
    pairs = math.prod(shape) // 2 + 1
    stream = hashlib.shake_256(key + repr((side, name)).encode()).digest(16 * pairs)
    bits = torch.frombuffer(bytearray(stream), dtype=torch.int64).reshape(2, pairs) & (2**53 - 1)
    radius, angle = (-2 * ((bits[0] + 1).double() / 2**53).log()).sqrt(), bits[1].double() * (2 * math.pi / 2**53)
    return torch.cat([radius * angle.cos(), radius * angle.sin()])[: math.prod(shape)].reshape(tuple(shape))


def noise_seed(cfg: Config) -> int:
    """Of the secret file where there is one; else of the run, whom its settings tell to everybody."""
    if not cfg.dp_secret:
        return cfg.seed
    try:
        secret = Path(cfg.dp_secret).read_bytes()
    except OSError as error:
        raise ConfigError(f"dp_secret: {cfg.dp_secret}: {(error.strerror or 'cannot be read').lower()}; give a file of at least 16 random bytes") from None
    if len(secret) < 16:
        raise ConfigError(f"dp_secret: {cfg.dp_secret}: expected at least 16 random bytes, got {len(secret)}")
    return int.from_bytes(hashlib.blake2b(secret, digest_size=32).digest(), "little")


# ---------------------------------------------------------------- epsilon


def begin(cfg: Config, clients: int) -> list[str]:
    """Lines that say what the run protects. `ConfigError`: dp_delta too large, the secret or the accountant's package missing."""
    if not cfg.dp_clipping_norm:
        return []
    noise_seed(cfg)
    expected = expected_clients(cfg, clients)
    if not cfg.dp_noise_multiplier:
        return [f"privacy: updates are clipped to {cfg.dp_clipping_norm:g}, without noise; epsilon is infinite (dp_noise_multiplier = 0)"]
    if cfg.dp_delta >= 1 / clients:
        raise ConfigError(f"dp_delta = {cfg.dp_delta:g}: expected less than 1 over the number of clients ({clients}), at which one client could be laid open")
    _accounting()
    how = (
        f"each client takes part with probability {expected / clients:g}, which epsilon gains from"
        if cfg.dp_sampling == "poisson"
        else f"{expected} of {clients} clients a round, which epsilon does not gain from"
    )
    deviation = cfg.dp_noise_multiplier * cfg.dp_clipping_norm / expected
    lines = [f"privacy: updates are clipped to {cfg.dp_clipping_norm:g}, every number of their mean takes noise of deviation {deviation:.3g}; {how}"]
    if not cfg.dp_secret:
        lines.append("privacy: the noise is drawn from the run's seed, which is for simulation; a real federation gives dp_secret")
    return lines


def _accounting() -> tuple[Any, Any]:
    try:
        return importlib.import_module("dp_accounting"), importlib.import_module("dp_accounting.rdp")
    except ImportError as error:
        raise ConfigError(f"dp_noise_multiplier: epsilon takes the package dp-accounting ({error}); install it with: {install('dp')}") from None


def epsilon(cfg: Config, history: Sequence[Mapping[str, Any]], clients: int) -> float | None:
    """epsilon at cfg.dp_delta of the rounds on record, by Renyi accounting (the package dp-accounting); None: infinite.

    'fixed': of the client that was in most rounds, each a Gaussian mechanism: who takes part is public, and rounds without a client say nothing of it.
    'poisson': every round is a Gaussian mechanism on a sample of probability m / clients.
    """
    if not cfg.dp_noise_multiplier:
        return None
    dp, rdp = _accounting()
    event = dp.GaussianDpEvent(cfg.dp_noise_multiplier)
    rounds = [record for record in history if record["round"] > 0]
    if cfg.dp_sampling == "poisson":
        event, times = dp.PoissonSampledDpEvent(expected_clients(cfg, clients) / clients, event), len(rounds)
    else:
        seen = Counter(line["name"] for record in rounds for line in (*record["clients"], *record["dropped"]))
        times = max(seen.values(), default=0)
    if not times:
        return 0.0
    accountant = rdp.RdpAccountant(neighboring_relation=dp.NeighboringRelation.ADD_OR_REMOVE_ONE)
    with _quiet("absl"):  # it names orders that it leaves out, which costs tightness alone
        accountant.compose(dp.SelfComposedDpEvent(event, times))
        return float(accountant.get_epsilon(cfg.dp_delta))


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def spent(cfg: Config, history: Sequence[Mapping[str, Any]], clients: int) -> dict[str, Any]:
    """What a round's record and the summary say; {} where updates are not clipped for privacy."""
    if not cfg.dp_clipping_norm:
        return {}
    return {"privacy": {"epsilon": epsilon(cfg, history, clients), "delta": cfg.dp_delta, "secret": bool(cfg.dp_secret)}}
