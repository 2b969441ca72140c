"""Fill README.md's generated parts: tables from committed results, files shown verbatim. `--check` only compares.

python docs/update_readme.py [--check]
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

import fair_table
import peers_table
import published_table

from metabench.report import render
from metabench.report.load import load
from metabench.store import Run

ROOT = Path(__file__).resolve().parent.parent
PART = re.compile(r"<!-- (table|fair|published|peers|board|file): (\S+) -->\n.*?<!-- end -->", re.DOTALL)


def filled(text: str) -> str:
    """The README's text with every generated part made anew."""
    return PART.sub(lambda match: f"<!-- {match[1]}: {match[2]} -->\n{_part(match[1], match[2])}<!-- end -->", text)


def _part(kind: str, name: str) -> str:
    path = ROOT / name
    if kind == "file":
        language = "python" if path.suffix == ".py" else "yaml"
        return f"```{language}\n{path.read_text(encoding='utf-8')}```\n"
    if kind == "board":  # the first of the leaderboard's boards, after the tables of all
        sections = re.split(r"(?=^### )", (path / "leaderboard.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
        first = next(section for section in sections[1:] if not section.startswith("### All boards"))
        return f"{first.rstrip()}\n"
    runs = sorted(file.parent for file in path.rglob("manifest.json"))
    if kind == "fair":
        return fair_table.table(runs)
    if kind == "published":
        return published_table.table(runs)
    if kind == "peers":
        return peers_table.table(Run.open(runs[-1]))
    tables = re.split(r"(?=^### )", render(load(runs), "md"), flags=re.MULTILINE)[1:]
    legend = tables[-1].rstrip().rpartition("\n\n")[2]
    return f"{tables[0].rstrip()}\n\n{legend}\n"


if __name__ == "__main__":
    readme = ROOT / "README.md"
    old = readme.read_text(encoding="utf-8")
    new = filled(old)
    if "--check" in sys.argv:
        sys.exit(0 if old == new else "README.md is out of date: run python docs/update_readme.py")
    readme.write_text(new, encoding="utf-8")
