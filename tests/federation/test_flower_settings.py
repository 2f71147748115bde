"""What travels between a server and its nodes, and which settings each of them may give."""

from __future__ import annotations

import pytest

pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")

from pathlib import Path

import torch
from flwr.app import Array
from tiny import SIZES, tiny_config, tiny_federation, tiny_state

from hetlora import server
from hetlora.config import ConfigError
from hetlora.deployed.exchange import EXCHANGES
from hetlora.deployed.settings import Node, client_settings, server_settings
from hetlora.deployed.wire import from_array, size, to_array
from hetlora.flower import Waiting
from hetlora.flower.records import array_records


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.uint8])
def test_arrays_carry_every_bit(dtype):
    bits = torch.randint(-(2**7), 2**7, (6, 8 * dtype.itemsize), dtype=torch.int8, generator=torch.Generator().manual_seed(0)).view(dtype)
    array = to_array(bits)
    back = from_array(Array(array.dtype, array.shape, array.stype, bytes(array.data)), bits.shape, dtype, "x")
    assert torch.equal(back.view(torch.int8), bits.view(torch.int8))


def test_clients_of_different_ranks_share_the_arrays_of_the_rows_they_share():
    federation = tiny_federation(SIZES)
    state = tiny_state(federation, [2, 4, 4, 8])
    records = array_records(EXCHANGES["adapters"].down(tiny_config(Path("run")), state, list(state.ranks)))
    assert [list(record) for record in records] == [["rows 0:2"], *[["rows 0:2", "rows 2:4"]] * 2, ["rows 0:2", "rows 2:4", "rows 4:8"]]
    assert [size(record) for record in records] == [server.distribute(state, [name]).num_bytes(0) for name in state.ranks]
    distinct = {array.object_id: len(array.data) for record in records for array in record.values()}
    assert sum(distinct.values()) == state.bank.num_bytes(0)  # a row is stored once, whoever gets it


def test_a_node_may_set_where_its_files_lie_and_nothing_of_the_method():
    cfg, node = client_settings({"lr": 0.01, "min-clients": 3, "data": "stdlib"}, {"client": "me", "data": "/mine", "num-partitions": 4})
    assert (cfg.lr, cfg.data, node) == (0.01, "/mine", Node("me"))
    with pytest.raises(ConfigError, match=r"node config: 'lr' is not a node's to set; a node has client, partition_id, model, data"):
        client_settings({}, {"lr": 1.0})
    with pytest.raises(ConfigError, match="did you mean 'client'"):
        client_settings({}, {"cleint": "me"})


WRONG_WAITING = [
    ({"min-clients": 0}, "run config: min_clients: expected a number >= 1, got 0"),
    ({"resume": "yes"}, "run config: resume: expected true or false, got 'yes'"),
    ({"round-timeout": 0}, "run config: round_timeout: expected a number of seconds > 0, got 0"),
    ({"round-timeout": float("nan")}, "run config: round_timeout: expected a number of seconds > 0, got nan"),
    ({"round-timeout": "60"}, "run config: round_timeout: expected a number of seconds > 0, got '60'"),
    ({"join-timeout": -1}, "run config: join_timeout: expected a number of seconds >= 0, got -1"),
]


def test_the_server_reads_its_waiting_beside_the_settings():
    cfg, waiting = server_settings({"min-clients": 3, "round-timeout": 5, "lr": 0.01, "resume": True})
    assert (cfg.lr, waiting) == (0.01, Waiting(3, 600.0, 5, True))
    for wrong, text in WRONG_WAITING:
        with pytest.raises(ConfigError, match=text):
            server_settings(wrong)
    for cohort in ({"cuda-graph": True}, {"clients-at-once": 2}):
        with pytest.raises(ConfigError, match=r"run config: c.* = (True|2): .* deployed clients train one at a time; leave it out"):
            server_settings(cohort)
    with pytest.raises(ConfigError, match="unknown setting 'min_client'"):
        server_settings({"min-client": 3})


def test_a_run_is_the_method_that_hetlora_run_would_take():
    assert server_settings({})[0].train == "fold"
    assert client_settings({"method": "hetlora"}, {})[0].train == "adapters"
    assert server_settings({"merge": "svd"})[0].train == "adapters"
    with pytest.raises(ConfigError, match="method = 'hetlora' has other values of merge"):
        server_settings({"method": "hetlora", "merge": "svd"})
    with pytest.raises(ConfigError, match="method = 'fold' has other values of weights"):
        server_settings({"method": "fold", "weights": "uniform"})
    stepped = server_settings({"method": "fold", "server-optimizer": "fedavgm"})[0], server_settings({"server-optimizer": "fedavgm"})[0]
    assert [(cfg.train, cfg.server_optimizer) for cfg in stepped] == [("fold", "fedavgm")] * 2, "an option of any method says nothing about which"
    private = server_settings({"method": "fold", "weights": "uniform", "dp-clipping-norm": 0.5, "dp-noise-multiplier": 1.0})[0]
    assert (private.train, private.weights, private.cobatch) == ("fold", "uniform", False), "differential privacy takes equal weights and clients alone"
