"""Files of a run folder: whole or absent, every damage noticed and named, equal for equal runs."""

from __future__ import annotations

import errno
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from synthetic_run import write_run
from test_kinds import RUN_IDS, RUNS
from test_messages import Recorder
from tiny import SIZES, Interrupt, Stop, contents, refused, resume, tiny_config, tiny_federation

import hetlora_kernels as hk
from hetlora import checkpoint, checkpoint_file, records, run_folder
from hetlora.cli import cli
from hetlora.config import ConfigError
from hetlora.loop import simulate

CHECKPOINT = run_folder.CHECKPOINT


def edit(file: Path, **values) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


# ---------------------------------------------------------------- written whole


def test_the_folder_is_flushed_after_a_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: calls.append(("sync", os.path.realpath(f"/proc/self/fd/{fd}"))) or fsync(fd))
    monkeypatch.setattr(os, "replace", lambda a, b: calls.append(("rename", str(b))) or replace(a, b))
    run_folder.write_atomic(tmp_path / "x", "1")
    assert [kind for kind, _ in calls] == ["sync", "rename", "sync"] and calls[-1] == ("sync", str(tmp_path))


@pytest.mark.parametrize("name", [CHECKPOINT, "rounds.jsonl", "summary.json", "adapter_model.safetensors"])
def test_a_full_disk_names_the_file_and_how_to_go_on(stopped, monkeypatch, name):
    real = os.fsync

    def full(descriptor):
        if name in os.path.realpath(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.ENOSPC, "No space left on device")
        real(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        text = refused(stopped, name, "cannot be written (no space left on device)", f"hetlora run --resume --output {stopped}")
    assert not any(name.endswith(".tmp") for name in contents(stopped)), text
    assert len(resume(stopped).history) == 4


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_a_run_that_cannot_be_created_leaves_nothing_and_is_not_to_be_resumed(tmp_path, monkeypatch, error):
    real = os.fsync

    def fails(descriptor):
        if "versions.json" in os.path.realpath(f"/proc/self/fd/{descriptor}"):
            raise error
        real(descriptor)

    folder = tmp_path / "run"
    with monkeypatch.context() as patch, pytest.raises((ConfigError, KeyboardInterrupt)) as caught:
        patch.setattr(os, "fsync", fails)
        simulate(tiny_config(folder), federation=tiny_federation(SIZES))
    assert not list(tmp_path.iterdir())
    if isinstance(error, OSError):
        expected = f"{folder / 'versions.json'}: cannot be written (no space left on device); make room there or mend it, then give the command again"
        assert str(caught.value) == expected
    assert len(simulate(tiny_config(folder, rounds=1), federation=tiny_federation(SIZES)).history) == 2


# ---------------------------------------------------------------- checkpoints


@pytest.mark.slow
def test_every_flipped_bit_of_a_checkpoint_is_noticed(stopped):
    """All of the header and the checksum, and 200 places of the rest."""
    path = stopped / CHECKPOINT
    good = path.read_bytes()
    header = 8 + int.from_bytes(good[:8], "little")
    draw = random.Random(0)
    places = [*range(header), *(draw.randrange(header, len(good)) for _ in range(200)), len(good) - 1]
    for place in places:
        damaged = bytearray(good)
        damaged[place] ^= 1 << draw.randrange(8)
        path.write_bytes(damaged)
        with pytest.raises(ConfigError, match=r"checkpoint\.safetensors: not a "):
            checkpoint.load_checkpoint(stopped)
    path.write_bytes(good + b"\0")
    refused(stopped, CHECKPOINT, "its checksum does not fit")
    path.write_bytes(good)
    resume(stopped)


@pytest.mark.parametrize("place", [0.1, 0.5, 0.9])
def test_a_flipped_bit_stops_a_resume_and_an_export_before_anything_is_read(stopped, monkeypatch, place):
    content = bytearray((stopped / CHECKPOINT).read_bytes())
    header = 8 + int.from_bytes(content[:8], "little")
    content[header + int(place * (len(content) - header))] ^= 64
    (stopped / CHECKPOINT).write_bytes(content)
    monkeypatch.setattr("hetlora.loop.prepare", lambda *_, **__: pytest.fail("the model was loaded first"))
    with pytest.raises(ConfigError, match=r"checkpoint\.safetensors: not a readable checkpoint \(its checksum does not fit its content"):
        simulate(tiny_config(stopped), resume=True)


@pytest.mark.parametrize(("name", "value"), [("lr", 0.06), ("weights", "uniform"), ("local_steps", 3), ("clip_norm", 2.0), ("seed", 1)])
def test_settings_edited_between_stop_and_resume_are_refused_by_name(stopped, name, value):
    before = json.loads((stopped / "config.json").read_text())[name]
    edit(stopped / "config.json", **{name: value})
    refused(stopped, f"{stopped / 'config.json'}: not what the checkpoint was made with ({name} was {before!r}, now {value!r})", **{name: value})
    assert resume_by_command(stopped) == (2, True)


def resume_by_command(folder: Path) -> tuple[int, bool]:
    result = CliRunner().invoke(cli, ["run", "--resume", "--output", str(folder)])
    return result.exit_code, "not what the checkpoint was made with" in result.stderr and result.stderr.count("\n") == 1


def test_settings_that_change_only_bits_are_said_and_obeyed(stopped):
    edit(stopped / "config.json", max_tokens_per_step=24, cobatch=False)
    seen = Recorder()
    resume(stopped, seen, max_tokens_per_step=24, cobatch=False)
    line = next(text for text in seen.messages if "last bits" in text)
    assert "max_tokens_per_step was 16384, now 24" in line and "cobatch was True, now False" in line


def test_a_resume_may_ask_for_settings_that_change_only_bits(stopped):
    seen = Recorder()
    assert len(resume(stopped, seen, device="cpu", cobatch=False).history) == 4
    said = [text for text in seen.messages if "last bits" in text]
    assert len(said) == 1 and "device was 'auto', now 'cpu', cobatch was True, now False" in said[0]


def test_a_resume_before_the_first_checkpoint_says_what_changes_bits(tmp_path):
    with pytest.raises(Stop):
        simulate(tiny_config(tmp_path / "run"), federation=tiny_federation(SIZES), observer=Interrupt("start"))
    seen = Recorder()
    resume(tmp_path / "run", seen, max_tokens_per_step=24)
    assert len([text for text in seen.messages if "max_tokens_per_step was 16384, now 24" in text]) == 1


def test_another_instruction_set_is_said(stopped):
    edit(stopped / "versions.json", **{"instruction set": "NO AVX"})
    seen = Recorder()
    resume(stopped, seen)
    assert any("instruction set was NO AVX, is " in text for text in seen.messages)


EQUAL = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from tiny import SIZES, tiny_config, tiny_federation
from hetlora.loop import simulate
simulate(tiny_config(Path(sys.argv[1]), rounds=1), federation=tiny_federation(SIZES))
"""


@pytest.mark.slow
def test_equal_runs_give_equal_files(tmp_path):
    """In two processes, whose hash seeds differ."""
    files = []
    for seed in ("1", "2"):
        script = EQUAL.format(path=[str(Path(__file__).parent), *sys.path])
        environment = {**os.environ, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", script, str(tmp_path / seed)], check=True, env=environment)
        files.append(contents(tmp_path / seed))
    assert files[0].keys() == files[1].keys()
    different = [name for name in files[0] if files[0][name] != files[1][name]]
    made = [json.loads(found.pop("versions.json")) for found in files]
    assert {**made[0], "started": ""} == {**made[1], "started": ""}
    assert [name for name in different if name != "versions.json"] == ["config.json", "rounds.jsonl", "summary.json"], "the folder's name, and times"


def test_a_state_of_many_clients_and_modules_fits(tmp_path):
    """12,000 clients by 224 modules: as JSON in the header, safetensors refuses its own file."""
    modules = [f"model.layers.{i // 7}.self_attn.projection_{i % 7}" for i in range(224)]
    state = {"ranks": {f"client{k:05d}": {name: (k * i) % 50 for i, name in enumerate(modules)} for k in range(12_000)}, "perplexity_before": {"a": 1.5}}
    checkpoint.save_checkpoint(tmp_path, state, hk.AdapterBank({"layer": (2, 2)}, [1]), {})
    assert (tmp_path / CHECKPOINT).stat().st_size < 13e6
    assert checkpoint_file.read_state(tmp_path / CHECKPOINT) == state


@pytest.mark.parametrize(
    "value",
    [{"a": 1, "b": 2.5}, {"a": float("inf")}, {"a": -(2**40)}, {"a": {"x": 1}, "b": {"y": 1}}, {"a": {}}, {}, {"a": True}, {"a": [1]}, 3, None, "x", {"é": 1}],
    ids=repr,
)
def test_states_come_back_as_they_were(value):
    packed = checkpoint_file.pack({"name": value})
    back = checkpoint_file.unpack(packed)["name"]
    assert back == value and repr(back) == repr(value)


# ---------------------------------------------------------------- small files


@pytest.mark.parametrize(
    ("content", "reason"),
    [('{"threads": "0"}', "threads: expected a number from 1 on, got 0"), ('{"threads": null}', "damaged"), ("{}", "damaged (no 'threads')"), ("[", "damaged"),
     ("[1]", "damaged"), ('{"threads": "1", "threads": "2"}', "'threads' comes twice"), ("\xff\xfe", "UTF-16")],
)  # fmt: skip
def test_damaged_versions_are_refused(stopped, content, reason):
    (stopped / "versions.json").write_bytes(content.encode("latin-1"))
    refused(stopped, str(stopped / "versions.json"), reason)


def test_a_number_of_threads_that_cannot_be_is_said_and_not_used(stopped):
    before = torch.get_num_threads()
    edit(stopped / "versions.json", threads="100000")
    seen = Recorder()
    resume(stopped, seen)
    assert torch.get_num_threads() == before and any("versions.json: 100000 threads are more" in text for text in seen.messages)


def command(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(cli, [str(argument) for argument in arguments])
    assert result.exit_code in (0, 2), result.exception
    assert result.exit_code == 0 or result.stderr.count("\n") == 1, result.stderr
    return result.exit_code, result.stderr


@pytest.mark.parametrize(
    "content",
    ['{"clients": null}', '{"clients": [{"name": 5}]}', '{"clients": [{"name": "a", "rank_start": {}, "rank_end": 2, "sequences": 1, "rounds": 1}]}'],
)
def test_a_damaged_summary_is_named(tmp_path, content):
    write_run(tmp_path / "run", rounds=2)
    (tmp_path / "run" / "summary.json").write_text(content)
    code, text = command("report", tmp_path / "run")
    assert code == 2 and "summary.json: damaged (clients" in text


@pytest.mark.parametrize("line", ['{"round": 1, "clients": 5}', '{"round": -1}', '{"round": "1"}', "[]", '{"round": 1, "clients": [{"name": "x"}]}'])
def test_a_line_of_the_log_that_is_no_round_is_left_out_of_the_report_and_stops_a_resume(stopped, line):
    log = (stopped / "rounds.jsonl").read_text().splitlines()
    (stopped / "rounds.jsonl").write_text("\n".join([log[0], line, log[2]]) + "\n")
    problems = run_folder.read_run(stopped).problems
    assert any(text.startswith("Line 2 of rounds.jsonl is not valid (") for text in problems)
    refused(stopped, "rounds.jsonl: expected one line for each of the rounds 0 to 2")


@pytest.mark.parametrize("values", [{"r": 0}, {"r": "x"}, {"lora_alpha": None}, {"r": True}, {"lora_alpha": 1e999}, {"base_model_name_or_path": 5}], ids=str)
def test_a_damaged_adapter_config_is_named(stopped, values):
    file = stopped / "adapter" / "adapter_config.json"
    edit(file, **values)
    code, text = command("export", stopped, "-o", stopped.parent / "out")
    assert code == 2 and str(file) in text and next(iter(values)) in text


@pytest.mark.parametrize("name", ["config.json", "versions.json", "rounds.jsonl", "summary.json", CHECKPOINT, "adapter/adapter_config.json"])
@pytest.mark.parametrize("what", ["pipe", "list", "deep", "nothing", "noise"])
def test_no_damage_of_a_small_file_ends_in_a_traceback_or_hangs(stopped, monkeypatch, name, what):
    (stopped / "summary.json").write_text('{"clients": []}')
    (stopped / name).unlink()
    if what == "pipe":
        os.mkfifo(stopped / name)
    else:
        (stopped / name).write_bytes({"list": b"[1]", "deep": b"[" * 100_000, "nothing": b"", "noise": os.urandom(300)}[what])
    monkeypatch.setattr("hetlora.loop.prepare", lambda *_, **__: tiny_federation(SIZES))
    others = stopped.parent
    for arguments in (("run", "--resume", "--output", stopped), ("report", stopped, "-o", others / "report"), ("export", stopped, "-o", others / "out")):
        command(*arguments)


@pytest.mark.parametrize("settings", RUNS, ids=RUN_IDS)
def test_what_every_kind_of_run_writes_is_what_the_readers_expect(tmp_path, settings):
    folder = tmp_path / "run"
    options = {"rounds": 1, "diagnostics": True, "evaluate": "all", "prune_scope": "module" if settings.get("train") is None else "client"}
    result = simulate(tiny_config(folder, **{**options, **settings}), federation=tiny_federation(SIZES, held_out=1))
    written = (folder / "rounds.jsonl").read_text().splitlines()
    assert [records.fault(records.Round, json.loads(line)) for line in written] == ["", ""]
    assert records.fault(records.Summary, json.loads((folder / "summary.json").read_text())) == ""
    assert run_folder.read_run(folder).problems == [] and len(result.history) == 2


# ---------------------------------------------------------------- names


def test_names_that_differ_in_case_or_form_have_folders_that_differ_in_any_file_system(tmp_path):
    names = ["Alice", "alice", "ALICE", "\u00e9", "e\u0301", "É", "a", "a.", "a..", ".", "..", "ß", "SS", "x" * 300, "X" * 300, "%41lice", "a b", "A%", "%2e"]
    folders = [run_folder.client_folder(tmp_path, name).name for name in names]
    assert len({folder.casefold() for folder in folders}) == len(names)
    assert all(folder.isascii() and not folder.endswith(".") for folder in folders)


def test_two_clients_of_one_name_in_two_cases_keep_their_own_adapters(tmp_path):
    federation = tiny_federation([3, 3])
    federation.data.clients[0] = type(federation.data.clients[0])("Ann", federation.data.clients[0].train, federation.data.clients[0].test)
    federation.data.clients[1] = type(federation.data.clients[1])("ann", federation.data.clients[1].train, federation.data.clients[1].test)
    simulate(tiny_config(tmp_path / "run", ranks="2,4", rounds=1), federation=federation)
    ranks = {path.name: json.loads((path / "adapter_config.json").read_text())["r"] for path in (tmp_path / "run" / "clients").iterdir()}
    assert len(ranks) == 2 and ranks["ann"] in (3, 4) and ranks["%41nn"] in (1, 2)
    assert command("export", tmp_path / "run", "--client", "Ann", "-o", tmp_path / "out")[0] == 0
