"""`python -m benchmarks.federation`: what is checked before figures are written, its tables, and the clients it compares with."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

from pathlib import Path

import torch
from flower_grid import LocalGrid
from flwr.app import Context, RecordDict

from benchmarks import federation, federation_memory, federation_peft, tables
from benchmarks.server import WrongResultError
from hetlora.config import Config
from hetlora.flower import Base, HetLora, Waiting


def record(way: str, seconds: list[float], tmp_path: Path, alone: dict | None = None) -> dict:
    (tmp_path / "adapter").write_bytes(b"1234")
    rounds = [{"seconds": one, "bytes_down": 3000, "bytes_up": 1000} for one in seconds]
    return federation.record(way, 8, rounds, tmp_path / "adapter", alone)


def test_the_tables_have_a_line_for_each_way_and_the_memory_over_the_uploads(tmp_path):
    made = {"op": "server memory", "clients": 1000, "upload_bytes": 300_000_000, "peak_extra_bytes": 600_000_000, "median_s": 2.0}
    alone = record(federation.ALONE, [3.0, 1.0, 2.0], tmp_path)
    other = record(federation.DEPLOYED, [30.0], tmp_path, alone)
    assert (alone["ratio"], other["ratio"], alone["bytes"], other["bytes"]) == (1.0, 15.0, 4000, 4000)
    data = {"results": [alone, other, made]}
    assert tables.federation_table(data)[2:] == [
        "| 8 | hetlora run --no-cobatch | 3 | 2 s | 1.0 x | 3.0 kB | 1.0 kB |",
        "| 8 | Flower deployment | 1 | 30 s | 15.0 x | 3.0 kB | 1.0 kB |",
    ]
    assert tables.uploads_table(data)[2:] == ["| 1000 | 300 MB | 600 MB | 2.00 x | 2 s |"]


def test_an_adapter_with_another_bit_gives_no_figure(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.write_bytes(b"0000")
    other.write_bytes(b"0001")
    federation.check(federation.DEPLOYED, one, one, {}, 8)
    with pytest.raises(WrongResultError, match="Flower deployment, 8 clients: its adapter is not that of hetlora run --no-cobatch"):
        federation.check(federation.DEPLOYED, other, one, {}, 8)


def test_a_way_that_cannot_be_taken_says_why(monkeypatch):
    monkeypatch.setattr(federation.importlib.util, "find_spec", lambda name: None if name == "ray" else name)
    assert federation.impossible(federation.SIMULATED, 8) == "ray not installed (pip install '.[simulation]')"
    assert federation.impossible(federation.OURS, 8) == ""
    assert "10000000 nodes take about 7500000 GiB" in federation.impossible(federation.DEPLOYED, 10_000_000)


def test_made_up_uploads_are_those_of_a_round(tmp_path):
    """Every one arrives and counts, with the bytes that its rank has."""
    grid = federation_memory.MadeUp(20)
    cfg = Config(ranks=federation_memory.RANKS, clients_per_round=20, rounds=1, output=str(tmp_path / "run"), device="cpu", train="adapters")
    base = Base("made up", federation_memory.SHAPES, 1, "same")
    found = HetLora(cfg, base, Waiting(min_clients=20, join_timeout=0)).start(grid)
    assert found.train_metrics_clientapp[1]["arrived"] == 20
    assert found.train_metrics_clientapp[1]["bytes_up"] == grid.uploads > 20 * 4 * 512 * 24 * 4


@pytest.mark.slow
def test_stock_clients_under_flowers_average_come_to_what_they_train_in_this_process(tmp_path):
    federation.make_model(tmp_path / "model")
    given = {**federation.settings(tmp_path, 3, 2), "output": str(tmp_path / "run"), "min-clients": 3}
    grid = LocalGrid(federation_peft.client, given, [{"partition-id": k} for k in range(3)])
    federation_peft.server(grid, Context(1, 0, {}, RecordDict(), given))
    adapter = tmp_path / "run" / "stock.pt"
    before = torch.get_num_threads()
    federation.check(f"{federation.SIMULATED}, stock PEFT", adapter, adapter, given, 3)
    torch.set_num_threads(before)
    trained = torch.load(adapter)
    assert any(float(own.abs().max()) > 0 for name, own in trained.items() if "lora_B" in name), "nothing was trained"
    torch.save({name: own * 1.001 for name, own in trained.items()}, adapter)
    with pytest.raises(WrongResultError, match="is off by 1"):
        federation.check(f"{federation.SIMULATED}, stock PEFT", adapter, adapter, given, 3)
    torch.set_num_threads(before)
