"""The command line: options are those of Config, bad input is one line and exit status 2, the end of a run is a table and a report."""

from __future__ import annotations

import html
import io
import json
import os
import subprocess
import sys
import types
import warnings
from pathlib import Path

import pytest
from click.testing import CliRunner, Result
from rich.console import Console
from synthetic_run import write_run

from hetlora.cli import cli
from hetlora.compare.methods import METHODS
from hetlora.config import Config, ConfigError
from hetlora.report import terminal


@pytest.fixture(autouse=True)
def _calm_environment(monkeypatch):
    monkeypatch.delenv("HETLORA_DEBUG", raising=False)


def invoke(*arguments: object) -> Result:
    return CliRunner().invoke(cli, [str(argument) for argument in arguments])


def assert_one_line_error(result: Result, *parts: str) -> None:
    assert result.exit_code == 2, result.output
    assert result.stderr.startswith("hetlora: error: ") and result.stderr.count("\n") == 1, result.stderr
    assert all(part in result.stderr for part in parts), result.stderr


@pytest.fixture
def loop(monkeypatch):
    """A stand-in for hetlora.loop that records its call and leaves a finished synthetic run."""
    module = types.ModuleType("hetlora.loop")
    module.calls = []
    module.fail = None

    def simulate(cfg, *, resume=False, observer=None):
        module.calls.append((cfg, resume))
        if module.fail is not None:
            observer.start(cfg, {"clients": 6})
            raise module.fail
        folder = Path(cfg.output)
        if not resume:
            write_run(folder, clients=6, rounds=2)
        records = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
        summary = json.loads((folder / "summary.json").read_text())
        observer.start(cfg, {"clients": 6, "data": "made up"})
        observer.round_end(records[0])
        for record in records[1:]:
            observer.round_start(record["round"], 2, [c["name"] for c in record["clients"]])
            observer.local_step(1, 5)
            observer.local_step(5, 5)
            observer.evaluate(1, 1)
            observer.round_end(record)
        observer.finish(summary)
        return types.SimpleNamespace(summary=summary, run_dir=folder, history=records)

    module.simulate = simulate
    monkeypatch.setitem(sys.modules, "hetlora.loop", module)
    return module


def test_a_method_sets_its_row_over_the_file_and_under_the_flags(loop, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("rounds: 3\ngamma: 0.5\nweights: uniform\nmerge: svd\n")
    result = invoke("run", "--config", file, "--method", "fold", "--download", "4bit", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    cfg, _ = loop.calls[0]
    assert (cfg.train, cfg.weights, cfg.download, cfg.rounds) == ("fold", "samples", "4bit", 3)
    assert (cfg.gamma, cfg.merge) == (Config.model_fields["gamma"].default, "factors")  # they say nothing about fold
    assert result.stderr.count("\n") == 1 and f"--method fold leaves out gamma, weights, merge (from {file})" in result.stderr
    file.write_text("rounds: 3\ngamma: 0.99\nweights: samples\n")
    result = invoke("run", "--config", file, "--method", "fold", "--output", tmp_path / "same")
    assert result.exit_code == 0 and not result.stderr, "nothing is lost where the values are the same"
    assert invoke("run", "--method", "fold", "--weights", "uniform", "--output", tmp_path / "other").exit_code == 0
    assert loop.calls[-1][0].weights == "uniform"
    assert_one_line_error(invoke("run", "--method", "best"), "method: expected one of hetlora, ", "got 'best'")
    assert_one_line_error(invoke("run", "--method", "flod"), "got 'flod' (did you mean 'fold'?)")
    assert_one_line_error(invoke("compare", "--methods", "hetlora,homlora-mim"), "unknown 'homlora-mim' (did you mean 'homlora-min'?)")
    assert_one_line_error(invoke("run", "--method", "homlora-min"), "gives every client one rank", "ranks = 'fixed:R'", "gamma = 1.0", "weights = 'samples'")
    assert_one_line_error(invoke("run", "--method", "fold", "--gamma", "0.5"), "gamma = 0.5", "leave it out")


def test_without_a_method_the_default_is_fold_unless_a_setting_tells_another(loop, tmp_path):
    """`--help` and the first lines say which; settings that fold reads too do not make it another method."""
    found = {}
    for place, flags in enumerate(([], ["--download", "4bit"], ["--gamma", "0.9"], ["--merge", "svd"], ["--train", "adapters"], ["--method", "hetlora"])):
        result = invoke("run", "--output", tmp_path / str(place), *flags)
        assert result.exit_code == 0, result.output
        found[" ".join(flags)] = (loop.calls[-1][0].train, next((line for line in result.stdout.splitlines() if line.startswith("method: ")), ""))
    default = "method: fold, the default; --method hetlora is the published one"
    assert found[""] == found["--download 4bit"] == ("fold", default)
    assert found["--gamma 0.9"] == ("adapters", "method: as gamma and the defaults of the other settings say (no --method given)")
    assert found["--merge svd"][0] == found["--train adapters"][0] == "adapters" and found["--method hetlora"] == ("adapters", "method: hetlora")
    assert loop.calls[-1][0] == Config(output=str(tmp_path / "5")), "faithful HETLORA is what the settings' own defaults are"
    assert "The method is fold unless --method" in " ".join(invoke("run", "--help").output.split())[:300]
    (tmp_path / "c.yaml").write_text("prune_lambda: 1\n")
    assert invoke("run", "--config", tmp_path / "c.yaml", "--output", tmp_path / "c").stdout.count("method: as prune_lambda and") == 1
    assert_one_line_error(invoke("run", "--lr", "-1", "--output", tmp_path / "d"), "lr: ")


def test_help_says_what_every_method_is():
    for command in ("run", "compare"):
        text = " ".join(invoke(command, "--help").output.split("Methods (docs")[1].split())
        for name, method in METHODS.items():
            assert (f" {name} {method.text}".replace("- ", "-") in text.replace("- ", "-")) == (command == "compare" or method.ranks == "own"), name


def test_every_setting_is_an_option_under_its_group():
    text = invoke("run", "--help").output
    place = -1
    for name, field in Config.model_fields.items():
        flag = f"--{name.replace('_', '-')}"
        assert f"  {flag} " in text, flag
        heading = f"{field.json_schema_extra['group'].capitalize()} settings:"
        assert text.index(heading) < text.index(f"  {flag} ")
        assert text.index(f"  {flag} ") > place, "options come in the order of Config"
        place = text.index(f"  {flag} ")
    assert "--cobatch / --no-cobatch" in text and "[none|owners]" in text


@pytest.mark.parametrize("command", ["run", "demo", "compare", "report", "export", "info", "tune", "serve", "join", "bench"])
def test_help_is_no_wider_than_a_terminal(command, monkeypatch, capfd):
    """The ten names of --merge and the paragraphs of `hetlora bench` were broken inside words at 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    text = invoke(command, "--help").output + capfd.readouterr().out
    assert "--" in text and not [line for line in text.splitlines() if len(line) > 80]


@pytest.mark.parametrize("command", [(), ("demo",), ("run",), ("report",), ("export",), ("info",), ("tune",)])
def test_help_works(command):
    result = invoke(*command, "--help")
    assert result.exit_code == 0 and result.stderr == "" and "Usage" in result.output


@pytest.mark.parametrize("arguments", [("report", "nowhere"), ("export", "nowhere", "-o", "out"), ("run", "--resume", "--output", "nowhere")])
def test_a_folder_without_a_run_is_told_in_one_wording(arguments, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (
        2,
        "hetlora: error: nowhere: no run there (config.json is missing); give the folder that 'hetlora run' wrote\n",
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("arguments", [("report", "model"), ("export", "model", "-o", "out"), ("run", "--resume", "--output", "model")])
def test_the_folder_of_a_model_is_no_run(arguments, tmp_path, monkeypatch):
    """It has a config.json too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "llama", "vocab_size": 8}')
    result = invoke(*arguments)
    assert (result.exit_code, result.stderr) == (
        2,
        "hetlora: error: model: no run there (config.json is that of a model); give the folder that 'hetlora run' wrote\n",
    )


def test_without_a_command_help_is_shown():
    result = invoke()
    assert result.exit_code == 0 and all(name in result.output for name in ("demo", "run", "report", "export", "info", "tune"))


@pytest.mark.parametrize(
    ("arguments", "parts"),
    [
        (("rnu",), ["no such command 'rnu'", "did you mean run"]),
        (("run", "--ronds", "3"), ["no such option --ronds", "--rounds"]),
        (("run", "--zzz"), ["no such option --zzz", "run --help"]),
        (("run", "--rounds", "many"), ["--rounds", "'many'"]),
        (("run", "--rounds", "0"), ["rounds", "got 0"]),
        (("run", "--dtype", "int4"), ["--dtype", "'int4'", "float32"]),
        (("run", "stray"), ["unexpected extra argument", "stray"]),
        (("run", "--config", "nowhere.yaml"), ["nowhere.yaml", "cannot be read"]),
        (("run", "--resume", "--output", "nowhere"), ["nowhere", "config.json is missing"]),
        (("report", "nowhere"), ["nowhere", "no run there"]),
        (("export", "nowhere", "-o", "out"), ["nowhere", "no run there"]),
        (("export", "nowhere"), ["-o"]),
    ],
)
def test_bad_input_is_one_line(arguments, parts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert_one_line_error(invoke(*arguments), *parts)
    assert list(tmp_path.iterdir()) == []


def test_flags_override_the_file_which_overrides_defaults(loop, tmp_path):
    file = tmp_path / "settings.yaml"
    file.write_text(f"rounds: 7\ngamma: 0.5\nranks: [5, 10]\ncobatch: true\noutput: {tmp_path / 'run'}\n")
    result = invoke("run", "--config", file, "--rounds", "9", "--no-cobatch")
    assert result.exit_code == 0, result.output
    cfg, resume = loop.calls[0]
    assert (cfg.rounds, cfg.gamma, cfg.ranks, cfg.cobatch, cfg.seq_len, resume) == (9, 0.5, "5,10", False, 256, False)


def test_flags_without_a_file(loop, tmp_path):
    assert invoke("run", "--output", tmp_path / "run", "--skip-empty", "--lr", "1e-4", "--weights", "uniform").exit_code == 0
    cfg = loop.calls[0][0]
    assert cfg == Config(output=str(tmp_path / "run"), skip_empty=True, lr=1e-4, weights="uniform", train="fold")


def test_unknown_setting_in_a_file_is_named_with_the_nearest(loop, tmp_path):
    file = tmp_path / "settings.toml"
    file.write_text("gama = 0.5\n")
    assert_one_line_error(invoke("run", "--config", file), "settings.toml", "gama", "'gamma'")
    assert loop.calls == []


def test_end_of_a_run_is_a_table_and_a_report(loop, tmp_path):
    result = invoke("run", "--output", tmp_path / "run")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    for client in summary["clients"]:
        assert client["name"] in result.stdout
    assert "round 2/2: 6 clients" in result.stdout
    before, after = (summary[key]["client_text"]["perplexity"] for key in ("evaluation_before", "evaluation_after"))
    assert f"clients' held-out text: {before:.2f} -> {after:.2f}" in result.stdout
    share = 100 * summary["bytes_up"] / summary["bytes_up_homlora"]
    assert f"HomLoRA at r=50 would move {summary['bytes_up_homlora'] / 1e6:.2f} MB, {share:.1f} % of it" in result.stdout
    assert f"report: {tmp_path / 'run' / 'report.html'}" in result.stdout and (tmp_path / "run" / "report.html").is_file()
    assert "\x1b" not in result.stdout, "no colours or cursor movements where there is no terminal"


def test_resume_takes_the_settings_of_the_run(loop, tmp_path):
    write_run(tmp_path / "run", clients=6, rounds=2, lr=0.01)
    moved = tmp_path / "moved"
    (tmp_path / "run").rename(moved)
    result = invoke("run", "--resume", "--output", moved, "--lr", "0.01")
    assert result.exit_code == 0, result.output
    cfg, resume = loop.calls[0]
    assert resume and cfg.lr == 0.01 and cfg.rounds == 2 and cfg.output == str(moved)


@pytest.mark.parametrize(
    ("settings", "caption"),
    [
        ({}, "perplexity is that of the global adapter at the client's rank, on"),
        ({"train": "fold", "weights": "samples", "gamma": 0.99}, "perplexity is that of the global adapter with all its rows, as a client downloads it, on"),
        ({"train": "full", "weights": "samples", "gamma": 0.99}, "perplexity is that of the global model, on"),
    ],
)
def test_table_and_page_say_what_a_clients_perplexity_is_that_of(loop, tmp_path, settings, caption):
    write_run(tmp_path / "run", clients=6, rounds=2, **settings)
    result = invoke("run", "--resume", "--output", tmp_path / "run")
    assert result.exit_code == 0 and caption in result.output, result.output
    assert caption[1:] in html.unescape((tmp_path / "run" / "report.html").read_text(encoding="utf-8"))


def test_resume_takes_another_device_and_memory_limit(loop, tmp_path):
    write_run(tmp_path / "run", clients=6, rounds=2)
    flags = ["--device", "cpu", "--no-cobatch", "--max-tokens-per-step", "64"]
    result = invoke("run", "--resume", "--output", tmp_path / "run", *flags)
    assert result.exit_code == 0, result.output
    cfg, _ = loop.calls[0]
    assert (cfg.device, cfg.cobatch, cfg.max_tokens_per_step) == ("cpu", False, 64)


def test_resume_names_contradicting_flags(loop, tmp_path):
    write_run(tmp_path / "run", rounds=2)
    file = tmp_path / "settings.json"
    file.write_text('{"seed": 5, "rounds": 2}')
    result = invoke("run", "--resume", "--output", tmp_path / "run", "--config", file, "--prune-lambda", "1", "--gamma", "0.8")
    assert_one_line_error(result, "--seed 5 (the run has 0)", "--prune-lambda 1.0 (the run has 0.001)")
    assert "--rounds" not in result.stderr and "--gamma" not in result.stderr
    assert loop.calls == []


def test_interrupt_says_how_to_continue(loop, tmp_path):
    folder = tmp_path / "run"
    write_run(folder, rounds=5, done=2)
    loop.fail = KeyboardInterrupt()
    result = invoke("run", "--resume", "--output", folder)
    assert result.exit_code == 130
    assert f"interrupted; continue with hetlora run --resume --output {folder}" in result.stderr
    result = invoke("run", "--output", tmp_path / "other")
    assert result.exit_code == 130 and "before the first round" in result.stderr


@pytest.mark.parametrize(
    "error", [ValueError("rank: expected 1,\ngot 0"), FileNotFoundError(2, "No such file or directory", "data.jsonl"), OSError("disk is full")]
)
def test_errors_of_a_run_are_one_line(loop, tmp_path, error):
    loop.fail = error
    assert_one_line_error(invoke("run", "--output", tmp_path / "run"))


def test_debug_shows_the_traceback(loop, tmp_path, monkeypatch, capfd):
    loop.fail = ValueError("rank is wrong")
    monkeypatch.setenv("HETLORA_DEBUG", "1")
    result = invoke("run", "--output", tmp_path / "run")
    assert result.exit_code == 2 and "Traceback" in result.stderr and "hetlora: error: rank is wrong" in result.stderr


def test_bugs_keep_their_traceback(loop, tmp_path):
    loop.fail = RuntimeError("a bug")
    assert isinstance(invoke("run", "--output", tmp_path / "run").exception, RuntimeError)


def test_warnings_are_one_line(loop, tmp_path):
    simulate = loop.simulate

    def warn_first(*arguments, **named):
        warnings.warn("falls back,\nbecause", stacklevel=1)
        return simulate(*arguments, **named)

    loop.simulate = warn_first
    assert "hetlora: warning: falls back, because\n" in invoke("run", "--output", tmp_path / "run").stderr


def test_demo_passes_only_what_was_given(monkeypatch, tmp_path, loop):
    module, seen = types.ModuleType("hetlora.demo"), []

    def run_demo(observer, **overrides):
        seen.append(overrides)
        raise ConfigError("no demo today")

    module.run_demo, module.SETTINGS, module.COLUMNS = run_demo, {"output": "runs/demo"}, ()
    monkeypatch.setitem(sys.modules, "hetlora.demo", module)
    assert "no demo today" in invoke("demo").stderr
    assert invoke("demo", "--rounds", "3", "--prune-lambda", "0.1", "--fast").exit_code == 2
    assert seen == [{}, {"rounds": 3, "prune_lambda": 0.1, "fast": True}]


def test_report_and_info(tmp_path):
    write_run(tmp_path / "run", rounds=1)
    result = invoke("report", tmp_path / "run", "-o", tmp_path / "out")
    assert result.exit_code == 0 and result.stdout == f"report: {tmp_path / 'out' / 'report.html'}\n"
    import hetlora_kernels

    result = invoke("info")
    assert result.exit_code == 0, result.output
    assert all(name in result.stdout for name in hetlora_kernels.backends())
    assert "transformers" in result.stdout and "cpu" in result.stdout


def test_many_clients_show_the_most_changed():
    clients = [
        {"name": f"c{i:02d}", "rank_start": 9, "rank_end": 5.5, "sequences": 1, "rounds": 1, "perplexity_before": 10.0, "perplexity_after": 10.0 - 0.1 * i}
        for i in range(41)
    ]
    table, note = terminal.client_table({"clients": clients})
    assert list(table.columns[0]._cells) and [str(cell) for cell in table.columns[0].cells] == [f"c{i}" for i in range(21, 41)]
    assert "20 of 41 clients" in note and "summary.json" in note
    assert terminal.client_table({"clients": clients[:40]})[1] == ""


def test_progress_on_a_terminal_survives_odd_names_and_obeys_no_color(monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with terminal.ConsoleObserver(console) as observer:
        observer.message("[/] no markup")
        observer.pretrain(1, 2, 3.0)
        observer.pretrain(2, 2, 2.5)
        observer.start(Config(rounds=2), {"clients": "[red]"})
        observer.round_start(1, 2, ["[bold]"])
        observer.local_step(1, 5)
        observer.evaluate(1, 2)
        observer.round_end({"round": 1, "clients": [], "dropped": [{"name": "[x]", "reason": "non-finite"}], "mean_rank": 5.0, "evaluation": None})
        observer._bars.refresh()
    text = console.file.getvalue()
    assert "[/] no markup" in text and "[red]" in text and "dropped [x]: non-finite" in text and "1/2" in text
    assert not any(f"\x1b[{code}m" in text for code in (31, 32, 33, 34, 35, 36)), "NO_COLOR is set"


def test_as_a_process(tmp_path):
    def hetlora(*arguments: str) -> subprocess.CompletedProcess[str]:
        env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "PYTHONIOENCODING": "ascii"}
        return subprocess.run([sys.executable, "-m", "hetlora", *arguments], capture_output=True, text=True, cwd=tmp_path, env=env, check=False)

    bad = hetlora("run", "--gama", "1")
    assert (bad.returncode, bad.stdout) == (2, "") and bad.stderr == "hetlora: error: no such option --gama (did you mean --gamma?)\n"
    write_run(tmp_path / "한", rounds=1)
    good = hetlora("report", "한")
    assert good.returncode == 0 and good.stderr == "" and (tmp_path / "한" / "report.html").is_file()
