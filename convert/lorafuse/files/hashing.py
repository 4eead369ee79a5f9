"""sha256 of files, a piece at a time."""

import hashlib
from collections.abc import Callable
from contextlib import closing
from typing import NamedTuple

from lorafuse.files.folder import Folder

READ_NBYTES = 1 << 20


class FileHash(NamedTuple):
    """What a receipt says about a file."""

    size: int
    sha256: str


def hash_file(folder: Folder, name: str, on_nbytes: Callable[[int], object] = lambda n: None) -> FileHash:
    """Size and sha256 of a file, 1 MiB at a time; `on_nbytes` hears of each piece and may end it by an
    exception. Raises FormatError for what is no regular file, OSError."""
    digest, nbytes = hashlib.sha256(), 0
    view = memoryview(bytearray(READ_NBYTES))
    with closing(folder.open(name)) as file:
        while n := file.read_into(nbytes, view):
            digest.update(view[:n])
            nbytes += n
            on_nbytes(n)
    return FileHash(nbytes, digest.hexdigest())
