"""The gate tested on this machine: how often it cries wolf, and how often it sees a slowdown that is there.

The same code runs on both sides. Beside every kernel as it is, the candidate's worker holds copies of it that idle
work makes slower by known shares; all are timed in the same pairs of processes, and each share is judged as a check of
its own, looks and confirmation included. A trial is one such check. Never imports torch.
"""

from __future__ import annotations

import hashlib
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

import metabench
from metabench import environment, plan
from metabench.errors import ConfigError, Interrupted, NothingRan
from metabench.gate import SEED, UNTOUCHED, Watch, check_looks, impossible, margins_of, setting_of
from metabench.judging import Family, Judgement, confirmed, confirming, moved, pairs_needed
from metabench.pairs import SIDES, Item, Name, Pairs, Side, Which
from metabench.plan import Row
from metabench.scratch import scratch
from metabench.signedranks import centre, spread
from metabench.stats import proportion_interval
from metabench.suite import Gating, Suite
from metabench.thresholds import Margin, Thresholds
from metabench.trials import Trial, Trials

ASKED = 0.05  # the slowdown that a gate is for
RECOMMENDED_LOOKS = 2
BOUND = 0.95  # one-sided level of the bounds of rates
CODE = ("pairs", "timing", "bench", "worker", "judging", "signedranks")  # what makes a trial what it is


@dataclass(frozen=True)
class Rate:
    """How often something happened, with the one-sided 95 % bounds of Clopper and Pearson."""

    hits: int
    trials: int

    @property
    def low(self) -> float:
        """The rate is above this."""
        return proportion_interval(self.hits, self.trials, level=2 * BOUND - 1)[0]

    @property
    def high(self) -> float:
        """The rate is below this."""
        return proportion_interval(self.hits, self.trials, level=2 * BOUND - 1)[1]


@dataclass(frozen=True)
class RowReport:
    """One kernel over all trials.

    `spread` is the standard deviation of ln(candidate / base) between pairs, `shift` the trials' usual change (their
    median estimate, a share: 0 but for chance); `alarms` are trials in which identical code was called slower or
    faster; `found` is, by injected share, how often it was called regressed, and `measured` the slowdown seen then.
    `pairs` of processes show 5 % with 95 % power; None where more than anybody waits for.
    """

    cell: str
    measure: str
    spread: float
    shift: float
    alarms: Rate
    found: dict[float, Rate]
    measured: dict[float, float]
    pairs: int | None


@dataclass(frozen=True)
class SelfTest:
    """What a self-test came to, and the settings that it recommends.

    `per_row` and `per_family` are rates of false alarms, of rows and of whole checks; `contaminated` are the checks
    whose verdicts a control that moved would have taken away (they count in the other rates all the same).
    """

    suite: str
    rules: Gating
    rows: tuple[RowReport, ...]
    per_row: Rate
    per_family: Rate
    contaminated: Rate
    missed: tuple[str, ...]
    recommended: Gating
    pairs: int
    notes: tuple[str, ...] = ()
    interrupted: bool = False  # before all the trials that were asked for


def selftest(
    suite: Suite,
    *,
    inject: Sequence[float] = (ASKED,),
    trials: int = 5,
    select: str = "",
    watch: Watch,
    out: Path | None = None,
) -> SelfTest:
    """Check the suite's kernels against themselves `trials` times; `inject` are the shares of slowdowns to find.

    Every trial is kept in the file `out` when it is finished; trials that are there already count among `trials`.

    Raises:
        ConfigError: `out` holds something else, or cannot be written; looks too early to decide; the code changed.
        NothingRan: no time of a kernel in the suite, or none that could be measured.
        Interrupted: Ctrl-C before the first trial was finished.
    """
    rows = [row for row in plan.select_rows(plan.rows_of(suite), select) if row.kernel and row.aspect == "time"]
    rows = [row for row in rows if impossible(row, suite) is None]
    shares, code = (0.0, *inject), _code()
    kept = Trials(out, _settings(suite, rows, shares)) if out else None
    done = list(kept.earlier) if kept else []
    items = []
    for row in rows:
        message = plan.cost_message(row)
        both: dict[Which, dict[str, Any]] = {"base": message, "candidate": message}
        items += [Item(Name(*row.key, share), both, setting_of(row, suite)) for share in shares]
    sides = (Side(which, f"{which} (the same code)", suite.plugins, variables=UNTOUCHED) for which in SIDES)
    base, candidate = sides
    with scratch() as folder:
        pairs = Pairs(base, candidate, items, folder, seconds=suite.gate.seconds, seed=SEED)
        pairs.taken = sum(trial.pairs for trial in done)  # no pair is laid out as an earlier one
        margins = margins_of(pairs.items, rows, suite)
        try:
            watch.pair("rehearsal", 0, 0, len(items))
            pairs.rehearse(lambda workers: None)
            if not pairs.items:
                raise NothingRan(f"no kernel of {suite.name} can be timed here: {_reasons(pairs) or 'it names none'}")
            check_looks(suite.gate, len(rows))
            while len(done) < trials:
                stage = f"trial {len(done) + 1} of {trials}, pair"
                done.append(_trial(pairs, margins, suite.gate, shares, stage, watch))
                if _code() != code:
                    raise ConfigError("the gate's code changed meanwhile: the trial is not counted; start again")
                if kept:
                    kept.add(done[-1])
        except KeyboardInterrupt:
            if not done:
                raise Interrupted("interrupted before the first trial was finished") from None
        report = _report(suite, margins, shares, done, pairs)
        return replace(report, interrupted=len(done) < trials)


def _code() -> str:
    """A hash of the code that measures and decides: trials of different code are not counted together."""
    folder = Path(metabench.__file__).parent
    return hashlib.sha256(b"\0".join((folder / f"{name}.py").read_bytes() for name in CODE)).hexdigest()[:16]


def _settings(suite: Suite, rows: Sequence[Row], shares: Sequence[float]) -> dict[str, Any]:
    """What trials must have in common to be counted together."""
    margins = margins_of([Name(*row.key) for row in rows], rows, suite)
    return {
        "suite": suite.name,
        "kernels": [[name.cell, name.measure, one.margin, one.unchanged] for name, one in margins.items()],
        "injected": list(shares[1:]),
        "gate": {**vars(suite.gate), "looks": list(suite.gate.looks)},
        "metabench": metabench.__version__,
        "code": _code(),
        "machine": environment.name(environment.stable({})),
    }


def _trial(
    pairs: Pairs, margins: Mapping[Name, Margin], rules: Gating, shares: Sequence[float], stage: str, watch: Watch
) -> Trial:
    """One check for each share, all on the same pairs of processes."""
    families = [Family({name: margins[name] for name in pairs.items if name.share == share}, rules) for share in shares]
    controls: dict[str, list[float]] = {}
    before = pairs.taken
    _measure(pairs, families, controls, stage, watch)
    again = [confirming(family) for family in families]
    _measure(pairs, again, controls, stage.replace("pair", "confirming pair"), watch)
    found: dict[Name, Judgement] = {}
    ratios: dict[Name, list[float]] = {}
    for first, second in zip(families, again, strict=True):
        judged = confirmed(first, second)
        found |= {name: one for name, one in judged.items() if one.outcome != "incomparable"}
        ratios |= {name: [*first.ratios[name], *second.ratios.get(name, ())] for name in judged if name in found}
    return Trial(found, ratios, pairs.taken - before, controls)


def _measure(
    pairs: Pairs, families: Sequence[Family[Name]], controls: dict[str, list[float]], stage: str, watch: Watch
) -> None:
    """Fresh pairs for what is open in any of the families; the controls' ratios are added to `controls`."""
    while wanted := [name for family in families for name in family.open]:
        live = [family for family in families if family.open]
        look = min(next(look for look in family.rules.looks if look > family.pairs) for family in live)
        watch.pair(stage, live[0].pairs + 1, look, len(wanted))
        found = pairs.take(wanted)
        for family in live:
            for name in family.open:
                if name in pairs.faults:
                    family.drop(name)
            if family.open:
                family.add(found)
        for name, ratio in found.items():
            if not name.cell:
                controls.setdefault(name.measure, []).append(ratio)


def _report(
    suite: Suite, margins: Mapping[Name, Margin], shares: Sequence[float], trials: Sequence[Trial], pairs: Pairs
) -> SelfTest:
    rules = suite.gate
    names = [name for name in margins if name.share == 0.0 and any(name in trial.found for trial in trials)]
    level = rules.alpha / RECOMMENDED_LOOKS / max(len(names), 1)
    reports = [_row(name, shares, trials, margins[name].margin, level) for name in names]
    alarms = [[_alarm(trial.found[name]) for name in names if name in trial.found] for trial in trials]
    missed = [
        f"{name.cell} {name.measure} +{name.share:.0%}: {trial.found[name].outcome} in trial {number}"
        for number, trial in enumerate(trials, 1)
        for name in trial.found
        if name.share and trial.found[name].outcome != "regressed"
    ]
    watched = [trial for trial in trials if trial.controls]
    margin = Thresholds.of(suite.thresholds).margin("", "", "time").margin
    spoilt = [any(moved(ratios, margin) for ratios in trial.controls.values()) for trial in watched]
    notes = {f"{fault.which}: {fault.reason}": None for fault in pairs.faults.values()}
    return SelfTest(
        suite=suite.name,
        rules=rules,
        rows=tuple(reports),
        per_row=Rate(sum(map(sum, alarms)), sum(map(len, alarms))),
        per_family=Rate(sum(map(any, alarms)), len(trials)),
        contaminated=Rate(sum(spoilt), len(watched)),
        missed=tuple(missed),
        recommended=recommend(rules, [one.pairs for one in reports]),
        pairs=sum(trial.pairs for trial in trials),
        notes=tuple(notes),
    )


def _alarm(judgement: Judgement) -> bool:
    return judgement.outcome in ("regressed", "improved")


def _row(name: Name, shares: Sequence[float], trials: Sequence[Trial], margin: float, level: float) -> RowReport:
    trials = [trial for trial in trials if name in trial.found]
    sd = statistics.median(spread(trial.ratios[name]) or 0.0 for trial in trials)
    found, measured = {}, {}
    for share in shares[1:]:
        copy = name._replace(share=share)
        outcomes = [trial.found[copy].outcome for trial in trials if copy in trial.found]
        if not outcomes:
            continue  # this copy could not be run; the notes say why
        found[share] = Rate(outcomes.count("regressed"), len(outcomes))
        measured[share] = _usual(copy, trials)
    alarms = [_alarm(trial.found[name]) for trial in trials]
    return RowReport(
        cell=name.cell,
        measure=name.measure,
        spread=sd,
        shift=_usual(name, trials),
        alarms=Rate(sum(alarms), len(alarms)),
        found=found,
        measured=measured,
        pairs=pairs_needed(sd, ASKED, level, margin),
    )


def _usual(name: Name, trials: Sequence[Trial]) -> float:
    """The change of a row over all trials: the median of the trials' own estimates. NaN where no trial has any.

    A trial is what a user's check is; and Hodges and Lehmann's estimate over the pairs of all of them would want
    averages of every two of thousands of values.
    """
    estimates = [centre(values).value for trial in trials if (values := trial.ratios.get(name))]
    return math.expm1(statistics.median(estimates)) if estimates else math.nan


def recommend(rules: Gating, needed: Sequence[int | None]) -> Gating:
    """The settings under which 5 % is seen in every row that permits it: as many pairs as the noisiest of them needs.

    Never less than the fewest with which so many rows can be decided at all.
    """
    rows = max(len(needed), 1)
    least = math.ceil(math.log2(rows * RECOMMENDED_LOOKS / rules.alpha))
    first = max(least, *(one for one in needed if one is not None), 10)
    return replace(rules, looks=tuple(first * look for look in range(1, RECOMMENDED_LOOKS + 1)))


def as_yaml(rules: Gating) -> str:
    """Settings as the key `gate` of a suite file."""
    looks = ", ".join(map(str, rules.looks))
    return f"gate: {{alpha: {rules.alpha:g}, looks: [{looks}], seconds: {rules.seconds:g}}}\n"


def _reasons(pairs: Pairs) -> str:
    return "; ".join(dict.fromkeys(fault.reason for fault in pairs.faults.values()))


def show(found: SelfTest, console: Console) -> None:
    """Every kernel's spread and rates, the rates of all, and the settings that follow from them."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    shares = sorted({share for row in found.rows for share in row.found})
    names = ("row", "spread", "A/A", "false", *(f"+{share:.0%}" for share in shares), "pairs for 5%")
    for name in names:
        table.add_column(name, justify="left" if name == "row" else "right", overflow="fold")
    for name, row in zip(_names(found.rows), found.rows, strict=True):
        rates = [f"{r.hits}/{r.trials}\n{row.measured[share]:+.1%}" for share, r in row.found.items()]
        alarms = f"{row.alarms.hits}/{row.alarms.trials}"
        needed = "too noisy" if row.pairs is None else str(row.pairs)
        cells = [name, f"{row.spread:.2%}", f"{row.shift:+.2%}", alarms, *rates, needed]
        table.add_row(*map(Text, cells))
    console.print(table)
    rules = found.rules
    settings = (
        f"alpha {rules.alpha:.1%}, looks {', '.join(map(str, rules.looks))}, {rules.seconds:g} s a kernel and pair"
    )
    console.print(Text(f"{found.suite}: {found.pairs} pairs of processes; {settings}"))
    for what, rate in (("rows", found.per_row), ("checks", found.per_family)):
        console.print(Text(f"false alarms, {what}: {_rate(rate)}, below {rate.high:.1%} with 95 % confidence"))
    if found.contaminated.trials:
        rate = found.contaminated
        console.print(Text(f"checks that a control would have spoilt: {_rate(rate)}, below {rate.high:.1%}"))
    for share in shares:
        each = [row.found[share] for row in found.rows if share in row.found]
        rate = Rate(sum(one.hits for one in each), sum(one.trials for one in each))
        console.print(Text(f"found of +{share:.0%}: {_rate(rate)}, above {rate.low:.1%} with 95 % confidence"))
    for text in (*found.missed, *found.notes):
        console.print(Text(f"  {text}", style="dim"), soft_wrap=True)
    if noisy := sum(row.pairs is None for row in found.rows):
        console.print(
            Text(f"{noisy} rows are too noisy here for a gate of 5 %: leave them out, or quieten the machine")
        )
    console.print(Text(f"recommended for this machine:\n{as_yaml(found.recommended)}"), end="")


def _names(rows: Sequence[RowReport]) -> list[str]:
    """Short names of the kernels, such as 'maml glyphs 5w1s1q adapt'; whole ids where these would not be unique."""
    names = []
    for row in rows:
        algorithm, data, task, *_ = (part.partition("[")[0] for part in row.cell.split("/"))
        names.append(f"{algorithm} {data} {task} {row.measure.removesuffix('_time')}")
    return names if len({*names}) == len(names) else [f"{row.cell} {row.measure}" for row in rows]


def _rate(rate: Rate) -> str:
    return f"{rate.hits} of {rate.trials}"
