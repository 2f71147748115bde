"""Ranks of the clients: drawn, listed, read, mapped; and the exact rank that a pruning client keeps."""

from __future__ import annotations

import json
import math
import re
from decimal import Decimal
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import ByT5Tokenizer

from hetlora import federation
from hetlora.config import Config, ConfigError
from hetlora.data import ClientData
from hetlora.models import Limits
from hetlora.ranks import POWER_LAW_EXPONENT, bank_ranks, check_width, from_record, kept_rank, mean_rank, parse_ranks, to_record
from hetlora_kernels import AdapterBank


def clients(count: int, capability=None) -> list[ClientData]:
    tokens = [torch.arange(4)]
    return [ClientData(f"c{k:05d}", tokens, tokens, None if capability is None else capability[k]) for k in range(count)]


def assign_ranks(spec: str, clients: list[ClientData], seed: int):
    return parse_ranks(spec).assign(clients, seed)


@pytest.mark.parametrize(
    ("gamma", "rank", "expected"), [(0.7, 90, 63), (0.29, 100, 29), (0.58, 50, 29), (0.99, 50, 49), (0.99, 100, 99), (0.1, 30, 3), (1e-7, 5, 1)]
)
def test_kept_rank_is_exact_in_decimal(gamma, rank, expected):
    assert kept_rank(rank, gamma, 1) == expected


@given(gamma=st.integers(1, 1000), rank=st.integers(1, 200), r_min=st.integers(1, 20))
def test_kept_rank_against_decimal_arithmetic(gamma, rank, r_min):
    rank = max(rank, r_min)
    exact = math.floor(Decimal(gamma) * rank / 1000)
    assert kept_rank(rank, gamma / 1000, r_min) == max(r_min, exact)


def test_kept_rank_never_grows():
    assert kept_rank(3, 0.9, 5) == 3


def test_dealt_ranks_are_the_quantiles_whatever_the_seed():
    plans = [assign_ranks("dealt:2:32:0.3", clients(16), seed) for seed in range(4)]
    expected = [2, 2, 2, 2, 2, 3, 3, 4, 6, 7, 9, 12, 15, 19, 24, 29]
    assert all(sorted(plan.ranks.values()) == expected and (plan.r_min, plan.r_max) == (2, 32) for plan in plans)
    assert len({tuple(plan.ranks.values()) for plan in plans}) == 4  # another deal for each seed
    assert assign_ranks("dealt:2:32:0.3", clients(16), 3) == plans[3]
    drawn = sorted(assign_ranks("powerlaw:2:32:0.3", clients(2000), 0).ranks.values())
    dealt = sorted(assign_ranks("dealt:2:32:0.3", clients(2000), 0).ranks.values())
    assert abs(sum(drawn) - sum(dealt)) < 4 * 8.5 * math.sqrt(2000)  # 8.5: standard deviation of the law
    for spec, text in (("dealt:2", "expected 'dealt:MIN:MAX' or 'dealt:MIN:MAX:A'"), ("dealt:5:2", "1 <= MIN <= MAX"), ("dealt:2:5:0", "number A > 0")):
        with pytest.raises(ConfigError, match=text):
            parse_ranks(spec)


def test_sized_ranks_follow_the_amount_of_training_text_whatever_the_seed():
    tokens = torch.arange(4)
    fleet = [ClientData(name, [tokens] * size, [tokens]) for name, size in (("a", 5), ("b", 90), ("c", 5), ("d", 7))]
    plan = assign_ranks("sized:2:32:0.3", fleet, 0)
    assert plan == assign_ranks("sized:2:32:0.3", fleet, 1) and list(plan.ranks) == ["a", "b", "c", "d"]
    quantiles = sorted(assign_ranks("dealt:2:32:0.3", fleet, 0).ranks.values())
    assert [plan.ranks[name] for name in "acdb"] == quantiles and quantiles[0] < quantiles[-1], "ties go by name"
    with pytest.raises(ConfigError, match="expected 'sized:MIN:MAX' or 'sized:MIN:MAX:A'"):
        parse_ranks("sized:2")


def test_power_law_has_the_stated_distribution():
    count, low, high = 20_000, 5, 50
    ranks = list(assign_ranks(f"powerlaw:{low}:{high}", clients(count), 3).ranks.values())
    assert min(ranks) == low and max(ranks) == high
    for rank in (5, 6, 10, 25, 49):
        # r <= rank exactly where u <= ((rank + 1/2 - low) / (high - low))^a
        expected = ((rank + 0.5 - low) / (high - low)) ** POWER_LAW_EXPONENT
        share = sum(r <= rank for r in ranks) / count
        assert abs(share - expected) < 4 * math.sqrt(expected * (1 - expected) / count)
    uniform = list(assign_ranks("powerlaw:5:50:1", clients(count), 3).ranks.values())
    assert abs(sum(uniform) / count - 27.5) < 4 * math.sqrt(45**2 / 12 / count)


def test_power_law_depends_on_seed_and_count_only():
    one = assign_ranks("powerlaw:5:50:1", clients(40), 7)
    longer = [ClientData(c.name, [torch.arange(9)] * 5, c.test, 3.0) for c in clients(40)]
    assert one == assign_ranks("powerlaw:5:50:1", longer, 7)
    assert one != assign_ranks("powerlaw:5:50:1", clients(40), 8)
    assert (one.r_min, one.r_max) == (5, 50)
    assert list(one.ranks) == [c.name for c in clients(40)]


def test_list_goes_by_name_order():
    plan = assign_ranks("4, 2,8", clients(3), 0)
    assert plan.ranks == {"c00000": 4, "c00001": 2, "c00002": 8} and (plan.r_min, plan.r_max) == (2, 8)


@pytest.mark.parametrize("suffix", [".json", ".csv"])
def test_file_names_clients(tmp_path, suffix):
    path = tmp_path / f"ranks{suffix}"
    table = {"c00001": 3, "c00000": 6, "somebody else": 9}
    path.write_text(json.dumps(table) if suffix == ".json" else "client,rank\n" + "\n".join(f"{k}, {v}" for k, v in table.items()))
    plan = assign_ranks(str(path), clients(2), 0)
    assert plan.ranks == {"c00000": 6, "c00001": 3} and (plan.r_min, plan.r_max) == (3, 6)


def test_capability_maps_linearly():
    plan = assign_ranks("column:memory:2:12", clients(4, [8.0, 16.0, 10.0, 12.0]), 0)
    assert list(plan.ranks.values()) == [2, 12, 4, 7]
    assert (plan.r_min, plan.r_max) == (2, 12)
    assert set(assign_ranks("column:memory:2:12", clients(3, [5.0] * 3), 0).ranks.values()) == {2}
    assert list(assign_ranks("column:memory:2:12", clients(3, [-1e300, 0.0, 1e300]), 0).ranks.values()) == [2, 7, 12]
    for value in (float("inf"), float("-inf"), float("nan"), 1e308):
        with pytest.raises(
            ConfigError, match=rf"expected a finite number for client 'c00001', 1e301 at most, got {re.escape(str(value))}; correct its 'memory'"
        ):
            assign_ranks("column:memory:2:12", clients(3, [1.0, value, 3.0]), 0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("powerlaw", "expected 'powerlaw:MIN:MAX'"),
        ("powerlaw:5", "expected 'powerlaw:MIN:MAX'"),
        ("powerlaw:1:2:3:4", "expected 'powerlaw:MIN:MAX'"),
        ("powerlaw:a:5", "whole numbers MIN and MAX, got 'powerlaw:a:5'"),
        ("powerlaw:5:4", "1 <= MIN <= MAX, got 'powerlaw:5:4'"),
        ("powerlaw:0:4", "1 <= MIN <= MAX"),
        ("powerlaw:1:4:x", "a number A > 0"),
        ("powerlaw:1:4:0", "a number A > 0"),
        ("powerlaw:1:4:nan", "a number A > 0"),
        ("powerlaw:1:4:inf", "a number A > 0"),
        ("4,2", "expected 3 ranks, one per training client by name order, got 2"),
        ("4,2,x", "comma-separated list.*got '4,2,x'"),
        ("4,2,1.5", "comma-separated list"),
        ("4,0,2", "ranks >= 1, got 0 in '4,0,2'"),
        ("4,-1,2", "ranks >= 1, got -1 in '4,-1,2'"),
        ("", "comma-separated list"),
        ("column:memory", "expected 'column:FIELD:MIN:MAX'"),
        ("column::1:2", "expected 'column:FIELD:MIN:MAX'"),
        ("column:memory:2:1", "1 <= MIN <= MAX"),
        ("column:memory:1:4", "needs the column 'memory' in the data; it is missing for .*c00000"),
        ("no/such.json", "ranks file no/such.json: cannot be read"),
    ],
)
def test_every_bad_spec_is_named(spec, message):
    with pytest.raises(ConfigError, match=message):
        assign_ranks(spec, clients(3), 0)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("r.json", "{", "expected JSON"),
        ("r.json", "[1, 2]", "expected {client: rank}, got list"),
        ("r.json", '{"c00000": 4}', "no rank for 1 of 2 clients: \\['c00001'\\]"),
        ("r.json", '{"c00000": 4, "c00001": 2.5}', "whole number for 'c00001', got 2.5"),
        ("r.json", '{"c00000": 4, "c00001": true}', "whole number for 'c00001', got True"),
        ("r.json", '{"c00000": 4, "c00001": null}', "whole number for 'c00001', got None"),
        ("r.json", '{"c00000": 4, "c00001": 0}', "ranks >= 1, got 0 for client 'c00001'"),
        ("r.csv", "c00000\n", "CSV lines 'client,rank'"),
        ("r.csv", "c00000,4\nc00001,many\n", "whole number for 'c00001', got 'many'"),
        ("r.csv", "c00000,4\nc00001,2\nc00000,5\n", "'c00000' has two ranks, 4 and 5"),
        ("r.json", '{"c00000": 4, "c00001": 2, "c00000": 5}', "'c00000' has two ranks, 4 and 5"),
        ("r.csv", b"\xff\xfe", "cannot be read"),
    ],
)
def test_every_bad_file_is_named(tmp_path: Path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(ConfigError, match=message) as error:
        assign_ranks(str(path), clients(2), 0)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_rank_above_the_width_names_the_module():
    plan = assign_ranks("4,9", clients(2), 0)
    check_width(plan, {"q": (16, 16), "k": (9, 16)})
    with pytest.raises(ConfigError, match="rank 9 is above the width 8 of module 'k'"):
        check_width(plan, {"q": (16, 16), "k": (8, 16)})


TOLD_BY_THE_DATA = ("4,2", "column:memory:1:4", "no/such.json")  # what is wrong with these shows only beside the clients, or in the file


@pytest.mark.parametrize("spec", ["powerlaw:5", "powerlaw:5:4", "powerlaw:1:4:x", "fixed:0", "4,x", "4,0", "", "column:memory", "column:memory:2:1"])
def test_a_typo_is_told_with_the_settings(spec):
    with pytest.raises(ConfigError, match="here: ranks: expected"):
        Config.create("here", ranks=spec)


@pytest.mark.parametrize("spec", TOLD_BY_THE_DATA)
def test_what_the_data_must_tell_is_accepted_with_the_settings(spec):
    assert Config.create("here", ranks=spec).ranks == spec


@pytest.mark.parametrize(("spec", "message"), [("no/such.json", "cannot be read"), ("2,2,2", "expected 2 ranks"), ("column:memory:1:4", "columns")])
def test_ranks_that_do_not_fit_are_told_before_the_model_is_loaded(tmp_path, monkeypatch, spec, message):
    for name in ("one", "two"):
        (tmp_path / name).write_text("many words of one client, enough to train on and to test. " * 20)
    for function in ("load_model", *(["load_tokenizer", "resolve_model"] if spec.endswith("json") else [])):
        monkeypatch.setattr(federation, function, lambda *_, function=function, **__: pytest.fail(f"{function} came first"))
    if not spec.endswith("json"):
        monkeypatch.setattr(federation, "resolve_model", lambda *_, **__: "nowhere")
        monkeypatch.setattr(federation, "load_tokenizer", lambda *_: ByT5Tokenizer())
        monkeypatch.setattr(federation, "read_limits", lambda *_: Limits(1024, 384))
        monkeypatch.setattr(federation, "outline", lambda *_: None)
    with pytest.raises(ConfigError, match=message):
        federation.prepare(Config.create("here", ranks=spec, data=str(tmp_path)))


def test_ranks_of_many_clients_are_lists_by_module():
    assert bank_ranks([{"q": 3, "k": 3}, {"q": 2, "k": 1}], {"q": (4, 4), "k": (4, 4)}) == {"q": [3, 2], "k": [3, 1]}
    assert mean_rank({"q": 2, "k": 1}) == 1.5


def test_modules_of_equal_ranks_share_their_layout():
    shapes = {name: (4, 4) for name in ("q", "k", "v")}
    bank = AdapterBank(shapes, bank_ranks([{"q": 3, "k": 3, "v": 1}], shapes))
    assert bank.layouts["q"] is bank.layouts["k"] is not bank.layouts["v"]


@pytest.mark.parametrize(("scope", "record"), [("client", 3), ("module", {"q": 3, "k": 1})])
def test_ranks_come_back_from_the_record(scope, record):
    ranks = from_record(record, scope, {"q": (4, 4), "k": (4, 4)})
    assert ranks == ({"q": 3, "k": 3} if scope == "client" else record)
    assert to_record(ranks, scope) == record
