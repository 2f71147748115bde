"""Signals that end a command: they stop it as Ctrl-C does, in one line, and it can be continued."""

from __future__ import annotations

import os
import signal
import threading
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

_ENDING = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name))


class Ended(KeyboardInterrupt):
    """What SIGTERM and SIGHUP raise. `status`: the exit status, 128 + the signal's number, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.status = 128 + number
        self.name = signal.Signals(number).name


def exit_status(error: BaseException) -> int:
    """The status of a command that `error`, a `KeyboardInterrupt` or `BrokenPipeError`, has ended."""
    if isinstance(error, BrokenPipeError):
        return 128 + getattr(signal, "SIGPIPE", 13)
    return error.status if isinstance(error, Ended) else 128 + signal.SIGINT


def how(error: BaseException) -> str:
    """'interrupted', and by what if not by Ctrl-C."""
    if isinstance(error, BrokenPipeError):
        return "stopped, as nobody reads the output any more"
    return f"interrupted by {error.name}" if isinstance(error, Ended) else "interrupted"


@contextmanager
def as_interrupts() -> Iterator[None]:
    """SIGTERM and SIGHUP raise `Ended` in the main thread; one that is ignored already (nohup) stays so."""

    def end(number: int, _: types.FrameType | None) -> NoReturn:
        raise Ended(number)

    with _handled(_ENDING, end):
        yield


@contextmanager
def quiet() -> Iterator[None]:
    """While libraries are imported, and nothing has been written that could be lost: a signal ends the process at once, in one line.

    An exception would not do: compiled modules turn it into others, with a traceback.
    """

    def leave(number: int, _: types.FrameType | None) -> NoReturn:
        name = "" if number == signal.SIGINT else f" by {signal.Signals(number).name}"
        try:
            os.write(2, f"hetlora: interrupted{name}\n".encode())
        finally:
            os._exit(128 + number)

    with _handled((signal.SIGINT, *_ENDING), leave):
        yield


def end_at_once() -> None:
    """Signals end this process without a word: one that writes nothing and has nothing to say."""
    for number in (signal.SIGINT, *_ENDING):
        if signal.getsignal(number) not in (signal.SIG_IGN, None):
            signal.signal(number, signal.SIG_DFL)


@contextmanager
def _handled(numbers: tuple[int, ...], handler: Callable[[int, types.FrameType | None], Any]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():  # only that one may set handlers
        yield
        return
    before = {number: signal.getsignal(number) for number in numbers}
    changed = [number for number, old in before.items() if old not in (signal.SIG_IGN, None)]
    for number in changed:
        signal.signal(number, handler)
    try:
        yield
    finally:
        for number in changed:
            signal.signal(number, before[number])
