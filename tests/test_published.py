from collections import Counter

import pytest

from metabench.report.published import all_published, published


@pytest.mark.parametrize(
    ("algorithm", "ways", "shots", "value"),
    [
        ("protonet", 5, 1, 0.988),
        ("protonet", 20, 5, 0.989),
        ("maml", 5, 1, 0.987),
        ("fomaml", 20, 1, 0.894),
        ("reptile", 5, 1, 0.9539),
        ("matching", 20, 1, 0.938),
        ("metanet", 5, 1, 0.9895),
        ("siamese", 20, 1, 0.88),
        ("anil", 20, 1, 0.962),
        ("relation", 5, 5, 0.998),
        ("maml++", 5, 1, 0.9947),
        ("pixel-nn", 5, 1, 0.417),
    ],
)
def test_the_headline_is_the_papers_own_number(algorithm, ways, shots, value):
    found = published(algorithm, "omniglot", ways, shots)
    assert found is not None
    assert found.value == value
    assert found.verified


def test_numbers_that_could_not_be_verified_say_so():
    for algorithm in ("r2d2", "baseline", "baseline++"):
        assert not published(algorithm, "omniglot", 5, 1).verified
    assert not published("maml", "sinusoid", None, 5, measure="mse").verified


def test_tasks_and_methods_without_a_number():
    assert published("protonet", "omniglot", 7, 1) is None
    assert published("nobody", "omniglot", 5, 1) is None
    assert published("lstm-metalearner", "omniglot", 5, 1) is None


def test_presentations_are_measures_of_their_own():
    values = [published("mann", "omniglot", 5, None, measure=f"accuracy_at_{k}").value for k in (1, 2, 5, 10)]
    assert values == [0.364, 0.828, 0.949, 0.981]


def test_a_paper_that_has_both_modes_of_batch_norm_is_quoted_for_ours():
    assert published("reptile", "omniglot", 5, 1, bn_mode="transductive").value == 0.9768
    assert published("reptile", "omniglot", 5, 1, bn_mode="inductive").value == 0.9539
    # another network of the same table is another method, and an inductive MAML was never published
    assert published("maml", "omniglot", 5, 1, bn_mode="inductive").value == 0.987
    assert published("maml", "omniglot", 5, 1, bn_mode="transductive").value == 0.987


def test_a_random_split_is_a_random_split():
    maml = published("maml", "omniglot", 5, 1)
    assert maml.deviations(split="random1200", queries=1, bn_mode="transductive") == ()
    assert maml.deviations(split="vinyals", queries=1, bn_mode="transductive") == ("random split",)


def test_deviations_name_what_is_known_to_differ_and_nothing_else():
    reptile = published("reptile", "omniglot", 5, 1)
    assert reptile.deviations(split="vinyals", queries=15, bn_mode="transductive") == (
        "random split",
        "inductive",
        "1 query",
    )
    maml = published("maml", "sinusoid", None, 5, measure="mse")
    asked = {"split": "maml", "queries": 100, "bn_mode": "inductive"}
    assert maml.steps == 1
    assert maml.deviations(**asked, steps=10) == ("1 inner step",)
    assert maml.deviations(**asked, steps=1) == maml.deviations(**asked) == ()
    protonet = published("protonet", "omniglot", 5, 1)
    assert (protonet.queries, protonet.deviations(split="vinyals", queries=15, bn_mode="inductive")) == (None, ())


def test_every_row_is_whole():
    rows = all_published()
    assert len(rows) == 356
    for row in rows:
        assert row.source and row.algorithm == row.algorithm.strip().lower()
        assert row.bn_mode in ("", "inductive", "transductive")
        assert row.measure == "mse" or 0 < row.value < 1
        assert row.ci95 is None or 0 < row.ci95 < 0.2
        assert not row.algorithm.startswith('"') and "," not in row.algorithm


def test_one_headline_per_method_and_task():
    def key(row):
        return row.algorithm, row.dataset, row.ways, row.shots, row.within, row.measure

    tasks = Counter(key(r) for r in all_published() if r.headline)
    assert set(tasks.values()) == {1}
    assert {key(r) for r in all_published() if r.measure != "pair_accuracy"} == set(tasks)


def test_kochs_trials_stand_apart_from_20_way_over_all_alphabets():
    koch = published("siamese", "omniglot", 20, 1, within=True)
    assert (koch.value, published("siamese", "omniglot", 20, 1).value) == (0.92, 0.88)
    asked = {"split": "background", "queries": 1, "bn_mode": "inductive"}
    ten = "10 test alphabets"
    assert koch.deviations(**asked, within="drawer", data="size=105") == (ten,)
    assert koch.deviations(**asked, within="alphabet", data="size=105") == ("support and queries by other hands", ten)
    for data in ("", "size=35", "size=1050"):
        assert koch.deviations(**asked, within="drawer", data=data) == (ten, "105x105 images")


def test_a_presentation_in_a_stream_is_no_task_of_few_shots():
    quoted = published("mann", "omniglot", 5, 1)
    assert quoted.value == published("mann", "omniglot", 5, None, measure="accuracy_at_2").value == 0.828
    assert quoted.deviations(split="vinyals", queries=15, bn_mode="inductive") == ("a presentation in streams",)
    at_2 = published("mann", "omniglot", 5, None, measure="accuracy_at_2")
    assert at_2.deviations(split="random1200", queries=None, bn_mode="inductive") == ()


def test_a_number_by_cosine_is_no_number_by_euclidean_distance():
    pixels, asked = published("pixel-nn", "omniglot", 5, 1), {"split": "vinyals", "queries": 15, "bn_mode": "inductive"}
    assert pixels.deviations(**asked, distance="sqeuclidean") == ("cosine",)
    assert pixels.deviations(**asked, distance="cosine") == pixels.deviations(**asked) == ()
    assert published("matching", "omniglot", 5, 1).deviations(**asked, distance="cosine_unnormalised_query") == ()
    assert published("protonet", "omniglot", 5, 1).deviations(**asked, distance="sqeuclidean") == ()


def test_a_classifier_as_chen_et_al_train_it_stands_beside_their_number_where_they_have_one():
    assert [published("baseline", "omniglot", 5, shots).value for shots in (1, 5)] == [0.9489, 0.9912]
    assert [published("baseline", "omniglot", 20, shots).value for shots in (1, 5)] == [0.729, 0.923]
