"""Git, as far as the gate needs it: where the repository is, which revision is meant, and a temporary copy of it.

The user's working tree is never touched. A temporary worktree is removed on success, failure, Ctrl-C, SIGTERM and
SIGHUP; one that a kill -9 has left behind is recognised by its lock, which dies with its owner, and removed at the next
start.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metabench.errors import ConfigError
from metabench.scratch import held, hold, remove_stale, scratch

PREFIX = "metabench-base-"
_BOUND = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX", "GIT_OBJECT_DIRECTORY", "GIT_COMMON_DIR")


@dataclass(frozen=True)
class Repository:
    """A git repository with a working tree at `root`."""

    root: Path

    @classmethod
    def around(cls, file: Path) -> Repository:
        """The repository that a file lies in.

        Raises:
            ConfigError: git is not there, or the file is in no repository.
        """
        done = _git(file.parent, "rev-parse", "--show-toplevel")
        if done.returncode:
            why = done.stderr.strip().removeprefix("fatal: ")
            fix = "check --base compares with a revision of the repository that holds the suite file"
            raise ConfigError(f"{file}: {why}; {fix}")
        return cls(Path(done.stdout.removesuffix("\n")).resolve())

    def commit(self, name: str) -> str:
        """The full hash of the commit that `name` (a branch, tag, hash, HEAD~1, ...) means.

        Raises:
            ConfigError: there is none; in a shallow clone the message says which line fetches it.
        """
        done = _git(self.root, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
        if not done.returncode:
            return done.stdout.strip()
        if _git(self.root, "rev-parse", "--is-shallow-repository").stdout.strip() == "true":
            raise ConfigError(f"--base {name}: this clone is shallow and does not hold it; run: {_fetch(name)}")
        raise ConfigError(f"--base {name}: {self.root} has no such revision; `git branch --all` lists the branches")

    def dirty(self) -> bool:
        """Whether the working tree holds changes that are not committed, new files included."""
        return bool(_git(self.root, "status", "--porcelain").stdout.strip())

    def changed(self, commit: str) -> set[str]:
        """The files (relative to the root) whose content in the working tree is not that of `commit`, new ones too."""
        where = self.root / _git(self.root, "rev-parse", "--git-path", "index").stdout.removesuffix("\n")
        with scratch() as folder:
            copy = folder / "index"  # diff refreshes the index whatever it is told: not the user's
            if where.is_file():
                shutil.copy2(where, copy)
            found = _git(self.root, "diff", "--name-only", "-z", commit, index=copy).stdout
        new = _git(self.root, "ls-files", "--others", "--exclude-standard", "-z").stdout
        return {*found.split("\0"), *new.split("\0")} - {""}

    def files(self) -> list[str]:
        """All files (relative to the root) that git tracks, or would: new ones that it does not ignore."""
        found = _git(self.root, "ls-files", "--cached", "--others", "--exclude-standard", "-z").stdout
        return [file for file in found.split("\0") if file]

    @contextlib.contextmanager
    def worktree(self, commit: str) -> Iterator[Path]:
        """A temporary worktree of the commit, gone at the end whatever happens.

        Raises:
            ConfigError: git cannot make it (a full disk, say).
        """
        self._remove_stale()
        with contextlib.ExitStack() as after:
            with undisturbed():  # from here on it is known what to remove
                holder = Path(tempfile.mkdtemp(prefix=PREFIX)).resolve()
                after.callback(self._give_up, holder, hold(holder))
                tree = holder / "tree"
                # no hooks of the user's: they would run in, and for, a tree that is none of theirs
                command = ("-c", "core.hooksPath=/dev/null", "worktree", "add", "--detach", str(tree), commit)
                done = _git(self.root, *command)
            if done.returncode:
                raise ConfigError(f"git cannot check {commit[:12]} out: {done.stderr.strip()}")
            yield tree

    def _give_up(self, holder: Path, lock: int) -> None:
        with undisturbed():
            self._remove(holder)
            os.close(lock)

    def _remove(self, holder: Path) -> None:
        _git(self.root, "worktree", "remove", "--force", "--force", str(holder / "tree"))
        shutil.rmtree(holder, ignore_errors=True)

    def _remove_stale(self) -> None:
        """Remove the worktrees of this repository whose check was killed."""
        for line in _git(self.root, "worktree", "list", "--porcelain").stdout.splitlines():
            holder = Path(line.removeprefix("worktree ")).parent
            if line.startswith("worktree ") and holder.name.startswith(PREFIX) and not held(holder):
                self._remove(holder)
        remove_stale(PREFIX)  # of which git never heard


@contextlib.contextmanager
def undisturbed() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP wait until something is in order (in the main thread; others never get them)."""
    came: list[int] = []
    before: dict[signal.Signals, Any] = {}
    try:
        for one in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            before[one] = signal.signal(one, lambda number, _: came.append(number))
    except ValueError:
        pass
    try:
        yield
    finally:
        for one, handler in before.items():
            signal.signal(one, handler)
        for number in came[:1]:
            signal.raise_signal(number)


def _git(folder: Path, *arguments: str, index: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Run git to its end, whatever keys are pressed meanwhile. Raises ConfigError where there is no git."""
    variables = {name: value for name, value in os.environ.items() if name not in _BOUND}  # a hook's would mislead it
    if index is not None:
        variables["GIT_INDEX_FILE"] = str(index)
    # status would else write what they found into the user's index, under its lock
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        return subprocess.run(
            command, capture_output=True, text=True, errors="surrogateescape", env=variables, start_new_session=True
        )
    except FileNotFoundError:
        raise ConfigError("check --base needs git: install it, or use --base-python") from None


def _fetch(name: str) -> str:
    """The line that brings a revision into a shallow clone."""
    remote, slash, branch = name.partition("/")
    if any(mark in name for mark in "~^@{"):
        return "git fetch --unshallow"
    if slash and remote == "origin":
        return f"git fetch --depth=1 origin {branch}:refs/remotes/origin/{branch}"
    if all(c in "0123456789abcdef" for c in name.lower()) and len(name) != 40:
        return "git fetch --unshallow"  # servers know whole hashes only
    return f"git fetch --depth=1 origin {name}" + ("" if len(name) == 40 else f":{name}")
