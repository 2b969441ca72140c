"""The walls: who may import whom, and which commands never load torch."""

from __future__ import annotations

import ast
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import environ
from stored_runs import Stored

import metabench

PACKAGE = Path(metabench.__file__).parent
NOBODY: set[str] = set()
ANY = {"errors"}  # everybody may
SUITES = {"catalogue", "cells", "suite", "suitefile"}
COMPARISONS = {"compare", "export", "verdicts", "verdict_report"}
TASKS = {"episodes", "backbones", "tasks"}

# who may import what, of metabench; a folder stands for all in it. Imports run downwards only.
ALLOWED: dict[str, set[str]] = {
    "__init__": NOBODY,
    "__main__": {"cli"},
    "errors": NOBODY,
    # the suite half
    "catalogue": NOBODY,
    "cells": {"catalogue"},
    "thresholds": NOBODY,
    "document": NOBODY,
    "suitefile": {"catalogue", "cells", "document", "thresholds"},
    "suite": {"catalogue", "cells", "document", "suitefile"},
    # the plain half
    "stats": NOBODY,
    "environment": NOBODY,
    "disk": NOBODY,
    "store": {"cells", "disk"},
    "roofline": NOBODY,
    "verdicts": NOBODY,
    "joint": {"thresholds", "verdicts"},
    "sides": {"cells", "store"},
    "compare": {"cells", "disk", "environment", "joint", "sides", "stats", "thresholds", "verdicts"},
    "spreadsheet": NOBODY,
    "verdict_report": {"spreadsheet", "verdicts"},
    "export": {"sides", "verdict_report"},
    "report": {"cells", "disk", "environment", "report", "roofline", "store", "stats"},
    "leaderboard": {
        "catalogue",
        "cells",
        "disk",
        "document",
        "environment",
        "leaderboard",
        "plan",
        "report",
        "runner",
        "spreadsheet",
        "stats",
        "store",
        "suite",
        "suitefile",
    },  # runner and what it needs: for rerun alone
    "signedranks": {"stats"},
    "judging": {"signedranks", "stats", "suite", "thresholds", "verdicts"},
    "scratch": NOBODY,
    "revisions": {"scratch"},
    # the torch half
    "timing": NOBODY,
    "counts": NOBODY,
    "roofs": NOBODY,
    "episodes": NOBODY,
    "convolution": NOBODY,
    "backbones": {"convolution"},
    "tasks": {"convolution"},
    "algorithms": {"algorithms", "convolution", *TASKS},
    "datasets": {"datasets", "episodes"},
    "scoring": {"algorithms", "disk", *TASKS},
    "training": {"algorithms", "scoring", *TASKS},
    "measure": {"algorithms", "datasets", "scoring", "training", *TASKS},
    "kernels": {"algorithms", *TASKS},
    "bench": {"counts", "kernels", "measure", "roofs", "timing"},
    # the bridge
    "plan": {"store", *SUITES},
    "workers": {"environment"},
    "costs": {"environment", "plan", "store", "workers", *SUITES},
    "pairs": {"costs", "environment", "workers"},
    "gate": {
        "costs",
        "environment",
        "joint",
        "judging",
        "pairs",
        "plan",
        "revisions",
        "scratch",
        "signedranks",
        "stats",
        "thresholds",
        "verdicts",
        "workers",
        *SUITES,
    },
    "trials": {"judging", "pairs", "stats"},
    "selftest": {
        "environment",
        "gate",
        "judging",
        "pairs",
        "plan",
        "scratch",
        "signedranks",
        "stats",
        "suite",
        "thresholds",
        "trials",
    },
    "keptweights": {"plan", "store", "suite"},
    "runner": {"costs", "keptweights", "plan", "store", "environment", "stats", "workers", *SUITES},
    "weights": {"disk", "measure", "training"},
    "worker": {"bench", "catalogue", "environment", "measure", "scoring", "weights"},
    "probe": {"environment", "roofs", "timing"},
    "doctor": {"environment"},
    "recount": {"catalogue", "cells", "episodes"},
    # the top
    "progress": {"runner", "store"},
    "listing": {"datasets", *SUITES},
    "cli": {
        "cli",
        "doctor",
        "gate",
        "keptweights",
        "leaderboard",
        "listing",
        "plan",
        "progress",
        "report",
        "runner",
        "selftest",
        "store",
        *COMPARISONS,
        *SUITES,
    },
}
PLAIN = (
    "suite", "cells", "suitefile", "catalogue", "store", "environment", "stats", "roofline", "verdicts", "doctor",
    "plan", "workers", "costs", "keptweights", "runner", "report", "cli", "thresholds", "joint", "sides", "compare",
    "verdict_report", "export", "leaderboard", "signedranks", "judging", "scratch", "revisions", "pairs", "gate",
    "selftest", "trials", "spreadsheet", "disk", "document",
)  # fmt: skip
FILES = sorted(PACKAGE.rglob("*.py"))


def module(file):
    """'report.load' of metabench/report/load.py, 'report' of its __init__."""
    parts = file.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


def imported(file):
    """(line, module of metabench or name of another package) of every import, wherever it stands."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}:{node.lineno}: a relative import"
            names = [f"{node.module}.{a.name}" if node.module == "metabench" else node.module for a in node.names]
        else:
            continue
        yield from ((node.lineno, name) for name in names if name)


def layer(name):
    return name.split(".")[0]


@pytest.mark.parametrize("file", FILES, ids=module)
def test_imports_run_downwards_only(file):
    me = layer(module(file))
    assert me in ALLOWED, f"a new module: say in {Path(__file__).name} what it may import"
    for line, name in imported(file):
        if not name.startswith("metabench."):
            continue
        other = layer(name.removeprefix("metabench."))
        exists = (PACKAGE / other).is_dir() or (PACKAGE / f"{other}.py").is_file()
        if exists and other not in ALLOWED[me] | ANY:
            raise AssertionError(f"{file.name}:{line}: {me} must not import {name}")


def test_the_table_names_no_module_that_is_gone():
    known = {layer(module(file)) for file in FILES}
    assert {name for name in ALLOWED if name not in known} == set()


def test_the_table_has_no_circle():
    def below(name, path):
        assert name not in path, f"a circle: {path}"
        for other in ALLOWED[name] - {name}:
            below(other, (*path, name))

    for name in ALLOWED:
        below(name, ())


@pytest.mark.parametrize("file", [f for f in FILES if layer(module(f)) in PLAIN], ids=module)
def test_the_plain_half_never_names_torch(file):
    assert "torch" not in {layer(name) for _, name in imported(file)}


@pytest.mark.parametrize("file", [f for f in FILES if layer(module(f)) == "algorithms"], ids=module)
def test_an_algorithm_sees_no_clock_no_store_and_no_path(file):
    assert not {layer(name) for _, name in imported(file)} & {"time", "pathlib", "os", "psutil", "io", "json"}


DRIVER = """
import sys
from metabench.cli import main
for command in {commands!r}:
    sys.argv = ["metabench", *command]
    try:
        main()
    except SystemExit as end:
        assert not end.code, (command, end.code)
    print(*command, sorted({heavy!r} & sys.modules.keys()), file=sys.stderr)
"""


def loaded(commands, heavy):
    """What of `heavy` is loaded after the commands, one after the other in one process."""
    code = DRIVER.format(commands=commands, heavy=heavy)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environ(), check=False)
    assert done.returncode == 0, done.stderr
    return {line.rpartition(" [")[0]: line.rpartition(" [")[2] for line in done.stderr.splitlines() if "[" in line}


def test_help_loads_nothing_heavy():
    start = time.perf_counter()
    heavy = {"torch", "numpy", "pandas", "scipy", "yaml", "psutil"}
    found = loaded([["--help"]], {*heavy, "pydantic"})
    print(f"--help: {time.perf_counter() - start:.2f} s")
    found |= loaded([["run", "--help"], ["--version"]], heavy)  # typer itself may load pydantic for parameters
    assert len(found) == 3
    assert set(found.values()) == {"]"}, found


def test_commands_that_only_read_never_load_torch(tmp_path):
    from metabench.store import Run

    manifest = {"suite": "s", "controls": [], "cells": {}, "rows": [], "evaluation": {}, "reference": None}
    run = Run.create(tmp_path, "s", manifest)
    full = Stored().count(10).at(tmp_path, "full")
    commands = [
        ["ls"], ["ls", "--json"], ["validate", "smoke"], ["validate", "--schema"], ["run", "smoke", "--plan"],
        ["report", str(run.path), "-f", "csv"], ["report", str(run.path)],
        ["compare", str(full), str(full)], ["export", str(full), "--to", "bencher"],
    ]  # fmt: skip
    found = loaded(commands, {"torch"})
    assert len(found) == len(commands)
    assert set(found.values()) == {"]"}, found
