"""What every command of the command line shares: its options, the console, and text on standard output."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import IO, TYPE_CHECKING, Annotated

import typer

from metabench.errors import ConfigError

if TYPE_CHECKING:
    from rich.console import Console

DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder with data sets, e.g. DIR/omniglot/images_background.zip.", envvar="METABENCH_DATA"),
]
Device = Annotated[str, typer.Option(help="auto (as declared), cpu or cuda.")]
Select = Annotated[str, typer.Option("-k", "--select", help="Only rows whose 'cell/measure' holds all of these words.")]


def console(*, stderr: bool = False) -> Console:
    """For people: standard error, or standard output as wide as tables are there.

    Where nobody reads any more (`2>&1 | head`) the command goes on in silence: its exit code says what it found, and
    rich's own, 1, would be a regression.
    """
    from rich.console import Console

    class Patient(Console):
        def on_broken_pipe(self) -> None:
            self.quiet = True
            discard(self.file)

    if stderr:
        return Patient(stderr=True, emoji=False)  # a path may hold :tada:
    return Patient(width=width(), highlight=False, emoji=False)


def discard(stream: IO[str]) -> None:
    """Let what a stream still holds, and all that follows, go nowhere: it cannot be written."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def width() -> int:
    """Columns for tables: the terminal's, 80 where there is none."""
    import shutil

    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() or "COLUMNS" in os.environ else 80


def print_text(text: str) -> None:
    """Text on standard output, with a line's end."""
    try:
        sys.stdout.write(text if not text or text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has enough (`| head`): that is no failure
        discard(sys.stdout)


def device_of(asked: str) -> str | None:
    """The device of --device, None for auto. Raises ConfigError for another word."""
    if asked not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {asked}: choose auto, cpu or cuda")
    return None if asked == "auto" else asked


def use_data_root(root: Path | None) -> None:
    """Look for data sets there, in this process and in its workers."""
    if root is not None:
        os.environ["METABENCH_DATA"] = str(root.absolute())
