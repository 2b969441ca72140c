"""A process of its own that makes test episodes anew, for who checks a run without trusting it.

In: a JSON list of protocols on standard input. Out: for each the episodes' content hashes, a hash of the classes behind
their labels, and the pixels' hash; or why they cannot be made here. Only data sets that ship with metabench are built:
no code of a run that is checked is ever loaded.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from metabench.catalogue import Catalogue, catalogue
from metabench.cells import parse_data
from metabench.episodes import ImageData, TaskDistribution
from metabench.errors import MetabenchError

AT_ONCE = 100  # episodes: their images are gathered too
TOLD_APART = 3  # so many episodes of the other subsets say whose a wrong list is


def main() -> None:
    """Answer the questions on standard input."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # stray prints must not break the answer
    known = catalogue()
    json.dump([answer(question, known) for question in json.load(sys.stdin)], out)
    out.close()


def answer(question: Mapping[str, Any], known: Catalogue) -> dict[str, Any]:
    """One protocol's episodes, or {"unknown": why}."""
    try:
        name, params, rotations, within = parse_data(question["data"], known)
        plugin = known.dataset(name)
        if plugin.module is None or not plugin.module.startswith("metabench."):
            return {"unknown": f"the data set {name!r} does not come with metabench"}
        data = plugin.load().build(**params)
        if question["count"] > 100_000:
            return {"unknown": f"{question['count']} episodes are too many to make anew"}
        ids, classes = _episodes(_bind(data, question, rotations, within), question, question["count"])
        few = {**question, "count": min(TOLD_APART, question["count"])}
        others = {
            name: found
            for name, other in _others(data, question["subset"])
            if (found := _tried(other, few, rotations, within))
        }
    except (MetabenchError, OSError) as error:
        return {"unknown": str(error)}
    pixels = data.pixels_hash if isinstance(data, ImageData) else None
    return {"ids": ids, "classes": classes, "others": others, "pixels": pixels}


def _bind(data: Any, question: Mapping[str, Any], rotations: str, within: str) -> TaskDistribution:
    tasks: TaskDistribution = data.tasks(
        question["subset"],
        ways=question["ways"],
        shots=question["shots"] or 1,
        queries=question["queries"] or 1,
        rotations=rotations,
        seed=question["seed"],
        device="cpu",
        **({"within": within} if within != "none" else {}),
    )
    return tasks


def _others(data: Any, subset: str) -> Iterator[tuple[str, ImageData]]:
    """The same data with the classes of another subset in the place of the right ones."""
    if isinstance(data, ImageData):
        for name in ("train", "val", "test"):
            if name != subset:
                yield name, replace(data, subsets={subset: data.subsets[name]})


def _tried(data: Any, question: Mapping[str, Any], rotations: str, within: str) -> list[str]:
    """Its first hashes; none where it has too few classes for such tasks."""
    try:
        return _episodes(_bind(data, question, rotations, within), question, question["count"])[0]
    except MetabenchError:
        return []


def _episodes(tasks: TaskDistribution, question: Mapping[str, Any], count: int) -> tuple[list[str], str | None]:
    """The hashes of episodes 0 .. count-1, and one of the classes behind their labels (None where they have none)."""
    ids: list[str] = []
    classes = []
    for start in range(0, count, AT_ONCE):
        size = min(AT_ONCE, count - start)
        if question["stream"]:
            ids.extend(tasks.streams(start, size, question["stream"]).ids)
            continue
        episode = tasks.episodes(start, size)
        ids.extend(episode.ids)
        if question["ways"] and episode.classes is not None:
            classes.append(episode.classes)
    if not classes:
        return ids, None
    return ids, hashlib.sha256(np.concatenate(classes).astype("<i8").tobytes()).hexdigest()


if __name__ == "__main__":
    main()
