"""Runs that are killed again and again, each with a second writer beside it: the process of test_killed.py, which forks before it has computed anything."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import torch
from tiny import SIZES, tiny_config, tiny_federation

from hetlora.errors import ConfigError
from hetlora.loop import simulate

DONE, LOCKED, EXISTS, WRONG = 0, 3, 4, 5
FILES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link")


def die_at_file(number: int) -> None:
    """SIGKILL right before this process opens, renames or removes its file of that number."""
    left = [number]

    def count(event: str, _: object) -> None:
        if event in FILES:
            left[0] -= 1
            if left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def writer(folder: Path, settings: dict, draw: random.Random) -> int:
    """Fork a process that goes on with the run and ends at a random moment of its own: at a file, or after so much computing time."""
    child = os.fork()
    if child:
        return child
    code, resume = WRONG, (folder / "config.json").exists()
    try:
        if draw.random() < 0.5:
            die_at_file(draw.randrange(1, 100))
        else:
            signal.setitimer(signal.ITIMER_PROF, draw.uniform(0.01, 0.3))  # its signal ends a process that does not expect it
        simulate(tiny_config(folder, **settings), resume=resume, federation=tiny_federation(SIZES, held_out=1))
        code = DONE
    except ConfigError as error:
        expected = {f"{folder}: another process writes to it (": LOCKED, f"output: {folder} exists already; ": EXISTS}
        code = next((own for text, own in expected.items() if str(error).startswith(text)), WRONG)
        if code == WRONG:
            print(f"{folder}: {error}", file=sys.stderr, flush=True)
    except BaseException as error:
        print(f"{folder}: {type(error).__name__}: {error}", file=sys.stderr, flush=True)
    finally:
        os._exit(code)


def kill(root: Path, kind: str, settings: dict, kills: int, seed: str) -> dict[str, int]:
    """Runs root/kind.0, root/kind.1, ... until so many of their writers were killed; all are finished but the last."""
    draw, counts = random.Random(seed), {"killed": 0, "locked": 0, "runs": 1}
    while counts["killed"] < kills:
        folder = root / f"{kind}.{counts['runs'] - 1}"
        two = [writer(folder, settings, random.Random(draw.random())) for _ in range(2)]
        codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in two]
        if WRONG in codes or not set(codes) <= {DONE, LOCKED, EXISTS, -signal.SIGKILL, -signal.SIGPROF}:
            raise RuntimeError(f"{folder}: its writers ended with {codes}")
        counts["killed"] += sum(code < 0 for code in codes)
        counts["locked"] += codes.count(LOCKED)
        counts["runs"] += DONE in codes
    return counts


if __name__ == "__main__":
    torch.set_num_threads(1)
    given = json.loads(sys.argv[1])
    print(json.dumps({kind: kill(Path(given["root"]), kind, own, given["kills"], f"{kind} {given['seed']}") for kind, own in given["runs"].items()}))
