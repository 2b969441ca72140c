"""The gate with real git repositories and real workers: what it says, which code it ran, and what it leaves behind."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import psutil
import pytest
from conftest import DOTS, environ, metabench, started, until, write_learner

import metabench as package
from metabench import gate
from metabench.errors import ConfigError, MetabenchError, NothingRan
from metabench.revisions import Repository
from metabench.signedranks import centre
from metabench.suite import load_suite
from metabench.verdicts import conclude

ROOT = Path(package.__file__).parent.parent

SLOWER = "sum(range(20_000))"  # beside an adaptation of a fraction of a millisecond
GATE = "gate: {alpha: 0.5, looks: [1], seconds: 0.1}"  # one pair decides: for changes that nobody can miss


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


def write(folder, *, sabotage="pass", settings=GATE, measures="adapt_time", algorithms="learner"):
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
            train: {{steps: 3}}
            {settings}
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


class Notes:
    """A gate.Watch that keeps what it is told."""

    def __init__(self):
        self.said = ""

    def pair(self, stage, number, of, rows):
        self.said += f"{stage} {number}\n"

    def note(self, text):
        self.said += f"{text}\n"


@pytest.fixture
def here(project, monkeypatch):
    """`gate.check` of the project's suite in this process, from its folder: (Findings, what was said)."""
    scratch = project.parent / "scratch"
    scratch.mkdir(exist_ok=True)
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    monkeypatch.chdir(project)

    def run(suite="mine.yaml", base="HEAD", **more):
        watch = Notes()
        return gate.check(load_suite(Path(suite)), base=base, watch=watch, **more), watch.said

    return run


def exit_code(found):
    return conclude([found])[1]


def pairs(found):
    """The pairs of processes that the times rest on; 0 where none was needed."""
    return next((int(m[1]) for note in found.notes if (m := re.search(r"in (\d+) pairs of processes", note))), 0)


def identical(found):
    return gate.IDENTICAL in found.notes


def outcomes(found):
    return {one.measure: one.outcome for one in found.verdicts}


def left(folder):
    """What a check has left in the temporary folder and among the repository's worktrees."""
    scratch = folder.parent / "scratch"  # torch makes a folder of its own there
    return [one for one in scratch.iterdir() if one.name.startswith("metabench")], git(
        folder, "worktree", "list"
    ).splitlines()[1:]


def test_a_slower_kernel_is_a_regression(project):
    write(project, sabotage=SLOWER)
    done = check("mine.yaml", "--base", "HEAD", folder=project)
    assert done.returncode == 1, done.stderr + done.stdout
    assert "1 regressed" in done.stdout and "in 2 pairs" in " ".join(done.stdout.split()), "one, and one to confirm"
    assert done.stderr.count("changes that are not committed") == 1
    assert left(project) == ([], [])
    assert git(project, "status", "--porcelain") == "M learner.py", "and nothing else is touched"


def test_identical_code_is_said_and_not_measured_unless_asked(here):
    found, _ = here(base="main")
    assert identical(found) and pairs(found) == 0 and exit_code(found) == 0
    (one,) = found.verdicts
    assert (one.outcome, one.change, one.low, one.reason) == ("unchanged", 0.0, None, "identical code: not measured")
    found, _ = here(base="main", measure_identical=True)
    assert identical(found) and pairs(found) >= 1 and {one.name for one in found.controls} == {"matmul", "python"}
    assert found.verdicts[0].detectable is not None or found.verdicts[0].low is not None


def test_controls_that_move_contaminate_all_times(here, monkeypatch):
    monkeypatch.setattr(gate, "moved", lambda ratios, margin: centre([0.07 + 0.0 * ratios[0]]))
    found, _ = here(measure_identical=True)
    assert exit_code(found) == 4 and "python by +7.3%" in found.contaminated and found.controls[0].moved
    assert [(one.outcome, one.reason) for one in found.verdicts] == [
        ("inconclusive", f"contaminated: {found.contaminated}")
    ]
    assert pairs(found) == 1, "and nothing is confirmed"


def test_a_helper_module_and_data_in_its_package_are_part_of_the_code(project, here, monkeypatch):
    helper = project / "src" / "helper"
    helper.mkdir(parents=True)
    monkeypatch.syspath_prepend(str(project / "src"))
    (helper / "__init__.py").write_text("def work(learner, x):\n    learner.embedding(x)\n")
    (helper / "table.json").write_text("[1]")
    write(project, sabotage="__import__('helper').work(self, support.x.flatten(2))", measures="adapt_flops")
    git(project, "add", ".")
    git(project, "commit", "-m", "with a helper")
    (project / "README.md").write_text("of no matter")
    assert identical(here()[0])
    (helper / "table.json").write_text("[2]")
    found, _ = here()
    assert not identical(found) and outcomes(found) == {"adapt_flops": "unchanged"}
    (helper / "__init__.py").write_text("def work(learner, x):\n    learner.embedding(x), learner.embedding(x)\n")
    found, _ = here()
    assert outcomes(found) == {"adapt_flops": "regressed"}, "the base has its own helper"
    assert exit_code(found) == 1


def test_an_installed_copy_of_the_projects_module_is_refused_by_name(project, here, monkeypatch):
    installed = project.parent / "elsewhere" / "site-packages"
    for folder in (installed / "helper", project / "helper"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("def work():\n    pass\n")
    monkeypatch.syspath_prepend(str(project))
    sabotage = f"import sys; sys.path.insert(0, {str(installed)!r}); __import__('helper').work()"
    write(project, sabotage=sabotage, measures="adapt_flops")
    git(project, "add", ".")
    git(project, "commit", "-m", "with a helper")
    with pytest.raises(ConfigError, match=r"loaded helper from .*site-packages.*outside its own tree"):
        here()
    assert left(project) == ([], [])


def test_an_installed_copy_of_a_src_layout_is_refused_though_no_module_path_leads_to_its_source(project, here):
    installed = project.parent / "elsewhere" / "site-packages"
    for folder in (installed / "helper", project / "src" / "helper"):
        folder.mkdir(parents=True)
        (folder / "__init__.py").write_text("def work():\n    pass\n")
    sabotage = f"import sys; sys.path.insert(0, {str(installed)!r}); __import__('helper').work()"
    write(project, sabotage=sabotage, measures="adapt_flops")
    git(project, "add", ".")
    git(project, "commit", "-m", "with a helper")
    (project / "src" / "helper" / "__init__.py").write_text("def work():\n    return sum(range(1000))\n")
    with pytest.raises(ConfigError, match=r"loaded helper from .*site-packages.*uninstall that copy"):
        here()
    assert left(project) == ([], [])


def test_neither_the_index_nor_the_tree_of_the_user_is_written_to(project, here):
    (project / "learner.py").touch()  # git would now like to refresh what its index holds of it
    index = project / ".git" / "index"
    before = index.read_bytes(), index.stat().st_mtime_ns
    files = sorted(project.rglob("*.py*"))
    here()
    assert (index.read_bytes(), index.stat().st_mtime_ns) == before
    assert sorted(project.rglob("*.py*")) == files and not list(project.rglob("__pycache__"))


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="metabench is not in a repository here")
def test_metabench_itself_is_taken_from_each_side(tmp_path):
    folder = tmp_path / "clone"
    git(tmp_path, "clone", "--shared", str(ROOT), str(folder))
    for changed in git(ROOT, "ls-files", "-mo", "--exclude-standard", "metabench", "suites").splitlines():
        (folder / changed).parent.mkdir(parents=True, exist_ok=True)
        (folder / changed).write_bytes((ROOT / changed).read_bytes())
    suite = write(folder / "suites", measures="adapt_flops")
    git(folder, "add", ".")
    git(folder, "commit", "-m", "as it is")
    source = folder / "metabench" / "kernels.py"
    text = source.read_text()
    twice = "            algorithm.adapt(episode.support, seeds=episode.seeds, steps=steps)\n"
    once = "            return algorithm.adapt("
    source.write_text(text.replace(once, twice + once))
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
    source = folder / "metabench" / "worker.py"
    good = source.read_text()
    source.write_text("raise SystemExit('no worker today')\n")
    done = check(suite, "--base", "HEAD~1", folder=folder, PYTHONPATH=str(folder))
    assert done.returncode == 3 and "candidate (the working tree, " in done.stderr, done.stderr
    assert "cannot be run: no worker today" in done.stderr and "another base" not in done.stderr
    git(folder, "commit", "-qam", "no worker")
    source.write_text(good)
    done = check(suite, "--base", "HEAD", folder=folder, PYTHONPATH=str(folder))
    assert done.returncode == 2 and "cannot be run: no worker today; choose another base" in done.stderr, done.stderr
    assert left(folder) == ([], [])


def test_a_base_that_cannot_be_imported_is_an_incomparable_row(project, here):
    good = (project / "learner.py").read_text()
    (project / "learner.py").write_text(good.replace("import os, time\n", "import os, time\nimport no_such_module\n"))
    git(project, "commit", "-am", "broken")
    (project / "learner.py").write_text(good)
    found, _ = here()
    assert outcomes(found) == {"adapt_time": "incomparable"} and exit_code(found) == 3 and not identical(found)
    assert found.verdicts[0].reason.startswith("base: ") and "no_such_module" in found.verdicts[0].reason


def test_a_candidate_that_dies_is_a_failed_cell_and_the_others_go_on(project, here):
    write_learner(project, "other")
    suite = project / "mine.yaml"
    suite.write_text(
        suite.read_text().replace("learner.py]", "learner.py, other.py]").replace("[learner]", "[learner, other]")
    )
    git(project, "add", ".")
    git(project, "commit", "-m", "two")
    write_learner(project, "learner", "os._exit(7)")
    found, _ = here()
    (failed,) = found.failed
    assert exit_code(found) == 3 and failed.reason.startswith("the worker ended with exit code 7")
    (second,) = found.verdicts
    assert failed.cell.startswith("learner/") and second.cell.startswith("other/") and second.outcome != "incomparable"


def test_what_the_base_does_not_know_yet(project, here):
    source = (project / "learner.py").read_text()
    (project / "learner.py").write_text(source.replace("lr: float = 0.01", "lr: float = 0.02, depth: int = 1"))
    write_learner(project, "newcomer")
    more = "[learner, newcomer, {name: learner, params: {depth: 2}}]"
    suite = write(project, measures="adapt_flops").read_text()
    (project / "learner.py").write_text(source.replace("lr: float = 0.01", "lr: float = 0.02, depth: int = 1"))
    (project / "mine.yaml").write_text(
        suite.replace("learner.py]", "learner.py, newcomer.py]").replace("[learner]", more)
    )
    found, said = here()
    reasons = [one.reason for one in found.verdicts if one.outcome == "incomparable"]
    assert reasons == ["base: newcomer is not there yet", "base: learner has no parameter depth there"]
    assert [one.outcome for one in found.verdicts] == ["incomparable", "incomparable", "unchanged"]
    assert "has no parameter depth yet and runs without" in said
    assert "the default of lr is 0.02 now, 0.01 in the base" in said


def test_a_default_of_the_data_set_that_changed_is_the_same_on_both_sides(project, here):
    source = DOTS.strip().replace("np.ones((3, 3)", "np.ones((size // 4, size // 4)").replace("12, 12)", "size, size)")
    data = {
        size: source.replace('split: str = "only"', f'split: str = "only", size: int = {size}') for size in (12, 16)
    }
    (project / "dots.py").write_text(data[16])  # which the method could not do
    git(project, "commit", "-qam", "larger")
    write(project, measures="adapt_flops")
    (project / "dots.py").write_text(data[12])
    found, said = here()
    assert outcomes(found) == {"adapt_flops": "unchanged"}, found.verdicts
    assert "dots: the default of size is 12 now, 16 in the base: both sides run with the former" in said


def test_what_neither_side_can_do_is_left_out_and_what_only_one_can_is_said(project, here):
    never = "raise __import__('metabench.errors', fromlist=['errors']).Unsupported('not yet')"
    measures = "adapt_flops, adapt_time, meta_step_nodes"
    write(project, sabotage=never, measures=measures)
    git(project, "commit", "-qam", "cannot")
    found, said = here()
    assert found.verdicts == () and found.failed == () and said.count("1 rows are left out: not yet") == 1
    write(project, measures=measures)
    found, _ = here()
    assert {one.reason for one in found.verdicts} == {"base: not yet"} and len(found.verdicts) == 3
    write(project, sabotage="raise RuntimeError('broken')", measures=measures)
    git(project, "commit", "-qam", "broken")
    found, _ = here()
    assert all(one.reason.startswith("both sides: RuntimeError: broken") for one in found.verdicts), found.verdicts
    assert {one.outcome for one in found.verdicts} == {"incomparable"} and exit_code(found) == 3


@pytest.mark.skipif(shutil.which("nvidia-smi") is None, reason="no GPU here")
def test_a_slower_kernel_on_a_gpu_is_a_regression(project, here):
    suite = write(project, sabotage="__import__('torch').cuda._sleep(20_000_000)")  # about 10 ms of the device's own
    suite.write_text(suite.read_text().replace("  tasks:", "  devices: [cuda]\n  tasks:"))
    found, _ = here()
    assert outcomes(found) == {"adapt_time": "regressed"} and pairs(found) == 2


@pytest.mark.skipif(shutil.which("nvidia-smi") is not None, reason="there is a GPU here")
def test_counts_of_a_device_that_is_not_there_are_left_out(project, here):
    suite = write(project, measures="adapt_flops", sabotage="self.embedding(support.x.flatten(2))")
    suite.write_text(suite.read_text().replace("  tasks:", "  devices: [cpu, cuda]\n  tasks:"))
    found, said = here()
    assert outcomes(found) == {"adapt_flops": "regressed"} and len(found.verdicts) == 1 and found.failed == ()
    assert "1 rows are left out: no CUDA device on this machine" in said


def test_every_setting_tells_what_it_loads_and_has_controls_of_its_own(project, here):
    write_learner(project, "other")
    suite = write(project, settings=GATE.replace("[1]", "[2]"))
    grid = suite.read_text().partition("grid:\n")[2].partition("threads:")[0]
    again = textwrap.indent(textwrap.dedent(grid), "    ").replace("    tasks", "  - tasks", 1)
    second = again.replace("[learner]", "[other]") + "    calls: [{allocator: default}]\n"
    text = suite.read_text().replace(grid, again + second).replace("learner.py]", "learner.py, other.py]")
    suite.write_text(text)
    git(project, "add", ".")
    git(project, "commit", "-qm", "two settings")
    assert identical(here()[0])
    write_learner(project, "other", SLOWER)
    found, _ = here()
    assert {one.cell.partition("/")[0]: one.outcome for one in found.verdicts}["other"] == "regressed"
    assert {one.name for one in found.controls} == {
        f"{name} (1 threads, {allocator})" for name in ("matmul", "python") for allocator in ("kept", "default")
    }


def test_code_that_is_edited_during_the_check_decides_nothing(project, here, monkeypatch):
    class Editor(Notes):
        def pair(self, stage, number, of, rows):
            if stage == "pair":
                write_learner(project, "learner", "None")

    write(project, sabotage=SLOWER)
    with pytest.raises(ConfigError, match=r"learner\.py changed during the check.*run it again"):
        gate.check(load_suite(Path("mine.yaml")), base="HEAD", watch=Editor())
    assert left(project) == ([], [])


def test_metabench_in_a_virtual_environment_inside_the_project_is_not_of_the_project(project):
    packages = project / ".venv" / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    shutil.copytree(ROOT / "metabench", packages / "metabench", ignore=shutil.ignore_patterns("__pycache__"))
    write(project, algorithms="learner, chance")
    (project / ".gitignore").write_text(".venv\n__pycache__\nsteps.log\n")
    git(project, "add", ".")
    git(project, "commit", "-qm", "with a control of metabench's own")
    done = check("mine.yaml", "--base", "HEAD", folder=project, PYTHONPATH=str(packages))
    assert done.returncode == 0 and "2 unchanged" in done.stdout, done.stdout + done.stderr


def test_counts_are_compared_exactly_without_pairs(project, here):
    wanted = "adapt_flops, meta_step_nodes, accuracy"
    write(project, measures=wanted, sabotage="self.embedding(support.x.flatten(2))")
    found, said = here()
    assert outcomes(found) == {"adapt_flops": "regressed", "meta_step_nodes": "unchanged"}
    assert pairs(found) == 0 and exit_code(found) == 1 and found.verdicts[0].change > 0
    assert "1 rows are no times or counts" in said


def test_a_worker_that_dies_while_counting_takes_one_row_with_it(project, here):
    git(project, "add", ".")
    within_a_count = "torch.utils._python_dispatch._get_current_dispatch_mode_stack()"
    write(project, measures="adapt_flops, meta_step_nodes", sabotage=f"{within_a_count} and os._exit(7)")
    found, _ = here()
    (failed,) = found.failed
    assert exit_code(found) == 3 and failed.measure == "adapt_flops"
    assert failed.reason.startswith("the worker ended with exit code 7")
    assert outcomes(found) == {"meta_step_nodes": "unchanged"}, "counted by fresh workers"


def test_messages_for_what_is_not_there(project, here, tmp_path, monkeypatch):
    for options, says in (
        ({"base": None}, "--base REVISION"),
        ({"base": "nowhere"}, "no such revision"),
        ({"base": "-x"}, "no such revision"),
        ({"select": "nothing"}, "no row"),
        ({"base": None, "base_python": Path("/no/python")}, "neither an interpreter nor"),
        ({"base_python": Path("/no/python")}, "what to compare with"),
    ):
        with pytest.raises(MetabenchError, match=says):
            here(**options)
    plain = tmp_path / "plain"
    plain.mkdir()
    with pytest.raises(ConfigError, match="not a git repository"):
        here(suite=write(plain))
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="needs git"):
        here()


def test_a_git_hook_does_not_mislead_git(project, here, monkeypatch):
    monkeypatch.setenv("GIT_DIR", str(project / "nowhere"))
    monkeypatch.setenv("GIT_INDEX_FILE", "nowhere")
    with pytest.raises(NothingRan):
        here(select="nothing")


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
    repository = Repository.around(clone / "mine.yaml")
    with pytest.raises(ConfigError, match=re.escape(line)):
        repository.commit(name)
    git(clone, *line.split()[1:])
    assert repository.commit(name) == first


def interpreter(folder, line):
    """A virtual environment with the packages of this one, whose interpreter runs `line` at its start."""
    python = folder / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    (folder / "pyvenv.cfg").write_text(f"home = {Path(sys.executable).resolve().parent}\n")
    packages = next(p for p in sys.path if p.endswith("site-packages"))
    site = folder / "lib" / f"python3.{sys.version_info.minor}" / "site-packages"
    site.mkdir(parents=True)
    (site / "real.pth").write_text(packages + "\n")
    (site / "own.pth").write_text(f"import builtins, sys; {line}\n")
    return python


def test_the_same_code_between_two_interpreters(project, here, tmp_path):
    slow = interpreter(tmp_path / "other", "builtins.SLOW = True")
    slower = "'SLOW' not in vars(__import__('builtins')) and self.embedding(support.x.flatten(2))"
    write(project, sabotage=slower, measures="adapt_flops")
    found, _ = here(base=None, base_python=tmp_path / "other")
    assert outcomes(found) == {"adapt_flops": "regressed"} and str(slow) in found.title


@pytest.mark.parametrize(
    "line, says",
    [
        ("sys.modules['torch'] = None", "import of torch halted"),  # as where it is not installed
        ("'metabench.worker' in sys.orig_argv and sys.exit('not today')", "not today"),
    ],
    ids=["no torch", "ends at once"],
)
def test_an_interpreter_whose_worker_does_not_start_is_named_with_the_reason(project, here, tmp_path, line, says):
    python = interpreter(tmp_path / "other", line)
    with pytest.raises(ConfigError, match=rf"base \({re.escape(str(python))}\) cannot be run: .*{says}.*another base"):
        here(base=None, base_python=python)
    assert left(project) == ([], [])


def workers_of(process):
    """The living workers that a process has started."""
    with contextlib.suppress(psutil.Error):  # one may end between two looks at it
        found = [one for one in process.children() if one.is_running() and one.status() != psutil.STATUS_ZOMBIE]
        return [one for one in found if "metabench.worker" in " ".join(one.cmdline())]
    return []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGKILL])
def test_nothing_is_left_after_an_interruption(project, sent, monkeypatch):
    scratch = project.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.chdir(project)
    write(project, sabotage="time.sleep(0.01)", settings="gate: {looks: [200], seconds: 0.1}")
    with started("check", "mine.yaml", "--base", "HEAD") as process:
        me = psutil.Process(process.pid)
        until(lambda: len(workers_of(me)) == 2, "two workers")
        workers = workers_of(me)
        assert len(left(project)[1]) == 1, "the worktree is there meanwhile"
        process.send_signal(sent)
        process.wait(timeout=30)
        psutil.wait_procs(workers, timeout=30)
        assert not any(worker.is_running() for worker in workers)
    if sent == signal.SIGKILL:
        assert len(left(project)[1]) == 1, "nobody could remove it"
        for one in left(project)[0]:
            os.utime(one, (0, 0))  # long ago
        assert check("mine.yaml", "--base", "HEAD", "-k", "nothing", folder=project).returncode == 3
    else:
        assert process.returncode == 130
    assert left(project)[1] == []
    assert left(project)[0] == []


def test_two_checks_of_one_repository_at_once_leave_each_other_alone(project, monkeypatch):
    scratch = project.parent / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.chdir(project)
    write(project, sabotage="time.sleep(0.01)", settings=GATE)
    with (
        started("check", "mine.yaml", "--base", "HEAD") as first,
        started("check", "mine.yaml", "--base", "HEAD") as other,
    ):
        until(lambda: len(left(project)[1]) == 2, "two worktrees")
        for process in (first, other):
            said, errors = process.communicate(timeout=300)
            assert process.returncode == 1 and "1 regressed" in said, errors
    assert left(project) == ([], [])


def test_a_self_test_that_is_interrupted_keeps_its_trials_and_goes_on(project, monkeypatch):
    monkeypatch.chdir(project)
    out = project / "trials.jsonl"
    command = ("selftest", "mine.yaml", "--inject", "0", "--trials")
    with started(*command, 500, "--out", out) as process:
        until(lambda: out.exists() and len(out.read_text().splitlines()) > 1, "a trial")
        workers = workers_of(psutil.Process(process.pid))
        process.send_signal(signal.SIGINT)
        said, errors = process.communicate(timeout=60)
        assert process.returncode == 130 and "goes on from" in " ".join(errors.split()), errors
        assert "false alarms, rows: " in said
        psutil.wait_procs(workers, timeout=30)
        assert not any(worker.is_running() for worker in workers)
    kept = out.read_bytes()
    done = metabench(*command, len(kept.splitlines()) - 1, "--out", out)
    assert done.returncode == 0 and done.stdout == said and out.read_bytes() == kept, done.stderr


def test_an_interruption_while_git_makes_the_worktree_leaves_none(project, monkeypatch):
    scratch = project.parent / "scratch"
    slow = project.parent / "bin" / "git"
    for folder in (scratch, slow.parent):
        folder.mkdir()
    at = project.parent / "adding"
    slow.write_text(
        f'#!/bin/sh\ncase "$*" in *"worktree add"*) touch {at}; sleep 2;; esac\nexec {shutil.which("git")} "$@"\n'
    )
    slow.chmod(0o755)
    monkeypatch.setenv("TMPDIR", str(scratch))
    monkeypatch.setenv("PATH", f"{slow.parent}:{os.environ['PATH']}")
    monkeypatch.chdir(project)
    with started("check", "mine.yaml", "--base", "HEAD") as process:
        until(at.exists, "git at work")
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=30) == 130
    assert left(project) == ([], [])


def test_more_rows_than_the_pairs_can_decide(project, here):
    write(project, settings="gate: {looks: [5]}", sabotage="None")
    with pytest.raises(ConfigError, match="a last look at 7 or later"):
        here()
    assert left(project) == ([], [])
    done = metabench("selftest", "mine.yaml", "--trials", "1", cwd=project)
    assert done.returncode == 2 and "a last look at 7 or later" in " ".join(done.stderr.split()), done.stderr


def test_the_self_test_sees_what_it_injects_and_says_how_noisy_it_was(project):
    out = project / "trials.jsonl"
    done = metabench("selftest", "mine.yaml", "--inject", "200%", "--trials", "1", "--out", out, cwd=project)
    assert done.returncode == 0, done.stderr
    assert "found of +200%: 1 of 1" in done.stdout and "false alarms, rows: " in done.stdout
    assert "recommended for this machine:\ngate: {alpha: 0.5" in done.stdout
    settings, trial = (json.loads(line) for line in out.read_text().splitlines())
    assert settings["gate"]["alpha"] == 0.5 and settings["injected"] == [2.0]
    injected = [line for line in trial["rows"] if line["injected"] == 2.0]
    assert [line["outcome"] for line in injected] == ["regressed"]
    for line in injected:
        assert math.expm1(line["ln_change"]) > 0.5 and len(line["ln_ratios"]) == 2
    kept = out.read_bytes()
    with out.open("ab") as file:
        file.write(b'{"rows": [{"cell": "torn by a k')
    again = metabench("selftest", "mine.yaml", "--inject", "200%", "--trials", "1", "--out", out, cwd=project)
    assert again.returncode == 0 and again.stdout == done.stdout, "nothing is measured again"
    assert out.read_bytes() == kept
    other = metabench("selftest", "mine.yaml", "--inject", "100%", "--trials", "1", "--out", out, cwd=project)
    assert other.returncode == 2 and "holds trials with another injected" in other.stderr
