"""One writer for a folder: a lock that the operating system releases when its process ends, however it ends."""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import socket
from pathlib import Path
from typing import Any

from hetlora.config import ConfigError

fcntl: Any
try:
    fcntl = importlib.import_module("fcntl")
except ImportError:  # not on Windows
    fcntl = None

LOCK = ".lock"
_UNLOCKED = "nothing keeps a second process from writing to the same folder: start one at a time"


class FolderLock:
    """A folder's file `.lock`, locked from `take` to the end of the `with` block and then removed.

    The lock is advisory (flock) and belongs to the process: a kill releases it, the file that a kill leaves behind is taken over by the next writer.
    `note`: why there is no lock, where the platform or the file system has none; '' else.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        self.note = ""
        self._descriptor: int | None = None
        self._owner = os.getpid()

    def __enter__(self) -> FolderLock:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()

    def take(self, folder: Path) -> None:
        """Lock `folder`. Raises `ConfigError` naming who holds it."""
        if fcntl is None:
            self.note = f"this platform has no file locks; {_UNLOCKED}"
            return
        path = folder / LOCK
        while self._descriptor is None:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # between the two calls the file may have gone with its last owner; then the lock is on nothing
                if _is(path, descriptor):
                    self._descriptor, self.folder = descriptor, folder
            except BlockingIOError:
                who = _holder(path)
                raise ConfigError(f"{folder}: another process writes to it ({who}); wait for its end, or stop it first") from None
            except OSError as error:
                self.note = f"{folder}: the file system has no locks ({error.strerror}); {_UNLOCKED}"
                return
            finally:
                if self._descriptor is None:
                    os.close(descriptor)
        started = datetime.datetime.now(datetime.timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")
        holder = json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "started": started}) + "\n"
        os.ftruncate(self._descriptor, 0)
        os.pwrite(self._descriptor, holder.encode(), 0)

    def moved(self, folder: Path) -> None:
        """The locked folder has been renamed to `folder`."""
        if self._descriptor is not None:
            self.folder = folder

    def release(self) -> None:
        """Remove the file while it is still locked, then unlock. A forked child of the owner changes nothing."""
        if self._descriptor is None or os.getpid() != self._owner:
            return
        assert self.folder is not None
        with contextlib.suppress(OSError):
            if _is(self.folder / LOCK, self._descriptor):
                (self.folder / LOCK).unlink()
        os.close(self._descriptor)
        self._descriptor = self.folder = None


def _is(path: Path, descriptor: int) -> bool:
    try:
        there, mine = os.stat(path, follow_symlinks=False), os.fstat(descriptor)
    except FileNotFoundError:
        return False
    return (there.st_dev, there.st_ino) == (mine.st_dev, mine.st_ino)


def _holder(path: Path) -> str:
    try:
        who = json.loads(path.read_text(encoding="utf-8"))
        return f"process {who['pid']} on {who['host']}, since {who['started']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "it has not said which"
