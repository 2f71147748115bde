"""The course of a run: more rounds than were planned, the best round kept, an early stop, warm-up; for every kind of training and merge."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
import torch
from test_kinds import RUN_IDS, RUNS
from tiny import SIZES, Interrupt, Stop, contents, lines, tiny_config, tiny_federation

from hetlora import checkpoint, cli, course
from hetlora.compare.methods import ComparisonPlan
from hetlora.compare.run import run_comparison
from hetlora.config import Config, ConfigError
from hetlora.fleet import LocalFleet
from hetlora.loop import simulate
from hetlora.observer import Observer
from hetlora.report.page import write_report
from hetlora.report.verdict import run_sentence
from hetlora.run_folder import read_config, read_run


def run(folder: Path, resume: bool = False, observer: Observer | None = None, **settings):
    federation = tiny_federation(SIZES)
    settings = {"lr": 0.05, "save_clients": True, **settings}
    return simulate(tiny_config(folder, **settings), resume=resume, federation=federation, observer=observer or Observer()), federation


def kept(folder: Path) -> dict[str, bytes]:
    return {name: data for name, data in contents(folder).items() if name.startswith(("adapter/", "clients/", "checkpoint.", "config."))}


def without_times(summary: dict) -> dict:
    return {name: value for name, value in summary.items() if name not in ("seconds", "cpu_seconds")}


def assert_same_run(one, other) -> None:
    assert lines(one.run_dir) == lines(other.run_dir)
    assert without_times(one.summary) == without_times(other.summary)
    mine, yours = kept(one.run_dir), kept(other.run_dir)
    mine["config.json"] = mine["config.json"].replace(str(one.run_dir).encode(), str(other.run_dir).encode())
    assert mine == yours


class Said(Observer):
    def __init__(self) -> None:
        self.lines: list[str] = []

    def message(self, text: str) -> None:
        self.lines.append(text)


# ---------------------------------------------------------------- more rounds


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_a_finished_run_is_lengthened_to_the_bits_of_one_that_had_all_rounds_from_the_start(tmp_path, settings):
    """eval_every = 3: round 2 was evaluated for being the last, and is not in the longer run."""
    run(tmp_path / "run", rounds=2, eval_every=3, **settings)
    assert lines(tmp_path / "run")[2]["evaluation"] is not None
    longer, _ = run(tmp_path / "run", resume=True, rounds=4, eval_every=3, **settings)
    whole, _ = run(tmp_path / "whole", rounds=4, eval_every=3, **settings)
    assert_same_run(longer, whole)


def test_a_longer_run_that_is_stopped_goes_on_without_rounds_being_given_again(tmp_path):
    run(tmp_path / "run", rounds=1)
    with pytest.raises(Stop):
        run(tmp_path / "run", resume=True, observer=Interrupt("local_step"), rounds=3)
    assert read_config(tmp_path / "run").rounds == 3
    assert not read_run(tmp_path / "run").complete
    cfg = cli.saved_settings(None, {"output": str(tmp_path / "run")})
    longer = simulate(cfg, resume=True, federation=tiny_federation(SIZES), quiet=True)
    assert_same_run(longer, run(tmp_path / "whole", rounds=3)[0])


def test_the_report_shows_each_time_that_a_run_was_continued(tmp_path, monkeypatch):
    def continued() -> list[dict]:
        return read_run(tmp_path / "run").continued

    run(tmp_path / "run", rounds=1)
    assert continued() == [] and "Continued" not in write_report(tmp_path / "run").read_text(encoding="utf-8")
    monkeypatch.setattr("sys.argv", ["hetlora", "run", "--resume", "--rounds", "3"])
    with pytest.raises(Stop):
        run(tmp_path / "run", resume=True, observer=Interrupt("round_end", 1), rounds=3)
    monkeypatch.setattr("sys.argv", ["hetlora", "run", "--resume"])
    for _ in range(2):  # a finished run is looked at, not continued
        run(tmp_path / "run", resume=True, rounds=3)
    commands = ["hetlora run --resume --rounds 3", "hetlora run --resume"]
    assert [(time["command"], time["after"], time["rounds"]) for time in continued()] == [(commands[0], 1, 3), (commands[1], 2, 3)]
    page = write_report(tmp_path / "run").read_text(encoding="utf-8")
    text = re.sub("<[^>]*>", "", page)
    for time in continued():
        assert f"Continued {time['started']} after round {time['after']}, to 3 rounds, by {time['command']}." in text
    assert '<span class="word">--rounds</span>' in page and "<th>continued</th>" not in page
    damaged = {**read_run(tmp_path / "run").versions, "continued": [3, {"started": "now"}]}
    (tmp_path / "run" / "versions.json").write_text(json.dumps(damaged))
    assert continued() == []


def test_the_command_line_takes_another_number_of_rounds_and_no_other_setting(tmp_path):
    run(tmp_path / "run", rounds=1)
    folder = str(tmp_path / "run")
    assert cli.saved_settings(None, {"output": folder, "rounds": 5}).rounds == 5
    with pytest.raises(ConfigError, match=r"--lr 0\.3 \(the run has 0\.05\)"):
        cli.saved_settings(None, {"output": folder, "rounds": 5, "lr": 0.3})


@pytest.mark.parametrize(
    ("made", "more", "reason"),
    [
        ({"lr_schedule": "cosine"}, {}, "lr_schedule = 'cosine' has other learning rates"),
        ({}, {"rounds": 1}, "rounds: the run was made for 2, now 1, and 2 are done"),
        ({"eval_every": 3, "keep_best": True}, {}, "have looked at the evaluation of round 2"),
        ({"eval_every": 3, "patience": 9}, {}, "have looked at the evaluation of round 2"),
    ],
)
def test_a_run_that_cannot_become_the_longer_one_says_why_and_stays_as_it_is(tmp_path, made, more, reason):
    run(tmp_path / "run", rounds=2, **made)
    before = contents(tmp_path / "run")
    with pytest.raises(ConfigError, match=reason):
        run(tmp_path / "run", resume=True, **{"rounds": 4, **made, **more})
    assert contents(tmp_path / "run") == before


# ---------------------------------------------------------------- the best round


LOSSES = [4.0, 3.0, 2.5, 2.6, 2.75, 2.7]  # of the rounds 0 to 5: round 2 is the best


def scripted(folder: Path, **settings):
    """`run` with the held-out losses above in place of its own."""
    evaluate = LocalFleet.evaluate

    def found(fleet, cfg, state, progress):
        own = evaluate(fleet, cfg, state, progress)
        return own | {"client_text": own["client_text"] | {"loss": LOSSES[state.round]}}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LocalFleet, "evaluate", found)
        return run(folder, **settings)


@pytest.fixture(scope="module")
def best(tmp_path_factory):
    """{kind: (a run of 5 rounds with keep_best, its federation)}."""
    made = {}

    def get(settings):
        if str(settings) not in made:
            made[str(settings)] = scripted(tmp_path_factory.mktemp("best") / "run", rounds=5, keep_best=True, **settings)
        return made[str(settings)]

    return get


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_the_best_round_is_what_the_run_ends_with(best, tmp_path, settings):
    result, federation = best(settings)
    assert result.summary["best_round"] == 2 and result.summary["rounds"] == 5
    assert result.summary["evaluation_after"] == result.history[2]["evaluation"]
    assert checkpoint.load_checkpoint(result.run_dir, "best.safetensors")[0]["round"] == 2
    assert checkpoint.load_checkpoint(result.run_dir)[0]["round"] == 5
    short, other = run(tmp_path / "run", rounds=2, **settings)
    assert all(torch.equal(one, two) for one, two in zip(result.bank.parameters(), short.bank.parameters(), strict=True))
    assert all(torch.equal(one, two) for one, two in zip(federation.model.parameters(), other.model.parameters(), strict=True))
    assert result.ranks == short.ranks
    adapters = [{name: data for name, data in contents(folder).items() if name.startswith("adapter/")} for folder in (result.run_dir, short.run_dir)]
    assert adapters[0] == adapters[1]
    shown = {client["name"]: client["perplexity_after"] for client in short.summary["clients"]}
    assert {client["name"]: client["perplexity_after"] for client in result.summary["clients"]} == shown


def test_the_best_round_is_told_in_the_report(best):
    result, _ = best({})
    assert run_sentence(read_run(result.run_dir)).startswith("In 5 rounds, of which round 2 is kept, the perplexity of the clients' held-out text ")


@pytest.mark.parametrize("settings", [{}, {"merge": "stack"}], ids=["bank", "base"])
def test_a_run_that_keeps_its_best_round_goes_on_after_any_stop_and_to_more_rounds(best, tmp_path, settings, monkeypatch):
    """Stopped between the checkpoint of round 2 and its second name; resumed; and made from a run of 3 rounds that had returned to round 2."""
    expected, _ = best(settings)
    real = checkpoint.keep_as_best

    def stop(folder):
        if len(read_run(folder).records) == 3:
            raise Stop
        real(folder)

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(checkpoint, "keep_as_best", stop)
        scripted(tmp_path / "run", keep_best=True, rounds=5, **settings)
    assert_same_run(scripted(tmp_path / "run", resume=True, keep_best=True, rounds=5, **settings)[0], expected)
    scripted(tmp_path / "longer", keep_best=True, rounds=3, **settings)
    assert_same_run(scripted(tmp_path / "longer", resume=True, keep_best=True, rounds=5, **settings)[0], expected)


@pytest.mark.parametrize("there", ["missing", "of another round"])
def test_a_best_round_whose_file_is_gone_is_an_error(tmp_path, there):
    scripted(tmp_path / "run", rounds=4, keep_best=True)
    file = tmp_path / "run" / "best.safetensors"
    file.unlink()
    if there != "missing":
        file.write_bytes((tmp_path / "run" / "checkpoint.safetensors").read_bytes())
    with pytest.raises(ConfigError, match=rf"best\.safetensors: {there}, the best round was 2"):
        scripted(tmp_path / "run", resume=True, rounds=4, keep_best=True)


def test_where_names_cannot_be_shared_the_best_round_is_a_copy(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError("no links here")

    monkeypatch.setattr("os.link", refuse)
    scripted(tmp_path / "run", rounds=4, keep_best=True)
    assert checkpoint.load_checkpoint(tmp_path / "run", "best.safetensors")[0]["round"] == 2


# ---------------------------------------------------------------- early stop


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_patience_ends_a_run_that_gets_no_better(tmp_path, settings):
    said = Said()
    result, _ = scripted(tmp_path / "run", rounds=5, patience=2, observer=said, **settings)
    whole = [record["lr"] for record in result.history]
    assert len(whole) == 5 and result.summary["rounds"] == 4
    told = "stopped after round 4 of 5: 2 evaluations in a row brought no lower held-out loss (patience)"
    assert told in said.lines and told in result.summary["notes"]
    assert read_run(tmp_path / "run").complete


@pytest.mark.parametrize(("settings", "there"), [({"rounds": 4, "eval_every": 9}, 0), ({"rounds": 3, "eval_every": 2}, 1), ({"rounds": 2}, 1)])
def test_patience_that_no_evaluation_can_try_is_told(tmp_path, settings, there):
    [line] = course.idle_patience(tiny_config(tmp_path, patience=2, **settings))
    come = "1 evaluation comes" if there == 1 else f"{there} evaluations come"
    assert line.startswith(f"patience = 2: nothing can stop early, as {come} before the last of {settings['rounds']} rounds (eval_every = ")
    assert course.idle_patience(tiny_config(tmp_path, patience=there, **settings)) == []
    seen = Said()
    run(tmp_path / "run", observer=seen, patience=2, **settings)
    assert line in seen.lines


def test_a_run_that_stopped_early_stays_stopped_and_may_keep_its_best_round(tmp_path):
    result, _ = scripted(tmp_path / "run", rounds=5, patience=1, keep_best=True)
    assert (result.summary["rounds"], result.summary["best_round"]) == (3, 2)
    again, _ = scripted(tmp_path / "run", resume=True, rounds=9, patience=1, keep_best=True)
    assert lines(again.run_dir)[-1]["round"] == 3 and without_times(again.summary)["evaluation_after"] == result.summary["evaluation_after"]


def history(*losses: float | None) -> list[dict]:
    return [{"round": i, "evaluation": None if loss is None else {"client_text": {"loss": loss}}} for i, loss in enumerate(losses)]


@pytest.mark.parametrize(
    ("losses", "best_one", "waits"),
    [
        ((3.0,), 0, 0),
        ((3.0, 2.0, 2.0, 2.5), 1, 2),
        ((3.0, None, 2.0, None, 2.0, None), 2, 1),
        ((math.nan, math.nan), None, 2),
        ((math.nan, 2.0, math.nan, math.inf), 1, 2),
        ((1.0, 2.0, 3.0), 0, 2),
    ],
)
def test_best_round_and_evaluations_since(losses, best_one, waits):
    record = history(*losses)
    assert course.best_round(record) == best_one
    assert [course.stalled(record, patience) for patience in range(4)] == [False, *(patience <= waits for patience in (1, 2, 3))]


# ---------------------------------------------------------------- warm-up


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_warm_up_rises_in_equal_steps_and_leaves_the_schedule_for_the_rounds_after_it(schedule):
    cfg = Config(rounds=8, lr=0.4, warmup_rounds=3, lr_schedule=schedule)
    rates = [course.learning_rate(cfg, number) for number in range(1, 9)]
    plain = Config(rounds=5, lr=0.4, lr_schedule=schedule)
    assert rates[:3] == [0.4 * number / 4 for number in (1, 2, 3)]
    assert rates[3:] == [course.learning_rate(plain, number) for number in range(1, 6)]


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_every_kind_trains_with_the_rate_of_the_round(tmp_path, settings):
    """Round 1 of a run with warm-up is round 1 of a run with the lower rate."""
    result, _ = run(tmp_path / "run", rounds=2, warmup_rounds=1, **settings)
    slow, _ = run(tmp_path / "slow", rounds=1, **{**settings, "lr": 0.025})
    assert [record["lr"] for record in result.history] == [0.0, 0.025, 0.05]
    assert lines(result.run_dir)[1] == lines(slow.run_dir)[1]


def test_no_more_warm_up_than_rounds():
    with pytest.raises(ConfigError, match="warmup_rounds: expected fewer than rounds = 3, got 3"):
        Config(rounds=3, warmup_rounds=3)


@pytest.mark.parametrize("setting", [{"keep_best": True}, {"patience": 2}, {"init_adapter": "somewhere"}])
def test_a_comparison_has_none_of_it(tmp_path, setting):
    (name,) = setting
    with pytest.raises(ConfigError, match=f"^{name}: "):
        run_comparison(tiny_config(tmp_path / "run", **setting), ComparisonPlan(), federation=tiny_federation(SIZES))
    with pytest.raises(ConfigError, match=f"{name}: "):
        run_comparison(tiny_config(tmp_path / "run"), ComparisonPlan(methods=f"hetlora+{name}=1"), federation=tiny_federation(SIZES))
