"""Data files: hostile archives are refused, damaged caches are made again, failed downloads leave nothing."""

from __future__ import annotations

import functools
import hashlib
import http.server
import logging
import re
import threading
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metabench.datasets import files
from metabench.errors import DataError

NAME = re.compile(r"top/(\w+)\.png")
BOUNDS = files.Bounds(members=10, member_bytes=1000)


def make_zip(path: Path, members: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return path


def contents(source: Path) -> dict[str, bytes]:
    return {match[1]: content for match, content in files.read_members(source, NAME, bounds=BOUNDS)}


# Reading


def test_zip_and_folder_yield_the_matching_members_only(tmp_path: Path) -> None:
    members = {"top/": b"", "top/a.png": b"A", "top/b.png": b"B", "top/note.txt": b"-", "__MACOSX/top/a.png": b"-"}
    assert contents(make_zip(tmp_path / "x.zip", members)) == {"a": b"A", "b": b"B"}
    folder = tmp_path / "top"
    folder.mkdir()
    for name in ("a.png", "b.png", "note.txt"):
        (folder / name).write_bytes(name[:1].upper().encode())
    assert contents(folder) == {"a": b"A", "b": b"B"}


@pytest.mark.parametrize("name", ["../a.png", "top/../../a.png", "/etc/a.png", "\\a.png", "top\\..\\a.png", "C:/a.png"])
def test_names_that_lead_outside_are_refused(tmp_path: Path, name: str) -> None:
    source = make_zip(tmp_path / "x.zip", {"top/a.png": b"A", name: b"!"})
    with pytest.raises(DataError, match=r"x\.zip was refused: .* leads outside"):
        contents(source)
    assert [p.name for p in tmp_path.rglob("*")] == ["x.zip"], "reading writes nothing"


def test_zip_bombs_are_refused_before_they_are_inflated(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="50000000 bytes long, over 1000"):
        contents(make_zip(tmp_path / "big.zip", {"top/a.png": bytes(50_000_000)}))
    with pytest.raises(DataError, match="11 members, over 10"):
        contents(make_zip(tmp_path / "many.zip", {f"top/{n}.png": b"" for n in range(11)}))


def test_a_member_longer_than_it_says_is_refused(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "lie.zip", {"top/a.png": bytes(500_000)})
    raw = source.read_bytes()
    short = raw.replace((500_000).to_bytes(4, "little"), (900).to_bytes(4, "little"))
    assert short != raw
    source.write_bytes(short)
    with pytest.raises(DataError, match=r"lie\.zip is damaged"):
        contents(source)


def test_encrypted_doubled_and_oddly_packed_members_are_refused(tmp_path: Path) -> None:
    source = make_zip(tmp_path / "x.zip", {"top/a.png": b"A"})
    raw = bytearray(source.read_bytes())
    raw[6] |= 1  # the flags of the local header
    raw[raw.index(b"PK\x01\x02") + 8] |= 1  # and of the directory
    source.write_bytes(raw)
    with pytest.raises(DataError, match="encrypted"):
        contents(source)
    with zipfile.ZipFile(tmp_path / "lzma.zip", "w", zipfile.ZIP_LZMA) as archive:
        archive.writestr("top/a.png", b"A")
    with pytest.raises(DataError, match="another method than deflate"):
        contents(tmp_path / "lzma.zip")
    with pytest.warns(UserWarning, match="Duplicate"), zipfile.ZipFile(tmp_path / "two.zip", "w") as archive:
        archive.writestr("top/a.png", b"A")
        archive.writestr("top/a.png", b"B")
    with pytest.raises(DataError, match="there twice"):
        contents(tmp_path / "two.zip")


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_zip_is_an_error_or_still_reads_right(tmp_path: Path, data: st.DataObject) -> None:
    """No byte changed or cut makes anything but a DataError, and never other content."""
    members = {"top/a.png": b"first" * 20, "top/ä.png": b"second" * 20}
    source = make_zip(tmp_path / "x.zip", members)
    raw = bytearray(source.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    if data.draw(st.booleans()):
        raw[at] = data.draw(st.integers(0, 255))
    else:
        del raw[at:]
    source.write_bytes(raw)
    try:
        found = contents(source)
    except DataError as error:
        assert str(source) in str(error)
    else:  # a changed name may hide a member, a changed content may not pass
        assert set(found.values()) <= set(members.values())


@pytest.mark.parametrize("content", [b"", b"not a zip at all", b"PK\x03\x04"])
def test_no_zip(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "x.zip").write_bytes(content)
    with pytest.raises(DataError, match=r"x\.zip is damaged or no zip.*Replace it"):
        contents(tmp_path / "x.zip")


def test_folders_are_bounded_too(tmp_path: Path) -> None:
    folder = tmp_path / "top"
    folder.mkdir()
    (folder / "a.png").write_bytes(bytes(1001))
    with pytest.raises(DataError, match=r"a\.png was refused: it is over 1000 bytes"):
        contents(folder)
    for n in range(11):
        (folder / f"{n}.png").write_bytes(b"")
    (folder / "a.png").unlink()
    with pytest.raises(DataError, match="over 10 files"):
        contents(folder)


# Places


def test_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("METABENCH_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("METABENCH_CACHE", str(tmp_path / "cache"))
    assert files.data_root() == tmp_path / "data"
    assert files.downloads_dir("x") == tmp_path / "cache" / "downloads" / "x"
    monkeypatch.setenv("METABENCH_DATA", "")
    monkeypatch.delenv("METABENCH_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert files.data_root() is None
    assert "metabench" in files.cache_dir().parts
    assert not list(tmp_path.iterdir()), "asking makes no folder"


# The cache

ARRAY = np.arange(60, dtype=np.uint8).reshape(3, 4, 5)


def read(path: Path, key: str = "v1 bits") -> np.ndarray | None:
    return files.read_cache(path, key=key, shape=ARRAY.shape)


def test_cache_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "x.cache"
    assert read(path) is None
    files.write_cache(path, ARRAY, key="v1 bits")
    again = read(path)
    assert again is not None
    np.testing.assert_array_equal(again, ARRAY)
    assert again.flags.writeable
    assert [p.name for p in path.parent.iterdir()] == ["x.cache"], "no temporary file is left"
    assert read(path, key="v2 bits") is None, "another version's cache is not taken"
    digest = hashlib.sha256(ARRAY.tobytes()).hexdigest()
    assert files.read_cache(path, key="v1 bits", shape=ARRAY.shape, sha256=digest) is not None
    assert files.read_cache(path, key="v1 bits", shape=ARRAY.shape, sha256="0" * 64) is None
    assert files.read_cache(path, key="v1 bits", shape=(60,)) is None


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_passes_the_cache(tmp_path: Path, data: st.DataObject) -> None:
    path = tmp_path / "x.cache"
    files.write_cache(path, ARRAY, key="v1 bits")
    raw = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, len(raw) - 1))
    how = data.draw(st.sampled_from(["flip", "cut", "grow"]))
    if how == "flip":
        raw[at] ^= data.draw(st.integers(1, 255))
    elif how == "cut":
        del raw[at:]
    else:
        raw += data.draw(st.binary(min_size=1))
    path.write_bytes(raw)
    assert read(path) is None


def test_unreadable_and_unwritable_caches_are_said_not_raised(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "dir.cache").mkdir()
    (tmp_path / "file").write_text("in the way")
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path / "dir.cache") is None
        files.write_cache(tmp_path / "dir.cache", ARRAY, key="k")
        files.write_cache(tmp_path / "file" / "x.cache", ARRAY, key="k")
    assert [r.message.split()[1] for r in caplog.records] == ["read", "write", "write"]
    assert "METABENCH_CACHE" in caplog.text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dir.cache", "file"], "no temporary file is left"


def test_writers_at_once_leave_a_whole_cache(tmp_path: Path) -> None:
    path = tmp_path / "x.cache"
    big = np.arange(2_000_000, dtype=np.uint32).view(np.uint8)
    seen: list[np.ndarray | None] = []

    def work(_: int) -> None:
        files.write_cache(path, big, key="k")
        seen.append(files.read_cache(path, key="k", shape=big.shape))

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(12)))
    assert len(seen) == 12
    assert all(array is not None and np.array_equal(array, big) for array in seen)
    assert [p.name for p in tmp_path.iterdir()] == ["x.cache"]


# Downloads, from a server on this machine


class _Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        if "cut" not in self.path:
            return super().do_GET()
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"only the beginning")
        return None


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    folder = tmp_path / "served"
    folder.mkdir()
    (folder / "x.zip").write_bytes(b"the content")
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, directory=str(folder)))
    thread = threading.Thread(target=httpd.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{httpd.server_address[1]}"
    httpd.shutdown()
    httpd.server_close()
    thread.join()


MD5 = hashlib.md5(b"the content").hexdigest()


def test_download_once(tmp_path: Path, server: str) -> None:
    path = tmp_path / "got" / "x.zip"
    assert files.download(f"{server}/x.zip", path, md5=MD5, otherwise="-") == path
    assert path.read_bytes() == b"the content"
    files.download("http://127.0.0.1:9/x.zip", path, md5=MD5, otherwise="-")  # there already: no network needed
    path.write_bytes(b"the con")  # cut short by someone: fetched again
    files.download(f"{server}/x.zip", path, md5=MD5, otherwise="-")
    assert path.read_bytes() == b"the content"


@pytest.mark.parametrize(
    ("name", "reason"), [("x.zip", "checksum"), ("cut.zip", "cannot download|checksum"), ("none.zip", "404")]
)
def test_a_bad_download_is_not_kept(tmp_path: Path, server: str, name: str, reason: str) -> None:
    path = tmp_path / "got" / name
    with pytest.raises(DataError, match=rf"(?s){reason}.*do this instead"):
        files.download(f"{server}/{name}", path, md5="0" * 32, otherwise="do this instead")
    assert not list((tmp_path / "got").iterdir())


def test_no_network_says_what_to_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with pytest.raises(DataError, match=r"cannot download http://127\.0\.0\.1:9/x\.zip .*To go on: do this"):
        files.download("http://127.0.0.1:9/x.zip", tmp_path / "x.zip", md5=MD5, otherwise="do this")
