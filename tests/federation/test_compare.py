"""A comparison is a set of ordinary runs: what one method gives depends on its own settings alone, nothing runs twice, and the tables say what the runs say."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path

import pytest
from click.testing import CliRunner
from tiny import SIZES, Interrupt, Stop, contents, lines, tiny_config, tiny_federation

from hetlora.cli import cli
from hetlora.compare import figures
from hetlora.compare.methods import METHODS, make_plan, method_config, parse_methods, refuse_private
from hetlora.compare.page import print_comparison, write_comparison
from hetlora.compare.run import Bench, run_comparison
from hetlora.config import Config, ConfigError
from hetlora.lock import FolderLock
from hetlora.observer import Observer
from hetlora.ranks import StartingRanks
from hetlora.report.terminal import make_console


def common(folder, **settings):
    return tiny_config(folder, **{"rounds": 2, "prune_lambda": 5.0, "gamma": 0.5, "lr": 0.05, **settings})


def compared(folder, methods="hetlora", observer=None, settings=None, **plan):
    plan = make_plan("test", **{"seeds": 1, "methods": methods, **plan})
    return run_comparison(common(folder, **(settings or {})), plan, observer, tiny_federation(SIZES, held_out=1))


def outputs(comparison_, method) -> list[tuple]:
    """Everything a cell's runs leave, without times: rounds, adapters, and the other figures of the summary."""
    found = []
    for cell in comparison_.cells:
        if cell.method == method:
            folder = Path(cell.cfg.output)
            summary = json.loads((folder / "summary.json").read_text())
            files = {name: data for name, data in contents(folder).items() if name.startswith("adapter/")}
            found.append((lines(folder), {key: value for key, value in summary.items() if "seconds" not in key}, files))
    assert found
    return found


class Cells(Observer):
    """The cells that were run, and those found done."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.found: list[str] = []

    def cell(self, label, done, total, summary) -> None:
        (self.found if summary is None else self.ran).append(label)


@pytest.mark.parametrize("method", ["hetlora", "recon-svd", "flora", "fedavg-full"])
def test_a_method_gives_the_same_bits_alone_and_after_all_the_others(tmp_path, method):
    """The others include those that change the base model in memory; they run before it, at the first seed too."""
    others = "flora,fedavg-full,homlora-max,recon-svd,hetlora"
    alone = compared(tmp_path / "alone", method, seeds=2, settings={"rounds": 1})
    beside = compared(tmp_path / "beside", ",".join([*(other for other in others.split(",") if other != method), method]), seeds=2, settings={"rounds": 1})
    assert outputs(alone, method) == outputs(beside, method)
    curves = {name: [r["evaluation"]["client_text"]["loss"] for r in outputs(beside, name)[0][0]] for name in others.split(",")}
    assert len({curve[-1] for curve in curves.values()}) >= len(curves) - 1, "the methods differ, or equal bits would say nothing"


def test_baselines_are_hetlora_with_its_parts_switched_off(tmp_path):
    """One code path: equal ranks, no pruning and FedAvg's weights are HomLoRA, to the bit; with unequal ranks they are not."""
    same = "hetlora+gamma=1+weights=samples+ranks=fixed:2"
    found = compared(tmp_path / "c", f"homlora-min,{same},hetlora+gamma=1+weights=samples")
    runs = [outputs(found, cell.method)[0] for cell in found.cells]
    assert runs[0] == runs[1] != runs[2]


def test_a_value_found_by_search_does_not_depend_on_the_other_methods(tmp_path):
    search = {"search": "lr=0.0001,0.05"}
    alone = compared(tmp_path / "alone", "hetlora-owners", settings={"rounds": 1}, **search)
    beside = compared(tmp_path / "beside", "fedavg-full,hetlora-owners", settings={"rounds": 1}, **search)
    assert outputs(alone, "hetlora-owners") == outputs(beside, "hetlora-owners")
    assert {cell.method for cell in alone.search} == {"hetlora"}, "an ablation takes the value of its method"


def test_the_search_takes_the_lowest_final_loss(tmp_path):
    found = compared(tmp_path / "c", "hetlora,homlora-min,hetlora+lr=0.007", search="lr=0.0001,0.05", search_beyond=0)  # beyond, at 25, is luck
    for method in ("hetlora", "homlora-min"):
        losses = {c.value: lines(Path(c.cfg.output))[-1]["evaluation"]["client_text"]["loss"] for c in found.search if c.method == method}
        assert found.chosen[method] == min(losses, key=losses.get) == "0.05"
        assert all(cell.cfg.lr == 0.05 for cell in found.cells if cell.method == method)
    assert [cell.cfg.lr for cell in found.cells if cell.method == "hetlora+lr=0.007"] == [0.007], "a variant that sets it keeps its own"
    assert found.chosen["hetlora+lr=0.007"] == "0.007", "and it is said"
    assert {cell.seed for cell in found.search}.isdisjoint(cell.seed for cell in found.cells)


@pytest.mark.parametrize("method", ["hetlora", "flora", "fedavg-full"])
def test_stopped_anywhere_the_same_call_continues_and_runs_nothing_twice(tmp_path, method):
    methods = f"homlora-min,{method}"
    whole = compared(tmp_path / "whole", methods)
    with pytest.raises(Stop):
        compared(tmp_path / "part", methods, Interrupt("round_end", 5))  # round 0 to 2 of the first cell, 0 and 1 of the second
    seen = Cells()
    part = compared(tmp_path / "part", methods, seen)
    assert seen.found == ["homlora-min seed 0"] and seen.ran == [f"{method} seed 0"]
    assert outputs(part, method) == outputs(whole, method)
    again = Cells()
    compared(tmp_path / "part", methods + ",homlora-max", again, seeds=2)
    assert again.found == seen.found + seen.ran and len(again.ran) == 4, "methods and seeds can be added"


def test_searched_values_can_be_added(tmp_path):
    """The runs at the value that is no longer taken stay, and count for nothing."""
    first = compared(tmp_path / "c", search="lr=0.0001")
    seen = Cells()
    second = compared(tmp_path / "c", "hetlora", seen, search="lr=0.0001,0.05", search_beyond=0)
    assert seen.found == ["search hetlora 0.0001"] and seen.ran == ["search hetlora 0.05", "hetlora seed 0"]
    assert first.chosen == {"hetlora": "0.0001"} and second.chosen == {"hetlora": "0.05"} and second.cells[0].cfg.lr == 0.05


def test_another_comparison_in_the_folder_is_refused(tmp_path):
    compared(tmp_path / "c")
    with pytest.raises(ConfigError, match=r"other settings \(rounds was 2, now 3\)"):
        compared(tmp_path / "c", settings={"rounds": 3})
    with pytest.raises(ConfigError, match="search_rounds was 0, now 1"):
        compared(tmp_path / "c", search="lr=0.1", search_rounds=1)
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "mine.txt").touch()
    with pytest.raises(ConfigError, match="holds no comparison"):
        compared(tmp_path / "d")


def test_settings_of_methods_are_refused_as_common_ones(tmp_path):
    with pytest.raises(ConfigError, match="merge: set by the methods"):
        compared(tmp_path / "c", settings={"merge": "svd"})
    with pytest.raises(ConfigError, match="weight_scope"):
        compared(tmp_path / "d", "homlora-min,hetlora+weights=uniform+weight_scope=client")
    assert not list((tmp_path / "d").rglob("rounds.jsonl")), "before any run"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("hetlra", "unknown 'hetlra' (did you mean 'hetlora'?); there are hetlora"),
        ("all+gamma=1", "unknown 'all'"),
        ("hetlora+gama=1", "'gama=1'"),
        ("hetlora+seed=1", "'seed=1'"),
    ],
)
def test_unknown_methods_are_named(text, message):
    with pytest.raises(ConfigError) as caught:
        parse_methods(text)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    "change", ["seq_len=16", "dtype=float64", "target_modules=all-linear", "max_tokens_per_client=64", "data=unicode", "ranks=column:m:2:8"]
)
def test_variants_and_searches_that_would_need_a_model_or_data_of_their_own_are_refused(tmp_path, change):
    setting = change.partition("=")[0]
    with pytest.raises(ConfigError, match=f"methods: .*share one model and its data, {setting} "):
        parse_methods(f"hetlora+{change}")
    with pytest.raises(ConfigError, match=f"search: .*{setting}"):
        compared(tmp_path / "c", search=change)
    assert not (tmp_path / "c").exists()
    assert {"scale", "adapter_dtype", "dropout"} <= parse_methods("hetlora+scale=1+adapter_dtype=float64+dropout=0.1")[0].settings.keys()


def test_data_of_a_search_without_held_out_clients_is_not_that_of_the_first_seed(tmp_path):
    keys = [Bench._key(common(tmp_path, seed=seed, held_out_clients=held)) for seed, held in ((0, 2), (1000, 0), (1, 2), (1, 0))]
    assert len(set(keys)) == 3 and keys[1] == keys[3]


def test_methods_are_the_settings_that_the_papers_name():
    base = Config(ranks="powerlaw:3:9", gamma=0.9, prune_lambda=2.0)

    def differs(name: str) -> dict:
        cfg = method_config(parse_methods(name)[0], base, StartingRanks(3, 9, {"a": 3, "b": 3, "c": 9, "d": 4}))
        return {key: value for key, value in cfg.model_dump().items() if value != getattr(base, key)}

    assert differs("hetlora") == {}
    assert differs("hetlora-gamma1") == {"gamma": 1.0}
    assert differs("homlora-min") == {"gamma": 1.0, "weights": "samples", "ranks": "fixed:3"}
    assert differs("homlora-mean") == {"gamma": 1.0, "weights": "samples", "ranks": "fixed:5"}
    assert differs("homlora-max") == {"gamma": 1.0, "weights": "samples", "ranks": "fixed:9"}
    assert differs("recon-svd") == {"gamma": 1.0, "weights": "samples", "merge": "svd"}
    assert differs("flora") == {"gamma": 1.0, "weights": "samples", "merge": "stack"}
    assert differs("delta") == {"gamma": 1.0, "weights": "samples", "merge": "delta"}
    assert differs("raflora") == {"gamma": 1.0, "weights": "samples", "merge": "owners-svd"}
    assert differs("ffa-lora") == {"train": "b-only", "weights": "samples", "gamma": 0.99, "prune_lambda": 1e-3}
    assert differs("rolora") == {"train": "alternating", "weights": "samples", "gamma": 0.99, "prune_lambda": 1e-3}
    assert differs("rbla") == {"gamma": 1.0, "weights": "samples", "shared_rows": "owners"}
    assert differs("fedavg-full") == {"train": "full", "weights": "samples", "ranks": "powerlaw:5:50", "gamma": 0.99, "prune_lambda": 1e-3}
    assert [differs(f"hetlora-{name}") for name in ("uniform", "samples", "owners", "client-weights", "module-prune")] == [
        {"weights": "uniform"},
        {"weights": "samples"},
        {"shared_rows": "owners"},
        {"weight_scope": "client"},
        {"prune_scope": "module"},
    ]
    assert differs("recon-svd+lr=0.5+gamma=0.7") == {"gamma": 0.7, "weights": "samples", "merge": "svd", "lr": 0.5}
    assert [m.name for m in parse_methods("main,flora,field,ablations")] == [m.name for m in parse_methods("all")] == [*METHODS]


def test_the_page_of_methods_has_them_all():
    page = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8")
    assert [name for name, method in METHODS.items() if method.like is None and f"`{name}`" not in page] == []


def test_the_table_of_methods_says_what_a_run_leaves_and_whether_nodes_run_it():
    pytest.importorskip("flwr.serverapp", reason="Flower is not installed (pip install '.[flower]')")
    from hetlora.deployed.exchange import exchange

    lines = (Path(__file__).resolve().parents[2] / "docs" / "methods.md").read_text(encoding="utf-8").splitlines()
    table = {
        name.strip(" `"): [cell.strip() for cell in line.split("|")[-3:-1]]
        for line in lines
        if line.startswith("| `")
        for name in line.split("|")[1].split(",")
    }
    assert list(table) == [name for name, method in METHODS.items() if method.like is None and name != "hetlora-gamma1"]
    for name, (left, flower) in table.items():
        cfg = method_config(METHODS[name], Config(), StartingRanks(2, 8, {"a": 2, "b": 8}))
        assert left == ("model" if cfg.merge_kind.no_adapter else "adapter")
        try:
            exchange(cfg)
        except ConfigError:
            assert flower == "no"
        else:
            assert flower == "yes"


def test_all_methods_of_the_field_run_side_by_side(tmp_path):
    found = compared(tmp_path / "c", "field", settings={"rounds": 2})
    table = figures.tabulate(found)
    assert list(table.tallies) == [name for name, method in METHODS.items() if method.group == "field" and method.like is None]
    assert len({own["global_final"].mean for own in table.tallies.values()}) == len(table.tallies), "each does something of its own"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("finished") / "c"
    return compared(folder, "hetlora,fedavg-full,hetlora-owners", seeds=2, target=0.995, search="lr=0.01,0.05", search_rounds=1)


def test_table_is_what_the_runs_recorded(finished):
    table = figures.tabulate(finished)
    assert list(table.tallies) == ["hetlora", "fedavg-full", "hetlora-owners"]
    for method, tallies in table.tallies.items():
        records = [lines(Path(cell.cfg.output)) for cell in finished.cells if cell.method == method]
        summaries = [json.loads(Path(cell.cfg.output, "summary.json").read_text()) for cell in finished.cells if cell.method == method]
        for part, key in (("client_text", "global"), ("own_text", "own")):
            curves = [[r["evaluation"][part]["perplexity"] for r in own] for own in records]
            assert tallies[f"{key}_final"].values == [curve[-1] for curve in curves]
            assert tallies[f"{key}_best"].values == [min(curve) for curve in curves]
        finals = [own[-1]["evaluation"]["client_text"]["perplexity"] for own in records]
        assert tallies["global_final"].mean == pytest.approx(sum(finals) / 2)
        assert tallies["global_final"].std == pytest.approx(abs(finals[0] - finals[1]) / 2**0.5)
        starts = [0.995 * own[0]["evaluation"]["client_text"]["perplexity"] for own in records]
        reached = [[r["round"] for r in own if r["evaluation"]["client_text"]["perplexity"] <= limit] for own, limit in zip(records, starts, strict=True)]
        assert tallies["rounds_to_target"].values == [rounds[0] if rounds else None for rounds in reached]
        assert tallies["megabytes_up"].values == [summary["bytes_up"] / 1e6 for summary in summaries]
        for value, own, summary in zip(tallies["trained_percent"].values, records, summaries, strict=True):
            visits = sum(len(r["clients"]) for r in own)
            assert value == pytest.approx(100 * sum(r["trained_parameters"] for r in own) / visits / summary["parameters"])
    assert table.tallies["fedavg-full"]["trained_percent"].mean == pytest.approx(100)
    assert table.tallies["hetlora"]["trained_percent"].mean < 50


def test_gap_is_how_much_further_training_text_fell(finished):
    outcome = figures.tabulate(finished).outcomes["hetlora"][1]
    first, last = (r["evaluation"] for r in (outcome.run.records[0], outcome.run.records[-1]))
    fell = {part: [a - b for a, b in zip(first[part]["losses"], last[part]["losses"], strict=True)] for part in ("own_train", "own_text")}
    expected = [train - held for train, held in zip(fell["own_train"], fell["own_text"], strict=True)]
    found = figures.gaps(outcome)
    assert [gap for _, gap in found] == pytest.approx(expected)
    assert [rank for rank, _ in found] == [client["rank_end"] for client in outcome.run.summary["clients"]]


def test_files_agree_with_one_another_and_the_page_stands_alone(finished, every_look):
    page = write_comparison(figures.tabulate(finished))
    folder = page.parent
    table = figures.tabulate(finished)
    rows = list(csv.DictReader((folder / "comparison.csv").read_text().splitlines()))
    assert [(row["method"], row["seed"]) for row in rows] == [(m, s) for m in table.tallies for s in "01"]
    saved = json.loads((folder / "comparison.json").read_text())
    text = (folder / "comparison.md").read_text()
    html = page.read_text()
    for method in table.tallies:
        own = [float(row["global_final"]) for row in rows if row["method"] == method]
        metrics = saved["methods"][method]["metrics"]["global_final"]
        assert metrics["mean"] == pytest.approx(statistics.fmean(own), rel=1e-5) and metrics["std"] == pytest.approx(statistics.stdev(own), rel=1e-3)
        assert f"| {method} | {metrics['mean']:.3f} ± {metrics['std']:.3f} |" in text
        assert f"{metrics['mean']:.3f} ± {metrics['std']:.3f}" in html
    search = text[text.index("Search:") :]
    assert search.count(" *") == 2 + 1, "one value of each searched method is marked, and the line above says what the mark means"
    for name in ("comparison.png", "ablations.png", "gap.png", "diagnostics.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG") and name in html
    assert "http" not in html.replace("http-equiv", "") and html.count("data:image/png;base64,") == 4 * 4, "each wide and narrow, light and dark"


def test_epsilon_is_that_of_each_run_and_the_page_says_what_it_leaves_out(tmp_path, capsys):
    pytest.importorskip("dp_accounting", reason="dp-accounting is not installed (pip install '.[dp]')")
    private = "+weights=uniform+gamma=1+dp_clipping_norm=0.5+dp_noise_multiplier=2+dp_delta=1e-3"
    settings = {"rounds": 1, "cobatch": False, "prune_lambda": Config.model_fields["prune_lambda"].default}
    table = figures.tabulate(compared(tmp_path / "c", f"fold,delta{private}", settings=settings))
    assert table.tallies["fold"]["epsilon"].values == [None]
    summary = json.loads((Path(table.comparison.cells[1].cfg.output) / "summary.json").read_text())
    assert table.tallies[f"delta{private}"]["epsilon"].values == [summary["privacy"]["epsilon"]] and summary["privacy"]["epsilon"] > 0
    page = write_comparison(table).read_text(encoding="utf-8")
    print_comparison(make_console(), table)
    said = (page, (tmp_path / "c" / "comparison.md").read_text(), " ".join(capsys.readouterr().out.split()))
    assert all("epsilon (at delta 0.001) is that of one run by itself" in text and "protects nobody" in text for text in said)
    assert "epsilon of a run" in page and "epsilon" in (tmp_path / "c" / "comparison.csv").read_text()


def test_a_missing_value_is_counted_not_averaged():
    tally = figures.Tally([2.0, None, 4.0])
    assert tally.mean == 3 and tally.text(1) == "3.0 ± 1.4 (2 of 3)"
    assert figures.Tally([None]).text(1) == "-" and figures.Tally([float("inf"), 1.0]).text(1) == "inf"
    assert figures.Tally([7.0]).text(2) == "7.00", "one seed has no spread"


def test_privacy_that_is_off_is_no_setting_of_a_comparison_and_what_is_advised_is_accepted():
    refuse_private("test", {"dp_clipping_norm": 0, "dp_noise_multiplier": 0.0, "dp_sampling": "fixed", "dp_secret": "", "lr": 0.1})
    for given in ({"dp_clipping_norm": 2.0}, {"dp_noise_multiplier": 1}, {"dp_clipping_norm": 0, "dp_delta": 1e-3}):
        with pytest.raises(ConfigError) as caught:
            refuse_private("test", given)
        advised = str(caught.value).split("--methods ")[1].split(" ")[0]
        own = [method_config(method, Config(cobatch=False), StartingRanks(2, 8, {"a": 2})) for method in parse_methods(advised)]
        assert [bool(cfg.dp_clipping_norm) for cfg in own] == [True, False]
        assert {name: getattr(own[0], name) for name in given if given[name]} == {name: value for name, value in given.items() if value}


def test_a_refused_comparison_leaves_no_folder_and_the_corrected_one_runs(tmp_path):
    for settings, line in (({"ranks": "capability:2:4"}, "measured nothing"), ({"ranks": [2, 3]}, "expected .* ranks, one per training client")):
        with pytest.raises(ConfigError, match=line):
            compared(tmp_path / "c", settings=settings)
        assert not (tmp_path / "c").exists()
    compared(tmp_path / "c")


def test_a_comparison_that_another_process_runs_is_refused_before_anything_is_loaded(tmp_path, monkeypatch):
    compared(tmp_path / "c")
    monkeypatch.setattr("hetlora.compare.run.Bench", lambda *given: pytest.fail("loaded"))
    with FolderLock() as lock:
        lock.take(tmp_path / "c")
        with pytest.raises(ConfigError, match="another process writes to it"):
            compared(tmp_path / "c")


def test_command_line_takes_files_and_flags_and_says_what_is_wrong(tmp_path, monkeypatch):
    monkeypatch.setattr("hetlora.compare.run.Bench", lambda common, observer, _: Bench(common, observer, tiny_federation(SIZES)))
    settings = {"ranks": "powerlaw:2:8", "rounds": 1, "clients_per_round": 2, "local_steps": 1, "batch_size": 2, "seeds": 1, "methods": "hetlora,homlora-min"}
    (tmp_path / "c.json").write_text(json.dumps(settings))
    result = CliRunner().invoke(cli, ["compare", "--config", str(tmp_path / "c.json"), "--output", str(tmp_path / "c"), "--methods", "homlora-min,flora"])
    assert result.exit_code == 0, result.output
    assert "2/2 flora seed 0: perplexity" in result.output and (tmp_path / "c" / "comparison.html").is_file()
    assert sorted(path.name for path in (tmp_path / "c" / "cells").iterdir()) == ["flora", "homlora-min"]
    faults = {"--seeds 0": "seeds: ", "--methods x": "unknown 'x'", "--search lr": "SETTING=V1,V2", "--merge svd": "no such option"}
    faults["--dp-clipping-norm 0.5"] = "--methods fold+weights=uniform+dp_clipping_norm=0.5,fold"
    faults["--dp-noise-multiplier 1"] = "and a clip, as in --methods fold+weights=uniform+dp_clipping_norm=0.5+dp_noise_multiplier=1.0,fold --no-cobatch"
    for arguments, message in faults.items():
        result = CliRunner().invoke(cli, ["compare", "--output", str(tmp_path / "d"), *arguments.split()])
        assert result.exit_code == 2 and message in result.stderr and result.stderr.count("\n") == 1, result.output
