"""A second kind of folder: files in this process's memory, `memory://name`, and `memory://name/sub` below it.

It is what an object store is: no directories but those that names have, an ETag for each content, no path.
"""

import errno
import hashlib
import os
import posixpath
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import ClassVar

from lorafuse.files.folder import Buffer, FileFacts

SCHEME = "memory://"


@dataclass(frozen=True)
class MemoryFolder:
    """The files whose URLs begin with `url`; `store` has all that there are, by URL."""

    store: dict[str, bytes | bytearray]
    url: str
    commit: ClassVar[None] = None
    held_nbytes: ClassVar[int] = 0

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> str:
        return f"{self.url}/{posixpath.normpath(name)}"

    @property
    def address(self) -> str:
        return self.url

    @property
    def local_path(self) -> None:
        return None

    def is_there(self) -> bool:
        return bool(self._below())

    def exists(self, name: str) -> bool:
        label = self / name
        return label in self.store or any(url.startswith(f"{label}/") for url in self.store)

    def names(self, pattern: str) -> list[str]:
        depth = pattern.count("/")
        below = [name for name in self._below() if name.count("/") == depth]
        return sorted(name for name in below if PurePosixPath(name).match(pattern))

    def sub_folders(self) -> list[str]:
        return sorted({name.partition("/")[0] for name in self._below() if "/" in name})

    def sub_folder(self, name: str) -> "MemoryFolder":
        return MemoryFolder(self.store, f"{self.url}/{name}")

    def facts(self, name: str) -> FileFacts:
        return MemoryFile(self.data(name)).facts

    def is_unchecked(self, name: str) -> bool:
        return True

    def known_hash(self, name: str) -> None:
        return None

    def open(self, name: str, *, inside: bool = False) -> "MemoryFile":
        return MemoryFile(self.data(name))

    def _below(self) -> list[str]:
        prefix = f"{self.url}/"
        return [url.removeprefix(prefix) for url in self.store if url.startswith(prefix)]

    def data(self, name: str) -> bytes | bytearray:
        """A file's bytes. Raises FileNotFoundError."""
        label = self / name
        if label not in self.store:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), label)
        return self.store[label]


class MemoryFile:
    """A file in memory. It reads a few bytes at a time, as a network may."""

    def __init__(self, data: bytes | bytearray, most: int = 1000) -> None:
        self._data, self._most = data, most
        self.facts = FileFacts(len(data), (hashlib.sha256(data).hexdigest(),))

    def read_into(self, start: int, buffer: Buffer) -> int:
        piece = self._data[start : start + min(len(buffer), self._most)]
        memoryview(buffer)[: len(piece)] = piece
        return len(piece)

    def will_need(self, start: int, nbytes: int) -> None:
        """Everything is in memory."""

    def close(self) -> None:
        """Nothing is open."""


class Memory:
    """Everything that lies in memory."""

    def __init__(self) -> None:
        self.store: dict[str, bytes | bytearray] = {}

    def at(self, url: str) -> MemoryFolder:
        """The kind's entry in FOLDERS."""
        return MemoryFolder(self.store, url.rstrip("/"))

    def __call__(self, path: Path) -> str:
        """The URL of a copy of a directory."""
        url = f"{SCHEME}{path.name}"
        for file in path.rglob("*"):
            if file.is_file():
                self.store[f"{url}/{file.relative_to(path).as_posix()}"] = file.read_bytes()
        return url
