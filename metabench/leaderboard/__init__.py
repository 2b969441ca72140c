"""Leaderboards: runs of many machines and people merged into pages that claim no more than the numbers support.

`leaderboard` makes the site, `verify` recomputes what a run states, `pack` makes the file that is handed in. They run
nothing but a process that makes test episodes anew; `rerun` (a module of its own) starts workers, as a run does. Torch
is never imported here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from metabench.errors import ConfigError, NothingRan, StoreError
from metabench.leaderboard import bundle, files, rawrows, rerunfile, site
from metabench.leaderboard.audit import Audit, Problem, audit, results_of
from metabench.leaderboard.boardfile import BoardEntry, read_board
from metabench.leaderboard.boards import Board, boards
from metabench.leaderboard.collect import Fingerprint, Source, Training, collect, plain, source_of
from metabench.leaderboard.summary import Summary, summaries

__all__ = ["Audit", "Board", "Built", "Summary", "leaderboard", "pack", "verify"]


@dataclass(frozen=True)
class Built:
    """What was made: the page, the files beside it, and the boards in it."""

    page: Path
    markdown: str
    boards: tuple[Board, ...]

    @property
    def lines(self) -> list[str]:
        """One line for each board."""
        return [f"{board.title}: {' '.join(files.sentences(board)[:1])}" for board in self.boards]


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
        ConfigError: the board file is wrong; a bundle where `link` asks for folders.
        NothingRan: no run has a row of quality on a protocol of the board.
    """
    if link and (packed := [path for path in runs if path.is_file()]):
        raise ConfigError(f"{packed[0]}: a bundle has no folder to link to; leave --link out, or unpack it")
    entry = read_board(board) if board else BoardEntry()
    records = [record for folder in reruns for record in rerunfile.read(folder)]
    with contextlib.ExitStack() as stack:
        sources = [source_of(stack.enter_context(bundle.reading(path))) for path in runs]
        for one in sources:
            if (one.run.path / rerunfile.NAME).exists():
                raise StoreError(f"{one.run.path}: a re-run is no submission: name its folder with --reruns")
        unknown = [w.run for w in entry.withdrawals if w.run not in {source.run.name for source in sources}]
        if unknown:
            raise ConfigError(f"{board}: withdrawals: no run is called {unknown[0]!r}; name the run's folder")
        kept = [one for one in sources if not any(w.takes(one, None) for w in entry.withdrawals)]
        if check:
            kept = [_verified(one) for one in kept]
        found = collect(kept, lambda one, name: any(w.takes(one, name) for w in entry.withdrawals))
        found = rerunfile.apply(found, records)
        made = [one for one in boards(found, min_seeds=entry.min_seeds) if entry.shows(one.protocol)]
        made = [replace(one, number=number) for number, one in enumerate(made, 1)]
        if not any(one.quality for each in made for one in each.standings):
            raise NothingRan(
                "no run has a result of accuracy or mse on a protocol of this board; "
                "look at `metabench report RUN` and at the board file's protocols"
            )
        across = summaries(made, entry.sources)
        places = rawrows.links(kept, out) if link else rawrows.copies(kept)
        markdown = files.leaderboard_md(entry.title, made, across)
        page = site.page(
            title=entry.title,
            description=entry.description,
            boards=made,
            summaries=across,
            runs=[(one, places[id(one)]) for one in kept],
            withdrawals=[(w.run, w.algorithm or "all rows", w.reason) for w in entry.withdrawals],
            environments=found.environments,
        )
        bundle.write(out / "leaderboard.csv", files.leaderboard_csv(made).encode())
        bundle.write(out / "leaderboard.md", markdown.encode())
        bundle.write(out / "badge.svg", files.badge_svg(made).encode())
        rawrows.publish([] if link else kept, out, places)
        bundle.write(out / "index.html", page.encode("utf-8", "backslashreplace"))
    return Built(out / "index.html", markdown, tuple(made))


def verify(runs: Sequence[Path], *, episodes: bool = True) -> list[Audit]:
    """Recompute every figure of these runs (folders or bundles); with `episodes` also the test episodes, from the data.

    Raises StoreError for what cannot be read as a run at all; what does not add up is in the audits.
    """
    audits: list[Audit] = []
    seen: dict[tuple[object, ...], Path] = {}
    trainings: dict[Fingerprint, Training] = {}
    for path in runs:
        with bundle.reading(path) as run:
            found = audit(run, episodes=episodes)
            others = {seen.setdefault(key, path) for key in results_of(run)} - {path}
        twice = [Problem(str(path), f"holds results of {other} again: a result counts once") for other in others]
        again = []
        for key, training in found.trainings.items():
            mine = replace(training, run=str(path))  # a bundle lay in a folder that is gone by now
            if (first := trainings.setdefault(key, mine)).seed != mine.seed:
                again.append(Problem(f"{path}: {plain(mine.cell)}", first.again(elsewhere=True)))
        audits.append(replace(found, problems=(*found.problems, *twice, *again)))
    return audits


def pack(run: Path, out: Path, *, submitter: str, weights: bool = False) -> Path:
    """Verify a run's figures and write its bundle into the folder `out`; the board makes the episodes anew.

    With `weights` it carries what was trained, and plug-in algorithms, so that the board can run it again.

    Raises StoreError where it does not add up, or where `weights` finds none.
    """
    with bundle.reading(run) as opened:
        _verified(source_of(opened), episodes=False)
        return bundle.pack(opened, out, submitter, weights=weights)


def _verified(source: Source, *, episodes: bool = True) -> Source:
    found = audit(source.run, episodes=episodes)
    if found.problems:
        raise StoreError("\n".join(f"{one.where}: {one.what}" for one in found.problems))
    return replace(source, doubts=found.doubts)
