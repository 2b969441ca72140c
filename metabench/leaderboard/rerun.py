"""Running a submission again: its weights, on test episodes that did not exist when it was handed in.

The episode seed is drawn from the operating system after the submission was read. Weights are read as safetensors and
never unpickled; a worker process does the work, as in any run; the test episodes are made anew afterwards by another
process, which never loads the submission's code. What comes out is a run folder of our own with `rerun.json` in it.
"""

from __future__ import annotations

import hashlib
import json
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from scipy import special

import metabench
from metabench.catalogue import Catalogue, catalogue
from metabench.cells import Cell, parse_id
from metabench.errors import ConfigError, MetabenchError, NothingRan, StoreError
from metabench.leaderboard import bundle, rerunfile
from metabench.leaderboard.audit import audit
from metabench.leaderboard.collect import Score, collect
from metabench.leaderboard.rerunfile import Figure, Outcome, RerunEntry, RowEntry
from metabench.leaderboard.source import loaded, plain, regular, source_of
from metabench.plan import sources_of
from metabench.runner import Watch, run
from metabench.stats import Floats, holm, mean_interval
from metabench.store import Run
from metabench.suite import Evaluation, Suite, Timing

ALPHA = 0.01  # family-wise, over the rows of a submission
MIN_EPISODES = 30  # fewer see next to nothing, and the test's normal theory needs them
SAME = 1e-9  # scores that differ by less are the same
POWER = 0.8  # of the excess that is said to be visible
WEIGHTS = re.compile(r"([0-9a-f]{64})\.safetensors")
RAW = ("manifest.json", "measurements.jsonl", "samples.jsonl")


@dataclass(frozen=True)
class Rerun:
    """What came out: the folder of the re-run, and its record."""

    folder: Path
    record: RerunEntry

    @property
    def exit_code(self) -> int:
        """0 what could be run again holds, 2 a claim does not, 3 a row failed or none could be run again."""
        outcomes = {row.outcome for row in self.record.rows}
        return 2 if "refused" in outcomes else 3 if "failed" in outcomes or "agrees" not in outcomes else 0

    @property
    def lines(self) -> list[str]:
        """What to tell, two lines for each row."""
        record = self.record
        drawn = "drawn from the operating system after the submission was read" if record.drawn else "given"
        found = [
            f"{plain(record.run)}{f' by {record.submitter}' if record.submitter else ''}: "
            f"episode seed {record.episode_seed} ({drawn})",
        ]
        for row in record.rows:
            found += [f"{row.outcome}: {plain(row.cell)} {row.measure}", f"  {rerunfile.sentence(row)}"]
        if not record.drawn:
            found.append("a seed that was given could have been known: no row becomes re-run by it")
        return found


@dataclass(frozen=True, eq=False)
class _Claim:
    """A row to run again: as which cell of ours, with which weights; or why not."""

    score: Score
    cell: Cell | None = None
    weights: Path | None = None
    outcome: Outcome = "not re-run"
    reason: str = ""

    @property
    def higher_is_better(self) -> bool:
        return not self.score.measure.startswith("mse")


def rerun(
    path: Path,
    *,
    out: Path,
    watch: Watch,
    episodes: int | None = None,
    seed: int | None = None,
    trust_code: bool = False,
    device: str | None = None,
) -> Rerun:
    """Evaluate the weights of a run (a folder or a bundle) on new test episodes, and record what of it holds.

    `episodes` None: as many as were claimed. `seed` None: drawn now; one that is given repeats an earlier re-run.
    `trust_code` allows plug-ins that come with the submission to run here. `device` None: each row's own.

    Raises:
        StoreError: the submission is damaged or does not add up, or the re-run does not.
        ConfigError: it brings code and `trust_code` does not allow it; too few episodes; the submission's own seed; it
            loaded the weights of another run.
        NothingRan: no row of it can be run again; the message says why.
        Interrupted: Ctrl-C; nothing is recorded.
    """
    if episodes is not None and episodes < MIN_EPISODES:
        raise ConfigError(f"--episodes {episodes}: {MIN_EPISODES} at least; fewer would see no false claim")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"--seed {seed}: a seed is 0 or more, below 2**63")
    with bundle.reading(path) as submitted:
        if (submitted.path / rerunfile.NAME).exists():
            raise StoreError(f"{path}: is itself a re-run; name the run that was handed in")
        source = source_of(submitted)
        if said := loaded(submitted):
            raise ConfigError(f"{path}: {said}")
        if seed is not None and seed == _evaluation(submitted).get("seed"):
            raise ConfigError(f"--seed {seed}: the submission's own: a re-run takes other episodes")
        known = _catalogue(submitted)
        scores = [one for one in collect([source]).scores if one.scores is not None]
        claims = _apart([_claim(one, known, device) for one in scores])
        able = [claim for claim in claims if claim.cell]
        if not able:
            raise NothingRan(f"{path}: no row can be run again: {_why(claims)}")
        _check_trust(path, submitted, able, known, trust_code, watch)
        _adds_up(submitted)
        drawn = seed is None
        chosen = secrets.randbits(63) if seed is None else seed
        watch.note(f"episode seed {chosen}, {'drawn just now' if drawn else 'as given'}")
        count = episodes or max(MIN_EPISODES, *(len(one.score.scores) for one in able if one.score.scores is not None))
        suite = _suite(submitted, able, known, Evaluation(episodes=count, seed=chosen, selection=_selection(able)))
        files = {claim.cell.id: claim.weights for claim in able if claim.cell and claim.weights}
        made = Run.open(run(suite, out=out, watch=watch, device=device, resume=False, weights=files).run.path)
        record = RerunEntry(
            at=datetime.now(UTC).isoformat(timespec="seconds"),
            metabench=metabench.__version__,
            run=submitted.name,
            submitter=source.submitter,
            files=_hashes(submitted, able),
            episode_seed=chosen,
            drawn=drawn,
            episodes=count,
            alpha=ALPHA,
            rows=tuple(_entries(claims, made, known)),
        )
    rerunfile.write(made, record)
    return Rerun(made.path, record)


def _adds_up(submitted: Run, what: str = "") -> None:
    found = audit(submitted)
    if found.problems:
        raise StoreError("\n".join(f"{what}{one.where}: {one.what}" for one in found.problems))


def _evaluation(submitted: Run) -> Mapping[str, Any]:
    found = submitted.manifest.get("evaluation")
    return found if isinstance(found, dict) else {}


def _catalogue(submitted: Run) -> Catalogue:
    """What is known here, and the plug-ins of the submission: their source is read, nothing of it runs yet."""
    return catalogue([submitted.path / name for name in rerunfile.plugins(submitted)])


def _claim(score: Score, known: Catalogue, device: str | None) -> _Claim:
    """Whether and how a row can be run again."""
    submitted, base = score.source.run, _Claim(score)
    try:
        cell = parse_id(score.cell, known)
    except ConfigError as error:
        return replace(base, reason=f"{error}; a plug-in comes with a bundle that was packed with --weights")
    if known.dataset(cell.dataset).module is None:
        return replace(base, reason=f"its data set {cell.dataset} is the submission's own, and would judge itself")
    if score.coordinates["params"] not in ("", ours := json.dumps(dict(cell.resolved), sort_keys=True)):
        return replace(base, reason=f"its parameters are stated as {plain(score.coordinates['params'])}, here {ours}")
    found = replace(base, cell=replace(cell, device=device or cell.device))
    if cell.train is None:
        return found
    if not score.weights:
        return replace(base, reason="no weights were kept of its training (metabench run --keep-weights)")
    name = WEIGHTS.fullmatch(score.weights)
    file = regular(submitted, f"weights/{score.weights}") if name else None
    if name is None or file is None:
        return replace(base, reason="its weights were not handed in (metabench leaderboard pack --weights)")
    if hashlib.sha256(file.read_bytes()).hexdigest() != name[1]:
        return replace(base, outcome="failed", reason=f"weights/{file.name} is damaged: its hash is not its name")
    return replace(found, weights=file)


def _apart(claims: Sequence[_Claim]) -> list[_Claim]:
    """The claims, but of rows that become one cell on one device, only those with the weights of the first."""
    first: dict[str, Path | None] = {}
    kept = []
    for claim in claims:
        if claim.cell and first.setdefault(claim.cell.id, claim.weights) != claim.weights:
            claim = replace(claim, cell=None, reason="on this device it is the cell of another row, of other weights")
        kept.append(claim)
    return kept


def _why(claims: Sequence[_Claim]) -> str:
    reasons = dict.fromkeys(f"{claim.reason} ({plain(claim.score.cell)})" for claim in claims)
    shown = "\n".join(list(reasons)[:5])
    return shown or "it has no finished row of accuracy or mse"


def _check_trust(
    path: Path, submitted: Run, able: Sequence[_Claim], known: Catalogue, trust_code: bool, watch: Watch
) -> None:
    """Raise ConfigError where code of the submission would run and nobody said that it may."""
    used = {known.algorithm(claim.cell.algorithm) for claim in able if claim.cell}
    own = [f"plugins/{one.file.name}" for one in used if one.module is None]
    if not own:
        return
    hashes = rerunfile.plugins(submitted)
    listed = ", ".join(f"{plain(name)} (SHA-256 {hashes[name][:16]}...)" for name in sorted(own))
    if not trust_code:
        raise ConfigError(
            f"{path}: brings code of its own: {listed}. To run it again is to run that program on this machine, with "
            "all your rights. Read it first; then say --trust-code, best on a machine that has nothing to lose"
        )
    watch.note(f"RUNNING THE SUBMISSION'S OWN CODE, as --trust-code allows: {listed}")


def _selection(able: Sequence[_Claim]) -> str:
    chosen = {str(claim.score.coordinates["selection"]) for claim in able} - {""}
    return chosen.pop() if chosen == {"val"} else "last"


def _suite(submitted: Run, able: Sequence[_Claim], known: Catalogue, evaluation: Evaluation) -> Suite:
    """The rows to run again as a suite, in a folder of a harmless name."""
    points: dict[Cell, tuple[str, ...]] = {}
    for claim in able:
        assert claim.cell is not None
        points[claim.cell] = tuple(dict.fromkeys((*points.get(claim.cell, ()), claim.score.measure)))
    return Suite(
        name=re.sub(r"[^A-Za-z0-9_-]", "-", submitted.name)[:100] or "run",
        path=submitted.path,
        description=f"a re-run of {plain(submitted.name)}",
        evaluation=evaluation,
        threads=None,
        reference=None,
        controls=False,
        plugins=tuple(submitted.path / name for name in rerunfile.plugins(submitted)),
        catalogue=known,
        timing=Timing(processes=1, slices=3),
        points=points,
    )


def _hashes(submitted: Run, able: Sequence[_Claim]) -> dict[str, str]:
    files = [*RAW, *sorted({f"weights/{claim.weights.name}" for claim in able if claim.weights})]
    found = {name: regular(submitted, name) for name in files}
    hashes = {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in found.items() if file}
    return {**hashes, **rerunfile.plugins(submitted)}


def _entries(claims: Sequence[_Claim], made: Run, known: Catalogue) -> list[RowEntry]:
    """What became of every row. Raises StoreError where the re-run's own episodes are not those of its seed."""
    if any(row.status == "ok" for row in made.current().values()):
        _adds_up(made, "the re-run does not add up: ")
    again = {(one.cell, one.measure): one for one in collect([source_of(made)]).scores}
    pairs = [(claim, again[claim.cell.id, claim.score.measure] if claim.cell else None) for claim in claims]
    tested = [(claim, found) for claim, found in pairs if found is not None and found.scores is not None]
    judged = judge([(_scores(claim.score), _scores(found), claim.higher_is_better) for claim, found in tested])
    verdicts = {id(claim): verdict for (claim, _), verdict in zip(tested, judged, strict=True)}
    return [_entry(claim, found, verdicts.get(id(claim)), known) for claim, found in pairs]


def _entry(claim: _Claim, found: Score | None, verdict: Verdict | None, known: Catalogue) -> RowEntry:
    outcome, reason = claim.outcome, claim.reason
    if found is not None and verdict is None:
        outcome = "not re-run" if found.status == "skipped" else "failed"
        reason = f"{found.status}: {found.reason}"
        reason += "; --device cpu runs it there" if claim.cell and claim.cell.device == "cuda" else ""
    elif verdict is not None:
        outcome = "refused" if verdict.p < ALPHA else "agrees"
    return RowEntry(
        cell=claim.score.cell,
        measure=claim.score.measure,
        outcome=outcome,
        reason=reason,
        bound=rerunfile.bound(claim.score),
        claimed=_figure(_scores(claim.score)),
        again_cell=found.cell if found else "",
        again=None if found is None or found.scores is None else _figure(found.scores),
        p=verdict.p if verdict else None,
        visible=verdict.visible if verdict else None,
        same_code=_same_code(claim, known),
    )


def _same_code(claim: _Claim, known: Catalogue) -> bool:
    if claim.cell is None:
        return False
    try:
        ours = sources_of(known, claim.cell.algorithm, claim.cell.dataset, cost=False)
    except (MetabenchError, SyntaxError):
        return False
    rows = claim.score.source.run.manifest["rows"]
    key = claim.score.cell, claim.score.measure
    return any((row["cell"], row["measure"]) == key and row.get("sources") == ours for row in rows)


def _scores(score: Score) -> Floats:
    assert score.scores is not None
    return score.scores


def _figure(scores: Floats) -> Figure:
    found = mean_interval(scores)
    return Figure(value=found.value, low=found.low, high=found.high, n=len(scores))


# the test


@dataclass(frozen=True)
class Verdict:
    """Holm's adjusted p-value of a claim being too good, and the excess that would have been seen with `POWER`."""

    p: float
    visible: float


def judge(pairs: Sequence[tuple[Floats, Floats, bool]], *, alpha: float = ALPHA) -> list[Verdict]:
    """Whether claimed scores are better than those of the re-run: one verdict for each (claimed, again, higher better).

    The episodes differ, so nothing is paired: Welch's one-sided t-test of two samples of episodes, the weights being
    the same; Holm over all rows. `visible` is at the strictest step of Holm's procedure.
    """
    tests = [_welch(claimed, again, higher) for claimed, again, higher in pairs]
    adjusted = holm([p for p, _, _ in tests])
    return [
        Verdict(p, _visible(error, df, alpha / len(tests))) for p, (_, error, df) in zip(adjusted, tests, strict=True)
    ]


def _welch(claimed: Floats, again: Floats, higher: bool) -> tuple[float, float, float]:
    """One-sided p, standard error of the difference, degrees of freedom."""
    excess = float(claimed.mean() - again.mean()) * (1 if higher else -1)
    parts = [float(x.var(ddof=1)) / len(x) if len(x) > 1 else 0.0 for x in (claimed, again)]
    error = sum(parts) ** 0.5
    if error <= SAME or min(len(claimed), len(again)) < 2:  # every episode the same score: any excess is one
        return float(excess <= SAME), error, 1.0
    df = sum(parts) ** 2 / sum(part**2 / (len(x) - 1) for part, x in zip(parts, (claimed, again), strict=True))
    return float(special.stdtr(df, -excess / error)), error, df


def _visible(error: float, df: float, alpha: float) -> float:
    return float((special.stdtrit(df, POWER) - special.stdtrit(df, alpha)) * error) if error > SAME else 0.0
