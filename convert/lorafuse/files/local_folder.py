"""A folder in this machine's file system.

The checks that only a file system needs are here: what is no regular file is refused instead of waited for,
and a link that leads out of its directory is not copied.
"""

import errno
import os
import re
import stat
from dataclasses import dataclass
from io import FileIO
from os import PathLike, fspath
from pathlib import Path
from typing import ClassVar
from urllib.parse import unquote

from lorafuse.errors import CheckpointError, UsageError, shown
from lorafuse.files.cloud_url import SCHEMES
from lorafuse.files.folder import Buffer, FileFacts
from lorafuse.files.names import without_secrets
from lorafuse.files.safetensors_file import FormatError

AHEAD_NBYTES = 4 << 20


@dataclass(frozen=True)
class LocalFolder:
    """The directory `path`."""

    path: Path
    commit: ClassVar[None] = None
    held_nbytes: ClassVar[int] = 0

    @classmethod
    def at(cls, name: str) -> "LocalFolder":
        """The directory that a user names."""
        return cls(Path(name))

    def __str__(self) -> str:
        return str(self.path)

    def __truediv__(self, name: str) -> str:
        return str(self.path / name)

    @property
    def address(self) -> str:
        """The real path."""
        return os.path.realpath(self.path)

    @property
    def local_path(self) -> Path:
        return self.path

    def is_there(self) -> bool:
        return self.path.is_dir()

    def exists(self, name: str) -> bool:
        return (self.path / name).exists()

    def names(self, pattern: str) -> list[str]:
        """A link that leads nowhere is listed where the pattern has a `*`."""
        paths = sorted(path for path in self.path.glob(pattern) if not path.is_dir())
        return [path.relative_to(self.path).as_posix() for path in paths]

    def sub_folders(self) -> list[str]:
        return sorted(path.name for path in self.path.glob("*") if path.is_dir())

    def sub_folder(self, name: str) -> "LocalFolder":
        return LocalFolder(self.path / name)

    def facts(self, name: str) -> FileFacts:
        return _facts(os.stat(self / name))

    def is_unchecked(self, name: str) -> bool:
        return True

    def known_hash(self, name: str) -> None:
        """A file system says nothing of contents."""

    def open(self, name: str, *, inside: bool = False) -> "LocalFile":
        if inside:
            _refuse_escape(self.path / name, self.path)
        return LocalFile(self / name)


class LocalFile:
    """A file in the file system, open for ranged reads."""

    def __init__(self, path: str) -> None:
        self._file = open_regular(path)
        self._fd = self._file.fileno()
        self.facts = _facts(os.fstat(self._fd))
        self._asked = range(0)  # for these bytes the kernel was asked last

    def read_into(self, start: int, buffer: Buffer) -> int:
        return os.preadv(self._fd, [buffer], start)

    def will_need(self, start: int, nbytes: int) -> None:
        """Ask the kernel to read ahead, and farther than that: what a tile takes is little, and what follows
        it is needed next."""
        if start not in self._asked or start + nbytes > self._asked.stop:
            self._asked = range(start, start + max(nbytes, AHEAD_NBYTES))
            os.posix_fadvise(self._fd, start, len(self._asked), os.POSIX_FADV_WILLNEED)

    def close(self) -> None:
        self._file.close()


def _facts(status: os.stat_result) -> FileFacts:
    # Who writes to a file can set its size and mtime as they were, but not its ctime.
    identity = (status.st_size, status.st_mtime_ns, status.st_ino)
    return FileFacts(status.st_size, identity, (status.st_ctime_ns,))


def open_regular(path: str) -> FileIO:
    """Open a file for reading. A FIFO, a socket or a directory is refused instead of waited for. What is
    interrupted is closed, since it is a file object and not a number."""
    try:
        file = FileIO(path, opener=_open_at_once)
    except OSError as e:
        # A socket; a link that leads to itself; a directory.
        if e.errno not in (errno.ENXIO, errno.ELOOP, errno.EISDIR):
            raise
    else:
        if stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            return file
        file.close()
    raise FormatError(f"{shown(path)}: is not a regular file.")


def _open_at_once(path: str, flags: int) -> int:
    """Opening a FIFO without a writer would hang."""
    return os.open(path, flags | os.O_NONBLOCK)


def _refuse_escape(source: Path, root: Path) -> None:
    """A link may point inside its directory, or, as in a hub cache (from a sub-folder too), into the `blobs`
    beside `snapshots`; a stranger's `tokenizer.json` that is a link to a private file must not be copied into
    a directory that will be published."""
    real, real_root = Path(os.path.realpath(source)), Path(os.path.realpath(root))
    blobs = [folder.parent / "blobs" for folder in real_root.parents[:2] if folder.name == "snapshots"]
    if real_root not in real.parents and real.parent not in blobs:
        raise CheckpointError(
            f"{shown(source)}: is a link to {shown(real)}, outside its directory; replace it by the file."
        )


FILE_URL = "file:///"
# Whoever names one of these means the directory that it lies in.
SUFFIXES = (".safetensors", ".json", ".bin", ".gguf")


def as_typed(name: str | PathLike[str]) -> str:
    """A path with the home directory in place of `~`, which a shell leaves alone in quotes. What is called so
    wins. Of a URL file:///PATH the path. Raises UsageError for what is nearly a URL."""
    path = fspath(name)
    _refuse_mistyped(path)
    if path.startswith(FILE_URL):
        return "/" + unquote(path.removeprefix(FILE_URL)).strip("/")
    return os.path.expanduser(path) if path.startswith("~") and not os.path.lexists(path) else path


def _refuse_mistyped(name: str) -> None:
    """Raises UsageError for what is nearly a URL, as S3://bucket or s3:/bucket, and would be a path. What is
    called so wins."""
    nearly = re.match("([a-z0-9]+):/", name, re.IGNORECASE)
    scheme = nearly[1].lower() if nearly else ""
    begins = FILE_URL if scheme == "file" else f"{scheme}://"
    known = scheme in (*SCHEMES, "file")
    if known and not name.startswith(begins) and not os.path.lexists(name):
        raise UsageError(
            f"{shown(without_secrets(name))}: is no URL; expected one that begins with {begins}."
        )


def directory_as_typed(name: str | PathLike[str]) -> str:
    """The same; of a file of weights, of a config or of an index, the directory that it lies in."""
    path = as_typed(name)
    if path.endswith(SUFFIXES) and os.path.isfile(path):
        return os.path.dirname(path) or "."
    return path
