"""glyphs: the same bits everywhere, alphabets apart, and characters that behave like handwriting."""

from __future__ import annotations

import ast
import hashlib
import inspect
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from metabench.datasets import glyphs
from metabench.episodes import ImageData
from metabench.errors import ConfigError

ROOT = Path(__file__).parents[1]
GOLDEN = glyphs.PIXELS_SHA256
SOME = range(38, 41)
GOLDEN_SOME = "55cd276097cfab2a2dfb7150f831ae153d92b87628f9268815caa261ee856319"
HASH = (
    "import hashlib; from metabench.datasets import glyphs; "
    f"print(hashlib.sha256(glyphs.draw({SOME}).tobytes()).hexdigest())"
)


def sha256(images: np.ndarray) -> str:
    return hashlib.sha256(images.tobytes()).hexdigest()


@pytest.fixture(scope="module")
def data() -> ImageData:
    return glyphs.build()


@pytest.fixture(scope="module")
def images() -> np.ndarray:
    """Drawn anew, whatever a cache holds."""
    return glyphs.draw()


def test_every_pixel_is_the_golden_one(images: np.ndarray) -> None:
    assert images.dtype == np.uint8
    assert images.shape == (1600, 20, 28, 28)
    assert sha256(images) == GOLDEN, "the pixels changed: that needs a new VERSION and a new golden hash"


def test_what_the_cache_holds_is_what_is_drawn(images: np.ndarray, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.setenv("METABENCH_CACHE", str(tmp_path))
    monkeypatch.setattr(glyphs, "draw", lambda: images)
    assert np.array_equal(glyphs.images(), images)
    (file,) = (tmp_path / "glyphs").iterdir()
    monkeypatch.setattr(glyphs, "draw", lambda: pytest.fail("drawn again"))
    assert np.array_equal(glyphs.build().images, images)
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    monkeypatch.setattr(glyphs, "draw", lambda: images)
    assert np.array_equal(glyphs.images(), images) and "damaged or outdated" in caplog.text
    monkeypatch.setenv("METABENCH_CACHE", "/proc/nowhere")
    assert np.array_equal(glyphs.images(), images), "a folder that cannot be written costs no run"


def simd_features() -> list[str]:
    """The optional CPU features that this numpy found here and may be told to leave unused."""
    return list(np.show_config(mode="dicts")["SIMD Extensions"].get("found", []))


def without(features: list[str]) -> dict[str, str]:
    return {"NPY_DISABLE_CPU_FEATURES": " ".join(features), "ATEN_CPU_CAPABILITY": "default"}


@pytest.mark.parametrize(
    "settings",
    [
        {"OMP_NUM_THREADS": "1", "ATEN_CPU_CAPABILITY": "avx2", "PYTHONHASHSEED": "1"},
        {"OMP_NUM_THREADS": "2", **without([f for f in simd_features() if "512" in f or "V4" in f])},
        {"OMP_NUM_THREADS": "1", "PYTHONHASHSEED": "2", **without(simd_features())},
    ],
    ids=["all-features", "no-avx512", "baseline"],
)
def test_the_same_in_other_processes(settings: dict[str, str]) -> None:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    done = subprocess.run([sys.executable, "-c", HASH], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == GOLDEN_SOME


def test_the_baseline_really_uses_other_code() -> None:
    if not simd_features():
        pytest.skip("numpy found no optional CPU feature here")
    ask = "import numpy as np; print(np.show_config(mode='dicts')['SIMD Extensions'].get('found', []))"
    environment = {**os.environ, **without(simd_features())}
    done = subprocess.run([sys.executable, "-c", ask], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_alphabets_are_independent(images: np.ndarray) -> None:
    starts = np.cumsum((0, *glyphs.SIZES))
    some = glyphs.draw(SOME)
    assert sha256(some) == GOLDEN_SOME
    np.testing.assert_array_equal(some, images[starts[SOME.start] : starts[SOME.stop]])


EXACT = {
    *("NDArray", "random", "inf", "bool_", "float64", "int64", "uint8", "uint16", "uint64", "s_"),
    *("arange", "array", "asarray", "broadcast_to", "concatenate", "full_like", "ones", "stack", "zeros", "zeros_like"),
    *("abs", "argsort", "cumsum", "floor", "maximum", "minimum", "moveaxis", "nonzero", "take_along_axis", "where"),
}


def test_no_operation_that_libraries_round_differently() -> None:
    """Only functions known to be exact are called; `sum` and `cumsum` meet integers, which the golden hashes watch."""
    tree = list(ast.walk(ast.parse(inspect.getsource(glyphs))))
    attributes = [node for node in tree if isinstance(node, ast.Attribute)]
    used = {node.attr for node in attributes if isinstance(node.value, ast.Name) and node.value.id == "np"}
    assert used <= EXACT, sorted(used - EXACT)
    assert not {node.attr for node in attributes} & {"mean", "std", "var", "dot", "prod", "trace", "real", "imag"}
    assert not any(isinstance(node, ast.MatMult) for node in tree)
    powers = [node for node in tree if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)]
    assert all(isinstance(power.left, ast.Constant) for power in powers)


def test_uniform_and_bell_have_their_moments() -> None:
    dice = glyphs.Dice(0)
    uniform, bell = dice.uniform(200_000), dice.bell(200_000)
    assert 0.0 <= uniform.min() < 1e-4
    assert 1 - 1e-4 < uniform.max() < 1.0
    assert abs(uniform.mean() - 0.5) < 0.005
    assert abs(bell.mean()) < 0.015
    assert abs(bell.std() - 1.0) < 0.01
    assert 2.0 < abs(bell).max() <= 3.0


def test_pick_follows_its_odds() -> None:
    share = np.bincount(glyphs.Dice(1).pick((1, 0, 3), 40_000), minlength=3) / 40_000
    np.testing.assert_allclose(share, [0.25, 0.0, 0.75], atol=0.01)


@pytest.mark.parametrize("half", [0.0, 0.3, -0.7, 1.0, 4.0])
def test_rotate_is_a_rotation(half: float) -> None:
    angle = 2.0 * np.arctan(half)
    turned = glyphs.rotate(np.array([2.0, 1.0]), np.array(half))
    expected = [2 * np.cos(angle) - np.sin(angle), 2 * np.sin(angle) + np.cos(angle)]
    np.testing.assert_allclose(turned, expected, atol=1e-12)


def test_bernstein_weights_are_those_of_a_curve() -> None:
    times = np.arange(9) / 8.0
    weights = glyphs.bernstein(times)
    np.testing.assert_allclose(weights.sum(axis=0), 1.0, atol=1e-15)
    np.testing.assert_array_equal(weights[:, [0, 8]], np.eye(5)[:, [0, 4]])
    np.testing.assert_allclose(glyphs.along(np.arange(5) / 4.0, weights), times, atol=1e-15)


@pytest.mark.parametrize(("pen", "width"), [(0, 3), (1, 4), (2, 5)])
def test_a_pen_has_its_width(pen: int, width: int) -> None:
    dot = np.zeros((1, 15, 15), dtype=np.uint8)
    dot[0, 7, 7] = 1
    mark = glyphs.thicken(dot, np.full((1, 1, 1), pen))[0]
    assert mark.any(axis=0).sum() == mark.any(axis=1).sum() == width
    assert mark.max() == 1


def test_every_drawing_has_ink_inside_the_page(images: np.ndarray) -> None:
    ink = images.mean(axis=(2, 3)) / 255
    assert 0.055 < ink.mean() < 0.09
    assert ink.min() > 0.008
    assert ink.max() < 0.3
    frame = images.copy()
    frame[:, :, 1:-1, 1:-1] = 0
    assert (frame > 0).any(axis=(2, 3)).mean() < 0.05  # a broad pen at the margin
    assert set(np.unique(images)) <= {255 * k // 9 for k in range(10)}


def test_drawings_and_characters_all_differ(images: np.ndarray) -> None:
    flat = images.reshape(-1, 28 * 28)
    assert len({row.tobytes() for row in flat}) == len(flat)


def test_a_drawer_keeps_the_pen_within_an_alphabet(images: np.ndarray) -> None:
    """Between drawers the ink of an alphabet differs more than chance would make it."""
    ink = images[: glyphs.SIZES[0]].mean(axis=(2, 3))
    drawers = (ink / ink.mean(axis=1, keepdims=True)).mean(axis=0)
    noise = (ink / ink.mean(axis=1, keepdims=True)).std(axis=0).mean() / glyphs.SIZES[0] ** 0.5
    assert drawers.std() > 3 * noise


def pixel_nearest_neighbour(images: np.ndarray, ways: int, episodes: int) -> float:
    """Mean 1-shot accuracy with 5 queries a class, over random episodes."""
    rng = np.random.default_rng(0)
    right = 0.0
    for _ in range(episodes):
        chosen = rng.choice(len(images), ways, replace=False)
        drawings = np.argsort(rng.random((ways, 20)), axis=1)[:, :6]
        x = images[chosen[:, None], drawings].reshape(ways, 6, -1).astype(np.float64) / 255
        support, query = x[:, 0], x[:, 1:].reshape(ways * 5, -1)
        distance = (support**2).sum(axis=1) - 2 * query @ support.T
        right += float((distance.argmin(axis=1) == np.repeat(np.arange(ways), 5)).mean())
    return right / episodes


def test_pixels_alone_do_about_as_well_as_on_omniglot(images: np.ndarray) -> None:
    """Omniglot's vinyals test classes: 42 % and 23 % (1000 episodes); glyphs: 46 % and 26 %."""
    test = images[-sum(glyphs.SIZES[a] for a in glyphs.SUBSETS["test"]) :]
    assert 0.42 < pixel_nearest_neighbour(test, 5, 400) < 0.51
    assert 0.22 < pixel_nearest_neighbour(test, 20, 100) < 0.30


def test_build_splits_by_alphabet(data: ImageData) -> None:
    assert (data.name, data.version, data.split) == ("glyphs", "glyphs-1", "alphabets")
    assert data.classes[0] == "alphabet00/character00"
    assert len(set(data.classes)) == len(data.images) == 1600
    counts = {name: len(members) for name, members in data.subsets.items()}
    assert counts == glyphs.METABENCH["splits"]["alphabets"]
    alphabets = [{data.classes[c].split("/")[0] for c in data.subsets[s]} for s in ("train", "val", "test")]
    assert [len(a) for a in alphabets] == [33, 5, 12]
    assert len(set.union(*alphabets)) == 50
    np.testing.assert_array_equal(np.sort(np.concatenate(list(data.subsets.values()))), np.arange(1600))


def test_build_refuses_another_split() -> None:
    with pytest.raises(ConfigError, match=r"no split 'alphabet' \(did you mean 'alphabets'\?\)"):
        glyphs.build(split="alphabet")  # type: ignore[arg-type]
