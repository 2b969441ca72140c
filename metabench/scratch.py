"""Temporary folders that go with their process: at its end, or, after a kill -9, when the next one makes its own.

A folder holds a lock that dies with its owner, whatever becomes of process numbers.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

PREFIX = "metabench-scratch-"
LOCK = "lock"
YOUNG = 60.0  # seconds in which a folder without a lock may be about to get one


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A fresh folder, gone at the end; what killed processes of this user have left behind goes first."""
    remove_stale(PREFIX)
    holder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
    lock = hold(holder)
    folder = holder / "files"
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(holder, ignore_errors=True)
        os.close(lock)


def hold(holder: Path) -> int:
    """Lock a folder for as long as this process lives; the file descriptor to close when it is gone."""
    lock = os.open(holder / LOCK, os.O_CREAT | os.O_RDWR)
    fcntl.flock(lock, fcntl.LOCK_EX)
    return lock


def held(holder: Path) -> bool:
    """Whether the process that made a folder still holds its lock."""
    try:
        with (holder / LOCK).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except OSError:
        return True
    return False


def remove_stale(prefix: str) -> None:
    """Remove this user's temporary folders of that prefix whose process is gone."""
    for holder in Path(tempfile.gettempdir()).glob(f"{prefix}*"):
        with contextlib.suppress(OSError):  # gone meanwhile, or another user's
            facts = holder.stat(follow_symlinks=False)
            mine = facts.st_uid == os.getuid() and holder.is_dir() and not holder.is_symlink()
            if mine and time.time() - facts.st_mtime > YOUNG and not held(holder):
                shutil.rmtree(holder, ignore_errors=True)
