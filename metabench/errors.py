"""The errors metabench raises: each message names the place and the fix; the CLI prints it, exits with `exit_code`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class MetabenchError(Exception):
    """Base of every error a user may see: one clear message, never a traceback.

    `exit_code` is what the command line returns for it: 2 usage or configuration, 3 a cell failed or nothing ran.
    """

    exit_code = 2


class ConfigError(MetabenchError):
    """A suite, a parameter or a command-line value is wrong."""


class DataError(MetabenchError):
    """A data set is missing, damaged or not what its checksum says."""


class StoreError(MetabenchError):
    """A run folder cannot be read or written."""


class NothingRan(MetabenchError):
    """There was nothing to do where something was asked for."""

    exit_code = 3


class WorkerError(MetabenchError):
    """The worker process could not do its work (the cell becomes a row with this reason)."""

    exit_code = 3


class Interrupted(MetabenchError):
    """Ctrl-C or a termination signal: partial results are kept."""

    exit_code = 130


class Unsupported(MetabenchError):
    """An impossible combination of algorithm and problem: the row is skipped with this reason."""


class Diverged(MetabenchError):
    """A training or a prediction left the finite numbers."""

    exit_code = 3


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return ' (did you mean X?)' for the known name nearest to `name`, or the list of known names."""
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
    if close:
        return f" (did you mean {close[0]!r}?)"
    return f" (known: {', '.join(names)})" if names else ""
