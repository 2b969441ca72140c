"""Leaderboards: runs of many machines and people merged into pages that claim no more than the numbers support.

`leaderboard` makes the site, `verify` recomputes what a run states, `pack` makes the file that is handed in. They run
nothing but a process that makes test episodes anew; `rerun` (a module of its own) starts workers, as a run does. Torch
is never imported here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from metabench.errors import ConfigError, NothingRan, StoreError
from metabench.leaderboard import bundle, files, rawrows, rerunfile, site
from metabench.leaderboard.audit import Audit, Problem, audit, results_of
from metabench.leaderboard.boardfile import BoardEntry, read_board
from metabench.leaderboard.boards import Board, boards
from metabench.leaderboard.collect import Collected, Fingerprint, Training, collect
from metabench.leaderboard.source import Source, loaded, plain, source_of
from metabench.leaderboard.summary import Summary, summaries
from metabench.store import Run

__all__ = ["Audit", "Board", "Built", "Summary", "leaderboard", "pack", "verify"]


@dataclass(frozen=True)
class Built:
    """What was made: the page, the files beside it, the boards in it, and what is to be said of the runs."""

    page: Path
    markdown: str
    boards: tuple[Board, ...]
    remarks: tuple[str, ...] = ()

    @property
    def lines(self) -> list[str]:
        """One line for each board, and the remarks."""
        return [*(f"{board.title}: {' '.join(files.sentences(board)[:1])}" for board in self.boards), *self.remarks]


def leaderboard(
    runs: Sequence[Path],
    out: Path,
    *,
    board: Path | None = None,
    check: bool = False,
    reruns: Sequence[Path] = (),
    link: bool = False,
) -> Built:
    """Merge runs (folders or bundles) into a site in `out`: index.html, leaderboard.csv and .md, badge.svg, runs/.

    `link`: the page links to the run folders where they lie; nothing is copied to runs/.

    `board` is a board file. With `check` every run is verified first: its rows are `recomputed`, not `claimed`, where
    their predictions were handed in and the data set is here to make the test episodes anew. `reruns` are folders that
    `rerun` wrote: the rows that they bear out are `re-run`.

    Raises:
        StoreError: a run is damaged, states what its raw scores do not give, is handed in twice (whole, or a training
            as another seed), does not verify, or did not hold when it was run again.
        ConfigError: the board file is wrong, or withdraws or shows what no run has; a bundle where `link` asks for
            folders.
        NothingRan: no run has a row of quality on a protocol of the board.
    """
    if link and (packed := [path for path in runs if path.is_file()]):
        raise ConfigError(f"{packed[0]}: a bundle has no folder to link to; leave --link out, or unpack it")
    entry = read_board(board) if board else BoardEntry()
    before = rawrows.noted(out)
    records = [record for folder in reruns for record in rerunfile.read(folder)]
    with contextlib.ExitStack() as stack:
        sources = [source_of(stack.enter_context(bundle.reading(path))) for path in runs]
        for one in sources:
            if (one.run.path / rerunfile.NAME).exists():
                raise StoreError(f"{one.run.path}: a re-run is no submission: name its folder with --reruns")
        if board:
            entry.check_withdrawals(board, sources)
        gone = [one for one in sources if entry.withdrawn(one, None)]
        kept = [one for one in sources if one not in gone]
        if check:
            kept = [_verified(one, withdrawn=partial(entry.withdrawn, one)) for one in kept]
        found = collect(kept, entry.withdrawn, besides=gone)
        found = rerunfile.apply(found, records)
        made = _shown(found, entry, board)
        places = rawrows.links(kept, out) if link else rawrows.copies(kept)
        absent = {w.run for w in entry.withdrawals} - {one.run.name for one in sources}
        across = summaries(made, entry.sources)
        markdown = files.leaderboard_md(entry.title, made, across, found.remarks)
        page = site.page(
            title=entry.title,
            description=entry.description,
            boards=made,
            summaries=across,
            runs=[(one, places[id(one)]) for one in kept],
            withdrawals=[
                (f"{w.run} (not among these runs)" if w.run in absent else w.run, w.algorithm or "all rows", w.reason)
                for w in entry.withdrawals
            ],
            environments=found.environments,
            remarks=found.remarks,
        )
        bundle.write(out / "leaderboard.csv", files.leaderboard_csv(made))
        bundle.write(out / "leaderboard.md", markdown)
        bundle.write(out / "badge.svg", files.badge_svg(made))
        rawrows.publish([] if link else kept, out, places, before)
        bundle.write(out / "index.html", page)
    told = [f"withdrawn, and not among these runs: {plain(name)}" for name in sorted(absent)]
    return Built(out / "index.html", markdown, tuple(made), (*found.remarks, *told))


def _shown(found: Collected, entry: BoardEntry, file: Path | None) -> list[Board]:
    """The boards that the board file asks for. Raises ConfigError if it asks in vain, NothingRan without a result."""
    made = boards(found, min_seeds=entry.min_seeds)
    if file and made:
        entry.check_protocols(file, [one.protocol for one in made])
    shown = [replace(one, number=n) for n, one in enumerate((b for b in made if entry.shows(b.protocol)), 1)]
    if not any(one.quality for each in shown for one in each.standings):
        said = (
            "no run has a result of accuracy or mse on a protocol of this board; "
            "look at `metabench report RUN` and at the board file's protocols"
        )
        raise NothingRan("\n".join((said, *found.remarks)))
    return shown


def verify(runs: Sequence[Path], *, episodes: bool = True) -> list[Audit]:
    """Recompute every figure of these runs (folders or bundles); with `episodes` also the test episodes, from the data.

    Raises StoreError for what cannot be read as a run at all, NothingRan for one without a finished row; what does not
    add up is in the audits.
    """
    audits: list[Audit] = []
    seen: dict[tuple[object, ...], Path] = {}
    trainings: dict[Fingerprint, Training] = {}
    for path in runs:
        with bundle.reading(path) as run:
            found = _audited(run, episodes=episodes)
            said = [Problem(bundle.named(p.where, run, path), bundle.named(p.what, run, path)) for p in found.problems]
            name = bundle.named(found.run, run, path)
            others = {seen.setdefault(key, path) for key in results_of(run)} - {path}
        twice = [Problem(str(path), f"holds results of {other} again: a result counts once") for other in others]
        again = []
        for key, training in found.trainings.items():
            mine = replace(training, run=str(path))  # a bundle lay in a folder that is gone by now
            if (first := trainings.setdefault(key, mine)).seed != mine.seed:
                again.append(Problem(f"{path}: {plain(mine.cell)}", first.again(elsewhere=True)))
        audits.append(replace(found, run=name, problems=(*said, *twice, *again)))
    return audits


def pack(run: Path, out: Path, *, submitter: str, weights: bool = False) -> Path:
    """Verify a run's figures and write its bundle into the folder `out`; the board makes the episodes anew.

    With `weights` it carries what was trained, and plug-in algorithms, so that the board can run it again.

    Raises:
        StoreError: it does not add up, or `weights` finds none.
        ConfigError: it loaded the weights of another run, which is the one to hand in; no submitter.
        NothingRan: it has no finished row.
    """
    with bundle.reading(run) as opened:
        if said := loaded(source_of(opened).run):
            raise ConfigError(f"{run}: {said}")
        _raise(_audited(opened, episodes=False))
        return bundle.pack(opened, out, submitter, weights=weights)


def _audited(run: Run, *, episodes: bool) -> Audit:
    """The audit of a run that is looked at by itself. Raises NothingRan where it has no finished row."""
    found = audit(run, episodes=episodes)
    if not found.rows:
        raise NothingRan(f"{run.path}: no finished row; there is nothing to verify")
    return found


def _verified(source: Source, *, withdrawn: Callable[[str | None], bool]) -> Source:
    """A run of a board with what verifying it showed; rows that were withdrawn stop nothing. Raises StoreError."""
    found = audit(source.run, withdrawn=withdrawn)
    _raise(found)
    return replace(source, recomputed=found.recomputed, doubts=found.doubts)


def _raise(found: Audit) -> None:
    """Raise StoreError with every problem, if there is one."""
    if found.problems:
        raise StoreError("\n".join(f"{one.where}: {one.what}" for one in found.problems))
