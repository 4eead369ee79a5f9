"""Folder: named files with sizes, identities and ranged reads, wherever they lie.

A name is relative to the folder, with slashes. What lies on this machine is a `LocalFolder`; FOLDERS in
`folders.py` lists all kinds. Errors are OSErrors whose `filename` is the label, as the file system's are.
"""

import errno
import io
from pathlib import Path
from typing import Any, NamedTuple, Protocol

Buffer = bytearray | memoryview
# What changes when a file is written to or replaced, as JSON can say it: size, time and inode of a local
# file; of others perhaps an ETag or a sha256.
Identity = tuple[int | str, ...]


class FileHash(NamedTuple):
    """What a receipt says about a file."""

    size: int
    sha256: str


class FileFacts(NamedTuple):
    """What is known of a file without reading it. `version` also tells what `identity` may miss, but changes
    with mode and links too, so that it counts within one run alone."""

    nbytes: int
    identity: Identity
    version: Identity = ()


class OpenFile(Protocol):
    """A file that is open for ranged reads, by any number of threads."""

    @property
    def facts(self) -> FileFacts:
        """As they were when the file was opened."""

    def read_into(self, start: int, buffer: Buffer) -> int:
        """Read the bytes from byte `start` on into the beginning of `buffer`. Returns how many bytes were
        read, which may be fewer than fit; 0 at the end of the file. Raises OSError."""

    def will_need(self, start: int, nbytes: int) -> None:
        """Hint that these bytes are read soon."""

    def close(self) -> None: ...


class Folder(Protocol):
    """Named files. `str(folder)` is what messages call it."""

    def __str__(self) -> str: ...

    def __truediv__(self, name: str) -> str:
        """The label of a file: what messages call it. Nothing is opened."""

    @property
    def address(self) -> str:
        """A name of the folder that does not depend on the working directory."""

    @property
    def local_path(self) -> Path | None:
        """Where the folder lies in this machine's file system, if it does: an output must not lie there."""

    @property
    def commit(self) -> str | None:
        """The commit that all files are of, where the place has such."""

    @property
    def held_nbytes(self) -> int:
        """Host bytes that reading from it takes, beyond those that are read."""

    def is_there(self) -> bool:
        """Whether there is such a folder."""

    def exists(self, name: str) -> bool:
        """Whether a file or a sub-folder has this name."""

    def names(self, pattern: str) -> list[str]:
        """The files that match a pattern, sorted: `*` matches a part of a name, but no slash."""

    def sub_folders(self) -> list[str]:
        """The names of the folders in it, sorted."""

    def sub_folder(self, name: str) -> "Folder":
        """A folder in it, whether it is there or not."""

    def facts(self, name: str) -> FileFacts:
        """What is known of a file. Raises OSError."""

    def is_unchecked(self, name: str) -> bool:
        """Whether a copy of it lies here that nobody has compared with its `known_hash`."""

    def known_hash(self, name: str) -> FileHash | None:
        """What the place itself says that a file holds; None where it says nothing. Raises OSError."""

    def open(self, name: str, *, inside: bool = False) -> OpenFile:
        """A file. With `inside` a link that leads out of the folder is refused with a CheckpointError. Raises
        OSError, and FormatError for what is no regular file."""


def read_fully(file: OpenFile, start: int, nbytes: int) -> bytearray:
    """`nbytes` bytes from byte `start` on, or all up to the end of the file. Raises OSError."""
    data = bytearray(nbytes)
    view, n_read = memoryview(data), 0
    while n_read < nbytes and (n := file.read_into(start + n_read, view[n_read:])):
        n_read += n
    view.release()
    del data[n_read:]
    return data


def stream(file: OpenFile) -> io.BufferedReader:
    """The file as `torch.load`, `zipfile` and `shutil` expect files. Closing it closes `file`."""
    return io.BufferedReader(_Raw(file))  # type: ignore[arg-type]  # no RawIOBase: its calls suffice


class _Raw:
    """The calls of `io.RawIOBase` that `io.BufferedReader` makes to read."""

    def __init__(self, file: OpenFile) -> None:
        self._file, self._at, self.closed = file, 0, False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._file.read_into(self._at, memoryview(buffer))
        self._at += n
        return n

    def readall(self) -> bytes:
        data = read_fully(self._file, self._at, max(self._file.facts.nbytes - self._at, 0))
        self._at += len(data)
        return bytes(data)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.facts.nbytes}[whence]
        if origin + offset < 0:
            raise OSError(errno.EINVAL, "Invalid argument")
        self._at = origin + offset
        return self._at

    def tell(self) -> int:
        return self._at

    def flush(self) -> None:
        """Nothing was written."""

    def close(self) -> None:
        if not self.closed:
            self.closed = True
            self._file.close()
