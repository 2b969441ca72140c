"""The fair ranking's settings are those that the committed trials chose, and nothing else differs from the papers'."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

import pytest

from metabench.store import Run
from metabench.suite import load_suite

ROOT = Path(__file__).parent.parent
TRIALS = sorted((ROOT / "results/reference/omniglot-trials").glob("*/manifest.json"))


@pytest.fixture
def chosen(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    import tuned_settings

    yield tuned_settings.chosen(Run.open(TRIALS[-1].parent))
    sys.modules.pop("tuned_settings")


def test_the_fair_suite_has_the_settings_that_won_on_validation_classes(chosen):
    cells = [cell for cell in load_suite("omniglot-fair").cells() if cell.algorithm in chosen]
    assert {cell.algorithm for cell in cells} == {*chosen}
    for cell in cells:
        assert (cell.params, cell.norm) == (chosen[cell.algorithm].params, chosen[cell.algorithm].norm), cell.id


def test_tuned_and_paper_settings_differ_in_their_settings_alone():
    def rest(name):
        return [replace(c, params=(), resolved=(), norm="") for c in load_suite(name).cells()]

    assert rest("omniglot-fair") == rest("omniglot-fair-paper")


def test_the_trials_are_as_many_for_every_method_begin_with_its_own_settings_and_never_see_a_test_class():
    trials, papers = load_suite("omniglot-trials"), load_suite("omniglot-fair-paper")
    assert {measure for wanted in trials.resolved()["cells"].values() for measure in wanted} == {"val_accuracy"}
    own = {cell.algorithm: (cell.params, cell.norm) for cell in papers.cells()}
    mine = {}
    for cell in trials.cells():
        mine.setdefault(cell.algorithm, []).append((cell.params, cell.norm))
        assert cell.seed not in {c.seed for c in papers.cells()}
    assert {name: len({*settings}) for name, settings in mine.items()} == dict.fromkeys(mine, 4)
    assert {name: settings[0] for name, settings in mine.items()} == {name: own[name] for name in mine}


def test_the_papers_suite_trains_as_the_papers_do():
    """60-way 1-shot (Snell et al. 2017); batches of 16 for what is five epochs of Chen et al. 2019."""
    trained = {}
    for cell in load_suite("omniglot-papers").cells():
        trained.setdefault(cell.algorithm, []).append(cell.train)
    assert {(train.ways, train.shots, train.tasks) for train in trained["protonet"]} == {(60, 1, 1)}
    for name in ("baseline", "baseline++", "linear-probe"):
        assert {(train.batch, train.steps) for train in trained[name]} == {(16, 25700)}, name
