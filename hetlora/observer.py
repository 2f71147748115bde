"""What a run tells its caller while it works. The base class does nothing, so `simulate` needs no terminal."""

from __future__ import annotations

from typing import Any

from hetlora.config import Config


class Observer:
    """Receives the events of a run, in this order: messages and pre-training, `start`, then per round
    `round_start`, `local_step`..., `evaluate`..., `round_end`, and at last `finish`; or `stopped`, where `simulate` ends by an error or an interrupt.

    Subclass and override what you need. Exceptions from an observer stop the run; `resume=True` continues it.
    """

    def message(self, text: str) -> None:
        """One line for the user: a choice that was made, a fallback with its reason."""

    def pretrain(self, done: int, total: int, loss: float) -> None:
        """`done` of `total` steps of making the offline base model; `loss` in nats per token."""

    def work(self, what: str, done: int, total: int) -> None:
        """`done` of `total` parts of `what`, a preparation before the runs."""

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        """The run begins (or continues); `info` says on what: model, data, clients, device."""

    def round_start(self, round: int, total: int, names: list[str]) -> None:
        """Round `round` of `total` (1-based) begins with the sampled clients `names`."""

    def local_step(self, done: int, total: int) -> None:
        """`done` of `total` steps of this round's local training."""

    def evaluate(self, done: int, total: int) -> None:
        """`done` of `total` parts of the evaluation."""

    def round_end(self, record: dict[str, Any]) -> None:
        """`record` is the round's line of rounds.jsonl; round 0 is the evaluation before training."""

    def cell(self, label: str, done: int, total: int, summary: dict[str, Any] | None) -> None:
        """Of a comparison: `done` of `total` runs; `summary` of the one that just ended, None for one that an earlier call had finished."""

    def finish(self, summary: dict[str, Any]) -> None:
        """The run is complete; `summary` is the content of summary.json."""

    def stopped(self, error: BaseException) -> None:
        """`simulate` ends by `error`, at any time before `finish` returned: what was opened for the run can be closed."""
