"""What the settings of ranks and pruning mean for a run is in its first lines, and its bytes are compared with a rank that a client has."""

from __future__ import annotations

import pytest
from tiny import SIZES, lines, tiny_config, tiny_federation

from hetlora.config import Config
from hetlora.loop import simulate
from hetlora.observer import Observer

UNPRUNED = {name: Config.model_fields[name].default for name in ("gamma", "prune_lambda")}


class Start(Observer):
    def start(self, cfg, info) -> None:
        self.info = info


def started(folder, **settings):
    seen = Start()
    result = simulate(
        tiny_config(folder, **{"rounds": 1, "ranks": "2,2,6", "clients_per_round": 2, **settings}), observer=seen, federation=tiny_federation(SIZES[:3])
    )
    return seen.info, result


def test_they_say_the_ranks_who_can_prune_and_what_bytes_are_compared_with(tmp_path):
    info, _ = started(tmp_path / "a", gamma=0.5, prune_lambda=2.0)
    assert info["ranks"] == "2..6, mean 3.3; 2 of 3 clients have the least; the server's bank has 6 rows"
    assert info["pruning"] == "1 of 3 clients have rows to prune, by gamma = 0.5 and lambda = 2"
    assert info["bytes"] == "compared with HomLoRA at rank 6, the largest that a client has"
    said = started(tmp_path / "f", gamma=0.5, prune_lambda=2.0, merge="energy", energy=0.5)[0]["pruning"]
    assert said.startswith("1 of 3 clients have rows to prune") and said.endswith(
        "; those whose last rows merge = 'energy' cut never do, as zeros have no norm to fall"
    )
    assert started(tmp_path / "b", gamma=1.0)[0]["pruning"].startswith("0 of 3 clients")
    assert started(tmp_path / "c", ranks="fixed:4")[0]["ranks"] == "4..4, mean 4.0; the same for all; the server's bank has 4 rows"
    assert "pruning" not in started(tmp_path / "d", train="fold", weights="samples", **UNPRUNED)[0]
    info, _ = started(tmp_path / "e", train="full", weights="samples", ranks="powerlaw:5:50", **UNPRUNED)
    assert "full fine-tuning" in info["ranks"] and not {"pruning", "bytes"} & set(info)


def test_a_draw_that_gives_all_clients_one_rank_says_what_would_not(tmp_path):
    """README's command on five clients gave each of them rank 5, and no word of another way."""
    info, _ = started(tmp_path / "a", ranks="powerlaw:2:8:0.05")
    assert info["ranks"] == "2..2, mean 2.0; the same for all; the server's bank has 8 rows", "the quantiles are one rank too"
    info, _ = started(tmp_path / "b", ranks="powerlaw:2:8:0.1")
    assert info["ranks"].startswith("2..2, mean 2.0; the same for all, as the draw fell (--ranks dealt:2:8:0.1 would give 2..3); ")
    info, _ = started(tmp_path / "c", ranks="dealt:2:8:0.1")
    assert info["ranks"].startswith("2..3, ")


@pytest.mark.parametrize("spec", ["powerlaw:2:8:0.3", "dealt:2:8:0.3"])
def test_bytes_are_those_of_homlora_at_the_largest_rank_that_a_client_has(tmp_path, spec):
    info, result = started(tmp_path / "a", ranks=spec)
    assert info["ranks"].endswith("the server's bank has 8 rows")
    largest = max(client["rank_start"] for client in result.summary["clients"])
    assert result.summary["homlora_rank"] == largest < 8, "or the bound and the largest rank are one, and this says nothing"
    record = lines(tmp_path / "a")[1]
    per_row = sum(m + n for m, n in result.bank.shapes.values()) * result.bank.dtype.itemsize
    assert record["bytes_up_homlora"] == record["bytes_down_homlora"] == 2 * largest * per_row
    _, same = started(tmp_path / "b", ranks=f"fixed:{largest}", gamma=1.0)
    assert same.summary["bytes_up"] == same.summary["bytes_up_homlora"] == result.summary["bytes_up_homlora"], "as a HomLoRA of that rank sends"
