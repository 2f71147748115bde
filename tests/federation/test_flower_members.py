"""Who takes part in a run through Flower: clients by name, nodes that come late, come back or cannot take part, and what is asked of the run itself."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import json
import pickle
import random
import re

import torch
from flower_grid import LocalGrid
from flower_runs import SIZES, base, change, deployed, from_node
from flwr.app import Error, Message, MessageType
from tiny import lines, tiny_clients, tiny_config, tiny_federation, tiny_model

from hetlora.config import ConfigError
from hetlora.deployed.local import Client, base_digest, base_model, own_text
from hetlora.flower import Base, HetLora, Waiting, client_app
from hetlora.loop import simulate

pytestmark = pytest.mark.usefixtures("no_waiting")


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
