"""Omniglot: 1623 handwritten characters of 50 alphabets, 20 drawings of each.

Lake, Salakhutdinov and Tenenbaum, "Human-level concept learning through probabilistic program induction", Science 2015.
The images are the official 105x105 one-bit PNGs of https://github.com/brendenlake/omniglot, taken from a local folder
(`METABENCH_DATA`: the two zips or the folders that they hold) or downloaded once. What counts is the decoded
drawings: they must have the hash known here, whatever the zip's own checksum, so that a repacked zip is as good
and an altered one is refused.

Splits (train / val / test classes):

- `vinyals`, 1028 / 172 / 423, by alphabet: the lists that most metric papers use (jakesnell/prototypical-networks).
- `random1200`, 1100 / 100 / 423, characters irrespective of alphabet (Finn et al. 2017 and others draw such a
  split; the draw here is fixed, see `_random1200`).
- `background`, 813 / 151 / 659: the data set's own halves; the validation part is the last 5 of the 30
  background alphabets in sorted order (Ojibwe, Sanskrit, Syriac (Estrangelo), Tagalog, Tifinagh).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.resources
import io
import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from metabench.datasets import files
from metabench.errors import ConfigError, DataError, did_you_mean

if TYPE_CHECKING:  # torch comes with it: `metabench data` does without
    from metabench.episodes import ImageData

METABENCH = {
    "kind": "dataset",
    "name": "omniglot",
    "problem": "classification",
    "paper": "Lake et al. 2015",
    "url": "https://github.com/brendenlake/omniglot",
    "splits": {
        "vinyals": {"train": 1028, "val": 172, "test": 423},
        "random1200": {"train": 1100, "val": 100, "test": 423},
        "background": {"train": 813, "val": 151, "test": 659},
    },
    "images_per_class": 20,
    "shape": [1, 28, 28],
    "within": ["alphabet", "drawer"],
}

VERSION = "omniglot-1"  # part of every episode's identity: change the pixels or their order, change this
CONTENT_SHA256 = "60993cee34d3d98832893c0184552bd7ca26c88516bdfd99f886b680a16ba523"
"""Hash of all drawings: one bit per pixel, 1 = stroke, (class, drawing, row, column) packed without gaps."""

URL = "https://raw.githubusercontent.com/brendenlake/omniglot/master/python"
HALVES = {  # official zip -> its md5
    "images_background": "68d2efa1b9178cc56df9314c21c6e718",
    "images_evaluation": "6b91aef0f799c5bb55b94e3f2daec811",
}

_FIX = f"Replace it with the official file of {URL}, or unset METABENCH_DATA to download it."
_GET = "run `metabench data fetch omniglot`"

_log = logging.getLogger(__name__)

_SPLITS = ("vinyals", "random1200", "background")
_DRAWINGS, _SIDE = 20, 105
_SMALL_SIDES = (28, 35)  # the first is what `fetch` makes ready
_NAME = re.compile(r"(images_background|images_evaluation)/([^/]+/character\d\d)/\d{4}_(\d\d)\.png")
_BITS_KEY = f"{VERSION} decoder-1 bits"
# The key of the resized images names the drawings that they come from; their size stands in the shape.
_SMALL_KEY = f"{VERSION} decoder-1 lanczos"


@dataclass(frozen=True)
class _Facts:
    """The class lists, from the packaged table. An alphabet's range of class numbers is `ranges[alphabet]`."""

    classes: tuple[str, ...]  # sorted "Alphabet/characterNN"
    half: Mapping[str, str]  # alphabet -> images_background or images_evaluation
    ranges: Mapping[str, range]
    digests: Mapping[str, str]  # alphabet -> start of the sha256 of its packed drawings
    vinyals: Mapping[str, tuple[str, ...]]  # val and test; "Alphabet" or "Alphabet:first" (from that character on)


@functools.cache
def _facts() -> _Facts:
    source = importlib.resources.files("metabench") / "data" / "omniglot-classes.json"
    table = json.loads(source.read_text(encoding="utf-8"))
    half = {a: h for h in HALVES for a in table[h]}
    ranges: dict[str, range] = {}
    digests: dict[str, str] = {}
    classes: list[str] = []
    for alphabet in sorted(half):
        count, digests[alphabet] = table[half[alphabet]][alphabet]
        ranges[alphabet] = range(len(classes), len(classes) + count)
        classes += [f"{alphabet}/character{n:02}" for n in range(1, count + 1)]
    vinyals = {subset: tuple(table["vinyals"][subset]) for subset in ("val", "test")}
    return _Facts(tuple(classes), half, ranges, digests, vinyals)


def build(
    *, split: Literal["vinyals", "random1200", "background"] = "vinyals", size: Literal[28, 35, 105] = 28
) -> ImageData:
    """Load Omniglot, strokes 255 on 0, at 28x28 (Lanczos, as learn2learn does), at 35x35, or at the original 105x105.

    Episodes are the same at all sizes: the same drawings under the same hashes, so that they can be compared.

    The first use decodes the PNGs (some seconds, said in the log) into the cache folder; later ones read the
    cache, which is checked and made again when damaged. While the cache is good, the source is not looked at.

    Raises:
        ConfigError: an unknown split or size.
        DataError: no data, and none to be had; or data that are not Omniglot's.
    """
    from metabench.episodes import ImageData

    if split not in _SPLITS:
        raise ConfigError(f"omniglot: no split {split!r}{did_you_mean(split, _SPLITS)}")
    if size not in (*_SMALL_SIDES, _SIDE):
        raise ConfigError(f"omniglot: size is 28, 35 or 105, not {size!r}")
    images = _unpacked(_bits()) if size == _SIDE else _small(size)
    return ImageData("omniglot", VERSION, split, images, _facts().classes, _subsets(split))


def status() -> files.DataStatus:
    """Say what there is of Omniglot here, without a download."""
    if _cached_bits() is not None:
        return _status("cached", f"decoded in {_bits_path()}")
    found = _local()
    if found:
        return _status("ready", f"to be decoded at first use, from {_named(found)}")
    return _status("missing", f"{_GET} (14 MB)")


def fetch() -> files.DataStatus:
    """Download what is missing and decode it into the cache, also where the data root lacks it.

    Raises:
        DataError: as `build`.
    """
    if _cached_bits() is None:
        _decode_once(_local() or _downloaded())
    if _cached_small(_SMALL_SIDES[0]) is None and _cached_bits() is not None:
        _small(_SMALL_SIDES[0])
    return status()


def verify() -> files.DataStatus:
    """Read the source, where there is one, and the cache again, and compare with the known hash.

    Raises:
        DataError: either is not what it should be, or there is neither.
    """
    checked = []
    if found := _local():
        _decode(found)
        checked.append(_named(found))
    for side in (_SIDE, *_SMALL_SIDES):
        path = _bits_path() if side == _SIDE else _small_path(side)
        if not files.present(path):
            continue
        if (_cached_bits() if side == _SIDE else _cached_small(side)) is None:
            raise DataError(f"the cache {path} is damaged. To make it again, {_GET}.")
        checked.append(str(path))
    if not checked:
        raise DataError(f"omniglot: there is nothing to verify. First {_GET}.")
    return _status(status().state, f"verified: {', '.join(checked)}")


def _status(state: files.State, detail: str) -> files.DataStatus:
    return files.DataStatus("omniglot", state, detail, VERSION)


def _named(sources: Mapping[str, Path]) -> str:
    return " and ".join(str(path) for path in sources.values())


# Splits


def _subsets(split: str) -> dict[str, np.ndarray]:
    """Class numbers (sorted, int64) of train, val and test."""
    if split == "random1200":
        return _random1200()
    facts = _facts()
    if split == "background":
        background = sorted(a for a, half in facts.half.items() if half == "images_background")
        val, test = set(background[-5:]), set(facts.half) - set(background)
    else:
        val, test = set(facts.vinyals["val"]), set(facts.vinyals["test"])
    return _by_alphabet(val, test)


def _by_alphabet(val: set[str], test: set[str]) -> dict[str, np.ndarray]:
    """Subsets from lists of alphabets; "Gurmukhi:42" is Gurmukhi from character 42 on, the rest of it is train."""
    subset = np.zeros(len(_facts().classes), dtype=np.int64)
    for number, entries in ((1, val), (2, test)):
        for entry in entries:
            alphabet, _, first = entry.partition(":")
            subset[_facts().ranges[alphabet][int(first or 1) - 1 :]] = number
    return {name: np.flatnonzero(subset == number) for number, name in enumerate(("train", "val", "test"))}


def _random1200() -> dict[str, np.ndarray]:
    """The sorted class names, ordered by one raw Philox word each (key 0), cut at 1100 and 1200: never changes."""
    order = np.argsort(np.random.Philox(key=0).random_raw(len(_facts().classes)), kind="stable")
    parts = np.split(order.astype(np.int64), [1100, 1200])
    return {name: np.sort(part) for name, part in zip(("train", "val", "test"), parts, strict=True)}


# The cache: drawings as packed bits (45 MB), and the images at 28x28 (25 MB) and, once asked for, at 35x35 (40 MB)


def _bits_path() -> Path:
    return files.cache_dir() / "omniglot" / f"{VERSION}-decoder1-105x105-bits.cache"


def _small_path(side: int) -> Path:
    return files.cache_dir() / "omniglot" / f"{VERSION}-decoder1-{side}x{side}-lanczos.cache"


def _count() -> int:
    return len(_facts().classes) * _DRAWINGS * _SIDE * _SIDE


def _cached_bits() -> np.ndarray | None:
    shape = ((_count() + 7) // 8,)
    return files.read_cache(_bits_path(), key=_BITS_KEY, shape=shape, sha256=CONTENT_SHA256)


def _cached_small(side: int) -> np.ndarray | None:
    return files.read_cache(_small_path(side), key=_SMALL_KEY, shape=(len(_facts().classes), _DRAWINGS, side, side))


def _bits() -> np.ndarray:
    """All drawings as packed bits, from the cache or else decoded into it."""
    cached = _cached_bits()
    return _decode_once(_sources()) if cached is None else cached


def _decode_once(sources: Mapping[str, Path]) -> np.ndarray:
    _log.info("decoding Omniglot once, about 10 s, from %s", _named(sources))
    bits = _decode(sources)
    files.write_cache(_bits_path(), bits, key=_BITS_KEY)
    return bits


def _small(side: int) -> np.ndarray:
    """All images at side x side, from the cache or else resized into it."""
    small = _cached_small(side)
    if small is None:
        small = _resized(_unpacked(_bits()), side)
        files.write_cache(_small_path(side), small, key=_SMALL_KEY)
    return small


def _unpacked(bits: np.ndarray) -> np.ndarray:
    """Packed bits to uint8 (classes, 20, 105, 105), strokes 255 on 0."""
    images = np.unpackbits(bits, count=_count())
    np.negative(images, out=images)  # 1 -> 255
    return images.reshape(-1, _DRAWINGS, _SIDE, _SIDE)


def _resized(images: np.ndarray, side: int) -> np.ndarray:
    """To side x side by Pillow's Lanczos filter (integer arithmetic, the same in all its releases so far).

    Resized as 8-bit grey, black on white, and inverted after: on one-bit images Pillow takes the nearest pixel whatever
    filter is asked for.
    """
    from PIL import Image

    flat = images.reshape(-1, _SIDE, _SIDE)
    small = np.empty((len(flat), side, side), dtype=np.uint8)
    for i, image in enumerate(flat):
        small[i] = np.asarray(Image.fromarray(~image).resize((side, side), Image.Resampling.LANCZOS))
    return np.invert(small, out=small).reshape(*images.shape[:2], side, side)


# The source: where the zips or folders are, and how they are read


def _sources() -> dict[str, Path]:
    """The two halves: under the data root if there is one, else downloaded."""
    root = files.data_root()
    if root is None:
        return _downloaded()
    found = _local()
    if not found:
        looked = ", ".join(str(path) for half in HALVES for path in _places(root, half))
        raise DataError(
            f"Omniglot is not whole under the data root {root} (looked for both halves: {looked}). Put the "
            f"official zips of {URL} there, or unset METABENCH_DATA and {_GET}."
        )
    return found


def _local() -> dict[str, Path]:
    """Both halves as they are on this machine, under the data root, else among the downloads; empty if nowhere."""
    for base in (files.data_root(), files.downloads_dir("omniglot")):
        if base is None:
            continue
        found = {half: [p for p in _places(base, half) if files.present(p)] for half in HALVES}
        if all(found.values()):
            return {half: paths[0] for half, paths in found.items()}
    return {}


def _places(root: Path, half: str) -> list[Path]:
    return [base / name for base in (root / "omniglot", root) for name in (f"{half}.zip", half)]


def _downloaded() -> dict[str, Path]:
    folder = files.downloads_dir("omniglot")
    otherwise = (
        f"{_GET} on a machine with a network and copy its cache folder ({files.cache_dir()}) to this one, or give "
        "--data-root DIR (or METABENCH_DATA=DIR) with DIR/omniglot/images_background.zip and images_evaluation.zip."
    )
    return {
        half: files.download(f"{URL}/{half}.zip", folder / f"{half}.zip", md5=md5, otherwise=otherwise)
        for half, md5 in HALVES.items()
    }


def _decode(sources: Mapping[str, Path]) -> np.ndarray:
    """Decode all PNGs into packed bits.

    Raises:
        DataError: a drawing is missing, damaged or another than Omniglot's; the message names the zip.
    """
    strokes = np.zeros((len(_facts().classes), _DRAWINGS, _SIDE, _SIDE), dtype=bool)
    for half, source in sources.items():
        _decode_half(half, source, strokes)
        _check_half(half, source, strokes)
    bits = np.packbits(strokes.reshape(-1))
    if hashlib.sha256(bits.data).hexdigest() != CONTENT_SHA256:
        raise DataError(f"{_named(sources)}: the decoded images do not match Omniglot's content hash.")
    return bits


def _decode_half(half: str, source: Path, strokes: np.ndarray) -> None:
    """Decode one zip or folder into its classes' part of `strokes` (classes, 20, 105, 105)."""
    facts = _facts()
    expected = {
        (facts.classes[number], drawing): (number, drawing - 1)
        for alphabet, numbers in facts.ranges.items()
        if facts.half[alphabet] == half
        for number in numbers
        for drawing in range(1, _DRAWINGS + 1)
    }
    total = len(expected)
    for match, content in files.read_members(source, _NAME):
        place = expected.pop((match[2], int(match[3])), None)
        if match[1] != half or place is None:
            raise DataError(f"{source}: {match[0]} is no drawing of Omniglot's {half}, or there twice. {_FIX}")
        strokes[place] = _png(source, match[0], content)
    if expected:
        name, drawing = next(iter(expected))
        lacks = f"{len(expected)} of {total} drawings are missing, first {half}/{name}, drawing {drawing:02}"
        raise DataError(f"{source}: {lacks}. {_FIX}")


def _png(source: Path, name: str, content: bytes) -> np.ndarray:
    """Decode one PNG into strokes: bool (105, 105)."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
            if image.size != (_SIDE, _SIDE):  # before decoding: a small file may claim a huge image
                raise DataError(f"{source}: {name} is {image.size}, not 105x105. {_FIX}")
            if image.mode == "1":
                return ~np.asarray(image)
            return np.asarray(image.convert("L")) < 128
    # Pillow's ways to say that a PNG is damaged, or claims to be huge
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{source}: {name} is a damaged PNG ({error}). {_FIX}") from error


def _check_half(half: str, source: Path, strokes: np.ndarray) -> None:
    """Compare the drawings of one half, alphabet by alphabet, so that the message can say what differs."""
    facts = _facts()
    differ = [
        alphabet
        for alphabet, numbers in facts.ranges.items()
        if facts.half[alphabet] == half
        and alphabet_digest(strokes[numbers.start : numbers.stop]) != facts.digests[alphabet]
    ]
    if differ:
        where = ", ".join(differ[:5]) + (f" and {len(differ) - 5} more" if len(differ) > 5 else "")
        raise DataError(
            f"{source}: the decoded images do not match Omniglot's content hash; they differ in {where}. {_FIX}"
        )


def alphabet_digest(strokes: np.ndarray) -> str:
    """Short hash of one alphabet's drawings, bool (characters, 20, 105, 105), as in the packaged table."""
    return hashlib.sha256(np.packbits(strokes.reshape(-1)).data).hexdigest()[:16]
