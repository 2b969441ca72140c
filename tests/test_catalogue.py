from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from metabench.catalogue import Catalogue, Parameter, catalogue
from metabench.errors import ConfigError, WorkerError

ALGORITHM = '''"""Mine: a method for tests.

More of it.
"""
from typing import Literal
import no_such_module_anywhere  # reading the file must not run it

METABENCH = {
    "kind": "algorithm",
    "name": "mine",
    "family": "metric",
    "feeds": "episodes",
    "problems": ["classification"],
    "train": {"steps": 10},
}


def build(problem, *, steps: int, lr: float = 1, norm: Literal["running", "batch"] = "running",
          depth: Literal[1, 2] | None = None, name: str = "x", flag: bool = False):
    pass
'''
DATASET = '''"""Dots."""
METABENCH = {
    "kind": "dataset", "name": "dots", "problem": "classification", "images_per_class": 10,
    "splits": {"big": {"train": 8, "val": 4, "test": 6}},
}
def build(*, split: str = "big", size: int = 8): return (split, size)
'''


def write(folder: Path, text: str, name: str = "mine.py") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


def error(*files: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        catalogue(files)
    return str(caught.value)


def test_reads_a_plugin_without_running_it(tmp_path: Path) -> None:
    file = write(tmp_path, ALGORITHM)
    mine = catalogue([file]).algorithm("mine")
    assert (mine.kind, mine.name, mine.file, mine.module) == ("algorithm", "mine", file, None)
    assert mine.summary == "Mine: a method for tests."
    assert mine.meta["train"] == {"steps": 10}
    assert (mine.meta["control"], mine.meta["paper"], mine.meta["url"]) == (False, "", "")
    assert mine.parameters == (
        Parameter(name="steps", types=("int",), required=True),
        Parameter(name="lr", types=("float",), default=1.0),
        Parameter(name="norm", types=("str",), choices=("running", "batch"), default="running"),
        Parameter(name="depth", types=("int",), choices=(1, 2), optional=True),
        Parameter(name="name", types=("str",), default="x"),
        Parameter(name="flag", types=("bool",), default=False),
    )


def test_check_names_every_problem(tmp_path: Path) -> None:
    mine = catalogue([write(tmp_path, ALGORITHM)]).algorithm("mine")
    assert mine.check({"steps": 3, "lr": 2, "depth": None, "flag": True}) == []
    problems = mine.check({"lrr": 1, "lr": "1e-3", "norm": "bach", "depth": 3, "flag": 1, "name": None})
    assert problems == [
        "mine has no parameter 'lrr' (did you mean 'lr'?)",
        "mine: lr must be float, not '1e-3'",
        "mine: norm must be one of running, batch, not 'bach' (did you mean 'batch'?)",
        "mine: depth must be one of 1, 2 or null, not 3",
        "mine: flag must be bool, not 1",
        "mine: name must be str, not None",
        "mine: steps has no default: give it a value",
    ]


@pytest.mark.parametrize("value", [True, 1.0, "1", None, float("nan"), [1]])
def test_only_an_int_is_an_int(value: object) -> None:
    assert Parameter(name="n", types=("int",)).check(value) is not None


@pytest.mark.parametrize(("value", "good"), [(1, True), (0.5, True), (True, False), (float("inf"), False)])
def test_an_int_will_do_for_a_float(value: object, good: bool) -> None:
    assert (Parameter(name="x", types=("float",)).check(value) is None) == good


def test_a_choice_has_its_type() -> None:
    one = Parameter(name="n", types=("int",), choices=(1, 2))
    assert one.check(1) is None
    assert one.check(True) is not None and one.check(1.0) is not None


def test_resolve_gives_all_parameters_in_one_form(tmp_path: Path) -> None:
    mine = catalogue([write(tmp_path, ALGORITHM)]).algorithm("mine")
    resolved = mine.resolve({"steps": 3, "lr": 2})
    assert resolved == {"steps": 3, "lr": 2.0, "norm": "running", "depth": None, "name": "x", "flag": False}
    assert isinstance(resolved["lr"], float)
    assert str(mine.resolve({"steps": 3, "lr": -0.0})["lr"]) == "0.0"
    with pytest.raises(ConfigError, match="steps has no default"):
        mine.resolve({})


def test_load_imports_a_file_once(tmp_path: Path) -> None:
    dots = catalogue([write(tmp_path, DATASET, "dots.py")]).dataset("dots")
    module = dots.load()
    assert module.build(size=9) == ("big", 9)
    assert dots.load() is module and sys.modules[module.__name__] is module


def test_load_says_why_it_failed(tmp_path: Path) -> None:
    mine = catalogue([write(tmp_path, ALGORITHM)]).algorithm("mine")
    with pytest.raises(WorkerError, match=r"mine\.py.*no_such_module_anywhere"):
        mine.load()


def test_unknown_names_get_a_suggestion(tmp_path: Path) -> None:
    known = catalogue([write(tmp_path, ALGORITHM), write(tmp_path, DATASET, "dots.py")])
    with pytest.raises(ConfigError, match=r"unknown algorithm 'mien' \(did you mean 'mine'\?\)"):
        known.algorithm("mien")
    with pytest.raises(ConfigError, match=r"unknown data set 'dot' \(did you mean 'dots'\?\)"):
        known.dataset("dot")


@pytest.mark.parametrize(
    ("old", "new", "line", "message"),
    [
        ("METABENCH = {", "NOTHING = {", 1, "add METABENCH"),
        ('"name": "mine",', "", 8, "'name' is missing"),
        ('"name": "mine"', '"name": "a/b"', 10, "'name' must be letters, digits"),
        ('"family": "metric"', '"familly": "metric"', 11, "unknown key 'familly' (did you mean 'family'?)"),
        ('"family": "metric"', '"family": "metric", "papers": "x"', 11, "unknown key 'papers' (did you mean 'paper'?)"),
        ('"kind": "algorithm"', '"kind": "algo"', 9, "'kind' must be 'algorithm' or 'dataset', not 'algo'"),
        ('"feeds": "episodes"', '"feeds": "episode"', 12, "'feeds' must be"),
        ('["classification"]', "[]", 13, "'problems' must be"),
        ('["classification"]', '["ranking"]', 13, "'problems' must be"),
        ('{"steps": 10}', '{"stepps": 10}', 14, "unknown key 'stepps' (did you mean 'steps'?)"),
        ('{"steps": 10}', '{"steps": 10, "images": 9}', 14, "one budget at most"),
        ('{"steps": 10}', '{"steps": 0}', 14, "above 0"),
        ('{"steps": 10}', '{"ways": 1}', 14, "at least 2"),
        ('{"steps": 10}', "dict(steps=10)", 8, "literals only"),
        ('"""Mine: a method for tests.', '"""', 1, None),
        ("def build(", "def built(", 1, "add def build(problem: Problem, *, ...)"),
        ("def build(problem, *,", "def build(*,", 18, "build must read"),
        ("def build(problem, *,", "def build(problem, more=1, *,", 18, "build must read"),
        ("flag: bool = False)", "**others)", 18, "build must read"),
        ("lr: float = 1", "lr = 1", 18, "lr: annotate it"),
        ("lr: float = 1", "lr: int | float = 1", 18, "lr: annotate it"),
        ("lr: float = 1", "lr: Literal[1, True] = 1", 18, "lr: annotate it"),
        ("lr: float = 1", "lr: float = 'high'", 18, "the default does not fit"),
        ("lr: float = 1", "lr: float = RATE", 18, "must be a literal, not RATE"),
        ("flag: bool", "train: bool", 18, "'train' has another meaning"),
        ('"running", "batch"]', '"running", None]', 18, "norm must be a str"),
        ("    pass", "    pass pass", 20, "not valid Python"),
    ],
)
def test_a_broken_plugin_is_named_with_its_line(
    tmp_path: Path, old: str, new: str, line: int, message: str | None
) -> None:
    assert old in ALGORITHM
    file = write(tmp_path, ALGORITHM.replace(old, new, 1))
    if message is None:  # the summary is then the next line of the docstring
        assert catalogue([file]).algorithm("mine").summary == "More of it."
        return
    text = error(file)
    assert text.startswith(f"{file}:{line}: ") and message in text


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"images_per_class": 10,', "", "also needs 'images_per_class'"),
        ('"val": 4, ', "", "class counts of train, val and test"),
        ('"val": 4', '"val": "4"', "whole numbers"),
        ('{"big": ', '{"b=g": ', "letters, digits"),
        ("split: str = ", "half: str = ", "must take the split"),
        ("size: int", "rotations: int", "'rotations' has another meaning"),
        ('"classification"', '"sorting"', "'problem' must be"),
    ],
)
def test_a_broken_data_set_is_explained(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in DATASET
    assert message in error(write(tmp_path, DATASET.replace(old, new), "dots.py"))


def test_every_mistake_is_reported_at_once(tmp_path: Path) -> None:
    broken = write(tmp_path, "def", "broken.py")
    bytes_file = tmp_path / "bytes.py"
    bytes_file.write_bytes(b"x = '\0'")
    text = error(tmp_path / "missing.py", broken, tmp_path, bytes_file)
    lines = text.splitlines()
    assert len(lines) == 4
    assert "missing.py: there is no such file" in lines[0]
    assert "broken.py:1: not valid Python" in lines[1]
    assert "is a folder" in lines[2]
    assert "bytes.py:1" in lines[3]


def test_a_name_can_be_taken_only_once(tmp_path: Path) -> None:
    first, second = write(tmp_path, ALGORITHM), write(tmp_path, ALGORITHM, "other.py")
    assert f"{second}:1: the name 'mine' is taken by {first}" in error(first, second)
    assert catalogue([first, first]).algorithm("mine").file == first


def test_an_algorithm_and_a_data_set_may_share_a_name(tmp_path: Path) -> None:
    known = catalogue([write(tmp_path, ALGORITHM), write(tmp_path, DATASET.replace('"dots"', '"mine"'), "dots.py")])
    assert (known.algorithm("mine").kind, known.dataset("mine").kind) == ("algorithm", "dataset")


def package(folder: Path, module: str) -> None:
    """Lay out an installed package that declares one entry point, and that must not be imported."""
    inside = folder / "mypackage" / "methods"
    inside.mkdir(parents=True)
    (folder / "mypackage" / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (inside / "__init__.py").write_text("raise RuntimeError('imported')\n")
    (inside / "mine.py").write_text(ALGORITHM)
    info = folder / "mypackage-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: mypackage\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[metabench.algorithms]\nmine = {module}\n")


def test_an_entry_point_is_found_without_importing_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package(tmp_path, "mypackage.methods.mine")
    monkeypatch.syspath_prepend(str(tmp_path))
    mine = catalogue().algorithm("mine")
    assert mine.module == "mypackage.methods.mine"
    assert mine.file == tmp_path / "mypackage" / "methods" / "mine.py"
    assert "mypackage" not in sys.modules


@pytest.mark.parametrize("module", ["mypackage.methods.gone", "mypackage.gone.mine", "no_such_package.mine"])
def test_an_entry_point_that_leads_nowhere_is_an_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, module: str
) -> None:
    package(tmp_path, module)
    monkeypatch.syspath_prepend(str(tmp_path))
    assert f"entry point 'mine' of metabench.algorithms: no file for module {module!r}" in error()


@pytest.fixture(scope="module")
def builtin() -> Catalogue:
    return catalogue()


def test_everything_built_in_can_be_read(builtin: Catalogue) -> None:
    assert builtin.algorithms and builtin.datasets
    for plugin in [*builtin.algorithms.values(), *builtin.datasets.values()]:
        assert plugin.summary.endswith(".") and plugin.module
        assert plugin.check({one.name: one.default for one in plugin.parameters}) == []
    for plugin in builtin.datasets.values():
        split = plugin.parameter("split")
        assert split is not None and split.default == next(iter(plugin.meta["splits"]))
        assert not split.choices or set(split.choices) == set(plugin.meta["splits"])
    for plugin in builtin.algorithms.values():
        assert (plugin.meta["family"] == "control") == plugin.meta["control"]


def test_reading_imports_nothing_heavy() -> None:
    code = (
        "import sys; from metabench.catalogue import catalogue; import metabench.cells; catalogue();"
        "print([name for name in ('torch', 'numpy', 'pandas', 'scipy', 'pydantic', 'yaml') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
