"""A small world to run in: plug-ins and suites of a second, and the command line as a process."""

from __future__ import annotations

import contextlib
import csv
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

DOTS = '''
"""Random 12 by 12 patterns with noise."""
import numpy as np
from metabench.episodes import ImageData
METABENCH = {"kind": "dataset", "name": "dots", "problem": "classification", "images_per_class": 8,
             "splits": {"only": {"train": 6, "val": 4, "test": 5}}, "shape": [1, 12, 12], "within": ["alphabet"]}
def build(*, split: str = "only") -> ImageData:
    rng = np.random.default_rng(0)
    patterns = np.kron(rng.random((15, 1, 4, 4)) < 0.4, np.ones((3, 3), bool))
    images = np.where(patterns ^ (rng.random((15, 8, 12, 12)) < 0.15), 255, 0).astype(np.uint8)
    subsets = {"train": np.arange(6), "val": np.arange(6, 10), "test": np.arange(10, 15)}
    return ImageData("dots", "1", split, images, tuple(f"{'ab'[i % 2]}/{i}" for i in range(15)), subsets)
'''

LEARNER = '''
"""Nearest mean in a linear embedding; stops at the step that the file `hold` names, and logs every step."""
import os, time
from dataclasses import replace
from pathlib import Path
import torch
from torch import nn
from metabench import training
from metabench.algorithms.base import Algorithm, Trainer, query_loss
METABENCH = {"kind": "algorithm", "name": "NAME", "family": "test", "paper": "", "url": "", "feeds": "episodes",
             "problems": ["classification"], "train": {}}
HERE = Path(__file__).parent
training.CHECKPOINT_SECONDS = training.PROGRESS_SECONDS = 0.0  # a checkpoint and a message after every step
def pause(step):
    with (HERE / "steps.log").open("a") as log:
        log.write(f"NAME {os.getpid()} {step}\\n")
    hold = HERE / "hold"
    while hold.exists() and hold.read_text() == str(step):
        time.sleep(0.01)
class Learner(Algorithm):
    def __init__(self, problem, lr):
        super().__init__(problem)
        self.lr, self.embedding = lr, nn.Linear(144, 8)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))
    def adapt(self, support, *, seeds, steps=None):
        SABOTAGE
        one = support.one_hot()
        centres = one.transpose(1, 2) @ self.embedding(support.x.flatten(2)) / one.sum(1)[..., None]
        return lambda x: -(self.embedding(x.flatten(2))[:, :, None] - centres[:, None]).square().sum(-1)
    def loss(self, batch):
        pause(int(self.seen))
        self.seen += 1
        noise = torch.rand_like(batch.support.x)  # from the global generator: a resumed training needs its state
        support = replace(batch.support, x=batch.support.x + 0.5 * noise)
        return query_loss(self.problem, self.adapt(support, seeds=batch.seeds)(batch.query.x), batch.query)
    def trainer(self, total_steps):
        return Trainer(self, torch.optim.Adam(self.parameters(), lr=self.lr))
def build(problem, *, lr: float = 0.01) -> Learner:
    return Learner(problem, lr)
'''


@pytest.fixture(autouse=True)
def _own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of the machine's own settings, one thread, and no waiting OpenMP threads that spin."""
    for name in ("GITHUB_STEP_SUMMARY", "COLUMNS"):
        monkeypatch.delenv(name, raising=False)


def write_learner(folder: Path, name: str, sabotage: str = "pass") -> Path:
    """A plug-in algorithm; `sabotage` is a statement at the start of its `adapt`."""
    file = folder / f"{name}.py"
    file.write_text(LEARNER.strip().replace("NAME", name).replace("SABOTAGE", sabotage) + "\n")
    return file


def write_suite(folder: Path, name: str, algorithms: list[str], more: str = "") -> Path:
    """A suite of algorithms (YAML flow mappings) on two tasks of the plug-in data set that share their trainings."""
    (folder / "dots.py").write_text(DOTS.strip() + "\n")
    file = folder / f"{name}.yaml"
    plugins = ["dots.py", *(f.name for f in sorted(folder.glob("*.py")) if f.name != "dots.py")]
    head = f"""
        description: A test
        plugins: [{", ".join(plugins)}]
        grid:
          tasks:
            - {{dataset: dots, ways: 3, shots: [1, 2], queries: 3}}
          algorithms: [{", ".join(algorithms)}]
        train: {{ways: 3, shots: 1, queries: 2, steps: 12}}
        evaluation: {{episodes: 40}}
        measures: [accuracy, train_time]
        threads: 1
        controls: false
    """
    kept = [line for line in textwrap.dedent(head).strip().splitlines() if f"\n{line.partition(':')[0]}:" not in more]
    file.write_text("\n".join(kept) + "\n" + textwrap.dedent(more))
    return file


def environ(**more: str) -> dict[str, str]:
    """The environment of a command."""
    kept = {k: v for k, v in os.environ.items() if k not in ("GITHUB_STEP_SUMMARY", "COLUMNS")}
    return {**kept, "OMP_WAIT_POLICY": "PASSIVE", **more}


def metabench(*arguments: object, **options: object) -> subprocess.CompletedProcess[str]:
    """Run the command line as a process, to its end; there is never a traceback."""
    command = [sys.executable, "-m", "metabench", *map(str, arguments)]
    settings = {"env": environ(), "timeout": 120, **options}
    done = subprocess.run(command, capture_output=True, text=True, check=False, **settings)  # type: ignore[call-overload]
    assert "Traceback" not in done.stderr, done.stderr
    return done  # type: ignore[no-any-return]


@contextlib.contextmanager
def started(*arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Start the command line; it is killed at the end, if it still lives."""
    command = [sys.executable, "-m", "metabench", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    # a shell's background job ignores Ctrl-C, and its children would too
    heed = {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)}
    process = subprocess.Popen(command, env=environ(), text=True, **pipes, **heed)  # type: ignore[call-overload]
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.communicate()


def until(ready: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait for something that must happen."""
    end = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < end, f"waited {seconds} s in vain for {what}"
        time.sleep(0.01)


def results(run: Path) -> dict[tuple[str, str], dict[str, str]]:
    """The rows of results.csv by cell and measure."""
    with (run / "results.csv").open(newline="", encoding="utf-8") as file:
        return {(row["cell"], row["measure"]): row for row in csv.DictReader(file)}


def numbers(run: Path) -> dict[tuple[str, str], tuple[str, ...]]:
    """What must not depend on interruptions: all figures that are no times."""
    names = ("status", "value", "ci_low", "ci_high", "sd", "n", "episodes_hash", "train_steps", "code")
    return {key: tuple(row[n] for n in names) for key, row in results(run).items() if row["unit"] != "s"}
