"""The comparison with other libraries as a Markdown table, from a run of the suite `peers`.

python docs/peers_table.py RUN
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from metabench.report.wording import duration
from metabench.stats import Interval, paired_ratio
from metabench.store import Measurement, Run

OURS = ("maml", "protonet")
LOADER = "glyphs-dataloader"
HEAD = (
    "| kernel | peer | its time | ours | times faster | with our allocator |",
    "| :-- | :-- | --: | --: | --: | --: |",
)


class Timed(NamedTuple):
    """A time with its cell's coordinates and the parameters of its algorithm."""

    cell: Mapping[str, Any]
    params: Mapping[str, Any]
    row: Measurement

    @property
    def work(self) -> tuple[Any, ...]:
        """What two rows must share in order to be compared: the same function of the same batches."""
        c, family = self.cell, self.cell["algorithm"].partition("-")[0]
        size = (self.row.measure, c["ways"], c["shots"], c["queries"], c["tasks"])
        if self.row.measure == "episode_time":
            return size
        more = (self.backbone, self.params.get("inner_steps")) if family == "maml" else (self.params.get("norm"),)
        return (*size, family, *more)

    @property
    def backbone(self) -> str:
        """The backbone by its name; `auto` is MAML's own."""
        name = str(self.params.get("backbone", ""))
        return "conv4-strided" if name == "auto" else name

    @property
    def ours(self) -> bool:
        """Whether it is metabench's own."""
        return self.cell["algorithm"] in OURS and self.cell["dataset"] != LOADER

    @property
    def name(self) -> str:
        """What the table calls it."""
        if self.row.measure == "episode_time":
            store = dict(item.split("=") for item in self.cell["cell"].split("/")[1][:-1].split(",") if "=" in item)
            return f"DataLoader, {store.get('store', 'uint8')} images"
        return str(self.cell["algorithm"])


def found(run: Run) -> Iterator[Timed]:
    """Every time of the run."""
    for (cell, _), row in run.current().items():
        if row.status == "ok" and "processes" in row.facts:
            coordinates = run.manifest["cells"][cell]
            yield Timed(coordinates, json.loads(coordinates["params"]), row)


def table(run: Run) -> str:
    """One line per kernel, peer and precision of ours: times, and how many times faster ours is."""
    rows = list(found(run))
    mine = [row for row in rows if row.ours and row.cell["allocator"] == "kept"]
    lines = []
    for peer in (row for row in rows if not row.ours):
        if peer.cell["allocator"] == "kept" and peer.row.measure != "episode_time":
            continue
        alike = [row for row in rows if row.work == peer.work and row.name == peer.name and not row.ours]
        tamed = [row for row in alike if row.cell["allocator"] == "kept" and row is not peer]
        for own in (row for row in mine if row.work == peer.work):
            ratio = faster(peer, own)
            under_ours = _text(faster(tamed[0], own)) if tamed else ""
            precision = "" if own.cell["precision"] == "float32" else f" {own.cell['precision']}"
            own_time = f"{duration(own.row.value)}{precision}"
            lines.append(
                f"| {_kernel(peer)} | {peer.name} | {duration(peer.row.value)} | {own_time} "
                f"| {_text(ratio)} | {under_ours} |"
            )
    return "\n".join([*HEAD, *lines]) + "\n"


def faster(peer: Timed, own: Timed) -> Interval:
    """How many times ours fits into the peer's: paired by process, in which both were sampled in turns."""
    return paired_ratio(peer.row.facts["processes"], own.row.facts["processes"])


def _text(ratio: Interval) -> str:
    if ratio.low is None or ratio.high is None:
        return f"{ratio.value:.2f}"
    return f"**{ratio.value:.2f}** [{ratio.low:.2f}, {ratio.high:.2f}]"


def _kernel(one: Timed) -> str:
    cell, params = one.cell, one.params
    kernel = one.row.measure.removesuffix("_time").replace("_", " ")
    size = f"{cell['ways']}w{cell['shots']}s{cell['queries']}q"
    more = [f"{cell['tasks']} tasks"] if cell["tasks"] > 1 else []
    if one.row.measure == "meta_step_time" and "inner_steps" in params:
        more += [f"{one.backbone}, {params['inner_steps']} inner step{'s' * (params['inner_steps'] != 1)}"]
    if cell["algorithm"].startswith("protonet") and kernel != "episode":
        more += [f"norm {params['norm']}"]
    return ", ".join([f"{kernel} {size}", *more])


if __name__ == "__main__":
    print(table(Run.open(Path(sys.argv[1]))), end="")
