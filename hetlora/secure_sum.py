"""The sums of secure aggregation: what a client adds to them, in fixed point, and the round's mean that the server makes of them. Nothing here is secret;
`hetlora.flower.secure` masks.

In each module, with w_k the weight of client k, X_k its upload (merge = 'factors') or upload - download (merge = 'delta'), zero from its rank on, and h the
step, client k adds

    w_k   and   w_k X_k, rows j < J          each number x as round(x / h) mod 2^bits

The server sees the sums W and N_j of these over the clients. J: `secure_owners` clients of the round or more own each row j < J (`summed_rows`). A row of one
client alone would be no sum. So rows from J on are left as they are.

No sum wraps around. A client refuses a number above `secure_range` = Q h, so |sum| <= K Q for K clients, and `fixed_point` takes the bits for which
2 K Q < 2^bits. The rounding of one number is at most h / 2, so that a sum is at most K h / 2 from the exact one. The weight is rounded before it
multiplies, so that W and N have the same weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.config import Config, ConfigError
from hetlora.merge import client_scores
from hetlora.ranks import ClientRanks

Shapes = Mapping[str, tuple[int, int]]


@dataclass(frozen=True)
class FixedPoint:
    """h = step.   most: Q, the largest number of a client in steps.   clients: K.   bits: of the ring, 32 or 64."""

    step: float
    most: int
    clients: int
    bits: int

    @property
    def dtype(self) -> torch.dtype:
        return torch.int32 if self.bits == 32 else torch.int64

    def encode(self, values: Tensor) -> Tensor:
        """round(x / h), int64; `ConfigError` for a number that is not finite or above the range."""
        values = values.double()
        if not bool(torch.isfinite(values).all()):
            raise ConfigError("update has non-finite values; lower lr or set clip_norm")
        steps = values / self.step
        if bool((steps.abs() > self.most).any()):  # the server reads this line, so that it does not tell the number
            raise ConfigError(
                f"secure_range: expected numbers of at most {self.most * self.step:g}, and a weight, or a row times it, is above; "
                "raise secure_range, or lower lr"
            )
        return steps.round().long()

    def decode(self, total: Tensor) -> Tensor:
        """The sum of the clients' numbers, float64, from the ring's representative of least size."""
        if bool((total > self.clients * self.most).any()) or bool((total < -self.clients * self.most).any()):
            raise ConfigError(f"a sum is out of the range that {self.clients} clients can reach; a client's numbers or key shares were wrong")
        return total.double() * self.step


def fixed_point(cfg: Config) -> FixedPoint:
    """Of a run, the same for every round: K is `clients_per_round`."""
    most = int(cfg.secure_range * 2**cfg.secure_bits)
    return FixedPoint(2.0**-cfg.secure_bits, most, cfg.clients_per_round, 32 if 2 * cfg.clients_per_round * most < 2**32 else 64)


def summed_rows(cfg: Config, shapes: Shapes, ranks: Sequence[ClientRanks]) -> list[int]:
    """J of each module, for a round of clients of these ranks."""
    return [sorted((own[name] for own in ranks), reverse=True)[cfg.secure_owners - 1] if len(ranks) >= cfg.secure_owners else 0 for name in shapes]


def lone_rows(cfg: Config, shapes: Shapes, rows: Sequence[int], ranks: Sequence[ClientRanks]) -> list[str]:
    """Modules in which one client alone is left of a row that is summed: others dropped out or pruned it. None where `secure_owners` = 1 allows that."""
    tops = {name: [*sorted((own[name] for own in ranks), reverse=True), 0, 0][:2] for name in shapes}
    return [name for name, summed in zip(shapes, rows, strict=True) if cfg.secure_owners > 1 and min(tops[name][0], summed) > tops[name][1]]


def length(shapes: Shapes, rows: Sequence[int]) -> int:
    """Numbers of the vector."""
    return sum(lengths(shapes, rows))


def lengths(shapes: Shapes, rows: Sequence[int]) -> list[int]:
    """Numbers of its pieces: of every module W, N of A [J, n], N of B^T [J, m]."""
    return [count for (m, n), summed in zip(shapes.values(), rows, strict=True) for count in (1, summed * n, summed * m)]


@torch.no_grad()
def contribution(cfg: Config, uploads: hk.AdapterBank, received: hk.AdapterBank, share: float, rows: Sequence[int]) -> Tensor:
    """What one client adds, int64 [`length`].

    uploads, received: banks of one client, of its ranks after the round.   share: its sequences over the most that a client of the round has, at most 1,
    which is its weight with weights = 'samples'.   rows: J of each module.
    """
    point = fixed_point(cfg)
    scores, _ = client_scores(uploads, [share], cfg)
    parts = []
    for module, (name, layout) in enumerate(uploads.layouts.items()):
        own = min(layout.ranks[0], rows[module])
        weight = point.encode(scores[0, module : module + 1])  # [1]
        parts.append(weight)
        for new, old in ((uploads.a[name], received.a[name]), (uploads.bt[name], received.bt[name])):
            x = new.detach()[:own].double().cpu()  # [own, width]
            if cfg.merge_kind.changes:
                x = x - old.detach()[:own].double().cpu()
            padded = x.new_zeros(rows[module], x.shape[1])
            padded[:own] = float(weight) * point.step * x
            parts.append(point.encode(padded).flatten())
    return torch.cat(parts)


@torch.no_grad()
def mean(
    cfg: Config, total: Tensor, bank: hk.AdapterBank, rows: Sequence[int], ranks: Sequence[ClientRanks], samples: Sequence[int], most: int
) -> tuple[hk.AdapterBank, float]:
    """The round's mean as one upload, which merged with weight 1 gives what the uploads give with theirs, and `_rounding`, the largest of a factor.

    total: sums of the clients' `contribution`, whole numbers.   bank: the server's.   rows: J of each module.   ranks, samples: of the clients in the sum,
    after the round.   most: the most sequences of a client, asked or in the sum.

        row_j = N_j / W               merge = 'factors'
        row_j = N_j / V_j             merge = 'factors' with shared_rows = 'owners'; V_j sums weights that the server knows, of a row's owners
        row_j = old_j + N_j / W       merge = 'delta'

    A row stays where the sum that it is divided by is 0: nobody knows then in which direction. Sums are divided in float64 and rounded to the bank's type once.
    """
    point = fixed_point(cfg)
    pieces = iter(total.cpu().split(lengths(bank.shapes, rows)))
    known = torch.tensor([n / most if cfg.weights == "samples" else 1.0 for n in samples], dtype=torch.float64)
    each = point.encode(known)  # [K], of no use under 'sparsity'
    owned: dict[str, int] = {}
    rounding = 0.0
    sides: dict[str, dict[str, Tensor]] = {"a": {}, "bt": {}}
    for (name, (m, n)), summed in zip(bank.shapes.items(), rows, strict=True):
        weight, own = next(pieces), torch.tensor([ranks[k][name] for k in range(len(ranks))])
        owned[name] = left = min(summed, int(own.max()))
        sums = {"a": next(pieces).view(summed, n), "bt": next(pieces).view(summed, m)}
        off = bool(weight < 0) or (cfg.weights != "sparsity" and int(weight) != int(each.sum()))
        if off or any(bool(part[left:].any()) for part in sums.values()):
            raise ConfigError(f"the sums of {name} are not those of these clients' weights and ranks; a client's numbers or key shares were wrong")
        owners = own > torch.arange(left)[:, None]  # [left, K]
        by_row = point.decode((each * owners).sum(1))[:, None]  # [left, 1]
        divisor = by_row if cfg.shared_rows == "owners" else point.decode(weight).expand(left, 1)
        for side, part in sums.items():
            old = getattr(bank, side)[name].detach()[:left].double().cpu()
            start = old if cfg.merge_kind.changes else torch.zeros_like(old)
            own_mean = point.decode(part[:left]) / divisor
            found = torch.where(divisor > 0, start + own_mean, old)
            rounding = max(rounding, _rounding(point.step, owners.sum(1, keepdim=True), divisor, own_mean))
            sides[side][name] = found.to(bank.device, bank.dtype)
    return hk.AdapterBank.of(bank.shapes, {name: [rank] for name, rank in owned.items()}, sides["a"], sides["bt"]), rounding


def _rounding(step: float, owners: Tensor, divisor: Tensor, means: Tensor) -> float:
    """How much of one factor's means may be rounding: the norm of K_j h / 2 / W_j in each number, over that of the means, at most 1.

    owners: [J, 1] K_j, clients whose numbers of the row round.   divisor: [J, 1] W_j.   means: [J, width]. Where a W_j is 0, nothing is known.
    """
    if not means.numel():
        return 0.0
    if not bool((divisor > 0).all()):
        return 1.0
    bound = float((owners * step / 2 / divisor).expand_as(means).norm())
    return bound / max(bound, float(means.norm()))
