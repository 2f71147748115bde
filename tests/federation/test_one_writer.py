"""One writer a run folder: others are refused while a process holds it, and what a kill leaves is removed."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_messages import Recorder
from tiny import SIZES, contents, refused, resume, tiny_config, tiny_federation

from hetlora import lock, run_folder
from hetlora.config import ConfigError
from hetlora.loop import simulate

CHECKPOINT = run_folder.CHECKPOINT


HOLD = """
import sys, time
from pathlib import Path
from hetlora.lock import FolderLock
with FolderLock() as lock:
    lock.take(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(60)
"""


def hold(folder: Path) -> subprocess.Popen:
    other = subprocess.Popen([sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, text=True)
    assert other.stdout.readline() == "held\n"
    return other


def test_a_folder_that_another_process_writes_to_is_refused_and_free_after_its_kill(stopped):
    before = contents(stopped)
    other = hold(stopped)
    try:
        refused(stopped, f"{stopped}: another process writes to it (process {other.pid} on ", ", since 20")
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    assert contents(stopped) == {**before, ".lock": (stopped / ".lock").read_bytes()}, "a kill leaves the file of the lock, and no lock"
    resume(stopped)
    assert not (stopped / ".lock").exists()


def test_a_run_holds_its_folder_from_the_first_moment_to_the_last(tmp_path):
    seen = []

    class Second(Recorder):
        def start(self, *_):
            with pytest.raises(ConfigError, match=f"another process writes to it \\(process {os.getpid()} "):
                resume(tmp_path / "run")
            seen.append("start")

        finish = start

    simulate(tiny_config(tmp_path / "run"), federation=tiny_federation(SIZES), observer=Second())
    assert seen == ["start"] * 2 and [path.name for path in tmp_path.iterdir()] == ["run"]
    assert ".lock" not in contents(tmp_path / "run")


def test_a_forked_child_does_not_end_its_parents_lock(tmp_path):
    with lock.FolderLock() as mine:
        mine.take(tmp_path)
        child = os.fork()
        if not child:
            mine.release()
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(ConfigError, match="another process writes to it"):
            lock.FolderLock().take(tmp_path)


def test_a_link_laid_in_place_of_the_lock_or_of_a_temporary_file_is_not_followed(stopped, monkeypatch):
    mine = stopped.parent / "mine"
    mine.write_text("mine")
    (stopped / ".lock").symlink_to(mine)
    with pytest.raises(OSError, match="lock"):
        resume(stopped)
    (stopped / ".lock").unlink()
    monkeypatch.setattr("secrets.token_hex", lambda _: "0" * 16)
    (stopped / f".x.{'0' * 16}.tmp").symlink_to(mine)
    with pytest.raises(run_folder.WriteError, match="x: cannot be written"):
        run_folder.write_atomic(stopped / "x", "yours")
    assert mine.read_text() == "mine" and not (stopped / "x").exists()


@pytest.mark.parametrize("missing", ["platform", "file system"])
def test_without_locks_the_run_goes_on_and_says_so(tmp_path, monkeypatch, missing):
    if missing == "platform":
        monkeypatch.setattr(lock, "fcntl", None)
    else:

        def fail(*_):
            raise OSError(errno.ENOLCK, "No locks available")

        monkeypatch.setattr(lock.fcntl, "flock", fail)
    seen = Recorder()
    simulate(tiny_config(tmp_path / "run", rounds=1), federation=tiny_federation(SIZES), observer=seen)
    assert any("start one at a time" in text for text in seen.messages)


def test_leftovers_of_a_kill_are_removed_and_nothing_else(stopped):
    own = [stopped / f".{CHECKPOINT}.{'a' * 16}.tmp", stopped / "adapter" / f".adapter_config.json.{'b' * 16}.tmp"]
    own.append(next((stopped / "clients").iterdir()) / f".adapter_model.safetensors.{'c' * 16}.tmp")
    foreign = [stopped / ".notes.tmp", stopped / f".{CHECKPOINT}.tmp~", stopped / "notes.tmp"]
    staging = stopped.parent / ".other.staging-x1"
    staging.mkdir()
    users = stopped.parent / ".other.staging-mine"
    users.mkdir()
    for path in (*own, *foreign, staging / ".lock", staging / "config.json", users / ".lock", users / "thesis.tex"):
        path.write_text("x")
    resume(stopped)
    simulate(tiny_config(stopped.parent / "other", rounds=1), federation=tiny_federation(SIZES))
    assert not any(path.exists() for path in (*own, staging)) and all(path.exists() for path in (*foreign, users / "thesis.tex"))


def test_a_folder_in_the_making_by_a_living_process_is_left_alone(tmp_path):
    staging = tmp_path / ".run.staging-x1"
    staging.mkdir()
    other = hold(staging)
    try:
        simulate(tiny_config(tmp_path / "run", rounds=1), federation=tiny_federation(SIZES))
        assert staging.is_dir()
    finally:
        other.kill()
        other.wait()
        other.stdout.close()


TWO = """
import sys
import time
from pathlib import Path
sys.path[:0] = {path!r}
from tiny import SIZES, tiny_config, tiny_federation
from hetlora.loop import simulate
from hetlora.observer import Observer
class Waits(Observer):
    def round_start(self, round, total, names):
        while round == 3 and not Path(sys.argv[1] + " may go on").exists():
            time.sleep(0.01)
simulate(tiny_config(Path(sys.argv[1]), rounds=5), federation=tiny_federation(SIZES), observer=Waits())
"""


@pytest.mark.slow
def test_a_second_process_cannot_resume_a_living_run_which_ends_well(tmp_path):
    script = TWO.format(path=[str(Path(__file__).parent), *sys.path])
    first = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "run")])
    log = tmp_path / "run" / "rounds.jsonl"
    end = time.monotonic() + 1500
    while not (log.exists() and log.read_text().count("\n") > 2) and time.monotonic() < end:
        time.sleep(0.01)
    try:
        for _ in range(3):
            refused(tmp_path / "run", str(tmp_path / "run"), f"process {first.pid} on ", rounds=5)
    finally:
        (tmp_path / "run may go on").touch()
        assert first.wait() == 0
    assert [json.loads(line)["round"] for line in log.read_text().splitlines()] == list(range(6))
