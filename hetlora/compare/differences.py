"""Differences of a comparison's methods, paired: the same seed, the same clients, each against one method."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from hetlora.compare.figures import GLOBAL, GROUPS, Outcome, Table, own_perplexities, rank_group
from hetlora.report.text import number
from hetlora.seeds import resampling_generator

RESAMPLES = 10_000
LEVEL = 0.95


@dataclass(frozen=True)
class Difference:
    """Final perplexities of a method relative to those of another, in percent; below 0 the method is better.

    by_seed: of the global adapter, one per seed.   by_client: {client: of its own held-out text, mean over seeds of the logarithms}, the clients of every seed.
    by_group: {group of ranks: mean over the seeds of the group's own perplexity}, groups that some client of every seed is in.
    """

    by_seed: list[float]
    by_client: dict[str, float]
    by_group: dict[str, float]

    @property
    def interval(self) -> tuple[float, float] | None:
        """`bootstrap` interval of the mean over clients."""
        return bootstrap(list(self.by_client.values()))

    @property
    def better(self) -> int:
        """Clients for which the method is better."""
        return sum(value < 0 for value in self.by_client.values())

    @property
    def p(self) -> float:
        return sign_test(list(self.by_client.values()))


def sign_test(values: Sequence[float]) -> float:
    """Two-sided p of the sign test: how likely at least so uneven a split of signs is where both are equally likely; zeros are left out.

    >>> sign_test([-1.0, -2.0, -3.0]), sign_test([-1.0, 1.0])
    (0.25, 1.0)
    """
    signs = [value < 0 for value in values if value]
    few = min(sum(signs), len(signs) - sum(signs))
    return min(1.0, 2 * sum(math.comb(len(signs), i) for i in range(few + 1)) / 2 ** len(signs))


def bootstrap(values: Sequence[float]) -> tuple[float, float] | None:
    """Percentile interval of the mean (95 %): 10 000 resamples of `values`, always the same ones. None for fewer than five, of which it says nothing."""
    if len(values) < 5 or not all(map(math.isfinite, values)):
        return None
    draw = resampling_generator()
    means = sorted(statistics.fmean(draw.choices(values, k=len(values))) for _ in range(RESAMPLES))
    tail = round(RESAMPLES * (1 - LEVEL) / 2)
    return means[tail], means[-1 - tail]


def reference(table: Table) -> str:
    """The method that the others are compared with: `against` of the plan, else homlora-min where it was run, else the first."""
    return table.comparison.plan.against or ("homlora-min" if "homlora-min" in table.outcomes else next(iter(table.outcomes)))


def differences(table: Table) -> dict[str, Difference]:
    """{method: its difference}, of all methods but the reference."""
    base = table.outcomes[reference(table)]
    return {name: _difference(own, base) for name, own in table.outcomes.items() if name != reference(table)}


def _percent(ratio: float) -> float:
    return 100 * (ratio - 1)


def _difference(own: Sequence[Outcome], base: Sequence[Outcome]) -> Difference:
    pairs = [(mine, theirs) for mine, theirs in zip(own, base, strict=True)]
    assert all(mine.cell.seed == theirs.cell.seed for mine, theirs in pairs)
    by_seed = [_percent(mine.curve(GLOBAL)[-1][1] / theirs.curve(GLOBAL)[-1][1]) for mine, theirs in pairs]
    texts = [(own_perplexities(mine), own_perplexities(theirs)) for mine, theirs in pairs]
    clients = [name for name in texts[0][0] if all(name in mine and name in theirs for mine, theirs in texts)]
    logs = {name: statistics.fmean(math.log(mine[name] / theirs[name]) for mine, theirs in texts) for name in clients}
    by_group = {}
    for group in GROUPS:
        ratios = []
        for (mine, _), (left, right) in zip(pairs, texts, strict=True):
            ranks = mine.cell.ranks
            names = [name for name in left if name in right and rank_group(ranks[name], list(ranks.values())) == group]
            if names:
                ratios.append(statistics.fmean(left[name] for name in names) / statistics.fmean(right[name] for name in names))
        if ratios and len(ratios) == len(pairs):
            by_group[group] = _percent(statistics.fmean(ratios))
    return Difference(by_seed, {name: _percent(math.exp(value)) for name, value in logs.items()}, by_group)


def difference_rows(table: Table) -> tuple[list[str], list[list[str]]]:
    """Head and rows of the table of differences, in percent."""
    found = differences(table)
    return difference_head(found), [difference_row(name, own, found) for name, own in found.items()]


def difference_head(found: Mapping[str, Difference]) -> list[str]:
    own = ["own, mean over clients, %", "95 % interval", "clients better", "p (signs)"] if any(own.by_client for own in found.values()) else []
    return ["method", "global, %", "by seed", *own, *(f"{group}, %" for group in _groups(found))]


def difference_row(name: str, own: Difference, found: Mapping[str, Difference]) -> list[str]:
    """The row of one method of `found`."""
    row = [name, _signed(statistics.fmean(own.by_seed)), ", ".join(map(_signed, own.by_seed))]
    if values := list(own.by_client.values()):
        interval = f"{_signed(own.interval[0])} to {_signed(own.interval[1])}" if own.interval else "-"
        row += [_signed(statistics.fmean(values)), interval, f"{own.better} of {len(values)}", number(own.p, 3) if own.p >= 0.0005 else "< 0.001"]
    elif any(other.by_client for other in found.values()):
        row += ["-"] * 4
    return [*row, *(_signed(own.by_group[group]) if group in own.by_group else "-" for group in _groups(found))]


def _groups(found: Mapping[str, Difference]) -> list[str]:
    return [group for group in GROUPS if any(group in own.by_group for own in found.values())]


def _signed(value: float) -> str:
    return f"{value:+.1f}" if math.isfinite(value) else "inf"


def difference_text(table: Table) -> str:
    """What the table of differences shows, in words."""
    seeds = table.comparison.plan.seeds
    clients = max((len(own.by_client) for own in differences(table).values()), default=0)
    count = f"n = {clients} clients" if clients else "clients' own text was not evaluated"
    return (
        f"Final perplexity against {reference(table)}, same seed and clients, in percent; below 0 is better. Global: mean of {seeds} "
        f"seed{'s' if seeds > 1 else ''}, each beside it. Own: every client's mean over the seeds; the interval is a bootstrap over clients "
        f"({RESAMPLES} resamples), p that of a two-sided sign test ({count}). Both say how far other clients like these would agree. "
        "They know nothing of the few seeds, and clients of one federation are not independent. Small, middle, big: clients by rank."
    )
