"""The child process: runs jobs and times kernels, speaks versioned JSON lines with its parent.

In: one JSON line per job or per question of cost on standard input, or `{"kind": "stop"}`. When standard input closes,
the parent is gone and the worker stops too. Out: `hello`, then `progress`, `log`, `result`, and `done` per job, one
`answer` per question, on the original standard output; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from pathlib import Path
from typing import Any

from metabench import environment

ORPHAN_SECONDS = 20.0  # a worker whose parent is gone has so long to save its checkpoint


class Line:
    """The line to the parent: messages out, jobs and the stop signal in."""

    def __init__(self) -> None:
        self._out = os.fdopen(os.dup(1), "w", encoding="utf-8", buffering=1)
        os.dup2(2, 1)  # stray prints must not break the protocol
        self.jobs: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._stop = threading.Event()
        threading.Thread(target=self._listen, daemon=True).start()

    def emit(self, kind: str, **content: Any) -> None:
        """Send one message; a parent that is gone ends the worker."""
        try:
            self._out.write(json.dumps({"v": environment.PROTOCOL, "kind": kind, **content}, allow_nan=False) + "\n")
            self._out.flush()
        except BrokenPipeError:
            os._exit(1)

    def stopping(self) -> bool:
        """Whether the parent asked for a stop, or is gone."""
        return self._stop.is_set()

    def _listen(self) -> None:
        for text in sys.stdin:
            message = json.loads(text)
            if message["kind"] == "stop":
                break
            self.jobs.put(message)
        else:  # the parent is gone: nobody else would end a plug-in that hangs
            guard = threading.Timer(ORPHAN_SECONDS, os._exit, (1,))
            guard.daemon = True
            guard.start()
        self._stop.set()
        self.jobs.put(None)


def main() -> None:
    """Serve jobs until the parent says stop or goes away."""
    line = Line()
    import torch

    from metabench import weights
    from metabench.bench import Bench
    from metabench.catalogue import catalogue
    from metabench.measure import Workshop
    from metabench.scoring import Stopped

    threads = int(os.environ["OMP_NUM_THREADS"])
    torch.set_num_threads(threads)
    plugins = [Path(p) for p in json.loads(os.environ.get("METABENCH_PLUGINS", "[]"))]
    known = catalogue(plugins)

    def load(kind: str, name: str) -> Any:
        return (known.algorithm(name) if kind == "algorithm" else known.dataset(name)).load()

    shop = Workshop(load=load, emit=line.emit, stopping=line.stopping)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    line.emit("hello", torch=torch.__version__, cuda=torch.cuda.is_available(), gpu=gpu, threads=threads)
    bench = Bench(shop)
    while (asked := line.jobs.get()) is not None:
        if asked["kind"] != "job":
            line.emit("answer", id=asked["id"], **bench.answer(asked))
            continue
        try:
            weights.do(asked, shop)
        except Stopped:
            break
        line.emit("done", job=asked["id"])


if __name__ == "__main__":
    main()
