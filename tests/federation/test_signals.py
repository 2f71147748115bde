"""Signals end a command in one line that says how to go on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import types
from pathlib import Path

import pytest
from test_cli import invoke

ENDLESS = """
import sys, types, time
from hetlora import cli, run_folder
from hetlora.config import Config
loop = types.ModuleType("hetlora.loop")
def simulate(cfg, *, resume=False, observer=None):
    observer.start(cfg, {})
    run = __import__("pathlib").Path(cfg.output)
    run.mkdir(parents=True)
    (run / "config.json").write_text(cfg.to_json())
    print("going", flush=True)
    time.sleep(60)
loop.simulate = simulate
sys.modules["hetlora.loop"] = loop
cli.main()
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_a_run_in_one_line_that_says_how_to_continue(tmp_path, number):
    child = subprocess.Popen(
        [sys.executable, "-c", ENDLESS, "run", "--output", str(tmp_path / "run")],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # whoever runs the tests may ignore it, as nohup does
    )
    assert "going\n" in iter(child.stdout.readline, "")
    child.send_signal(number)
    _, text = child.communicate()
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert text == f"interrupted{by}; continue with hetlora run --resume --output {tmp_path / 'run'}\n"
    assert child.returncode == 128 + number


def test_a_hangup_that_is_ignored_stays_ignored(tmp_path):
    """As under nohup."""
    script = "import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + ENDLESS.replace("time.sleep(60)", "time.sleep(0.5); raise ValueError('the end')")
    command = [sys.executable, "-c", script, "run", "--output", str(tmp_path / "run")]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert "going\n" in iter(child.stdout.readline, "")
    child.send_signal(signal.SIGHUP)
    assert child.communicate()[1] == "hetlora: error: the end\n" and child.returncode == 2


@pytest.mark.parametrize(("module", "arguments"), [("pydantic", ["info"]), ("torch", ["info"]), ("torch", ["run", "--output", "x"])])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_during_imports_is_quiet(tmp_path, module, arguments, number):
    """The stand-in sends itself the signal and turns what it raises into an error of its own, as compiled modules do."""
    body = f"    os.kill(os.getpid(), {int(number)})\n    time.sleep(5)\n"
    (tmp_path / f"{module}.py").write_text(f"import os, time\ntry:\n{body}except BaseException:\n    raise ImportError('initialization failed')\n")
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{Path(__file__).parents[2]}"}
    heeded = lambda: signal.signal(number, signal.SIG_DFL)  # noqa: E731 - a shell's background jobs ignore SIGINT, and so would the child
    command = [sys.executable, "-m", "hetlora", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment, preexec_fn=heeded)
    by = "" if number == signal.SIGINT else f" by {number.name}"
    assert (done.returncode, done.stderr) == (128 + number, f"hetlora: interrupted{by}\n")
    assert all(line.startswith(("threads: ", "method: ")) for line in done.stdout.splitlines())


def test_an_interrupt_outside_a_run_is_one_line(monkeypatch, tmp_path):
    module = types.ModuleType("hetlora.report.page")
    module.write_report = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    monkeypatch.setitem(sys.modules, "hetlora.report.page", module)
    result = invoke("report", tmp_path)
    assert (result.exit_code, result.stderr) == (130, "hetlora: interrupted\n")
