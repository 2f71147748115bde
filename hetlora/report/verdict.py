"""What a run came to, in one sentence; and its clients in groups of equal or near rank. Plain text, for the page and for whoever asks."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping
from typing import Any

from hetlora.report.text import change_text, number, perplexity_of, rank_text
from hetlora.run_folder import Run, mean_rank

MOST_GROUPS = 8


def rank_groups(ranks: Mapping[str, float]) -> dict[str, list[str]]:
    """Label -> clients, from the least rank up: one group a rank, or groups that double where there are more than eight ranks.

    >>> rank_groups({"a": 5, "b": 50, "c": 5})
    {'5': ['a', 'c'], '50': ['b']}
    """
    different = sorted(set(ranks.values()))
    low = max(different[0], 1.0) if different else 1.0
    groups: dict[int | float, list[str]] = {}
    for name, rank in sorted(ranks.items(), key=lambda item: (item[1], item[0])):
        groups.setdefault(rank if len(different) <= MOST_GROUPS else int(math.log2(max(rank, low) / low)), []).append(name)
    named = {}
    for names in groups.values():
        first, last = (rank_text(ranks[name]) for name in (names[0], names[-1]))
        named[first if first == last else f"{first} to {last}"] = names
    return named


def _changes(clients: list[dict[str, Any]]) -> list[float]:
    """Change of the perplexity of each client's own held-out text in percent, where it is known and finite."""
    pairs = [(client.get("perplexity_before"), client.get("perplexity_after")) for client in clients]
    return [100 * (after / before - 1) for before, after in pairs if before and after is not None and math.isfinite(before) and math.isfinite(after)]


def group_rows(clients: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One row for each group of ranks: clients, perplexity before and after (exp of the mean over clients of its logarithm), who got worse."""
    by_name = {client["name"]: client for client in clients}
    rows = []
    for label, names in rank_groups({name: mean_rank(client["rank_start"]) for name, client in by_name.items()}).items():
        own = [by_name[name] for name in names]
        known = [(c["perplexity_before"], c["perplexity_after"]) for c in own if c.get("perplexity_before") and c.get("perplexity_after")]
        before, after = (statistics.geometric_mean(column) for column in zip(*known, strict=True)) if known else (None, None)
        rows.append({"rank": label, "clients": len(own), "before": before, "after": after, "worse": sum(map(got_worse, own))})
    return rows


def got_worse(client: dict[str, Any]) -> bool:
    """Whether the perplexity of a client's own held-out text rose."""
    before, after = client.get("perplexity_before"), client.get("perplexity_after")
    return before is not None and after is not None and not after <= before


def evaluations(run: Run) -> list[dict[str, Any]]:
    """Those of the rounds on record; after them that of the round which a finished run kept, where it is another than the last."""
    found = [record["evaluation"] for record in run.records if record.get("evaluation")]
    end = run.summary.get("evaluation_after") if run.summary else None
    return [*found, end] if end and found and end != found[-1] else found


def run_sentence(run: Run) -> str:
    """What happened, and how sure it is."""
    done, planned = run.records[-1]["round"], run.config.get("rounds", "?")
    rounds = f"{done} round{'s' if done != 1 else ''}" if run.complete else f"{done} of {planned} rounds (the run is not complete)"
    values = [p for evaluation in evaluations(run) if (p := perplexity_of(evaluation, "client_text")) is not None]
    if run.best_round is not None and run.best_round < done:
        rounds += f", of which round {run.best_round} is kept,"
    if len(values) < 2:
        return f"After {rounds} there is nothing to compare yet: the clients' held-out text was evaluated {len(values)} time{'s' if len(values) != 1 else ''}."
    first, last = values[0], values[-1]
    verb = "fell" if last < first else "did not change" if last == first else "rose"
    moved = f" from {number(first)} to {number(last)} ({change_text(first, last)})" if last != first else f" ({number(first)})"
    sentence = f"In {rounds} the perplexity of the clients' held-out text {verb}{moved}"
    changes = _changes(run.summary["clients"]) if run.summary else []
    if len(changes) > 1:
        mean, error = statistics.fmean(changes), statistics.stdev(changes) / math.sqrt(len(changes))
        better = sum(change < 0 for change in changes)
        sentence += f"; {better} of {len(changes)} clients got better, by {mean:+.1f} ± {error:.1f} % on average (standard error over clients)"
        if abs(mean) < 2 * error:
            sentence += ", too little to tell from chance"
    return sentence + "; this is one run with one seed, and hetlora compare measures how much seeds differ."
