"""The board as plain files: CSV for machines, Markdown for a README, a badge. Nothing in them can run."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from xml.sax.saxutils import escape as escape_xml

from metabench.leaderboard.boards import Board
from metabench.leaderboard.source import plain
from metabench.leaderboard.standings import Standing
from metabench.leaderboard.summary import Entry, Summary
from metabench.report import wording
from metabench.report.markdown import escape
from metabench.spreadsheet import table
from metabench.stats import Interval

COLUMNS = (
    "board", "measure", "rank_low", "rank_high", "group", "method", "algorithm", "submitter", "control", "trust",
    "status", "reason", "value", "ci_low", "ci_high", "class_ci_low", "class_ci_high", "seeds", "episodes",
    "adapt_over_protonet", "adapt_over_protonet_low", "adapt_over_protonet_high", "adapt_flops", "tried", "remarks",
    "runs", "dataset", "data", "split", "rotations", "within", "ways", "shots", "queries", "stream", "bn_mode",
    "selection", "episode_seed", "episodes_hash", "pixels",
)  # fmt: skip
SMALL = 0.01  # of a multiple: below that only the order of magnitude matters, and the CSV has it
NAMED = 5  # leaders that a sentence names


def leaderboard_csv(boards: Sequence[Board]) -> str:
    """One line for each row of each board; empty where there is no value."""
    return table(COLUMNS, (_record(board, one) for board in boards for one in board.standings))


def _record(board: Board, one: Standing) -> dict[str, object]:
    protocol = {name: getattr(board.protocol, name) for name in COLUMNS if hasattr(board.protocol, name)}
    return {
        **protocol,
        "board": board.title,
        "rank_low": one.rank[0] if one.rank else None,
        "rank_high": one.rank[1] if one.rank else None,
        "group": one.group,
        "method": one.label,
        "algorithm": one.algorithm,
        "submitter": one.submitter,
        "control": int(one.control),
        "trust": one.trust,
        "status": one.status,
        "reason": one.reason,
        **_numbers("value", "ci", one.quality),
        **{name: value for name, value in _numbers("", "class_ci", one.by_class).items() if name},
        "seeds": " ".join(map(str, one.seeds)),
        **_numbers("adapt_over_protonet", "adapt_over_protonet", one.relative),
        "adapt_flops": one.flops,
        "tried": one.tried,
        "remarks": "; ".join(one.remarks),
        "runs": " ".join(one.runs),
    }


def _numbers(value: str, bounds: str, interval: Interval | None) -> dict[str, float | None]:
    if interval is None:
        return {value: None, f"{bounds}_low": None, f"{bounds}_high": None}
    return {value: interval.value, f"{bounds}_low": interval.low, f"{bounds}_high": interval.high}


def leaderboard_md(
    title: str, boards: Sequence[Board], summaries: Sequence[Summary], remarks: Sequence[str] = ()
) -> str:
    """Every board as a table, the summaries before them, and `remarks` on the runs behind."""
    said = ["\n".join(f"- {escape(text)}" for text in remarks)] if remarks else []
    parts = [f"## {escape(plain(title))}", *map(_summary_md, summaries), *map(_board_md, boards), *said, escape(LEGEND)]
    return "\n\n".join(parts) + "\n"


LEGEND = (
    "Rank: from 1 + the methods that are significantly better to K - those significantly worse, by paired differences "
    "over training seeds with Holm's correction at 5 %; two methods share a letter if they are not told apart. "
    "Intervals are at 95 %, over seeds and test episodes, and by class. Cost: time of adapting as a multiple of "
    "protonet's in the same run. Trust: claimed, recomputed from answers and test episodes, or re-run; costs stay as "
    "claimed."
)


def _summary_md(summary: Summary) -> str:
    heads = ["method", "coverage", *(board.title for board in summary.boards), "aggregate"]
    lines = [_line(map(escape, heads)), _line([":--", *["--:"] * (len(heads) - 1)])]
    for entry in summary.entries:
        values = [cell_text(one, board) for one, board in zip(entry.standings, summary.boards, strict=True)]
        aggregate = aggregate_text(entry)
        lines.append(_line(map(escape, [name_of(entry), f"{entry.covered}/{len(values)}", *values, aggregate])))
    said = "\n".join(f"- {escape(text)}" for text in summary.remarks)
    return "\n".join([f"### All boards: {escape(summary.title)}", "", *lines, "", said])


def name_of(entry: Entry | Standing) -> str:
    """A method with who handed it in, where that was not the board's maintainers."""
    star = "* " if isinstance(entry, Entry) and entry.star else ""
    return f"{star}{entry.label} ({entry.submitter})" if entry.submitter else f"{star}{entry.label}"


def cell_text(one: Standing | None, board: Board) -> str:
    """A method's figure on one board, or what there is in its place."""
    if one is None:
        return "missing"
    return one.status if one.quality is None else wording.score(one.quality.value, board.protocol.measure)


def aggregate_text(entry: Entry) -> str:
    """An aggregate with its interval; a dash where there is none."""
    if entry.aggregate is None:
        return "–"
    return f"{entry.aggregate.value:.3f} {wording.bounds(entry.aggregate, '')}"


def _board_md(board: Board) -> str:
    measure = board.protocol.measure
    facts = " · ".join(f"{escape(name)} {escape(value)}" for name, value in board.protocol.facts)
    name = "accuracy %" if "accuracy" in measure else measure
    heads = [
        "rank",
        "group",
        "method",
        name,
        "95 % over seeds",
        "95 % by class",
        "seeds",
        "× protonet",
        "tried",
        "trust",
    ]
    rows = [_cells(board, one) for one in board.standings]
    used = [n for n in range(len(heads)) if any(row[n] for row in rows)]
    lines = [_line(heads[n] for n in used), _line(":--" if n == 2 else "--:" for n in used)]
    lines += [_line(escape(row[n]) for n in used) for row in rows]
    said = [f"- {escape(text)}" for text in (*sentences(board), *row_remarks(board))]
    return "\n".join([f"### {escape(board.title)}", "", facts, "", *lines, "", *said]).rstrip()


def _cells(board: Board, one: Standing) -> list[str]:
    measure = board.protocol.measure
    value = wording.score(one.quality.value, measure) if one.quality else one.status
    trust = one.trust if one.quality else ""
    name = name_of(one)
    return [
        one.rank_text,
        one.group,
        f"{name} (control)" if one.control else name,
        value,
        wording.bounds(one.quality, measure),
        wording.bounds(one.by_class, measure),
        str(len(one.seeds)) if one.seeds else "",
        ratio_text(one.relative),
        str(one.tried) if not one.control else "",
        trust,
    ]


def ratio_text(ratio: Interval | None) -> str:
    """A multiple with its interval, with as many digits as it deserves."""
    if ratio is None:
        return ""
    if ratio.value < SMALL:
        return f"<{SMALL}"
    return wording.margin(
        ratio.value, ratio if ratio.low != ratio.high else Interval(1, None, None, 1, None), bounds=True
    )


def sentences(board: Board) -> list[str]:
    """What the board supports, and how much it could have seen."""
    ranked, said = board.ranked, []
    if board.ranking is None:
        said.append(f"No ranking: it takes two methods with {board.min_seeds} seeds each.")
    else:
        leaders = [name_of(one) for one in board.leaders]
        named = ", ".join(leaders[:NAMED]) + (f" and {len(leaders) - NAMED} more" if len(leaders) > NAMED else "")
        if len(leaders) == 1:
            said.append(f"Best of {len(ranked)}: {leaders[0]}, better than every other ranked method.")
        elif len(leaders) == len(ranked):
            said.append(f"None of the {len(ranked)} ranked methods is told apart from the first rank.")
        else:
            said.append(f"No single best: {named} may each have the first rank, of {len(ranked)} methods.")
        if board.ranking.visible:
            middle, low, high = (wording.score(value, board.protocol.measure) for value in board.ranking.visible)
            unit = " points" if "accuracy" in board.protocol.measure else ""
            said.append(
                f"Smallest visible difference (80 % power, at Holm's strictest step over {board.ranking.pairs} pairs): "
                f"{middle}{unit} for the middle pair, {low} to {high} over all."
            )
    if board.protocol.chance is not None:
        said.append(f"Chance is {100 * board.protocol.chance:g} %.")
    return [*said, *board.remarks]


def row_remarks(board: Board) -> list[str]:
    """What must be known of single rows, equal remarks joined."""
    by_text: dict[str, list[str]] = {}
    for one in board.standings:
        texts = one.remarks if one.quality else (f"{one.status}: {one.reason}",)
        for text in texts:
            by_text.setdefault(text, []).append(name_of(one))
    return [f"{', '.join(names)}: {text}" for text, names in by_text.items()]


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def badge_svg(boards: Sequence[Board]) -> str:
    """A badge of how much stands behind the board: boards and ranked methods."""
    methods = len({(one.submitter, one.algorithm) for board in boards for one in board.ranked})
    text = f"{len(boards)} board{'s' * (len(boards) != 1)}, {methods} ranked method{'s' * (methods != 1)}"
    left, right = 74, 14 + math.ceil(6.2 * len(text))
    width = left + right
    label = escape_xml(f"metabench: {text}", {'"': "&quot;"})
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="20" role="img" aria-label="{label}">'
        f"<title>{label}</title>"
        f'<clipPath id="r"><rect width="{width}" height="20" rx="3"/></clipPath>'
        f'<g clip-path="url(#r)"><rect width="{left}" height="20" fill="#3d444d"/>'
        f'<rect x="{left}" width="{right}" height="20" fill="#1f5fa8"/></g>'
        '<g fill="#fff" text-anchor="middle" font-family="Verdana,DejaVu Sans,sans-serif" font-size="11">'
        f'<text x="{left / 2:g}" y="14">metabench</text>'
        f'<text x="{left + right / 2:g}" y="14" textLength="{right - 12}">{escape_xml(text)}</text></g></svg>\n'
    )
