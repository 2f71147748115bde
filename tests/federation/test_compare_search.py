"""The search of a comparison: as large a share of clients in a round as the comparison has, and one more value at an end that wins."""

from __future__ import annotations

from pathlib import Path

import pytest
from test_compare import Cells, common, compared, outputs
from tiny import SIZES, lines, tiny_federation

from hetlora.compare.methods import make_plan
from hetlora.compare.run import Bench, beyond
from hetlora.config import ConfigError


def final_losses(comparison, method="hetlora") -> dict[str, float]:
    return {c.value: lines(Path(c.cfg.output))[-1]["evaluation"]["client_text"]["loss"] for c in comparison.search if c.method == method}


@pytest.mark.parametrize(("own", "searched", "clients", "trial"), [(4, 8, 3, 6), (8, 4, 3, 2), (8, 5, 8, 5), (8, 5, 20, 5), (6, 2, 1, 1)])
def test_as_large_a_share_of_the_clients_takes_part_in_a_round_of_the_search(tmp_path, monkeypatch, own, searched, clients, trial):
    data = {name: type("Data", (), {"clients": [None] * count})() for name, count in (("stdlib", own), ("unicode", searched))}
    monkeypatch.setattr(Bench, "data", lambda self, cfg: data[cfg.data])
    bench = Bench(common(tmp_path), None, tiny_federation(SIZES))
    cfg = bench.trial(common(tmp_path, data="stdlib", clients_per_round=clients), make_plan("test", search_data="unicode"))
    assert cfg.clients_per_round == trial and cfg.data == "unicode"


def test_beyond_goes_on_by_the_ratio_of_the_last_two():
    values = ["0.02", "0.005", "0.01"]
    assert [beyond(values, best) for best in ("0.005", "0.01", "0.02")] == ["0.0025", None, "0.04"]
    assert beyond(["0.001", "0.01", "0.02"], "0.001") == "0.0001"
    assert beyond(["3"], "3") is beyond(["0", "1"], "1") is beyond(["sgd", "adamw"], "sgd") is None


def test_a_value_at_an_end_that_wins_is_followed_by_one_more(tmp_path):
    whole = compared(tmp_path / "c", search="lr=0.0004,0.002")
    losses = final_losses(whole)
    assert list(losses) == ["0.0004", "0.002", "0.01"] and whole.chosen["hetlora"] == min(losses, key=losses.get) == "0.01"
    seen = Cells()
    again = compared(tmp_path / "c", "hetlora", seen, search="lr=0.0004,0.002")
    assert not seen.ran and outputs(again, "hetlora") == outputs(whole, "hetlora")
    seen = Cells()
    further = compared(tmp_path / "c", "hetlora", seen, search="lr=0.0004,0.002", search_beyond=2)
    assert list(final_losses(further))[2:] == ["0.01", "0.05"] and seen.ran[0] == "search hetlora 0.05"


def test_a_value_inside_is_followed_by_none(tmp_path):
    found = compared(tmp_path / "c", search="lr=1e-7,0.05,300")
    assert found.chosen["hetlora"] == "0.05" and list(final_losses(found)) == ["1e-7", "0.05", "300"]
    alone = compared(tmp_path / "d", search="lr=0.0004,0.002", search_beyond=0)
    assert list(final_losses(alone)) == ["0.0004", "0.002"]


def test_a_value_that_the_setting_cannot_have_is_not_tried_and_it_is_said(tmp_path):
    class Told(Cells):
        def message(self, text):
            told.append(text)

    told: list[str] = []
    found = compared(tmp_path / "c", "homlora-min+gamma=1", Told(), search="dropout=0.01,0.9")
    if found.chosen["homlora-min+gamma=1"] == "0.9":
        assert any("dropout = 0.9 is best for homlora-min" in text and "none is tried beyond it" in text for text in told)
    else:
        assert any("dropout = 0.01 is best" in text and "0.0001111 is tried too" in text for text in told)


def test_the_method_that_differences_are_against_must_be_there(tmp_path):
    with pytest.raises(ConfigError, match=r"against: expected one of the methods \(hetlora\), got 'homlora-min'"):
        compared(tmp_path / "c", against="homlora-min")
    assert not (tmp_path / "c").exists()
