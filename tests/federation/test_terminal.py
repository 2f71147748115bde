"""What a terminal of any width shows: words and numbers whole, worse clients marked; what a script and a pipe get."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys

import pytest
from click.testing import CliRunner
from rich.console import Console
from rich.file_proxy import FileProxy
from synthetic_run import write_run

from hetlora import demo
from hetlora.cli import cli
from hetlora.cli_lines import say
from hetlora.config import Config
from hetlora.federation import resolve_model
from hetlora.report import terminal, text
from hetlora.report.json_lines import JsonObserver

LINE = "round 15/15: 6 clients; train loss 1.981 -> 1.952; pruned 2; perplexity clients' held-out text 6.44; down 0.57 MB, up 0.54 MB; 3.6 s"


def shown(width: int, draw) -> list[str]:
    buffer = io.StringIO()
    console = Console(file=buffer, width=width, force_terminal=True, color_system=None, highlight=False)
    draw(console)
    return buffer.getvalue().splitlines()


@pytest.mark.parametrize("width", [40, 80, 160])
def test_a_line_breaks_between_words_and_says_all(width):
    lines = shown(width, lambda console: terminal.print_text(console, LINE))
    assert all(len(line) <= width for line in lines)
    assert " ".join(line.strip() for line in lines) == LINE


def test_a_number_keeps_its_unit():
    assert text.wrap("up 0.54 MB; 14.2 % of it; in 3.6 s", 9) == ["up", "  0.54 MB;", "  14.2 %", "  of it;", "  in", "  3.6 s"]


def test_a_path_stays_whole_and_wide_characters_take_two_columns():
    path = "/a/" + "long-folder/" * 12 + "report.html"
    assert text.wrap(f"report: {path}", 80) == ["report:", f"  {path}"]
    assert [text.cells(line) for line in text.wrap("한국어 한국어 한국어", 14)] == [13, 8]


@pytest.mark.parametrize("width", [60, 80, 100, 160])
def test_the_client_table_fits_and_cuts_no_number(tmp_path, width):
    write_run(tmp_path / "run", clients=12, rounds=3)
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    summary["clients"][0] |= {"name": "a-client-with-a-long-name", "perplexity_before": 19012.25, "perplexity_after": 20022.25}
    lines = shown(width, lambda console: terminal.print_summary(console, summary, "the global adapter"))
    assert all(len(line) <= width for line in lines)
    page = "\n".join(lines)
    assert "19012.25 -> 20022.25" in page and "+5.3 % worse" in page
    table = "".join(line for line in lines if line[:1] in "┃│")
    assert ("a-client-with-a-long-name" in table) == (width >= 80)
    dropped = "not shown at this width:" in page
    assert ("sequences" in table) != dropped and (width < 100) == dropped


def test_a_long_name_of_a_table_breaks_behind_its_separators():
    name = "homlora-min+prune_lambda=0.00125,weights=samples"
    columns = [terminal.Column("method"), *(terminal.Column(title, 0) for title in ("perplexity of all", "megabytes"))]
    for width in (50, 60):
        table, _ = terminal.fitted_table(columns, [[name, "6.433", "12.5"]], width)
        first = [line.split("│")[1].strip() for line in shown(width, lambda console, table=table: console.print(table)) if line.startswith("│")]
        assert len(first) > 1 and "".join(first) == name
        assert all(line[-1] in "+,-_=" for line in first[:-1]) and any("0.00125" in line for line in first)
    assert text.fold_name("2.5-1.5/a_long_name", 6) == "2.5-1.5/\na_\nlong_\nname"
    assert text.fold_name("a_b", 80) == "a_b"


def test_clients_that_got_worse_are_marked_and_no_others():
    clients = [
        {"name": name, "rank_start": 5, "rank_end": 5, "rounds": 1, "sequences": 9, "perplexity_before": before, "perplexity_after": after}
        for name, before, after in (("better", 8.0, 7.0), ("hurt", 8.0, 8.2), ("broken", 8.0, float("inf")), ("unknown", None, None))
    ]
    table, _ = terminal.client_table({"clients": clients})
    lines = {line.split()[1]: line for line in shown(160, lambda console: console.print(table)) if "->" in line}
    assert [name for name, line in lines.items() if "worse" in line] == ["hurt", "broken"]
    assert "-12.5 %" in lines["better"] and "+2.5 % worse" in lines["hurt"]


def test_what_every_run_of_a_comparison_says_is_shown_once(capsys):
    observer = terminal.ComparisonObserver(Console(width=80))
    for seed in range(3):
        observer.message("clients_per_round = 8: there are 3 clients")
        observer.message(f"seed {seed}")
    assert capsys.readouterr().out.splitlines() == ["clients_per_round = 8: there are 3 clients", "seed 0", "seed 1", "seed 2"]


def test_json_lines_are_json_for_every_parser(capsys):
    observer = JsonObserver()
    observer.message("one\nline")
    observer.round_end({"round": 1, "evaluation": {"client_text": {"perplexity": float("inf"), "loss": float("nan")}}})

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    events = [json.loads(line, parse_constant=refuse) for line in capsys.readouterr().out.splitlines()]
    assert events[0] == {"event": "message", "text": "one\nline"}
    assert events[1]["record"]["evaluation"]["client_text"] == {"perplexity": "inf", "loss": "nan"}


def test_quiet_and_json_of_a_command(tmp_path, monkeypatch):
    """Of a whole, tiny demo: what a script reads is complete, and quiet is silent."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("hetlora.processor.prepare", lambda value: "threads: as they are")
    found = CliRunner().invoke(cli, ["demo", "--fast", "--rounds", "1", "--prune-lambda", "1", "--json", "--output", str(tmp_path / "a")])
    assert found.exit_code == 0, found.output
    events = [json.loads(line) for line in found.stdout.splitlines()]
    kinds = [event["event"] for event in events]
    assert kinds[0] == "message" and kinds[-5:] == ["round", "round", "summary", "cell", "end"] and kinds.count("start") == kinds.count("cell") == 4
    assert events[-3]["summary"] == json.loads((tmp_path / "a" / "cells" / "homlora-max" / "seed-1" / "summary.json").read_text())
    assert events[-1] == {"event": "end", "folder": str(tmp_path / "a"), "report": str(tmp_path / "a" / "comparison.html")}
    silent = CliRunner().invoke(cli, ["demo", "--fast", "--rounds", "1", "--prune-lambda", "1", "--quiet", "--output", str(tmp_path / "b")])
    assert (silent.exit_code, silent.stdout) == (0, "")
    assert (tmp_path / "b" / "comparison.html").is_file()
    both = CliRunner().invoke(cli, ["demo", "--quiet", "--json"])
    assert both.exit_code == 2 and "expected one of them" in both.stderr


@pytest.mark.skipif(os.name != "posix", reason="pipes as of POSIX")
@pytest.mark.parametrize(("arguments", "status"), [(["run", "--help"], None), (["info"], 141)])  # help: click's own status
def test_a_closed_pipe_ends_a_command_without_a_word(arguments, status):
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run([sys.executable, "-m", "hetlora", *arguments], stdout=writing, stderr=subprocess.PIPE, text=True)
    finally:
        os.close(writing)
    assert done.stderr == "" and done.returncode == (status or done.returncode)


def test_a_run_whose_reader_left_says_how_to_continue(tmp_path, monkeypatch):
    """As after `| head`, in the middle of a run."""

    class Gone(terminal.ConsoleObserver):
        def round_end(self, record):
            if record["round"] == 1:
                raise BrokenPipeError(32, "nobody reads")

    monkeypatch.setattr(terminal, "ConsoleObserver", Gone)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model = resolve_model(Config(), demo=demo.FAST_MODEL)
    settings = f"--model {model} --data stdlib:dbm,json --ranks 2,3 --rounds 2 --local-steps 1 --batch-size 1 --max-tokens-per-client 2048 --method hetlora"
    found = CliRunner().invoke(cli, ["run", *settings.split(), "--output", str(tmp_path / "a")])
    assert found.exit_code == 141, found.output
    assert found.stderr.splitlines()[-1].endswith(f"continue with hetlora run --resume --output {tmp_path / 'a'}") and "Traceback" not in found.stderr


def test_a_warning_beside_a_progress_bar_breaks_between_words(monkeypatch):
    """Rich stands in for the stream then. The console is wider than the terminal, so that it is not rich that wraps."""

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", FileProxy(Console(file=terminal, width=500), terminal))
    monkeypatch.setenv("COLUMNS", "40")
    say("a warning of several words " * 8, err=True)
    lines = terminal.getvalue().splitlines()
    assert len(lines) > 4 and all(len(line) <= 40 for line in lines)
    assert " ".join(terminal.getvalue().split()) == ("a warning of several words " * 8).strip()
