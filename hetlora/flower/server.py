"""The server's app: settings from Flower's run configuration, a strategy, and its progress in Flower's log."""

from __future__ import annotations

from logging import ERROR, INFO

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from flwr.supercore import log

from hetlora.config import ConfigError
from hetlora.deployed.local import describe_base
from hetlora.deployed.log import LogObserver
from hetlora.deployed.settings import server_settings
from hetlora.flower.strategy import HetLora
from hetlora.report.page import write_report


def server_app() -> ServerApp:
    """A `ServerApp` whose run configuration holds the settings of `hetlora.Config` and of `hetlora.flower.Waiting`, with '-' or '_'.

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
            HetLora(cfg, describe_base(cfg), waiting, LogObserver(lambda line: log(INFO, "%s", line))).start(grid)
            log(INFO, "run folder: %s", cfg.output)
            log(INFO, "report: %s", write_report(cfg.output))
        except ConfigError as error:
            log(ERROR, "hetlora: error: %s", " ".join(str(error).split()))
            raise SystemExit(2) from None

    return app
