"""What determines a number: the hash of the sources, and the jobs that rows become."""

from __future__ import annotations

from dataclasses import replace

from metabench import plan
from metabench.store import Run
from metabench.suite import load_suite


def test_source_hash_follows_the_text_but_not_its_line_ends(tmp_path):
    file = tmp_path / "mine.py"

    def digest(text):
        file.write_bytes(text.encode())
        plan.source_hash.cache_clear()
        return plan.source_hash((file,))

    first = digest("import torch\nx = 1\n")
    assert digest("import torch\r\nx = 1\r\n") == first
    assert digest("import torch\nx = 2\n") != first


def test_source_hash_covers_what_is_imported_however_far(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("from metabench.algorithms.fomaml import build\n", encoding="utf-8")
    names = {found.name for found in plan.imported_files((file, plan.PACKAGE / "measure.py"))}
    assert {"mine.py", "fomaml.py", "maml.py", "base.py", "backbones.py", "episodes.py", "scoring.py"} <= names
    assert not {"terminal.py", "runner.py", "protonet.py"} & names  # what makes no number makes no row stale


def test_trainings_are_shared_by_the_tasks_that_state_them_and_costs_are_no_part_of_them():
    suite = load_suite("quickstart")
    rows = plan.rows_of(suite)
    jobs = plan.jobs_of(rows)
    assert {row for job in jobs for row in job.rows} == {row for row in rows if not row.kernel}
    assert {row.measure for row in rows if row.kernel} == {"adapt_time"}
    (protonet,) = [job for job in jobs if job.rows[0].cell.algorithm == "protonet"]
    assert {row.cell.shots for row in protonet.rows} == {1, 5}


def test_rows_of_an_earlier_plan_stay_only_while_their_code_does(tmp_path):
    suite = load_suite("smoke")
    rows = plan.rows_of(suite)
    manifest = plan.manifest_of(suite, rows, None)
    seeds = plan.override(suite, seeds=[7])
    kept = plan.manifest_of(seeds, plan.rows_of(seeds), Run(tmp_path, manifest))
    assert len(kept["rows"]) == 2 * len(rows)
    for row in manifest["rows"]:
        if row["cell"].startswith("protonet"):
            row["sources"] = "older"
    dropped = plan.manifest_of(seeds, plan.rows_of(seeds), Run(tmp_path, manifest))
    old = [row for row in dropped["rows"] if not row["cell"].endswith("seed7")]
    assert old and not any(row["cell"].startswith("protonet") for row in old)


def test_more_test_episodes_stale_scores_but_no_training_time():
    suite = load_suite("smoke")
    more = replace(suite, evaluation=replace(suite.evaluation, episodes=51))
    changed = {a.measure for a, b in zip(plan.rows_of(suite), plan.rows_of(more), strict=True) if a.hash != b.hash}
    assert changed == {"accuracy", "mse", "mse_before"}


def test_packaged_data_that_a_source_names_belongs_to_its_hash():
    names = {file.name for file in plan.imported_files([plan.PACKAGE / "datasets" / "omniglot.py"])}
    assert "omniglot-classes.json" in names and "published.csv" not in names
