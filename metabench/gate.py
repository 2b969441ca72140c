"""The gate: did this change make it slower? Two versions of the code on this machine, now, side by side.

`check` compares the working tree with a git revision, or one interpreter with another. `pairs.py` runs the workers,
`judging.py` decides, `revisions.py` speaks git; here they come together. Never imports torch.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import metabench
from metabench import environment, plan
from metabench.catalogue import Plugin, read_plugin
from metabench.cells import Cell, unsupported
from metabench.costs import Setting
from metabench.errors import ConfigError, Interrupted, NothingRan, WorkerError
from metabench.joint import join
from metabench.judging import CONTROL_LEVEL, Family, Judgement, confirmed, confirming, findings, moved
from metabench.pairs import (
    NO_CUDA,
    Again,
    Fault,
    Item,
    Module,
    Name,
    Pairs,
    Side,
    Which,
    installed,
    module_path,
    modules_of,
    one_fault,
    top_names,
    tracked_names,
)
from metabench.plan import Row
from metabench.revisions import Repository
from metabench.scratch import scratch
from metabench.signedranks import centre
from metabench.stats import Interval
from metabench.suite import Gating, Suite
from metabench.thresholds import Margin, Thresholds
from metabench.verdicts import Absent, Control, Findings, Outcome, Verdict, of_counts
from metabench.workers import Worker

COUNTS = ("flops", "bytes", "nodes", "launches")
IDENTICAL = "identical code: every module of the project that the suite loads is the same on both sides"
UNTOUCHED = {"PYTHONDONTWRITEBYTECODE": "1"}  # no __pycache__ in the user's tree; a start compiles its few files anew
SEED = 0  # of orders and layouts; the pairs differ, the plan repeats


class Watch(Protocol):
    """Is told what happens during a check."""

    def pair(self, stage: str, number: int, of: int, rows: int) -> None:
        """A pair of processes is about to run; `of` is the next planned look."""

    def note(self, text: str) -> None:
        """Something the user should know."""


@dataclass(frozen=True)
class Versions:
    """The two sides; for revisions of a repository also where it is, and which commit the base is."""

    base: Side
    candidate: Side
    repository: Repository | None = None
    commit: str = ""
    notes: tuple[str, ...] = ()


def check(
    suite: Suite,
    *,
    base: str | None = None,
    base_python: Path | None = None,
    watch: Watch,
    select: str = "",
    measure_identical: bool = False,
) -> Findings:
    """Compare the working tree with the revision `base`, or this interpreter with `base_python`.

    Of the suite's rows, times of kernels are measured in pairs of processes, and counts compared exactly; the rest
    (accuracy, memory, training time) is for stored results. Identical code is not measured unless asked.

    Raises:
        ConfigError: no repository, no such revision, a base that cannot be run, a module from outside its own tree.
        NothingRan: no row to compare.
        WorkerError: the candidate cannot be run.
        Interrupted: Ctrl-C or SIGTERM; worktree and workers are gone.
    """
    rows = plan.select_rows(plan.rows_of(suite), select)
    with scratch() as folder, _versions(suite, base, base_python) as both:
        try:
            return Check(suite, rows, both, folder, watch).run(measure_identical=measure_identical)
        except KeyboardInterrupt:
            raise Interrupted("interrupted; nothing is left behind") from None


class Check:
    """One comparison of two versions on the rows of a suite."""

    def __init__(self, suite: Suite, rows: Sequence[Row], versions: Versions, folder: Path, watch: Watch) -> None:
        self.suite, self.versions, self.watch, self.rules = suite, versions, watch, suite.gate
        self.notes: dict[str, None] = {}
        for text in versions.notes:
            self._note(text)
        self.verdicts: list[Verdict] = []
        self.failed: list[Absent] = []
        self.thresholds = Thresholds.of(suite.thresholds)
        asked = [row for row in rows if row.aspect in ("time", *COUNTS) and row.kernel]
        if len(asked) < len(rows):
            self._note(f"{len(rows) - len(asked)} rows are no times or counts of kernels: compare gates those")
        self.asked = [(row, messages) for row in asked if (messages := self._messages(row))]
        if not self.asked and not self.verdicts:
            raise NothingRan(f"no row of {suite.name} can be compared here; it needs times or counts of kernels")
        timed = [Item(Name(*row.key), messages, self._setting(row)) for row, messages in self._of("time")]
        self.pairs = Pairs(versions.base, versions.candidate, timed, folder, seconds=self.rules.seconds, seed=SEED)
        self.modules: dict[Which, dict[str, str]] = {}
        self.counts: dict[tuple[str, str], Verdict | Fault] = {}
        self.deadly: set[tuple[str, str]] = set()  # rows of counts that end a worker
        self.controls: dict[Name, list[float]] = {}

    def run(self, *, measure_identical: bool) -> Findings:
        """Rehearse, count, then measure pairs until all is decided; then confirm what alarms."""
        self.watch.pair("rehearsal", 0, 0, len(self.pairs.items))
        self.pairs.rehearse(self._look_at)
        self._judge_counts()
        self._note_software()
        identical = self._identical()
        if identical and not measure_identical:
            return self._not_measured()
        family = Family(self._margins(), self.rules)
        check_looks(self.rules, len(family.ratios))
        self._note_looks(family)
        self._measure(family, "pair")
        found = family.judgements()
        if findings(found) and not (self._moved() and self.versions.repository):
            again = confirming(family)
            self._measure(again, "confirming pair")
            found = confirmed(family, again)
        self._same_code()
        self._disturbed()
        contaminated = self._contaminated()
        for name, judgement in found.items():
            if name not in self.pairs.faults:
                self.verdicts.append(verdict(name, judgement, family.margins[name].margin, contaminated))
        self._faults(self._untimed(), "time")
        if identical:
            self._note(IDENTICAL)
        self._note_method(len(found))
        return self._findings(contaminated=contaminated, level=1 - 2 * family.level)

    def _note_method(self, rows: int) -> None:
        pairs = max((len(ratios) for ratios in self.controls.values()), default=0)
        self._note(
            f"{rows} times in {pairs} pairs of processes: false alarms at most {self.rules.alpha:.3g} over all of them "
            "(Holm), and a second set of pairs must confirm; could see: the change found with 80 % power"
        )

    def _margins(self) -> dict[Name, Margin]:
        return margins_of(self.pairs.items, [row for row, _ in self._of("time")], self.suite)

    def _of(self, *aspects: str) -> list[tuple[Row, Mapping[Which, Mapping[str, Any]]]]:
        return [(row, messages) for row, messages in self.asked if row.aspect in aspects]

    def _note(self, text: str) -> None:
        if text not in self.notes:
            self.notes[text] = None
            self.watch.note(text)

    def _setting(self, row: Row) -> Setting:
        return setting_of(row, self.suite)

    def _messages(self, row: Row) -> Mapping[Which, Mapping[str, Any]] | None:
        """The question that a row puts to each side's worker; None where it cannot be put here."""
        if (reason := impossible(row, self.suite)) is not None:
            self._note(reason)
            return None
        message = plan.cost_message(row)
        # a default that differs between the sides would make it other work
        message["data_params"] = self.suite.catalogue.dataset(row.cell.dataset).resolve(message["data_params"])
        try:
            theirs = self._for_base(row, message)
        except ConfigError as error:
            self.verdicts.append(incomparable(row.key, f"base: {error}", row.aspect))
            return None
        return {"base": theirs, "candidate": message}

    def _for_base(self, row: Row, message: Mapping[str, Any]) -> Mapping[str, Any]:
        """The same work in the words of the base: without parameters that it does not know yet.

        Raises:
            ConfigError: the base has no such algorithm or data set, or not the parameters that the suite sets.
        """
        cell, known = row.cell, self.suite.catalogue
        params = self._known_there(known.algorithm(cell.algorithm), {*dict(cell.params)}, message["params"])
        given = {*dict(cell.data_params), "split"}
        data = self._known_there(known.dataset(cell.dataset), given, message["data_params"])
        return {**message, "params": params, "data_params": data}

    def _known_there(self, plugin: Plugin, given: set[str], params: Mapping[str, Any]) -> dict[str, Any]:
        """Those parameters of a plug-in that the base has, and notes on the others; `given` is what the suite sets."""
        there = self._in_base(plugin)
        if new := [name for name in params if name in given and there.parameter(name) is None]:
            raise ConfigError(f"{plugin.name} has no parameter {', '.join(new)} there")
        known = {name: value for name, value in params.items() if there.parameter(name)}
        if new := [name for name in params if name not in known]:
            self._note(f"{plugin.name}: the base has no parameter {', '.join(new)} yet and runs without")
        for one in there.parameters:
            if one.name in known and one.name not in given and one.default != known[one.name]:
                now = f"{known[one.name]!r} now, {one.default!r} in the base"
                self._note(f"{plugin.name}: the default of {one.name} is {now}: both sides run with the former")
        return known

    def _in_base(self, plugin: Plugin) -> Plugin:
        """The plug-in as the base has it."""
        file, tree, repository = plugin.file.resolve(), self.versions.base.tree, self.versions.repository
        if tree is None or repository is None or not file.is_relative_to(repository.root) or installed(file):
            return plugin
        there = tree / file.relative_to(repository.root)
        if not there.is_file():
            raise ConfigError(f"{plugin.name} is not there yet")
        return read_plugin(there)

    def _look_at(self, crew: Sequence[Mapping[Which, Worker]]) -> None:
        """Ask live workers, one pair of them, for the counts, and all for what they have loaded."""
        for row, messages in self._of(*COUNTS):
            if row.cell.device == "cuda" and not all(hello["cuda"] for hello in self.pairs.hellos.values()):
                self.counts[row.key] = NO_CUDA
            elif row.key not in self.deadly:  # all others again, so that these workers load what they take
                self.counts[row.key] = self._counted(row, messages, crew[0])
        if self.versions.repository is None or not self._anything():
            return
        repository = self.versions.repository
        names = top_names(repository.root) | tracked_names(repository.files())
        sides: dict[Which, Side] = {"base": self.versions.base, "candidate": self.versions.candidate}
        for which, side in sides.items():
            other = sides["candidate" if which == "base" else "base"]
            loaded = [one for workers in crew for one in modules_of(workers[which], names)]
            self.modules[which] = own_modules(side, other, loaded, names)

    def _anything(self) -> bool:
        """Whether any row could be made ready, so that the sides have loaded what it takes."""
        return bool(self.pairs.items) or any(isinstance(one, Verdict) for one in self.counts.values())

    def _counted(
        self, row: Row, messages: Mapping[Which, Mapping[str, Any]], workers: Mapping[Which, Worker]
    ) -> Verdict | Fault:
        """Equal work gives equal counts, so one worker of each side is enough.

        Raises:
            Again: a worker died of it.
        """
        heard = {}
        for which, worker in workers.items():
            try:
                heard[which] = worker.ask({**messages[which], "kind": "count", "id": next(self.pairs.numbers)})
            except WorkerError as error:
                self.deadly.add(row.key)
                self.counts[row.key] = Fault(which, "failed", str(error))
                raise Again from error
        if bad := [Fault(which, one["status"], one["reason"]) for which, one in heard.items() if one["status"] != "ok"]:
            return one_fault(bad)
        before, after = float(heard["base"]["value"]), float(heard["candidate"]["value"])
        margin = self.thresholds.margin(row.cell.id, row.cell.algorithm, row.measure).margin
        made = Verdict(
            cell=row.cell.id, measure=row.measure, outcome="unchanged", scale="exact", worse=1, margin=margin
        )
        return of_counts(made, before, after)

    def _judge_counts(self) -> None:
        faults = {}
        for row, _ in self._of(*COUNTS):
            found = self.counts[row.key]
            if isinstance(found, Verdict):
                self.verdicts.append(found)
            else:
                faults[row.key] = found
        self._faults(faults, "count")

    def _note_software(self) -> None:
        versions = {which: str(hello["torch"]) for which, hello in self.pairs.hellos.items()}
        if len({*versions.values()}) > 1:
            self._note(f"torch {versions['candidate']} against torch {versions['base']} in the base")

    def _identical(self) -> bool:
        """Whether both sides run the same code: every loaded module of the project, and data beside them."""
        repository = self.versions.repository
        if repository is None or not self.modules or self.modules["base"] != self.modules["candidate"]:
            return False
        packages = {file.partition("/")[0] for file in self.modules["candidate"] if "/" in file}
        changed = {file for file in repository.changed(self.versions.commit) if file.partition("/")[0] in packages}
        return not {file for file in changed if not file.endswith((".py", ".md"))}

    def _not_measured(self) -> Findings:
        for name, margin in self._margins().items():
            reason = "identical code: not measured"
            self.verdicts.append(_time_verdict(name, "unchanged", margin.margin, change=0.0, reason=reason))
        self._faults(self._untimed(), "time")
        self._note(IDENTICAL)
        return self._findings()

    def _note_looks(self, family: Family[Name]) -> None:
        """What so few pairs cannot show."""
        if (needed := pairs_at_least(family.level)) > self.rules.looks[0]:
            self._note(f"{len(family.ratios)} rows: nothing can be found before {needed} pairs")
        if (needed := pairs_at_least(CONTROL_LEVEL / 2)) > self.rules.looks[0]:
            self._note(f"the controls can show a disturbed machine only after {needed} pairs")

    def _same_code(self) -> None:
        """Every pair of processes loads the code anew: raise ConfigError where it was edited meanwhile."""
        tree = self.versions.candidate.tree
        if tree is None:
            return
        for file, digest in self.modules.get("candidate", {}).items():
            now = tree / file
            if not now.is_file() or hashlib.sha256(now.read_bytes()).hexdigest() != digest:
                raise ConfigError(f"{now} changed during the check, so its pairs ran different code: run it again")

    def _measure(self, family: Family[Name], stage: str) -> None:
        """Fresh pairs for the family's open rows, until none is open."""
        while wanted := family.open:
            look = next(look for look in family.rules.looks if look > family.pairs)
            self.watch.pair(stage, family.pairs + 1, look, len(wanted))
            found = self.pairs.take(wanted)
            for name in wanted:
                if name in self.pairs.faults:
                    family.drop(name)
            family.add(found)
            for name, ratio in found.items():
                if not name.cell:
                    self.controls.setdefault(name, []).append(ratio)

    def _moved(self) -> dict[str, Interval]:
        margin = self.thresholds.margin("", "", "time").margin
        found = {name.measure: moved(ratios, margin) for name, ratios in self.controls.items()}
        return {name: change for name, change in found.items() if change is not None}

    def _contaminated(self) -> str:
        """Why the times say nothing of the code; between two interpreters a control may well differ, and is told."""
        changes = [f"{name} by {math.expm1(change.value):+.1%}" for name, change in self._moved().items()]
        if not changes:
            return ""
        text = f"controls moved: {', '.join(changes)}"
        if self.versions.repository is None:
            self._note(f"{text}: the interpreters or their torch differ by themselves")
            return ""
        return f"{text}, though no code of theirs differs: the machine treated the two sides unequally; measure again"

    def _disturbed(self) -> None:
        """What else the machine did, where it did most."""
        worst = max(self.pairs.disturbances, key=lambda one: one["other_load"] + one["steal"], default=None)
        for text in environment.explain(worst, 0.0) if worst else ():
            self._note(text)

    def _faults(self, faults: Mapping[tuple[str, str], Fault], aspect: str) -> None:
        skipped: dict[str, int] = {}
        for key, fault in faults.items():
            if fault.status == "skipped" and fault.which == "both sides":
                skipped[fault.reason] = skipped.get(fault.reason, 0) + 1
            else:
                self._fault(key, fault, aspect)
        for reason, rows in skipped.items():
            self._note(f"{rows} rows are left out: {reason}")

    def _untimed(self) -> dict[tuple[str, str], Fault]:
        return {(name.cell, name.measure): fault for name, fault in self.pairs.faults.items()}

    def _fault(self, key: tuple[str, str], fault: Fault, aspect: str) -> None:
        """A row without numbers: failed where the candidate should have it, else not to be compared."""
        if fault.which == "candidate" and fault.status != "skipped":
            self.failed.append(Absent(cell=key[0], measure=key[1], status=fault.status, reason=fault.reason))
        else:
            self.verdicts.append(incomparable(key, f"{fault.which}: {fault.reason}", aspect))

    def _findings(self, *, contaminated: str = "", level: float = 1.0) -> Findings:
        order = {row.key: place for place, (row, _) in enumerate(self.asked)}
        controls = [
            Control(name.measure, math.expm1(centre(ratios).value), name.measure in self._moved())
            for name, ratios in self.controls.items()
        ]
        verdicts = sorted(self.verdicts, key=lambda one: order.get(one.key, -1))
        return Findings(
            title=f"{self.versions.candidate.label} against {self.versions.base.label}",
            verdicts=tuple(verdicts),
            joint=tuple(join(verdicts, {})),
            absent=tuple(self.failed),
            notes=tuple(self.notes),
            level=f"{100 * level:.4g} %",
            controls=tuple(controls),
            contaminated=contaminated,
        )


def pairs_at_least(level: float) -> int:
    """With fewer pairs no p-value of the signed-rank test is as small as `level`: with n none is below 2^-n."""
    return math.ceil(-math.log2(level))


def check_looks(rules: Gating, rows: int) -> None:
    """Raise ConfigError where so many rows can never be decided in so few pairs."""
    needed = pairs_at_least(rules.alpha / len(rules.looks) / max(rows, 1))
    if needed > rules.looks[-1]:
        few = f"{rows} rows cannot be told apart in {rules.looks[-1]} pairs"
        raise ConfigError(f"{few}: give the suite's gate a last look at {needed} or later, or fewer rows with -k")


def margins_of(names: Iterable[Name], rows: Sequence[Row], suite: Suite) -> dict[Name, Margin]:
    """The margin of each name, as the suite's thresholds have it for its row."""
    thresholds, algorithms = Thresholds.of(suite.thresholds), {row.key: row.cell.algorithm for row in rows}
    return {name: thresholds.margin(name.cell, algorithms[name[:2]], name.measure) for name in names}


def setting_of(row: Row, suite: Suite) -> Setting:
    """What a row's workers are started with, as for `run`."""
    return Setting(row.cell.call.threads or suite.threads or environment.cores(), row.cell.call.allocator)


def impossible(row: Row, suite: Suite) -> str | None:
    """Why a row cannot be measured on any side, or None."""
    if (row.cell.call.threads or 1) > environment.cores():
        return f"rows of {row.cell.call.threads} threads are left out: there are {environment.cores()} cores"
    reason = unsupported(row.cell, suite.catalogue)
    return None if reason is None else f"{_short(row.cell)}: {reason}"


def _short(cell: Cell) -> str:
    return cell.id.partition("/")[0]


def own_modules(side: Side, other: Side, modules: Sequence[Module], names: set[str]) -> dict[str, str]:
    """(path in its tree -> hash) of the modules that a side has loaded of the project.

    Raises:
        ConfigError: it loaded some from elsewhere (an installed copy, the other side's tree), or none at all.
    """
    assert side.tree is not None and other.tree is not None
    own: dict[str, str] = {}
    for module in modules:
        nested = other.tree.is_relative_to(side.tree) and module.file.is_relative_to(other.tree)
        if module.file.is_relative_to(side.tree) and not nested and "site-packages" not in module.file.parts:
            own[module.file.relative_to(side.tree).as_posix()] = module.digest
        elif module.file.is_relative_to(other.tree) or module.name.partition(".")[0] in names:
            fix = "uninstall that copy, or put the project's source folder on PYTHONPATH"
            raise ConfigError(f"{side.label} loaded {module.name} from {module.file}, outside its own tree: {fix}")
    if not own:
        raise ConfigError(
            f"{side.label} loaded no module of its repository, so there is nothing to compare: the suite must use "
            "a plug-in of the repository, or metabench run from it"
        )
    return own


def verdict(name: Name, judgement: Judgement, margin: float, contaminated: str = "") -> Verdict:
    """A judgement on ln(candidate / base) as a verdict on a time."""
    outcome, reason = judgement.outcome, judgement.reason
    change, low, high = judgement.change.value, judgement.change.low, judgement.change.high
    detectable = None if judgement.detectable is None else math.expm1(judgement.detectable)
    if outcome == "inconclusive" and not reason:
        seen = "too few pairs" if detectable is None else f"too noisy: would have shown {detectable:+.1%}"
        reason = f"after {judgement.change.n} pairs {seen}"
    if contaminated and outcome != "incomparable":
        outcome, reason = "inconclusive", "contaminated: " + contaminated
    return _time_verdict(
        name, outcome, margin, change=math.expm1(change), low=_share(low), high=_share(high), detectable=detectable,
        small=judgement.small and outcome != "inconclusive", reason=reason,
    )  # fmt: skip


def _time_verdict(name: Name, outcome: Outcome, margin: float, **more: Any) -> Verdict:
    return Verdict(cell=name.cell, measure=name.measure, outcome=outcome, scale="ratio", worse=1, margin=margin, **more)


def incomparable(key: tuple[str, str], reason: str, aspect: str) -> Verdict:
    """A row that only one side can measure, or none."""
    scale: Any = "ratio" if aspect == "time" else "exact"
    return Verdict(cell=key[0], measure=key[1], outcome="incomparable", scale=scale, worse=1, reason=reason)


def _share(log: float | None) -> float | None:
    return None if log is None else math.expm1(log)


@contextlib.contextmanager
def _versions(suite: Suite, base: str | None, base_python: Path | None) -> Iterator[Versions]:
    """The two sides, for as long as they exist."""
    if (base is None) == (base_python is None):
        raise ConfigError("check SUITE needs what to compare with: --base REVISION, or --base-python PATH")
    if base is not None:
        with _revisions(suite, base) as versions:
            yield versions
    elif base_python is not None:
        with scratch() as folder:
            yield _interpreters(suite, base_python, folder)


@contextlib.contextmanager
def _revisions(suite: Suite, base: str) -> Iterator[Versions]:
    repository = Repository.around(suite.path)
    commit = repository.commit(base)
    dirty = repository.dirty()
    with repository.worktree(commit) as tree:
        label = f"base {base} ({commit[:10]})" if not commit.startswith(base) else f"base {commit[:10]}"
        here = f"the working tree{', changes that are not committed included' if dirty else ''}"
        theirs = _side("base", label, suite, repository.root, tree)
        ours = _side("candidate", f"candidate ({here})", suite, repository.root, repository.root)
        notes = ["the working tree has changes that are not committed: they are part of the candidate"] if dirty else []
        yield Versions(theirs, ours, repository, commit, tuple(notes))


def _side(which: Which, label: str, suite: Suite, root: Path, tree: Path) -> Side:
    """A version of a repository: the project from `tree`, the rest as it is here."""
    inside = [plugin.resolve().is_relative_to(root) for plugin in suite.plugins]
    plugins = [tree / p.resolve().relative_to(root) if own else p for p, own in zip(suite.plugins, inside, strict=True)]
    here = Path.cwd()
    folder = tree / here.relative_to(root) if here.is_relative_to(root) else here
    variables = {**module_path(root, tree), **UNTOUCHED}
    if data := os.environ.get("METABENCH_DATA"):
        variables["METABENCH_DATA"] = str(Path(data).absolute())
    return Side(
        which, label, tuple(p for p in plugins if p.is_file()), tree, folder=folder if folder.is_dir() else tree,
        variables=variables,
    )  # fmt: skip


def _interpreters(suite: Suite, base_python: Path, folder: Path) -> Versions:
    """The same files under two interpreters: metabench by a link, so that nothing else of one comes to the other."""
    python = base_python / "bin" / "python" if base_python.is_dir() else base_python
    if not python.is_file() or not os.access(python, os.X_OK):
        raise ConfigError(f"--base-python {base_python}: neither an interpreter nor a virtual environment")
    (folder / "metabench").symlink_to(Path(metabench.__file__).parent, target_is_directory=True)
    given = [str(Path(one).resolve()) for one in os.environ.get("PYTHONPATH", "").split(os.pathsep) if one]
    variables = {"PYTHONPATH": os.pathsep.join([str(folder), *given]), **UNTOUCHED}
    candidate = Side("candidate", f"candidate ({sys.executable})", suite.plugins, variables=variables)
    return Versions(replace(candidate, which="base", label=f"base ({python})", python=python.absolute()), candidate)
