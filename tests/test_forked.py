"""The processes that tests fork (forked.py): one that hangs, one whose parent is gone, one that reads its input."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import forked
import pytest

pytestmark = pytest.mark.timeout(60)
# Who holds `held` has not ended: the server, or one of those it has forked.
SERVER = f"""
import fcntl, os, sys
sys.path.append({str(Path(__file__).parent)!r})
import forked
held = open("held", "w")
fcntl.flock(held, fcntl.LOCK_EX)
forked.serve(exec)
"""


@pytest.fixture
def script(tmp_path, monkeypatch) -> Path:
    """A server that has imported nothing, and runs code."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(forked, "_servers", {})
    (tmp_path / "server.py").write_text(SERVER)
    yield tmp_path / "server.py"
    forked._end_all()
    assert_ended()


def assert_ended() -> None:
    """The server and all it has forked."""
    with open("held", "w") as held:
        for _ in range(500):
            try:
                return fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                time.sleep(0.02)
    pytest.fail("some process lives on")


def test_a_call_that_hangs_ends_with_its_server_and_the_next_has_its_own_answer(script):
    hangs = "import os, time; print('begun', flush=True); os.fork(); time.sleep(600)"
    with pytest.raises(TimeoutError, match=r"server\.py took more than 1 s and was killed, with its server\. It had said: begun\n"):
        forked.call(script, {}, hangs, timeout=1)
    assert_ended()
    done = forked.call(script, {}, "import sys; sys.exit(7)", timeout=10)
    assert (done.returncode, done.stdout, done.stderr) == (7, "", "")


def test_an_interrupted_call_gives_its_answer_to_no_other(script):
    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.5)
        with pytest.raises(KeyboardInterrupt):
            forked.call(script, {}, "import sys, time; time.sleep(1); sys.exit(3)")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert forked.call(script, {}, "print('own')", timeout=10).stdout == "own\n"


def test_a_server_that_was_killed_is_said_and_replaced(script):
    for _ in range(2):
        with pytest.raises(AssertionError, match=r"server\.py has ended; what it forks must not end it"):
            forked.call(script, {}, "import os, signal, time; os.kill(os.getppid(), signal.SIGKILL); time.sleep(600)", timeout=10)
        assert_ended()
    assert forked.call(script, {}, "print('own')", timeout=10).stdout == "own\n"
    (server,) = forked._servers.values()
    server.kill()  # between two calls
    server.wait()
    with pytest.raises(AssertionError, match="has ended"):
        forked.call(script, {}, "print('own')", timeout=10)
    assert forked.call(script, {}, "print('own')", timeout=10).stdout == "own\n"


def test_code_that_reads_its_input_finds_none_and_takes_no_call(script):
    for _ in range(2):
        done = forked.call(script, {}, "import os, sys; print([os.read(0, 9), sys.stdin.read()])", timeout=10)
        assert (done.returncode, done.stdout) == (0, "[b'', '']\n")


@pytest.mark.parametrize("busy", [True, False])
def test_nothing_outlives_who_asked(script, busy):
    code = "open('begun', 'w').close(); import time; time.sleep(600)" if busy else "import os, time; os.fork() or time.sleep(600)"
    asks = f"import sys, time; sys.path.append({str(Path(forked.__file__).parent)!r}); import forked; from pathlib import Path\n"
    asks += f"forked.call(Path({str(script)!r}), {{}}, {code!r}); open('begun', 'w').close(); time.sleep(600)"
    parent = subprocess.Popen([sys.executable, "-c", asks])
    while not os.path.exists("begun"):
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    assert_ended()
