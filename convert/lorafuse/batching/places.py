"""Where inputs and results of a batch lie, to tell whether one would take the place of another: by device and
inode, or by its URL, which is nothing that lies on this machine."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import PurePath

from lorafuse.errors import StorageError, UsageError
from lorafuse.files.folder import Folder
from lorafuse.files.folders import open_folder
from lorafuse.outdir.apart import Id, contents_of, place_of


def folders_there(names: Iterable[str]) -> Iterator[Folder]:
    """The folders of those names, as far as that can be told; else it is the job's own error, later."""
    for name in names:
        with suppress(OSError, UsageError, StorageError):
            folder = open_folder(name)
            if folder.is_there():
                yield folder


def around(folder: Folder) -> Sequence[Id | PurePath]:
    """A folder and what it lies in, innermost first."""
    if folder.local_path:
        return place_of(folder.local_path)
    url = PurePath(folder.address)
    return [url, *url.parents]


def inside(folder: Folder) -> Iterable[Id | PurePath]:
    """A folder and what lies in it. A URL stands for all in it."""
    return contents_of(folder.local_path) if folder.local_path else [PurePath(folder.address)]
