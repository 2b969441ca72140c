"""Copies: a training that is handed in once more under another name is shown, and not ranked beside the first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from metabench.leaderboard.collect import Score
from metabench.leaderboard.source import LOCAL, is_control, plain


def marked(scores: Sequence[Score]) -> list[Score]:
    """The scores, each that repeats an earlier one under another name with the reason in `copied`.

    Earlier is what states the earlier time. It has the same scores on the same episodes, and another submitter or
    algorithm; or the same weights, and another submitter. Two algorithms of one submitter may share weights: methods
    that learn alike and adapt in other ways have the same training.
    """
    weights: dict[str, Score] = {}
    answers: dict[tuple[Any, ...], Score] = {}
    reasons: dict[int, str] = {}
    for score in sorted(scores, key=lambda one: (one.at, one.source.submitter != LOCAL, one.source.submitter)):
        if score.scores is None or not score.coordinates["train_spec"] or is_control(_algorithm(score)):
            continue
        if score.weights and _who(first := weights.setdefault(score.weights, score)) != _who(score):
            reasons[id(score)] = _reason("weights", first)
        # a first presentation knows no label: two trainings may well answer alike
        told = score.telling if score.measure != "accuracy_at_1" else ""
        key = (score.measure, score.episodes_hash, len(score.scores), told) if told else None
        if key and _name(first := answers.setdefault(key, score)) != _name(score):
            reasons.setdefault(id(score), _reason("score on every episode", first))
    return [replace(one, copied=reasons[id(one)]) if id(one) in reasons else one for one in scores]


def _algorithm(score: Score) -> str:
    return str(score.coordinates["algorithm"])


def _who(score: Score) -> str:
    return score.source.submitter


def _name(score: Score) -> tuple[str, str]:
    return _who(score), _algorithm(score)


def _reason(what: str, first: Score) -> str:
    by = f" by {_who(first)}" if _who(first) else ""
    name = plain(_algorithm(first), 80)
    return f"the same {what} as {name}{by} (run {first.source.name}), which is earlier: not ranked"
