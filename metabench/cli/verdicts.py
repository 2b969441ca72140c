"""`compare`, `check`, `selftest` and `export`: what changed, and whether that is a regression."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer

from metabench.cli.terminal import DataRoot, Select, console, discard, print_text, use_data_root
from metabench.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from metabench.verdicts import Findings

Only = Annotated[
    str, typer.Option(help="Only such measures: accuracy, mse, time, memory, counts; several with commas.")
]
Margins = Annotated[
    list[str] | None,
    typer.Option("--margin", metavar="KIND=SIZE", help="In the suite's place, e.g. 'accuracy=1 point'; repeatable."),
]


def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A run's folder, a folder of runs, or a results.csv.")],
    candidates: Annotated[
        list[Path], typer.Argument(metavar="CANDIDATE...", help="The same; each is compared with BASE.")
    ],
    format: Annotated[str, typer.Option("--format", "-f", help="table, md, csv or json.")] = "table",
    select: Select = "",
    only: Only = "",
    margin: Margins = None,
    across_machines: Annotated[
        bool,
        typer.Option("--across-machines", help="Compare times of unlike machines too: they then speak of both."),
    ] = False,
) -> None:
    """Compare stored results row by row: what changed, how sure that is, and what could have been seen.

    Accuracy is paired on equal test episodes, times count on one machine whose control rows held still, counts are
    exact. Informs and exits with 0; `metabench check` is the gate. Margins stand in the suite under `thresholds`.
    """
    from metabench import compare as comparison

    kinds, margins = _words(only), _margins(margin)
    found = [
        comparison.compare([base], [one], select=select, kinds=kinds, margins=margins, across_machines=across_machines)
        for one in candidates
    ]
    print_findings(found, format)


def check(
    context: typer.Context,
    suite: Annotated[
        str | None, typer.Argument(metavar="SUITE", help="A suite with times or counts of kernels, for a live check.")
    ] = None,
    base: Annotated[
        str | None, typer.Option(help="Live: the working tree against this git revision, e.g. origin/main or HEAD~1.")
    ] = None,
    base_python: Annotated[
        Path | None, typer.Option(help="Live: this interpreter against that one (or a virtual environment's folder).")
    ] = None,
    measure_identical: Annotated[
        bool, typer.Option("--measure-identical", help="Live: measure even where both sides load the same code.")
    ] = False,
    baseline: Annotated[
        list[Path] | None,
        typer.Option(help="Stored results: a run's folder, a folder of runs, a results.csv; repeatable."),
    ] = None,
    candidate: Annotated[list[Path] | None, typer.Option(help="The stored results to judge; repeatable.")] = None,
    format: Annotated[str, typer.Option("--format", "-f", help="table, md, csv or json.")] = "table",
    select: Select = "",
    only: Only = "",
    margin: Margins = None,
    fail_on: Annotated[
        str,
        typer.Option(
            help="Fail also on these: inconclusive, incomparable, missing (of stored results); several with commas."
        ),
    ] = "",
    junit: Annotated[Path | None, typer.Option(help="Write the verdicts as JUnit XML to this file.")] = None,
    data_root: DataRoot = None,
) -> None:
    """The gate for CI: fail where the candidate is worse than the base.

    Live, two versions of the code side by side on this machine, for times and counts: `check SUITE --base REVISION` or
    `check SUITE --base-python PATH`. Stored results, for accuracy too: `check --baseline RUN --candidate RUN`.

    Exit codes: 0 no regression, 1 a row regressed, 2 usage or configuration, 3 a row failed or nothing could be
    compared, 4 contaminated, or what --fail-on names. Writes GITHUB_STEP_SUMMARY, GITHUB_OUTPUT (`verdict=`, "error"
    where it ends without one) and one annotation.
    """
    from metabench import verdict_report

    with _errors_told(junit):
        asked, kinds, margins = _fail_on(fail_on), _words(only), _margins(margin)
        verdict_report.check_format(format)
        live, stored = (suite, base, base_python), (baseline, candidate)
        if any(live) == any(stored) or not (suite if any(live) else all(stored)):
            raise ConfigError("check either SUITE with --base or --base-python, or --baseline RUN with --candidate RUN")
        if suite is not None:
            _check_for_live(both=base is not None and base_python is not None, stored=kinds or margins, asked=asked)
        else:
            _check_for_stored({"--measure-identical": measure_identical, "--data-root": _typed(context, "data_root")})
        verdict_report.check_places(junit)
        if suite is not None:
            use_data_root(data_root)
            found = [_check_live(suite, base, base_python, select, measure_identical)]
        else:
            from metabench import compare as comparison

            found = [comparison.compare(baseline or [], candidate or [], select=select, kinds=kinds, margins=margins)]
    _conclude(found, asked, format, junit)


def _check_for_live(*, both: bool, stored: Collection[str], asked: Collection[str]) -> None:
    """Raise ConfigError for what a live check cannot mind: nothing that is asked for is left out silently."""
    if both:
        raise ConfigError("--base and --base-python ask for two comparisons: give one of them")
    if stored:
        raise ConfigError("--only and --margin are for stored results; a live check has -k, and the suite's margins")
    if "missing" in asked:
        raise ConfigError(
            "--fail-on missing is for stored results: a live check asks both sides for the same rows, and what one "
            "cannot measure is incomparable"
        )


def _check_for_stored(live: Mapping[str, bool]) -> None:
    """Raise ConfigError for options of a live check, by name whether they are given."""
    if names := [name for name, given in live.items() if given]:
        raise ConfigError(f"{' and '.join(names)}: for a live check; of stored results nothing is measured again")


def _typed(context: typer.Context, parameter: str) -> bool:
    """Whether a parameter stands on the command line; one that comes from the environment is for all commands."""
    source = context.get_parameter_source(parameter)
    return source is not None and source.name == "COMMANDLINE"


@contextlib.contextmanager
def _errors_told(junit: Path | None) -> Iterator[None]:
    """Tell CI of an error before it ends the command: a workflow must not read an empty verdict."""
    from metabench import verdict_report

    try:
        yield
    except (Exception, KeyboardInterrupt) as error:
        if line := verdict_report.publish_error(str(error) or type(error).__name__, junit):
            _tell(line)
        raise


def _check_live(
    suite: str, base: str | None, base_python: Path | None, select: str, measure_identical: bool
) -> Findings:
    from metabench import gate
    from metabench.progress import ShowPairs
    from metabench.suite import load_suite

    return gate.check(
        load_suite(suite),
        base=base,
        base_python=base_python,
        watch=ShowPairs(console(stderr=True)),
        select=select,
        measure_identical=measure_identical,
    )


def selftest(
    suite: Annotated[str, typer.Argument(help="A shipped suite or a YAML file, with times of kernels.")],
    inject: Annotated[
        str, typer.Option(help="Slowdowns to find, as shares of a kernel's time: 5%, or 5%,10%, or 0 for none.")
    ] = "5%",
    trials: Annotated[
        int, typer.Option(min=1, help="Checks of the same code against itself; those in --out count.")
    ] = 5,
    select: Select = "",
    out: Annotated[
        Path | None,
        typer.Option(help="Keep each trial's raw ratios in this file, as JSON lines, and go on from those in it."),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Test the live gate on this machine: false alarms on identical code, slowdowns found, settings as YAML."""
    from metabench import selftest as examiner
    from metabench.progress import ShowPairs
    from metabench.suite import load_suite

    use_data_root(data_root)
    found = examiner.selftest(
        load_suite(suite),
        inject=_shares(inject),
        trials=trials,
        select=select,
        watch=ShowPairs(console(stderr=True)),
        out=out,
    )
    examiner.show(found, console())
    if found.interrupted:
        goes_on = f"; the same command goes on from {out}" if out else ""
        raise Interrupted(f"interrupted: these are the finished trials{goes_on}")


def _shares(text: str) -> list[float]:
    """'5%,10%' or '0.05,0.1' as shares; 0 is none."""
    try:
        found = [float(one.removesuffix("%")) / (100 if one.endswith("%") else 1) for one in text.split(",")]
    except ValueError:
        raise ConfigError(f"--inject {text}: give shares such as 5% or 5%,10%") from None
    if not all(0 <= share <= 10 for share in found) or len({*found}) < len(found):
        raise ConfigError(f"--inject {text}: shares lie between 0 and 1000%, each once")
    return [share for share in found if share]


def export(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or results.csv files.")],
    to: Annotated[str, typer.Option("--to", help="pyperf, github-action-benchmark, bencher or junit.")],
    out: Annotated[
        Path | None,
        typer.Option(help="The file to write; a folder for github-action-benchmark. Default: print it."),
    ] = None,
    select: Select = "",
) -> None:
    """Stored results in the format of another tool.

    pyperf gets the times of kernels, one value per process. github-action-benchmark reads up to two files, for what
    is better smaller (times, errors, counts) and what is better bigger (accuracies): --out is a folder, always.
    """
    from metabench import export as exporter

    files = exporter.export(runs, to, select=select)
    if out is not None:
        print_text("".join(f"{path}\n" for path in exporter.write(files, to, out)))
    elif exporter.FORMATS[to].folder:
        raise ConfigError(f"--to {to} makes {' and '.join(files)}: name a folder for them with --out")
    else:
        print_text(next(iter(files.values())))


def _fail_on(text: str) -> list[str]:
    from metabench.errors import did_you_mean
    from metabench.verdicts import ASKED

    asked = _words(text)
    for word in asked:
        if word not in ASKED:
            raise ConfigError(f"--fail-on {word}: no such verdict{did_you_mean(word, ASKED)}; regressions always fail")
    return asked


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _margins(given: Sequence[str] | None) -> dict[str, str]:
    """'accuracy=1 point' as a margin by kind; `compare` knows which there are."""
    parts = (text.partition("=") for text in given or ())
    return {kind.strip(): size.strip() for kind, _, size in parts}


def _conclude(found: Sequence[Findings], fail_on: Sequence[str], format: str, junit: Path | None) -> NoReturn:
    """Tell CI what a gate found, print it, and exit with its code; a pass that could not be told is an error."""
    from metabench import verdict_report
    from metabench.verdicts import conclude

    verdict, code = conclude(found, fail_on)
    told = verdict_report.publish(found, verdict, junit)
    wrong = [*told.unwritten]
    try:
        print_findings(found, format, fail_on)
    except OSError as error:
        wrong.append(f"cannot write the output: {error.strerror or error}")
        discard(sys.stdout)
    for line in (told.annotation, *(f"error: {one}" for one in wrong), f"verdict: {verdict}"):
        if line:
            _tell(line)
    sys.exit(code or (2 if wrong else 0))


def print_findings(found: Sequence[Findings], format: str, fail_on: Collection[str] = ()) -> None:
    """Findings on standard output, tables as wide as it is."""
    from metabench import verdict_report

    if format != "table":
        print_text(verdict_report.render(found, format, fail_on=fail_on))
        return
    verdict_report.show(found, console())


def _tell(line: str) -> None:
    """A line on standard error; where nobody reads it any more, the exit code still counts."""
    try:
        typer.echo(line, err=True)
    except OSError:
        discard(sys.stderr)
