"""board.yaml: what a board's maintainers decided, read strictly, every mistake with its line."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from metabench.document import Document
from metabench.errors import ConfigError, did_you_mean
from metabench.leaderboard.protocols import Protocol
from metabench.leaderboard.ranking import MIN_SEEDS
from metabench.leaderboard.source import Source, algorithm_of
from metabench.suitefile import Count, Seed, Ways


class _Entry(BaseModel):
    """What all parts have in common: unknown keys and wrong types are errors."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class ProtocolEntry(_Entry):
    """A protocol that the board shows; what is left out may be anything."""

    dataset: str | None = Field(default=None, description="The data set.")
    split: str | None = Field(default=None, description="Its split.")
    measure: str | None = Field(default=None, description="accuracy, mse or accuracy_at_K.")
    ways: Ways | None = Field(default=None, description="Classes of a task.")
    shots: Count | None = Field(default=None, description="Support examples per class.")
    queries: Count | None = Field(default=None, description="Query examples per class.")
    stream: Count | None = Field(default=None, description="The length of a stream.")
    rotations: str | None = Field(default=None, description="How images are turned.")
    within: str | None = Field(default=None, description="What the classes of a task have in common.")
    bn_mode: Literal["inductive", "transductive"] | None = Field(default=None, description="Whether queries are used.")
    selection: Literal["last", "val"] | None = Field(default=None, description="Which weights are tested.")
    episodes: Count | None = Field(default=None, description="How many test episodes.")
    episode_seed: Seed | None = Field(default=None, description="Their seed.")
    episodes_hash: str | None = Field(default=None, description="Their hash, as results.csv has it.")

    def fits(self, protocol: Protocol) -> bool:
        """Whether a protocol is this one, as far as it is written down."""
        return all(getattr(protocol, name) == value for name, value in self._wanted.items())

    def mistake(self, protocols: Sequence[Protocol]) -> str:
        """Why it is none of these protocols; empty where it is one."""
        if any(self.fits(one) for one in protocols):
            return ""
        for name, value in self._wanted.items():
            there = {getattr(one, name) for one in protocols}
            if value not in there:
                known = did_you_mean(str(value), {str(one) for one in there if one not in (None, "")})
                return f"no run has a result with {name} {value!r}{known}"
        return f"no run has a result with all of {', '.join(f'{name} {v!r}' for name, v in self._wanted.items())}"

    @property
    def _wanted(self) -> dict[str, Any]:
        return self.model_dump(exclude_none=True)


class WithdrawalEntry(_Entry):
    """Results that count no more: a run's, of one algorithm or of all, with the reason that the page gives."""

    run: str = Field(description="The run folder's name.")
    algorithm: str | None = Field(default=None, description="Only the rows of this algorithm.")
    reason: Annotated[str, Field(min_length=1)] = Field(description="Why; shown on the page.")

    def takes(self, source: Source, algorithm: str | None) -> bool:
        """Whether it is about these rows (None: about the whole run)."""
        return self.run == source.run.name and self.algorithm in (None, algorithm)

    def mistake(self, sources: Sequence[Source]) -> str:
        """Why its run, if it is among these, has nothing to withdraw; empty where it has, or is not among them."""
        runs = [one.run for one in sources if one.run.name == self.run]
        known = {algorithm_of(row["cell"]) for run in runs for row in run.manifest["rows"]}
        if not runs or self.algorithm is None or self.algorithm in known:
            return ""
        return f"{self.run} has no row of {self.algorithm!r}{did_you_mean(self.algorithm, known)}"


class BoardEntry(_Entry):
    """A metabench leaderboard: which protocols it has, what a rank takes, and what was withdrawn."""

    title: str = Field(default="Leaderboard", description="The page's title.")
    description: str = Field(default="", description="One or two sentences below the title.")
    protocols: list[ProtocolEntry] | None = Field(
        default=None, min_length=1, description="The protocols shown; default: all that the runs have."
    )
    min_seeds: Annotated[int, Field(ge=MIN_SEEDS, le=1000)] = Field(
        default=MIN_SEEDS, description="Training seeds that a rank takes."
    )
    sources: dict[str, str] = Field(
        default={}, description="The image source of a data set, where two data sets draw on one."
    )
    withdrawals: list[WithdrawalEntry] = Field(default=[], description="Results that count no more, with reasons.")

    def shows(self, protocol: Protocol) -> bool:
        """Whether the board has this protocol."""
        return self.protocols is None or any(one.fits(protocol) for one in self.protocols)

    def withdrawn(self, source: Source, algorithm: str | None) -> bool:
        """Whether these rows were taken back (None: the whole run)."""
        return any(one.takes(source, algorithm) for one in self.withdrawals)

    def check_withdrawals(self, file: Path, sources: Sequence[Source]) -> None:
        """Raise ConfigError for an algorithm that its run does not have: what was meant would stay on the board."""
        _raise(file, "withdrawals", [one.mistake(sources) for one in self.withdrawals])

    def check_protocols(self, file: Path, protocols: Sequence[Protocol]) -> None:
        """Raise ConfigError for an entry that is none of the protocols that the runs have: it would show nothing."""
        _raise(file, "protocols", [one.mistake(protocols) for one in self.protocols or ()])


def read_board(file: Path) -> BoardEntry:
    """Read a board file. Raises ConfigError with every mistake, each with its line."""
    document = Document(file, "a board file")
    document.raise_problems()
    try:
        return BoardEntry.model_validate({} if document.data is None else document.data)
    except ValidationError as error:
        parts: dict[str | int, type[BaseModel]] = {"protocols": ProtocolEntry, "withdrawals": WithdrawalEntry}
        for detail in error.errors(include_url=False):
            document.report(detail["loc"], document.explained(detail, BoardEntry, parts))
        document.raise_problems()
        raise


def _raise(file: Path, part: str, mistakes: Sequence[str]) -> None:
    if found := [f"{file}: {part}[{number}]: {one}" for number, one in enumerate(mistakes) if one]:
        raise ConfigError("\n".join(found))
