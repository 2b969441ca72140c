"""What users read: every command and flag is explained, and what the documents name exists."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import typer.main
import yaml

import metabench
from metabench.cli import app
from metabench.suite import load_suite, shipped_suites

ROOT = Path(__file__).parent.parent
RESULTS = sorted((ROOT / "results" / "reference").glob("*/README.md"))
DOCUMENTS = [file for file in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md")), *RESULTS) if file.is_file()]


def _named(file):
    return str(file.relative_to(ROOT))


def commands(command=None, name=()):
    """(words, command) of every command there is."""
    command = command or typer.main.get_command(app)
    yield name, command
    for word, sub in getattr(command, "commands", {}).items():
        yield from commands(sub, (*name, word))


COMMANDS = dict(commands())


@pytest.mark.parametrize("words", COMMANDS, ids=" ".join)
def test_every_command_and_flag_has_help(words):
    command = COMMANDS[words]
    assert command.help, words
    for parameter in command.params:
        assert getattr(parameter, "help", None) or parameter.name in ("help",), (words, parameter.name)


def test_the_contract_of_exit_codes_stands_in_the_help_of_the_module():
    from metabench import cli

    for code in ("0 good", "2 usage", "3 a cell failed", "130 interrupted"):
        assert code in (cli.__doc__ or "")


def _blocks(text):
    """(language, code) of every fenced block of a document."""
    return re.findall(r"^```([^\n]*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


def _strings(value):
    """Every string in plain data."""
    if isinstance(value, dict):
        yield from _strings([*value.values()])
    elif isinstance(value, list):
        for one in value:
            yield from _strings(one)
    elif isinstance(value, str):
        yield value


def _scripts(text):
    """The code of a document, line by line as a shell sees it; of YAML what stands in it, folded and joined."""
    for language, code in _blocks(text):
        pieces = _strings(yaml.safe_load(code)) if language == "yaml" else [code]
        for piece in pieces:
            yield from re.sub(r"\\\n\s*", " ", piece).splitlines()
    yield from re.findall(r"`([^`\n]+)`", text)


def _called(text):
    """The words of every metabench command in the code of a document."""
    for line in _scripts(text):
        for command in re.split(r"\|\||&&|;", line.split("#")[0]):
            found = re.match(r"\s*(?:\$ )?metabench\s+(.*)", command)
            if found:
                yield found[1].split()


def test_the_commands_in_a_workflow_are_found():
    text = """```yaml
jobs:
  one:
    - run: metabench check a.yaml --base HEAD^1
    - run: |
        metabench run b.yaml --seeds 0
        metabench check --baseline c \\
          --only counts
script:
  - test -d bench || metabench ls
  - >
    metabench data
    ls
  - pip install metabench
```"""
    assert [" ".join(words) for words in _called(text)] == [
        "check a.yaml --base HEAD^1", "run b.yaml --seeds 0", "check --baseline c --only counts", "ls", "data ls"
    ]  # fmt: skip
    found = [" ".join(words) for words in _called((ROOT / "docs/ci.md").read_text(encoding="utf-8"))]
    for words in ("check bench/gate.yaml --base", "check --baseline bench/baseline/gate", "run bench/gate.yaml --out"):
        assert sum(call.startswith(words) for call in found) >= 2, words


@pytest.mark.parametrize("file", DOCUMENTS, ids=_named)
def test_commands_flags_and_suites_in_the_documents_exist(file):
    for called in _called(file.read_text(encoding="utf-8")):
        words = tuple(word for word in called if not word.startswith("-"))
        name = next((words[:n] for n in (2, 1, 0) if words[:n] in COMMANDS), ())
        assert name or not words, f"{file.name}: no command {called[0]!r}"
        default = getattr(COMMANDS[name], "default_command", None)
        name = (*name, default) if default else name
        flags = {flag for p in COMMANDS[name].params for flag in (*p.opts, *p.secondary_opts)} | {"-h", "--help"}
        for word in called:
            flag = word.partition("=")[0].strip("[]")
            assert not flag.startswith("-") or flag in flags, f"{file.name}: {' '.join(called)}: no {flag}"


def _yaml(file, key):
    """Those blocks of YAML in a document that have a top-level key, as text."""
    blocks = _blocks((ROOT / file).read_text(encoding="utf-8"))
    return [code for language, code in blocks if language == "yaml" and key in yaml.safe_load(code)]


def test_the_workflows_have_steps_and_save_what_the_others_restore():
    (text,) = _yaml("docs/ci.md", "jobs")
    jobs = yaml.safe_load(text)["jobs"]
    assert set(jobs) == {"pull-request", "nightly"}
    assert all(("run" in step) != ("uses" in step) for job in jobs.values() for step in job["steps"])
    caches = {job: [step["with"] for step in jobs[job]["steps"] if "cache" in step.get("uses", "")] for job in jobs}
    assert caches["pull-request"] == caches["nightly"] and len(caches["nightly"]) == 1
    (text,) = _yaml("docs/ci.md", "metabench")
    for name, job in yaml.safe_load(text).items():
        assert all(isinstance(line, str) for line in job["script"]), f"{name}: a colon made a line a mapping"
        assert job["cache"]["paths"] == ["bench/baseline/"]


def test_the_workflows_install_this_version():
    text = (ROOT / "docs/ci.md").read_text(encoding="utf-8")
    wheels = re.findall(r"metabench-([0-9][^-\s]*)-py3-none-any\.whl", text)
    assert len(wheels) == 2 and {*wheels} == {metabench.__version__}


def test_the_suite_of_the_workflows_is_one(tmp_path):
    (text,) = _yaml("docs/ci.md", "suite")
    method = (ROOT / "docs/examples/scaled_protonet.py").read_text(encoding="utf-8")
    (tmp_path / "my_method.py").write_text(method.replace("scaled-protonet", "my-method"), encoding="utf-8")
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench/gate.yaml").write_text(text, encoding="utf-8")
    suite = load_suite(tmp_path / "bench/gate.yaml")
    assert suite.name == "gate" and [cell.algorithm for cell in suite.cells()] == ["my-method"]
    (measures,) = suite.points.values()
    assert {"accuracy", "adapt_time", "meta_step_time", "meta_step_flops"} == {*measures}


def test_the_margins_shown_are_those_of_a_suite(tmp_path):
    (text,) = _yaml("docs/ci.md", "thresholds")
    grid = "grid: {tasks: [{dataset: glyphs, ways: 5, shots: 1, queries: 5}], algorithms: [reptile]}\n"
    (tmp_path / "mine.yaml").write_text(f"{grid}train: {{steps: 1}}\n{text}", encoding="utf-8")
    assert len(load_suite(tmp_path / "mine.yaml").thresholds["overrides"]) == 2


@pytest.mark.parametrize("file", DOCUMENTS, ids=_named)
def test_links_inside_the_repository_lead_somewhere(file):
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", file.read_text(encoding="utf-8")):
        assert "://" in target or target.startswith("mailto:") or (file.parent / target).exists(), target


@pytest.mark.parametrize("file", DOCUMENTS, ids=_named)
def test_patterns_in_commands_match_run_folders_and_nothing_else(file):
    for pattern in re.findall(r"results/reference/[^\s`'\"]*\*[^\s`'\"]*", file.read_text(encoding="utf-8")):
        found = [path for path in ROOT.glob(pattern.rstrip("/")) if path.is_dir() or not pattern.endswith("/")]
        assert found and all((folder / "manifest.json").is_file() for folder in found), (pattern, found)


def test_every_shipped_suite_says_what_it_is_for():
    assert shipped_suites()
    for name in shipped_suites():
        assert load_suite(name).description, name


def test_the_generated_parts_of_the_readme_are_up_to_date():
    check = [sys.executable, "docs/update_readme.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr


def test_the_example_plugin_is_a_valid_suite_of_two_methods():
    suite = load_suite(ROOT / "docs/examples/mine.yaml")
    assert {cell.algorithm for cell in suite.cells()} >= {"protonet", "scaled-protonet"}


def test_committed_results_name_no_folder_of_one_machine():
    manifests = sorted((ROOT / "results/reference").rglob("manifest.json"))
    assert manifests
    for file in manifests:
        argv = json.loads(file.read_text(encoding="utf-8"))["argv"]
        assert not [word for word in argv if Path(word).is_absolute()], file
