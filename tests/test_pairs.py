"""What one pair of processes comes to, and which paths each side's workers import from."""

from __future__ import annotations

import math
import os
import sys

import numpy as np
import pytest

from metabench.costs import Setting
from metabench.pairs import Fault, Item, Name, Pairs, Side, log_ratio, module_path, top_names, tracked_names


def test_a_pair_is_the_median_of_paired_ratios_so_drift_of_the_machine_cancels():
    rng = np.random.default_rng(0)
    drift = np.exp(np.cumsum(0.2 * rng.standard_normal(51)))  # the machine's speed wanders by tens of per cent
    slices = {0: [(0.01 * d, 0.01 * d * 1.05 * math.exp(0.01 * rng.standard_normal())) for d in drift]}
    assert log_ratio(slices) == pytest.approx(math.log(1.05), abs=0.005)
    slices[0][7] = (0.01, 9.0)
    assert log_ratio(slices) == pytest.approx(math.log(1.05), abs=0.005), "one wild slice is no matter"
    backwards = {0: [(c, b) for b, c in slices[0]]}
    assert log_ratio(backwards) == pytest.approx(-log_ratio(slices))


def test_an_inner_step_is_the_ratio_of_slopes():
    rng = np.random.default_rng(1)

    def slices(step, more):
        drift = np.exp(0.3 * rng.standard_normal(60))
        return {k: [((0.002 + k * step) * d, (0.002 + k * step * more) * d) for d in drift] for k in (1, 3, 5)}

    assert log_ratio(slices(0.001, 1.2)) == pytest.approx(math.log(1.2), abs=0.02)
    assert log_ratio(slices(0.001, 1.0)) == pytest.approx(0, abs=1e-9)
    assert log_ratio(slices(-0.0001, 1.0)) is None


def test_each_side_imports_the_project_from_its_own_tree(tmp_path, monkeypatch):
    root, tree, elsewhere = (tmp_path / name for name in ("root", "tree", "elsewhere"))
    inside = root / ".venv" / "lib" / "python3" / "site-packages"
    for folder in (root / "src" / "mine", inside / "theirs", elsewhere, tree):
        folder.mkdir(parents=True)
    (root / "src" / "mine" / "__init__.py").touch()
    (root / "src" / "json.py").touch()
    (root / "tool.py").touch()
    monkeypatch.setattr(sys, "path", [str(root / "src"), str(inside), str(elsewhere), *sys.path])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(elsewhere), str(root / "src")]))
    found = module_path(root, tree)["PYTHONPATH"].split(os.pathsep)
    assert found == [str(tree / "src"), str(elsewhere)]
    assert top_names(root) == {"mine"}, "neither installed packages nor names of the standard library"
    monkeypatch.chdir(root)
    monkeypatch.setattr(sys, "path", ["", *sys.path])
    assert module_path(root, tree)["PYTHONPATH"].split(os.pathsep)[0] == str(tree)
    assert "tool" in top_names(root)


def test_a_repository_gives_its_packages_and_modules_names_but_not_its_tests_and_foreign_code():
    ours = ["tool.py", "src/flat.py", "src/mine/__init__.py", "src/mine/deep/__init__.py", "src/space/part/a.py"]
    assert tracked_names(ours) == {"tool", "flat", "mine", "space"}
    assert tracked_names(["python/lib/other/__init__.py", "python/lib/other/x.py"]) == {"other"}
    others = ["tests/__init__.py", "docs/conf.py", "third_party/numpy/__init__.py", "scripts/torch.py", "json.py"]
    assert tracked_names(others) == set(), "an installed numpy or torch is no copy of these"


def test_what_metabench_itself_needs_is_never_the_projects():
    assert tracked_names(["backends/torch/__init__.py", "yaml.py", "mine.py"]) == {"mine"}
    assert tracked_names(["easyfsl/__init__.py"]) == {"easyfsl"}, "but what only its extras need may be"


def test_a_row_that_loses_some_pairs_stays_and_one_that_loses_many_is_given_up(tmp_path):
    name = Name("maml/dots", "inner_step_time")
    items = [Item(name, {}, Setting(1, "kept"))]
    pairs = Pairs(Side("base", "b"), Side("candidate", "c"), items, tmp_path, seconds=1.0, seed=0)
    pairs.taken = 20
    for _ in range(5):
        pairs._lose(name)
        assert name in pairs.items and not pairs.faults
    pairs._lose(name)
    assert name not in pairs.items
    assert pairs.faults[name] == Fault("both sides", "failed", pairs.faults[name].reason)
    assert "less than the noise" in pairs.faults[name].reason
