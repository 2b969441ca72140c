"""The gate with real git repositories and real workers: what it says, which code it ran, and what it leaves behind."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pytest
from conftest import DOTS, environ, metabench, started, until, write_learner

import metabench as package

ROOT = Path(package.__file__).parent.parent

SLOWER = "sum(range(20_000))"  # beside an adaptation of a fraction of a millisecond
GATE = "gate: {alpha: 0.2, looks: [5], seconds: 0.1}"


def git(folder, *arguments):
    identity = [
        "-c",
        "user.name=A",
        "-c",
        "user.email=a@b",
        "-c",
        "commit.gpgsign=false",
        "-c",
        "init.defaultBranch=main",
    ]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def write(folder, *, sabotage="pass", gate=GATE, measures="adapt_time", algorithms="learner"):
    """A project that holds a plug-in: its files and a suite of one kernel."""
    (folder / "dots.py").write_text(DOTS.strip() + "\n")
    write_learner(folder, "learner", sabotage)
    (folder / "mine.yaml").write_text(
        textwrap.dedent(f"""\
            plugins: [dots.py, learner.py]
            grid:
              tasks:
                - {{dataset: dots, ways: 3, shots: 1, queries: 2}}
              algorithms: [{algorithms}]
              measures: [{measures}]
            threads: 1
            controls: false
            {gate}
        """)
    )
    return folder / "mine.yaml"


@pytest.fixture
def project(tmp_path):
    """A repository with one commit."""
    folder = tmp_path / "project"
    folder.mkdir()
    write(folder)
    (folder / ".gitignore").write_text("__pycache__\nsteps.log\n")
    git(folder, "init")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "base")
    return folder


def check(*arguments, folder, **more):
    """`metabench check` in a folder, with temporary files of its own beside it: (process, nothing is left)."""
    scratch = folder.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    return metabench("check", *arguments, cwd=folder, env=environ(TMPDIR=str(scratch), **more))


def left(folder):
    """What a check has left in the temporary folder and among the repository's worktrees."""
    scratch = folder.parent / "scratch"
    return [*scratch.iterdir()], git(folder, "worktree", "list").splitlines()[1:]


def test_a_slower_kernel_is_a_regression_and_a_quicker_one_an_improvement(project):
    write(project, sabotage=SLOWER)
    done = check("mine.yaml", "--base", "HEAD", folder=project)
    assert done.returncode == 1, done.stderr + done.stdout
    assert "1 regressed" in done.stdout and "10 pairs" in done.stdout, "five, and five to confirm"
    assert "changes that are not committed" in done.stderr
    assert left(project) == ([], [])
    git(project, "commit", "-am", "slower")
    write(project)
    done = check("mine.yaml", "--base", "HEAD", folder=project)
    assert done.returncode == 0, done.stderr
    assert "1 improved" in done.stdout and "5 pairs" in done.stdout
    assert git(project, "status", "--porcelain") == "M learner.py", "and nothing else is touched"


def test_identical_code_is_said_and_not_measured_unless_asked(project):
    done = check("mine.yaml", "--base", "main", folder=project)
    assert done.returncode == 0, done.stderr
    assert "identical code" in done.stdout and "0 pairs" in done.stdout and "1 unchanged" in done.stdout
    done = check("mine.yaml", "--base", "main", "--measure-identical", folder=project)
    assert "identical code" in done.stdout and "5 pairs" in done.stdout, done.stdout + done.stderr
    assert "control python" in done.stdout and "control matmul" in done.stdout


def test_a_helper_module_and_data_in_its_package_are_part_of_the_code(project):
    helper = project / "src" / "helper"
    helper.mkdir(parents=True)
    (helper / "__init__.py").write_text("def work():\n    pass\n")
    (helper / "table.json").write_text("[1]")
    write(project, sabotage="__import__('helper').work()")
    git(project, "add", ".")
    git(project, "commit", "-m", "with a helper")
    source = str(project / "src")
    done = check("mine.yaml", "--base", "HEAD", folder=project, PYTHONPATH=f"{ROOT}:{source}")
    assert "identical code" in done.stdout, done.stdout + done.stderr
    (helper / "table.json").write_text("[2]")
    done = check("mine.yaml", "--base", "HEAD", folder=project, PYTHONPATH=f"{ROOT}:{source}")
    assert "identical code" not in done.stdout and "5 pairs" in done.stdout
    (helper / "__init__.py").write_text(f"def work():\n    {SLOWER}\n")
    done = check("mine.yaml", "--base", "HEAD", folder=project, PYTHONPATH=f"{ROOT}:{source}")
    assert done.returncode == 1, "the base has its own helper"


def test_an_installed_copy_of_the_projects_module_is_refused_by_name(project):
    installed = project.parent / "elsewhere" / "site-packages"
    for folder in (installed / "helper", project / "helper"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("def work():\n    pass\n")
    sabotage = f"import sys; sys.path.insert(0, {str(installed)!r}); __import__('helper').work()"
    write(project, sabotage=sabotage)
    git(project, "add", ".")
    git(project, "commit", "-m", "with a helper")
    done = check("mine.yaml", "--base", "HEAD", folder=project)
    assert done.returncode == 2, done.stdout + done.stderr
    assert (
        "loaded helper from" in done.stderr and "site-packages" in done.stderr and "outside its own tree" in done.stderr
    )
    assert left(project) == ([], [])


def test_metabench_itself_is_taken_from_each_side(tmp_path):
    folder = tmp_path / "clone"
    git(tmp_path, "clone", "--shared", str(ROOT), str(folder))
    for changed in git(ROOT, "ls-files", "-mo", "--exclude-standard", "metabench", "suites").splitlines():
        (folder / changed).parent.mkdir(parents=True, exist_ok=True)
        (folder / changed).write_bytes((ROOT / changed).read_bytes())
    git(folder, "add", ".")
    git(folder, "commit", "--allow-empty", "-m", "as it is")
    suite = write(folder / "suites")
    source = folder / "metabench" / "kernels.py"
    text = source.read_text()
    source.write_text(
        text.replace("    def thunk() -> object:\n", f"    def thunk() -> object:\n        {SLOWER}\n", 1)
    )
    assert source.read_text() != text
    done = check(suite, "--base", "HEAD", folder=folder, PYTHONPATH=str(folder))
    assert done.returncode == 1, done.stdout + done.stderr
    assert left(folder) == ([], [])
    source.write_text(text)
    worker = folder / "metabench" / "environment.py"
    now = worker.read_text()
    worker.write_text(re.sub(r"^PROTOCOL = \d+", "PROTOCOL = 1", now, flags=re.M))
    git(folder, "commit", "-qam", "an older protocol")
    worker.write_text(now)
    done = check(suite, "--base", "HEAD", folder=folder, PYTHONPATH=str(folder))
    assert done.returncode == 2 and "speaks protocol 1" in done.stderr, done.stderr


@pytest.mark.parametrize(
    "broken, says",
    [("import nonsense_that_is_not_there\n", "nonsense_that_is_not_there"), ("raise SystemExit(3)\n", "exit code 3")],
)
def test_a_base_that_cannot_be_imported_is_an_incomparable_row(project, broken, says):
    good = (project / "learner.py").read_text()
    (project / "learner.py").write_text(good.replace("import os, time\n", f"import os, time\n{broken}"))
    git(project, "commit", "-am", "broken")
    (project / "learner.py").write_text(good)
    done = check("mine.yaml", "--base", "HEAD", folder=project, COLUMNS="300")
    assert done.returncode == 0, done.stderr
    assert "1 incomparable" in done.stdout and "base: " in done.stdout and says in done.stdout


def test_a_candidate_that_cannot_be_imported_is_a_failed_cell(project):
    write(project, sabotage="raise ValueError('no such thing')")
    done = check("mine.yaml", "--base", "HEAD", folder=project, COLUMNS="300")
    assert done.returncode == 3, done.stdout + done.stderr
    assert "candidate: ValueError: no such thing" in done.stdout


def test_what_the_base_does_not_know_yet(project):
    source = (project / "learner.py").read_text()
    (project / "learner.py").write_text(source.replace("lr: float = 0.01", "lr: float = 0.02, depth: int = 1"))
    write_learner(project, "newcomer")
    (project / "mine.yaml").write_text(
        (project / "mine.yaml")
        .read_text()
        .replace("learner.py]", "learner.py, newcomer.py]")
        .replace("[learner]", "[learner, newcomer, {name: learner, params: {depth: 2}}]")
    )
    done = check("mine.yaml", "--base", "HEAD", folder=project, COLUMNS="300")
    assert done.returncode == 0, done.stderr
    assert "base: newcomer is not there yet" in done.stdout and "base: learner has no parameter depth" in done.stdout
    assert "has no parameter depth yet and runs without" in done.stderr
    assert "the default of lr is 0.02 now, 0.01 in the base" in done.stderr
    assert "2 incomparable" in done.stdout


def test_counts_are_compared_exactly_without_pairs(project):
    write(project, measures="adapt_flops, meta_step_nodes, accuracy")
    git(project, "commit", "-am", "counts")
    write(project, measures="adapt_flops, meta_step_nodes, accuracy", sabotage="self.embedding(support.x.flatten(2))")
    done = check("mine.yaml", "--base", "HEAD", folder=project, COLUMNS="300")
    assert done.returncode == 1, done.stderr
    assert "adapt_flops" in done.stdout and "1 regressed" in done.stdout and "1 unchanged" in done.stdout
    assert "0 pairs" in done.stdout and "1 rows are no times or counts" in done.stderr


def test_messages_for_what_is_not_there(project, tmp_path):
    for arguments, says in (
        (("mine.yaml",), "--base REVISION"),
        (("mine.yaml", "--base", "nowhere"), "no such revision"),
        (("mine.yaml", "--base", "-x"), "no such revision"),
        (("mine.yaml", "--base", "HEAD", "-k", "nothing"), "no row"),
        (("mine.yaml", "--base-python", "/no/python"), "neither an interpreter nor"),
    ):
        done = check(*arguments, folder=project)
        assert done.returncode in (2, 3) and says in done.stderr, (arguments, done.stderr)
    plain = tmp_path / "plain"
    plain.mkdir()
    done = check(write(plain), "--base", "HEAD", folder=plain)
    assert done.returncode == 2 and "not a git repository" in done.stderr
    done = check("mine.yaml", "--base", "HEAD", folder=project, PATH="/nowhere")
    assert done.returncode == 2 and "needs git" in done.stderr


@pytest.mark.parametrize(
    "name, line",
    [
        ("origin/old", "git fetch --depth=1 origin old:refs/remotes/origin/old"),
        ("HEAD~1", "git fetch --unshallow"),
        ("v1", "git fetch --depth=1 origin v1:v1"),
    ],
)
def test_a_shallow_clone_gets_the_line_to_run(project, tmp_path, name, line):
    first = git(project, "rev-parse", "HEAD")
    git(project, "branch", "old")
    git(project, "tag", "v1")
    write(project, sabotage=SLOWER)
    git(project, "commit", "-am", "second")
    clone = tmp_path / "shallow"
    git(tmp_path, "clone", "--depth=1", f"file://{project}", str(clone))
    done = check("mine.yaml", "--base", name, folder=clone)
    assert done.returncode == 2 and line in done.stderr, done.stderr
    git(clone, *line.split()[1:])
    assert git(clone, "rev-parse", name) == first
    done = check("mine.yaml", "--base", first[:10], "-k", "nothing", folder=clone)
    assert done.returncode == 3, "now it is there"


def test_the_same_code_between_two_interpreters(project, tmp_path):
    slow = tmp_path / "other" / "bin" / "python"
    slow.parent.mkdir(parents=True)
    slow.symlink_to(sys.executable)
    (slow.parent.parent / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    site = slow.parent.parent / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    (site / "real.pth").write_text(packages + "\n")
    (site / "slow.pth").write_text("import builtins; builtins.SLOW = True\n")
    write(
        project,
        sabotage="hasattr(__builtins__, 'SLOW') or isinstance(__builtins__, dict) and 'SLOW' in __builtins__ or "
        + SLOWER,
    )
    done = check("mine.yaml", "--base-python", tmp_path / "other", folder=project)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "1 regressed" in done.stdout


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_nothing_is_left_after_an_interruption(project, sent, monkeypatch):
    scratch = project.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.chdir(project)
    write(project, sabotage="time.sleep(0.01)", gate="gate: {looks: [200], seconds: 0.1}")
    with started("check", "mine.yaml", "--base", "HEAD") as process:
        me = psutil.Process(process.pid)
        until(lambda: sum("metabench.worker" in " ".join(p.cmdline()) for p in me.children()) == 2, "two workers")
        workers = me.children()
        assert len(left(project)[1]) == 1, "the worktree is there meanwhile"
        process.send_signal(sent)
        process.wait(timeout=30)
        psutil.wait_procs(workers, timeout=30)
        assert not any(worker.is_running() for worker in workers)
    if sent == signal.SIGKILL:
        assert len(left(project)[1]) == 1, "nobody could remove it"
        check("mine.yaml", "--base", "HEAD", "-k", "nothing", folder=project)
        check("mine.yaml", "--base", "HEAD", folder=project)
    else:
        assert process.returncode == 130
    assert left(project)[1] == []
    assert [one for one in left(project)[0] if one.name.startswith("metabench-base-")] == []
