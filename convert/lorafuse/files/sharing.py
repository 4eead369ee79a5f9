"""One file's contents under a second name: as a reflink, a hard link or a copy.

A reflink (Linux FICLONE; btrfs, xfs, bcachefs, some network file systems) shares the blocks until one of the
two is changed, so neither minds the other. A hard link is one file with two names: it is made read-only,
since a change would be one of both.
"""

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from lorafuse.errors import StorageError, shown

SHARE_CHOICES = ("auto", "reflink", "hardlink", "copy")
FICLONE = 0x40049409  # linux/fs.h: _IOW(0x94, 9, int)
WRITABLE = 0o222
# The file system, or the pair of them, cannot; or there are too many links already, or it is another user's
# file.
CANNOT = {
    errno.EOPNOTSUPP,
    errno.ENOTTY,
    errno.ENOSYS,
    errno.EINVAL,
    errno.EXDEV,
    errno.EPERM,
    errno.EACCES,
    errno.EMLINK,
}


def share_file(source: Path, target: Path, how: str) -> str:
    """Give `target`, which is not there yet, the contents of `source`, and return how: "reflink", "hardlink"
    or "copy". `auto` takes the first of these that works. `source` is complete and synced; so is `target`
    when it has its name, less the entry in its directory.

    Raises StorageError when what is asked for cannot be done here, OSError for anything else that goes wrong.
    """
    ways: dict[str, Callable[[Path, Path], None]] = {
        "reflink": _reflink,
        "hardlink": _hardlink,
        "copy": _copy,
    }
    for way in ways if how == "auto" else (how,):
        try:
            ways[way](source, target)
        except OSError as e:
            # Some file systems say EIO for a link that they do not make. A copy shows whether they can write.
            next_is_copy = how == "auto" and way == "hardlink" and e.errno != errno.EEXIST
            if way == "copy" or not (e.errno in CANNOT or next_is_copy):
                raise
            reason = e.strerror
        else:
            return way
    raise StorageError(
        f"{shown(target)}: cannot be a {how} of {shown(source)}: {reason}; --share auto takes what the file "
        "system can do."
    )


def _reflink(source: Path, target: Path) -> None:
    _filled(source, target, lambda read, write: fcntl.ioctl(write, FICLONE, read))


def _copy(source: Path, target: Path) -> None:
    def fill(read: int, write: int) -> None:
        with open(read, "rb", closefd=False) as reader, open(write, "wb", closefd=False) as writer:
            shutil.copyfileobj(reader, writer, 1 << 20)

    _filled(source, target, fill)


def _filled(source: Path, target: Path, fill: Callable[[int, int], object]) -> None:
    """A new file of the same size, which has its name once it is synced."""
    part = target.with_name(target.name + ".part")
    read = os.open(source, os.O_RDONLY | os.O_CLOEXEC)
    try:
        write = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        try:
            fill(read, write)
            if os.fstat(write).st_size != os.fstat(read).st_size:
                raise StorageError(f"{target}: has another size than {shown(source)}, of which it is a copy.")
            os.fsync(write)
        except BaseException:
            os.unlink(part)
            raise
        finally:
            os.close(write)
    finally:
        os.close(read)
    os.rename(part, target)


def _hardlink(source: Path, target: Path) -> None:
    os.link(source, target)
    mode = os.stat(target).st_mode
    if mode & WRITABLE:
        try:
            os.chmod(target, mode & 0o7777 & ~WRITABLE)
        except OSError:  # another user's: a link that one of the two could write through is none
            os.unlink(target)
            raise
