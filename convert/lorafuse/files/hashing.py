"""sha256 of files, a piece at a time."""

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from lorafuse.files.safetensors_file import open_regular

READ_NBYTES = 1 << 20


class FileHash(NamedTuple):
    """What a receipt says about a file."""

    size: int
    sha256: str


def hash_file(path: Path, on_nbytes: Callable[[int], object] = lambda n: None) -> FileHash:
    """Size and sha256 of a file, 1 MiB at a time; `on_nbytes` hears of each piece and may end it by an
    exception. Raises FormatError for what is no regular file, OSError."""
    digest, nbytes = hashlib.sha256(), 0
    buffer = bytearray(READ_NBYTES)
    with open(open_regular(path), "rb", buffering=0) as f:
        while n := f.readinto(buffer):
            digest.update(memoryview(buffer)[:n])
            nbytes += n
            on_nbytes(n)
    return FileHash(nbytes, digest.hexdigest())
