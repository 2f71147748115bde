"""The server's side: a Flower strategy under which the rounds of `hetlora.loop` ask nodes for what the simulation does in its own process."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Message, MessageType, MetricRecord, RecordDict
from flwr.common.constant import SUPERLINK_NODE_ID
from flwr.serverapp import Grid
from flwr.serverapp.strategy import FedAvg, Result

import hetlora_kernels as hk
from hetlora import loop
from hetlora.config import Config, ConfigError
from hetlora.deployed import fleet, messages
from hetlora.deployed.exchange import exchange
from hetlora.deployed.fleet import Round, read_reply
from hetlora.deployed.local import Base
from hetlora.deployed.settings import Waiting, seconds
from hetlora.deployed.wire import size, to_array
from hetlora.fleet import Progress
from hetlora.flower import secure, secure_server
from hetlora.flower.members import Members
from hetlora.flower.records import array_record, array_records
from hetlora.flower.replies import lifetime, replies_to, send
from hetlora.observer import Observer
from hetlora.ranks import Capability, StartingRanks, check_width
from hetlora.server import ServerState
from hetlora.training import Trained


@dataclass
class Turn(fleet.Turn):
    """What the loop asked for and the strategy sends.   sent: number of the message to each of `names`, '' where the SuperLink did not take it."""

    sent: list[str] = field(default_factory=list)


class HetLora(FedAvg):
    """HETLORA, and every method of `hetlora run` that its clients can follow, as a strategy of Flower's Message API.

    cfg: the settings of the run; `cfg.output` is the folder with its log, checkpoints, report and adapters.   base: from `server_app.describe_base`.
    waiting: how long to wait for clients and replies.   observer: receives progress.

    A round: each sampled node gets its own rank rows of the bank, trains, prunes and sends back what it kept. Every reply is checked before the bank is
    touched: records, shapes, types, bytes, ranks against those granted, finite values; what fails is named and left out of the round. Updates above the
    usual size are scaled (`clip_median`). Uploads are merged in name order, so that the result does not depend on who was first; the server holds the
    bank, the uploads of one round, and a few of Flower's messages at a time. The numbers are those of `hetlora run --no-cobatch`, bit for bit on equal
    machines.

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
        self._timeout = self.waiting.round_timeout

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
        if timeout is not None:
            self._timeout = seconds("timeout", timeout)
        members = Members(grid, self.base, self.cfg.rank_rule, self.waiting, Path(self.cfg.output), self.observer.message)
        clients = FlowerFleet(self, members)
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

        def keep(k: int, message: Message) -> None:
            found.replies[k], found.uploads[k], found.bytes_up[k] = read_reply(self.cfg, self.exchange, turn, turn.names[k], message.content)

        found.dropped |= self._hear(turn, replies, keep)
        self._round = found
        return None, MetricRecord({"arrived": len(found.replies), "bytes_up": sum(found.bytes_up.values())})

    def configure_evaluate(self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid) -> Iterable[Message]:
        """The whole bank to every client that is there."""
        turn = self._asked()
        return self._messages(turn, array_records(self.exchange.down(self.cfg, turn.whole(), turn.names)), MessageType.EVALUATE)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        """Keep what every client found on its own text."""
        turn = self._asked()
        found: dict[str, messages.Evaluated] = {}

        def keep(k: int, message: Message) -> None:
            found[turn.names[k]] = messages.evaluated(message.content)

        for k, why in self._hear(turn, replies, keep).items():
            self.observer.message(f"evaluation: {turn.names[k]} is left out, {why}")
        self._evaluated = found
        return MetricRecord({"clients": len(found)})

    def _asked(self) -> Turn:
        if self._turn is None:
            raise RuntimeError("HetLora: its rounds are led by start(); call that")
        return self._turn

    def _messages(self, turn: Turn, records: Iterable[ArrayRecord], kind: str) -> list[Message]:
        return [self._message(turn.number, name, _content(turn, name, own), kind) for name, own in zip(turn.names, records, strict=True)]

    def _ask(self, grid: Grid, turn: Turn, sent: list[Message]) -> Iterator[Message]:
        """Send them, and what comes back; each reply as soon as it is there."""
        turn.sent = send(grid, sent)
        return replies_to(grid, turn.sent, self._timeout)

    def _hear(self, turn: Turn, replies: Iterable[Message], keep: Callable[[int, Message], None]) -> dict[int, str]:
        """Give each client's answer to `keep` and let it go; why clients are left out, by their positions in the turn's names.

        The SuperLink answers in the place of a node that it has lost: from its own number, to the number of the message. Of any other node than
        those asked nothing counts, nor a second answer.
        """
        nodes = {self._node(name): k for k, name in enumerate(turn.names)}
        numbers = {number: k for k, number in enumerate(turn.sent) if number}
        left_out: dict[int, str] = {}
        lost = {k: "no reply: the SuperLink did not take the message to it; its node has left" for k, number in enumerate(turn.sent) if not number}
        for message in replies:
            if message.metadata.src_node_id == SUPERLINK_NODE_ID:
                k = numbers.get(message.metadata.reply_to_message_id)
                if k is not None and message.has_error():
                    lost[k] = f"no reply: {_line(message.error.reason or 'no reason given')}"
            elif (k := nodes.pop(message.metadata.src_node_id, None)) is not None:
                try:
                    if message.has_error():
                        raise ConfigError(f"its client failed: {message.error.reason or 'no reason given'}")
                    keep(k, message)
                except (ConfigError, ValueError) as error:
                    left_out[k] = _line(str(error))
        late = f"no reply within {self._timeout:g} s"
        return dict(sorted((left_out | {k: lost.get(k, late) for k in nodes.values()}).items()))

    def _message(self, number: int, name: str, content: RecordDict, kind: str) -> Message:
        return Message(content, self._node(name), kind, ttl=lifetime(self._timeout), group_id=str(number))


def _line(reason: str) -> str:
    return " ".join(reason.split())[:300]


class FlowerFleet(fleet.DeployedFleet):
    """The clients of a run behind Flower's grid, as `hetlora.fleet.Fleet`."""

    def __init__(self, strategy: HetLora, members: Members) -> None:
        super().__init__(strategy.base, members, "Flower")
        self.strategy, self.grid = strategy, members.grid
        self._round_evaluated: int | None = None
        self.train_metrics: dict[int, MetricRecord] = {}
        self.evaluate_metrics: dict[int, MetricRecord] = {}
        self.from_evaluate_fn: dict[int, MetricRecord] = {}

    def gathered(self) -> FlowerFleet:
        """Itself, when the run's clients are known; `ConfigError` where these are too few for secure aggregation."""
        super().gathered()
        if self.strategy.cfg.secure_aggregation:
            secure.sharing(self.strategy.cfg, min(len(self.names), self.strategy.cfg.clients_per_round))
        return self

    def present(self) -> list[str]:
        """Names of the clients that can train now; waits for as many as a round takes."""
        return self.members.present(secure.least_clients(self.strategy.cfg) if self.strategy.cfg.secure_aggregation else 1)

    def train(self, cfg: Config, state: ServerState, names: Sequence[str], number: int, lr: float, progress: Progress) -> Trained:
        if cfg.secure_aggregation:
            return self._train_masked(cfg, state, names, number, lr, progress)
        strategy, grid = self.strategy, self.grid
        strategy._turn = turn = Turn(state, list(names), number, lr)
        sent = list(strategy.configure_train(number, ArrayRecord(), ConfigRecord(), grid))
        down = [size(message.content.array_records[messages.ARRAYS]) for message in sent]
        _, metrics = strategy.aggregate_train(number, strategy._ask(grid, turn, sent))
        if metrics is not None:
            self.train_metrics[number] = metrics
        found = strategy._round
        progress(len(found.replies), len(names))
        return found.trained(cfg, turn, strategy.exchange, down)

    def _train_masked(self, cfg: Config, state: ServerState, names: Sequence[str], number: int, lr: float, progress: Progress) -> Trained:
        """Secure aggregation: of the uploads the server sees a sum."""
        strategy = self.strategy
        strategy._turn = turn = Turn(state, list(names), number, lr)

        def ask(kind: str, contents: dict[int, RecordDict]) -> secure_server.Answers:
            places, found = list(contents), dict[int, RecordDict]()
            asked = Turn(state, [names[place] for place in places], number, lr)
            sent = [strategy._message(number, name, content, kind) for name, content in zip(asked.names, contents.values(), strict=True)]

            def keep(k: int, message: Message) -> None:
                found[places[k]] = message.content

            lost = strategy._hear(asked, strategy._ask(self.grid, asked, sent), keep)
            return found, {places[k]: reason for k, reason in lost.items()}

        def orders(places: Sequence[int]) -> dict[int, RecordDict]:
            records = array_records(strategy.exchange.down(cfg, state, [names[place] for place in places]))
            return {place: _content(turn, names[place], arrays) for place, arrays in zip(places, records, strict=True)}

        sequences = {name: self.sequences(name) for name in names}
        trained, metrics = secure_server.train(cfg, state, names, number, ask, orders, sequences, strategy.observer.message)
        self.train_metrics[number] = metrics
        progress(len(trained.arrived), len(names))
        return trained

    def _evaluations(self, state: ServerState) -> dict[str, messages.Evaluated]:
        """What every client that is there finds under the bank of `state`; asked once a round."""
        if self._round_evaluated != state.round:
            strategy, grid = self.strategy, self.grid
            strategy._turn = turn = Turn(state, self.members.present(), state.round, 0.0)
            sent = list(strategy.configure_evaluate(state.round, ArrayRecord(), ConfigRecord(), grid))
            metrics = strategy.aggregate_evaluate(state.round, strategy._ask(grid, turn, sent))
            if metrics is not None:
                self.evaluate_metrics[state.round] = metrics
            self._round_evaluated = state.round
        return self.strategy._evaluated


def _content(turn: Turn, name: str, arrays: ArrayRecord) -> RecordDict:
    return RecordDict({messages.ARRAYS: arrays, messages.CONFIG: ConfigRecord(asdict(turn.order(name)))})


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
