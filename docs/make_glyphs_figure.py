"""Draw docs/glyphs.png: glyphs above, Omniglot's test characters below, in one layout.

    python docs/make_glyphs_figure.py FOLDER

FOLDER holds Omniglot's images_background.zip and images_evaluation.zip. Needs pillow. Each half shows six test
alphabets, four characters of each (rows) and seven drawings of each character (by drawers 1 to 7).
"""

from __future__ import annotations

import io
import sys
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from metabench.datasets import glyphs

ALPHABETS = ("Kannada", "Keble", "Malayalam", "Oriya", "Tengwar", "Tibetan")  # of the vinyals test set
CHARACTERS, DRAWINGS, CELL, GAP, LABEL = 4, 7, 30, 8, 18


def omniglot(folder: Path) -> list[np.ndarray]:
    """The first characters of each of ALPHABETS: (CHARACTERS, DRAWINGS, 28, 28), strokes 255."""
    names: dict[str, tuple[zipfile.ZipFile, str]] = {}
    for half in ("background", "evaluation"):
        archive = zipfile.ZipFile(folder / f"images_{half}.zip")
        names |= {name.partition("/")[2]: (archive, name) for name in archive.namelist() if name.endswith(".png")}

    def read(archive: zipfile.ZipFile, name: str) -> np.ndarray:
        picture = Image.open(io.BytesIO(archive.read(name))).convert("L")
        return 255 - np.asarray(picture.resize((28, 28), Image.Resampling.LANCZOS))

    blocks = []
    for alphabet in ALPHABETS:
        starts = [f"{alphabet}/character{c + 1:02d}/" for c in range(CHARACTERS)]
        rows = [sorted(name for name in names if name.startswith(start)) for start in starts]
        blocks.append(np.array([[read(*names[name]) for name in row[:DRAWINGS]] for row in rows]))
    return blocks


def paste(blocks: list[np.ndarray], title: str, sheet: Image.Image, top: int) -> None:
    """Write `title` and put the blocks side by side under it, three to a row."""
    ImageDraw.Draw(sheet).text((GAP, top + 3), title, fill=0)
    for i, block in enumerate(blocks):
        left = GAP + (i % 3) * (DRAWINGS * CELL + GAP)
        upper = top + LABEL + (i // 3) * (CHARACTERS * CELL + GAP)
        for row, drawings in enumerate(block):
            for column, drawing in enumerate(drawings):
                sheet.paste(Image.fromarray(255 - drawing), (left + column * CELL + 1, upper + row * CELL + 1))


def main() -> None:
    """Make the figure beside this script."""
    ours = [glyphs.draw_alphabet(a)[:CHARACTERS, :DRAWINGS] for a in glyphs.SUBSETS["test"]][: len(ALPHABETS)]
    half = LABEL + 2 * (CHARACTERS * CELL + GAP)
    sheet = Image.new("L", (3 * (DRAWINGS * CELL + GAP) + GAP, 2 * half), 255)
    paste(ours, f"{glyphs.VERSION}: six test alphabets, four characters of each, seven drawers", sheet, 0)
    paste(omniglot(Path(sys.argv[1])), f"Omniglot: {', '.join(ALPHABETS)}", sheet, half)
    sheet.quantize(16).save(Path(__file__).with_name("glyphs.png"), optimize=True)


if __name__ == "__main__":
    main()
