"""YAML files of ours as plain data with the line of every place, and what is wrong with them in plain words.

All mistakes are collected, not only the first: a bad part is reported and left out, and the rest is checked further.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from pydantic import BaseModel
from pydantic_core import ErrorDetails

from metabench.errors import ConfigError, did_you_mean

MAX_BYTES, MAX_VALUES, MAX_DEPTH, MAX_INT = 1_000_000, 100_000, 20, 2**63 - 1
Where = tuple[str | int, ...]  # the keys and list positions that lead to a place in the file
_WANTED = {
    "int_type": "a whole number",
    "float_type": "a number",
    "string_type": "text",
    "bool_type": "true or false",
    "list_type": "a list",
    "model_type": "a mapping",
    "dict_type": "a mapping",
    "too_short": "a list of at least one value",
    "greater_than": "above {gt:g}",
    "greater_than_equal": "at least {ge}",
    "less_than_equal": "at most {le}",
    "literal_error": "{expected}",
    "string_pattern_mismatch": "letters, digits and . _ + -",
}


class Document:
    """A file as plain data with the line of every place in it, and the problems found so far.

    `kind` is what messages call such a file: "a suite".
    """

    def __init__(self, file: Path, kind: str) -> None:
        self.file, self.kind = file, kind
        self.lines: dict[Where, int] = {}
        self.problems: dict[tuple[int, str], None] = {}
        self.removed: dict[Where, set[str]] = {}
        self.values = 0
        self.data: Any = self._value(self._compose(), ())

    def report(self, where: Where, message: str) -> None:
        """Note a problem at a place, or at the nearest place around it that the file has."""
        while where not in self.lines and where:
            where = where[:-1]
        self.problems[self.lines.get(where, 1), message] = None

    def raise_problems(self) -> None:
        """Raise ConfigError with every problem noted, in the order of the lines, if there is one."""
        if self.problems:
            raise ConfigError("\n".join(f"{self.file}:{line}: {message}" for line, message in sorted(self.problems)))

    def prune(self, bad: set[Where]) -> None:
        """Leave out the places in `bad`, so that what is left can be checked further."""
        lines: dict[Where, int] = {}
        removed: dict[Where, set[str]] = {}

        def copy(value: Any, old: Where, new: Where) -> Any:
            lines[new] = self.lines[old]
            if isinstance(value, dict):
                kept = {key: one for key, one in value.items() if (*old, key) not in bad}
                removed[new] = self.removed.get(old, set()) | (value.keys() - kept.keys())
                return {key: copy(one, (*old, key), (*new, key)) for key, one in kept.items()}
            if isinstance(value, list):
                good = [place for place in range(len(value)) if (*old, place) not in bad]
                return [copy(value[place], (*old, place), (*new, n)) for n, place in enumerate(good)]
            return value

        self.data, self.lines, self.removed = copy(self.data, (), ()), lines, removed

    def listed(self, key: str) -> None:
        """Put the mapping at a top-level key into a list of its own, places included."""
        if isinstance(self.data, dict) and isinstance(self.data.get(key), dict):
            self.data[key] = [self.data[key]]
            moved = {place: line for place, line in self.lines.items() if place[:1] == (key,)}
            self.lines |= {(key, 0, *place[1:]): line for place, line in moved.items()}
            for place in moved.keys() - {(key,)}:
                if place[:2] != (key, 0):
                    del self.lines[place]

    def whole(self, where: Where) -> bool:
        """Return whether nothing was left out at or inside a place: what it lacks, it lacks from the start."""
        inside = any(keys and place[: len(where)] == where for place, keys in self.removed.items())
        return not inside and (not where or where[-1] not in self.removed.get(where[:-1], set()))

    def _compose(self) -> yaml.Node | None:
        """Return the YAML tree of the file. Raises ConfigError, with line and column, if there is none."""
        text = self._text()
        try:
            return yaml.compose(text, Loader=_Loader)
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark
            where = f"{mark.line + 1}:{mark.column + 1}" if mark else "1"
            raise ConfigError(f"{self.file}:{where}: broken YAML: {error.problem or error.context}") from error
        except yaml.reader.ReaderError as error:
            line = text.count("\n", 0, error.position) + 1
            raise ConfigError(f"{self.file}:{line}: broken YAML: {error.reason}") from error
        except RecursionError as error:
            raise ConfigError(f"{self.file}: nested too deeply for {self.kind}") from error

    def _value(self, node: yaml.Node | None, where: Where) -> Any:
        """Return a node as plain data. Raises ConfigError if aliases blow the file up."""
        self.values += 1
        if self.values > MAX_VALUES or len(where) > MAX_DEPTH:
            raise ConfigError(f"{self.file}: nested too deeply, or too many values (a YAML alias that multiplies?)")
        self.lines.setdefault(where, node.start_mark.line + 1 if node else 1)
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node, where)
        if isinstance(node, yaml.SequenceNode):
            return [self._value(item, (*where, place)) for place, item in enumerate(node.value)]
        return None if node is None else self._scalar(node, where)

    def _mapping(self, node: yaml.MappingNode, where: Where) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key, line = key_node.value, key_node.start_mark.line + 1
            if not isinstance(key_node, yaml.ScalarNode) or key_node.tag not in (
                "tag:yaml.org,2002:str",
                "tag:yaml.org,2002:merge",
            ):
                self.problems[line, "a key must be text: put it in quotes"] = None
            elif key in found:
                self.problems[line, f"{key!r} is given twice, first on line {self.lines[(*where, key)]}"] = None
            else:
                self.lines[(*where, key)] = line
                found[key] = self._value(value_node, (*where, key))
        return found

    def _scalar(self, node: yaml.Node, where: Where) -> Any:
        try:
            value = yaml.constructor.SafeConstructor().construct_object(node, deep=True)
        except Exception:  # PyYAML fails in many ways on tags that do not fit and on numbers without end
            self.report(where, f"cannot read {node.value[:60]!r} as {node.tag.rpartition(':')[2]}: put it in quotes")
            return str(node.value)
        return math.inf if isinstance(value, int) and abs(value) > MAX_INT else value

    def explained(self, detail: ErrorDetails, top: type[BaseModel], parts: Mapping[str | int, type[BaseModel]]) -> str:
        """One of pydantic's errors about this file, whose model is `top`, in plain words.

        `parts` are the models below a key, whose fields an unknown key is compared with.
        """
        keys = [part for part in detail["loc"] if isinstance(part, str)]
        name, value = ".".join(keys) or self.kind, detail["input"]
        if detail["type"] == "extra_forbidden":
            part = next((parts[key] for key in reversed(keys[:-1]) if key in parts), top)
            return f"unknown key {keys[-1]!r}{did_you_mean(keys[-1], part.model_fields)}"
        if detail["type"] == "missing":
            return f"{name} is missing: add it"
        if detail["type"] == "value_error":
            return f"{name}: {detail['ctx']['error']}"
        if detail["type"] not in _WANTED:
            return f"{name}: {detail['msg']}"
        wanted = _WANTED[detail["type"]].format_map(detail.get("ctx", {}))
        hint = did_you_mean(value, re.findall(r"'(\w+)'", wanted)) if isinstance(value, str) else ""
        shown = "an empty one" if detail["type"] == "too_short" else repr(value)
        shown = shown if len(shown) < 60 else f"{shown[:60]}..."
        return f"{name} must be {wanted}, not {shown}{hint if 'mean' in hint else ''}"

    def _text(self) -> str:
        """Return the file's text. Raises ConfigError if it is no readable, small UTF-8 file."""
        file = self.file
        try:
            if file.is_dir():
                raise ConfigError(f"{file}: is a folder: name {self.kind} in it")
            if (size := file.stat().st_size) > MAX_BYTES:
                raise ConfigError(f"{file}: has {size:,} bytes; {self.kind} has at most {MAX_BYTES:,}")
            return file.read_bytes().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise ConfigError(f"{file}: is not UTF-8 text (byte {error.start}): save it as UTF-8") from error
        except OSError as error:
            raise ConfigError(f"{file}: cannot be read: {error.strerror}") from error


class _Loader(yaml.SafeLoader):
    """SafeLoader, but 1e-3 is a number (YAML 1.1 wants 1.0e-3, and silently takes the rest for text)."""


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)
