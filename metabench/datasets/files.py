"""Where data-set files live, and how they are fetched, read and cached safely.

Three places, never mixed: the *data root* (`METABENCH_DATA`, the user's own files, only ever read), the *cache folder*
(`METABENCH_CACHE` or the platform's, ours to write) and the downloads inside it. Archives are read member by member in
memory, never unpacked, so that a hostile zip can neither write outside a folder nor fill the disk or the memory.
"""

from __future__ import annotations

import hashlib
import logging
import math
import os
import re
import secrets
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from metabench.errors import DataError

_log = logging.getLogger(__name__)

State = Literal["embedded", "ready", "cached", "missing"]


@dataclass(frozen=True)
class DataStatus:
    """What there is of a data set on this machine.

    `state`: `embedded` (comes with the package), `cached` (decoded, loads at once), `ready` (files present, to be
    decoded at first use) or `missing` (to be fetched). `detail` is one line for a reader, `version` the data's version.
    """

    name: str
    state: State
    detail: str
    version: str


@dataclass(frozen=True)
class Bounds:
    """What an archive or a folder may hold at most, before it is refused unread."""

    members: int = 50_000
    member_bytes: int = 65_536


_BOUNDS = Bounds()


def data_root() -> Path | None:
    """Return the folder of the user's own data files, `METABENCH_DATA`, or None when it is unset or empty."""
    value = os.environ.get("METABENCH_DATA", "")
    return Path(value).expanduser() if value else None


def cache_dir() -> Path:
    """Return the folder for downloads and decoded data: `METABENCH_CACHE`, else the platform's cache folder."""
    value = os.environ.get("METABENCH_CACHE", "")
    if value:
        return Path(value).expanduser()
    import pooch

    return Path(pooch.os_cache("metabench"))


def downloads_dir(name: str) -> Path:
    """Return the folder that holds the downloaded files of the data set `name`."""
    return cache_dir() / "downloads" / name


def present(path: Path) -> bool:
    """Whether `path` is there; what lies in a folder that may not be read is not."""
    try:
        return path.exists()
    except OSError:
        return False


def download(url: str, path: Path, *, md5: str, otherwise: str) -> Path:
    """Fetch `url` to `path` unless it is there with this checksum; an incomplete or altered download is never kept.

    Args:
        url: http(s) address.
        path: where the file goes; its folder is made.
        md5: the official checksum, in hexadecimal.
        otherwise: what the user can do without a network; ends the error message.

    Raises:
        DataError: no network, another checksum, or a folder that cannot be written.
    """
    import pooch

    downloader = pooch.HTTPDownloader(timeout=30)
    try:
        pooch.retrieve(url, known_hash=f"md5:{md5}", fname=path.name, path=path.parent, downloader=downloader)
    except ValueError as error:
        message = f"{url}: the download's checksum is not the official one, it was not kept. Try again, or {otherwise}"
        raise DataError(message) from error
    except OSError as error:  # the network's errors (requests) are OSErrors too
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"cannot download {url} to {path.parent} ({reason}). To go on: {otherwise}") from error
    return path


def read_members(
    source: Path, pattern: re.Pattern[str], *, bounds: Bounds = _BOUNDS
) -> Iterator[tuple[re.Match[str], bytes]]:
    """Yield (match, content) of every file in `source`, a zip or a folder, whose whole name matches `pattern`.

    Names are as in the archive, with `/`; in a folder they begin with the folder's own name. Other files are
    passed over.

    Raises:
        DataError: the source is unreadable, damaged or not safe to read; the message names the file and the fix.
    """
    return _read_folder(source, pattern, bounds) if source.is_dir() else _read_zip(source, pattern, bounds)


def _read_zip(source: Path, pattern: re.Pattern[str], bounds: Bounds) -> Iterator[tuple[re.Match[str], bytes]]:
    try:
        with zipfile.ZipFile(source) as archive:
            for info in _checked(source, archive.infolist(), bounds):
                if match := pattern.fullmatch(info.filename):
                    yield match, archive.read(info)
    # ValueError: names that are no text; RuntimeError: features that zipfile does not know
    except (zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise DataError(f"{source} is damaged or no zip ({reason}). Replace it with the official file.") from error


def _checked(source: Path, infos: list[zipfile.ZipInfo], bounds: Bounds) -> list[zipfile.ZipInfo]:
    """Return the members if all of them are safe to read, judged by the directory of the archive alone."""
    if len(infos) > bounds.members:
        raise _refused(source, f"it holds {len(infos)} members, over {bounds.members}")
    names: set[str] = set()
    for info in infos:
        name = info.filename
        # orig_filename: zipfile itself may have cut a name at a NUL byte or turned separators round
        if name.startswith(("/", "\\")) or ":" in name or ".." in re.split(r"[/\\]", info.orig_filename):
            raise _refused(source, f"the name {name!r} leads outside the archive")
        if info.flag_bits & 0x1:
            raise _refused(source, f"{name!r} is encrypted")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise _refused(source, f"{name!r} is compressed by another method than deflate")
        if info.file_size > bounds.member_bytes:
            raise _refused(source, f"{name!r} is {info.file_size} bytes long, over {bounds.member_bytes}")
        if name in names:
            raise _refused(source, f"{name!r} is there twice")
        names.add(name)
    return infos


def _refused(source: Path, why: str) -> DataError:
    return DataError(f"{source} was refused: {why}. Replace it with the official file.")


def _read_folder(source: Path, pattern: re.Pattern[str], bounds: Bounds) -> Iterator[tuple[re.Match[str], bytes]]:
    count = 0
    for folder, _, names in os.walk(source, onerror=_raise):
        for name in sorted(names):
            path = Path(folder, name)
            match = pattern.fullmatch(f"{source.name}/{path.relative_to(source).as_posix()}")
            if match is None:
                continue
            count += 1
            if count > bounds.members:
                raise _refused(source, f"it holds over {bounds.members} files")
            yield match, _read_file(path, bounds)


def _raise(error: OSError) -> None:
    raise DataError(f"cannot read the folder {error.filename}: {error.strerror}. Check its permissions.")


def _read_file(path: Path, bounds: Bounds) -> bytes:
    try:
        with path.open("rb") as file:
            content = file.read(bounds.member_bytes + 1)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}. Check the file and its permissions.") from error
    if len(content) > bounds.member_bytes:
        raise _refused(path, f"it is over {bounds.member_bytes} bytes long")
    return content


def _header(key: str, shape: tuple[int, ...], sha256: str) -> bytes:
    return f"metabench-cache 1 {key} {'x'.join(map(str, shape))} sha256:{sha256}\n".encode()


def read_cache(path: Path, *, key: str, shape: tuple[int, ...], sha256: str | None = None) -> np.ndarray | None:
    """Read an array that `write_cache` wrote, as writable uint8; None when there is none that can be trusted.

    The file is one header line and the raw bytes. The header is made again from what was read and compared
    whole, so that a truncated, altered or outdated file never passes; that is said in the log, and never an error.

    Args:
        path: the cache file.
        key: what the content is and how it was made (version, decoder, filter).
        shape: the array's shape.
        sha256: the one content to accept, where it is known beforehand.
    """
    size = math.prod(shape)
    try:
        with path.open("rb") as file:
            header = file.readline(4096)
            array = np.fromfile(file, dtype=np.uint8, count=size + 1)  # one more byte than there should be
    except FileNotFoundError:
        return None
    except OSError as error:
        _log.warning("cannot read the cache %s (%s): going on without it", path, error)
        return None
    digest = hashlib.sha256(array.data).hexdigest()
    if array.size != size or header != _header(key, shape, digest) or sha256 not in (None, digest):
        _log.warning("the cache %s is damaged or outdated: it is made again", path)
        return None
    return array.reshape(shape)


def write_cache(path: Path, array: np.ndarray, *, key: str) -> None:
    """Write a uint8 array for `read_cache`, whole or not at all: under a name of its own, then moved into place.

    Processes that write the same file at once do not harm each other: the last one wins. A folder that cannot be
    written costs a warning in the log, not the run.
    """
    spare = path.with_name(f"{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with spare.open("xb") as file:
                file.write(_header(key, array.shape, hashlib.sha256(array.data).hexdigest()))
                file.flush()
                array.tofile(file)
            spare.replace(path)
        finally:
            spare.unlink(missing_ok=True)
    except OSError as error:
        _log.warning(
            "cannot write the cache %s (%s): going on without; METABENCH_CACHE names another folder", path, error
        )
