"""Deployed runs that grant ranks by what devices measure."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

import json
import math

from flower_grid import LocalGrid
from tiny import capable, lines, tiny_clients, tiny_config, tiny_federation, tiny_model

from hetlora.config import Config, ConfigError
from hetlora.deployed import device
from hetlora.deployed import members as members_module
from hetlora.deployed.local import modules_digest
from hetlora.flower import Base, HetLora, Waiting, client_app
from hetlora.loop import simulate
from hetlora.models import target_shapes
from hetlora.observer import Observer
from hetlora.ranks import Device
from hetlora.report.page import write_report


@pytest.fixture(autouse=True)
def _own_cache(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(members_module, "POLL", 0.01)


SIZES = [3, 5, 2, 7]
DEVICES = [(8, 1.0), (8, 2.0), (5, 1.0), (8, 4.0)]  # T = 2
RANKS = [8, 8, 5, 4]


class Said(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


def deployed(cfg: Config, spoil=None, waiting: Waiting | None = None, grid_of=LocalGrid, data=None):
    clients, model = tiny_clients(SIZES), tiny_model()
    app = client_app(lambda cfg: model, data or (lambda cfg, node: clients[node.partition_id]))
    grid = grid_of(app, cfg.model_dump(), [{"partition-id": k} for k in range(len(SIZES))], spoil)
    said, shapes = Said(), target_shapes(model, cfg.target_modules)
    base = Base("tiny", shapes, sum(p.numel() for p in model.parameters()), modules_digest(shapes))
    HetLora(cfg, base, waiting or Waiting(min_clients=len(SIZES), join_timeout=0), said).start(grid)
    return said.lines


class Restarting(LocalGrid):
    """Node 12 goes away after its first round of training and comes back under another number."""

    def pull_messages(self, numbers):
        replies = super().pull_messages(numbers)
        if 12 in self.nodes and (12, "train") in self.asked:
            self.nodes[99] = self.nodes.pop(12)
        return replies


def measures(monkeypatch, devices):
    """Nodes find these, in the order in which they are asked."""
    found = iter(devices)
    monkeypatch.setattr(device, "measure", lambda *given: (Device(*next(found)), "measured"))


def test_granted_ranks_are_told_kept_and_those_that_clients_train_with(tmp_path, monkeypatch):
    measures(monkeypatch, DEVICES)
    cfg = tiny_config(tmp_path / "run", ranks="capability:2:8", cobatch=False, clients_per_round=4)
    said = deployed(cfg)
    at = said.index("ranks by what devices measured: 8 rows where a step takes 2 s (the median of 4 clients) or less, fewer in proportion")
    assert said[at + 1 : at + 5] == [
        "device of client0: memory for rank 8, 1 s a step; rank 8",
        "device of client1: memory for rank 8, 2 s a step; rank 8",
        "device of client2: memory for rank 5, 1 s a step; rank 5",
        "device of client3: memory for rank 8, 4 s a step; rank 4",
    ]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert [(client["rank_start"], client["device"]) for client in summary["clients"]] == [
        (rank, {"rank": holds, "seconds": seconds}) for rank, (holds, seconds) in zip(RANKS, DEVICES, strict=True)
    ]
    page = write_report(tmp_path / "run").read_text()
    assert "<th>device</th>" in page and "memory for rank 5, 1 s a step" in page

    simulate(tiny_config(tmp_path / "listed", ranks=RANKS, cobatch=False, clients_per_round=4, gamma=1.0), federation=tiny_federation(SIZES), quiet=True)
    measures(monkeypatch, DEVICES)
    deployed(tiny_config(tmp_path / "same", ranks="capability:2:8", cobatch=False, clients_per_round=4, gamma=1.0))
    adapter = "adapter/adapter_model.safetensors"
    assert (tmp_path / "listed" / adapter).read_bytes() == (tmp_path / "same" / adapter).read_bytes()


def test_granted_ranks_stay_when_clients_come_back(tmp_path, monkeypatch):
    """A server that starts again reads what it was told before; a node that comes back is not asked to measure again, which would fail here."""
    measures(monkeypatch, DEVICES)
    cfg = tiny_config(tmp_path / "run", ranks="capability:2:8", clients_per_round=4, gamma=1.0, rounds=2)
    said = deployed(cfg, grid_of=Restarting)
    assert "client 'client1' is back, as node 99" in said
    more = deployed(cfg.model_copy(update={"rounds": 3}), waiting=Waiting(min_clients=4, join_timeout=0, resume=True))
    assert "device of client1: memory for rank 8, 2 s a step; rank 8" in more
    assert [[line["rank"] for line in record["clients"]] for record in lines(tmp_path / "run")[1:]] == [RANKS] * 3


@pytest.mark.parametrize(
    ("told", "line"),
    [
        ({"step_seconds": math.nan}, "client 'client1' says that a step takes nan s"),
        ({"step_seconds": -1.0}, "client 'client1' says that a step takes -1.0 s"),
        ({"device_rank": 1}, "client 'client1' holds rank 1, and the least of 'capability:2:8' is 2"),
        ({"device_rank": 0}, "client 'client1' measured nothing"),
        ({"device_rank": -3}, "device_rank: expected a whole number >= 0, got -3"),
        ({"step_seconds": "fast"}, "step_seconds: expected a number, got fast"),
        ({"step_seconds": True}, "step_seconds: expected a number, got True"),
        ({"device_rank": True}, "device_rank: expected a whole number >= 0, got True"),
        ({"unmeasured": "a\x1b[2Jb"}, "unmeasured: expected printable text"),
        ({"unmeasured": "no memory"}, "client 'client1' cannot be given a rank: no memory"),
    ],
)
def test_what_a_client_says_of_its_device_is_checked(tmp_path, monkeypatch, told, line):
    def spoil(node, message, reply):
        if node == 12 and message.metadata.message_type == "query":
            reply.content.config_records["config"].update(told)
        return reply

    measures(monkeypatch, DEVICES)
    said = deployed(tiny_config(tmp_path / "run", ranks="capability:2:8", rounds=1), spoil, Waiting(min_clients=3, join_timeout=0))
    assert any(text.startswith("node 12 takes no part: ") and line in text for text in said)
    assert [client["name"] for client in json.loads((tmp_path / "run/clients.json").read_text())["clients"]] == ["client0", "client2", "client3"]


@pytest.mark.parametrize(("spec", "kept"), [("fixed:4", None), ("capability:2:6", {"rank": 6, "seconds": 1.0})])
def test_what_no_rule_asks_for_and_ranks_above_the_largest_are_not_kept(tmp_path, monkeypatch, spec, kept):
    def spoil(node, message, reply):
        if node == 12 and message.metadata.message_type == "query":
            reply.content.config_records["config"].update({"device_rank": 2**40, "step_seconds": 1.0 if kept else math.nan})
        return reply

    measures(monkeypatch, DEVICES)
    deployed(tiny_config(tmp_path / "run", ranks=spec, rounds=1), spoil)
    for name in ("clients.json", "summary.json"):
        text = (tmp_path / "run" / name).read_text()
        assert [client.get("device") for client in json.loads(text)["clients"] if client["name"] == "client1"] == [kept]
    assert "NaN" not in (tmp_path / "run/clients.json").read_text()


def test_a_client_that_does_not_hold_the_least_rank_says_so_and_takes_no_part(tmp_path, monkeypatch):
    real, asked = device.free_memory, []

    def little_on_the_second(where):
        asked.append(where)
        return (1, "told") if len(asked) == 2 else real(where)

    monkeypatch.setattr(device, "free_memory", little_on_the_second)
    said = deployed(tiny_config(tmp_path / "run", ranks="capability:2:8", rounds=1, seq_len=16), waiting=Waiting(min_clients=3, join_timeout=0))
    line = "node 12 takes no part: client 'client1' cannot be given a rank: this device does not hold rank 2, the least of 'capability:2:8'"
    assert any(text.startswith(line) and text.endswith("or free memory") for text in said)


def test_a_client_with_a_rank_stays_in_the_run_however_little_memory_it_has_later(tmp_path, monkeypatch):
    """By the real measure: a node that comes back within the run, and all of them when the run is resumed."""
    real, free = device.free_memory, []
    monkeypatch.setattr(device, "free_memory", lambda where: (1, "told") if free else real(where))

    class Poorer(Restarting):
        def pull_messages(self, numbers):
            replies = super().pull_messages(numbers)
            if 99 in self.nodes and not free:
                free.append(1)
            return replies

    cfg = capable(tmp_path, clients_per_round=4, gamma=1.0, rounds=2)
    said = deployed(cfg, grid_of=Poorer)
    assert free and "client 'client1' is back, as node 99" in said
    more = deployed(cfg.model_copy(update={"rounds": 3}), waiting=Waiting(min_clients=4, join_timeout=0, resume=True))
    assert not [line for line in (*said, *more) if "takes no part" in line or "left out" in line]
    assert [len(record["clients"]) for record in lines(tmp_path / "run")[1:]] == [4, 4, 4]


def test_a_client_that_has_joined_is_not_lost_when_it_comes_back_poorer_before_the_run_begins(tmp_path, monkeypatch):
    """The server asks for a measure until the run begins, and keeps the first."""
    real, asked = device.free_memory, []

    def little_after_the_fourth(where):
        asked.append(where)
        return (1, "told") if len(asked) > 4 else real(where)

    class Late(LocalGrid):
        """Node 12 comes back under another number at the second look."""

        looks = 0

        def get_node_ids(self):
            self.looks += 1
            if self.looks == 2:
                self.nodes[99] = self.nodes.pop(12)
            return super().get_node_ids()

    monkeypatch.setattr(device, "free_memory", little_after_the_fourth)
    monkeypatch.setattr(members_module.Members, "_wait", lambda self, *given, real=members_module.Members._wait: self._look(given[2]) and real(self, *given))
    said = deployed(capable(tmp_path, clients_per_round=4, rounds=1), grid_of=Late)
    assert len(asked) == 5 and "client 'client1' is back, as node 99" in said
    assert len(lines(tmp_path / "run")[1]["clients"]) == 4


def test_a_measure_is_taken_before_the_text_is_read(tmp_path, monkeypatch):
    """So that no rank follows from text that the loader reads when it is called: docs/privacy.md says where that holds."""
    clients, happened = tiny_clients(SIZES), []
    real = device.measure
    monkeypatch.setattr(device, "measure", lambda *given: happened.append("measured") or real(*given))

    def data(cfg, node):
        happened.append("read")
        return clients[node.partition_id]

    deployed(tiny_config(tmp_path / "run", ranks="capability:2:8", rounds=1, seq_len=16, eval_every=1), data=data)
    assert happened[:8] == ["measured", "read"] * 4 and "measured" not in happened[8:]


def test_ranks_above_the_width_of_a_module_are_refused_before_any_client_measures(tmp_path, monkeypatch):
    measures(monkeypatch, [])
    with pytest.raises(ConfigError, match=r"ranks: rank 1000000 is above the width \d+ of module"):
        deployed(tiny_config(tmp_path / "run", ranks="capability:2:1000000"))
    assert not (tmp_path / "run").exists()
