"""What a run comes to: `Result`, which `simulate` returns, and what the record of a round says of each client."""

from __future__ import annotations

import html
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hetlora_kernels as hk
from hetlora.config import Config, ConfigError
from hetlora.extras import install
from hetlora.loggers import figures
from hetlora.merge import Aggregate
from hetlora.ranks import ClientRanks, Scope, mean_rank
from hetlora.report import text
from hetlora.training import Trained


@dataclass(repr=False)
class Result:
    """What `simulate` returns: per-round records (as in rounds.jsonl), the summary, the global bank, and each client's rank at the end.

    ranks: {client: rank}, or {client: {module: rank}} for prune_scope = 'module'.
    """

    history: list[dict[str, Any]]
    summary: dict[str, Any]
    bank: hk.AdapterBank
    ranks: dict[str, int | dict[str, int]]
    run_dir: Path

    def _lines(self) -> list[tuple[str, str]]:
        before, after = (text.perplexity_of(self.summary[key], "client_text") for key in ("evaluation_before", "evaluation_after"))
        perplexity = f"{text.number(before)} -> {text.number(after)} ({text.change_text(before, after)})"
        rounds = str(self.history[-1]["round"])
        return [("clients", str(len(self.ranks))), ("rounds", rounds), ("perplexity", perplexity), ("run_dir", str(self.run_dir))]

    def __repr__(self) -> str:
        return f"Result({', '.join(f'{name}: {value}' for name, value in self._lines())})"

    def _repr_html_(self) -> str:
        """For notebooks."""
        return "<table>" + "".join(f"<tr><th>{name}</th><td>{html.escape(value)}</td></tr>" for name, value in self._lines()) + "</table>"

    def to_pandas(self) -> Any:
        """A pandas frame of one line a round: what `hetlora.loggers.figures` names, `round` as its index. `ConfigError` where pandas is missing."""
        try:
            pandas = importlib.import_module("pandas")
        except ImportError:
            raise ConfigError(f"to_pandas: needs the 'pandas' package; {install('pandas')}, or pip install pandas") from None
        return pandas.DataFrame([{"round": record["round"], **dict(figures(record))} for record in self.history]).set_index("round")


def client_line(cfg: Config, name: str, before: ClientRanks, trained: Trained, k: int) -> dict[str, Any]:
    """before: the ranks that the client began the round with; the merge ends them."""
    result, scope, after = trained.results[k], cfg.prune_scope, trained.ranks[k]
    line = {"name": name, "rank_before": rank_shown(before, scope), "rank": rank_shown(after, scope)}
    line |= {"steps": result.steps, "sequences": result.sequences, "tokens": result.tokens, "loss_first": result.loss_first, "loss_last": result.loss_last}
    line |= dict(zip(("tail_before", "tail_after"), trained.tails[k], strict=True))
    return line if scope == "client" else {**line, "module_ranks": after}


def upload_line(merged: Aggregate, trained: Trained, i: int, k: int) -> dict[str, Any]:
    moved = {"bytes_down": trained.bytes_down[k], "bytes_up": trained.bytes_up[i]}
    clip = {"clip": merged.clips[i]} if merged.clips and merged.clips[i] < 1 else {}
    seen = {"norm": float(merged.norms[i]), "weight": float(merged.weights[i].mean())} if len(merged.norms) else {}
    return {**seen, **moved, **clip}


def rank_shown(ranks: ClientRanks, scope: Scope) -> float:
    """The client's rank; with ranks of its modules' own, their mean to three decimals."""
    return next(iter(ranks.values())) if scope == "client" else round(mean_rank(ranks), 3)
