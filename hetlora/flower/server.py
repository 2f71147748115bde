"""The server's app: settings from Flower's run configuration, a strategy, and its progress in Flower's log."""

from __future__ import annotations

from logging import ERROR, INFO
from typing import Any

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import log

from hetlora.config import Config, ConfigError
from hetlora.federation import resolve_model
from hetlora.flower.client import modules_digest
from hetlora.flower.members import Base
from hetlora.flower.settings import server_settings
from hetlora.flower.strategy import HetLora
from hetlora.models import empty_model, target_shapes
from hetlora.observer import Observer
from hetlora.report.page import write_report
from hetlora.report.text import round_line


class LogObserver(Observer):
    """The events of a run as lines of Flower's log."""

    def message(self, text: str) -> None:
        log(INFO, "%s", text)

    def start(self, cfg: Config, info: dict[str, Any]) -> None:
        self._rounds = cfg.rounds
        for name, value in info.items():
            log(INFO, "%s: %s", name.replace("_", " "), value)

    def round_start(self, round: int, total: int, names: list[str]) -> None:
        log(INFO, "round %d of %d: %s", round, total, ", ".join(names))

    def round_end(self, record: dict[str, Any]) -> None:
        log(INFO, "%s", round_line(record, self._rounds))


def describe_base(cfg: Config) -> Base:
    """The base model of the settings as far as a server must know it, from its configuration alone: no weights are read.

    Raises `ConfigError`: no such model, no configuration there, no target modules in it.

    >>> import tempfile
    >>> from hetlora import Config
    >>> from hetlora.flower import describe_base
    >>> from transformers import LlamaConfig
    >>> folder = tempfile.mkdtemp()
    >>> LlamaConfig(vocab_size=384, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2).save_pretrained(folder)
    >>> base = describe_base(Config(model=folder))
    >>> list(base.shapes.values()), base.parameters
    ([(16, 16), (16, 16), (16, 16), (16, 16)], 14896)
    """
    path = resolve_model(cfg)
    model = empty_model(cfg, path)
    shapes = target_shapes(model, cfg.target_modules)
    return Base(path, shapes, sum(p.numel() for p in model.parameters()), modules_digest(shapes))


def server_app() -> ServerApp:
    """A `ServerApp` whose run configuration holds the settings of `hetlora.Config` and of `hetlora.flower.settings.Waiting`, with '-' or '_'.

    The run's folder `output` is on the server: its log, checkpoints, report and adapters are those of `hetlora run`.

    >>> from hetlora.flower import server_app
    >>> server_app()
    <flwr.serverapp.server_app.ServerApp object at 0x...>
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        try:
            cfg, waiting = server_settings(context.run_config)
            HetLora(cfg, describe_base(cfg), waiting, LogObserver()).start(grid)
            log(INFO, "run folder: %s", cfg.output)
            log(INFO, "report: %s", write_report(cfg.output))
        except ConfigError as error:
            log(ERROR, "hetlora: error: %s", " ".join(str(error).split()))
            raise SystemExit(2) from None

    return app
