"""The command line: parse, call one library function, print, exit code. Heavy imports stay inside the commands.

Data goes to standard output, progress and logs to standard error. Exit codes: 0 good, 1 regression found, 2 usage or
configuration, 3 a cell failed or nothing ran, 4 contaminated (or what --fail-on names), 130 interrupted with the
partial results kept.
"""

from __future__ import annotations

import io
import logging
import signal
import sys
from typing import Annotated, NoReturn

import typer

from metabench import __version__
from metabench.cli import boards, looking, runs, verdicts
from metabench.cli.terminal import console
from metabench.errors import MetabenchError

app = typer.Typer(
    name="metabench",
    help="Benchmark meta-learning algorithms: quality and cost, on identical episodes, with intervals.",
    epilog="Start with `metabench run`, which needs no data and takes about three minutes on two cores.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
)
for command in (
    runs.run,
    looking.ls,
    looking.validate,
    runs.report,
    verdicts.compare,
    verdicts.check,
    verdicts.selftest,
    verdicts.export,
    looking.doctor,
):
    app.command()(command)
app.add_typer(looking.data, name="data")
app.add_typer(boards.app, name="leaderboard")


def main() -> None:
    """Run the command line; every error of ours is one message and a documented exit code."""
    signal.signal(signal.SIGTERM, _terminated)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # nohup has it ignored
        signal.signal(signal.SIGHUP, _terminated)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # an ASCII terminal, a path that is no Unicode
    try:
        app(standalone_mode=True)  # typer turns Ctrl-C outside a run into exit code 130
    except MetabenchError as error:
        _fail(str(error), error.exit_code)
    except KeyboardInterrupt:
        _fail("interrupted", 130)
    except OSError as error:  # of standard output, mostly; the store explains its own
        _fail(f"{error.filename or 'cannot write the output'}: {error.strerror or error}", 2)


def _terminated(signum: int, frame: object) -> NoReturn:
    raise KeyboardInterrupt


def _fail(message: str, code: int) -> NoReturn:
    stderr = console(stderr=True)
    stderr.print("error:", message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"metabench {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    del version
