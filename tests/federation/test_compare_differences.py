"""Groups of clients by rank, effective rank and paired differences in a comparison's tables: they are what the run folders say."""

from __future__ import annotations

import json
import math
import re
import statistics
from pathlib import Path

import pytest
from test_compare import compared
from tiny import lines

from hetlora.compare import figures
from hetlora.compare.differences import bootstrap, difference_rows, difference_text, differences, reference, sign_test
from hetlora.compare.page import write_comparison
from hetlora.ranks import parse_ranks


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    folder = tmp_path_factory.mktemp("differences") / "c"
    return figures.tabulate(compared(folder, "hetlora,homlora-min,fold", seeds=2, settings={"ranks": "dealt:2:8:1", "rounds": 1, "diagnostics": True}))


def ends(table, method) -> list[dict]:
    return [lines(Path(o.cell.cfg.output))[-1]["evaluation"] for o in table.outcomes[method]]


def test_groups_are_thirds_of_the_way_by_ratio():
    assert [figures.rank_group(r, [2, 32]) for r in (2, 5, 6, 12, 13, 32)] == ["small", "small", "middle", "middle", "big", "big"]
    assert figures.rank_group(4, [4, 4]) == ""
    assert {figures.rank_group(r, [5, 50]) for r in (5, 10)} == {"small"} and figures.rank_group(11, [5, 50]) == "middle"


def test_a_method_with_one_rank_for_all_is_shown_by_the_groups_of_the_common_ranks(table):
    clients = [client["name"] for client in table.outcomes["homlora-min"][0].run.summary["clients"]]
    for method in ("hetlora", "homlora-min", "fold"):
        for place, outcome in enumerate(table.outcomes[method]):
            ranks = parse_ranks("dealt:2:8:1").assign([type("C", (), {"name": name})() for name in clients], outcome.cell.seed).ranks
            assert outcome.cell.ranks == ranks and len(set(ranks.values())) > 2
            losses = dict(zip(clients, ends(table, method)[place]["own_text"]["losses"], strict=True))
            for group in figures.GROUPS:
                own = [math.exp(losses[name]) for name, rank in ranks.items() if figures.rank_group(rank, ranks.values()) == group]
                found = table.tallies[method][f"own_{group}"].values[place]
                assert found == pytest.approx(statistics.fmean(own)) if own else found is None
    assert {client["rank_end"] for client in table.outcomes["homlora-min"][0].run.summary["clients"]} == {2}


def test_effective_rank_is_that_after_the_last_round(table):
    for method, outcomes in table.outcomes.items():
        last = [lines(Path(o.cell.cfg.output))[-1]["diagnostics"]["effective_rank"] for o in outcomes]
        assert table.tallies[method]["effective_rank"].values == last and min(last) > 0
    assert table.tallies["homlora-min"]["effective_rank"].mean <= 2


def test_differences_pair_seeds_and_clients(table):
    assert reference(table) == "homlora-min" and list(differences(table)) == ["hetlora", "fold"]
    for method, found in differences(table).items():
        mine, theirs = ends(table, method), ends(table, "homlora-min")
        ratios = [a["client_text"]["perplexity"] / b["client_text"]["perplexity"] for a, b in zip(mine, theirs, strict=True)]
        assert found.by_seed == pytest.approx([100 * (ratio - 1) for ratio in ratios])
        changes = [[a - b for a, b in zip(m["own_text"]["losses"], t["own_text"]["losses"], strict=True)] for m, t in zip(mine, theirs, strict=True)]
        assert list(found.by_client.values()) == pytest.approx([100 * (math.exp(statistics.fmean(own)) - 1) for own in zip(*changes, strict=True)], abs=1e-9)
        assert found.better == sum(value < 0 for value in found.by_client.values())
        for group, value in found.by_group.items():
            pairs = zip(table.tallies[method][f"own_{group}"].values, table.tallies["homlora-min"][f"own_{group}"].values, strict=True)
            assert value == pytest.approx(100 * (statistics.fmean(a / b for a, b in pairs) - 1))


def test_tables_and_files_have_them(table):
    page = write_comparison(table)
    head, rows = difference_rows(table)
    text, html = (page.parent / "comparison.md").read_text(), page.read_text()
    saved = json.loads((page.parent / "comparison.json").read_text())
    assert saved["against"] == "homlora-min" and list(saved["differences"]) == [row[0] for row in rows] == ["hetlora", "fold"]
    assert f"| {' | '.join(rows[1])} |" in text and all(re.search(rf'<td class="n"[^>]*>{re.escape(value)}</td>', html) for value in rows[1][1:])
    assert len(rows[0]) == len(head) and f"n = {len(differences(table)['fold'].by_client)} clients" in difference_text(table)
    assert "| own, small |" in text and "effective rank" in text


def test_sign_test_is_the_binomial_one():
    assert sign_test([-1.0] * 3) == 0.25 and sign_test([-1.0] * 10 + [1.0]) == pytest.approx(2 * 12 / 2**11)
    assert sign_test([1.0, -1.0]) == 1.0 and sign_test([0.0, -1.0, -1.0]) == 0.5 and sign_test([]) == 1.0


def test_bootstrap_interval_is_about_that_of_the_normal_law_and_always_the_same():
    values = [math.sin(7 * i) + 0.3 for i in range(200)]
    low, high = bootstrap(values)
    half = 1.96 * statistics.stdev(values) / math.sqrt(len(values))
    # the quantile of 10 000 draws has a standard error of sqrt(p (1 - p) / 10 000) / density = 0.027 of a standard error of the mean
    assert [low, high] == pytest.approx([statistics.fmean(values) - half, statistics.fmean(values) + half], abs=4 * 0.027 * half)
    assert bootstrap(values) == (low, high)
    assert bootstrap([1.0] * 4) is None and bootstrap([math.inf] + [1.0] * 9) is None
