"""The server's side: an NVFLARE workflow under which the rounds of `hetlora.loop` ask sites for what the simulation does in its own process."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from nvflare.app_common.abstract.fl_model import FLModel
from nvflare.app_common.workflows.model_controller import ModelController

from hetlora import loop
from hetlora.config import Config, ConfigError
from hetlora.deployed import members, messages
from hetlora.deployed.fleet import DeployedFleet, Turn
from hetlora.deployed.local import Base, Kind, describe_base
from hetlora.deployed.log import LogObserver
from hetlora.deployed.messages import Sent
from hetlora.deployed.settings import Waiting, server_settings
from hetlora.deployed.wire import Arrays, size
from hetlora.fleet import Progress
from hetlora.nvflare.aggregator import HetLoraAggregator
from hetlora.nvflare.models import REFUSED, SETTINGS, content_of, to_model, words_of
from hetlora.ranks import Capability, RankRule, StartingRanks, check_width
from hetlora.report.page import write_report
from hetlora.server import ServerState
from hetlora.training import Trained


class HetLora(ModelController):
    """HETLORA, and every method of `hetlora run` that its clients can follow, as a workflow of NVFLARE.

    settings: those of `hetlora.Config`, `method`, and of `hetlora.flower.Waiting`, by name, with '-' or '_'. They travel to the clients. A relative `output`
    is in the job's run folder on the server.

    A round: each sampled site gets a task of its own with its own rank rows of the bank, trains, prunes and sends back what it kept. `HetLoraAggregator` checks
    every result before the bank is touched. Uploads are merged in name order. A site's name in NVFLARE is its name in the run. The numbers are those of
    `hetlora run --no-cobatch` on clients of these names, bit for bit on equal machines.

    Settings that cannot be used end the job with one line that says why.

    >>> from hetlora.nvflare import HetLora
    >>> HetLora({"model": "demo", "ranks": "2,4,8", "rounds": 2}).settings["ranks"]
    '2,4,8'
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        # a client that fails is left out of the round by name; without this NVFLARE ends the job
        super().__init__(persistor_id="", ignore_result_error=True, allow_empty_global_weights=True)
        self.settings = settings

    def run(self) -> None:
        """The whole run; NVFLARE calls it."""
        try:
            cfg, waiting = server_settings(self.settings)
            if not Path(cfg.output).is_absolute():
                if waiting.resume:
                    raise ConfigError(f"resume = True: expected an absolute output, got {cfg.output!r}, which is in the folder of this new job")
                cfg = cfg.model_copy(update={"output": str(Path(self.get_run_dir()) / cfg.output)})
            base = describe_base(cfg)
            if isinstance(rule := cfg.rank_rule, Capability):  # before clients measure for ranks that no module can have
                check_width(StartingRanks(rule.low, rule.high, {}), base.shapes)
            fleet = SiteFleet(self, cfg, base, waiting)
            loop.run_rounds(cfg, fleet.gathered, resume=waiting.resume, observer=LogObserver(self.info))
            self.info(f"run folder: {cfg.output}")
            self.info(f"report: {write_report(cfg.output)}")
        except Aborted:
            self.info("aborted; with `resume` and an absolute `output` a new job goes on from the last round")
        except ConfigError as error:
            self.panic(f"hetlora: error: {' '.join(str(error).split())}")

    def connected(self) -> list[str]:
        """Names of the sites that take part in the job and are there."""
        return sorted(client.name for client in self.engine.get_clients() if not self.get_client_disconnect_time(client.name))

    def ask(self, kind: Kind, asked: Mapping[str, Sent], timeout: float, keep: Callable[[FLModel], bool]) -> None:
        """Give each site its own task, and every result to `keep` as it comes; returns when all are there or `timeout` seconds are over."""
        for name, sent in asked.items():
            data = to_model(sent, **{SETTINGS: self.settings})
            seconds = max(1, math.ceil(timeout))  # to NVFLARE 0 is without an end
            self.send_model(task_name=kind, data=data, targets=[name], timeout=seconds, callback=keep)
        while self.get_num_standing_tasks():
            if self.abort_signal.triggered:
                raise Aborted
            time.sleep(self._task_check_period)

    def process_result_of_unknown_task(self, client: Any, task_name: str, client_task_id: str, result: Any, fl_ctx: Any) -> None:
        """A result after its time, where NVFLARE has not dropped it before: named, and not used."""
        self.warning(f"{client.name}: its result for {task_name!r} came too late and is not used")


class Aborted(Exception):
    """NVFLARE ends the job."""


class Sites(members.Members):
    """The clients of a run by the names of their sites, which NVFLARE vouches for."""

    def __init__(self, controller: HetLora, base: Base, rule: RankRule, waiting: Waiting, folder: Path) -> None:
        super().__init__(base, rule, waiting, folder, controller.info)
        self.controller = controller
        self._known: set[str] = set()  # sites that were asked who they are

    def _look(self, new: bool) -> list[str]:
        sites = self.controller.connected()
        self._known &= set(sites)
        for member in self.of.values():
            if member.node not in sites:
                member.node = None
        asked = {site: messages.question(measure=new) for site in sites if site not in self._known}
        answers: dict[str, FLModel] = {}

        def keep(model: FLModel) -> bool:
            answers[model.meta["client_name"]] = model
            return True

        if asked:
            self.controller.ask("introduce", asked, self.waiting.join_timeout, keep)
        self._known |= set(answers)
        for site, model in sorted(answers.items()):
            try:
                if (why := words_of(model).get(REFUSED)) is not None:
                    raise ConfigError(f"it failed: {why}")
                content = content_of(model)
                if (name := messages.introduction(content).client) != site:
                    raise ConfigError(f"it calls itself {name!r}; a client has the name of its site")
                self.meet(site, content, new)
            except ConfigError as error:
                self.say(f"{site} takes no part: {' '.join(str(error).split())[:500]}")
        return sorted(name for name, member in self.of.items() if member.node is not None)


class SiteFleet(DeployedFleet):
    """The clients of a run behind NVFLARE, as `hetlora.fleet.Fleet`."""

    def __init__(self, controller: HetLora, cfg: Config, base: Base, waiting: Waiting) -> None:
        super().__init__(base, Sites(controller, base, cfg.rank_rule, waiting, Path(cfg.output)), "NVFLARE")
        self.controller, self.cfg, self.timeout = controller, cfg, waiting.round_timeout
        self.aggregator = HetLoraAggregator(cfg)
        self.aggregator.missing = f"no result within {waiting.round_timeout:g} s; its own log says whether it failed"
        self._round_evaluated: int | None = None
        self._evaluated: dict[str, messages.Evaluated] = {}

    def train(self, cfg: Config, state: ServerState, names: Sequence[str], number: int, lr: float, progress: Progress) -> Trained:
        turn, collector = Turn(state, list(names), number, lr), self.aggregator
        rows = collector.exchange.down(cfg, state, turn.names)
        collector.begin(turn)
        self.controller.ask("train", _orders(turn, rows), self.timeout, collector.accept_model)
        collector.aggregate_model()
        progress(len(collector.found.replies), len(names))
        return collector.found.trained(cfg, turn, collector.exchange, [size(own) for own in rows])

    def _evaluations(self, state: ServerState) -> dict[str, messages.Evaluated]:
        if self._round_evaluated == state.round:
            return self._evaluated
        turn = Turn(state, self.present(), state.round, 0.0)
        found: dict[str, messages.Evaluated] = {}
        left_out = dict.fromkeys(turn.names, self.aggregator.missing)

        def keep(model: FLModel) -> bool:
            name = model.meta["client_name"]
            try:
                if (why := words_of(model).get(REFUSED)) is not None:
                    raise ConfigError(f"its client failed: {why}")
                found[name] = messages.evaluated(content_of(model))
            except ConfigError as error:
                left_out[name] = " ".join(str(error).split())[:300]
                return False
            return True

        bank = self.aggregator.exchange.down(self.cfg, turn.whole(), turn.names)
        self.controller.ask("evaluate", _orders(turn, bank), self.timeout, keep)
        for name in sorted(set(turn.names) - set(found)):
            self.controller.info(f"evaluation: {name} is left out, {left_out[name]}")
        self._round_evaluated, self._evaluated = state.round, dict(sorted(found.items()))
        return self._evaluated


def _orders(turn: Turn, arrays: Sequence[Arrays]) -> dict[str, Sent]:
    return {name: messages.order_message(turn.order(name), own) for name, own in zip(turn.names, arrays, strict=True)}
