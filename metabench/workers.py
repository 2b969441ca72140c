"""A worker process as its parent sees it: how it is started, spoken to, and ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import psutil

from metabench import environment
from metabench.errors import WorkerError


class Worker:
    """The worker process as its parent sees it."""

    def __init__(
        self,
        threads: int,
        plugins: Sequence[Path],
        log: Path,
        *,
        allocator: str = "kept",
        python: Path | str = sys.executable,
        folder: Path | None = None,
        more: Mapping[str, str] | None = None,
    ) -> None:
        """Start it: `python` is the interpreter, `folder` where it works, `more` further variables of its environment.

        Raises:
            OSError: there is no such interpreter or folder.
        """
        self.environment = ""
        self.threads = threads
        variables = {**environment.worker_environment(threads, allocator=allocator), **(more or {})}
        variables["METABENCH_PLUGINS"] = json.dumps([str(p) for p in plugins])
        self._log = log.open("a", encoding="utf-8", errors="backslashreplace")
        self._process = subprocess.Popen(
            [str(python), "-m", "metabench.worker"],
            cwd=folder,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            env=variables,
            text=True,
            encoding="utf-8",
            start_new_session=True,  # Ctrl-C reaches the parent alone, which then asks for a stop
        )

    def hello(self) -> dict[str, Any]:
        """The worker's first message: torch, devices, threads."""
        try:
            hello = next(self.messages())
            if hello["v"] != environment.PROTOCOL:
                raise WorkerError(f"it speaks protocol {hello['v']}, not {environment.PROTOCOL}; reinstall metabench")

            return hello
        except WorkerError as error:
            raise WorkerError(f"{self._log.name}: at its start, {error}") from error

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._process.pid

    def pin(self) -> None:
        """Keep it on the first cores that we may use: workers that are compared then share them.

        For after its start, which may use them all: torch takes seconds to come up.
        """
        if hasattr(os, "sched_setaffinity"):
            cores = sorted(os.sched_getaffinity(0))[: self.threads]
            with contextlib.suppress(OSError, psutil.Error):  # it died already: its next message will not come
                for thread in psutil.Process(self.pid).threads():
                    os.sched_setaffinity(thread.id, cores)

    def ask(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """Send one message, and return its answer.

        Raises:
            WorkerError: it died.
        """
        self.send(message)
        return self.answer(message["id"])

    def answer(self, number: int) -> dict[str, Any]:
        """Wait for the answer to the message of that id; what it logs meanwhile is kept.

        Raises:
            WorkerError: it died.
        """
        for heard in self.messages():
            if heard["kind"] == "log":
                self.log(heard["text"])
            elif heard["kind"] == "answer" and heard["id"] == number:
                return heard
        raise AssertionError("messages() ends only by an error")

    def send(self, message: Mapping[str, Any]) -> None:
        """Send one message."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise WorkerError(self._death()) from None

    def messages(self) -> Iterator[dict[str, Any]]:
        """What the worker says, until it dies.

        Raises:
            WorkerError: it died; the message says how.
        """
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith("\n"):  # else it died while saying it
                yield json.loads(line)
        raise WorkerError(self._death())

    def log(self, text: str) -> None:
        """Keep a text beside what the worker printed."""
        self._log.write(text + "\n")
        self._log.flush()

    def ask_to_stop(self) -> None:
        """Ask it to save its checkpoint and end."""
        if self._process.poll() is None:
            with contextlib.suppress(WorkerError):
                self.send({"kind": "stop"})

    def wait(self) -> None:
        """Wait for its end."""
        self._process.wait()

    def kill(self) -> None:
        """End it at once, whatever it does."""
        if self._process.poll() is None:
            with contextlib.suppress(OSError):
                os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def close(self) -> None:
        """End it at once, and close all that leads to it."""
        self.kill()
        for stream in (self._process.stdin, self._process.stdout, self._log):
            with contextlib.suppress(OSError):
                if stream:
                    stream.close()

    def _death(self) -> str:
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "the worker was killed (signal 9): often the machine ran out of memory"
        how = f"by signal {-code}" if code < 0 else f"with exit code {code}"
        words = last_words(Path(self._log.name))
        return f"the worker ended {how}{f'; its last words: {words}' if words else ''}"


def last_words(log: Path) -> str:
    """The last line in a worker's log that says anything; '' where there is none."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
