"""Figures: what they are made of, and that the files are there and look like pictures."""

from __future__ import annotations

import subprocess
import sys
from xml.etree import ElementTree

import numpy as np
import pytest
from conftest import environ
from kernel_runs import KernelRun, kernels_run, scaling_run
from PIL import Image
from test_report import Results, small

from metabench.errors import StoreError
from metabench.report import RunData
from metabench.report.figures import COLOURS, GREY, _looks, draw, learnings, paretos, scalings
from metabench.report.load import load
from metabench.stats import power_law


def test_every_coordinate_with_three_values_scales(tmp_path):
    found = scalings(load([scaling_run().write(tmp_path)]))
    assert [(f.kernel, f.axis) for f in found] == [
        ("adapt", "tasks"), ("meta_step", "tasks"), ("adapt", "ways"), ("adapt", "shots"), ("adapt", "steps"),
        ("embed", "images"),
    ]  # fmt: skip
    by_axis = {(f.kernel, f.axis): f for f in found}
    assert by_axis["adapt", "tasks"].lines[0].x == (1, 2, 4, 8, 16, 32)
    assert [line.method for line in by_axis["adapt", "steps"].lines] == ["maml"]
    assert by_axis["embed", "images"].lines[0].x == (80, 160, 320, 640, 1280, 2560)
    assert by_axis["adapt", "ways"].fixed == "omniglot 1-shot 15 queries, cpu float32"


def test_the_exponent_is_fitted_over_processes(tmp_path):
    run = scaling_run()
    medians = np.stack([s for m, s in run.found if m.measure == "embed_time" and m.cell.startswith("maml")], axis=1)
    line = next(line for line in scalings(load([run.write(tmp_path)]))[-1].lines if line.method == "maml")
    expected = power_law([80, 160, 320, 640, 1280, 2560], medians)
    assert line.law.exponent.value == pytest.approx(expected.exponent.value)
    assert line.law.exponent.half == pytest.approx(expected.exponent.half)
    assert expected.exponent.low <= 0.95 <= expected.exponent.high


def test_two_values_or_other_calls_are_no_scaling(tmp_path):
    run = KernelRun()
    for tasks, layout in ((1, "channels_last"), (2, "channels_last"), (4, "contiguous")):
        run.time(run.cell("protonet", tasks=tasks, layout=layout), "adapt", 0.1 * tasks)
    assert scalings(load([run.write(tmp_path)])) == []


def test_threads_scale(tmp_path):
    run = KernelRun()
    for threads in (1, 2, 4):
        run.time(run.cell("protonet", threads_asked=threads), "adapt", 0.1 / threads)
    (found,) = scalings(load([run.write(tmp_path)]))
    assert (found.axis, found.lines[0].x) == ("threads", (1, 2, 4))
    assert found.lines[0].law.exponent.value == pytest.approx(-1, abs=0.02)


def scored():
    run = Results().add("protonet", 0.95).add("maml", 0.9).add("reptile", 0.7).add("chance", 0.2, seeds=(0,))
    for name, adapt, train in (
        ("protonet", 0.003, 500),
        ("maml", 0.03, 400),
        ("reptile", 0.3, 450),
        ("chance", 1e-6, 0),
    ):
        run.time(name, "adapt_time", adapt)
        if train:
            run.time(name, "train_time", train)
    return run.data()


def test_the_front_is_what_nothing_beats_on_both_axes():
    by_cost = {figure.cost: figure for figure in paretos(scored())}
    fronts = {cost: {p.method for p in f.points if p.front} for cost, f in by_cost.items()}
    assert fronts == {"adapt_time": {"protonet"}, "train_time": {"protonet", "maml"}}  # no control is ever on it
    protonet = next(p for p in by_cost["train_time"].points if p.method == "protonet")
    assert (protonet.cost.value, protonet.cost.low) == (500, 450)
    assert protonet.quality.half is not None
    assert {p.method for p in by_cost["adapt_time"].points} == {"protonet", "maml", "reptile", "chance"}


def test_the_lowest_error_is_on_the_front():
    columns = {"dataset": "sinusoid", "measure": "mse", "ways": None}
    run = Results().add("maml", 0.5, **columns).add("reptile", 1.5, **columns)
    for row in list(run.rows):
        run.rows.append({**row, "measure": "adapt_time", "value": 0.1 if row["algorithm"] == "maml" else 0.2})
    (figure,) = paretos(RunData.of(run.rows, run.episodes))
    assert [(p.method, p.front) for p in figure.points] == [("maml", True), ("reptile", False)]


def test_looks_differ_and_controls_are_grey(tmp_path):
    data = load([scaling_run().write(tmp_path)])
    lines = scalings(data)[0].lines
    looks = dict(zip([line.algorithm for line in lines], _looks(lines, data), strict=True))
    assert looks["pixel-nn"][0] == GREY
    assert looks["maml"][1] == looks["fomaml"][1] != looks["protonet"][1]  # one marker for a family
    many = [type(lines[0])(f"m{i}", f"m{i}", (1.0,), (), lines[0].law) for i in range(3 * len(COLOURS))]
    assert len(set(_looks(many, data))) == len(many)


@pytest.mark.parametrize("make", [scaling_run, lambda: scaling_run(processes=1)])
def test_figures_are_drawn_as_svg_and_png(tmp_path, make):
    data = load([make().write(tmp_path)])
    paths = draw(data, tmp_path / "figures")
    assert len(paths) == len(set(paths)) == 2 * len(scalings(data))
    for path in paths:
        if path.suffix == ".svg":
            ElementTree.parse(path)
        else:
            with Image.open(path) as picture:
                assert picture.width > 1000
                assert len(picture.convert("RGB").getcolors(1 << 20)) > 20
    first = paths[0].read_bytes()
    assert draw(data, tmp_path / "again")[0].read_bytes() == first  # nothing to commit where nothing changed


def test_scores_are_drawn_against_costs(tmp_path):
    paths = draw(scored(), tmp_path)
    assert [p.name for p in paths if p.suffix == ".svg"] == [
        "pareto-adapt-time-omniglot-5-way-1-shot-cpu-float32.svg",
        "pareto-train-time-omniglot-5-way-1-shot-cpu-float32.svg",
    ]
    assert draw(small(), tmp_path) == []  # one method with a cost is no comparison


def test_learning_curves_are_means_over_seeds(tmp_path):
    def rows(name, seed, spec):
        training = f"{name}[train={spec}]/glyphs[alphabets]/cpu-float32/seed{seed}"
        row = {"algorithm": name, "dataset": "glyphs", "measure": "train_time", "status": "ok", "seed": seed}
        # two cells that share a training are one curve
        return [
            {**row, "cell": f"{name}/{shape}/seed{seed}", "training": training, "train_spec": spec} for shape in "ab"
        ]

    def point(row, step, **more):
        return {"training": row["training"], "seed": row["seed"], "step": step, "images": 30 * step, **more}

    (a, _), (b, _), (other, _), (plain, _) = trainings = [
        rows("proto", 0, "5w1s5q*20"), rows("proto", 1, "5w1s5q*20"), rows("maml", 0, "5w1s5q*20"),
        rows("base", 0, "64i*9"),
    ]  # fmt: skip
    curves = [
        point(a, 10, accuracy=0.5), point(a, 20, accuracy=0.7), point(a, 20, validation=0.6),
        point(b, 10, accuracy=0.6), point(b, 20, accuracy=0.9), point(other, 10, accuracy=0.4),
        point(plain, 5, loss=2.0),
    ]  # fmt: skip
    data = RunData.of([row for found in trainings for row in found], curves=curves)
    episodes, images = learnings(data)
    assert episodes.title == "glyphs[alphabets] 5-way"
    proto, maml = episodes.curves
    assert proto.train == ((300.0, pytest.approx(0.55)), (600.0, pytest.approx(0.8)))
    assert proto.validation == ((600.0, 0.6),) and maml.train == ((300.0, 0.4),)
    assert [(c.method, c.score, c.train) for c in images.curves] == [("base", "loss", ((150.0, 2.0),))]
    assert len(draw(data, tmp_path)) == 4
    silent = [{"training": a["training"], "seed": 0, "step": 10, "images": 300}]
    assert learnings(RunData.of([a], curves=silent)) == []
    assert learnings(RunData.of([row for found in trainings for row in found])) == []


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="cannot write figures"):
        draw(scored(), tmp_path / "file")


def test_the_command_draws_and_prints_paths(tmp_path):
    path = scaling_run().write(tmp_path)
    command = [sys.executable, "-m", "metabench", "report", str(path), "--figures", str(tmp_path / "figures")]
    done = subprocess.run(command, capture_output=True, text=True, env=environ(), check=True)
    assert len(done.stdout.splitlines()) == len(list((tmp_path / "figures").iterdir())) == 12
    command[4] = str(kernels_run().write(tmp_path))
    done = subprocess.run(command, capture_output=True, text=True, env=environ(), check=True)
    assert (done.stdout, done.stderr[:15]) == ("", "nothing to draw")


def test_tables_never_load_matplotlib(tmp_path):
    path = kernels_run().write(tmp_path)
    code = f"import sys; from metabench.cli import main; sys.argv = ['metabench', 'report', {str(path)!r}]\n"
    code += "try:\n    main()\nexcept SystemExit:\n    assert 'matplotlib' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], capture_output=True, env=environ(), check=True)
