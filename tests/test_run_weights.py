"""`run --weights`: stored weights under the code as it is now, so that `check` may judge each episode."""

from __future__ import annotations

import hashlib
import json
import logging
import shutil
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import safetensors.torch
from conftest import metabench, results

from metabench import cli, plan
from metabench.runner import Weights
from metabench.store import Run

ROOT = Path(__file__).parent.parent
SUITE = """
suite: gate
plugins: [mine.py]
grid:
  tasks: [{dataset: glyphs, ways: 5, shots: 1, queries: 5}]
  algorithms: [scaled-protonet, pixel-nn]
train: {ways: 5, shots: 1, queries: 5, steps: 12}
evaluation: {episodes: 60}
measures: [accuracy, train_time]
controls: false
threads: 1
"""
CENTRES = "weights.mT @ z / weights.sum(1)[..., None]"
WORSE = {CENTRES: f"({CENTRES}).roll(1, dims=1)"}  # each class has its neighbour's centre
SAME = {"# (T, ways, d)": "# of each class"}


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A project whose run kept its weights."""
    folder = tmp_path_factory.mktemp("base")
    (folder / "gate.yaml").write_text(SUITE)
    shutil.copy(ROOT / "docs/examples/scaled_protonet.py", folder / "mine.py")
    done = metabench("run", folder / "gate.yaml", "--out", folder / "out", "--keep-weights")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.fixture
def command(monkeypatch, capsys):
    """Run the command line in this process: starting one costs seconds on a busy machine. Workers are real."""
    handler = signal.getsignal(signal.SIGTERM)

    def run(*words):
        plan.source_hash.cache_clear()  # plug-ins are edited between commands
        monkeypatch.setattr(sys, "argv", ["metabench", *map(str, words)])
        monkeypatch.setattr(logging.root, "handlers", [])
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            cli.main()
        said = capsys.readouterr()
        return SimpleNamespace(returncode=end.value.code or 0, stdout=said.out, stderr=said.err)

    yield run
    signal.signal(signal.SIGTERM, handler)
    plan.source_hash.cache_clear()


@pytest.fixture
def project(base, tmp_path, command):
    """The project checked out again, its baseline run beside it, and commands in it."""
    kept = Run.open(base / "out/gate/latest").path
    run = Path(shutil.copytree(kept, tmp_path / "baseline/gate" / kept.name))
    for name in ("gate.yaml", "mine.py"):
        shutil.copy(base / name, tmp_path)
    latest = tmp_path / "out/gate/latest"

    def edit(changes):
        file = tmp_path / "mine.py"
        text = file.read_text()
        for old, new in changes.items():
            assert old in text
            text = text.replace(old, new)
        file.write_text(text)

    def train():
        return command("run", tmp_path / "gate.yaml", "--out", tmp_path / "out")

    def again(*options):
        return command("run", tmp_path / "gate.yaml", "--out", tmp_path / "out", "--weights", run, *options)

    def check(*options):
        return command("check", "--baseline", run, "--candidate", latest, "-f", "json", *options)

    return SimpleNamespace(
        folder=tmp_path, run=run, latest=latest, edit=edit, train=train, again=again, check=check
    )  # fmt: skip


def of(run, name, measure="accuracy"):
    (row,) = (row for (_, m), row in results(run).items() if (row["algorithm"], m) == (name, measure))
    return row


def facts(run):
    return next(m.facts for m in Run.open(run).measurements().values() if "scaled" in m.cell and m.status == "ok")


def verdicts(done):
    (found,) = json.loads(done.stdout)["comparisons"]
    rows = {row["cell"].partition("[")[0].partition("/")[0]: row for row in found["rows"]}
    return SimpleNamespace(rows=rows, absent=found["absent"], notes=found["notes"])


def forget_weights(run):
    """The run as one without --keep-weights would be."""
    file = run / "measurements.jsonl"
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    for line in lines:
        line["facts"].pop("weights", None)
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_the_same_code_is_unchanged_trains_nothing_and_misses_nothing(project):
    project.edit(SAME)
    done = project.again()
    assert done.returncode == 0, done.stderr
    kept, made = facts(project.run), facts(project.latest)
    assert made["weights"] == kept["weights"]
    assert (made["train_seconds"], made["train_steps"]) == (0, 12)
    assert "step 12" not in done.stderr and "training scaled" not in done.stderr
    checked = project.check("--fail-on", "missing,inconclusive,incomparable")
    assert checked.returncode == 0, checked.stderr
    found = verdicts(checked)
    assert {name: row["outcome"] for name, row in found.rows.items()} == {
        "scaled-protonet": "unchanged",
        "pixel-nn": "unchanged",
    }
    assert "identical predictions on 60 episodes" in found.rows["scaled-protonet"]["reason"]
    assert found.absent == []
    assert any("1 training times are not compared" in note for note in found.notes)
    assert of(project.latest, "scaled-protonet", "train_time")["status"] == "skipped"


def test_an_inner_loop_that_got_worse_regressed_with_the_episode_as_the_unit(project):
    project.edit(WORSE)
    assert project.again().returncode == 0
    checked = project.check()
    assert checked.returncode == 1, checked.stderr
    row = verdicts(checked).rows["scaled-protonet"]
    assert row["outcome"] == "regressed"
    assert row["reason"] == "adapt gate: same weights, 60 paired episodes"


def test_without_the_option_the_changed_code_trains_and_a_single_pair_decides_nothing(project):
    project.edit(WORSE)
    assert project.train().returncode == 0
    assert verdicts(project.check()).rows["scaled-protonet"]["outcome"] == "inconclusive"


def test_a_run_with_loaded_weights_and_one_that_trains_never_mix(project):
    first = project.again()
    loaded = project.latest.resolve()
    assert "0 to do, 0 trainings" in project.again("--plan").stderr
    again = project.again()
    assert (project.latest.resolve(), "3 of them already measured" in again.stderr) == (loaded, True), again.stderr
    trained = project.train()
    assert f"a new run is started: {loaded.name} loaded the weights of {project.run.name}" in trained.stderr
    assert project.latest.resolve() != loaded
    assert of(project.latest, "scaled-protonet")["code"] != of(loaded, "scaled-protonet")["code"]
    assert of(project.latest, "pixel-nn")["code"] == of(loaded, "pixel-nn")["code"]
    mixed = project.again("--extend", project.latest)
    assert (mixed.returncode, "trained weights of its own; the two kinds never mix" in mixed.stderr) == (2, True)
    assert first.returncode == again.returncode == trained.returncode == 0


def test_other_weights_of_the_same_run_are_measured_again(project):
    assert project.again().returncode == 0
    before = of(project.latest, "scaled-protonet")["code"]
    old = project.run / "weights" / facts(project.run)["weights"]
    text = (project.run / "measurements.jsonl").read_text()
    whole = safetensors.torch.load_file(old)
    whole["log_scale"] = whole["log_scale"] + 1
    data = safetensors.torch.save(whole)
    name = f"{hashlib.sha256(data).hexdigest()}.safetensors"
    (project.run / "weights" / name).write_bytes(data)
    (project.run / "measurements.jsonl").write_text(text.replace(old.name, name))
    done = project.again()
    assert (done.returncode, "measured again" in done.stderr) == (0, True)
    assert of(project.latest, "scaled-protonet")["code"] != before
    assert facts(project.latest)["weights"] == name


def test_a_method_whose_weights_were_not_kept_is_skipped_with_the_reason_and_never_trained(project):
    suite = project.folder / "gate.yaml"
    suite.write_text(suite.read_text().replace("[scaled-protonet,", "[protonet, scaled-protonet,"))
    done = project.again()
    assert done.returncode == 0, done.stderr
    row = of(project.latest, "protonet")
    assert (row["status"], row["value"]) == ("skipped", "")
    assert row["reason"] == f"{project.run.name} keeps no weights of its training"
    assert "2 rows are not measured, and not trained anew: no weights of theirs (protonet)" in done.stderr
    assert of(project.latest, "scaled-protonet")["status"] == "ok"
    plan = project.again("--plan")
    assert plan.stdout.count("skip ") == 2 and "0 to do" in plan.stderr


def test_a_run_that_kept_nothing_is_one_message(project):
    forget_weights(project.run)
    done = project.again()
    assert done.returncode == 2
    assert "keeps no weights of its training; make such a run with: metabench run gate --keep-weights" in done.stderr
    assert not (project.folder / "out").exists()
    nowhere = project.again("--weights", project.folder / "nowhere")
    assert (nowhere.returncode, "not a run folder" in nowhere.stderr) == (2, True)


def test_damaged_weights_and_weights_of_another_network_are_failed_rows(project):
    file = project.run / "weights" / facts(project.run)["weights"]
    whole = file.read_bytes()
    file.write_bytes(whole[:-1] + b"x")
    done = project.again()
    assert (done.returncode, "is damaged: its hash is not its name" in done.stderr) == (3, True)
    file.write_bytes(whole)
    project.edit({"self.log_scale = ": "self.more = nn.Parameter(torch.zeros(2))\n        self.log_scale = "})
    done = project.again()
    assert (done.returncode, "its weights cannot be loaded: the file lacks" in done.stderr) == (3, True), done.stderr
    file.unlink()
    gone = project.again()
    assert (gone.returncode, "names weights that are not there" in gone.stderr) == (2, True)


def test_weights_that_a_run_names_by_a_path_are_not_read(project):
    """Facts of others lead nowhere outside of their run, though the file there is what its name says."""
    name = facts(project.run)["weights"]
    file = project.run / "weights" / name
    (project.folder / "elsewhere").mkdir()
    file.rename(project.folder / "elsewhere" / name)
    lines = project.run / "measurements.jsonl"
    text = lines.read_text()
    for path in (f"{project.folder}/elsewhere/{name}", f"../../../../elsewhere/{name}"):
        assert (project.run / "weights" / path).is_file()
        lines.write_text(text.replace(name, path))
        done = project.again()
        assert (done.returncode, "is no name that a run gives them" in done.stderr) == (3, True), done.stderr


def test_weights_that_were_selected_otherwise_are_not_taken(project):
    suite = project.folder / "gate.yaml"
    suite.write_text(suite.read_text().replace("episodes: 60", "episodes: 60, selection: val"))
    done = project.again()
    assert (done.returncode, "selected its weights by last, this suite by val" in done.stderr) == (2, True)


def test_a_folder_of_runs_stands_for_its_newest_and_a_new_task_finds_its_training(project):
    suite = project.folder / "gate.yaml"
    suite.write_text(suite.read_text().replace("shots: 1, queries: 5}]", "shots: [1, 2], queries: 5}]"))
    done = project.again("--weights", project.run.parent)
    assert done.returncode == 0, done.stderr
    rows = [row for row in results(project.latest).values() if row["algorithm"] == "scaled-protonet"]
    assert sorted((row["shots"], row["status"]) for row in rows if row["measure"] == "accuracy") == [
        ("1", "ok"),
        ("2", "ok"),
    ]


def test_what_contradicts_itself_is_refused(project):
    for options in (("--keep-weights",), (project.folder / "gate.yaml",)):
        done = project.again(*options)
        assert (done.returncode, "name one suite, and drop --keep-weights" in done.stderr) == (2, True)


def test_files_that_are_named_one_by_one_leave_the_rows_hash_alone():
    row = SimpleNamespace(cell=SimpleNamespace(id="c", train=object()), kernel="", measure="accuracy")
    assert Weights({"c": Path("x")}).on([row]) == [row]
