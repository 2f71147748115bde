"""Processes of their own that need not import: a server has imported, and forks for each call. Importing torch takes two seconds, more than most calls.

`python` runs code as `python -c` does; `call` a script of the tests that ends in `serve`. Both return what `subprocess.run` would. Their standard input is
empty. They end by `os._exit`: what fails when the interpreter ends is not seen here, and a test of that takes a process of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

LIMIT = 1500  # seconds of a call; less than a test has (pyproject.toml)
_servers: dict[tuple[Path, tuple[tuple[str, str], ...]], subprocess.Popen[str]] = {}


def _start(script: Path, changes: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """A server, at the head of a process group that has all it forks."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")} | dict(changes)
    command = [sys.executable, str(script)]
    return subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, start_new_session=True)


def _end(server: subprocess.Popen[str]) -> None:
    """The server and all it has forked."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(server.pid, signal.SIGKILL)
    server.communicate()


@atexit.register
def _end_all() -> None:
    for server in _servers.values():
        _end(server)


def call(script: Path, changes: Mapping[str, str], *arguments: object, timeout: float = LIMIT) -> subprocess.CompletedProcess[str]:
    """`script arguments`, in a process forked from one that was started with these changes of the environment.

    A call that takes more than `timeout` seconds is a `TimeoutError`, and its server is killed with all it forked: the next call starts another one.
    """
    key = (script, tuple(changes.items()))
    if key not in _servers:
        _servers[key] = _start(*key)
    server = _servers[key]
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "errors")]
        try:
            with contextlib.suppress(BrokenPipeError):
                print(json.dumps([*arguments, *map(str, files)]), file=server.stdin, flush=True)
            if not select.select([server.stdout], [], [], timeout)[0]:
                said = "".join(file.read_text(errors="replace") for file in files if file.exists())
                raise TimeoutError(f"{script.name} took more than {timeout} s and was killed, with its server. It had said: {said[-3000:] or 'nothing'}")
            line = server.stdout.readline()
            assert line, f"{script.name} has ended; what it forks must not end it"
            status = int(line)
        except BaseException:  # an interrupted test too: the answer to this call would be taken for that to the next
            del _servers[key]
            _end(server)
            raise
        return subprocess.CompletedProcess([str(script), *map(str, arguments)], status, *(file.read_text() for file in files))


def python(code: str, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`python -c code` in that folder with that environment. Torch has been imported and nothing else of this project's."""
    return call(Path(__file__), {}, code, str(folder), dict(environment))


def serve(run: Callable[..., object]) -> None:
    """For each line of standard input, a JSON list of arguments and of the files for both outputs: `run` in a process of its own; its status is a line.

    The end of the input, also during a call, is the end of the process group: whoever asked is gone.
    """
    for line in iter(sys.stdin.readline, ""):
        *arguments, out, errors = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, file, mode in ((0, os.devnull, os.O_RDONLY), (1, out, os.O_WRONLY | os.O_CREAT), (2, errors, os.O_WRONLY | os.O_CREAT)):
                os.dup2(os.open(file, mode), number)
            status = 1
            try:
                run(*arguments)
                status = 0
            except SystemExit as end:
                status = end.code if isinstance(end.code, int) else int(end.code is not None)
                if isinstance(end.code, str):
                    print(end.code, file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        while (done := os.waitpid(child, os.WNOHANG)) == (0, 0):
            if select.select([sys.stdin], [], [], 0.005)[0]:  # nobody asks twice before there is an answer
                os.killpg(0, signal.SIGKILL)
        print(os.waitstatus_to_exitcode(done[1]), flush=True)
    os.killpg(0, signal.SIGKILL)


def _code(code: str, folder: str, environment: dict[str, str]) -> None:
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    sys.argv = ["-c"]
    sys.path[:1] = ["", *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]  # in place of this folder
    exec(code, {"__name__": "__main__"})


if __name__ == "__main__":
    import torch  # noqa: F401

    serve(_code)
