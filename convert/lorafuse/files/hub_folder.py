"""A folder on the hub, at one commit of its repository.

A small file is fetched into the hub's own cache when it is opened. A large one is read in ranges, until it is
fetched as a whole.
"""

import errno
import os
import posixpath
import shutil
from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from lorafuse.errors import StorageError, shown
from lorafuse.files.folder import Buffer, FileFacts, FileHash, OpenFile
from lorafuse.files.hub_repo import Entry, HubRepo
from lorafuse.files.kinds import SAFETENSORS_FILES, matches
from lorafuse.files.local_folder import LocalFile, LocalFolder
from lorafuse.files.ranged_file import RangedFile

TORCH_FILES = "pytorch_model*.bin"
LARGE_NBYTES = 50_000_000  # of a file without tensors that is read in ranges
# The hub's library, its HTTP client, and a file on its way.
HUB_NBYTES = 40_000_000


@dataclass(frozen=True)
class HubFolder:
    """The files of a repository whose names begin with `prefix`, which is empty or ends with a slash.
    `whole`: a large file is fetched when it is opened, too."""

    repo: HubRepo
    prefix: str = ""
    whole: bool = False

    def __str__(self) -> str:
        folder = f"/{self.prefix.rstrip('/')}" if self.prefix else ""
        name, at, revision = self.repo.named.partition("@")
        return f"{name}{folder}{at}{revision}"

    def __truediv__(self, name: str) -> str:
        return f"{self}/{posixpath.normpath(name)}"

    @property
    def address(self) -> str:
        return str(self)

    @property
    def local_path(self) -> Path:
        """Where the hub's library keeps the repository, whether it does or not."""
        from huggingface_hub import constants

        return Path(constants.HF_HUB_CACHE) / f"models--{self.repo.repo.replace('/', '--')}"

    @property
    def pinned(self) -> str:
        """The id with the commit, which names the same files for ever."""
        folder = f"/{self.prefix.rstrip('/')}" if self.prefix else ""
        return f"{self.repo.repo}{folder}@{self.repo.commit}"

    @property
    def commit(self) -> str:
        return self.repo.commit

    @property
    def held_nbytes(self) -> int:
        return HUB_NBYTES

    def is_there(self) -> bool:
        return any(path.startswith(self.prefix) for path in self.repo.entries)

    def exists(self, name: str) -> bool:
        path = self._path(name)
        return path in self.repo.entries or any(p.startswith(f"{path}/") for p in self.repo.entries)

    def names(self, pattern: str) -> list[str]:
        depth = pattern.count("/")
        below = (p.removeprefix(self.prefix) for p in self.repo.entries if p.startswith(self.prefix))
        return sorted(
            name for name in below if name.count("/") == depth and PurePosixPath(name).match(pattern)
        )

    def sub_folders(self) -> list[str]:
        below = (p.removeprefix(self.prefix) for p in self.repo.entries if p.startswith(self.prefix))
        return sorted({name.partition("/")[0] for name in below if "/" in name})

    def sub_folder(self, name: str) -> "HubFolder":
        return HubFolder(self.repo, f"{self._path(name)}/", self.whole)

    def facts(self, name: str) -> FileFacts:
        entry = self._entry(name)
        return FileFacts(entry.nbytes, (entry.nbytes, entry.identity))

    def known_hash(self, name: str) -> FileHash | None:
        entry = self._entry(name)
        return FileHash(entry.nbytes, entry.sha256) if entry.sha256 else None

    def is_unchecked(self, name: str) -> bool:
        path = self._path(name)
        return path not in self.repo.checked and self.is_here(name)

    def is_here(self, name: str) -> bool:
        """Whether a file is on this machine."""
        return self.repo.local(self._path(name)) is not None

    def fetch(
        self, name: str, into: LocalFolder | None = None, on_nbytes: Callable[[int], None] = lambda n: None
    ) -> None:
        """Fetch a file into the hub's cache, or into a folder of this machine. `on_nbytes` hears of each
        piece, and may end it by Stopped."""
        self._entry(name)
        self.repo.fetch(self._path(name), into.path if into else None, on_nbytes)

    def merge_begins(self, into: LocalFolder | None, first: Collection[str]) -> None:
        """From now on a large file is fetched as a whole when it is opened: `into` a folder of this machine,
        or the cache. Of what a run that was killed left there, only the files that come `first` stay."""
        self.repo.in_use, self.repo.scratch = True, into.path if into else None
        if into:
            wanted = {self._path(name) for name in first}
            shutil.rmtree(into.path / ".cache", ignore_errors=True)
            for path in [path for path in into.path.rglob("*") if path.is_file()]:
                if path.relative_to(into.path).as_posix() not in wanted:
                    path.unlink()

    def merge_ends(self) -> None:
        """Large files are read in ranges again. Those in a folder of this machine go with it."""
        self.repo.in_use, self.repo.scratch = False, None
        self.repo.checked -= self.repo.placed.keys()
        self.repo.placed.clear()

    def free_nbytes_in_cache(self) -> int:
        """What the hub's cache has room for."""
        place = self.local_path
        return shutil.disk_usage(next(path for path in (place, *place.parents) if path.exists())).free

    def forget(self, name: str) -> None:
        """Remove a file that was fetched into a folder of this machine."""
        self.repo.forget(self._path(name))

    def open(self, name: str, *, inside: bool = False) -> OpenFile:
        entry, path = self._entry(name), self._path(name)
        local = self.repo.local(path)
        if local is None:
            large = matches(name, (SAFETENSORS_FILES, TORCH_FILES)) or entry.nbytes > LARGE_NBYTES
            if large and not self.whole and not self.repo.in_use:
                return RangedFile(self.repo, path, self / name, self.facts(name))
            local = self.repo.fetch(path, self.repo.scratch)
        return FetchedFile(local, self / name, self.facts(name))

    def _path(self, name: str) -> str:
        """Where a file lies in the repository; a name with .. leads out of it, to no file."""
        return posixpath.normpath(posixpath.join(self.prefix, name)) if name else self.prefix.rstrip("/")

    def _entry(self, name: str) -> Entry:
        """Raises FileNotFoundError."""
        entry = self.repo.entries.get(self._path(name))
        if entry is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self / name)
        return entry


class FetchedFile:
    """A file of the hub that lies on this machine. Messages call it what the user called it."""

    def __init__(self, path: Path, label: str, facts: FileFacts) -> None:
        try:
            self._file = LocalFile(str(path))
        except OSError as e:
            raise OSError(e.errno, e.strerror, label) from None
        self.facts = facts
        nbytes = self._file.facts.nbytes
        if nbytes != facts.nbytes:
            self.close()
            raise StorageError(
                f"{shown(label)}: has {nbytes} bytes in the hub's cache and {facts.nbytes} on the hub; "
                "remove it from the cache."
            )

    def read_into(self, start: int, buffer: Buffer) -> int:
        return self._file.read_into(start, buffer)

    def will_need(self, start: int, nbytes: int) -> None:
        self._file.will_need(start, nbytes)

    def close(self) -> None:
        self._file.close()
