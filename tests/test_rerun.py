"""Running a submission again: what holds becomes `re-run`, what does not is refused, and nothing is taken on trust."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import environ, metabench
from scipy import stats as distributions

from metabench import weights
from metabench.errors import ConfigError, NothingRan, StoreError
from metabench.leaderboard import leaderboard, pack, rerunfile
from metabench.leaderboard.rerun import ALPHA, Rerun, judge, rerun
from metabench.runner import run as start
from metabench.stats import mean_interval
from metabench.store import Run
from metabench.suite import load_suite

ROOT = Path(__file__).parent.parent
EPISODES, SEED = 40, 0
SUITE = """
suite: mine
description: Two trainings, one of them a plug-in
plugins: [mine.py]
grid:
  tasks: [{dataset: glyphs, ways: 5, shots: 1, queries: 5}]
  algorithms: [protonet, scaled-protonet, pixel-nn]
train: {ways: 5, shots: 1, queries: 5, steps: 12}
evaluation: {episodes: 40}
measures: [accuracy]
controls: false
threads: 1
"""


class Silent:
    """A watch that remembers what it was told."""

    def __init__(self):
        self.notes = []

    def note(self, text):
        self.notes.append(text)

    def __getattr__(self, name):
        return lambda *told: None


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """A folder with a suite and a plug-in."""
    folder = tmp_path_factory.mktemp("work")
    shutil.copy(ROOT / "docs/examples/scaled_protonet.py", folder / "mine.py")
    (folder / "mine.yaml").write_text(SUITE)
    return folder


@pytest.fixture(scope="module")
def honest(work):
    """A real run that kept its weights."""
    done = metabench("run", work / "mine.yaml", "--out", work / "runs", "--keep-weights")
    assert done.returncode == 0, done.stderr
    return Run.open(work / "runs/mine/latest").path


@pytest.fixture(scope="module")
def bundle(honest, work):
    """What is handed in."""
    return pack(honest, work / "handed-in", submitter="Ada", weights=True)


@pytest.fixture(scope="module")
def again(bundle, work):
    """The re-run of the whole bundle, and what it said meanwhile."""
    watch = Silent()
    return rerun(bundle, out=work / "again", watch=watch, trust_code=True), watch


def rows(run):
    """The lines of measurements.jsonl by algorithm."""
    found = [json.loads(line) for line in (run / "measurements.jsonl").read_text().splitlines()]
    return {one["cell"].partition("[")[0].partition("/")[0]: one for one in found}


def rewrite(run, changed, samples=None):
    """Put changed measurements (by algorithm) into a copied run; `samples` changes each row's raw samples."""
    stored, text = Run.open(run), ""
    for name, record in changed.items():
        line = stored.samples(stored.measurements()[record["cell"], record["measure"]])
        line = samples(name, line) if samples else line
        record["samples"] = len(text.encode())
        text += json.dumps(line) + "\n"
    (run / "samples.jsonl").write_text(text)
    (run / "measurements.jsonl").write_text("".join(json.dumps(one) + "\n" for one in changed.values()))
    (run / "results.csv").unlink(missing_ok=True)


def forged(honest, folder):
    """A copy in which protonet answers three episodes of four without a mistake, consistent down to the predictions."""
    run = Path(shutil.copytree(honest, folder / "forged"))
    changed = rows(run)
    better = changed["protonet"]
    file = run / "predictions" / better["facts"]["predictions"]
    with np.load(file) as kept:
        parts = dict(kept)
    ours = np.arange(EPISODES) % 4 > 0
    parts["predicted"][ours], parts["ties"][ours] = parts["labels"][ours], 1
    np.savez_compressed(file, **parts)
    scores = np.where(parts["ties"] > 0, 1 / np.maximum(parts["ties"], 1), 0).mean(1)
    found = mean_interval(scores)
    better |= {"value": found.value, "ci_low": found.low, "ci_high": found.high, "sd": found.sd}
    rewrite(run, changed, lambda name, line: {**line, "scores": list(scores)} if name == "protonet" else line)
    return run


def test_what_is_honest_becomes_rerun(again, bundle, work):
    found, watch = again
    assert found.exit_code == 0
    assert [row.outcome for row in found.record.rows] == ["agrees"] * 3
    assert all(row.same_code and row.again.n == row.claimed.n == EPISODES for row in found.record.rows)
    assert found.record.drawn and found.record.episode_seed != SEED
    assert f"episode seed {found.record.episode_seed}, drawn just now" in watch.notes
    made = Run.open(found.folder)
    assert made.manifest["evaluation"]["seed"] == found.record.episode_seed
    claimed = leaderboard([bundle], work / "site-a").boards[0]
    trusted = leaderboard([bundle], work / "site-b", reruns=[work / "again"]).boards[0]
    assert {one.trust for one in claimed.standings} == {"claimed"}
    assert {one.trust for one in trusted.standings} == {"re-run"}
    assert any("on 40 new episodes" in dict(one.card)["re-run"] for one in trusted.standings)
    assert "re-run</span>" in (work / "site-b/index.html").read_text()


def test_other_code_than_the_claim_s_is_said_on_the_card(again, bundle, work, tmp_path):
    folder = Path(shutil.copytree(again[0].folder, tmp_path / "records"))
    text = json.loads((folder / rerunfile.NAME).read_text())
    text["rows"] = [{**row, "same_code": not row["cell"].startswith("protonet")} for row in text["rows"]]
    (folder / rerunfile.NAME).write_text(json.dumps(text))
    (board,) = leaderboard([bundle], tmp_path / "site", reruns=[folder]).boards
    cards = {one.label: dict(one.card)["re-run"] for one in board.standings}
    said = {name for name, card in cards.items() if "; by other code or torch than the claim's" in card}
    assert said == {"protonet"}


def test_a_run_that_loaded_its_weights_is_not_run_again(honest, tmp_path):
    run = Path(shutil.copytree(honest, tmp_path / "loaded"))
    manifest = json.loads((run / "manifest.json").read_text())
    (run / "manifest.json").write_text(json.dumps({**manifest, "weights": "the-run-that-trained"}))
    with pytest.raises(
        ConfigError, match=r"those of the-run-that-trained, loaded .* name the-run-that-trained instead"
    ):
        rerun(run, out=tmp_path / "again", watch=Silent(), trust_code=True)


def test_every_rerun_draws_other_episodes(again, honest):
    found, _ = again
    made, claimed = Run.open(found.folder), Run.open(honest)
    for row in found.record.rows:
        theirs, ours = (
            set(run.samples(run.measurements()[cell, row.measure])["episodes"])
            for run, cell in ((claimed, row.cell), (made, row.again_cell))
        )
        assert len(theirs) == len(ours) == EPISODES and not theirs & ours


def test_a_rerun_trains_nothing(again, honest):
    found, _ = again
    made = {key[0].partition("[")[0]: one for key, one in Run.open(found.folder).measurements().items()}
    for name, claimed in rows(honest).items():
        if "train=" in claimed["cell"]:
            assert made[name].facts["train_seconds"] == 0
            assert made[name].facts["weights"] == claimed["facts"]["weights"]
            weights = honest / "weights" / claimed["facts"]["weights"]
            assert hashlib.sha256(weights.read_bytes()).hexdigest() == weights.stem


def test_the_standing_shows_the_least_trust_of_what_it_pools(bundle, again, work):
    """A second seed that was not run again takes the whole row down."""
    other = Path(shutil.copytree(again[0].folder, work / "more-reruns"))  # a record that knows only one of the rows
    text = json.loads((other / rerunfile.NAME).read_text())
    text["rows"] = [row for row in text["rows"] if row["cell"].startswith("protonet")]
    (other / rerunfile.NAME).write_text(json.dumps(text))
    (board,) = leaderboard([bundle], work / "site-c", reruns=[other]).boards
    assert {one.label: one.trust for one in board.standings} == {
        "protonet": "re-run", "scaled-protonet": "claimed", "pixel-nn": "claimed",
    }  # fmt: skip


def test_the_same_seed_gives_the_same_scores(honest, work):
    """What is loaded is what was trained: on the claimed episodes every score comes out again, bit for bit."""
    suite, claimed = load_suite(work / "mine.yaml"), Run.open(honest)
    stored = claimed.measurements()
    files = {one.cell: honest / "weights" / one.facts["weights"] for one in stored.values() if "weights" in one.facts}
    assert len(files) == 2
    made = start(suite, out=work / "same", watch=Silent(), weights=files).run
    for key, one in made.measurements().items():
        assert made.samples(one)["scores"] == claimed.samples(stored[key])["scores"], key


def test_a_forged_claim_adds_up_and_is_refused(honest, work, tmp_path):
    run = forged(honest, tmp_path)
    packed = pack(run, tmp_path, submitter="Eve", weights=True)  # it verifies, and rerun does with the episodes
    out = tmp_path / "again"
    done = metabench("leaderboard", "rerun", packed, "--out", out, "--trust-code")
    assert done.returncode == 2, done.stderr
    assert "refused: protonet[train=5w1s5q*12]" in done.stdout and done.stdout.count("agrees: ") == 2
    assert "RUNNING THE SUBMISSION'S OWN CODE" in done.stderr
    with pytest.raises(StoreError, match=r"protonet.* did not hold when it was run again: claimed .* p = "):
        leaderboard([packed], tmp_path / "site", reruns=[out])
    board = tmp_path / "board.yaml"
    board.write_text(f"withdrawals: [{{run: {run.name}, algorithm: protonet, reason: did not hold}}]")
    (kept,) = leaderboard([packed], tmp_path / "site", board=board, reruns=[out]).boards
    assert {one.label: one.trust for one in kept.standings} == {"scaled-protonet": "re-run", "pixel-nn": "re-run"}


class Bomb:
    """Leaves a file behind wherever it is unpickled."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return (Path.touch, (self.file,))


def test_weights_that_are_not_those_of_the_row_are_failed_rows_and_no_pickle_is_loaded(honest, tmp_path):
    run = Path(shutil.copytree(honest, tmp_path / "broken"))
    changed = rows(run)
    whole = safetensors.torch.load_file(run / "weights" / changed["protonet"]["facts"]["weights"])
    name = next(name for name, value in whole.items() if value.ndim == 4)
    torch.save({"a": Bomb(tmp_path / "it ran")}, tmp_path / "bomb.pt")
    cut = safetensors.torch.save({**whole, name: whole[name][:1].clone()})
    for algorithm, data in (("protonet", cut), ("scaled-protonet", (tmp_path / "bomb.pt").read_bytes())):
        file = run / "weights" / f"{hashlib.sha256(data).hexdigest()}.safetensors"
        file.write_bytes(data)
        changed[algorithm]["facts"]["weights"] = file.name
    rewrite(run, changed)
    found = rerun(run, out=tmp_path / "again", watch=Silent(), trust_code=True)
    reasons = {row.cell.partition("[")[0].partition("/")[0]: (row.outcome, row.reason) for row in found.record.rows}
    assert found.exit_code == 3 and "\n".join(found.lines).count("cannot be loaded") == 2
    shape = ", ".join(map(str, (1, *whole[name].shape[1:])))
    assert reasons["protonet"][0] == reasons["scaled-protonet"][0] == "failed"
    assert f"its weights cannot be loaded: {name} is ({shape}) torch.float32 in the file" in reasons["protonet"][1]
    assert "its weights cannot be loaded: not a whole safetensors file" in reasons["scaled-protonet"][1]
    assert reasons["pixel-nn"] == ("agrees", "")
    assert not (tmp_path / "it ran").exists()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda whole: whole.pop("b"), r"the file lacks b \(1 tensors"),
        (lambda whole: whole.update(c=torch.ones(1)), r"the algorithm has no c \(1 tensors"),
        (lambda whole: whole.update(b=whole["b"].double()), r"b is \(2,\) torch.float64 in the file"),
        (lambda whole: whole.update(b=torch.ones(2, 1)), r"b is \(2, 1\) torch.float32 in the file"),
    ],
)
def test_the_file_has_the_tensors_of_the_algorithm(change, said):
    own = {"a": torch.zeros(3), "b": torch.zeros(2)}
    weights._check(own, own)
    found = dict(own)
    change(found)
    with pytest.raises(ConfigError, match=said):
        weights._check(own, found)


@pytest.mark.parametrize("cut", [0, 4, 100, -1])
def test_a_file_cut_short_is_damaged(cut, tmp_path):
    (tmp_path / "w").write_bytes(safetensors.torch.save({"a": torch.zeros(300)})[:cut])
    with pytest.raises(ConfigError, match="not a whole safetensors file"):
        weights.place({"weights": str(tmp_path / "w")}, None)


def test_code_of_a_stranger_runs_only_where_that_is_said(bundle, tmp_path):
    with pytest.raises(ConfigError, match=r"code of its own: plugins/mine\.py \(SHA-256 \w+\.\.\.\).*--trust-code"):
        rerun(bundle, out=tmp_path / "again", watch=Silent())
    assert not (tmp_path / "again").exists()


def test_a_row_of_another_device_runs_on_the_one_that_is_asked_for(honest, tmp_path):
    run = Path(shutil.copytree(honest, tmp_path / "cuda"))
    rewrite(run, {"pixel-nn": rows(run)["pixel-nn"]})
    for file in ("manifest.json", "measurements.jsonl", "samples.jsonl"):
        text = (run / file).read_text().replace("cpu-float32", "cuda-float32")
        (run / file).write_text(text.replace('"device": "cpu"', '"device": "cuda"'))
    found = rerun(run, out=tmp_path / "again", watch=Silent(), device="cpu")
    (row,) = found.record.rows
    assert (row.outcome, found.exit_code) == ("agrees", 0)
    assert "/cuda-float32/" in row.cell and "/cpu-float32/" in row.again_cell


def test_nothing_that_could_be_run_again_is_no_success(again):
    record = again[0].record
    rows = tuple(row.model_copy(update={"outcome": "not re-run"}) for row in record.rows)
    assert Rerun(again[0].folder, record.model_copy(update={"rows": rows})).exit_code == 3
    assert Rerun(again[0].folder, record.model_copy(update={"rows": (rows[0], *record.rows[1:])})).exit_code == 0


def test_without_weights_it_says_which_step_was_left_out(honest, tmp_path):
    run = Path(shutil.copytree(honest, tmp_path / "bare"))
    changed = {"protonet": rows(run)["protonet"]}
    rewrite(run, changed)
    bare = pack(run, tmp_path, submitter="Ada")
    with pytest.raises(NothingRan, match=r"were not handed in \(metabench leaderboard pack --weights\)") as caught:
        rerun(bare, out=tmp_path / "again", watch=Silent())
    assert caught.value.exit_code == 3
    file = run / "weights" / changed["protonet"]["facts"]["weights"]
    file.write_bytes(file.read_bytes()[:-1] + b"x")
    with pytest.raises(NothingRan, match="is damaged: its hash is not its name"):
        rerun(run, out=tmp_path / "again", watch=Silent())
    file.unlink()
    with pytest.raises(StoreError, match="they are not there"):
        pack(run, tmp_path, submitter="Ada", weights=True)
    del changed["protonet"]["facts"]["weights"]
    rewrite(run, changed)
    with pytest.raises(StoreError, match="--keep-weights --no-resume"):
        pack(run, tmp_path, submitter="Ada", weights=True)
    with pytest.raises(NothingRan, match=r"no weights were kept of its training \(metabench run --keep-weights\)"):
        rerun(run, out=tmp_path / "again", watch=Silent())


def test_a_bundle_with_weights_has_the_same_bytes(honest, bundle, tmp_path):
    import zipfile

    other = pack(honest, tmp_path, submitter="Ada", weights=True)
    assert other.read_bytes() == bundle.read_bytes()
    names = {name.partition("/")[2] for name in zipfile.ZipFile(other).namelist()}
    assert "plugins/mine.py" in names and sum(name.startswith("weights/") for name in names) == 2
    light = pack(honest, tmp_path, submitter="Ada")
    assert not any("weights/" in name or "plugins/" in name for name in zipfile.ZipFile(light).namelist())


def test_a_record_speaks_of_the_very_rows_it_saw(again, honest, bundle, work, tmp_path):
    """Another submitter's name on the same rows, a row that changed, other code: no trust comes along."""
    stolen = pack(honest, tmp_path, submitter="Mallory", weights=True)
    (board,) = leaderboard([stolen], tmp_path / "a", reruns=[work / "again"]).boards
    assert {one.trust for one in board.standings} == {"claimed"}
    better = pack(forged(honest, tmp_path), tmp_path, submitter="Ada", weights=True)
    (board,) = leaderboard([better], tmp_path / "b", reruns=[work / "again"]).boards
    assert {one.label: one.trust for one in board.standings} == {
        "protonet": "claimed", "scaled-protonet": "re-run", "pixel-nn": "re-run",
    }  # fmt: skip
    run = Path(shutil.copytree(honest, tmp_path / "other-code"))
    with (run / "plugins/mine.py").open("a") as file:
        file.write("# changed\n")
    changed = pack(run, tmp_path, submitter="Ada", weights=True)
    (board,) = leaderboard([changed], tmp_path / "c", reruns=[work / "again"]).boards
    assert {one.trust for one in board.standings} == {"claimed"}


def test_a_submitter_cannot_bring_a_record(again, honest, bundle, work, tmp_path):
    import zipfile

    run = Path(shutil.copytree(honest, tmp_path / "with-record"))
    shutil.copy(again[0].folder / rerunfile.NAME, run)
    for attempt in (lambda: leaderboard([run], tmp_path / "s"), lambda: rerun(run, out=tmp_path, watch=Silent())):
        with pytest.raises(StoreError, match="re-run"):
            attempt()
    packed = Path(shutil.copy(bundle, tmp_path))
    with zipfile.ZipFile(packed, "a") as archive:
        archive.writestr(f"{honest.name}/{rerunfile.NAME}", "{}")
    with pytest.raises(StoreError, match="does not belong in a bundle"):
        leaderboard([packed], tmp_path / "s")


def test_a_seed_that_was_given_gives_no_trust(again, bundle, work, tmp_path):
    record = json.loads((again[0].folder / rerunfile.NAME).read_text())
    (tmp_path / rerunfile.NAME).write_text(json.dumps({**record, "drawn": False}))
    (board,) = leaderboard([bundle], tmp_path / "site", reruns=[tmp_path]).boards
    assert {one.trust for one in board.standings} == {"claimed"}


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"schema_version": 2}', "NOT"])
def test_a_damaged_record_is_named(text, bundle, tmp_path):
    (tmp_path / rerunfile.NAME).write_text(text)
    with pytest.raises(StoreError, match=r"rerun\.json: damaged"):
        leaderboard([bundle], tmp_path / "site", reruns=[tmp_path])


def test_an_empty_folder_of_records_is_a_mistake(bundle, tmp_path):
    with pytest.raises(StoreError, match=r"no rerun\.json in it"):
        leaderboard([bundle], tmp_path / "site", reruns=[tmp_path])


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"episodes": 3}, "30 at least"),
        ({"seed": -1}, "0 or more"),
        ({"seed": 2**63}, "below"),
        ({"seed": SEED}, "the submission's own"),
    ],
)
def test_wrong_questions(options, said, honest, tmp_path):
    with pytest.raises(ConfigError, match=said):
        rerun(honest, out=tmp_path, watch=Silent(), **options)


def test_a_finished_run_says_that_it_keeps_no_weights(honest, work):
    suite, watch = load_suite(work / "mine.yaml"), Silent()
    bare = Path(shutil.copytree(honest, work / "bare"))
    start(suite, out=work, extend=bare, watch=watch, keep_weights=True)
    assert watch.notes == []
    changed = rows(bare)
    for one in changed.values():
        one["facts"].pop("weights", None)
    rewrite(bare, changed)
    start(suite, out=work, extend=bare, watch=watch, keep_weights=True)
    assert watch.notes == ["2 finished rows keep no weights: add --no-resume to measure them anew, with weights"]


def test_the_command_process_never_loads_torch():
    code = "import sys, metabench.leaderboard.rerun; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False, env=environ()).returncode == 0


# the test of a claim


def scores(rng, mean, n):
    """Accuracies of episodes of 25 queries, as dispersed as real ones."""
    hard = np.clip(rng.normal(mean, 0.08, size=n), 0, 1)
    return rng.binomial(25, hard) / 25


def test_the_test_is_welchs():
    rng = np.random.default_rng(1)
    for higher in (True, False):
        a, b = scores(rng, 0.7, 60), scores(rng, 0.68, 90)
        (found,) = judge([(a, b, higher)])
        side = "greater" if higher else "less"
        wanted = distributions.ttest_ind(a, b, equal_var=False, alternative=side)
        assert found.p == pytest.approx(wanted.pvalue, rel=1e-9)


@pytest.mark.parametrize("mean", [0.3, 0.6, 0.97])
def test_an_honest_family_is_refused_at_most_as_often_as_stated(mean):
    rng = np.random.default_rng(7)
    trials, hits = 1000, 0
    for _ in range(trials):
        family = [(scores(rng, mean, 40), scores(rng, mean, 40), True) for _ in range(4)]
        hits += any(found.p < ALPHA for found in judge(family))
    assert distributions.binomtest(hits, trials, ALPHA, alternative="greater").pvalue > 0.001, hits


def test_the_visible_excess_is_found_four_times_in_five():
    rng = np.random.default_rng(3)
    plain_scores = [(scores(rng, 0.6, 200), scores(rng, 0.6, 200), True) for _ in range(50)]
    visible = float(np.mean([judge([one])[0].visible for one in plain_scores]))
    hits = sum(judge([(scores(rng, 0.6 + visible, 200), scores(rng, 0.6, 200), True)])[0].p < ALPHA for _ in range(400))
    assert 0.72 < hits / 400 < 0.88, (hits, visible)


def test_scores_without_spread():
    same, worse = np.full(40, 0.2), np.full(40, 0.1)
    assert [one.p for one in judge([(same, same, True)])] == [1.0]
    assert [one.p for one in judge([(same, worse, True)])] == [0.0]
    assert [one.p for one in judge([(same, worse, False)])] == [1.0]
    assert judge([]) == []
