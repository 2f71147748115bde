"""Loggers for TensorBoard, Weights & Biases and MLflow, each through its own package: observers for `simulate(..., loggers=[...])`."""

from __future__ import annotations

import importlib
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from hetlora.config import Config, ConfigError
from hetlora.extras import install
from hetlora.observer import Observer
from hetlora.report.text import perplexity_of


def figures(record: dict[str, Any]) -> Iterator[tuple[str, float]]:
    """(name, value) of a round's numbers that a logger draws; those that are missing, infinite or not a number are left out."""
    clients = record.get("clients") or []
    evaluation = record.get("evaluation")
    found = {
        "perplexity/clients": perplexity_of(evaluation, "client_text"),
        "perplexity/held_out_clients": perplexity_of(evaluation, "held_out_clients"),
        "train_loss/first": sum(c["loss_first"] for c in clients) / len(clients) if clients else None,
        "train_loss/last": sum(c["loss_last"] for c in clients) / len(clients) if clients else None,
        "privacy/epsilon": (record.get("privacy") or {}).get("epsilon"),
        **{name: record.get(name) for name in ("mean_rank", "bytes_down", "bytes_up", "lr", "seconds")},
    }
    return ((name, float(value)) for name, value in found.items() if value is not None and math.isfinite(value))


def _package(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        way_out = f"{install(package)}, or pip install {package}"
        raise ConfigError(f"loggers: needs the {package!r} package ({error}); {way_out}") from None


class TensorBoardLogger(Observer):
    """Writes event files to `folder`, one step a round. Raises `ConfigError` where the package tensorboard is missing."""

    def __init__(self, folder: str) -> None:
        _package("tensorboard", "tensorboard")
        self._writer = _package("torch.utils.tensorboard", "tensorboard").SummaryWriter(folder)

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        self._writer.add_text("config", cfg.to_json())

    def round_end(self, record: dict[str, Any]) -> None:
        for name, value in figures(record):
            self._writer.add_scalar(name, value, record["round"])
        self._writer.flush()

    def finish(self, summary: dict[str, Any]) -> None:
        self._writer.close()

    def stopped(self, error: BaseException) -> None:
        self._writer.close()


class WandbLogger(Observer):
    """A run of Weights & Biases.   settings: of `wandb.init`, such as project or mode='offline'. Raises `ConfigError` where the package wandb is missing."""

    def __init__(self, **settings: Any) -> None:
        self._wandb, self._settings = _package("wandb", "wandb"), settings
        self._run: Any = None

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        self._run = self._wandb.init(config=cfg.model_dump(), **self._settings)

    def round_end(self, record: dict[str, Any]) -> None:
        self._run.log(dict(figures(record)), step=record["round"])

    def finish(self, summary: dict[str, Any]) -> None:
        self._end(0)

    def stopped(self, error: BaseException) -> None:
        """Its run counts as failed. Left open, the next `wandb.init` of the program would write to it."""
        self._end(1)

    def _end(self, exit_code: int) -> None:
        run, self._run = self._run, None
        if run is not None:
            run.finish(exit_code=exit_code)


class MLflowLogger(Observer):
    """A run of MLflow, at its tracking URI.   settings: of `mlflow.start_run`, such as run_id to go on with a run: settings that differ from its parameters,
    which MLflow never changes, become tags `continued.NAME`. Raises `ConfigError` where the package mlflow is missing."""

    def __init__(self, **settings: Any) -> None:
        self._mlflow, self._settings = _package("mlflow", "mlflow"), settings
        self._open = False

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        known = self._mlflow.start_run(**self._settings).data.params
        self._open = True
        values = cfg.model_dump()
        self._mlflow.log_params({name: value for name, value in values.items() if name not in known})
        self._mlflow.set_tags({f"continued.{name}": value for name, value in values.items() if known.get(name, str(value)) != str(value)})

    def round_end(self, record: dict[str, Any]) -> None:
        self._mlflow.log_metrics(dict(figures(record)), step=record["round"])

    def finish(self, summary: dict[str, Any]) -> None:
        self._end("FINISHED")

    def stopped(self, error: BaseException) -> None:
        """Its run counts as failed, or killed where somebody interrupted it. Left open, MLflow would refuse the next one."""
        self._end("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")

    def _end(self, status: str) -> None:
        if self._open:
            self._open = False
            self._mlflow.end_run(status)


def check_told(observer: Any, loggers: Any, on_round_end: Any) -> None:
    """`ConfigError` where an argument of `simulate` cannot be told a run's events: found before the run folder is made."""
    if observer is not None and not isinstance(observer, Observer):
        raise ConfigError(f"observer: expected a hetlora.observer.Observer, got {observer!r:.60}")
    if not isinstance(loggers, (list, tuple)):
        raise ConfigError(f"loggers: expected a list of observers, got {loggers!r:.60}; write loggers=[...]")
    if odd := [one for one in loggers if not isinstance(one, Observer)]:
        raise ConfigError(f"loggers: expected observers, such as TensorBoardLogger('logs'), got {odd[0]!r:.60}")
    if on_round_end is not None and not callable(on_round_end):
        raise ConfigError(f"on_round_end: expected a function of a round's record, got {on_round_end!r:.60}")


_EVENTS = ("message", "pretrain", "work", "start", "round_start", "local_step", "evaluate", "round_end", "cell", "finish")


class Observers(Observer):
    """Several observers as one: each is told every event, in their order. `on_round_end`, where given, gets each round's record after them."""

    def __init__(self, observers: list[Observer], on_round_end: Callable[[dict[str, Any]], object] | None = None) -> None:
        self._observers, self._on_round_end = observers, on_round_end
        for event in _EVENTS:
            setattr(self, event, self._all(event))

    def _all(self, event: str) -> Callable[..., None]:
        def tell(*content: Any) -> None:
            for observer in self._observers:
                getattr(observer, event)(*content)
            if event == "round_end" and self._on_round_end is not None:
                self._on_round_end(*content)

        return tell

    def stopped(self, error: BaseException) -> None:
        """Each closes what it opened. One that cannot is named in a warning: it hides neither `error` nor the others."""
        for observer in self._observers:
            try:
                observer.stopped(error)
            except Exception as own:
                warnings.warn(f"{type(observer).__name__} could not close its run: {type(own).__name__}: {own}", stacklevel=2)
