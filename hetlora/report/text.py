"""Numbers, ranks, sizes and rounds as text: one form in the terminal, on the pages and in the pictures."""

from __future__ import annotations

import math
import re
import unicodedata
from typing import Any


def printable(text: object) -> str:
    """`text` in one line that no terminal obeys: whatever is not printable (control characters, line ends, marks of direction) as Python would write it.

    Names come with the data, from whoever made it.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in str(text))


def cells(text: str) -> int:
    """Columns of a terminal that `text` takes: two for a wide character, none for one that joins the character before it."""
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)


_BREAKS = re.compile(r"(?<!\d) | (?!(?:[kMG]B|s|%)(?:\W|$))")  # a unit stays with its number


def wrap(text: str, width: int, indent: str = "  ") -> list[str]:
    """Lines of at most `width` columns, broken between words alone: a longer word (a path) stays whole. Lines after the first begin with `indent`."""
    lines, line = [], ""
    for word in _BREAKS.split(text):
        longer = f"{line} {word}" if line else word
        if line.strip() and cells(longer) > width:
            lines.append(line)
            longer = indent + word
        line = longer
    return [*lines, line]


_ENDS = re.compile(r"(?<=[ +,/])|(?<=[-_.=])(?=\D)")  # a number stays whole


def fold_name(name: str, width: int) -> str:
    """`name` on lines of at most `width` columns, broken behind its separators; a part that is wider alone stays whole."""
    lines = [""]
    for part in _ENDS.split(name):
        if lines[-1] and cells((lines[-1] + part).rstrip()) > width:
            lines.append("")
        lines[-1] += part
    return "\n".join(line.rstrip() for line in lines)


def change_text(before: Any, after: Any) -> str:
    """How much `after` is above (+) or below (-) `before`, in percent; '-' where that says nothing."""
    if not before or after is None or not (math.isfinite(before) and math.isfinite(after)):
        return "-"
    return f"{100 * (after / before - 1):+.1f} %"


def number(value: Any, digits: int = 2) -> str:
    """`value` with `digits` decimals; '-' if it is missing, 'inf' or 'nan' if it is that."""
    if value is None:
        return "-"
    value = float(value)
    if not math.isfinite(value):
        return str(value)
    return f"{value:.{digits}f}" if abs(value) < 1e5 else f"{value:.3g}"


def rank_text(rank: Any) -> str:
    """A rank; the mean over modules, to one decimal, where modules have ranks of their own."""
    if isinstance(rank, dict):
        rank = sum(rank.values()) / len(rank) if rank else None
    if rank is None:
        return "-"
    return str(int(rank)) if float(rank).is_integer() else f"{rank:.1f}"


def size_text(count: float) -> str:
    return f"{count / 1e6:.2f} MB" if count < 1e9 else f"{count / 1e9:.2f} GB"


def perplexity_of(evaluation: dict[str, Any] | None, part: str) -> float | None:
    """`part`: 'client_text' or 'held_out_clients'; None if it was not evaluated."""
    found = (evaluation or {}).get(part)
    return found["perplexity"] if found else None


def privacy_text(spent: dict[str, Any]) -> str:
    """What `privacy.spent` found, in words."""
    said = f"epsilon {'infinite' if spent['epsilon'] is None else number(spent['epsilon'])} at delta {spent['delta']:g}"
    return said if spent["secret"] or spent["epsilon"] is None else f"{said} (simulated: noise from the run's seed protects nobody)"


def round_line(record: dict[str, Any], total: int) -> str:
    """One round in one line of plain text."""
    parts = []
    clients = record.get("clients") or []
    if clients:
        parts.append(f"{len(clients)} client{'s' if len(clients) > 1 else ''}")
        first, last = (sum(c[key] for c in clients) / len(clients) for key in ("loss_first", "loss_last"))
        parts.append(f"train loss {number(first, 3)} -> {number(last, 3)}")
        pruned = sum(c["rank"] != c["rank_before"] for c in clients)
        parts.append(f"pruned {pruned}" if pruned else "none pruned")
    parts.append(f"mean rank {number(record.get('mean_rank'), 1)}")
    parts += [
        f"perplexity {name} {number(perplexity_of(record.get('evaluation'), part))}"
        for part, name in (("client_text", "clients' held-out text"), ("held_out_clients", "held-out clients"))
        if perplexity_of(record.get("evaluation"), part) is not None
    ]
    if clients:
        parts.append(f"down {size_text(record['bytes_down'])}, up {size_text(record['bytes_up'])}")
    if record.get("privacy"):
        parts.append(privacy_text(record["privacy"]))
    if record.get("seconds") is not None:
        parts.append(f"{record['seconds']:.1f} s")
    parts += [f"dropped {drop['name']}: {drop['reason']}" for drop in record.get("dropped") or []]
    head = f"round {record['round']}/{total}" if record["round"] else "before training"
    return f"{head}: " + "; ".join(parts)
