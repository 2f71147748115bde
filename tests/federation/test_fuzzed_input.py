"""Settings, files, command lines and data as nobody would give them, drawn from fixed seeds: accepted, or refused in one line."""

from __future__ import annotations

import json
import random
import sys
import time
import types
import warnings

import pytest
from click.testing import CliRunner
from test_data import load
from test_outside_input import NAUGHTY

from hetlora.cli import cli
from hetlora.config import Config, ConfigError
from hetlora.report.text import printable


def noise(draw: random.Random) -> object:
    """A value as nobody would give it."""
    numbers = [0, -1, 10**30, 1e999, float("nan"), 5e-324, 0.5, True]
    texts = [
        "",
        " ",
        "\0",
        NAUGHTY,
        "\ud800",
        "../..",
        "a" * 5000,
        "{}",
        "[",
        "powerlaw:1:",
        "column:x:1:2",
        "fixed:" + "9" * 5000,
        "hub:",
        "stdlib:",
        "(" * 500,
    ]
    return draw.choice([*numbers, *texts, None, [], [[]], {}, {"a": [1]}, [1, "x", None]])


@pytest.mark.slow
def test_fuzzed_settings_are_accepted_or_refused_by_name():
    draw = random.Random(0)
    names = list(Config.model_fields)
    for _ in range(400):
        values = {draw.choice([*names, "x" * draw.randrange(300)]): noise(draw) for _ in range(draw.randrange(1, 4))}
        try:
            Config.create("here", **values)
        except ConfigError as error:
            assert str(error).startswith("here: ") and "\n" not in printable(error) and len(str(error)) < 20_000
            assert any(name in str(error) for name in values) or "settings" in str(error), (values, str(error)[:300])


@pytest.mark.slow
def test_fuzzed_files_and_command_lines_end_in_one_line(tmp_path, monkeypatch):
    calls = []
    module = types.ModuleType("hetlora.loop")
    module.simulate = lambda cfg, **_: calls.append(cfg) or (_ for _ in ()).throw(ConfigError("accepted"))
    monkeypatch.setitem(sys.modules, "hetlora.loop", module)
    draw = random.Random(1)
    names = list(Config.model_fields)
    start = time.monotonic()
    for turn in range(300):
        suffix = draw.choice([".yaml", ".json", ".toml", "", ".jsonl"])
        values = {draw.choice(names): noise(draw) for _ in range(draw.randrange(3))}
        content = json.dumps(values).encode()
        if suffix == ".toml":
            content = "\n".join(f"{name} = {json.dumps(value)}" for name, value in values.items()).encode()
        content = bytearray(content)
        for _ in range(draw.choice([0, 0, 1, 5])):
            if content:
                content[draw.randrange(len(content))] = draw.randrange(256)
        file = tmp_path / f"{turn}{suffix}"
        file.write_bytes(content)
        flags = []
        for name in draw.sample(names, draw.randrange(3)):
            value = str(noise(draw))
            flags += [f"--{name.replace('_', '-')}", value] if "\0" not in value and draw.random() < 0.9 else [f"--{name}"]
        result = CliRunner().invoke(cli, ["run", "--config", str(file), *flags, "--output", str(tmp_path / "run")])
        assert result.exit_code == 2 and result.stderr.count("\n") == 1, (content, flags, result.output, result.exception)
        assert all(c.isprintable() for c in result.stderr[:-1])
    assert calls and time.monotonic() > start


@pytest.mark.slow
def test_fuzzed_data_is_read_or_refused(tmp_path):
    draw = random.Random(2)
    good = json.dumps({"client": "a", "text": "x" * 40, "n": 3, "p": "why"}).encode()
    for turn in range(300):
        rows = []
        for _ in range(6):
            row = bytearray(good)
            for _ in range(draw.choice([0, 0, 1, 3])):
                row[draw.randrange(len(row))] = draw.randrange(256)
            rows.append(bytes(row) if draw.random() < 0.8 else json.dumps({"client": noise(draw), "text": noise(draw)}).encode())
        path = tmp_path / f"{turn}.jsonl"
        path.write_bytes(b"\n".join(rows))
        settings = draw.choice([{}, {"prompt_field": "p"}, {"ranks": "column:n:1:4"}, {"skip_bad_rows": True, "skip_empty": True}])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                assert load(path, **settings).clients
            except ConfigError as error:
                assert "\n" not in printable(error) and str(path) in str(error)
