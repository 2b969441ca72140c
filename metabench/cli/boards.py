"""`leaderboard` and its commands: merge runs into a page; verify, pack and rerun submissions."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from metabench.cli.terminal import DataRoot, Device, console, device_of, print_text, use_data_root

RERUNS = Path("results/reruns")
RunsOrBundles = Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders, or bundles made by `pack`.")]


class _BuildByDefault(TyperGroup):
    """`leaderboard RUN ...` is `leaderboard build RUN ...`: what is no command of the group is a run."""

    default_command = "build"

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Name the default command where none is named."""
        if args and args[0] not in self.commands and args[0] not in ("-h", "--help"):
            args = [self.default_command, *args]
        return super().parse_args(ctx, args)


app = typer.Typer(
    cls=_BuildByDefault,
    help="Merge runs into a static leaderboard: `metabench leaderboard RUN... --out DIR`; "
    "verify, pack and rerun submissions.",
    no_args_is_help=True,
)


@app.command()
def build(
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
    link: Annotated[
        bool, typer.Option("--link", help="Link to the run folders where they are; copy no raw rows into the site.")
    ] = False,
    data_root: DataRoot = None,
) -> None:
    """Merge runs into a static page, CSV and Markdown (the default: `build` may be left out)."""
    from metabench.leaderboard import leaderboard

    use_data_root(data_root)
    built = leaderboard(runs, out, board=board, check=check, reruns=reruns or (), link=link)
    print_text("".join(f"{line}\n" for line in (*built.lines, f"page: {built.page}")))
    if summary := os.environ.get("GITHUB_STEP_SUMMARY"):
        _summarize(Path(summary), built.markdown, built.lines[: len(built.boards)])


def _summarize(file: Path, markdown: str, lines: Sequence[str]) -> None:
    """Append the boards to GitHub's summary of a step: all of them, or else a line for each as far as its cap allows.

    The cap is on the whole file, which steps before may have written to; GitHub drops a longer one altogether.
    """
    from metabench.verdict_report import SUMMARY_BYTES

    room = SUMMARY_BYTES - (file.stat().st_size if file.is_file() else 0)
    with file.open("a", encoding="utf-8") as out:
        out.write(markdown if len(markdown.encode()) <= room else _shortened(lines, room))


def _shortened(lines: Sequence[str], room: int) -> str:
    """As many of the lines as go into so many bytes, with the number of the others."""
    kept: list[str] = []
    room -= len(f"- {len(lines)} more boards do not fit here\n")
    for line in lines:
        room -= len(f"- {line}\n".encode())
        if room < 0:
            break
        kept.append(f"- {line}\n")
    if len(kept) == len(lines):
        return "".join(kept)
    return "".join([*kept, f"- {len(lines) - len(kept)} more boards do not fit here\n"]) if kept else ""


@app.command()
def verify(
    runs: RunsOrBundles,
    episodes: Annotated[
        bool, typer.Option("--episodes/--no-episodes", help="Also make the test episodes anew, from the data set.")
    ] = True,
    data_root: DataRoot = None,
) -> None:
    """Recompute every figure of a run from its raw rows and episodes; exit code 2 where something does not add up."""
    from metabench.leaderboard import verify

    use_data_root(data_root)
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


@app.command()
def pack(
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


@app.command()
def rerun(
    run: Annotated[Path, typer.Argument(metavar="RUN", help="A bundle or a run folder that holds weights.")],
    episodes: Annotated[int | None, typer.Option(help="Test episodes; default: as many as were claimed.")] = None,
    seed: Annotated[
        int | None, typer.Option(help="Only to repeat a past re-run: its episode seed. It gives no trust.")
    ] = None,
    out: Annotated[Path, typer.Option(help="Where re-runs go; `build --reruns` reads them there.")] = RERUNS,
    device: Device = "auto",
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

    use_data_root(data_root)
    where = device_of(device)
    with Show(console(stderr=True)) as show:
        found = rerun(run, out=out, watch=show, episodes=episodes, seed=seed, trust_code=trust_code, device=where)
    print_text("".join(f"{line}\n" for line in (*found.lines, f"recorded: {found.folder / 'rerun.json'}")))
    sys.exit(found.exit_code)
