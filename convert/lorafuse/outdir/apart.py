"""Whether a result would take the place of an input, whatever names lead to them.

Directories are compared by device and inode: a bind mount, and another spelling on a file system that ignores
case, are other names of the same directory.
"""

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from lorafuse.errors import UsageError

Id = tuple[int, int]  # device and inode


def refuse_nameless(out_dir: str) -> None:
    """Raises UsageError for an empty name, which Python would take for the current directory."""
    if not out_dir:
        raise UsageError("the name of the output directory is empty.")


def place_of(path: str | Path) -> list[Id]:
    """The directory (or what else has this name) and all that it lies in, innermost first. What is not there
    is left out."""
    real = Path(os.path.realpath(path))
    return [known for folder in (real, *real.parents) if (known := _id(folder))]


def places_of(path: Path) -> set[Id]:
    """The same of an input directory, and of the files that links in it lead to."""
    places = set(place_of(path))
    with suppress(OSError), os.scandir(path) as entries:
        for entry in entries:
            if entry.is_symlink() and not entry.is_dir():
                places.update(place_of(entry.path))
    return places


def contents_of(path: str | Path) -> Iterator[Id]:
    """A directory and all directories in it; none where it is not there."""
    for folder, _, _ in os.walk(os.path.realpath(path)):
        if known := _id(Path(folder)):
            yield known


def is_around_here(path: str | Path) -> bool:
    """Whether a directory is the current one or one that it lies in, so that nobody may move it."""
    own = _id(Path(path))
    try:
        return own is not None and own in place_of(os.curdir)
    except FileNotFoundError:  # the current directory was removed
        return False


def _id(path: Path) -> Id | None:
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_dev, status.st_ino
