"""A folder in an object store: the objects whose keys begin with a prefix.

A file is told apart by its ETag, which every read asks for: an object that is replaced while it is read is
seen with the next request.
"""

import posixpath
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import ClassVar

from lorafuse.errors import CheckpointError, shown
from lorafuse.files.cloud_spans import LONG_NBYTES, N_SPANS, Spans
from lorafuse.files.cloud_store import CloudPlace, Meta
from lorafuse.files.folder import Buffer, FileFacts

# obstore's HTTP client and its threads, and answers on their way.
CLIENT_NBYTES = 18_000_000
SPANS = Spans()  # of all that is read: so memory is bounded, whatever number of folders there is


@dataclass(frozen=True)
class CloudFolder:
    """The files below a URL."""

    place: CloudPlace
    commit: ClassVar[None] = None
    local_path: ClassVar[None] = None
    held_nbytes: ClassVar[int] = N_SPANS * LONG_NBYTES + CLIENT_NBYTES

    @classmethod
    def at(cls, url: str) -> "CloudFolder":
        """The kind's entry in FOLDERS. Raises UsageError."""
        return cls(CloudPlace.at(url))

    def __str__(self) -> str:
        return str(self.place)

    def __truediv__(self, name: str) -> str:
        return self.place / posixpath.normpath(name)

    @property
    def address(self) -> str:
        return self.place.address

    def is_there(self) -> bool:
        return self.place.is_there()

    def exists(self, name: str) -> bool:
        if not name:
            return self.is_there()
        try:
            self.place.head(posixpath.normpath(name))
        except FileNotFoundError:
            return self.sub_folder(name).is_there()
        return True

    def names(self, pattern: str) -> list[str]:
        first, slash, rest = pattern.partition("/")
        if not slash:
            files, _ = self.place.list_here()
            return [file.name for file in files if fnmatchcase(file.name, pattern)]
        folders = self.sub_folders() if "*" in first else [first]
        return sorted(
            f"{folder}/{name}"
            for folder in folders
            if fnmatchcase(folder, first)
            for name in self.sub_folder(folder).names(rest)
        )

    def sub_folders(self) -> list[str]:
        return self.place.list_here()[1]

    def sub_folder(self, name: str) -> "CloudFolder":
        return CloudFolder(self.place.below(posixpath.normpath(name)))

    def facts(self, name: str) -> FileFacts:
        return _facts(self.place.head(posixpath.normpath(name)))

    def is_unchecked(self, name: str) -> bool:
        return True

    def known_hash(self, name: str) -> None:
        """An ETag is no hash of what a receipt says."""

    def open(self, name: str, *, inside: bool = False) -> "CloudFile":
        return CloudFile(self, posixpath.normpath(name))


class CloudFile:
    """An object, open for ranged reads."""

    def __init__(self, folder: CloudFolder, name: str) -> None:
        self._folder, self._name, self.label = folder, name, folder / name
        meta = folder.place.head(name)
        self.facts, self._e_tag = _facts(meta), meta.e_tag

    def read_into(self, start: int, buffer: Buffer) -> int:
        return SPANS.read_into(self._range, self.facts.nbytes, start, buffer)

    def will_need(self, start: int, nbytes: int) -> None:
        SPANS.will_need(self._range, self.facts.nbytes, start, nbytes)

    def close(self) -> None:
        SPANS.forget(self._range)

    def _range(self, start: int, data: memoryview) -> None:
        """Fill `data`. Raises FileNotFoundError; CheckpointError where it is another object by now."""
        if not self._folder.place.read_into(self._name, start, data, self._e_tag):
            raise CheckpointError(
                f"{shown(self.label)}: changed during the run, which may have read some of both; run it "
                "again."
            )


def _facts(meta: Meta) -> FileFacts:
    told = meta.e_tag or meta.modified.isoformat()
    return FileFacts(meta.nbytes, (meta.nbytes, told), (meta.version,))
