"""What determines a number: the hash of the sources, and the jobs that rows become."""

from __future__ import annotations

from metabench import plan
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
    assert not {"cli.py", "runner.py", "protonet.py"} & names  # what makes no number makes no row stale


def test_trainings_come_first_and_are_shared_by_the_tasks_that_state_them():
    suite = load_suite("quickstart")
    jobs = plan.jobs_of(plan.rows_of(suite))
    modes = [job.mode for job in jobs]
    assert modes == sorted(modes, reverse=True)  # "train" before "time": nothing else runs beside a timing
    (protonet,) = [job for job in jobs if job.mode == "train" and job.rows[0].cell.algorithm == "protonet"]
    assert {row.cell.shots for row in protonet.rows} == {1, 5}
