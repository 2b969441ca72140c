"""What a prediction is worth."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from metabench import scoring
from metabench.episodes import Batch, Episode, Stream
from metabench.scoring import NOT_ASKED, Credit, Stopped, follow_streams, score_episodes

NAN, INF = float("nan"), float("inf")


class Fixed:
    """Episodes whose query inputs are the logits to be given, labels all 0."""

    def __init__(self, logits, ways=None, targets=None):
        self.x = torch.as_tensor(logits, dtype=torch.float32)
        self.y = torch.zeros(self.x.shape[:2], dtype=torch.int64) if targets is None else torch.as_tensor(targets)
        self.ways = self.x.shape[-1] if targets is None else None

    def episodes(self, start, tasks):
        part = slice(start, start + tasks)
        query = Batch(self.x[part], self.y[part], self.ways)
        seeds = torch.arange(start, start + len(query.x))
        ids = tuple(f"e{n}" for n in range(start, start + len(query.x)))
        classes = np.arange(self.ways)[None].repeat(len(query.x), 0) if self.ways else None
        return Episode(query.pick(slice(None)), query, seeds, ids, classes)


def echo(support, *, seeds):
    return lambda x: x


@pytest.mark.parametrize(
    ("logits", "score"),
    [
        ([1.0, 0.0, 0.0], 1.0),
        ([0.0, 1.0, 0.0], 0.0),
        ([1.0, 1.0, 0.0], 1 / 2),
        ([0.0, 0.0, 0.0], 1 / 3),
        ([0.0, 1.0, 1.0], 0.0),
        ([-5.0, -6.0, -7.0], 1.0),
    ],
)
def test_a_tie_among_k_maxima_scores_one_kth(logits, score):
    found = score_episodes(echo, Fixed([[logits]]), 1)
    assert found.scores == [pytest.approx(score)]
    assert found.not_finite == 0


@pytest.mark.parametrize("bad", [[NAN, 0.0, 0.0], [1.0, NAN, 0.0], [INF, 0.0, 0.0], [1.0, 0.0, -INF], [NAN] * 3])
def test_logits_that_are_not_finite_are_wrong_and_counted(bad):
    found = score_episodes(echo, Fixed([[bad, [1.0, 0.0, 0.0]]]), 1)
    assert found.scores == [0.5]
    assert found.not_finite == 1


def test_regression_is_the_mean_squared_error_and_an_overflow_stays_a_number():
    found = score_episodes(echo, Fixed([[[1.0], [3.0]], [[NAN], [1.0]]], targets=[[[0.0], [0.0]]] * 2), 2)
    assert found.scores == [5.0, 0.0]
    assert (found.not_finite, found.credit) == (1, None)
    huge = score_episodes(echo, Fixed([[[3e38]]], targets=[[[-3e38]]]), 1)
    assert huge.not_finite == 0 and huge.scores[0] > 1e77  # finite in float64: an enormous error, never a perfect one


@settings(max_examples=30, deadline=None)
@given(count=st.integers(1, 23), at_once=st.integers(1, 60), seed=st.integers(0, 99))
def test_a_score_does_not_depend_on_how_many_episodes_share_a_call(count, at_once, seed):
    test = Fixed(torch.randn(23, 4, 3, generator=torch.Generator().manual_seed(seed)).round(decimals=1))
    whole = score_episodes(echo, test, count)
    before = scoring.IMAGES_PER_CALL
    scoring.IMAGES_PER_CALL = at_once
    try:
        parts = score_episodes(echo, test, count)
    finally:
        scoring.IMAGES_PER_CALL = before
    assert parts.scores == whole.scores
    assert parts.ids == whole.ids
    assert parts.episodes_hash == whole.episodes_hash
    assert len(parts.scores) == count
    for name in ("predicted", "ties", "labels", "classes"):
        assert np.array_equal(getattr(parts.credit, name), getattr(whole.credit, name))


def test_the_hash_names_the_episodes():
    test = Fixed(torch.zeros(5, 1, 2))
    assert score_episodes(echo, test, 4).episodes_hash != score_episodes(echo, test, 5).episodes_hash
    assert score_episodes(echo, test, 5).episodes_hash == score_episodes(echo, test, 5).episodes_hash


def test_credit_is_kept_whole_and_gives_the_scores_again(tmp_path):
    test = Fixed(torch.randn(6, 5, 3, generator=torch.Generator().manual_seed(0)))
    found = score_episodes(echo, test, 6)
    with np.load(tmp_path / found.credit.save(tmp_path, "name")) as kept:
        again = Credit(**{name: kept[name] for name in kept.files})
    assert np.where(again.ties > 0, 1 / np.maximum(again.ties, 1), 0).mean(1) == pytest.approx(found.scores)
    assert [file.name for file in tmp_path.iterdir()] == ["name.npz"]


def test_credit_is_kept_in_the_order_of_the_labels_a_byte_a_query(tmp_path):
    labels = np.array([[2, 0, 1, 0, NOT_ASKED], [0, 1, 2, 0, 1]], dtype=np.uint16)
    predicted, ties = np.array([[2, 1, 1, 0, 0], [0, 1, 2, 0, 2]]), np.array([[1, 0, 1, 1, 0], [1, 1, 1, 3, 0]])
    with np.load(tmp_path / Credit(predicted, ties, labels, np.zeros((2, 3))).save(tmp_path, "name")) as kept:
        assert kept["labels"].tolist() == [[0, 0, 1, 2, NOT_ASKED], [0, 0, 1, 1, 2]]
        assert kept["predicted"].tolist() == [[1, 0, 1, 2, 0], [0, 0, 1, 2, 2]]  # equal labels as they came
        assert kept["ties"].tolist() == [[0, 1, 1, 1, 0], [1, 3, 1, 0, 1]]
        assert kept["predicted"].itemsize == kept["ties"].itemsize == 1


def test_a_stop_is_heard_between_the_calls(monkeypatch):
    monkeypatch.setattr(scoring, "IMAGES_PER_CALL", 2)
    asked = SimpleNamespace(times=0)

    def stopping():
        asked.times += 1
        return asked.times > 3

    with pytest.raises(Stopped):
        score_episodes(echo, Fixed(torch.zeros(9, 1, 2)), 9, stopping=stopping)
    assert asked.times == 4


def test_scoring_builds_no_graph():
    weight = torch.ones((), requires_grad=True)
    seen = []
    score_episodes(lambda s, seeds: lambda x: seen.append((x * weight).requires_grad) or x, Fixed([[[1.0, 0.0]]]), 1)
    assert seen == [False]


class Streams:
    """Two streams of known labels; the logits to be given are the images."""

    def __init__(self, logits, y):
        self.x, self.y = torch.as_tensor(logits), torch.as_tensor(y)

    def streams(self, start, tasks, length):
        part = slice(start, start + tasks)
        ids = tuple(f"s{n}" for n in range(start, start + len(self.y[part])))
        return Stream(self.x[part, :length], self.y[part, :length], 2, torch.zeros(tasks, dtype=torch.int64), ids)


def test_accuracy_by_presentation(monkeypatch):
    y = [[0, 0, 1, 0, 1], [1, 1, 1, 1, 0]]
    answers = [[1, 0, 1, 0, 0], [1, 0, 1, 1, 0]]
    logits = torch.nn.functional.one_hot(torch.tensor(answers), 2).float()
    logits[1, 3] = 1.0  # a tie scores a half
    for at_once in (3000, 5):
        monkeypatch.setattr(scoring, "IMAGES_PER_CALL", at_once)
        found = follow_streams(lambda stream: stream.x, Streams(logits, y), 2, 5)
        assert found.at(1).scores == [0.5, 1.0]
        assert found.at(2).scores == [0.5, 0.0]
        assert found.at(3).scores == [1.0, 1.0]
        assert found.ids == found.at(1).ids == ["s0", "s1"] and found.at(1).episodes_hash == found.at(2).episodes_hash
        assert found.everywhere().scores == pytest.approx([3 / 5, 3.5 / 5])
        second = found.at(2).credit
        asked = second.labels != NOT_ASKED
        assert asked.tolist() == [[False, True, False, False, True], [False, True, False, False, False]]
        assert (second.scores() * asked).sum(1).tolist() == [1.0, 0.0] and not second.ties[~asked].any()
        assert second.labels[asked].tolist() == [0, 1, 1] and second.predicted[asked].tolist() == [0, 0, 0]
        assert found.everywhere().credit.labels.tolist() == y
    logits[0, 0, 0] = NAN
    assert follow_streams(lambda stream: stream.x, Streams(logits, y), 2, 5).at(2).not_finite == 1
    with pytest.raises(Stopped):
        follow_streams(lambda stream: stream.x, Streams(logits, y), 2, 5, stopping=lambda: True)
