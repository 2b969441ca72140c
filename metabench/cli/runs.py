"""`run` and `report`: measuring, and the tables of what was measured."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from metabench.cli.terminal import DataRoot, Device, Select, console, device_of, print_text, use_data_root, width
from metabench.errors import ConfigError, Interrupted

if TYPE_CHECKING:
    from metabench.report import RunData
    from metabench.runner import Outcome
    from metabench.store import Run
    from metabench.suite import Suite

DEFAULT_OUT = Path("results/runs")


def run(
    suites: Annotated[
        list[str] | None, typer.Argument(metavar="SUITE...", help="Shipped suites or YAML files; default quickstart.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where run folders go.")] = DEFAULT_OUT,
    device: Device = "auto",
    select: Select = "",
    seeds: Annotated[str | None, typer.Option(help="Seeds in the place of the suite's, e.g. 0,1,2.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on with the newest run of the suite, or start a new one.")
    ] = True,
    extend: Annotated[Path | None, typer.Option(help="Go on with this run folder.")] = None,
    jobs: Annotated[int, typer.Option(min=1, help="Trainings side by side, the cores shared; timings run alone.")] = 1,
    keep_weights: Annotated[
        bool,
        typer.Option("--keep-weights", help="Keep what every training learned, for --weights and `leaderboard rerun`."),
    ] = False,
    weights: Annotated[
        Path | None,
        typer.Option(
            help="Train nothing: load the weights that this run kept (--keep-weights), with the code as it is."
        ),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Print what would be measured, and stop.")] = False,
    data_root: DataRoot = None,
) -> None:
    """Run suites: what is measured already is kept, what is missing is measured, then the tables are printed.

    With --weights RUN, a run of its own: the test episodes are scored with the weights that RUN kept, for
    `metabench check`, which then judges each episode (the adapt gate). What RUN kept no weights of is skipped.
    """
    from metabench.store import Run
    from metabench.suite import load_suite

    use_data_root(data_root)
    chosen = [load_suite(name) for name in suites or ["quickstart"]]
    numbers = _seeds(seeds)
    where = device_of(device)
    if extend and (len(chosen) > 1 or not resume):
        raise ConfigError("--extend goes on with one run: name one suite, and drop --no-resume")
    if weights and (len(chosen) > 1 or keep_weights):
        raise ConfigError("--weights loads what one run has kept: name one suite, and drop --keep-weights")
    code = 0
    for suite in chosen:
        if plan:
            known = Run.open(extend) if extend else Run.newest(out, suite.name) if resume else None
            _print_plan(suite, select, where, numbers, known, weights)
            continue
        done = _run(suite, out, select, where, numbers, resume, extend, jobs, keep_weights, weights)
        code = max(code, done.exit_code)
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
    weights: Path | None,
) -> Outcome:
    from metabench import runner
    from metabench.progress import Show

    stderr = console(stderr=True)
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
                weights=weights or {},
            )
    except KeyboardInterrupt:  # before there was anything to stop
        raise Interrupted("interrupted; the same command goes on from here") from None
    except Interrupted:
        if show.run is not None:
            _derive(show.run)
        raise
    data = _derive(outcome.run)
    print_tables(data)
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


def print_tables(data: RunData, reference: str | None = None) -> None:
    """The comparative tables on standard output, as wide as it is."""
    from metabench.report import kernel_report, table, tables

    table.show(tables(data, reference), kernel_report(data, reference), console())


def _print_plan(
    suite: Suite,
    select: str,
    device: str | None,
    seeds: Sequence[int] | None,
    newest: Run | None,
    weights: Path | None,
) -> None:
    from metabench import plan, runner
    from metabench.keptweights import Weights

    asked = plan.override(suite, seeds=seeds, device=device)
    rows: Sequence[plan.Row] = plan.rows_of(asked)
    loaded = Weights.kept_by(weights, asked, rows) if weights else Weights()
    rows = plan.select_rows(loaded.on(rows), select)
    goes_on = newest is not None and runner.goes_on(newest, loaded)
    done = runner.comparable(newest, newest.measurements()) if newest and goes_on else {}
    states = ["done" if plan.is_done(row, done) else "skip" if loaded.refusal(row) else "to do" for row in rows]
    print_text("".join(f"{state:5}  {row.cell.id}  {row.measure}\n" for state, row in zip(states, rows, strict=True)))
    trainings = {row.cell.training_id for row in rows if row.cell.train and not weights}
    typer.echo(f"{suite.name}: {len(rows)} rows, {states.count('to do')} to do, {len(trainings)} trainings", err=True)


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
        print_text(render_against(data, format, width=width()))
    elif format == "table":
        print_tables(data, reference)
    else:
        print_text(render(data, format, reference))


def _draw(data: RunData, folder: Path) -> None:
    from metabench.report.figures import draw

    paths = draw(data, folder)
    print_text("".join(f"{path}\n" for path in paths))
    if not paths:
        typer.echo("nothing to draw: no kernel at three values of a coordinate, no scores with costs", err=True)


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
