"""A file of a result on this machine in the making: `NAME.part` until it is synced and has its name."""

import ctypes
import os
from pathlib import Path
from threading import Lock

from lorafuse.errors import StorageError

WRITEBACK_NBYTES = 32 << 20
TAIL_NBYTES = 16
_SYNC_FILE_RANGE_WRITE = 2


class LocalOutFile:
    """An OutFile of a local file system. Errors of the file system pass through."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._part = path.with_name(path.name + ".part")
        # 0o666 less the umask, as every other program's files; save_file's 0600 surprises those who share a
        # directory.
        # A file object, which an interruption right here closes; a number would stay open.
        self._file = open(self._part, "w+b", buffering=0)
        self._fd = self._file.fileno()
        self._lock = Lock()
        self._dirty_nbytes = 0  # since the last writeback
        self._dropped = 0  # from the page cache, from the start on

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view, at = memoryview(data), offset
        while view:
            n = os.pwrite(self._fd, view, at)
            view, at = view[n:], at + n
        tail = bytes(memoryview(data)[-TAIL_NBYTES:])
        if os.pread(self._fd, len(tail), at - len(tail)) != tail:
            raise StorageError(
                f"{self.name}: the system said that {len(data)} bytes were written at byte {offset}, and not "
                "all of them are there; is the disk sound?"
            )
        self._start_writeback(len(data))

    def _start_writeback(self, nbytes: int) -> None:
        """Has the kernel write what is dirty, without waiting: the final fsync then finds little to do."""
        with self._lock:
            self._dirty_nbytes += nbytes
            if self._dirty_nbytes < WRITEBACK_NBYTES:
                return
            self._dirty_nbytes = 0
        start_writeback(self._fd)

    def read(self, offset: int, nbytes: int) -> bytes:
        data = os.pread(self._fd, nbytes, offset)
        if not data:
            raise StorageError(f"{self.name}: ends at byte {offset}; something else wrote to it.")
        return data

    def passed(self, end: int) -> None:
        """Pages are dropped when the disk should have them; those that it has not yet stay."""
        with self._lock:
            first, last = self._dropped, end - 2 * WRITEBACK_NBYTES
            if last - first < WRITEBACK_NBYTES:
                return
            self._dropped = last
        os.posix_fadvise(self._fd, first, last - first, os.POSIX_FADV_DONTNEED)

    def finish(self, nbytes: int) -> None:
        size = os.fstat(self._fd).st_size
        if size != nbytes:
            raise StorageError(f"{self.name}: {size} bytes were written, the plan has {nbytes}.")
        os.fsync(self._fd)
        os.posix_fadvise(self._fd, 0, 0, os.POSIX_FADV_DONTNEED)
        self.close()
        os.rename(self._part, self._path)

    def close(self) -> None:
        self._file.close()
        self._fd = -1


def start_writeback(fd: int) -> None:
    """Has the kernel write what is dirty of a file, where it knows sync_file_range. What goes wrong, fsync
    says."""
    call = getattr(ctypes.CDLL(None), "sync_file_range", None)
    if call is not None:
        nowhere = ctypes.c_int64(0)  # from the start, to the end
        call(ctypes.c_int(fd), nowhere, nowhere, ctypes.c_uint(_SYNC_FILE_RANGE_WRITE))
