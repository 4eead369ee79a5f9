"""One run for one OUT_DIR at a time: flock on a hidden file beside it, which the kernel lets go of when the
process ends. Runs that make parts of one result share that lock, and each has one of its own part.

Where others may write too, they may have put anything there: only what this user made counts.
"""

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from lorafuse.errors import HeldError, OutDirError, shown

HELD = ": another run is writing it; wait for it, or choose another directory."
# A file system that knows no locks: whose result is OUT_DIR is then decided by the rename.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


def is_own(status: os.stat_result) -> bool:
    """Whether this user owns a file or directory, and nobody else may write to it. A link never counts, as
    others could lead it elsewhere: give what lstat says."""
    writable = stat.S_IWGRP | stat.S_IWOTH
    return (
        status.st_uid == os.geteuid() and not stat.S_ISLNK(status.st_mode) and not status.st_mode & writable
    )


class Lock:
    """Held from `acquire` to `release`, which also removes the file. A `shared` lock keeps out only those who
    want it alone, and its file stays: another run may hold it too. `held`: what a message says of another
    run, after the name of OUT_DIR."""

    def __init__(self, path: Path, out_dir: Path, *, held: str = HELD, shared: bool = False) -> None:
        self._path, self._out_dir, self._held, self._shared = path, out_dir, held, shared
        self._fd = -1

    def acquire(self) -> None:
        """Raises HeldError when another run has it, OutDirError for a file that is not this user's own,
        OSError where no file can be made."""
        while self._fd < 0:
            fd = self._open()
            try:
                fcntl.flock(fd, (fcntl.LOCK_SH if self._shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
                if self._is_named(fd):
                    self._fd = fd
            except BlockingIOError:
                raise HeldError(f"{shown(self._out_dir)}{self._held}") from None
            except OSError as e:
                if e.errno not in UNSUPPORTED:
                    raise
                self._fd = fd
            finally:
                if self._fd != fd:
                    os.close(fd)

    def _open(self) -> int:
        """A file of this user, new or not."""
        # Not read-only: over NFS an exclusive lock needs a file that is open for writing.
        flags = os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK
        while True:
            with suppress(FileExistsError):
                # Whoever it belongs to by the file system's word (of a server, of a mount with one owner).
                return os.open(self._path, flags | os.O_CREAT | os.O_EXCL, 0o600)
            with suppress(FileNotFoundError):  # released in between
                return self._open_found(flags)

    def _open_found(self, flags: int) -> int:
        status = os.lstat(self._path)
        if stat.S_ISREG(status.st_mode) and status.st_nlink == 1 and is_own(status):
            fd = os.open(self._path, flags)
            if os.path.samestat(os.fstat(fd), status):
                return fd
            os.close(fd)
        raise OutDirError(
            f"{shown(self._path)}: is no lock file of this user alone, but may be another user's; once "
            f"nobody writes {shown(self._out_dir)}, remove it, or choose another directory."
        )

    def _is_named(self, fd: int) -> bool:
        """Whether the file still has its name: the run that held it may have removed it between open and
        flock."""
        try:
            return os.path.samestat(os.fstat(fd), os.lstat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._fd >= 0:
            if not self._shared:
                with suppress(OSError):  # a file that nobody holds does no harm
                    self._path.unlink()
            os.close(self._fd)
            self._fd = -1


class PartLock:
    """The same for a run that makes a part of OUT_DIR: it shares the lock of the whole, `path_of_whole`, so
    that nobody else makes that meanwhile, and has the lock of its part alone."""

    def __init__(self, path: Path, path_of_whole: Path, out_dir: Path, part: str) -> None:
        self._whole = Lock(path_of_whole, out_dir, shared=True)
        self._own = Lock(path, out_dir, held=f": another run is making {part}; wait for it.")

    def acquire(self) -> None:
        """Raises what `Lock.acquire` raises, and holds nothing then."""
        self._whole.acquire()
        try:
            self._own.acquire()
        except BaseException:
            self._whole.release()
            raise

    def release(self) -> None:
        self._own.release()
        self._whole.release()
