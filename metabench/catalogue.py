"""What there is to run: the algorithms and data sets, found and described without importing any of them.

A plug-in is one Python file that holds a docstring (its first line is the summary), a literal dict `METABENCH` and a
function `build`. All three are read with `ast`, so that listing, validating and planning never import torch, never run
somebody else's code, and never fail because of it. Only `Plugin.load` imports, and only the worker calls it.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.machinery
import importlib.util
import math
import re
import sys
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from metabench.errors import ConfigError, WorkerError, did_you_mean

Value = None | bool | int | float | str
"""What a parameter may hold."""

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]*")
"""Names of algorithms, data sets, splits and suites: they stand unquoted in cell ids and as folder names."""

BUDGETS = ("steps", "episodes", "images", "seconds")
TRAIN_KEYS = ("ways", "shots", "queries", "stream", "tasks", "batch", *BUDGETS)
PROBLEMS = ("classification", "regression")
ANSWERED = (*PROBLEMS, "stream")  # by algorithms: a stream is another task on a classification data set

WITHIN = ("alphabet", "drawer")  # what all classes, or drawings, of a test task may have in common

_FOLDERS = ("algorithms", "datasets")
_TYPES = ("int", "float", "bool", "str")
# Words that a cell id or a suite already gives another meaning, by kind.
_RESERVED = {"algorithm": {"train"}, "dataset": {"rotations", "within"}}
_BUILD = {"algorithm": "def build(problem: Problem, *, ...)", "dataset": "def build(*, split: str = ..., ...)"}


@dataclass(frozen=True, kw_only=True)
class Parameter:
    """One keyword-only parameter of a plug-in's `build`.

    `types` names what it takes ("int", "float", "bool", "str": one, or all those of a `Literal`), `choices` the values
    of a `Literal` (empty: any value), `optional` whether None will do; a `required` parameter has no default.
    """

    name: str
    types: tuple[str, ...]
    choices: tuple[Value, ...] = ()
    default: Value = None
    optional: bool = False
    required: bool = False

    def check(self, value: object) -> str | None:
        """Return what is wrong with `value`, or None. An int will do for a float; a bool is never an int."""
        if self.choices:
            fits = any(type(choice) is type(value) and choice == value for choice in self.choices)
        else:
            fits = type(value).__name__ in self.types or (type(value) is int and self.types == ("float",))
        finite = not isinstance(value, float) or math.isfinite(value)
        if (fits and finite) or (value is None and self.optional):
            return None
        hint = did_you_mean(value, map(str, self.choices)) if isinstance(value, str) else ""
        return f"{self.name} must be {self.kind}, not {value!r}{hint if 'mean' in hint else ''}"

    def canonical(self, value: Value) -> Value:
        """Return the one form of a checked `value`: 1 given for a float is 1.0, and -0.0 is 0.0."""
        if type(value) is int and self.types == ("float",):
            return float(value)
        return value + 0.0 if isinstance(value, float) else value

    @property
    def kind(self) -> str:
        """What it takes, for people: 'one of running, batch', 'int', 'float or null'."""
        text = f"one of {', '.join(map(str, self.choices))}" if self.choices else self.types[0]
        return f"{text} or null" if self.optional else text


@dataclass(frozen=True, kw_only=True)
class Plugin:
    """An algorithm or a data set: where it is and what its file says about it, not yet imported.

    `meta` is its METABENCH with the optional keys filled in; `module` is None for a file named by its path.
    """

    kind: str
    name: str
    file: Path
    module: str | None
    summary: str
    meta: Mapping[str, Any] = field(compare=False, repr=False)
    parameters: tuple[Parameter, ...] = field(compare=False, repr=False)

    def parameter(self, name: str) -> Parameter | None:
        """Return the parameter of that name, or None."""
        return next((one for one in self.parameters if one.name == name), None)

    def check(self, params: Mapping[str, object]) -> list[str]:
        """Return every mistake in `params`, in the order given, missing ones last; empty when all is well."""
        return [*filter(None, map(self.wrong, params.keys(), params.values())), *self.missing(params)]

    def missing(self, names: Container[str]) -> list[str]:
        """Return a problem for each parameter without a default that is not among `names`."""
        required = [one.name for one in self.parameters if one.required and one.name not in names]
        return [f"{self.name}: {name} has no default: give it a value" for name in required]

    def wrong(self, name: str, value: object) -> str | None:
        """Return what is wrong with giving this one parameter, or None."""
        if (parameter := self.parameter(name)) is None:
            known = did_you_mean(name, [one.name for one in self.parameters]) or " (it takes none)"
            return f"{self.name} has no parameter {name!r}{known}"
        problem = parameter.check(value)
        return f"{self.name}: {problem}" if problem else None

    def resolve(self, params: Mapping[str, Value]) -> dict[str, Value]:
        """Return all parameters, defaults included, by name. Raises ConfigError if one is wrong."""
        if problems := self.check(params):
            raise ConfigError("; ".join(problems))
        return {one.name: one.canonical(params.get(one.name, one.default)) for one in self.parameters}

    def load(self) -> ModuleType:
        """Import the plug-in and return its module. Raises WorkerError, with the cause, if that fails."""
        try:
            return importlib.import_module(self.module) if self.module else _import_file(self.file)
        except Exception as error:
            raise WorkerError(f"{self.file}: importing {self.kind} {self.name!r} failed: {error!r}") from error


@dataclass(frozen=True, kw_only=True)
class Catalogue:
    """All algorithms and data sets by name, each sorted."""

    algorithms: Mapping[str, Plugin]
    datasets: Mapping[str, Plugin]

    def algorithm(self, name: str) -> Plugin:
        """Return the algorithm. Raises ConfigError with the nearest name if there is none."""
        return _named(name, self.algorithms, "algorithm")

    def dataset(self, name: str) -> Plugin:
        """Return the data set. Raises ConfigError with the nearest name if there is none."""
        return _named(name, self.datasets, "data set")


def _named(name: str, known: Mapping[str, Plugin], noun: str) -> Plugin:
    if name not in known:
        raise ConfigError(f"unknown {noun} {name!r}{did_you_mean(name, known)}")
    return known[name]


def catalogue(plugins: Sequence[Path] = ()) -> Catalogue:
    """Find what ships with metabench, what installed packages declare as entry points, and the files in `plugins`.

    Raises ConfigError, with every mistake in it, for a file that is missing or broken or whose name is taken.
    """
    found: dict[str, dict[str, Plugin]] = {"algorithm": {}, "dataset": {}}
    problems: list[str] = []
    seen: set[Path] = set()
    for file, module, builtin in _candidates(plugins, problems):
        if (resolved := file.resolve()) in seen:
            continue
        seen.add(resolved)
        try:
            plugin = _read_plugin(file, module=module, builtin=builtin)
        except ConfigError as error:
            problems.append(str(error))
            continue
        if plugin is None:
            continue
        other = found[plugin.kind].setdefault(plugin.name, plugin)
        if other is not plugin:
            problems.append(f"{file}:1: the name {plugin.name!r} is taken by {other.file}: choose another")
    if problems:
        raise ConfigError("\n".join(problems))
    by_name = {kind: dict(sorted(entries.items())) for kind, entries in found.items()}
    return Catalogue(algorithms=by_name["algorithm"], datasets=by_name["dataset"])


def read_plugin(file: Path) -> Plugin:
    """What a plug-in file, or one of metabench's own, says of itself, not running it. Raises ConfigError."""
    plugin = _read_plugin(file)
    assert plugin is not None  # only of a built-in file without METABENCH
    return plugin


def _read_plugin(file: Path, *, module: str | None = None, builtin: bool = False) -> Plugin | None:
    """Read a plug-in, not running it; None for a built-in file without METABENCH. Raises ConfigError with the line."""
    tree = _parse(file)
    node = _metabench(tree, file)
    if node is None and builtin:
        return None
    if node is None:
        raise ConfigError(f"{file}:1: not a plug-in: add METABENCH = {{'kind': 'algorithm' or 'dataset', 'name': ...}}")
    meta = _read_meta(node, file)
    summary = (ast.get_docstring(tree) or "").strip().partition("\n")[0]
    if not summary:
        raise ConfigError(f"{file}:1: add a module docstring: its first line is the summary that `ls` shows")
    names = {"kind": meta["kind"], "name": meta["name"], "summary": summary}
    return Plugin(**names, file=file, module=module, meta=meta, parameters=_parameters(tree, file, meta["kind"]))


def _candidates(plugins: Sequence[Path], problems: list[str]) -> Iterator[tuple[Path, str | None, bool]]:
    """Yield (file, module, built-in) of everything that may be a plug-in; what cannot be found goes to `problems`."""
    for folder in _FOLDERS:
        for file in sorted((Path(__file__).parent / folder).glob("*.py")):
            yield file, f"metabench.{folder}.{file.stem}", True
    from importlib.metadata import entry_points  # 30 ms that `--help` need not pay

    for point in [point for folder in _FOLDERS for point in sorted(entry_points(group=f"metabench.{folder}"))]:
        if located := _locate(point.module):
            yield located, point.module, False
        else:
            fix = "reinstall or remove the package that declares it"
            problems.append(f"entry point {point.name!r} of {point.group}: no file for module {point.module!r}: {fix}")
    for file in plugins:
        yield Path(file), None, False


def _locate(module: str) -> Path | None:
    """Return the file of a module without importing it or (as importlib.util.find_spec would) its parents."""
    parts = module.split(".")
    try:
        spec = importlib.util.find_spec(parts[0])
        for depth in range(2, len(parts) + 1):
            inside = list(spec.submodule_search_locations or ()) if spec else []
            spec = importlib.machinery.PathFinder.find_spec(".".join(parts[:depth]), inside)
    except (ImportError, ValueError):
        return None
    file = Path(spec.origin) if spec and spec.origin else None
    return file if file and file.suffix == ".py" else None


def _parse(file: Path) -> ast.Module:
    """Return the syntax tree of the file. Raises ConfigError."""
    if not file.is_file():
        fix = "it is a folder: name a .py file in it" if file.is_dir() else "there is no such file"
        raise ConfigError(f"{file}: {fix}")
    try:
        return ast.parse(file.read_bytes(), filename=str(file))
    except SyntaxError as error:
        raise ConfigError(f"{file}:{error.lineno or 1}: not valid Python: {error.msg}") from error
    except (ValueError, RecursionError, MemoryError, OSError) as error:
        raise ConfigError(f"{file}:1: cannot be read as Python: {error}") from error


def _metabench(tree: ast.Module, file: Path) -> ast.Dict | None:
    """Return the literal METABENCH dict at module level, or None. Raises ConfigError if it is something else."""
    for statement in tree.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        if not any(isinstance(target, ast.Name) and target.id == "METABENCH" for target in targets):
            continue
        value = getattr(statement, "value", None)
        if isinstance(value, ast.Dict):
            return value
        raise ConfigError(f"{file}:{statement.lineno}: METABENCH must be a literal dict: it is read, never run")
    return None


class _Key(NamedTuple):
    """One key of METABENCH: what makes a value good, how to say so, and the default (... if there is none)."""

    good: Callable[[Any], bool]
    wanted: str
    default: Any = ...


def _is_name(value: object) -> bool:
    return isinstance(value, str) and NAME.fullmatch(value) is not None


def _is_count(value: object) -> bool:
    return type(value) is int and value > 0


def _all_of(good: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, list | tuple) and len(value) > 0 and all(map(good, value))


_NAMES = "letters, digits and . _ + -"
_BOTH = {
    "kind": _Key(lambda value: value in ("algorithm", "dataset"), "'algorithm' or 'dataset'"),
    "name": _Key(_is_name, _NAMES),
    "paper": _Key(lambda value: isinstance(value, str), "text", ""),
    "url": _Key(lambda value: isinstance(value, str), "text", ""),
}
_KEYS = {
    "algorithm": {
        **_BOTH,
        "family": _Key(lambda value: isinstance(value, str), "text, such as 'metric'"),
        "feeds": _Key(lambda value: value in ("episodes", "images", None), "'episodes', 'images' or None"),
        "problems": _Key(_all_of(lambda value: value in ANSWERED), f"a list of {' and '.join(map(repr, ANSWERED))}"),
        "control": _Key(lambda value: isinstance(value, bool), "True or False", False),
        "train": _Key(lambda value: isinstance(value, dict), "a dict of training defaults", {}),
    },
    "dataset": {
        **_BOTH,
        "problem": _Key(lambda value: value in PROBLEMS, " or ".join(map(repr, PROBLEMS))),
        "splits": _Key(lambda value: isinstance(value, dict) and len(value) > 0, "a dict of at least one split"),
        "images_per_class": _Key(lambda value: value is None or _is_count(value), "a whole number above 0", None),
        "shape": _Key(_all_of(_is_count), "a list of whole numbers", ()),
        "within": _Key(_all_of(lambda value: value in WITHIN), f"a list of {' and '.join(map(repr, WITHIN))}", ()),
    },
}


def _read_meta(node: ast.Dict, file: Path) -> dict[str, Any]:
    """Return the checked METABENCH with its optional keys filled in. Raises ConfigError at the offending line."""
    try:
        raw: dict[str, Any] = ast.literal_eval(node)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}:{node.lineno}: METABENCH must hold literals only: {error}") from error
    lines = {key.value: key.lineno for key in node.keys if isinstance(key, ast.Constant)}

    def wrong(key: Any, message: str) -> ConfigError:
        return ConfigError(f"{file}:{lines.get(key, node.lineno)}: METABENCH: {message}")

    kind = raw.get("kind")
    keys = _KEYS.get(kind, {}) if isinstance(kind, str) else {}
    for key in raw:
        if keys and key not in keys:
            raise wrong(key, f"unknown key {key!r}{did_you_mean(str(key), keys)}")
    for key, spec in (keys or _BOTH).items():
        if key not in raw and spec.default is ...:
            raise wrong(key, f"{key!r} is missing: add it ({spec.wanted})")
        if key in raw and not spec.good(raw[key]):
            raise wrong(key, f"{key!r} must be {spec.wanted}, not {raw[key]!r}")
    meta = {key: raw.get(key, spec.default) for key, spec in keys.items()}
    nested = "train" if kind == "algorithm" else "splits"
    if problem := _train_problem(meta["train"]) if nested == "train" else _splits_problem(meta):
        raise wrong(nested, f"{nested!r}: {problem}")
    return meta


def _train_problem(train: Mapping[object, object]) -> str | None:
    """Return what is wrong with an algorithm's training defaults, or None."""
    for key, value in train.items():
        if key not in TRAIN_KEYS:
            return f"unknown key {key!r}{did_you_mean(str(key), TRAIN_KEYS)}"
        if key == "ways" and value == 1:
            return "'ways' must be at least 2"
        if not _is_count(value) and not (key == "seconds" and isinstance(value, float) and 0 < value < math.inf):
            return f"{key!r} must be a whole number above 0, not {value!r}"
    given = [key for key in BUDGETS if key in train]
    return f"one budget at most, not {' and '.join(given)}" if len(given) > 1 else None


def _splits_problem(meta: Mapping[str, Any]) -> str | None:
    """Return what is wrong with a data set's splits and class sizes, or None."""
    classes = meta["problem"] == "classification"
    if classes and meta["images_per_class"] is None:
        return "a classification data set also needs 'images_per_class'"
    for name, counts in meta["splits"].items():
        if not _is_name(name):
            return f"{name!r} must be {_NAMES}"
        subsets = {"train", "val", "test"} if classes else set()
        if not isinstance(counts, dict) or set(counts) != subsets:
            return f"{name!r} must be {'the class counts of train, val and test' if classes else '{}'}, not {counts!r}"
        if not all(type(count) is int and count >= 0 for count in counts.values()):
            return f"{name!r}: class counts are whole numbers, not {counts!r}"
    return None


def _parameters(tree: ast.Module, file: Path, kind: str) -> tuple[Parameter, ...]:
    """Return the keyword-only parameters of the module's `build`. Raises ConfigError at the offending line."""
    builds = [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "build"]
    if not builds:
        raise ConfigError(f"{file}:1: there is no build function: add {_BUILD[kind]}")
    build = builds[-1]
    arguments = build.args
    positional = len(arguments.posonlyargs) + len(arguments.args)
    if positional != (kind == "algorithm") or arguments.defaults or arguments.vararg or arguments.kwarg:
        raise ConfigError(f"{file}:{build.lineno}: build must read {_BUILD[kind]}, the rest keyword-only")
    pairs = zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True)
    parameters = tuple(_parameter(argument, default, file) for argument, default in pairs)
    problems = [_special(parameter, kind) for parameter in parameters]
    if any(problems):
        raise ConfigError(f"{file}:{build.lineno}: build: {next(filter(None, problems))}")
    if kind == "dataset" and not any(parameter.name == "split" for parameter in parameters):
        raise ConfigError(f"{file}:{build.lineno}: build must take the split: {_BUILD[kind]}")
    return parameters


def _special(parameter: Parameter, kind: str) -> str | None:
    """Return what is wrong with a parameter whose name means something to metabench itself, or None."""
    if parameter.name in _RESERVED[kind]:
        return f"the parameter name {parameter.name!r} has another meaning in suites: rename it"
    # The norm has its own segment in cell ids, and bn_mode follows from it: it must always say which.
    texts = parameter.types == ("str",) and not parameter.optional
    if (kind, parameter.name) in (("algorithm", "norm"), ("dataset", "split")) and not texts:
        return f"{parameter.name} must be a str or a Literal of str, never None"
    return None


def _parameter(argument: ast.arg, default: ast.expr | None, file: Path) -> Parameter:
    """Return the parameter that one argument of `build` declares. Raises ConfigError at its line."""
    where = f"{file}:{argument.lineno}: build: {argument.arg}"
    try:
        types, choices, optional = _annotation(argument.annotation)
    except (ValueError, TypeError) as error:
        wanted = "int, float, bool, str or Literal[...], each with '| None' if it may be None"
        raise ConfigError(f"{where}: annotate it with {wanted}") from error
    required = default is None
    parameter = Parameter(name=argument.arg, types=types, choices=choices, optional=optional, required=required)
    if default is None:
        return parameter
    try:
        value = ast.literal_eval(default)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{where}: its default must be a literal, not {ast.unparse(default)}") from error
    if problem := parameter.check(value):
        raise ConfigError(f"{where}: the default does not fit: {problem}")
    return replace(parameter, default=parameter.canonical(value))


def _annotation(node: ast.expr | None) -> tuple[tuple[str, ...], tuple[Value, ...], bool]:
    """Return (types, choices, optional) of an annotation. Raises ValueError or TypeError if it is not supported."""
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr) and ast.unparse(node.right) == "None":
        types, choices, _ = _annotation(node.left)
        return types, choices, True
    if isinstance(node, ast.Name) and node.id in _TYPES:
        return (node.id,), (), False
    if not isinstance(node, ast.Subscript) or ast.unparse(node.value) not in ("Literal", "typing.Literal"):
        raise ValueError("not supported")
    values = ast.literal_eval(node.slice)
    values = values if isinstance(values, tuple) else (values,)
    choices = tuple(value for value in values if value is not None)
    types = tuple(dict.fromkeys(type(choice).__name__ for choice in choices))
    # Equal choices of two types (1 and True) could not be told apart in a cell.
    if not choices or not set(types) <= set(_TYPES) or len(set(values)) < len(values):
        raise ValueError("not supported")
    return types, choices, None in values


def _import_file(file: Path) -> ModuleType:
    """Import a file by its path, once, under a name that cannot clash with a package's."""
    name = f"metabench_plugin_{hashlib.sha256(str(file.resolve()).encode()).hexdigest()[:12]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    if spec is None or spec.loader is None:
        raise ImportError("not a .py file")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: its dataclasses and pickles look their module up
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
