from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from metabench import suite as suite_module
from metabench.catalogue import Catalogue, catalogue
from metabench.cells import Cell, Task, TrainSpec, explicit, make_cell, matches, merge_training, parse_id, unsupported
from metabench.errors import ConfigError
from metabench.suite import Suite, load_suite, schema, shipped_suites

PLUGINS = {
    "proto": (
        {"family": "metric", "feeds": "episodes", "problems": ["classification"], "train": {"tasks": 2}},
        'problem, *, norm: Literal["running", "batch"] = "running", lr: float = 1e-3, note: str = "", '
        "k: int | None = 3",
    ),
    "grad": (
        {"family": "gradient", "feeds": "episodes", "problems": ["classification", "regression"]},
        'problem, *, norm: Literal["support", "batch"] = "support", inner_steps: int = 1, second: bool = True',
    ),
    "plain": (
        {"family": "transfer", "feeds": "images", "problems": ["classification"], "train": {"images": 640}},
        "problem, *, lr: float = 0.1",
    ),
    "guess": (
        {"family": "control", "feeds": None, "problems": ["classification", "regression"], "control": True},
        "problem",
    ),
    "recall": (
        {"family": "model", "feeds": "episodes", "problems": ["classification", "stream"], "train": {"tasks": 16}},
        "problem",
    ),
    "truth": ({"family": "control", "feeds": None, "problems": ["regression"], "control": True}, "problem"),
}
DATASETS = {
    "dots": (
        {
            "problem": "classification",
            "images_per_class": 20,
            "splits": {"big": {"train": 10, "val": 5, "test": 6}, "small": {"train": 5, "val": 2, "test": 5}},
            "within": ["alphabet"],
        },
        '*, split: str = "big", size: int = 28, tag: str = ""',
    ),
    "waves": ({"problem": "regression", "splits": {"plain": {}}}, '*, split: str = "plain"'),
}


def lay_out(folder: Path) -> list[Path]:
    """Write the algorithms and data sets of these tests; none of them can be imported."""
    files = []
    for kind, plugins in (("algorithm", PLUGINS), ("dataset", DATASETS)):
        for name, (meta, signature) in plugins.items():
            text = f'"""{name.title()}."""\nimport no_such_module\n'
            text += f"METABENCH = { {'kind': kind, 'name': name, **meta} }\n"
            file = folder / f"{name}.py"
            file.write_text(f"{text}def build({signature}): pass\n")
            files.append(file)
    return files


@pytest.fixture(scope="module")
def plugins(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return lay_out(tmp_path_factory.mktemp("plugins"))


@pytest.fixture(scope="module")
def known(plugins: list[Path]) -> Catalogue:
    """The test plug-ins only, so that controls and hints do not depend on what is built in."""
    everything = catalogue(plugins)
    return Catalogue(
        algorithms={name: everything.algorithm(name) for name in PLUGINS},
        datasets={name: everything.dataset(name) for name in DATASETS},
    )


@pytest.fixture(autouse=True)
def only_test_plugins(known: Catalogue, monkeypatch: pytest.MonkeyPatch) -> None:
    """Suites that name no plug-in see the test plug-ins; the others read their files in earnest."""
    monkeypatch.setattr(suite_module, "catalogue", lambda files=(): catalogue(files) if files else known)


def load(folder: Path, text: str | Mapping[str, Any], name: str = "mine.yaml") -> Suite:
    file = folder / name
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(dict(text), sort_keys=False), encoding="utf-8")
    return load_suite(file)


def ids(suite: Suite) -> list[str]:
    return [cell.id for cell in suite.cells()]


def problems(folder: Path, text: str | Mapping[str, Any]) -> list[str]:
    """The mistakes of a suite, as 'line: message'."""
    with pytest.raises(ConfigError) as caught:
        load(folder, text)
    start = f"{folder / 'mine.yaml'}:"
    lines = str(caught.value).splitlines()
    assert all(line.startswith(start) for line in lines), lines
    return [line.removeprefix(start) for line in lines]


GOOD = """\
suite: good
description: one line
grid:
  tasks:
    - {dataset: dots, ways: 5, shots: [1, 5], queries: 15}
    - {dataset: "dots[small]", ways: 5, shots: 1, queries: 15, rotations: classes, params: {size: 105}}
    - {dataset: waves, shots: 10, queries: 100}
  algorithms:
    - proto
    - name: grad
      params: {inner_steps: [1, 5], norm: batch}
      train: {ways: 5, shots: 1, queries: 1, tasks: 8, steps: 3000}
  seeds: [0, 7]
cells:
  - {task: {dataset: dots, ways: 5, shots: 1, queries: 15}, algorithm: proto, seed: 7}
  - {task: {dataset: dots, ways: 2, shots: 1, queries: 1}, algorithm: plain, device: cuda, precision: bf16, seed: 1}
train: {episodes: 601}
evaluation: {episodes: 200, seed: 3, selection: val}
measures: [accuracy, mse, adapt_time, train_time]
reference: proto
threads: 2
"""


def test_a_suite_expands_to_its_cells(tmp_path: Path, known: Catalogue) -> None:
    text = GOOD.replace("algorithm: plain", "algorithm: {name: plain, train: {steps: 9}}")
    suite = load(tmp_path, text)
    found = ids(suite)
    assert len(set(found)) == len(found)
    grid, explicit_cells, controls = found[:24], found[24:25], found[25:]
    assert grid[0] == "proto[train=5w1s15qx2*301]/dots[big]/5w1s15q/running/cpu-float32/seed0"
    assert grid[1] == "proto[train=5w1s15qx2*301]/dots[big]/5w1s15q/running/cpu-float32/seed7"
    assert grid[2] == "grad[train=5w1s1qx8*3000]/dots[big]/5w1s15q/batch/cpu-float32/seed0"
    assert grid[4] == "grad[inner_steps=5,train=5w1s1qx8*3000]/dots[big]/5w1s15q/batch/cpu-float32/seed0"
    assert "proto[train=5w5s15qx2*301]/dots[big]/5w5s15q/running/cpu-float32/seed0" in grid
    assert "proto[train=5w1s15qx2*301]/dots[small,rotations=classes,size=105]/5w1s15q/running/cpu-float32/seed0" in grid
    assert "proto/waves[plain]/10s100q/running/cpu-float32/seed0" in grid, "a problem it cannot do is still a cell"
    assert "grad[inner_steps=5,train=1s1qx8*3000]/waves[plain]/10s100q/batch/cpu-float32/seed7" in grid
    assert explicit_cells == ["plain[train=64i*9]/dots[big]/2w1s1q/none/cuda-bf16/seed1"]
    assert len(controls) == 4 * 2 + 1 + 2  # guess everywhere, truth on waves
    assert controls[0] == "guess/dots[big]/5w1s15q/none/cpu-float32/seed0"
    assert "truth/waves[plain]/10s100q/none/cpu-float32/seed7" in controls
    assert "guess/dots[big]/2w1s1q/none/cuda-bf16/seed1" in controls
    assert (suite.name, suite.description, suite.threads, suite.reference) == ("good", "one line", 2, "proto")
    assert (suite.evaluation.episodes, suite.evaluation.seed, suite.evaluation.selection) == (200, 3, "val")


def test_what_a_suite_means_is_plain_data(tmp_path: Path) -> None:
    suite = load(tmp_path, GOOD.replace("algorithm: plain", "algorithm: {name: plain, train: {steps: 9}}"))
    plain = suite.resolved()
    assert json.loads(json.dumps(plain)) == plain
    assert list(plain["cells"]) == ids(suite) and plain["evaluation"] == {
        "episodes": 200,
        "seed": 3,
        "selection": "val",
    }


def test_defaults(tmp_path: Path) -> None:
    cell = {"task": {"dataset": "dots", "ways": 5, "shots": 1, "queries": 15}, "algorithm": "guess"}
    suite = load(tmp_path, {"cells": [cell]}, "small-one.yaml")
    assert suite.name == "small-one" and suite.path == (tmp_path / "small-one.yaml").resolve()
    assert (suite.evaluation.episodes, suite.evaluation.selection) == (1000, "last")
    assert list(suite.points.values()) == [("accuracy", "adapt_time")]
    assert (suite.timing.processes, suite.timing.slices) == (5, 12)
    assert (suite.threads, suite.reference, suite.plugins) == (None, None, ())
    assert ids(suite) == ["guess/dots[big]/5w1s15q/none/cpu-float32/seed0"]


def test_plugins_are_found_beside_the_suite(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    lay_out(tmp_path / "more")
    text = f"plugins: [./more/proto.py, more/dots.py]\ncontrols: false\n{small()}"
    suite = load(tmp_path, text)
    assert suite.plugins == tuple((tmp_path / "more" / name).resolve() for name in ("proto.py", "dots.py"))
    assert suite.catalogue.algorithm("proto").file == suite.plugins[0]
    assert suite.resolved()["plugins"] == ["proto.py", "dots.py"]


def test_plugins_of_the_call_come_last(tmp_path: Path, plugins: list[Path]) -> None:
    (tmp_path / "mine.yaml").write_text(small())
    suite = load_suite(tmp_path / "mine.yaml", plugins=plugins)
    assert suite.plugins == tuple(file.resolve() for file in plugins)


def small(algorithm: str = "proto", task: str = "{dataset: dots, ways: 5, shots: 1, queries: 15}") -> str:
    """A suite of one task (line 3) and one algorithm (line 5), with a budget in line 6."""
    return f"grid:\n  tasks:\n    - {task}\n  algorithms:\n    - {algorithm}\ntrain: {{steps: 3}}\n"


@pytest.mark.parametrize(
    ("algorithm", "train", "expected"),
    [
        ("proto", "{steps: 3}", "5w1s15qx2*3"),
        ("proto", "{images: 321}", "5w1s15qx2*3"),  # 2 tasks of 5 * 16 images are 160 a step
        ("proto", "{episodes: 5, tasks: 1}", "5w1s15q*5"),
        ("proto", "{seconds: 7.5, queries: 2}", "5w1s2qx2*7.5s"),
        ("proto", "{seconds: 75}", "5w1s15qx2*75s"),
        ("proto", "{steps: 1, shots: 15}", "5w15s5qx2*1"),  # as many queries as a class of 20 leaves
        ("{name: proto, train: {seconds: 2}}", "{steps: 3, ways: 4}", "4w1s15qx2*2s"),
        ("plain", "{tasks: 4, ways: 2}", "64i*10"),
        ("plain", "{batch: 100}", "100i*7"),
        ("plain", "{steps: 2}", "64i*2"),
        ("{name: plain, train: {batch: 8, images: 9}}", "{steps: 2}", "8i*2"),
    ],
)
def test_training_is_merged_and_its_budget_resolved(tmp_path: Path, algorithm: str, train: str, expected: str) -> None:
    suite = load(tmp_path, small(algorithm).replace("{steps: 3}", train))
    cell = suite.cells()[0]
    assert cell.train is not None and cell.train.text == expected


def test_training_of_regression(tmp_path: Path) -> None:
    task = "{dataset: waves, shots: 10, queries: 100}"
    suite = load(tmp_path, small("grad", task).replace("{steps: 3}", "{images: 1000, queries: 10, tasks: 4, ways: 5}"))
    assert suite.cells()[0].id == "grad[train=10s10qx4*13]/waves[plain]/10s100q/support/cpu-float32/seed0"


def test_a_budget_replaces_a_weaker_one_of_any_kind() -> None:
    assert merge_training([{"images": 9, "batch": 3}, {"steps": 2}, {"seconds": 1.0}]) == {"batch": 3, "seconds": 1.0}


def test_seeds_devices_and_precisions_are_axes(tmp_path: Path) -> None:
    text = small("guess").replace("train", "  devices: [cpu, cuda]\n  precisions: [float32, bf16]\n  seeds: [3]\ntrain")
    where = [cell.id.partition("none/")[2] for cell in load(tmp_path, text).cells()]
    assert where == ["cpu-float32/seed3", "cpu-bf16/seed3", "cuda-float32/seed3", "cuda-bf16/seed3"]


def test_a_number_may_be_written_without_a_point(tmp_path: Path) -> None:
    suite = load(tmp_path, small("{name: proto, params: {lr: [1e-4, 2, 1.0e-3]}}"))
    assert [dict(cell.params).get("lr") for cell in suite.cells()][:3] == [1e-4, 2.0, None]


def test_controls_can_be_switched_off_or_named(tmp_path: Path) -> None:
    assert len(load(tmp_path, small()).cells()) == 2
    assert len(load(tmp_path, small() + "controls: false\n").cells()) == 1
    assert len(load(tmp_path, small("guess")).cells()) == 1


def test_measures_fit_the_problem_and_the_training(tmp_path: Path) -> None:
    wanted = ("train_time", "accuracy", "mse", "mse_before", "adapt_time")
    proto, guess = load(tmp_path, small()).cells()
    assert proto.measures(wanted) == ("train_time", "accuracy", "adapt_time")
    assert guess.measures(wanted) == ("accuracy", "adapt_time")
    waves = load(tmp_path, small("grad", "{dataset: waves, shots: 1, queries: 1}")).cells()[0]
    assert waves.measures(wanted) == ("train_time", "mse", "mse_before", "adapt_time")


def test_unsupported_says_why(tmp_path: Path, known: Catalogue) -> None:
    waves = load(tmp_path, small("proto", "{dataset: waves, shots: 1, queries: 1}")).cells()[0]
    assert unsupported(waves, known) == "proto does classification, not regression"
    assert unsupported(load(tmp_path, small()).cells()[0], known) is None


def test_bn_mode_follows_from_the_norm(tmp_path: Path) -> None:
    running, batch, _ = load(tmp_path, small("{name: proto, params: {norm: [running, batch]}}")).cells()
    assert (running.norm, running.bn_mode, running.params) == ("running", "inductive", ())
    assert (batch.norm, batch.bn_mode, batch.params) == ("batch", "transductive", (("norm", "batch"),))
    assert dict(batch.resolved) == {"norm": "batch", "lr": 0.001, "note": "", "k": 3}


def test_cells_that_differ_only_in_the_test_share_a_training(tmp_path: Path) -> None:
    task = "{dataset: dots, ways: [2, 5], shots: [1, 5], queries: 15}"
    text = small(task=task) + "controls: false\n"
    stated = load(tmp_path, text.replace("{steps: 3}", "{steps: 3, ways: 5, shots: 1, queries: 5}")).cells()
    expected = 'proto[k=3,lr=0.001,norm=running,note="",train=5w1s5qx2*3]/dots[big]/cpu-float32/seed0'
    assert len(stated) == 4 and {cell.training_id for cell in stated} == {expected}
    assert len({cell.training_id for cell in load(tmp_path, text).cells()}) == 4


TRAINED_APART = {
    "seed": "seed: 1",
    "precision": "precision: bf16",
    "device": "device: cuda",
    "norm": "algorithm: {name: proto, params: {norm: batch}}",
    "parameter": "algorithm: {name: proto, params: {lr: 1}}",
    "steps": "algorithm: {name: proto, train: {steps: 4}}",
    "split": 'task: {dataset: "dots[small]", ways: 5, shots: 1, queries: 15}',
    "size": "task: {dataset: dots, ways: 5, shots: 1, queries: 15, params: {size: 9}}",
    "rotations": "task: {dataset: dots, ways: 5, shots: 1, queries: 15, rotations: episode}",
}


@pytest.mark.parametrize("what", TRAINED_APART)
def test_what_changes_the_training_changes_its_id(tmp_path: Path, what: str) -> None:
    same = {"task": "task: {dataset: dots, ways: 5, shots: 1, queries: 15}", "algorithm": "algorithm: proto"}
    changed = same | {TRAINED_APART[what].partition(":")[0]: TRAINED_APART[what]}
    rows = "".join(f"  - {{{', '.join(cell.values())}}}\n" for cell in (same, changed))
    text = f"controls: false\ntrain: {{steps: 3}}\ncells:\n{rows}"
    one, other = load(tmp_path, text).cells()
    assert one.training_id != other.training_id and one.id != other.id


# --- ids ---------------------------------------------------------------------------------------------------------

texts = st.text(max_size=6) | st.sampled_from(
    ["a,b", "x]", "[", "a=b", "a/b", "true", "null", "1", "1e3", " ", "\n", "a.b"]
)
counts = st.integers(1, 30)
budgets = st.one_of(
    st.builds(lambda steps: {"steps": steps}, st.integers(1, 10**12)),
    st.builds(lambda seconds: {"seconds": seconds}, st.floats(min_value=0, exclude_min=True, allow_infinity=False)),
)
trainings = st.none() | st.one_of(
    st.builds(lambda batch, budget: TrainSpec(batch=batch, **budget), counts, budgets),
    st.builds(
        lambda ways, shots, queries, tasks, within, budget: TrainSpec(
            ways=ways, shots=shots, queries=queries, tasks=tasks, within=within, **budget
        ),
        st.none() | counts,
        counts,
        counts,
        counts,
        st.sampled_from(["none", "alphabet", "drawer"]),
        budgets,
    ),
    st.builds(
        lambda ways, stream, tasks, budget: TrainSpec(ways=ways, stream=stream, tasks=tasks, **budget),
        counts,
        counts,
        counts,
        budgets,
    ),
)
proto_params = st.fixed_dictionaries(
    {},
    optional={
        "norm": st.sampled_from(["running", "batch"]),
        "lr": st.floats(allow_nan=False, allow_infinity=False) | st.integers(-5, 5),
        "note": texts,
        "k": st.none() | st.integers(-(2**63), 2**63),
    },
)


@st.composite
def cells(draw: st.DrawFn, known: Catalogue) -> Cell:
    dataset = known.dataset(draw(st.sampled_from(["dots", "waves"])))
    classes = dataset.name == "dots"
    extra = st.fixed_dictionaries({}, optional={"size": counts, "tag": texts}) if classes else st.just({})
    stream = draw(st.none() | counts) if classes else None
    task = Task(
        dataset=dataset,
        split=draw(st.sampled_from(list(dataset.meta["splits"]))),
        params=explicit(dataset, draw(extra)),
        rotations=draw(st.sampled_from(["none", "classes", "per_class", "train_only", "episode"]))
        if classes
        else "none",
        within=draw(st.sampled_from(["none", "alphabet"])) if classes else "none",
        ways=draw(counts) if classes else None,
        shots=0 if stream else draw(counts),
        queries=0 if stream else draw(counts),
        stream=stream,
    )
    return make_cell(
        known.algorithm("proto"),
        task,
        params=draw(proto_params),
        train=draw(trainings),
        device=draw(st.sampled_from(["cpu", "cuda"])),
        precision=draw(st.sampled_from(["float32", "bf16"])),
        seed=draw(st.integers(0, 2**63)),
    )


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_an_id_reads_back_as_its_cell(known: Catalogue, data: st.DataObject) -> None:
    cell = data.draw(cells(known))
    again = parse_id(cell.id, known)
    assert again == cell and again.id == cell.id
    assert again.resolved == cell.resolved and again.training_id == cell.training_id
    assert re.fullmatch(r"[!-~]+", cell.id) and cell.id.count("/") == 5
    assert all(text.count("[") == text.count("]") <= 1 for text in cell.id.split("/"))


@settings(max_examples=300, deadline=None)
@given(data=st.data())
def test_unequal_cells_have_unequal_ids(known: Catalogue, data: st.DataObject) -> None:
    one, other = data.draw(cells(known)), data.draw(cells(known))
    assert (one == other) == (one.id == other.id)


def test_values_of_unlike_type_have_unlike_ids(known: Catalogue) -> None:
    task = Task(dataset=known.dataset("dots"), split="big", ways=5, shots=1, queries=15)
    notes = ["1", "1.0", "true", "null", "", "a b", "a\\u0020b", '"', "\\", "é", "a/b", "x,k=4"]
    found = {make_cell(known.algorithm("proto"), task, params={"note": note}, train=None).id for note in notes}
    assert len(found) == len(notes)
    assert 'proto[note="1"]/dots[big]/5w1s15q/running/cpu-float32/seed0' in found
    assert 'proto[note="a\\u002fb"]/dots[big]/5w1s15q/running/cpu-float32/seed0' in found


PROTO = "proto/dots[big]/5w1s15q/running/cpu-float32/seed0"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "proto",
        PROTO + "/accuracy",
        PROTO.replace("proto", "prato"),
        PROTO.replace("dots", "dot"),
        PROTO.replace("big", "huge"),
        PROTO.replace("[big]", ""),
        PROTO.replace("[big]", "[big,split=small]"),
        PROTO.replace("[big]", "[big,size=28]"),  # the default is never written out
        PROTO.replace("[big]", "[big,rotations=none]"),
        PROTO.replace("[big]", "[big,rotations=some]"),
        PROTO.replace("[big]", "[big,within=none]"),
        PROTO.replace("[big]", "[big,within=drawer]"),
        PROTO.replace("5w", ""),
        PROTO.replace("5w", "05w"),
        PROTO.replace("5w1s15q", "50t"),
        PROTO.replace("5w1s15q", "5w1s50t"),
        PROTO.replace("5w1s15q", "5w050t"),
        "grad/waves[plain]/5w50t/support/cpu-float32/seed0",
        PROTO.replace("5w", "\u0665w"),  # an Arabic five
        PROTO.replace("running", "none"),
        PROTO.replace("running", '"running"'),
        PROTO.replace("cpu", "tpu"),
        PROTO.replace("seed0", "seed00"),
        PROTO.replace("proto", "proto[]"),
        PROTO.replace("proto", "proto[lr=0.001]"),
        PROTO.replace("proto", "proto[lr=1]"),  # a float reads 1.0
        PROTO.replace("proto", "proto[lr=high]"),
        PROTO.replace("proto", "proto[lr=NaN]"),
        PROTO.replace("proto", "proto[lr=2.0,k=1]"),  # not sorted
        PROTO.replace("proto", "proto[k=1,k=1]"),
        PROTO.replace("proto", "proto[k]"),
        PROTO.replace("proto", "proto[k=1"),
        PROTO.replace("proto", "proto[lr=" + "9" * 400 + "]"),
        PROTO.replace("proto", "proto[k=" + "9" * 5000 + "]"),
        PROTO.replace("proto", "proto[train=5w1s1q]"),
        PROTO.replace("proto", "proto[train=5w1s1qx1*3]"),
        PROTO.replace("proto", "proto[train=5w1s1q*nans]"),
        PROTO.replace("proto", "proto[train=5w1s1q*1e999s]"),
        PROTO.replace("proto", "proto[train=5w1s1q*0s]"),
    ],
)
def test_what_is_no_id_in_canonical_form_is_refused(known: Catalogue, text: str) -> None:
    assert parse_id(PROTO, known).id == PROTO
    with pytest.raises(ConfigError):
        parse_id(text, known)


def test_a_filter_wants_all_its_words() -> None:
    key = "maml[inner_steps=5]/omniglot[vinyals]/5w1s15q/support/cpu-float32/seed0/accuracy"
    assert matches(key, "maml omniglot accuracy") and matches(key, "") and matches(key, "  5w1s ")
    assert not matches(key, "maml 20w") and not matches(key, "MAML")


# --- mistakes ----------------------------------------------------------------------------------------------------


def test_all_mistakes_are_reported_at_once_with_their_lines(tmp_path: Path) -> None:
    text = """\
suite: bad
gird: {}
grid:
  tasks:
    - {dataset: dot, ways: 5, shots: 1, queries: 15}
    - {dataset: "dots[bog]", ways: 5, shots: 1, queries: 15}
    - dataset: dots
      ways: [5, 7]
      shots: 1
      queries: 20
      params: {sizes: 3}
    - {dataset: dots, ways: 1, shots: 0, queries: 15}
    - {dataset: dots, shots: 1, queries: 15}
    - {dataset: waves, ways: 5, shots: 1, queries: 15}
    - {dataset: dots, ways: 5, shots: 1, queries: 15}
  algorithms:
    - prato
    - {name: grad, params: {inner_steps: [1, x], second: 1}, train: {ways: 11, stesp: 4, shots: 19, queries: 2}}
    - {params: {}}
  devices: [gpu]
  seeds: [0, 0]
  seeds: [1]
evaluation: {episodes: 0, selection: best}
measures: [acuracy]
train: {steps: 300, seconds: 3}
reference: protto
threads: two
"""
    assert problems(tmp_path, text) == [
        "2: unknown key 'gird' (did you mean 'grid'?)",
        "5: unknown data set 'dot' (did you mean 'dots'?)",
        "6: dots has no split 'bog' (did you mean 'big'?)",
        "8: 7 ways are more than the 6 test classes of dots[big]",
        "10: 1 shots + 20 queries are 21: a class of dots[big] has 20 images",
        "11: dots has no parameter 'sizes' (did you mean 'size'?)",
        "12: grid.tasks.shots must be at least 1, not 0",
        "12: grid.tasks.ways must be at least 2, not 1",
        "13: ways is missing: tasks of dots[big] have classes",
        "14: waves[plain] is regression: its tasks have no ways",
        "17: unknown algorithm 'prato' (did you mean 'proto'?)",
        "18: grad: 11 training ways are more than the 10 training classes of dots[big]",
        "18: grad: 19 shots + 2 queries in training are 21: a class of dots[big] has 20 images",
        "18: grad: inner_steps must be int, not 'x'",
        "18: grad: second must be bool, not 1",
        "18: unknown key 'stesp' (did you mean 'steps'?)",
        "19: grid.algorithms.name is missing: add it",
        "20: grid.devices must be 'cpu' or 'cuda', not 'gpu' (did you mean 'cpu'?)",
        "21: grid.seeds: 0 is listed twice",
        "22: 'seeds' is given twice, first on line 21",
        "23: evaluation.episodes must be at least 1, not 0",
        "23: evaluation.selection must be 'last' or 'val', not 'best'",
        "24: measures: 'acuracy' is no measure (did you mean 'accuracy'?)",
        "25: train: 2 budgets: keep one of steps, seconds",
        "26: reference 'protto' is no algorithm of the suite (did you mean 'proto'?)",
        "27: threads must be a whole number, not 'two'",
    ]


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ("train: {steps: 3}", "", "5: proto: no training budget: give it one, such as train: {steps: 1000}"),
        ("train: {steps: 3}", "train: {ways: 5}", "5: proto: no training budget"),
        ("{steps: 3}", "{steps: 3, ways: 11}", "6: proto: 11 training ways are more than the 10 training classes"),
        ("{steps: 3}", "{steps: 3, queries: 20}", "6: proto: 1 shots + 20 queries in training are 21"),
        ("{steps: 3}", "{steps: 3, shots: 20}", "6: proto: 20 shots + 1 queries in training are 21"),
        ("{steps: 3}", "{steps: 3, within: drawer}", "6: proto: dots has no tasks within one drawer"),
        ("{steps: 3}", "{steps: 3, within: script}", "6: train.within must be 'none', 'alphabet' or 'drawer'"),
        ("{steps: 3}", "{steps: 3.5}", "6: train.steps must be a whole number, not 3.5"),
        ("{steps: 3}", "{steps: true}", "6: train.steps must be a whole number, not True"),
        ("{steps: 3}", "{steps: 1e999}", "6: train.steps must be a whole number, not inf"),
        ("{steps: 3}", "{steps: 0x" + "f" * 9000 + "}", "6: train.steps must be a whole number, not inf"),
        ("{steps: 3}", "{steps: " + "9" * 9000 + "}", "6: cannot read '999"),
        ("{steps: 3}", "{seconds: .nan}", "6: train.seconds"),
        ("{steps: 3}", "{seconds: -1}", "6: train.seconds must be above 0, not -1"),
        ("proto", "{name: plain, train: {episodes: 3}}", "5: plain: it is fed with images, not episodes"),
        ("proto", "{name: proto, params: {lr: []}}", "5: lr: the list is empty"),
        ("proto", "{name: proto, params: {lr: .inf}}", "5: proto: lr must be float, not inf"),
        ("proto", "{name: proto, params: {lr: {a: 1}}}", "5: proto: lr must be float, not {'a': 1}"),
        ("proto", "{name: proto, params: 3}", "5: grid.algorithms.params must be a mapping, not 3"),
        ("proto", "3", "5: grid.algorithms must be a mapping, not 3"),
        ("proto", "2020-99-99", "5: cannot read '2020-99-99' as timestamp: put it in quotes"),
        ("proto", "!!python/name:os.system x", "5: cannot read 'x'"),
        ("ways: 5", "ways: []", "3: grid.tasks.ways must be a list of at least one value, not an empty one"),
        ("ways: 5", "ways: [5, five]", "3: grid.tasks.ways must be a whole number, not 'five'"),
        ("ways: 5", "ways: 7", "3: 7 ways are more than the 6 test classes of dots[big]"),
        ("dots", '"dots[big"', "3: dots has no split 'big'"),
        ("dots", '"dots]"', "3: dots has no split"),
        ("queries: 15}", "queries: 15, params: {split: small}}", "3: write the split as dataset: 'dots[big]'"),
        ("queries: 15}", "queries: 15, rotations: class}", "3: grid.tasks.rotations must be 'none'"),
        ("queries: 15}", "queries: 15, within: drawer}", "3: dots has no tasks within one drawer"),
        ("queries: 15}", "queries: 15, within: script}", "3: grid.tasks.within must be 'none', 'alphabet' or 'drawer'"),
        ("shots: 1, queries: 15}", "stream: 20, within: alphabet}", "3: a stream is drawn from all classes"),
        ("dots, ways: 5", "waves, rotations: episode", "3: waves[plain] is regression: it has no rotations"),
        ("train:", "1: x\ntrain:", "6: a key must be text: put it in quotes"),
        ("train:", "on: x\ntrain:", "6: a key must be text: put it in quotes"),
        ("train:", "? [a]\n: x\ntrain:", "6: a key must be text: put it in quotes"),
        ("train:", "suite: a/b\ntrain:", "6: suite must be letters, digits and . _ + -, not 'a/b'"),
        ("train:", "suite: ..\ntrain:", "6: suite must be letters, digits and . _ + -, not '..'"),
        ("train:", "reference: grad\ntrain:", "6: reference 'grad' is no algorithm of the suite"),
        ("train:", "plugins: [gone.py]\ntrain:", "gone.py: there is no such file"),
        ("train:", "  seeds: [-1]\ntrain:", "6: grid.seeds must be at least 0, not -1"),
        ("train:", "measures: []\ntrain:", "6: measures must be a list of at least one value"),
        (
            "grid:\n  tasks:\n    - {dataset: dots",
            "evaluation: {selection: val}\ngrid:\n  tasks:\n    - {dataset: 'dots[small]'",
            "4: 5 ways are more than the 2 val classes of dots[small]",
        ),
        ("train:", "cells: 3\ntrain:", "6: cells must be a list, not 3"),
        ("ways: 5", f"ways: {list(range(2, 300))}", "3: 298,000 cells are too many"),
    ],
)
def test_one_mistake_is_one_line(tmp_path: Path, old: str, new: str, expected: str) -> None:
    text = small()
    if "298,000" in expected:
        text = text.replace("shots: 1,", f"shots: {list(range(1, 1001))},")
    assert old in text
    found = problems(tmp_path, text.replace(old, new, 1))
    assert any(expected in line for line in found), found


def test_tasks_within_an_alphabet_share_a_training(tmp_path: Path) -> None:
    text = small(task="{dataset: dots, ways: 5, shots: 1, queries: 1, within: alphabet}")
    cells = [*load(tmp_path, text).cells(), *load(tmp_path, text.replace(", within: alphabet", "")).cells()]
    trained = [cell for cell in cells if cell.train]
    assert len({cell.id for cell in trained}) == 2 and len({cell.training_id for cell in trained}) == 1
    assert "/dots[big,within=alphabet]/5w1s1q/" in trained[0].id


def test_val_accuracy_needs_the_validation_classes(tmp_path: Path) -> None:
    text = small(task='{dataset: "dots[small]", ways: 5, shots: 1, queries: 1}')
    assert load(tmp_path, text).cells()
    assert problems(tmp_path, text + "measures: [val_accuracy]\n") == [
        "3: 5 ways are more than the 2 val classes of dots[small]"
    ]


def test_rotated_copies_are_classes(tmp_path: Path) -> None:
    def task(ways: int, rotations: str) -> str:
        return small(task=f"{{dataset: dots, ways: {ways}, shots: 1, queries: 1, rotations: {rotations}}}")

    assert len(load(tmp_path, task(24, "classes")).cells()) == 2
    assert problems(tmp_path, task(25, "classes")) == ["3: 25 ways are more than the 24 test classes of dots[big]"]
    assert problems(tmp_path, task(7, "train_only")) == ["3: 7 ways are more than the 6 test classes of dots[big]"]
    wide = task(5, "train_only").replace("{steps: 3}", "{steps: 3, ways: 40}")
    assert len(load(tmp_path, wide).cells()) == 2
    assert "41 training ways are more than the 40 training classes" in problems(tmp_path, wide.replace("40", "41"))[0]
    assert "11 training ways" in problems(tmp_path, task(5, "episode").replace("{steps: 3}", "{steps: 3, ways: 11}"))[0]


@pytest.mark.parametrize("text", ["suite: x\n", "cells: []\n", "{}", "controls: true\n"])
def test_a_suite_without_cells_is_a_mistake(tmp_path: Path, text: str) -> None:
    assert problems(tmp_path, text) == ["1: the suite has no cells: add a grid of tasks and algorithms, or cells"]


MARGINS = """\
thresholds:
  overrides:
    - {algorithm: proto, accuracy: 1 point}
    - OVERRIDE
"""


@pytest.mark.parametrize(
    "override",
    ["{algorithm: guess, time: 3%}", '{match: "dots /5w1s", time: 3%}', "{algorithm: proto, match: running, time: 3%}",
     '{match: "", time: 3%}', "{match: cuda, time: 3%}", "{match: cuda-float32/seed3, time: 3%}"],
)  # fmt: skip
def test_margins_may_name_what_a_run_can_be_asked_for(tmp_path: Path, override: str) -> None:
    found = load(tmp_path, small() + MARGINS.replace("OVERRIDE", override))
    assert len(found.thresholds["overrides"]) == 2


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("{algorithm: prato, time: 3%}", "'prato' is no algorithm of the suite (did you mean 'proto'?)"),
        ("{algorithm: grad, time: 3%}", "'grad' is no algorithm of the suite (known: guess, proto)"),
        ("{match: doots, time: 3%}", "match 'doots' fits no cell of the suite (did you mean 'dots'?)"),
        ('{match: "dots /5w2s", time: 3%}', "match 'dots /5w2s' fits no cell of the suite"),
        ("{match: 'zzz', time: 3%}", "match 'zzz' fits no cell of the suite"),
        ("{algorithm: guess, match: running, time: 3%}", "match 'running' fits no cell of guess"),
        ("{match: bf16, time: 3%}", "match 'bf16' fits no cell of the suite"),
    ],
)
def test_margins_of_no_cell_are_a_mistake(tmp_path: Path, override: str, expected: str) -> None:
    text = small() + MARGINS.replace("OVERRIDE", override)
    line = text.splitlines().index(f"    - {override}") + 1
    assert problems(tmp_path, text) == [f"{line}: {expected}"]


def test_margins_are_not_blamed_for_another_mistake(tmp_path: Path) -> None:
    text = small("prato") + MARGINS.replace("OVERRIDE", "{match: proto, time: 3%}")
    (line,) = problems(tmp_path, text)
    assert "unknown algorithm 'prato'" in line


def test_a_broken_plugin_is_named_twice_over(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("x = 1\n")
    (line,) = problems(tmp_path, small() + "plugins: [broken.py]\nsiet: 1\n")[:1]
    assert line.startswith(f"7: {tmp_path / 'broken.py'}:1: not a plug-in: add METABENCH")


def error(name: str | Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_suite(name)
    return str(caught.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"grid: [1, 2\n", r"mine\.yaml:2:1: broken YAML: "),
        (b"a: b: c\n", r"mine\.yaml:1:5: broken YAML: mapping values are not allowed here"),
        (b"a: 1\nb: \x07\n", r"mine\.yaml:2: broken YAML: special characters"),
        (b"a: 1\n---\nb: 2\n", r"mine\.yaml:2:1: broken YAML: .*another document"),
        (b"a: *b\n", r"mine\.yaml:1:4: broken YAML: found undefined alias"),
        (b"suite: \xff\n", r"mine\.yaml: is not UTF-8 text \(byte 7\)"),
        (b"", r"mine\.yaml:1: a suite must be a mapping, not None"),
        (b"- a\n", r"mine\.yaml:1: a suite must be a mapping, not \['a'\]"),
        (b"just text", r"mine\.yaml:1: a suite must be a mapping"),
        (b"[" * 5000, r"mine\.yaml: nested too deeply"),
        (b"a: &a [*a]\n", r"mine\.yaml: nested too deeply"),
        (b"x: " + b"[" * 30 + b"]" * 30, r"mine\.yaml: nested too deeply"),
        (
            b"a: &a [1,1,1,1,1,1,1,1,1,1]\n"
            + b"".join(b"%c: &%c [%s]\n" % (c, c, b",".join([b"*%c" % (c - 1)] * 10)) for c in b"bcdefgh"),
            r"mine\.yaml: nested too deeply, or too many values \(a YAML alias that multiplies\?\)",
        ),
        (b"#" * 1_000_001, r"mine\.yaml: has 1,000,001 bytes; a suite has at most 1,000,000"),
    ],
)
def test_a_file_that_is_no_suite(tmp_path: Path, content: bytes, expected: str) -> None:
    (tmp_path / "mine.yaml").write_bytes(content)
    assert re.search(expected, error(tmp_path / "mine.yaml"))


def test_a_path_that_is_no_file(tmp_path: Path) -> None:
    assert "no such suite file" in error(tmp_path / "gone.yaml")
    assert "is a folder" in error(tmp_path)


def test_a_byte_order_mark_does_no_harm(tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_bytes(b"\xef\xbb\xbf" + small().encode())
    assert load_suite(str(tmp_path / "mine.yaml")).name == "mine"


def test_a_file_whose_name_is_no_suite_name(tmp_path: Path) -> None:
    (tmp_path / "my suite.yaml").write_text(small())
    assert "'my suite' cannot be a suite's name: add 'suite: NAME'" in error(tmp_path / "my suite.yaml")
    (tmp_path / "my suite.yaml").write_text("suite: mine\n" + small())
    assert load_suite(tmp_path / "my suite.yaml").name == "mine"


def test_shipped_suites_are_found_by_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "quick.yaml").write_text(small())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.setattr(suite_module, "shipped_suites", lambda: {"quick": tmp_path / "quick.yaml"})
    assert load_suite("quick").path == (tmp_path / "quick.yaml").resolve()
    assert error("qick") == "unknown suite: 'qick' (did you mean 'quick'?)"
    copy = tmp_path / "elsewhere" / "quick.yaml"
    copy.write_text(small())
    assert load_suite(copy).name == "quick"
    copy.write_text(small("grad"))
    assert "'quick' is a suite that comes with metabench: add 'suite: ANOTHER-NAME'" in error(copy)
    copy.write_text("suite: mine\n" + small("grad"))
    assert load_suite(copy).name == "mine"


def test_every_shipped_suite_is_valid(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite_module, "catalogue", catalogue)
    for name, file in shipped_suites().items():
        suite = load_suite(name)
        assert suite.name == file.stem == name and suite.cells()
        assert all(parse_id(cell.id, suite.catalogue) == cell for cell in suite.cells())


def test_the_schema_describes_every_key() -> None:
    def check(part: Any) -> None:
        if isinstance(part, dict):
            for name, value in part.get("properties", {}).items():
                assert value.get("description"), name
        for value in part.values() if isinstance(part, dict) else part if isinstance(part, list) else ():
            check(value)

    found = schema()
    check(found)
    assert json.loads(json.dumps(found)) == found
    assert found["additionalProperties"] is False and "$schema" in found
    assert found["$defs"]["TaskEntry"]["required"] == ["dataset"]
    either = [{"required": ["shots", "queries"]}, {"required": ["stream"]}]
    assert found["$defs"]["TaskEntry"]["anyOf"] == either
    assert found["$defs"]["AlgorithmEntry"]["anyOf"][0]["type"] == "string"
    assert found["$defs"]["TaskEntry"]["properties"]["ways"]["anyOf"][0] == {
        "type": "integer", "minimum": 2, "maximum": 2**63 - 1,
    }  # fmt: skip


def test_loading_imports_nothing_heavy() -> None:
    code = (
        "import sys; import metabench.suite;"
        "print([name for name in ('torch', 'numpy', 'pandas', 'scipy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@settings(max_examples=150, deadline=None)
@given(
    data=st.recursive(
        st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["dots", "proto", "steps", "x"]),
        lambda inner: st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["grid", "tasks", "algorithms", "cells", "train", "task", "algorithm", "dataset", "ways",
                             "shots", "queries", "params", "name", "steps", "seeds", "lr", "odd"]),
            inner,
            max_size=5,
        ),
        max_leaves=30,
    )
)  # fmt: skip
def test_whatever_stands_in_the_file_it_loads_or_is_explained(plugins: list[Path], data: Any) -> None:
    file = plugins[0].parent / "anything.yaml"
    file.write_text(yaml.safe_dump(data))
    try:
        load_suite(file)
    except ConfigError as caught:
        assert str(caught).startswith(str(file))


# --- streams -----------------------------------------------------------------------------------------------------

STREAM = """\
grid:
  tasks: [{dataset: dots, ways: 5, stream: 50}]
  algorithms: [recall, proto]
train: {steps: 10}
measures: [accuracy_at_1, accuracy_at_2, accuracy_at_10, accuracy, mse, adapt_time, train_time, predict_time]
"""


def test_a_stream_is_a_task_for_those_who_follow_streams(tmp_path: Path) -> None:
    found = load(tmp_path, STREAM).points
    text = "recall[train=5w50tx16*10]/dots[big]/5w50t/none/cpu-float32/seed0"
    assert [cell.id for cell in found] == [text, "proto/dots[big]/5w50t/running/cpu-float32/seed0"]
    recall, proto = found
    assert found[recall] == ("accuracy_at_1", "accuracy_at_2", "accuracy_at_10", "train_time", "predict_time")
    assert (recall.problem, recall.shots, recall.queries, recall.stream) == ("stream", 0, 0, 50)
    assert recall.train is not None and recall.train.images_per_step == 16 * 50
    known = load(tmp_path, STREAM).catalogue
    assert unsupported(recall, known) is None
    assert unsupported(proto, known) == "proto does classification, not stream"


def test_presentations_that_some_stream_may_lack_are_left_out(tmp_path: Path) -> None:
    """46 images of 5 classes show one of them 10 times in any case; 45 may show each 9 times."""
    for length, reached in ((46, True), (45, False)):
        first, *_ = load(tmp_path, STREAM.replace("50", str(length))).points.values()
        assert ("accuracy_at_10" in first) == reached


def test_episodes_have_no_presentations(tmp_path: Path) -> None:
    first, *_ = load(tmp_path, STREAM.replace("stream: 50", "shots: 1, queries: 5")).points.values()
    assert first == ("accuracy", "adapt_time", "train_time", "predict_time")


@pytest.mark.parametrize(
    ("task", "train", "text"),
    [
        ("stream: 50", "steps: 10, stream: 20, ways: 4", "4w20tx16*10"),
        ("stream: 50", "images: 1600", "5w50tx16*2"),
        ("stream: 50", "steps: 10, shots: 2, queries: 3", "5w2s3qx16*10"),
        ("stream: 50", "steps: 10, shots: 2", "5w2s1qx16*10"),
        ("shots: 1, queries: 5", "steps: 10, stream: 30", "5w30tx16*10"),
        ("shots: 1, queries: 5", "steps: 10, within: alphabet", "5w1s5qx16@alphabet*10"),
    ],
)
def test_training_is_on_streams_or_on_episodes(tmp_path: Path, task: str, train: str, text: str) -> None:
    suite = load(tmp_path, STREAM.replace("stream: 50", task).replace("steps: 10", train).replace(", proto", ""))
    trained = suite.cells()[0].train
    assert trained is not None and trained.text == text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("stream: 50", "stream: 50, shots: 1", "a stream has no shots and no queries"),
        ("stream: 50", "stream: 101", "a stream of 101: 5 classes of dots[big] have 100 images"),
        ("stream: 50", "stream: 0", "stream must be at least 1, not 0"),
        ("dots, ways: 5", "waves", "waves[plain] is regression: it has no streams"),
        ("steps: 10", "steps: 10, stream: 101", "a stream of 101 in training: 5 classes have 100 images"),
        ("steps: 10", "steps: 10, within: alphabet", "a stream is drawn from all classes: leave within out"),
        ("steps: 10", "steps: 10, stream: 20, shots: 1", "on streams, or on episodes with shots and queries"),
        ("stream: 50", "queries: 5", "shots is missing: add it"),
    ],
)
def test_impossible_streams_are_explained(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert any(message in line for line in problems(tmp_path, STREAM.replace(old, new)))


def test_only_those_who_follow_streams_train_on_them(tmp_path: Path) -> None:
    text = STREAM.replace("stream: 50", "shots: 1, queries: 5").replace("steps: 10", "steps: 10, stream: 20")
    assert problems(tmp_path, text) == ["4: proto: it cannot be trained on streams here: leave stream out"]
