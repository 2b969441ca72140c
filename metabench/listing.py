"""What there is: algorithms, data sets, backbones and suites, read without importing any of them."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from metabench.catalogue import catalogue
from metabench.cells import KERNELS
from metabench.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from metabench.datasets.files import DataStatus

KINDS = ("algorithms", "datasets", "backbones", "kernels", "suites")
FAMILIES = ("metric", "model", "optimisation", "transfer")  # in this order; then those of plug-ins, controls last
Listing = Mapping[str, Sequence[Mapping[str, str]]]


def ls(what: str = "all") -> Listing:
    """Entries of one kind, or of all: name, summary, and paper and family where there are.

    Raises:
        ConfigError: an unknown kind.
    """
    if what != "all" and what not in KINDS:
        raise ConfigError(f"nothing to list called {what!r}{did_you_mean(what, [*KINDS, 'all'])}")
    known = catalogue()
    makers = {
        "algorithms": lambda: [
            {"name": p.name, "family": p.meta["family"], "paper": p.meta["paper"], "summary": p.summary}
            for p in known.algorithms.values()
        ],
        "datasets": lambda: [
            {"name": _with_splits(p.name, p.meta["splits"]), "paper": p.meta["paper"], "summary": p.summary}
            for p in known.datasets.values()
        ],
        "backbones": lambda: [{"name": k, "summary": v} for k, v in _backbones().items()],
        "kernels": lambda: [{"name": k, "summary": v} for k, v in KERNELS.items()],
        "suites": _suites,
    }
    return {kind: makers[kind]() for kind in KINDS if what in ("all", kind)}


def as_text(listing: Listing, width: int) -> str:
    """One line each, cut to `width` columns; algorithms by family."""
    lines: list[str] = []
    for kind, entries in listing.items():
        lines += [kind] if len(listing) > 1 else []
        room = max((len(e["name"]) for e in entries), default=0)
        for family, group in groupby(sorted(entries, key=_place), key=lambda entry: entry.get("family")):
            lines += [f" {family}"] if family else []
            for entry in group:
                paper = f" ({entry['paper']})" if entry.get("paper") else ""
                text = f"  {entry['name']:{room}}  {entry['summary'].rstrip('.')}"
                lines.append(_cut(text, width - len(paper)) + paper)
        lines.append("")
    return "\n".join(lines[:-1]) + "\n"


def as_json(listing: Listing) -> str:
    """The same for machines."""
    return json.dumps(listing, indent=1, ensure_ascii=False) + "\n"


def data_ls() -> list[DataStatus]:
    """The state of every data set's files."""
    from metabench.datasets.files import DataStatus

    found = []
    for plugin in catalogue().datasets.values():
        if _defines(plugin.file, "status"):
            found.append(plugin.load().status())
        else:
            found.append(DataStatus(plugin.name, "embedded", "made by the package, no files needed", ""))
    return found


def data_module(name: str, verb: str) -> ModuleType:
    """The module of a data set that has files to fetch or verify.

    Raises:
        ConfigError: an unknown data set, or one that is embedded.
    """
    plugin = catalogue().dataset(name)
    if not _defines(plugin.file, verb):
        raise ConfigError(f"{name} is embedded: there are no files to {verb}")
    return plugin.load()


def _defines(file: Path, function: str) -> bool:
    """Whether a source file defines a function, found without importing it (and torch with it)."""
    tree = ast.parse(file.read_bytes())
    return any(isinstance(node, ast.FunctionDef) and node.name == function for node in tree.body)


def _with_splits(name: str, splits: Mapping[str, object]) -> str:
    return f"{name}[{'|'.join(splits)}]" if len(splits) > 1 else name


def _backbones() -> dict[str, str]:
    """The literal table of backbones.py, read without importing torch."""
    tree = ast.parse((Path(__file__).parent / "backbones.py").read_bytes())
    for node in tree.body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "METABENCH_BACKBONES":
            table: dict[str, str] = ast.literal_eval(node.value)
            return table
    raise AssertionError("backbones.py has lost its table METABENCH_BACKBONES")


def _place(entry: Mapping[str, str]) -> tuple[int, str]:
    """Where an entry's family stands; entries without one stay in their order."""
    family = entry.get("family", "")
    if family in FAMILIES:
        return FAMILIES.index(family), ""
    return len(FAMILIES) + (family == "control"), family


def _suites() -> list[dict[str, str]]:
    from metabench.suite import load_suite, shipped_suites

    return [{"name": name, "summary": load_suite(name).description} for name in shipped_suites()]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: max(width - 1, 1)].rstrip() + "…"
