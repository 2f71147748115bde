"""Deployment through Flower, in one process: the rounds are those of the simulation, and nothing a node answers can hurt them."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import json
import pickle
import random
import re
import weakref
from typing import ClassVar

import torch
from flower_grid import Clock, LocalGrid
from flwr.app import Array, Error, Message, MessageType
from tiny import lines, tiny_clients, tiny_config, tiny_federation, tiny_model

from hetlora.config import Config, ConfigError
from hetlora.deployed import wire
from hetlora.deployed.local import Client, base_digest, base_model, modules_digest, own_text
from hetlora.flower import Base, HetLora, Waiting, client_app
from hetlora.flower import replies as replies_module
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.observer import Observer

SIZES = [3, 5, 2, 7]
pytestmark = pytest.mark.usefixtures("no_waiting")


def to_array(tensor: torch.Tensor) -> Array:
    return Array(*wire.to_array(tensor))


def base(cfg: Config) -> Base:
    model = tiny_model()
    shapes = target_shapes(model, cfg.target_modules)
    return Base("tiny", shapes, sum(p.numel() for p in model.parameters()), modules_digest(shapes))


class Said(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def deployed(cfg: Config, spoil=None, waiting: Waiting | None = None, nodes: list[dict] | None = None, grid_of=LocalGrid):
    """(Flower's result, lines for the user, grid) of a run on nodes of this process."""
    clients = tiny_clients(SIZES)
    app = client_app(lambda cfg: tiny_model(), lambda cfg, node: clients[node.partition_id])
    grid = grid_of(app, cfg.model_dump(), nodes or [{"partition-id": k} for k in range(len(SIZES))], spoil)
    said = Said()
    waiting = waiting or Waiting(min_clients=len(SIZES), join_timeout=0)
    return HetLora(cfg, base(cfg), waiting, said).start(grid), said.lines, grid


PRIVATE = {"weights": "uniform", "dp_clipping_norm": 0.5, "dp_noise_multiplier": 0.3, "dp_secret": __file__}
METHODS = {
    "published": {},
    "modules": {"prune_scope": "module"},
    "owners": {"shared_rows": "owners", "weights": "samples"},
    "svd": {"merge": "svd"},
    "energy": {"merge": "energy", "energy": 0.7},
    "median": {"merge": "median", "weights": "uniform", "prune_lambda": 0.01},
    "dropout": {"dropout": 0.1, "optimizer": "sgd", "local_epochs": 1, "local_steps": 5},
    "fold": {"train": "fold", "gamma": 0.99, "download": "exact"},
    "fold in 8 bits": {"train": "fold", "gamma": 0.99, "weights": "samples"},
    "private fold": {"train": "fold", "gamma": 0.99, **PRIVATE},
    "private delta": {"merge": "delta", "gamma": 1.0, **PRIVATE, "dp_sampling": "poisson", "rounds": 6},
}


@pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
def test_a_deployed_run_has_the_bits_of_the_simulated_one(tmp_path, settings):
    cfg = tiny_config(tmp_path / "here", cobatch=False, **settings)
    simulate(cfg, federation=tiny_federation(SIZES))
    deployed(cfg.model_copy(update={"output": str(tmp_path / "there")}))

    ours, theirs = lines(tmp_path / "here"), lines(tmp_path / "there")
    for mine, other in zip(ours, theirs, strict=True):
        one, two = (record.pop("evaluation")["client_text"] for record in (mine, other))
        assert mine == other
        assert one["tokens"] == two["tokens"]
        if settings.get("download", cfg.download) == "exact" or cfg.train != "fold":
            assert one["loss"] == pytest.approx(two["loss"], rel=1e-6)
    for name in ("adapter/adapter_model.safetensors", "adapter/adapter_config.json"):
        assert (tmp_path / "here" / name).read_bytes() == (tmp_path / "there" / name).read_bytes()


# ---------------------------------------------------------------- what nodes may do wrong


def change(kind: str, reply):
    """A reply of node 12 that is wrong in one way."""
    if kind == "lost":
        return None
    if kind == "crash":
        return Message(Error(0, "it ran out of memory"), reply_to=reply_to(reply))
    if kind == "gone":  # as the SuperLink answers for a node whose heartbeats it misses
        return from_node(1, Message(Error(3, "Node Unavailable"), reply_to=reply_to(reply)))
    content = reply.content
    arrays, metrics, config = content.array_records["arrays"], content.metric_records["metrics"], content.config_records["config"]
    rows = arrays["rows"]
    tensor = torch.frombuffer(bytearray(rows.data), dtype=torch.float32)
    if kind == "nan":
        tensor[3] = float("nan")
        arrays["rows"] = to_array(tensor)
    elif kind == "huge":
        arrays["rows"] = to_array(tensor * 1e38)
    elif kind == "bytes":
        arrays["rows"] = to_array(tensor.repeat(100))
    elif kind == "short":
        arrays["rows"] = Array(rows.dtype, rows.shape, rows.stype, rows.data[:-4])
    elif kind == "type":
        arrays["rows"] = to_array(tensor.double())
    elif kind == "numpy":
        arrays["rows"] = Array(tensor.numpy())
    elif kind == "key":
        del arrays["rows"]
    elif kind == "more":
        arrays["extra"] = rows
    elif kind == "rank":
        config["ranks"] = [rank + 1 for rank in config["ranks"]]
    elif kind == "modules":
        config["ranks"] = config["ranks"][:1]
    elif kind == "no ranks":
        del config["ranks"]
    elif kind == "negative":
        metrics["tokens"] = -5
    elif kind == "no metrics":
        del content["metrics"]
    elif kind == "no arrays":
        del content["arrays"]
    return reply


def from_node(number: int, message):
    message.metadata.__dict__["_src_node_id"] = number
    return message


def reply_to(reply):
    return reply.asked


WRONG = {
    "lost": "no reply within 3600 s",
    "gone": "no reply: Node Unavailable",
    "crash": "its client failed: it ran out of memory",
    "nan": "update has non-finite values in model.layers.0.self_attn.q_proj",
    "huge": "update has non-finite values in",
    "bytes": "upload: expected float32 [",
    "short": "upload: expected float32 [",
    "type": "upload: expected float32 [",
    "numpy": "of kind 'numpy.ndarray'",
    "key": "upload: expected the arrays ['rows'], got []",
    "more": "upload: expected the arrays ['rows'], got ['extra', 'rows']",
    "rank": "in model.layers.0.self_attn.q_proj, expected",
    "modules": "ranks: expected one for each of 8 modules, got 1",
    "no ranks": "ranks: missing",
    "negative": "tokens: expected a whole number >= 1, got -5",
    "no metrics": "expected the record 'metrics'",
    "no arrays": "its reply has no record 'arrays'",
}


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_reply_is_named_and_left_out(tmp_path, kind):
    """Its round is that of the others alone, and the client stays in the run."""

    def spoil(node, message, reply):
        if node == 12 and message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "2":
            reply.asked = message
            return change(kind, reply)
        return reply

    cfg = tiny_config(tmp_path / "run", clients_per_round=4, rounds=2)
    _, said, _ = deployed(cfg, spoil)
    last = lines(tmp_path / "run")[-1]
    assert [drop["name"] for drop in last["dropped"]] == ["client1"]
    assert WRONG[kind] in last["dropped"][0]["reason"]
    assert f"round 2: client1 is left out, {last['dropped'][0]['reason']}" in said
    assert [line["name"] for line in last["clients"]] == ["client0", "client2", "client3"]
    assert last["evaluation"]["client_text"]["tokens"] > 0


@pytest.mark.parametrize(("kind", "part"), [(MessageType.TRAIN, "round 2"), (MessageType.EVALUATE, "evaluation")])
def test_a_reason_goes_to_the_client_that_it_is_of(tmp_path, kind, part):
    """Of four clients one is lost by the SuperLink and one is silent; a node that nobody asked fails."""

    class Grid(LocalGrid):
        def push_messages(self, messages):
            self.last = list(messages)
            return super().push_messages(self.last)

        def pull_messages(self, numbers):
            replies, asked = super().pull_messages(numbers), {message.metadata.dst_node_id: message for message in self.last}
            if any(message.metadata.message_type != kind or message.metadata.group_id != "2" for message in self.last):
                return replies
            gone = Message(Error(5, "Node Unavailable - Error Code 5"), reply_to=asked[12])
            stranger = Message(Error(0, "a stranger's error"), reply_to=asked[13])
            kept = [reply for reply in replies if reply.metadata.src_node_id in (11, 14)]
            return [from_node(77, stranger), from_node(1, gone), *kept]

    _, said, _ = deployed(tiny_config(tmp_path / "run", clients_per_round=4, rounds=2, eval_every=1), grid_of=Grid)
    assert [line for line in said if "is left out" in line and line.startswith(part)] == [
        f"{part}: client1 is left out, no reply: Node Unavailable - Error Code 5",
        f"{part}: client2 is left out, no reply within 3600 s",
    ]


def test_a_reply_is_let_go_when_it_is_taken_over(tmp_path, monkeypatch):
    """However many clients there are, the server holds no more of Flower's messages than one call gave."""
    monkeypatch.setattr(replies_module, "AT_ONCE", 1)

    class Watching(LocalGrid):
        given: ClassVar[list[weakref.ref]] = []
        alive: ClassVar[list[int]] = []

        def pull_messages(self, numbers):
            self.alive.append(sum(message() is not None for message in self.given))
            found = super().pull_messages(numbers)
            self.given += map(weakref.ref, found)
            return found

    _, _, grid = deployed(tiny_config(tmp_path / "run", clients_per_round=4, rounds=1), grid_of=Watching)
    trained = slice(8, 12)  # after the questions and the first evaluation
    assert grid.most_held == 1 and len(grid.alive) == 16
    assert max(grid.alive[trained]) <= 1


def test_a_node_that_has_left_is_named_at_once(tmp_path):
    """The SuperLink takes no message to it; the round does not wait."""

    class Leaving(LocalGrid):
        def push_messages(self, messages):
            messages = list(messages)
            if messages[0].metadata.message_type == MessageType.TRAIN and messages[0].metadata.group_id == "2":
                del self.nodes[12]
            return super().push_messages(messages)

    _, said, _ = deployed(tiny_config(tmp_path / "run", clients_per_round=4, rounds=2), grid_of=Leaving)
    assert "round 2: client1 is left out, no reply: the SuperLink did not take the message to it; its node has left" in said
    assert replies_module.time.now < Clock.BOOTED + 600


def test_a_reply_is_waited_for_until_its_time_is_over(tmp_path):
    """Of 50 s the last client takes 40 in every round."""

    class Slow(LocalGrid):
        def push_messages(self, messages):
            self.sent_at = replies_module.time.now
            return super().push_messages(messages)

        def pull_messages(self, numbers):
            last = int(replies_module.time.now < self.sent_at + 40)
            return super().pull_messages(list(numbers)[: len(numbers) - last])

    waiting = Waiting(min_clients=4, join_timeout=50, round_timeout=50)
    _, said, grid = deployed(tiny_config(tmp_path / "run", clients_per_round=4, rounds=2), grid_of=Slow, waiting=waiting)
    assert not [line for line in said if "left out" in line] and not grid.replies
    assert [len(record["clients"]) for record in lines(tmp_path / "run")[1:]] == [4, 4]


def test_what_comes_after_its_time_is_not_used(tmp_path):
    """Its round is that of the others; the client's next reply counts. A message lives longer than the server waits."""

    class Slow(LocalGrid):
        lives: ClassVar[set[float]] = set()
        pulled: ClassVar[list[str]] = []

        def push_messages(self, messages):
            messages = list(messages)
            self.lives |= {message.metadata.ttl for message in messages if message.metadata.message_type != MessageType.QUERY}
            return super().push_messages(messages)

        def pull_messages(self, numbers):
            numbers = list(numbers)
            self.pulled += numbers
            at = [k for k, asked in enumerate(self.asked) if asked == (12, MessageType.TRAIN)]
            late = f"message {at[1]}" if len(at) > 1 else ""  # of round 2
            return super().pull_messages([number for number in numbers if number != late or replies_module.time.now > Clock.BOOTED + 90000])

    waiting = Waiting(min_clients=4, join_timeout=0, round_timeout=80000)
    _, said, grid = deployed(tiny_config(tmp_path / "run", clients_per_round=4, rounds=3), grid_of=Slow, waiting=waiting)
    assert [line for line in said if "is left out" in line] == ["round 2: client1 is left out, no reply within 80000 s"]
    assert len(grid.replies) == 1 and len(lines(tmp_path / "run")[3]["clients"]) == 4
    assert grid.lives == {80060.0}


@pytest.mark.parametrize("seconds", [0, -1, float("nan"), float("inf"), True])
def test_a_time_that_is_none_is_refused(tmp_path, seconds):
    cfg = tiny_config(tmp_path / "run")
    with pytest.raises(ConfigError, match=re.escape(f"timeout: expected a number of seconds > 0, got {seconds!r}")):
        HetLora(cfg, base(cfg)).start(LocalGrid(None, {}, []), timeout=seconds)


def test_an_update_of_unusual_size_is_scaled_and_named(tmp_path):
    def spoil(node, message, reply):
        if node == 12 and message.metadata.message_type == MessageType.TRAIN:
            rows = reply.content.array_records["arrays"]["rows"]
            reply.content.array_records["arrays"]["rows"] = to_array(1e6 * torch.frombuffer(bytearray(rows.data), dtype=torch.float32))
        return reply

    _, said, _ = deployed(tiny_config(tmp_path / "run", clients_per_round=4, rounds=1), spoil)
    assert any("the update of client1 is scaled by" in line for line in said)


def test_a_round_without_any_reply_ends_the_run_and_it_goes_on(tmp_path):
    def silent(node, message, reply):
        return None if message.metadata.message_type == MessageType.TRAIN and message.metadata.group_id == "2" else reply

    cfg = tiny_config(tmp_path / "run", cobatch=False)
    with pytest.raises(ConfigError, match=r"round 2: no clients left.*no reply within 3600 s.*stands at round 1"):
        deployed(cfg, silent)
    deployed(cfg, waiting=Waiting(min_clients=4, join_timeout=0, resume=True))
    deployed(cfg.model_copy(update={"output": str(tmp_path / "whole")}))
    assert lines(tmp_path / "run") == lines(tmp_path / "whole")
    assert (tmp_path / "run/adapter/adapter_model.safetensors").read_bytes() == (tmp_path / "whole/adapter/adapter_model.safetensors").read_bytes()


# ---------------------------------------------------------------- who takes part


def test_clients_are_known_by_name_when_their_nodes_come_back(tmp_path):
    class Restarting(LocalGrid):
        """Node 12 goes away after its first round of training and comes back under another number."""

        def pull_messages(self, numbers):
            replies = super().pull_messages(numbers)
            if 12 in self.nodes and (12, MessageType.TRAIN) in self.asked:
                self.nodes[99] = self.nodes.pop(12)
            return replies

    cfg = tiny_config(tmp_path / "run", clients_per_round=4)
    _, said, grid = deployed(cfg, grid_of=Restarting)
    assert "client 'client1' is back, as node 99" in said
    deployed(cfg.model_copy(update={"output": str(tmp_path / "steady")}))
    assert lines(tmp_path / "run") == lines(tmp_path / "steady")
    assert grid.asked.count((99, MessageType.QUERY)) == 1


def introduced(**changes):
    def spoil(node, message, reply):
        if node == 12 and message.metadata.message_type == MessageType.QUERY:
            reply.content.config_records["config"].update(changes)
        return reply

    return spoil


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({"client": "client0"}, "client 'client0' is already there as node 11; give every client a name of its own"),
        ({"modules": "x"}, "client 'client1' has other target modules than 'tiny' has"),
        ({"version": "0.0"}, "client 'client1' runs hetlora 0.0, the server"),
        ({"client": "a\x1b[2Jb"}, "client: expected a printable name"),
        ({"client": "n" * 300}, "client: expected text of 1 to 200 characters"),
        ({"sequences": 0}, "sequences: expected a whole number >= 1, got 0"),
        ({"sequences": True}, "sequences: expected a whole number >= 1, got True"),
        ({"capability": float("inf")}, "client 'client1' says capability = inf; expected a finite number, or none"),
    ],
)
def test_a_node_that_cannot_take_part_is_named(tmp_path, changes, line):
    _, said, _ = deployed(tiny_config(tmp_path / "run", rounds=1), introduced(**changes), Waiting(min_clients=3, join_timeout=0))
    assert any(text.startswith("node 12 takes no part: ") and line in text for text in said)
    assert [client["name"] for client in json.loads((tmp_path / "run/clients.json").read_text())["clients"]] == ["client0", "client2", "client3"]


def test_clients_with_different_base_models_are_refused(tmp_path):
    with pytest.raises(ConfigError, match=r"1 of 4 clients hold another base model than the others: \['client1'\]"):
        deployed(tiny_config(tmp_path / "run"), introduced(base="0" * 32))


def test_the_digest_of_a_base_tells_models_apart_and_not_their_types():
    assert base_digest(tiny_model()) == base_digest(tiny_model(torch.bfloat16)) == base_digest(tiny_model(torch.float64))
    assert base_digest(tiny_model()) != base_digest(tiny_model(seed=1))


def test_a_node_that_is_lost_before_it_says_who_it_is_is_asked_again(tmp_path):
    first = []

    def spoil(node, message, reply):
        if node == 12 and message.metadata.message_type == MessageType.QUERY and not first:
            first.append(node)
            return from_node(1, Message(Error(5, "Node Unavailable"), reply_to=message))
        return reply

    _, said, _ = deployed(tiny_config(tmp_path / "run", rounds=1), spoil, Waiting(min_clients=4, join_timeout=60))
    assert "node 12 takes no part: it failed: Node Unavailable" in said
    assert [client["name"] for client in json.loads((tmp_path / "run/clients.json").read_text())["clients"]] == [f"client{k}" for k in range(4)]


def test_a_late_client_waits_for_the_next_run(tmp_path):
    class Growing(LocalGrid):
        def pull_messages(self, numbers):
            replies = super().pull_messages(numbers)
            if any(kind == MessageType.TRAIN for _, kind in self.asked):
                self.nodes.setdefault(98, {"partition-id": 3})
            return replies

    _, said, _ = deployed(
        tiny_config(tmp_path / "run"), nodes=[{"partition-id": k} for k in range(3)], waiting=Waiting(min_clients=3, join_timeout=0), grid_of=Growing
    )
    assert "node 98 takes no part: client 'client3' joined after the run had begun; it can take part in the next one" in said


def test_too_few_clients_are_waited_for_and_then_named(tmp_path):
    with pytest.raises(ConfigError, match=r"4 of 5 clients joined within 0 s \(client0, client1, client2, client3\); start more nodes, lower min-clients"):
        deployed(tiny_config(tmp_path / "run"), waiting=Waiting(min_clients=5, join_timeout=0))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"merge": "stack"}, "merge = 'stack': changes the base"),
        ({"train": "full", "weights": "samples", "ranks": "powerlaw:5:50", "gamma": 0.99}, "train = 'full': runs in simulation only"),
        ({"held_out_clients": 1}, "held_out_clients = 1: evaluated in simulation only"),
        ({"rouge_examples": 2, "prompt_field": "q"}, "rouge_examples = 2: evaluated in simulation only"),
    ],
)
def test_what_only_the_simulation_knows_is_refused(tmp_path, settings, reason):
    with pytest.raises(ConfigError, match=re.escape(reason)):
        HetLora(tiny_config(tmp_path / "run", **settings), Base("tiny", {}, 0, ""))


@pytest.mark.slow
def test_two_hundred_clients_of_which_a_third_fail_in_every_round_lose_nothing(tmp_path):
    """20 rounds of 20 clients; a node that fails does so by error, silence or a NaN, in turn."""
    clients = tiny_clients([2] * 200)
    failing = random.Random(0)
    failed: dict[str, list[str]] = {}

    def spoil(node, message, reply):
        if message.metadata.message_type == MessageType.TRAIN and failing.random() < 0.3:
            failed.setdefault(message.metadata.group_id, []).append(clients[node - 11].name)
            reply.asked = message
            return change(("crash", "lost", "nan")[node % 3], reply)
        return reply

    cfg = tiny_config(tmp_path / "run", rounds=20, clients_per_round=20, local_steps=1, eval_every=20, save_clients=False, ranks="powerlaw:1:4:0.8")
    model = tiny_model()
    app = client_app(lambda cfg: model, lambda cfg, node: clients[node.partition_id])
    grid = LocalGrid(app, cfg.model_dump(), [{"partition-id": k} for k in range(200)], spoil)
    HetLora(cfg, base(cfg), Waiting(min_clients=200, join_timeout=0)).start(grid)
    rounds = lines(tmp_path / "run")[1:]
    for record in rounds:
        gone = [drop["name"] for drop in record["dropped"]]
        assert sorted(gone) == sorted(failed.get(str(record["round"]), []))
        assert len(gone) + len(record["clients"]) == 20
    assert len(rounds) == 20 and sum(map(len, failed.values())) > 80


def test_the_course_of_a_deployed_run_is_that_of_the_simulated_one(tmp_path):
    """From an adapter, with warm-up, lengthened from 2 rounds to 3, ended with the best round: the same adapter and lines."""
    simulate(tiny_config(tmp_path / "first", lr=0.05), federation=tiny_federation(SIZES), quiet=True)
    settings = {"cobatch": False, "lr": 20.0, "warmup_rounds": 1, "keep_best": True, "init_adapter": str(tmp_path / "first" / "adapter")}
    ours = simulate(tiny_config(tmp_path / "here", **settings), federation=tiny_federation(SIZES), quiet=True)
    assert ours.summary["best_round"] < 3
    deployed(tiny_config(tmp_path / "there", **settings, rounds=2))
    waiting = Waiting(min_clients=len(SIZES), join_timeout=0, resume=True)
    deployed(tiny_config(tmp_path / "there", **settings), waiting=waiting)
    for one, two in zip(lines(tmp_path / "here"), lines(tmp_path / "there"), strict=True):
        mine, theirs = (record.pop("evaluation")["client_text"]["loss"] for record in (one, two))
        assert one == two and mine == pytest.approx(theirs, rel=1e-6)
    assert "reached through Flower" in json.loads((tmp_path / "there" / "versions.json").read_text())["clients"]
    summary = json.loads((tmp_path / "there" / "summary.json").read_text())
    assert summary["best_round"] == ours.summary["best_round"]
    assert (tmp_path / "here/adapter/adapter_model.safetensors").read_bytes() == (tmp_path / "there/adapter/adapter_model.safetensors").read_bytes()
    known = {client["name"]: client["perplexity_after"] for client in ours.summary["clients"]}
    assert {client["name"]: client["perplexity_after"] for client in summary["clients"]} == pytest.approx(known, rel=1e-6)


def test_what_answers_for_a_client_travels_between_processes():
    """Flower's simulation pickles the app for every message; its model stays in the process."""
    client = pickle.loads(pickle.dumps(Client(base_model, own_text, print)))
    assert (client._model, client._data) == (base_model, own_text)
