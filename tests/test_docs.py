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


def _called(text):
    """The words of every metabench command in the code of a document."""
    code = re.findall(r"```[^\n]*\n(.*?)```", text, re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
    for piece in code:
        for line in piece.splitlines():
            found = re.match(r"\s*(?:\$ )?metabench\s+(.*)", line.split("#")[0])
            if found:
                yield found[1].split()


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
