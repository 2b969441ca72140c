"""Omniglot: the class lists and splits always; the images where the data are (METABENCH_DATA or ../shared/data)."""

from __future__ import annotations

import ast
import hashlib
import inspect
import io
import logging
import os
import random
import re
import shutil
import struct
import time
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from metabench.datasets import files, omniglot
from metabench.episodes import ImageData
from metabench.errors import ConfigError, DataError

ROOT = Path(os.environ.get("METABENCH_DATA") or Path(__file__).parents[2] / "shared" / "data")
SOURCE = ROOT / "omniglot"
needs_data = pytest.mark.skipif(
    not (SOURCE / "images_evaluation.zip").exists(), reason=f"no Omniglot zips in {SOURCE} (METABENCH_DATA)"
)
SMALL_SHA256 = "01c827169127b17e8a0187716225e30276d0aa19445dca28ac380f4ecd91e060"  # Pillow 10.3 to 13.0


@pytest.fixture
def nowhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty data root and an empty cache folder; no network."""
    monkeypatch.setenv("METABENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METABENCH_DATA", str(tmp_path / "root"))
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setattr(omniglot, "URL", "http://127.0.0.1:9")
    (tmp_path / "root").mkdir()
    return tmp_path


@dataclass(frozen=True)
class Decoded:
    cache: Path
    data: ImageData
    seconds: float  # of the processor: other work on the machine does not count
    log: str


@pytest.fixture(scope="session")
def decoded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoded]:
    """The one full decode of the session, into a cache folder of its own."""
    cache = tmp_path_factory.mktemp("cache")
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logger = logging.getLogger("metabench.datasets.omniglot")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METABENCH_CACHE", str(cache))
        patch.setenv("METABENCH_DATA", str(ROOT))
        start = time.process_time()
        data = omniglot.build()
        seconds = time.process_time() - start
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)
    yield Decoded(cache, data, seconds, stream.getvalue())


@pytest.fixture
def warm(decoded: Decoded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the decoded cache to damage; the empty root and no network: the cache is all there is."""
    shutil.copytree(decoded.cache, tmp_path / "cache", copy_function=os.link)  # `spoil` unlinks first
    monkeypatch.setenv("METABENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("METABENCH_DATA", str(tmp_path / "root"))
    return tmp_path / "cache" / "omniglot"


# Facts, without the images


def test_the_literal_tells_the_truth() -> None:
    tree = ast.parse(inspect.getsource(omniglot))
    literal = next(n.value for n in tree.body if isinstance(n, ast.Assign) and n.targets[0].id == "METABENCH")
    stated = ast.literal_eval(literal)
    assert stated == omniglot.METABENCH
    for split, counts in stated["splits"].items():
        assert {name: len(part) for name, part in omniglot._subsets(split).items()} == counts
    parameters = inspect.signature(omniglot.build).parameters
    assert parameters["split"].default == next(iter(stated["splits"]))
    assert all(repr(split) in parameters["split"].annotation for split in stated["splits"])


@pytest.mark.parametrize("split", ["vinyals", "random1200", "background"])
def test_subsets_partition_the_classes(split: str) -> None:
    subsets = omniglot._subsets(split)
    assert list(subsets) == ["train", "val", "test"]
    assert sorted(np.concatenate(list(subsets.values()))) == list(range(1623))
    assert all(part.dtype == np.int64 and (np.diff(part) > 0).all() for part in subsets.values())


def test_class_names() -> None:
    names = omniglot._facts().classes
    assert list(names) == sorted(set(names))
    assert len(names) == 1623
    assert names[0] == "Alphabet_of_the_Magi/character01"
    assert len({name.split("/")[0] for name in names}) == 50


@needs_data
@pytest.mark.parametrize("subset", ["train", "val", "test"])
def test_vinyals_is_the_published_list(subset: str) -> None:
    lines = (SOURCE / "splits" / "vinyals" / f"{subset}.txt").read_text().split()
    published = {line.rsplit("/", 1)[0] for line in lines}
    names = omniglot._facts().classes
    assert {names[i] for i in omniglot._subsets("vinyals")[subset]} == published


def test_vinyals_cuts_gurmukhi_and_nothing_else() -> None:
    names = omniglot._facts().classes
    alphabets = [{names[i].split("/")[0] for i in part} for part in omniglot._subsets("vinyals").values()]
    assert [len(a) for a in alphabets] == [33, 5, 13]
    assert alphabets[0] & alphabets[2] == {"Gurmukhi"}


def test_background_val_is_the_last_five_alphabets() -> None:
    names = omniglot._facts().classes
    subsets = omniglot._subsets("background")
    train, val, test = ({names[i].split("/")[0] for i in part} for part in subsets.values())
    assert (len(train), len(val), len(test)) == (25, 5, 20)
    assert max(train) < min(val)
    assert len(subsets["train"]) + len(subsets["val"]) == 964


def test_random1200_never_changes() -> None:
    subsets = omniglot._subsets("random1200")
    digest = hashlib.sha256(np.concatenate(list(subsets.values())).astype("<i8").tobytes()).hexdigest()
    assert digest == "c351b66d9e21af04f59435690dbc48c380dd157426421ae8fdb66cce12746b08"
    alphabets = {omniglot._facts().classes[i].split("/")[0] for i in subsets["test"]}
    assert len(alphabets) == 50, "irrespective of alphabet"


def test_unknown_split_and_size() -> None:
    with pytest.raises(ConfigError, match=r"'vinyal'.*did you mean 'vinyals'"):
        omniglot.build(split="vinyal")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="28, 35 or 105, not 32"):
        omniglot.build(size=32)  # type: ignore[arg-type]


# Nothing there


def test_empty_data_root_says_where_it_looked(nowhere: Path) -> None:
    with pytest.raises(DataError, match=r"images_background\.zip.*metabench data fetch omniglot") as caught:
        omniglot.build()
    root = nowhere / "root"
    for place in (root / "omniglot" / "images_background.zip", root / "images_evaluation"):
        assert str(place) in str(caught.value)
    assert not list(root.iterdir())
    assert omniglot.status() == files.DataStatus(
        "omniglot", "missing", "run `metabench data fetch omniglot` (14 MB)", "omniglot-1"
    )
    with pytest.raises(DataError, match="nothing to verify"):
        omniglot.verify()


@pytest.mark.parametrize("call", [omniglot.build, omniglot.fetch])
def test_no_network(nowhere: Path, monkeypatch: pytest.MonkeyPatch, call: object) -> None:
    monkeypatch.delenv("METABENCH_DATA")
    start = time.perf_counter()
    with pytest.raises(DataError, match=r"metabench data fetch omniglot.*--data-root DIR") as caught:
        call()  # type: ignore[operator]
    assert "http://127.0.0.1:9/images_background.zip" in str(caught.value)
    assert time.perf_counter() - start < 5
    assert not [p for p in nowhere.rglob("*") if p.is_file()]


def test_one_half_is_not_enough(nowhere: Path) -> None:
    (nowhere / "root" / "images_background").mkdir()
    assert omniglot.status().state == "missing"
    with pytest.raises(DataError, match="both halves"):
        omniglot.build()


# Pictures that are not Omniglot's


def png(side: int = 105, mode: str = "1") -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (side, side), 1 if mode == "1" else "white").save(buffer, "PNG")
    return buffer.getvalue()


def write_half(root: Path, members: dict[str, bytes]) -> None:
    for half in omniglot.HALVES:
        with zipfile.ZipFile(root / f"{half}.zip", "w") as archive:
            for name, content in members.items():
                archive.writestr(f"{half}/{name}", content)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("Greek/character01/0394_01.png", png(), "19279 of 19280 drawings are missing"),
        ("Greek/character25/0394_01.png", png(), "no drawing of Omniglot's images_background"),
        ("Greek/character01/0394_21.png", png(), "no drawing of Omniglot's images_background"),
        ("Tibetan/character01/0394_01.png", png(), "no drawing of Omniglot's images_background"),
        ("Greek/character01/0394_01.png", png(28), r"\(28, 28\), not 105x105"),
        ("Greek/character01/0394_01.png", b"GIF89a", "damaged PNG"),
        ("Greek/character01/0394_01.png", png()[:60], "damaged PNG"),
        ("../character01/0394_01.png", png(), "leads outside"),
        ("Greek/character01/0394_01.png", bytes(100_000), "over 65536"),
    ],
)
def test_wrong_members(nowhere: Path, name: str, content: bytes, message: str) -> None:
    write_half(nowhere / "root", {name: content})
    with pytest.raises(DataError, match=message) as caught:
        omniglot.build()
    assert str(nowhere / "root" / "images_background.zip") in str(caught.value)
    assert not [p for p in (nowhere / "cache").rglob("*") if p.is_file()]


def mend(raw: bytes) -> bytes:
    """Make the chunks' checksums right again, so that a damage reaches the decoder."""
    out, at = bytearray(raw[:8]), 8
    while at + 12 <= len(raw):
        end = at + 8 + int.from_bytes(raw[at : at + 4], "big")
        out += raw[at:end] + struct.pack(">I", zlib.crc32(raw[at + 4 : end]))
        at = end + 4
    return bytes(out)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_a_damaged_png_is_a_data_error_or_an_image() -> None:
    draw = random.Random(0)
    outcomes = set()
    for _ in range(1500):
        raw = bytearray(png(mode=draw.choice(["1", "L", "RGB"])))
        for _ in range(draw.randint(0, 3)):
            raw[draw.randrange(8, len(raw))] = draw.randrange(256)
        try:
            outcomes.add(omniglot._png(Path("x.zip"), "a.png", mend(bytes(raw))).shape)
        except DataError as error:
            assert re.match(r"x\.zip: a\.png is ", str(error))
            outcomes.add(DataError)
    assert outcomes == {(105, 105), DataError}


# The real thing


@needs_data
def test_first_use(decoded: Decoded) -> None:
    assert decoded.seconds < 25
    assert len(decoded.log.splitlines()) == 1
    assert "decoding Omniglot once" in decoded.log
    data = decoded.data
    assert (data.name, data.version, data.split) == ("omniglot", "omniglot-1", "vinyals")
    assert data.images.shape == (1623, 20, 28, 28)
    assert data.images.dtype == np.uint8
    assert data.images.flags.writeable, "torch.from_numpy wants that"
    assert data.classes == omniglot._facts().classes
    assert hashlib.sha256(data.images.tobytes()).hexdigest() == SMALL_SHA256


@needs_data
def test_small_images_are_anti_aliased_strokes_on_zero(decoded: Decoded) -> None:
    images = decoded.data.images
    corners = images[..., [0, 0, -1, -1], [0, -1, 0, -1]]
    assert np.median(images) == 0
    assert (corners == 0).mean() > 0.99
    assert images.max() == 255
    assert ((images > 30) & (images < 225)).mean() > 0.05, "grey edges: not the nearest pixel"


@needs_data
@pytest.mark.usefixtures("warm")
def test_large_images_are_the_pngs_in_order() -> None:
    data = omniglot.build(size=105, split="background")
    assert data.images.shape == (1623, 20, 105, 105)
    with zipfile.ZipFile(SOURCE / "images_evaluation.zip") as archive:
        names = sorted(archive.namelist())
        for name in names[:: len(names) // 15]:
            _, alphabet, character, file = name.split("/")
            of_class = [n for n in names if n.startswith(f"images_evaluation/{alphabet}/{character}/")]
            with Image.open(io.BytesIO(archive.read(name))) as image:
                strokes = np.where(np.asarray(image), 0, 255)
            place = data.classes.index(f"{alphabet}/{character}"), of_class.index(name)
            np.testing.assert_array_equal(data.images[place], strokes)
            assert place[1] == int(file[5:7]) - 1


@needs_data
@pytest.mark.usefixtures("warm")
def test_the_third_size_shows_the_same_episodes(decoded: Decoded) -> None:
    """Its side is a third of the original's; it is made at its first use only, and nothing else changes."""
    assert not files.present(omniglot._small_path(35))
    data = omniglot.build(size=35)
    assert files.present(omniglot._small_path(35)) and omniglot.verify().state == "cached"
    large = omniglot.build(size=105).images[:50]
    means = large.reshape(50, 20, 35, 3, 35, 3).mean((3, 5))  # what a resize by 3 is near to, whatever the filter
    assert np.corrcoef(means.ravel(), data.images[:50].ravel())[0, 1] > 0.95
    shape = {"ways": 5, "shots": 1, "queries": 1, "rotations": "classes", "seed": 0, "device": "cpu"}
    small, smaller = (d.tasks("test", **shape).episodes(0, 4) for d in (data, decoded.data))
    assert small.ids == smaller.ids and small.support.x.shape[-2:] == (35, 35)


@needs_data
@pytest.mark.usefixtures("warm")
@pytest.mark.parametrize("size", [28, 105])
def test_later_loads_are_fast(size: int) -> None:
    seconds = []
    for _ in range(3):
        start = time.process_time()
        omniglot.build(size=size)  # type: ignore[arg-type]
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.5


@needs_data
def test_status_and_verify_of_a_good_cache(decoded: Decoded, monkeypatch: pytest.MonkeyPatch, warm: Path) -> None:
    assert omniglot.status().state == "cached"
    verified = omniglot.verify()
    assert verified.state == "cached"
    assert all(str(path) in verified.detail for path in warm.iterdir())
    assert omniglot.fetch().state == "cached", "nothing to download"
    monkeypatch.setenv("METABENCH_CACHE", str(warm / "other"))
    monkeypatch.setenv("METABENCH_DATA", str(ROOT))
    assert omniglot.status().state == "ready"


@needs_data
@pytest.mark.parametrize("damage", ["cut", "flip", "empty", "folder"])
def test_damaged_small_cache_is_made_again(
    decoded: Decoded, warm: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    """The drawings are cached too: the small images come from these, without the source."""
    monkeypatch.setattr(omniglot, "_resized", lambda *_: decoded.data.images)  # 3 s, and not the point here
    path = next(warm.glob("*28x28*"))
    spoil(path, damage)
    with pytest.raises(DataError, match=r"28x28.* is damaged"):
        omniglot.verify()
    assert omniglot.build().pixels_hash == decoded.data.pixels_hash
    assert str(path) in caplog.text
    if damage != "folder":  # it stands in the way: a warning, and the run goes on
        assert omniglot.verify().state == "cached"


@needs_data
@pytest.mark.parametrize("damage", ["cut", "flip"])
def test_damaged_drawings_are_decoded_again(
    warm: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    good = omniglot._cached_bits()
    path = next(warm.glob("*bits*"))
    spoil(path, damage)
    assert omniglot.status().state == "missing"
    with pytest.raises(DataError, match="data root"):  # there is no source left to decode
        omniglot.build(size=105)
    monkeypatch.setenv("METABENCH_DATA", str(ROOT))
    monkeypatch.setattr(omniglot, "_decode", lambda _: good)  # 4 s, and tested elsewhere
    omniglot.build(size=105)
    assert str(path) in caplog.text
    np.testing.assert_array_equal(omniglot._cached_bits(), good)


def spoil(path: Path, damage: str) -> None:
    raw = bytearray(path.read_bytes())
    if damage == "cut":
        del raw[len(raw) // 2 :]
    elif damage == "flip":
        raw[-1] ^= 1
    elif damage == "empty":
        raw.clear()
    path.unlink()
    if damage == "folder":
        path.mkdir()
    else:
        path.write_bytes(raw)


@needs_data
def test_an_extracted_folder_is_read_and_compared_by_alphabet(nowhere: Path) -> None:
    """Nineteen alphabets from the folder are right, and the one with another drawing is named."""
    root = nowhere / "root"
    with zipfile.ZipFile(SOURCE / "images_evaluation.zip") as archive:
        archive.extractall(root)
    folder = root / "images_evaluation"
    next((folder / "Tibetan" / "character03").iterdir()).write_bytes(png())
    strokes = np.zeros((1623, 20, 105, 105), dtype=bool)
    omniglot._decode_half("images_evaluation", folder, strokes)
    with pytest.raises(DataError, match=r"do not match Omniglot's content hash; they differ in Tibetan\.") as caught:
        omniglot._check_half("images_evaluation", folder, strokes)
    assert str(folder) in str(caught.value)


@needs_data
def test_an_altered_zip_is_refused_by_name(nowhere: Path) -> None:
    root = nowhere / "root" / "omniglot"
    root.mkdir()
    shutil.copy(SOURCE / "images_evaluation.zip", root)
    with (
        zipfile.ZipFile(SOURCE / "images_background.zip") as old,
        zipfile.ZipFile(root / "images_background.zip", "w") as new,
    ):
        for name in old.namelist():
            new.writestr(name, png() if name.endswith("Latin/character05/0687_07.png") else old.read(name))
    with pytest.raises(DataError, match=r"images_background\.zip: the decoded images do not match .* in Latin\."):
        omniglot.build()
    assert not [p for p in (nowhere / "cache").rglob("*") if p.is_file()], "nothing wrong is cached"
