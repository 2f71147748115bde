"""Processes of their own that need not import: a server has imported, and forks for each call. Importing torch takes two seconds, more than most calls.

`python` runs code as `python -c` does; `call` a script of the tests that ends in `serve`. Both return what `subprocess.run` would.
"""

from __future__ import annotations

import atexit
import json
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path


@cache
def _server(script: Path, changes: tuple[tuple[str, str], ...]) -> subprocess.Popen[str]:
    """It ends with its input."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "TRITON_INTERPRET")} | dict(changes)
    server = subprocess.Popen([sys.executable, str(script)], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    atexit.register(server.communicate)
    return server


def call(script: Path, changes: Mapping[str, str], *arguments: object) -> subprocess.CompletedProcess[str]:
    """`script arguments`, in a process forked from one that was started with these changes of the environment."""
    server = _server(script, tuple(changes.items()))
    assert server.stdin is not None and server.stdout is not None
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("out", "errors")]
        print(json.dumps([*arguments, *map(str, files)]), file=server.stdin, flush=True)
        status = server.stdout.readline()
        assert status, f"{script.name} has ended; what it forks must not end it"
        return subprocess.CompletedProcess([str(script), *map(str, arguments)], int(status), *(file.read_text() for file in files))


def python(code: str, folder: Path, environment: Mapping[str, str]) -> subprocess.CompletedProcess[str]:
    """`python -c code` in that folder with that environment. Torch has been imported and nothing else of this project's."""
    return call(Path(__file__), {}, code, str(folder), dict(environment))


def serve(run: Callable[..., object]) -> None:
    """For each line of standard input, a JSON list of arguments and of the files for both outputs: `run` in a process of its own; its status is a line."""
    for line in sys.stdin:
        *arguments, out, errors = json.loads(line)
        child = os.fork()
        if child == 0:
            for number, file in ((1, out), (2, errors)):
                os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
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
        print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)


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
