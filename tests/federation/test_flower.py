"""Deployment through Flower, in one process: the rounds are those of the simulation, and nothing a node answers can hurt them."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import re
import weakref
from typing import ClassVar

import torch
from flower_grid import Clock, LocalGrid
from flower_runs import SIZES, base, change, deployed, from_node, to_array
from flwr.app import Error, Message, MessageType
from tiny import lines, tiny_config, tiny_federation

from hetlora.config import ConfigError
from hetlora.flower import HetLora, Waiting
from hetlora.flower import replies as replies_module
from hetlora.loop import simulate

pytestmark = pytest.mark.usefixtures("no_waiting")


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
