"""hetlora from Python: errors, short forms of objects, progress, callbacks, loggers and frames."""

from __future__ import annotations

import sys
import types

import pytest
from tiny import tiny_config, tiny_federation

import hetlora
from hetlora import loggers
from hetlora.config import Config, ConfigError
from hetlora.loop import simulate
from hetlora.observer import Observer

BANK = [("clients", "1"), ("modules", "8"), ("ranks", "8"), ("parameters", "1,792"), ("dtype", "float32"), ("device", "cpu")]


def run(folder, **settings):
    return simulate(tiny_config(folder, rounds=2), federation=tiny_federation([3, 3], held_out=1), **settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [({"lr": -1}, "Config: lr: input should be greater than 0, got -1"), ({"round": 1}, "Config: unknown setting 'round' (did you mean 'rounds'?)")],
)
def test_a_config_made_in_python_raises_one_line(settings, message):
    with pytest.raises(ConfigError) as caught:
        hetlora.Config(**settings)
    assert str(caught.value) == message


def test_settings_that_are_no_config_are_one_line():
    with pytest.raises(ConfigError, match=r"cfg: expected a hetlora.Config, got dict; write hetlora.Config\(rounds=20, ...\)"):
        hetlora.simulate({"rounds": 3})


def test_a_source_is_named_once():
    with pytest.raises(ConfigError) as caught:
        Config.create("my file", lr=-1)
    assert str(caught.value) == "my file: lr: input should be greater than 0, got -1"


def test_objects_are_short_in_a_terminal_and_tables_in_a_notebook(tmp_path):
    cfg = Config(rounds=3, data="<b>")
    assert repr(cfg) == "Config(data='<b>', rounds=3)" and "<td>&lt;b&gt;</td>" in cfg._repr_html_()
    result = run(tmp_path / "run", quiet=True)
    before, after = (result.summary[key]["client_text"]["perplexity"] for key in ("evaluation_before", "evaluation_after"))
    shown = f"perplexity: {before:.2f} -> {after:.2f} ({100 * (after / before - 1):+.1f} %)"
    assert repr(result) == f"Result(clients: 2, rounds: 2, {shown}, run_dir: {tmp_path / 'run'})"
    assert result._repr_html_().startswith("<table><tr><th>clients</th><td>2</td>")
    assert repr(result.bank) == f"AdapterBank({', '.join(f'{name}: {value}' for name, value in BANK)})"
    assert result.bank._repr_html_() == "<table>" + "".join(f"<tr><th>{name}</th><td>{value}</td></tr>" for name, value in BANK) + "</table>"
    clients = result.bank.truncate({name: [j % 3, 1] for j, name in enumerate(result.bank.shapes)})
    assert "clients: 2, modules: 8, ranks: 0 to 2, " in repr(clients)


def test_progress_shows_by_itself_unless_quiet_or_observed(tmp_path, capsys):
    run(tmp_path / "a")
    said = capsys.readouterr()
    assert "round 2/2" in said.err and said.out == ""
    run(tmp_path / "b", quiet=True)
    run(tmp_path / "c", observer=Observer())
    said = capsys.readouterr()
    assert said.out == said.err == ""


def test_callbacks_and_loggers_get_every_round_and_change_nothing(tmp_path):
    class Seen(Observer):
        def __init__(self):
            self.events = []

        def start(self, cfg, info):
            self.events.append("start")

        def round_end(self, record):
            self.events.append(record["round"])

        def finish(self, summary):
            self.events.append("finish")

    called, first, second = [], Seen(), Seen()
    result = run(tmp_path / "a", observer=first, loggers=[second], on_round_end=called.append)
    assert first.events == second.events == ["start", 0, 1, 2, "finish"]
    assert called == result.history
    plain = run(tmp_path / "b", quiet=True)
    assert [r["evaluation"] for r in plain.history] == [r["evaluation"] for r in result.history]


def test_every_event_of_an_observer_is_forwarded():
    events = {name for name, value in vars(Observer).items() if not name.startswith("_") and callable(value)}
    assert {*loggers._EVENTS, "stopped"} == events


def test_an_error_of_a_callback_stops_the_run_which_can_be_continued(tmp_path):
    def stop(record):
        if record["round"] == 1:
            raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        run(tmp_path / "a", quiet=True, on_round_end=stop)
    assert len(run(tmp_path / "a", quiet=True, resume=True).history) == 3


@pytest.mark.parametrize(("made", "package"), [("TensorBoardLogger", "tensorboard"), ("WandbLogger", "wandb"), ("MLflowLogger", "mlflow")])
def test_a_missing_package_is_one_line(made, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError, match=rf"'{package}' package .*pip install '\.\[{package}\]'"):
        getattr(loggers, made)(*(["logs"] if package == "tensorboard" else []))


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_loggers_say_each_round_to_their_package(tmp_path, monkeypatch, name):
    """Against a stand-in of the package with the calls that its documentation has."""
    calls = []

    def recorder(call):
        return lambda *args, **kwargs: (calls.append((call, args, kwargs)), module)[1]

    names = ("init", "log", "finish", "start_run", "log_params", "set_tags", "log_metrics", "end_run")
    module = types.SimpleNamespace(**{c: recorder(c) for c in names}, data=types.SimpleNamespace(params={}))
    monkeypatch.setitem(sys.modules, name, module)
    logger = loggers.WandbLogger(project="p") if name == "wandb" else loggers.MLflowLogger(run_name="p")
    result = run(tmp_path / "run", quiet=True, loggers=[logger])
    rounds = [(args[0], kwargs["step"]) for call, args, kwargs in calls if call in ("log", "log_metrics")]
    assert [step for _, step in rounds] == [0, 1, 2] and calls[0][2].get("project", calls[0][2].get("run_name")) == "p"
    assert rounds[2][0]["perplexity/clients"] == result.history[2]["evaluation"]["client_text"]["perplexity"]
    assert calls[-1][0] in ("finish", "end_run")


def test_a_logger_that_cannot_close_hides_neither_the_error_nor_the_others(tmp_path):
    closed = []

    class Broken(Observer):
        def stopped(self, error):
            raise OSError("no server")

    class Whole(Observer):
        def stopped(self, error):
            closed.append(str(error))

    def stop(record):
        raise ValueError("mine")

    with pytest.warns(UserWarning, match="Broken could not close its run: OSError: no server"), pytest.raises(ValueError, match="mine"):
        run(tmp_path / "run", quiet=True, loggers=[Broken(), Whole()], on_round_end=stop)
    assert closed == ["mine"]


@pytest.mark.parametrize(("error", "status"), [(RuntimeError("enough"), "FAILED"), (KeyboardInterrupt(), "KILLED")], ids=["error", "interrupt"])
def test_a_run_that_stops_closes_its_loggers_once(tmp_path, monkeypatch, error, status):
    """Left open, MLflow refuses the next run of a notebook, and W&B writes its rounds to the one that failed."""
    calls = []
    closed = types.SimpleNamespace(log=lambda *_, **__: None, finish=lambda **given: calls.append(given))
    monkeypatch.setitem(sys.modules, "wandb", types.SimpleNamespace(init=lambda **_: closed))
    begun = types.SimpleNamespace(data=types.SimpleNamespace(params={}))
    quiet = dict.fromkeys(("log_params", "set_tags", "log_metrics"), lambda *_, **__: None)
    mlflow = types.SimpleNamespace(start_run=lambda **_: begun, end_run=calls.append, **quiet)
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    both = [loggers.WandbLogger(), loggers.MLflowLogger()]

    def stop(record):
        if record["round"] == 1:
            raise error

    with pytest.raises(type(error)):
        run(tmp_path / "a", quiet=True, loggers=both, on_round_end=stop)
    assert calls == [{"exit_code": 1}, status]
    run(tmp_path / "a", quiet=True, loggers=both, resume=True)
    assert calls[2:] == [{"exit_code": 0}, "FINISHED"], "the same loggers serve again"
    with pytest.raises(ConfigError, match="exists already"):
        run(tmp_path / "a", quiet=True, loggers=both)
    assert len(calls) == 4, "nothing was open"


def test_a_run_of_mlflow_may_be_gone_on_with(tmp_path, monkeypatch):
    """MLflow never changes a parameter: the rounds of a lengthened run are one."""
    said = {}
    cfg = tiny_config(tmp_path / "run", rounds=2)
    begun = types.SimpleNamespace(data=types.SimpleNamespace(params={name: str(value) for name, value in cfg.model_dump().items() if name != "lr"}))
    given = {"log_params": lambda values: said.update(params=values), "set_tags": lambda values: said.update(tags=values)}
    monkeypatch.setitem(sys.modules, "mlflow", types.SimpleNamespace(start_run=lambda **_: begun, **given))
    loggers.MLflowLogger(run_id="7").start(cfg.model_copy(update={"rounds": 5}), {})
    assert said == {"params": {"lr": cfg.lr}, "tags": {"continued.rounds": 5}}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"loggers": Observer()}, r"loggers: expected a list of observers, got <hetlora.*; write loggers=\[...\]"),
        ({"loggers": ["tensorboard"]}, r"loggers: expected observers, such as TensorBoardLogger\('logs'\), got 'tensorboard'"),
        ({"on_round_end": 3}, "on_round_end: expected a function of a round's record, got 3"),
        ({"observer": print}, r"observer: expected a hetlora.observer.Observer, got <built-in function print>"),
    ],
    ids=["one", "name", "number", "function"],
)
def test_what_cannot_be_told_is_one_line_before_the_folder_is_made(tmp_path, given, message):
    with pytest.raises(ConfigError, match=message):
        run(tmp_path / "a", **given)
    assert not (tmp_path / "a").exists()


def test_tensorboard_reads_what_was_logged(tmp_path):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator", reason="needs the extra 'tensorboard'")
    result = run(tmp_path / "run", quiet=True, loggers=[loggers.TensorBoardLogger(str(tmp_path / "logs"))])
    events = accumulator.EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    found = [(event.step, event.value) for event in events.Scalars("perplexity/clients")]
    assert found == [(r["round"], pytest.approx(r["evaluation"]["client_text"]["perplexity"], rel=2**-23)) for r in result.history]


def test_a_run_as_a_frame(tmp_path, monkeypatch):
    result = run(tmp_path / "run", quiet=True)
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "pandas", None)
        with pytest.raises(ConfigError, match=r"pip install '\.\[pandas\]'"):
            result.to_pandas()
    pytest.importorskip("pandas", reason="needs the extra 'pandas'")
    frame = result.to_pandas()
    assert list(frame.index) == [0, 1, 2]
    assert list(frame["perplexity/clients"]) == [r["evaluation"]["client_text"]["perplexity"] for r in result.history]
