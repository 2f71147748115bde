"""A comparison's figures from the run folders of its cells: metrics of each run, means and spreads over seeds."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from hetlora.compare.run import Cell, Comparison
from hetlora.config import ConfigError
from hetlora.report.text import number, perplexity_of
from hetlora.run_folder import SUMMARY, Run, read_run

GLOBAL, OWN, UNSEEN = "client_text", "own_text", "held_out_clients"


@dataclass(frozen=True)
class Outcome:
    """A finished cell and what its folder says."""

    cell: Cell
    run: Run

    def curve(self, part: str) -> list[tuple[int, float]]:
        """(round, perplexity) at each evaluation of `part`."""
        return [(r["round"], p) for r in self.run.records if (p := perplexity_of(r.get("evaluation"), part)) is not None]

    def evaluations(self) -> list[dict[str, Any]]:
        return [record["evaluation"] for record in self.run.records if record.get("evaluation")]


def gaps(outcome: Outcome) -> list[tuple[float, float]]:
    """(rank at the end, over-fitting gap) of every client: how much further its training loss fell than its held-out loss since before training, in nats."""
    found = outcome.evaluations()
    if "own_train" not in found[0] or outcome.run.summary is None:
        return []
    before, after = ([t - s for t, s in zip(e["own_text"]["losses"], e["own_train"]["losses"], strict=True)] for e in (found[0], found[-1]))
    ranks = [client["rank_end"] for client in outcome.run.summary["clients"]]
    return [(rank, late - early) for rank, early, late in zip(ranks, before, after, strict=True)]


GROUPS = ("small", "middle", "big")


def rank_group(rank: int, ranks: Iterable[int]) -> str:
    """'small', 'middle' or 'big': the third of the way from the least to the largest of `ranks` that `rank` is in, by ratio; '' where all are one.

    >>> [rank_group(rank, (2, 32)) for rank in (2, 5, 6, 12, 13, 32)]
    ['small', 'small', 'middle', 'middle', 'big', 'big']
    """
    low, high = min(ranks), max(ranks)
    if low == high:
        return ""
    return GROUPS[min(2, int(3 * math.log(rank / low) / math.log(high / low)))]


def own_perplexities(outcome: Outcome) -> dict[str, float]:
    """{client: perplexity of its own held-out text at the end, under what it receives}; empty where that was not evaluated."""
    found = outcome.evaluations()[-1].get("own_text")
    if not found or outcome.run.summary is None:
        return {}
    names = [client["name"] for client in outcome.run.summary["clients"]]
    return {name: math.exp(loss) if loss < 700 else math.inf for name, loss in zip(names, found["losses"], strict=True)}


def _of_group(group: str) -> Callable[[Outcome, float], float | None]:
    """Mean own perplexity of the clients whose rank in the common settings is in `group`, whatever rank the method gave them."""

    def value(outcome: Outcome, target: float) -> float | None:
        ranks = outcome.cell.ranks
        values = [p for name, p in own_perplexities(outcome).items() if rank_group(ranks[name], list(ranks.values())) == group]
        return statistics.fmean(values) if values else None

    return value


def _effective_rank(outcome: Outcome, target: float) -> float | None:
    found = [record["diagnostics"] for record in outcome.run.trained if record.get("diagnostics")]
    return found[-1]["effective_rank"] if found else None


def rounds_to(outcome: Outcome, target: float) -> float | None:
    """First evaluated round whose global held-out perplexity is at most `target`; below 1: that share of the perplexity before training."""
    curve = outcome.curve(GLOBAL)
    limit = target * curve[0][1] if target < 1 else target
    return next((float(round) for round, perplexity in curve if perplexity <= limit), None)


def _share(outcome: Outcome) -> float:
    """Parameters that a client trains in a round, mean over clients and rounds, in percent of all weights of the model."""
    visits = sum(len(record.get("clients") or []) + len(record.get("dropped") or []) for record in outcome.run.trained)
    return 100 * _total(outcome, "trained_parameters") / max(visits, 1) / max(_total(outcome, "parameters"), 1)


def _total(outcome: Outcome, key: str) -> float:
    """A number of summary.json. Raises `ConfigError` naming the file where it is not there."""
    value = (outcome.run.summary or {}).get(key)
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ConfigError(f"{outcome.run.folder / SUMMARY}: damaged ({key}: expected a number, got {value!r:.40}); restore it from a copy")
    return float(value)


def _gap(outcome: Outcome) -> float | None:
    values = [gap for _, gap in gaps(outcome)]
    return statistics.fmean(values) if values else None


def _rouge(outcome: Outcome) -> float | None:
    found = outcome.evaluations()[-1].get("rouge_l")
    return 100 * found["f1"] if found else None


def _epsilon(outcome: Outcome) -> float | None:
    spent = (outcome.run.summary or {}).get("privacy")
    if not spent:
        return None
    return math.inf if spent["epsilon"] is None else spent["epsilon"]


@dataclass(frozen=True)
class Metric:
    """A column of the table. `value` of one cell, None where it does not exist."""

    key: str
    title: str
    digits: int
    value: Callable[[Outcome, float], float | None]


def _of(part: str, pick: Callable[[Sequence[float]], float]) -> Callable[[Outcome, float], float | None]:
    def value(outcome: Outcome, target: float) -> float | None:
        values = [perplexity for _, perplexity in outcome.curve(part)]
        return pick(values) if values else None

    return value


METRICS = (
    Metric("global_final", "global held-out text, final", 3, _of(GLOBAL, lambda values: values[-1])),
    Metric("global_best", "best", 3, _of(GLOBAL, min)),
    Metric("own_final", "clients' own held-out text, final", 3, _of(OWN, lambda values: values[-1])),
    Metric("own_best", "best", 3, _of(OWN, min)),
    *(Metric(f"own_{group}", f"own, {group}", 3, _of_group(group)) for group in GROUPS),
    Metric("unseen_final", "unseen clients, final", 3, _of(UNSEEN, lambda values: values[-1])),
    Metric("rouge_l", "ROUGE-L (F1, %)", 2, lambda outcome, _: _rouge(outcome)),
    Metric("rounds_to_target", "rounds to target", 1, rounds_to),
    Metric("effective_rank", "effective rank", 1, _effective_rank),
    Metric("gap", "over-fitting gap (nats)", 3, lambda outcome, _: _gap(outcome)),
    Metric("megabytes_down", "MB down", 2, lambda outcome, _: _total(outcome, "bytes_down") / 1e6),
    Metric("megabytes_up", "MB up", 2, lambda outcome, _: _total(outcome, "bytes_up") / 1e6),
    Metric("trained_percent", "trained, % of full", 2, lambda outcome, _: _share(outcome)),
    Metric("epsilon", "epsilon of a run", 2, lambda outcome, _: _epsilon(outcome)),
    Metric("cpu_seconds", "CPU s", 0, lambda outcome, _: _total(outcome, "cpu_seconds")),
    Metric("seconds", "wall s", 0, lambda outcome, _: _total(outcome, "seconds")),
)


@dataclass(frozen=True)
class Tally:
    """One metric of one method: a value per seed, in seed order; None where it does not exist (a target that was not reached)."""

    values: list[float | None]

    @property
    def known(self) -> list[float]:
        return [value for value in self.values if value is not None]

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.known) if self.known else None

    @property
    def std(self) -> float | None:
        """Sample standard deviation over seeds; None for fewer than two."""
        return statistics.stdev(self.known) if len(self.known) > 1 and all(map(math.isfinite, self.known)) else None

    def text(self, digits: int) -> str:
        """Mean ± standard deviation; how many seeds have a value where not all do."""
        if not self.known:
            return "-"
        spread = f" ± {number(self.std, digits)}" if self.std is not None else ""
        return number(self.mean, digits) + spread + (f" ({len(self.known)} of {len(self.values)})" if len(self.known) < len(self.values) else "")


@dataclass(frozen=True)
class Table:
    """What the comparison found. `outcomes` by method, in the order asked for; `tallies[method][metric key]`."""

    comparison: Comparison
    outcomes: dict[str, list[Outcome]]
    search: list[Outcome]
    tallies: dict[str, dict[str, Tally]]

    @property
    def metrics(self) -> list[Metric]:
        """The columns in which any method has a value."""
        return [m for m in METRICS if any(own[m.key].known for own in self.tallies.values())]

    def text(self, method: str) -> str:
        return next(m.text for m in self.comparison.methods if m.name == method)


def tabulate(comparison: Comparison) -> Table:
    """Read every cell's run folder, once. Raises `ConfigError` where one cannot be read."""
    outcomes: dict[str, list[Outcome]] = {}
    for cell in comparison.cells:
        outcomes.setdefault(cell.method, []).append(Outcome(cell, read_run(cell.cfg.output)))
    target = comparison.plan.target
    tallies = {name: {m.key: Tally([m.value(o, target) for o in own]) for m in METRICS} for name, own in outcomes.items()}
    return Table(comparison, outcomes, [Outcome(cell, read_run(cell.cfg.output)) for cell in comparison.search], tallies)
