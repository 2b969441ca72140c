"""Handwritten-like characters from a generative model of strokes: 50 alphabets, made in seconds, nothing to download.

The model is in the spirit of Bayesian Program Learning (Lake, Salakhutdinov & Tenenbaum 2015, "Human-level concept
learning through probabilistic program induction"), with hand-set distributions in place of learned ones:

1. An *alphabet* has a style (how curved, how many strokes) and a small library of *primitives*: sub-strokes, each a
   heading, a length, a turn per segment and a bend (the change of that turn).
2. A *character* of it is one to four *strokes*. A stroke chains one to three primitives of the library, each varied a
   little. A later stroke is put at the start, at the end or somewhere along an earlier one, by its own beginning or
   by its middle (so that strokes cross), or stands apart. A candidate that looks like an earlier one is dropped;
   narrow, short and crowded ones are taken when the others run out.
3. A *drawer* (twenty per alphabet, the same for all its characters: drawing i is by drawer i) has a slant, a rotation,
   an aspect, a size, a place on the page, a roundness, a neatness and a pen.
4. A *drawing* adds motor noise to every sub-stroke and joint, each scaled by its drawer's neatness. Each sub-stroke is
   a Bezier curve of degree four through a control polygon laid like a turtle's path; the strokes are put together
   by their relations, so that a wobble early in the character moves what hangs on it; then the drawer's affine warp.
5. A round pen marks a canvas of three by three sub-pixels a pixel, whose mean is the image (anti-aliased).

Every pixel is the same on every machine and with every numpy: random words come from Philox `random_raw` only, and
the way to the pixel uses integers and single IEEE operations (+ - * / compare, floor), which no library may round in
two ways; there is no sine, exponential, complex number, dot product or float sum in it. Rotations are rational, by
the tangent of half the angle; bell-shaped noise is a sum of three uniforms.

The constants were tuned on two figures, pixel nearest neighbour and ProtoNet, against Omniglot's, and are frozen
since: a change of any pixel is a new VERSION.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import comb, prod
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from metabench.datasets import files
from metabench.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from metabench.episodes import ImageData

METABENCH = {
    "kind": "dataset",
    "name": "glyphs",
    "problem": "classification",
    "paper": "after Lake et al. 2015",
    "splits": {"alphabets": {"train": 1056, "val": 150, "test": 394}},
    "images_per_class": 20,
    "within": ["alphabet"],
    "shape": [1, 28, 28],
}
VERSION = "glyphs-1"
PIXELS_SHA256 = "ce0d15055542f056c1a3a5f16920b6cbdbe005228eaf690160ac7b78fdb580a0"

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Spread = tuple[float, float, float]


@dataclass(frozen=True)
class Recipe:
    """Every constant of the model. A length is in units that `page` turns into pixels unless it says pixels; headings
    and turns are tangents of half angles; what has no explanation is the standard deviation of the thing named.
    """

    seed: int = 1
    alphabets: int = 50
    fewest: int = 20  # characters of the smallest alphabet; the largest has `fewest + spread - 1`
    spread: int = 25
    drawers: int = 20
    strokes: int = 4  # at most, in one character
    parts: int = 3  # sub-strokes at most, in one stroke
    primitives: int = 9  # in one alphabet's library
    candidates: int = 8  # drafts for every character kept
    apart: int = 350  # least difference of two characters: of their mean ink 0..255, summed over 7x7 cells
    narrow: float = 0.6  # taken last: candidates with a smaller ratio of their sides,
    crowded: float = 1.25  # with less ink (full pixels) per pixel of length,
    least_length: float = 34.0  # or with less length in all (pixels)
    # Odds of 1, 2, 3, 4 strokes, to which each alphabet adds up to `stroke_style`, and of 1, 2, 3 parts in each
    # stroke of a character with that many strokes.
    stroke_odds: tuple[int, ...] = (18, 34, 32, 16)
    stroke_style: float = 20.0
    part_odds: tuple[tuple[int, ...], ...] = ((6, 40, 54), (38, 44, 18), (62, 31, 7), (76, 20, 4))
    relation_odds: tuple[int, ...] = (22, 28, 38, 12)  # start, end, along, apart
    by_middle: float = 0.3  # chance that a stroke is put to its place by its middle
    gap: float = 0.35  # how far strokes stand apart
    # A primitive: odds of the eight compass headings (east, south-east, south, ... clockwise on the page).
    heading_odds: tuple[int, ...] = (30, 10, 30, 10, 8, 2, 4, 6)
    curve_odds: tuple[int, ...] = (42, 36, 22)  # straight, arc, loop
    turns: tuple[float, ...] = (0.0, 0.34, 0.85)  # per segment: 0, 38 and 81 degrees
    turn_spread: tuple[float, ...] = (0.03, 0.12, 0.16)
    bend_spread: float = 0.10
    lengths: tuple[float, ...] = (0.85, 1.25, 2.1)
    length_spread: float = 0.25
    library_heading: float = 0.03
    # Heading, relative length and turn: how each varies between uses of a primitive, and between drawings of one use.
    type_spread: Spread = (0.03, 0.20, 0.06)
    motor_spread: Spread = (0.045, 0.075, 0.04)
    motor_point: float = 0.022
    motor_joint: float = 0.035
    page: float = 16.0  # pixels: the larger side of a typical character
    page_spread: float = 2.2
    most_scale: float = 18.0  # pixels a unit
    # How each varies between drawers, and between the drawings of one.
    slant: tuple[float, float] = (0.13, 0.04)
    rotation: tuple[float, float] = (0.035, 0.02)
    aspect: tuple[float, float] = (0.06, 0.03)
    size: tuple[float, float] = (0.06, 0.04)
    place: tuple[float, float] = (0.7, 0.9)  # pixels
    roundness: float = 0.12  # between drawers
    neatness: float = 0.35  # relative spread of the motor noise between drawers
    pen_odds: tuple[int, ...] = (28, 54, 18)  # a round pen three, four or five sub-pixels wide
    # Drawing.
    side: int = 28
    margin: float = 1.5  # pixels kept free at each edge
    samples: int = 48  # points along one sub-stroke


RECIPE = Recipe()
SIZES = tuple(RECIPE.fewest + 7 * a % RECIPE.spread for a in range(RECIPE.alphabets))
SUBSETS = {"train": range(33), "val": range(33, 38), "test": range(38, 50)}
ROOT = 0.7071067811865476  # of one half
COMPASS = np.array([[1, ROOT, 0, -ROOT, -1, -ROOT, 0, ROOT], [0, ROOT, 1, ROOT, 0, -ROOT, -1, -ROOT]])
START, END, ALONG, APART = range(4)
FINE = 3  # sub-pixels a pixel, each way; `ink` is written for three


class Dice:
    """One alphabet's random numbers, in the order in which they are asked for."""

    def __init__(self, alphabet: int) -> None:
        self._words = np.random.Philox(key=(RECIPE.seed << 64) | alphabet)

    def _draw(self, shape: tuple[int, ...]) -> NDArray[np.uint64]:
        return np.asarray(self._words.random_raw(prod(shape)), dtype=np.uint64).reshape(shape)

    def uniform(self, *shape: int) -> Floats:
        """Uniform in [0, 1): the 53 high bits of a word."""
        return (self._draw(shape) >> np.uint64(11)).astype(np.float64) * 2.0**-53

    def bell(self, *shape: int) -> Floats:
        """Mean 0, standard deviation 1, within +-3: the sum of a word's three 21-bit uniforms, scaled."""
        word, mask = self._draw(shape), np.uint64(2**21 - 1)
        total = (word & mask) + ((word >> np.uint64(21)) & mask) + ((word >> np.uint64(42)) & mask)
        return np.asarray((total.astype(np.float64) - 1.5 * (2**21 - 1)) * 2.0**-20)

    def pick(self, odds: NDArray[np.int64] | tuple[int, ...], *shape: int) -> Ints:
        """Index drawn with integer odds, which stand on the last axis and broadcast against `shape`."""
        steps = np.cumsum(np.asarray(odds, dtype=np.int64), axis=-1)
        dart = np.floor(self.uniform(*shape) * steps[..., -1]).astype(np.int64)
        return np.asarray((dart[..., None] >= steps).sum(axis=-1), dtype=np.int64)


@dataclass(frozen=True)
class Parts:
    """What every sub-stroke looks like; arrays end in (strokes, parts), `heading` starts with x, y."""

    heading: Floats
    length: Floats
    turn: Floats
    bend: Floats

    def take(self, index: Ints) -> Parts:
        """The parts at `index` of the first axis (of the second of `heading`)."""
        return Parts(self.heading[:, index], self.length[index], self.turn[index], self.bend[index])

    def per_drawer(self) -> Parts:
        """The same with an axis for the drawers after the characters'."""
        return Parts(self.heading[:, :, None], self.length[:, None], self.turn[:, None], self.bend[:, None])


@dataclass(frozen=True)
class Characters:
    """The characters of an alphabet: (n, strokes, parts) and (n, strokes) arrays."""

    parts: Parts
    present: Bools  # (n, strokes, parts)
    joints: Ints  # (4, n, strokes): START, END, ALONG or APART; of which earlier stroke; ALONG: its part and eighth
    middle: Bools  # by this stroke's middle rather than its beginning
    gap: Floats  # (2, n, strokes): for APART

    def take(self, index: Ints) -> Characters:
        """The characters at `index`."""
        parts, present, middle = self.parts.take(index), self.present[index], self.middle[index]
        return Characters(parts, present, self.joints[:, index], middle, self.gap[:, index])


def bernstein(times: Floats) -> Floats:
    """Weights (5, k) of a degree-four Bezier curve's control points at `times` (k,), by products alone."""
    weights = [np.full_like(times, float(comb(4, k))) for k in range(5)]
    for k, weight in enumerate(weights):
        for factor in [times] * k + [1.0 - times] * (4 - k):
            weight *= factor
    return np.stack(weights)


def along(control: Floats, weights: Floats) -> Floats:
    """Weighted sum of the five control points on the last axis; `weights` (5, ...) broadcasts."""
    total: Floats = control[..., 0] * weights[0]
    for k in range(1, 5):
        total = total + control[..., k] * weights[k]
    return total


def rotate(vector: Floats, half: Floats) -> Floats:
    """Rotate `vector` (2, ...) by the angle whose half has the tangent `half`."""
    square = half * half
    cosine, sine = (1.0 - square) / (1.0 + square), 2.0 * half / (1.0 + square)
    x, y = vector
    return np.stack([cosine * x - sine * y, sine * x + cosine * y])


def library(dice: Dice) -> Parts:
    """An alphabet's primitives: (primitives,) arrays."""
    r, n = RECIPE, RECIPE.primitives
    style = dice.uniform(1)  # 0: all as the odds say .. 1: a third of the straight ones become arcs
    heading = rotate(COMPASS[:, dice.pick(r.heading_odds, n)], dice.bell(n) * r.library_heading)
    curve = dice.pick(r.curve_odds, n)
    curve = np.where((curve == 0) & (dice.uniform(n) * 3.0 < style), 1, curve)
    turn = np.array(r.turns)[curve] + np.array(r.turn_spread)[curve] * dice.bell(n)
    turn = np.where(dice.uniform(n) < 0.5, turn, -turn)
    length = np.array(r.lengths)[curve] * (1.0 + r.length_spread * dice.bell(n))
    return Parts(heading, np.maximum(length, 0.3), turn, r.bend_spread * dice.bell(n) * (curve > 0))


def characters(dice: Dice, n: int) -> Characters:
    """Draw `n` candidate characters of one alphabet."""
    r = RECIPE
    shape = (n, r.strokes, r.parts)
    primitives, parts = library(dice), counts(dice, n)
    present = np.arange(r.parts) < parts[..., None]
    choice = np.floor(dice.uniform(*shape) * dice.uniform(*shape) * r.primitives).astype(np.int64)
    drawn = vary(primitives.take(choice), dice, shape, r.type_spread)
    parent = np.floor(dice.uniform(n, r.strokes) * np.arange(r.strokes)).astype(np.int64)
    relation = dice.pick(r.relation_odds, n, r.strokes)
    part = np.floor(dice.uniform(n, r.strokes) * np.take_along_axis(parts, parent, axis=1)).astype(np.int64)
    eighth = 2 + dice.pick((1, 1, 1, 1, 1), n, r.strokes)
    return Characters(
        parts=replace(drawn, length=drawn.length * present),
        present=present,
        joints=np.stack([relation, parent, part, eighth]),
        middle=dice.uniform(n, r.strokes) < r.by_middle,
        gap=dice.bell(2, n, r.strokes) * r.gap,
    )


def counts(dice: Dice, n: int) -> Ints:
    """Parts of each stroke (n, strokes); 0 for strokes that a character lacks."""
    r = RECIPE
    style = np.floor(dice.uniform(r.strokes) * r.stroke_style).astype(np.int64)
    strokes = 1 + dice.pick(np.array(r.stroke_odds) + style, n)
    parts = 1 + dice.pick(np.array(r.part_odds)[strokes - 1][:, None], n, r.strokes)
    return np.where(np.arange(r.strokes) < strokes[:, None], parts, 0)


def vary(parts: Parts, dice: Dice, shape: tuple[int, ...], spread: Spread, times: Floats | float = 1.0) -> Parts:
    """Add noise of shape `shape` to `parts`: `times` the `spread` of heading, relative length and turn."""
    heading, length, turn = (dice.bell(*shape) * (times * one) for one in spread)
    length = parts.length * np.maximum(1.0 + length, 0.25)
    return Parts(rotate(parts.heading, heading), length, parts.turn + turn, np.broadcast_to(parts.bend, shape))


def polygons(parts: Parts) -> Floats:
    """Control points (2, ..., strokes, parts, 5) of sub-strokes chained within each stroke, which starts at 0, 0."""
    heading, points = parts.heading, [np.zeros_like(parts.heading)]
    for k in range(4):
        points.append(points[-1] + heading * (parts.length * 0.25))
        heading = rotate(heading, parts.turn + (k - 1.0) * parts.bend)
    control = np.stack(points, axis=-1)
    for part in range(1, RECIPE.parts):
        control[..., part, :] += control[..., part - 1, 4:]
    return control


EIGHTHS = bernstein(np.arange(9) / 8.0)


def assemble(control: Floats, kind: Characters, slip: Floats) -> Floats:
    """Move each stroke of `control` (2, n, d, strokes, parts, 5) to its place; `slip` is the joints' noise."""
    rows = np.arange(control.shape[1])
    placed = control.copy()
    for s in range(1, RECIPE.strokes):
        target = joint(placed, kind, s)
        last = (kind.present[:, s].sum(axis=1) - 1).clip(0)
        centre = along(placed[:, rows, :, s, last // 2], EIGHTHS[:, 4])  # indices apart put n first: (n, 2, d)
        target = target - np.where(kind.middle[:, s, None, None], centre, 0.0)
        placed[:, :, :, s] += (np.moveaxis(target, 1, 0) + slip[..., s])[..., None, None]
    return placed


def joint(placed: Floats, kind: Characters, stroke: int) -> Floats:
    """Where `stroke` of each character meets its parent in each drawing: (n, 2, d)."""
    rows = np.arange(placed.shape[1])
    relation, parent, part, eighth = kind.joints[:, :, stroke]
    chain = placed[:, rows, :, parent]  # (n, 2, d, parts, 5)
    first, last = chain[..., 0, 0], chain[..., RECIPE.parts - 1, 4]
    on = along(chain[rows, :, :, part], EIGHTHS[:, eighth, None, None])
    relation = relation[:, None, None]
    gap = np.moveaxis(kind.gap[:, :, stroke], 0, 1)[..., None]
    point = np.where(relation == START, first, np.where(relation == END, last, on))
    return point + np.where(relation == APART, gap, 0.0)


@dataclass(frozen=True)
class Page:
    """Size and place on the page: factors and pixels, broadcasting against (n, drawers)."""

    grow: Floats
    move: Floats  # (2, n, drawers)
    slant: Floats
    rotation: Floats
    aspect: Floats


def settle(control: Floats, kind: Characters, page: Page, scale: Floats) -> Floats:
    """Warp `control` by the drawer's affine map and put it on the page, in pixels, inside the margins."""
    lift = (slice(None), slice(None), None, None, None)
    x, y = control
    points = np.stack([x * (1.0 + page.aspect[lift]) - y * page.slant[lift], y * (1.0 - page.aspect[lift])])
    points = rotate(points, page.rotation[lift]) * (scale * page.grow)[lift]
    low, high = box(points, kind)
    room = RECIPE.side - 2.0 * RECIPE.margin
    shrink = np.minimum(1.0, room / np.maximum(np.maximum(high[0] - low[0], high[1] - low[1]), 1e-9))
    points, low, high = points * shrink[lift], low * shrink, high * shrink
    middle = RECIPE.side * 0.5 + page.move - (low + high) * 0.5
    middle = np.maximum(np.minimum(middle, RECIPE.side - RECIPE.margin - high), RECIPE.margin - low)
    return np.asarray(points + middle[:, :, :, None, None, None])


def box(points: Floats, kind: Characters) -> tuple[Floats, Floats]:
    """Least and greatest coordinates (2, n, d) of the curves of `points`, looked at in quarters."""
    curve = np.stack([along(points, EIGHTHS[:, k]) for k in range(0, 9, 2)], axis=-1)
    there = kind.present[:, None, :, :, None]
    low = np.where(there, curve, np.inf).min(axis=(3, 4, 5))
    high = np.where(there, curve, -np.inf).max(axis=(3, 4, 5))
    return low, high


FINE_TIMES = bernstein(np.arange(RECIPE.samples) / (RECIPE.samples - 1.0))


def ink(points: Floats, kind: Characters, pen: Ints) -> NDArray[np.uint8]:
    """Draw the curves of `points` (2, n, d, strokes, parts, 5) with each drawing's `pen` (n, d): (n, d, 28, 28)."""
    wide = RECIPE.side * FINE
    n, d = points.shape[1:3]
    there = np.broadcast_to(kind.present[:, None], points.shape[1:-1])
    character, drawer, _, _ = np.nonzero(there)
    control = points[:, there] * FINE
    # No index check: `settle` keeps curves and pen inside, and these characters are always the same.
    x, y = (np.floor(along(axis[:, None, :], FINE_TIMES)).astype(np.int64) for axis in control)
    canvas = np.zeros(n * d * wide * wide, dtype=np.uint8)
    canvas[((character * d + drawer)[:, None] * wide + y) * wide + x] = 1
    sheet = thicken(canvas.reshape(n * d, wide, wide), pen.reshape(-1, 1, 1))
    rows = sheet[:, 0::3] + sheet[:, 1::3] + sheet[:, 2::3]  # a byte holds these counts up to 9
    cells = rows[:, :, 0::3] + rows[:, :, 1::3] + rows[:, :, 2::3]
    return np.asarray(cells.astype(np.uint16) * 255 // 9, dtype=np.uint8).reshape(n, d, RECIPE.side, RECIPE.side)


def thicken(sheet: NDArray[np.uint8], pen: Ints) -> NDArray[np.uint8]:
    """Widen the marks of each 0/1 sheet: by a square of 1, 2 or 3 sub-pixels (`pen` 0, 1, 2), then by a plus."""
    for ahead, back in ((np.s_[:, :, 1:], np.s_[:, :, :-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        line = sheet.copy()
        line[ahead] |= sheet[back] & (pen >= 1)
        line[back] |= sheet[ahead] & (pen >= 2)
        sheet = line
    out = sheet.copy()
    for ahead, back in ((np.s_[:, :, 1:], np.s_[:, :, :-1]), (np.s_[:, 1:], np.s_[:, :-1])):
        out[ahead] |= sheet[back]
        out[back] |= sheet[ahead]
    return out


def pages(dice: Dice, untidy: Floats, n: int) -> Page:
    """The affine warp of each drawing (n, drawers): its drawer's, and its own."""
    r, d = RECIPE, RECIPE.drawers

    def both(spread: tuple[float, float]) -> Floats:
        return spread[0] * dice.bell(d) + spread[1] * dice.bell(n, d)

    return Page(
        grow=(1.0 + r.size[0] * dice.bell(d)) * (1.0 + r.size[1] * dice.bell(n, d)),
        move=(r.place[0] * dice.bell(2, d))[:, None] + r.place[1] * untidy * dice.bell(2, n, d),
        slant=both(r.slant),
        rotation=both(r.rotation),
        aspect=both(r.aspect),
    )


def draw_alphabet(alphabet: int) -> NDArray[np.uint8]:
    """All drawings of one alphabet: (characters, drawers, 28, 28), strokes 255 on 0."""
    r, n, d, dice = RECIPE, SIZES[alphabet], RECIPE.drawers, Dice(alphabet)
    kind, scale = choose(characters(dice, r.candidates * n), dice, n)
    pen = np.broadcast_to(dice.pick(r.pen_odds, d), (n, d))
    untidy = np.maximum(1.0 + r.neatness * dice.bell(d), 0.3)
    page = pages(dice, untidy, n)
    one = kind.parts.per_drawer()
    one = replace(one, turn=one.turn * (1.0 + r.roundness * dice.bell(d)[:, None, None]))
    control = polygons(vary(one, dice, (n, d, r.strokes, r.parts), r.motor_spread, untidy[:, None, None]))
    control = control + dice.bell(*control.shape) * r.motor_point * untidy[:, None, None, None]
    slip = dice.bell(2, n, d, r.strokes) * r.motor_joint * untidy[:, None]
    return ink(settle(assemble(control, kind, slip), kind, page, scale), kind, pen)


def choose(kind: Characters, dice: Dice, n: int) -> tuple[Characters, Floats]:
    """Keep `n` candidates that can be told apart, with the scale (n, 1) that brings each to its size on the page."""
    r, many = RECIPE, len(kind.present)
    control = assemble(polygons(kind.parts.per_drawer()), kind, np.zeros((2, many, 1, r.strokes)))
    low, high = box(control, kind)
    wide, tall = high - low
    longer, shorter = np.maximum(wide, tall), np.minimum(wide, tall)
    scale = np.minimum((r.page + r.page_spread * dice.bell(many, 1)) / np.maximum(longer, 0.1), r.most_scale)
    still = np.zeros((many, 1))
    page = Page(still + 1.0, np.zeros((2, many, 1)), still, still, still)
    looks = ink(settle(control, kind, page, scale), kind, np.ones((many, 1), dtype=np.int64))[:, 0].astype(np.int64)
    length = scale[:, 0] * sum(kind.parts.length[:, s, p] for s in range(r.strokes) for p in range(r.parts))
    crowded = looks.sum(axis=(1, 2)) < length * (255.0 * r.crowded)
    poor = (shorter < r.narrow * longer)[:, 0] | crowded | (length < r.least_length)
    index = unlike(looks, np.argsort(poor, kind="stable"), n)
    return kind.take(index), scale[index]


def unlike(looks: Ints, order: Ints, n: int) -> Ints:
    """The first `n` of `looks` (many, 28, 28), taken in `order`, that differ from each one taken before."""
    cells = looks.reshape(len(looks), 7, 4, 7, 4).sum(axis=(2, 4)).reshape(len(looks), 49)
    kept: list[int] = []
    for i in order:
        if len(kept) < n and (np.abs(cells[kept] - cells[i]).sum(axis=1) >= 16 * RECIPE.apart).all():
            kept.append(int(i))
    return np.array(kept)


def draw(alphabets: range = range(RECIPE.alphabets)) -> NDArray[np.uint8]:
    """Drawings of the given alphabets: uint8 (characters, 20, 28, 28). Each alphabet is independent of the others."""
    return np.concatenate([draw_alphabet(a) for a in alphabets])


def images() -> NDArray[np.uint8]:
    """All drawings, from the cache folder or else drawn into it: drawing takes as long as importing torch."""
    path = files.cache_dir() / "glyphs" / f"{VERSION}.cache"
    shape = (sum(SIZES), RECIPE.drawers, RECIPE.side, RECIPE.side)
    if (cached := files.read_cache(path, key=VERSION, shape=shape, sha256=PIXELS_SHA256)) is not None:
        return cached
    drawn = draw()
    files.write_cache(path, drawn, key=VERSION)
    return drawn


def build(*, split: Literal["alphabets"] = "alphabets") -> ImageData:
    """Make the data set, with the subsets of `split` ("alphabets": 33 / 5 / 12 whole alphabets).

    Raises:
        ConfigError: another split.
    """
    from metabench.episodes import ImageData  # here, for it brings torch, which drawing does without

    if split != "alphabets":
        raise ConfigError(f"glyphs has no split {split!r}{did_you_mean(split, ['alphabets'])}.")
    names = tuple(f"alphabet{a:02d}/character{c:02d}" for a, n in enumerate(SIZES) for c in range(n))
    starts = np.cumsum((0, *SIZES))
    subsets = {name: np.arange(starts[part.start], starts[part.stop]) for name, part in SUBSETS.items()}
    return ImageData(name="glyphs", version=VERSION, split=split, images=images(), classes=names, subsets=subsets)
