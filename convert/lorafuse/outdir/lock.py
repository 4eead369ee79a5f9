"""One run for one OUT_DIR at a time: flock on a hidden file beside it, which the kernel lets go of when the
process ends."""

import errno
import fcntl
import os
from contextlib import suppress
from pathlib import Path

from lorafuse.errors import HeldError, shown

# A file system that knows no locks: whose result is OUT_DIR is then decided by the rename.
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EINVAL)


class Lock:
    """Held from `acquire` to `release`, which also removes the file."""

    def __init__(self, path: Path, out_dir: Path) -> None:
        self._path, self._out_dir = path, out_dir
        self._fd = -1

    def acquire(self) -> None:
        """Raises HeldError when another run has it, OSError where no file can be made."""
        while self._fd < 0:
            # Not read-only: over NFS an exclusive lock needs a file that is open for writing.
            fd = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if self._is_named(fd):
                    self._fd = fd
            except BlockingIOError:
                raise HeldError(
                    f"{shown(self._out_dir)}: another run is writing it; wait for it, or choose another "
                    "directory."
                ) from None
            except OSError as e:
                if e.errno not in UNSUPPORTED:
                    raise
                self._fd = fd
            finally:
                if self._fd != fd:
                    os.close(fd)

    def _is_named(self, fd: int) -> bool:
        """Whether the file still has its name: the run that held it may have removed it between open and
        flock."""
        try:
            return os.path.samestat(os.fstat(fd), os.stat(self._path))
        except FileNotFoundError:
            return False

    def release(self) -> None:
        if self._fd >= 0:
            with suppress(OSError):  # a file that nobody holds does no harm
                self._path.unlink()
            os.close(self._fd)
            self._fd = -1
