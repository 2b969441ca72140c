"""The trials of a self-test on disk: a line of settings, then a line for each trial with its raw ratios.

A trial takes minutes, and a hundred of them hours: what was measured is kept at once, and a later self-test of the same
settings goes on from there.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from metabench.errors import ConfigError
from metabench.judging import Judgement
from metabench.pairs import Name
from metabench.stats import Interval


@dataclass(frozen=True)
class Trial:
    """The judgements of one trial by row, and the log ratios of its pairs, those of the confirmation last.

    `pairs` of processes it took; `controls` are their log ratios, empty where a file of an earlier version has none. A
    row that could not be measured is in neither `found` nor `ratios`.
    """

    found: dict[Name, Judgement]
    ratios: dict[Name, list[float]]
    pairs: int
    controls: dict[str, list[float]]


class Trials:
    """The file of a self-test: `settings` are what its trials were measured with, as plain data.

    Raises:
        ConfigError: the file holds something else, or trials of other settings, or it cannot be written.
    """

    def __init__(self, file: Path, settings: Mapping[str, Any]) -> None:
        self.file = file
        lines = list(self._lines())
        try:
            if not lines:
                self._append(settings)  # what cannot be written is said now, not after an hour
            elif changed := [key for key, value in settings.items() if lines[0].get(key) != value]:
                raise ConfigError(f"{file}: holds trials with {_another(changed)}: name another file")
            self.earlier = [_trial(line) for line in lines[1:]]
        except (KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{file}: holds no trials of a self-test ({error}); name another file") from error

    def add(self, trial: Trial) -> None:
        """Keep a trial."""
        self._append({"pairs": trial.pairs, "controls": trial.controls, "rows": list(_rows(trial))})

    def _lines(self) -> Iterator[Any]:
        """What is there, without the line that a kill cut short."""
        if not self.file.exists():
            return
        try:
            data = self.file.read_bytes()
            if not data.endswith(b"\n"):
                data = data[: data.rfind(b"\n") + 1]
                self.file.write_bytes(data)
            for line in data.splitlines():
                yield json.loads(line)
        except (OSError, ValueError) as error:
            raise ConfigError(f"{self.file}: holds no trials of a self-test ({error}); name another file") from error

    def _append(self, content: Mapping[str, Any]) -> None:
        try:
            with self.file.open("a", encoding="utf-8") as handle:
                handle.write(json.dumps(content, allow_nan=False) + "\n")
        except OSError as error:
            raise ConfigError(f"{self.file}: cannot be written ({error.strerror or error})") from error


def _another(changed: list[str]) -> str:
    said = {"code": "another version of the code that measures and decides"}
    return ", ".join(said.get(key, f"another {key}") for key in changed)


def _rows(trial: Trial) -> Iterator[dict[str, Any]]:
    for name, one in trial.found.items():
        yield {
            "cell": name.cell,
            "measure": name.measure,
            "injected": name.share,
            "outcome": one.outcome,
            "small": one.small,
            "ln_change": one.change.value,
            "ln_low": one.change.low,
            "ln_high": one.change.high,
            "ln_ratios": trial.ratios[name],
        }


def _trial(line: Mapping[str, Any]) -> Trial:
    found, ratios = {}, {}
    for row in line["rows"]:
        name = Name(row["cell"], row["measure"], row["injected"])
        ratios[name] = list(row["ln_ratios"])
        change = Interval(row["ln_change"], row["ln_low"], row["ln_high"], len(ratios[name]), None)
        found[name] = Judgement(row["outcome"], change, row["small"])
    # a file of an earlier version does not say how many: no more than twice those of its longest row
    pairs = line.get("pairs", 2 * max(map(len, ratios.values()), default=0))
    return Trial(found, ratios, pairs, line.get("controls", {}))
