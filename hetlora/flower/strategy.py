"""The server's side: a Flower strategy under which the rounds of `hetlora.loop` ask nodes for what the simulation does in its own process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, Metadata, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

import hetlora_kernels as hk
from hetlora import loop
from hetlora.config import Config, ConfigError
from hetlora.deployed import fleet, messages
from hetlora.deployed.exchange import Reply, exchange
from hetlora.deployed.fleet import Round, read_reply
from hetlora.deployed.local import Base
from hetlora.deployed.settings import Waiting
from hetlora.deployed.wire import size, to_array
from hetlora.fleet import Progress
from hetlora.flower.members import Members
from hetlora.flower.records import array_record, array_records
from hetlora.observer import Observer
from hetlora.ranks import Capability, StartingRanks, check_width
from hetlora.server import ServerState
from hetlora.training import Trained


@dataclass
class Turn(fleet.Turn):
    """What the loop asked for and the strategy sends.   asked: Flower's words on the message to each of `names`; it numbers a message when it sends it."""

    asked: list[Metadata] = field(default_factory=list)


class HetLora(FedAvg):
    """HETLORA, and every method of `hetlora run` that its clients can follow, as a strategy of Flower's Message API.

    cfg: the settings of the run; `cfg.output` is the folder with its log, checkpoints, report and adapters.   base: from `server_app.describe_base`.
    waiting: how long to wait for clients and replies.   observer: receives progress.

    A round: each sampled node gets its own rank rows of the bank, trains, prunes and sends back what it kept. Every reply is checked before the bank is
    touched: records, shapes, types, bytes, ranks against those granted, finite values; what fails is named and left out of the round. Updates above the
    usual size are scaled (`clip_median`). Uploads are merged in name order, so that the result does not depend on who was first; the server holds the
    bank and the uploads of one round. The numbers are those of `hetlora run --no-cobatch`, bit for bit on equal machines.

    Raises `ConfigError`: settings that only the simulation knows, too few clients, clients with different base models or modules.

    >>> from hetlora import Config
    >>> from hetlora.flower import Base, HetLora
    >>> HetLora(Config(merge="stack"), Base("demo", {"q_proj": (8, 8)}, 0, ""))
    Traceback (most recent call last):
        ...
    hetlora.errors.ConfigError: merge = 'stack': changes the base, which every deployed client holds itself; use merge = 'factors' or 'svd', or hetlora run
    """

    def __init__(self, cfg: Config, base: Base, waiting: Waiting | None = None, observer: Observer | None = None) -> None:
        super().__init__(min_train_nodes=1, min_evaluate_nodes=1, min_available_nodes=1)
        cfg.check()
        self.cfg, self.base, self.waiting = cfg, base, waiting or Waiting()
        self.observer = observer or Observer()
        self.exchange = exchange(cfg)
        self._turn: Turn | None = None
        self._round = Round()
        self._node: Callable[[str], int] = lambda name: 0
        self._evaluated: dict[str, messages.Evaluated] = {}

    def summary(self) -> None:
        """Nothing: the run says on what it works."""

    def start(
        self,
        grid: Grid,
        initial_arrays: ArrayRecord | None = None,
        num_rounds: int | None = None,
        timeout: float | None = None,
        train_config: ConfigRecord | None = None,
        evaluate_config: ConfigRecord | None = None,
        evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None] | None = None,
    ) -> Result:
        """Run or continue the federation; the arguments are Flower's. What the settings decide is refused where it says otherwise.

        timeout: seconds to wait for a round's replies, default `waiting.round_timeout`.   evaluate_fn: of (round, the global adapter in PEFT's names).
        """
        if initial_arrays:
            raise ConfigError("initial_arrays: the run draws its first adapter from its seed; leave them out")
        if num_rounds not in (None, self.cfg.rounds):
            raise ConfigError(f"num_rounds = {num_rounds}: the settings say rounds = {self.cfg.rounds}; leave it out")
        if train_config or evaluate_config:
            raise ConfigError("train_config, evaluate_config: clients take their settings from the app's run config; leave them out")
        if isinstance(rule := self.cfg.rank_rule, Capability):  # before clients measure for ranks that no module can have
            check_width(StartingRanks(rule.low, rule.high, {}), self.base.shapes)
        members = Members(grid, self.base, self.cfg.rank_rule, self.waiting, Path(self.cfg.output), self.observer.message)
        clients = FlowerFleet(self, members, timeout or self.waiting.round_timeout)
        self._node = members.node
        found = loop.run_rounds(self.cfg, clients.gathered, resume=self.waiting.resume, observer=_Evaluating(self, clients, evaluate_fn))
        return Result(_adapter(found.bank), clients.train_metrics, clients.evaluate_metrics, clients.from_evaluate_fn)

    # -- Flower's calls; the loop decides who, when and with what

    def configure_train(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """Each sampled node's rows and ranks."""
        turn = self._asked()
        return self._messages(turn, array_records(self.exchange.down(self.cfg, turn.state, turn.names)), MessageType.TRAIN)

    def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """Check every reply and keep what passes, in name order; the loop merges it. Returns the bytes and clients that arrived."""
        turn, found = self._asked(), Round()
        answers, lost = self._answers(turn, replies)
        for k, message in answers.items():
            try:
                reply, upload, received = self._read(turn, turn.names[k], message)
            except (ConfigError, ValueError) as error:
                found.dropped[k] = " ".join(str(error).split())[:300]
            else:
                found.replies[k], found.uploads[k], found.bytes_up[k] = reply, upload, received
        found.dropped |= lost
        self._round = found
        return None, MetricRecord({"arrived": len(found.replies), "bytes_up": sum(found.bytes_up.values())})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The whole bank to every client that is there."""
        turn = self._asked()
        return self._messages(turn, array_records(self.exchange.down(self.cfg, turn.whole(), turn.names)), MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Keep what every client found on its own text."""
        turn = self._asked()
        answers, left_out = self._answers(turn, replies)
        self._evaluated = {}
        for k, message in answers.items():
            try:
                if message.has_error():
                    raise ConfigError(f"its client failed: {message.error.reason or 'no reason given'}")
                self._evaluated[turn.names[k]] = messages.evaluated(message.content)
            except ConfigError as error:
                left_out[k] = " ".join(str(error).split())[:300]
        for k, why in sorted(left_out.items()):
            self.observer.message(f"evaluation: {turn.names[k]} is left out, {why}")
        return MetricRecord({"clients": len(self._evaluated)})

    def _asked(self) -> Turn:
        if self._turn is None:
            raise RuntimeError("HetLora: its rounds are led by start(); call that")
        return self._turn

    def _messages(self, turn: Turn, records: Iterable[ArrayRecord], kind: str) -> list[Message]:
        sent = [self._message(turn, name, own, kind) for name, own in zip(turn.names, records, strict=True)]
        turn.asked = [message.metadata for message in sent]
        return sent

    def _answers(self, turn: Turn, replies: Iterable[Message]) -> tuple[dict[int, Message], dict[int, str]]:
        """What each client answered, and why the others did not, by positions in the turn's names.

        The SuperLink answers in the place of a node that it has lost: from its own number, to the number of the message. Of any other node than
        those asked nothing counts, nor a second answer.
        """
        nodes = {self._node(name): k for k, name in enumerate(turn.names)}
        numbers = {metadata.message_id: k for k, metadata in enumerate(turn.asked) if metadata.message_id}
        answers: dict[int, Message] = {}
        lost: dict[int, str] = {}
        for message in replies:
            if message.metadata.src_node_id == SUPERLINK_NODE_ID:
                k = numbers.get(message.metadata.reply_to_message_id)
                if k is not None and message.has_error():
                    lost[k] = f"no reply: {' '.join((message.error.reason or 'no reason given').split())}"[:300]
            elif (k := nodes.pop(message.metadata.src_node_id, None)) is not None:
                answers[k] = message
        late = f"no reply within {self.waiting.round_timeout:g} s"
        return answers, {k: lost.get(k, late) for k in nodes.values()}

    def _message(self, turn: Turn, name: str, arrays: ArrayRecord, kind: str) -> Message:
        content = RecordDict({messages.ARRAYS: arrays, messages.CONFIG: ConfigRecord(asdict(turn.order(name)))})
        return Message(content, self._node(name), kind, group_id=str(turn.number))

    def _read(self, turn: Turn, name: str, message: Message) -> tuple[Reply, Any, int]:
        if message.has_error():
            raise ConfigError(f"its client failed: {message.error.reason or 'no reason given'}")
        return read_reply(self.cfg, self.exchange, turn, name, message.content)


class FlowerFleet(fleet.DeployedFleet):
    """The clients of a run behind Flower's grid, as `hetlora.fleet.Fleet`."""

    def __init__(self, strategy: HetLora, members: Members, timeout: float) -> None:
        super().__init__(strategy.base, members, "Flower")
        self.strategy, self.grid, self.timeout = strategy, members.grid, timeout
        self._round_evaluated: int | None = None
        self.train_metrics: dict[int, MetricRecord] = {}
        self.evaluate_metrics: dict[int, MetricRecord] = {}
        self.from_evaluate_fn: dict[int, MetricRecord] = {}

    def train(self, cfg: Config, state: ServerState, names: Sequence[str], number: int, lr: float, progress: Progress) -> Trained:
        strategy, grid = self.strategy, self.grid
        strategy._turn = Turn(state, list(names), number, lr)
        sent = list(strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
        down = [size(message.content.array_records[messages.ARRAYS]) for message in sent]
        _, metrics = strategy.aggregate_train(number, grid.send_and_receive(sent, timeout=self.timeout))
        if metrics is not None:
            self.train_metrics[number] = metrics
        found = strategy._round
        progress(len(found.replies), len(names))
        return found.trained(cfg, strategy._turn, strategy.exchange, down)

    def _evaluations(self, state: ServerState) -> dict[str, messages.Evaluated]:
        """What every client that is there finds under the bank of `state`; asked once a round."""
        if self._round_evaluated != state.round:
            strategy, grid = self.strategy, self.grid
            strategy._turn = Turn(state, self.present(), state.round, 0.0)
            sent = list(strategy.configure_evaluate(state.round, ArrayRecord(), ConfigRecord(), grid))
            metrics = strategy.aggregate_evaluate(state.round, grid.send_and_receive(sent, timeout=self.timeout))
            if metrics is not None:
                self.evaluate_metrics[state.round] = metrics
            self._round_evaluated = state.round
        return self.strategy._evaluated


def _adapter(bank: hk.AdapterBank) -> ArrayRecord:
    """The global adapter in PEFT's names."""
    return array_record({name: to_array(tensor) for name, tensor in bank.adapter(0).items()})


class _Evaluating(Observer):
    """Passes every event on to the strategy's observer, and calls the user's `evaluate_fn` after every round."""

    def __init__(self, strategy: HetLora, fleet: FlowerFleet, function: Callable[[int, ArrayRecord], MetricRecord | None] | None) -> None:
        for event in ("message", "start", "round_start", "local_step", "evaluate", "finish"):
            setattr(self, event, getattr(strategy.observer, event))
        self._strategy, self._fleet, self._function = strategy, fleet, function

    def round_end(self, record: dict[str, Any]) -> None:
        self._strategy.observer.round_end(record)
        turn = self._strategy._turn
        if self._function is not None and turn is not None:
            found = self._function(record["round"], _adapter(turn.state.bank))
            if found is not None:
                self._fleet.from_evaluate_fn[record["round"]] = found
