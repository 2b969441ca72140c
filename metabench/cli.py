"""The command line: parse, call one library function, print, exit code. Heavy imports stay inside the commands.

Data goes to standard output, progress and logs to standard error. Exit codes: 0 good, 1 regression found, 2 usage or
configuration, 3 a cell failed or nothing ran, 4 inconclusive or incomparable (only where asked for), 130 interrupted
with the partial results kept.
"""

from __future__ import annotations

import io
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn

import typer
from typer.core import TyperGroup

from metabench import __version__
from metabench.errors import ConfigError, Interrupted, MetabenchError

if TYPE_CHECKING:
    from rich.console import Console

    from metabench.report import RunData
    from metabench.runner import Outcome
    from metabench.store import Run
    from metabench.suite import Suite
    from metabench.verdicts import Findings

app = typer.Typer(
    name="metabench",
    help="Benchmark meta-learning algorithms: quality and cost, on identical episodes, with intervals.",
    epilog="Start with `metabench run`, which needs no data and takes about three minutes on two cores.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
data_app = typer.Typer(help="Data sets: what is there, download with checksum, check.", no_args_is_help=True)
app.add_typer(data_app, name="data")


class _BuildByDefault(TyperGroup):
    """`leaderboard RUN ...` is `leaderboard build RUN ...`: what is no command of the group is a run."""

    default_command = "build"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the default command where none is named."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [self.default_command, *args]
        return super().parse_args(ctx, args)


leaderboard_app = typer.Typer(
    cls=_BuildByDefault,
    help="Merge runs into a static leaderboard: `metabench leaderboard RUN... --out DIR`; verify and pack submissions.",
    no_args_is_help=True,
)
app.add_typer(leaderboard_app, name="leaderboard")

DEFAULT_OUT = Path("results/runs")
SUMMARY_BYTES = 1_000_000  # of GITHUB_STEP_SUMMARY, which takes 1 MiB or nothing
DataRoot = Annotated[
    Path | None,
    typer.Option(help="Folder with data sets, e.g. DIR/omniglot/images_background.zip.", envvar="METABENCH_DATA"),
]
Select = Annotated[str, typer.Option("-k", "--select", help="Only rows whose 'cell/measure' holds all of these words.")]
DataName = Annotated[str, typer.Argument(help="A data set that has files; see `metabench data ls`.")]


def main() -> None:
    """Run the command line; every error of ours is one message and a documented exit code."""
    signal.signal(signal.SIGTERM, _terminated)
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
    stderr = _console(stderr=True)
    stderr.print("error:", message, style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(code)


def _console(*, stderr: bool = False) -> Console:
    from rich.console import Console

    return Console(stderr=stderr, emoji=False)  # a path may hold :tada:


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


@app.command()
def run(
    suites: Annotated[
        list[str] | None, typer.Argument(metavar="[SUITE]...", help="Shipped suites or YAML files; default quickstart.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = DEFAULT_OUT,
    device: Annotated[str, typer.Option(help="auto (as the suite says), cpu or cuda.")] = "auto",
    select: Select = "",
    seeds: Annotated[str | None, typer.Option(help="Seeds in the place of the suite's, e.g. 0,1,2.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with the newest run of the suite, or start a new one.")
    ] = True,
    extend: Annotated[Path | None, typer.Option(help="Go on with this run folder.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings side by side, the cores shared; timings run alone.")] = 1,
    keep_weights: Annotated[
        bool, typer.Option("--keep-weights", help="Keep what every training learned, for `leaderboard rerun`.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be measured, and stop.")] = False,
    data_root: DataRoot = None,
) -> None:
    """Run suites: what is measured already is kept, what is missing is measured, then the tables are printed."""
    from metabench.store import Run
    from metabench.suite import load_suite

    _use_data_root(data_root)
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: choose auto, cpu or cuda")
    chosen = [load_suite(name) for name in suites or ["quickstart"]]
    numbers = _seeds(seeds)
    where = None if device == "auto" else device
    if extend and (len(chosen) > 1 or not resume):
        raise ConfigError("--extend goes on with one run: name one suite, and drop --no-resume")
    code = 0
    for suite in chosen:
        if plan:
            known = Run.open(extend) if extend else Run.newest(out, suite.name) if resume else None
            _print_plan(suite, select, where, numbers, known)
            continue
        code = max(code, _run(suite, out, select, where, numbers, resume, extend, jobs, keep_weights).exit_code)
    sys.exit(code)


def _run(
    suite: Suite,
    out: Path,
    select: str,
    device: str | None,
    seeds: Sequence[int] | None,
    resume: bool,
    extend: Path | None,
    jobs: int,
    keep_weights: bool,
) -> Outcome:
    from metabench import runner
    from metabench.progress import Show

    stderr = _console(stderr=True)
    try:
        with Show(stderr) as show:
            outcome = runner.run(
                suite,
                out=out,
                watch=show,
                select=select,
                device=device,
                seeds=seeds,
                resume=resume,
                extend=extend,
                jobs=jobs,
                keep_weights=keep_weights,
            )
    except KeyboardInterrupt:  # before there was anything to stop
        raise Interrupted("interrupted; the same command goes on from here") from None
    except Interrupted:
        if show.run is not None:
            _derive(show.run)
        raise
    data = _derive(outcome.run)
    _print_tables(data)
    _draw_costs(data, outcome.run.path / "figures")
    for row in outcome.bad:
        stderr.print(f"{row.status}: {row.cell} {row.measure}: {row.reason}", style="red", markup=False, soft_wrap=True)
    return outcome


def _derive(folder: Run) -> RunData:
    """Write the derived files of a run and the summary that CI shows; return what they were made of."""
    from metabench.report import csvfile, render
    from metabench.report.load import load

    data = load([folder.path])
    folder.write("results.csv", csvfile.results(data.rows))
    folder.write("episodes.csv", csvfile.episodes(data.episodes))
    if len(data.curves):
        folder.write("curves.csv", csvfile.curves(data.curves))
    markdown = render(data, "md")
    folder.write("report.md", markdown)
    summary = os.environ.get("GITHUB_STEP_SUMMARY")
    if summary:
        with Path(summary).open("a", encoding="utf-8") as file:
            file.write(markdown)
    return data


def _draw_costs(data: RunData, folder: Path) -> None:
    """The figures of a run that measured kernels, beside its files."""
    from metabench.report import kernel_report

    if kernel_report(data).tables:
        from metabench.report.figures import draw

        for path in draw(data, folder):
            typer.echo(f"figure: {path}", err=True)


def _print_tables(data: RunData, reference: str | None = None) -> None:
    """The comparative tables on standard output, as wide as it is."""
    from rich.console import Console

    from metabench.report import kernel_report, table, tables

    table.show(tables(data, reference), kernel_report(data, reference), Console(width=_width(), highlight=False))


def _print_plan(suite: Suite, select: str, device: str | None, seeds: Sequence[int] | None, newest: Run | None) -> None:
    from metabench import plan, runner

    rows = plan.select_rows(plan.rows_of(plan.override(suite, seeds=seeds, device=device)), select)
    done = runner.comparable(newest, newest.measurements()) if newest else {}
    lines = [f"{'done' if plan.is_done(row, done) else 'to do':5}  {row.cell.id}  {row.measure}\n" for row in rows]
    _print_text("".join(lines))
    trainings = {row.cell.training_id for row in rows if row.cell.train}
    left = sum(not plan.is_done(row, done) for row in rows)
    typer.echo(f"{suite.name}: {len(rows)} rows, {left} to do, {len(trainings)} trainings", err=True)


@app.command()
def ls(
    what: Annotated[str, typer.Argument(help="algorithms, datasets, backbones, kernels, suites, or all.")] = "all",
    as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False,
) -> None:
    """List what there is, one line each, with the paper."""
    from metabench import listing

    found = listing.ls(what)
    _print_text(listing.as_json(found) if as_json else listing.as_text(found, _width()))


@app.command()
def validate(
    suite: Annotated[str | None, typer.Argument(help="A shipped suite or a YAML file.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON Schema of suites and exit.")] = False,
) -> None:
    """Check a suite without running it: every mistake at once, with line numbers."""
    import json

    from metabench import suite as suites

    if schema:
        typer.echo(json.dumps(suites.schema(), indent=2))
        return
    if suite is None:
        raise ConfigError("name a suite or a YAML file to validate, or ask for --schema")
    found = suites.load_suite(suite)
    cells = found.cells()
    typer.echo(f"{found.path}: good; {len(cells)} cells, {len({c.training_id for c in cells if c.train})} trainings")


@app.command()
def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, e.g. results/runs/SUITE/latest.")],
    format: Annotated[str, typer.Option("--format", "-f", help="table, md, csv, json or latex.")] = "table",
    reference: Annotated[str | None, typer.Option(help="The method that differences are taken to.")] = None,
    figures: Annotated[
        Path | None, typer.Option(help="Draw the figures into this folder and print their paths, instead of tables.")
    ] = None,
    against: Annotated[
        Literal["published"] | None,
        typer.Option(help="Our results beside the published ones, with the difference and its interval."),
    ] = None,
) -> None:
    """The comparative tables of one or several runs, their figures, or how they compare with the papers."""
    from metabench.report import render, render_against
    from metabench.report.load import load

    data = load(runs)
    if figures is not None:
        _draw(data, figures)
    elif against is not None:
        _print_text(render_against(data, format, width=_width()))
    elif format == "table":
        _print_tables(data, reference)
    else:
        _print_text(render(data, format, reference))


@app.command()
def compare(
    base: Annotated[Path, typer.Argument(metavar="BASE", help="A run's folder, a folder of runs, or a results.csv.")],
    candidates: Annotated[
        list[Path], typer.Argument(metavar="CANDIDATE...", help="The same; each is compared with BASE.")
    ],
    format: Annotated[str, typer.Option("--format", "-f", help="table, md, csv or json.")] = "table",
    select: Select = "",
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

    found = [comparison.compare([base], [one], select=select, across_machines=across_machines) for one in candidates]
    _print_findings(found, format)


@app.command()
def check(
    baseline: Annotated[
        list[Path], typer.Option(help="Stored results: a run's folder, a folder of runs, a results.csv; repeatable.")
    ],
    candidate: Annotated[list[Path], typer.Option(help="The results to judge; repeatable.")],
    format: Annotated[str, typer.Option("--format", "-f", help="table, md, csv or json.")] = "table",
    select: Select = "",
    fail_on: Annotated[
        str, typer.Option(help="Fail also on these: inconclusive, incomparable, missing; several with commas.")
    ] = "",
    junit: Annotated[Path | None, typer.Option(help="Write the verdicts as JUnit XML to this file.")] = None,
) -> None:
    """The gate for CI: fail where the candidate is worse than the baseline.

    Exit codes: 0 no regression, 1 a row regressed, 2 usage or configuration, 3 a row failed or nothing could be
    compared, 4 what --fail-on names. Writes GITHUB_STEP_SUMMARY, GITHUB_OUTPUT (`verdict=`) and one annotation.
    """
    from metabench import compare as comparison
    from metabench import verdict_report

    asked = _fail_on(fail_on)
    verdict_report.check_format(format)
    found = [comparison.compare(baseline, candidate, select=select)]
    _print_findings(found, format)
    _conclude(found, asked, junit)


@app.command()
def export(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or results.csv files.")],
    to: Annotated[str, typer.Option("--to", help="pyperf, github-action-benchmark, bencher or junit.")],
    out: Annotated[
        Path | None, typer.Option(help="The file to write; a folder where there are several. Default: print it.")
    ] = None,
    select: Select = "",
) -> None:
    """Stored results in the format of another tool.

    pyperf gets the times of kernels, one value per process. github-action-benchmark reads two files, for what is
    better smaller (times, errors, counts) and what is better bigger (accuracies): give --out a folder.
    """
    from metabench import export as exporter

    files = exporter.export(runs, to, select=select)
    if out is not None:
        _print_text("".join(f"{path}\n" for path in exporter.write(files, out)))
    elif len(files) > 1:
        raise ConfigError(f"--to {to} makes {' and '.join(files)}: name a folder for them with --out")
    else:
        _print_text(next(iter(files.values())))


def _fail_on(text: str) -> list[str]:
    from metabench.errors import did_you_mean
    from metabench.verdicts import ASKED

    asked = [word.strip() for word in text.split(",") if word.strip()]
    for word in asked:
        if word not in ASKED:
            raise ConfigError(f"--fail-on {word}: no such verdict{did_you_mean(word, ASKED)}; regressions always fail")
    return asked


def _conclude(found: Sequence[Findings], fail_on: Sequence[str], junit: Path | None) -> NoReturn:
    """Tell CI what a gate found, and exit with its code."""
    from metabench import verdict_report
    from metabench.verdicts import conclude

    verdict, code = conclude(found, fail_on)
    if junit is not None:
        verdict_report.write_junit(junit, found)
    if line := verdict_report.publish(found, verdict):
        typer.echo(line, err=True)
    typer.echo(f"verdict: {verdict}", err=True)
    sys.exit(code)


def _print_findings(found: Sequence[Findings], format: str) -> None:
    """Findings on standard output, tables as wide as it is."""
    from metabench import verdict_report

    if format != "table":
        _print_text(verdict_report.render(found, format))
        return
    from rich.console import Console

    verdict_report.show(found, Console(width=_width(), highlight=False, emoji=False))


@app.command()
def doctor(as_json: Annotated[bool, typer.Option("--json", help="For machines.")] = False) -> None:
    """How well this machine can measure time, and what to do about what disturbs it."""
    from metabench import doctor as examiner

    typer.echo("measuring this machine; about ten seconds where it is idle ...", err=True)
    machine = examiner.examine()
    if as_json:
        _print_text(examiner.as_json(machine))
        return
    from rich.console import Console

    examiner.show(machine, Console(width=_width(), highlight=False, emoji=False))


def _draw(data: RunData, folder: Path) -> None:
    from metabench.report.figures import draw

    paths = draw(data, folder)
    _print_text("".join(f"{path}\n" for path in paths))
    if not paths:
        typer.echo("nothing to draw: no kernel at three values of a coordinate, no scores with costs", err=True)


@data_app.command("ls")
def data_ls(data_root: DataRoot = None) -> None:
    """Which data sets there are, and whether their files are."""
    from metabench import listing

    _use_data_root(data_root)
    for status in listing.data_ls():
        typer.echo(f"{status.name:12} {status.state:9} {status.detail}")


@data_app.command("fetch")
def data_fetch(name: DataName, data_root: DataRoot = None) -> None:
    """Download a data set with its checksum (or take it from the data root), and decode it into the cache."""
    from metabench import listing

    _use_data_root(data_root)
    status = listing.data_module(name, "fetch").fetch()
    typer.echo(f"{status.name}: {status.state}; {status.detail}")


@data_app.command("verify")
def data_verify(name: DataName, data_root: DataRoot = None) -> None:
    """Read a data set again from its source and compare it with its golden content hash."""
    from metabench import listing

    _use_data_root(data_root)
    status = listing.data_module(name, "verify").verify()
    typer.echo(f"{status.name}: {status.state}; {status.detail}")


RunsOrBundles = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or bundles made by `pack`.")]


@leaderboard_app.command("build")
def leaderboard_build(
    runs: RunsOrBundles,
    out: Annotated[Path, typer.Option(help="The folder of the site: index.html, leaderboard.csv and .md, badge.svg.")],
    board: Annotated[
        Path | None, typer.Option(help="A board file (board.yaml): title, protocols, least seeds, withdrawals.")
    ] = None,
    check: Annotated[
        bool, typer.Option("--verify", help="Verify every run first: its rows are `recomputed`, not `claimed`.")
    ] = False,
    reruns: Annotated[
        list[Path] | None,
        typer.Option(help="A folder that `rerun` wrote: rows it bears out are `re-run`; repeatable."),
    ] = None,
    data_root: DataRoot = None,
) -> None:
    """Merge runs into a static page, CSV and Markdown (the default: `build` may be left out)."""
    from metabench.leaderboard import leaderboard

    _use_data_root(data_root)
    built = leaderboard(runs, out, board=board, check=check, reruns=reruns or ())
    _print_text("".join(f"{line}\n" for line in (*built.lines, f"page: {built.page}")))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        with Path(summary).open("a", encoding="utf-8") as file:
            short = len(built.markdown.encode()) < SUMMARY_BYTES
            file.write(built.markdown if short else "\n".join(f"- {line}" for line in built.lines) + "\n")


@leaderboard_app.command("verify")
def leaderboard_verify(
    runs: RunsOrBundles,
    episodes: Annotated[
        bool, typer.Option("--episodes/--no-episodes", help="Also make the test episodes anew, from the data set.")
    ] = True,
    data_root: DataRoot = None,
) -> None:
    """Recompute every figure of a run from its raw rows and episodes; exit code 2 where something does not add up."""
    from metabench.leaderboard import verify

    _use_data_root(data_root)
    audits = verify(runs, episodes=episodes)
    for audit in audits:
        counts = ", ".join(f"{number:,} {what}" for what, number in audit.checked)
        typer.echo(f"{audit.run}: {'does not add up' if audit.problems else 'good'}; recomputed {counts or 'nothing'}")
        for text in audit.unchecked:
            typer.echo(f"  not checked: {text}")
        for problem in audit.problems:
            typer.echo(f"  {problem.where}: {problem.what}", err=True)
    if any(audit.problems for audit in audits):
        sys.exit(2)


@leaderboard_app.command("pack")
def leaderboard_pack(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="The run folder to hand in.")],
    submitter: Annotated[str, typer.Option(help="Your name, as the board shows it.")],
    out: Annotated[Path, typer.Option(help="The folder for the bundle.")] = Path(),
    weights: Annotated[
        bool,
        typer.Option("--weights", help="With the weights that `run --keep-weights` kept, and plug-in algorithms."),
    ] = False,
) -> None:
    """Verify a run's figures and make the bundle to hand in: a zip of raw rows with hashes; same run, same bytes."""
    from metabench.leaderboard import pack

    typer.echo(pack(run, out, submitter=submitter, weights=weights))


@leaderboard_app.command("rerun")
def leaderboard_rerun(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A bundle or a run folder that holds weights.")],
    episodes: Annotated[int | None, typer.Option(help="Test episodes; default: as many as were claimed.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Only to repeat a past re-run: its episode seed. It gives no trust.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where re-runs go; `build --reruns` reads them there.")] = Path(
        "results/reruns"
    ),
    device: Annotated[str, typer.Option(help="auto (as each row says), cpu or cuda.")] = "auto",
    trust_code: Annotated[
        bool,
        typer.Option("--trust-code", help="Run plug-ins that the submission brings: a stranger's program. Read it."),
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Run a submission again on test episodes drawn only now, and record which of its rows hold.

    Its weights are loaded, never trained; a claim that is significantly better than what comes out is refused. Exit
    codes: 0 what could be run again holds, 2 a claim does not or the submission does not add up, 3 a row failed or
    none could be run again.
    """
    from metabench.leaderboard.rerun import rerun
    from metabench.progress import Show

    _use_data_root(data_root)
    if device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"--device {device}: choose auto, cpu or cuda")
    with Show(_console(stderr=True)) as show:
        found = rerun(
            run,
            out=out,
            watch=show,
            episodes=episodes,
            seed=seed,
            trust_code=trust_code,
            device=None if device == "auto" else device,
        )
    _print_text("".join(f"{line}\n" for line in (*found.lines, f"recorded: {found.folder / 'rerun.json'}")))
    sys.exit(found.exit_code)


def _use_data_root(root: Path | None) -> None:
    if root is not None:
        os.environ["METABENCH_DATA"] = str(root.absolute())


def _seeds(text: str | None) -> list[int] | None:
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"--seeds {text}: give whole numbers, e.g. --seeds 0,1,2") from None
    if min(numbers) < 0 or max(numbers) >= 2**63 or len(set(numbers)) < len(numbers):
        raise ConfigError(f"--seeds {text}: seeds are 0 or more (below 2**63), each once")
    return numbers


def _width() -> int:
    """Columns for tables: the terminal's, 80 where there is none."""
    import shutil

    return shutil.get_terminal_size((80, 24)).columns if sys.stdout.isatty() or "COLUMNS" in os.environ else 80


def _print_text(text: str) -> None:
    try:
        sys.stdout.write(text if not text or text.endswith("\n") else text + "\n")
        sys.stdout.flush()
    except BrokenPipeError:  # the reader has enough (`| head`): that is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
