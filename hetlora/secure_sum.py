"""The sums of secure aggregation: what a client adds to them, in fixed point, and the round's mean that the server makes of them. Nothing here is secret;
`hetlora.flower.secure` masks.

In each module, with w_k the weight of client k, D_k = upload - download of its rank rows, r_k its rank after the round and h the step, client k adds

    w_k,   w_k [j < r_k] for each row j < R,   w_k D_k with zero rows up to R          each number x as round(x / h) mod 2^bits

The server sees the sums W, V_j and N_j of these over the clients, no client's own. It needs no more: sum_k w_k upload_kj = V_j old_j + N_j.

No sum wraps around. A client refuses a number above `secure_range` = Q h, so |sum| <= K Q for K clients, and `fixed_point` takes the bits for which
2 K Q < 2^bits. The rounding of one number is at most h / 2, so that a sum is at most K h / 2 from the exact one. The weight is rounded before it
multiplies, so that the same weights stand in V and in N.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import hetlora_kernels as hk
from hetlora.config import Config, ConfigError
from hetlora.merge import client_scores

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
        largest = float(steps.abs().max()) if steps.numel() else 0.0
        if largest > self.most:
            raise ConfigError(
                f"secure_range: expected numbers of at most {self.most * self.step:g}, got {largest * self.step:g} (a weight, or an update times it); "
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


def lengths(shapes: Shapes, r_max: int) -> list[int]:
    """Numbers of each piece of the vector: of every module W, V [R], N of A [R, n], N of B^T [R, m]."""
    return [count for m, n in shapes.values() for count in (1, r_max, r_max * n, r_max * m)]


@torch.no_grad()
def contribution(cfg: Config, uploads: hk.AdapterBank, received: hk.AdapterBank, share: float, r_max: int) -> Tensor:
    """What one client adds, int64 [sum of `lengths`].

    uploads, received: banks of one client, of its ranks after the round.   share: its sequences over the most that a client of the round has, at most 1,
    which is its weight with weights = 'samples'.
    """
    point = fixed_point(cfg)
    scores, _ = client_scores(uploads, [share], cfg)
    parts = []
    for module, (name, layout) in enumerate(uploads.layouts.items()):
        rank = layout.ranks[0]
        weight = point.encode(scores[0, module : module + 1])  # [1]
        exact = float(weight) * point.step
        parts += [weight, torch.where(torch.arange(r_max) < rank, weight, 0)]
        for new, old in ((uploads.a[name], received.a[name]), (uploads.bt[name], received.bt[name])):
            change = new.detach().double().cpu() - old.detach().double().cpu()  # [rank, width]
            padded = change.new_zeros(r_max, change.shape[1])
            padded[:rank] = exact * change
            parts.append(point.encode(padded).flatten())
    return torch.cat(parts)


@torch.no_grad()
def mean(cfg: Config, total: Tensor, bank: hk.AdapterBank, owned: Mapping[str, int]) -> hk.AdapterBank:
    """The round's mean as one upload, which merged with weight 1 gives what the uploads give with theirs: a bank of one client of `owned` rows.

    total: sums of the clients' `contribution`, whole numbers.   bank: the server's, of rank R.   owned: {module: the most rows that a client of the round has}.

        row_j = (V_j / W) old_j + N_j / W      merge = 'factors'
        row_j = old_j + N_j / V_j              merge = 'factors' with shared_rows = 'owners'
        row_j = old_j + N_j / W                merge = 'delta'

    A row stays where the sum that it is divided by is 0: nobody knows then in which direction. Sums are divided in float64 and rounded to the bank's type once.
    """
    r_max = bank.layouts[next(iter(bank.shapes))].ranks[0]
    pieces = iter(total.cpu().split(lengths(bank.shapes, r_max)))
    point = fixed_point(cfg)
    sides: dict[str, dict[str, Tensor]] = {"a": {}, "bt": {}}
    for name, (m, n) in bank.shapes.items():
        weight, owners = next(pieces), next(pieces)
        rows = {"a": next(pieces).view(r_max, n), "bt": next(pieces).view(r_max, m)}
        _possible(name, torch.cat([weight, owners]), rows.values(), owned[name])
        whole, by_row = point.decode(weight), point.decode(owners)[:, None]  # [1], [R, 1]
        divisor = by_row if cfg.shared_rows == "owners" else whole.expand_as(by_row)
        kept = by_row / divisor if cfg.merge_kind.name == "factors" else torch.ones_like(by_row)
        for side, sums in rows.items():
            old = getattr(bank, side)[name].detach().double().cpu()
            found = torch.where(divisor > 0, kept * old + point.decode(sums) / divisor, old)
            sides[side][name] = found[: owned[name]].to(bank.device, bank.dtype)
    return hk.AdapterBank.of(bank.shapes, {name: [rank] for name, rank in owned.items()}, sides["a"], sides["bt"])


def _possible(name: str, weights: Tensor, rows: Iterable[Tensor], owned: int) -> None:
    """`ConfigError` unless the sums can be those of clients with leading rows: weights that fall from row to row, and nothing below the last row."""
    beyond = [weights[1 + owned :], *(part[owned:] for part in rows)]
    if bool((weights.diff() > 0).any()) or bool((weights < 0).any()) or any(bool(part.any()) for part in beyond):
        raise ConfigError(f"the sums of {name} are none of leading rank rows; a client's numbers or key shares were wrong")
