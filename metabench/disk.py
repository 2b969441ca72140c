"""Files that are there whole or not at all, and the guarded door to the one kind of packed file that runs hold."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from tokenize import TokenError
from zipfile import ZIP_DEFLATED, ZIP_STORED, BadZipFile, ZipFile

import numpy as np
import numpy.typing as npt

from metabench.errors import StoreError

MAX_UNPACKED = 2**27  # bytes of one row's predictions: 100,000 episodes of 20 ways and 15 queries fit
_DAMAGE = (
    OSError, ValueError, KeyError, IndexError, TypeError, EOFError, MemoryError, RuntimeError, SyntaxError, TokenError,
    struct.error, zlib.error, BadZipFile,
)  # fmt: skip  # all that zipfile and numpy say of a file that is not what it should be
Ints = npt.NDArray[np.int64]


def write_whole(file: Path, data: bytes) -> None:
    """Write a file in one move: no reader, and no kill, ever sees half of it. Its folder must be there.

    Raises OSError where the disk refuses; then nothing is left beside it.
    """
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(file)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


def read_predictions(file: Path, *parts: str) -> tuple[Ints, ...]:
    """The named arrays (E, .) of a `predictions/*.npz`, whoever wrote it: whole numbers from 0 up, E the same in all.

    `predicted`, `ties` and `labels` are of one shape, so that no one of them can be larger than the scores bear out.
    A file of a few kilobytes can unpack to more than any memory holds: what a run never writes is not unpacked.

    Raises StoreError: damaged, too large, or not such arrays; the message begins with the file.
    """
    try:
        _check_size(file)
        with np.load(file, allow_pickle=False) as kept:
            found = {part: kept[part] for part in parts}
        if wrong := next(_wrong(found), None):
            raise ValueError(wrong)
        return tuple(array.astype(np.int64) for array in found.values())
    except _DAMAGE as error:
        raise StoreError(f"{file}: damaged ({str(error) or type(error).__name__})") from error


def _check_size(file: Path) -> None:
    """Raise ValueError for more than a run writes; zipfile never unpacks more of a member than its directory says."""
    with ZipFile(file) as archive:
        members = archive.infolist()
    if sum(member.file_size for member in members) > MAX_UNPACKED:
        raise ValueError(f"it unpacks to more than {MAX_UNPACKED:,} bytes, which no run writes")
    if any(member.compress_type not in (ZIP_STORED, ZIP_DEFLATED) for member in members):
        raise ValueError("it is packed in a way that no run uses")


def _wrong(found: dict[str, np.ndarray]) -> Iterator[str]:
    for part, array in found.items():
        if array.dtype.kind not in "iu" or array.ndim != 2 or not array.size:
            yield f"{part} is no table of whole numbers"
        elif not 0 <= array.min() <= array.max() < 2**63:
            yield f"{part} holds a number out of range"
    shapes = {array.shape for part, array in found.items() if part != "classes"}
    if len(shapes) > 1 or len({len(array) for array in found.values()}) > 1:
        yield "its arrays are not of one shape"
