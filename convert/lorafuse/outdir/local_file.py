"""A file of a result on this machine in the making: `NAME.part` until it is synced and has its name."""

import os
from pathlib import Path

from lorafuse.errors import StorageError

WRITEBACK_NBYTES = 32 << 20


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
        self._end = 0  # of what was written without a gap, where the next write is expected
        self._dirty: list[int] = [0, 0]  # what was written since the last writeback, as one run of bytes

    def write(self, offset: int, data: bytes | memoryview) -> None:
        view, at = memoryview(data), offset
        # Appended rather than put at its place, where that is the same: then a write that did less than it
        # said shows in the file's size.
        appends = offset == self._end
        while view:
            n = os.write(self._fd, view) if appends else os.pwrite(self._fd, view, at)
            view, at = view[n:], at + n
        if appends:
            self._end = at
        self._start_writeback(offset, at)

    def _start_writeback(self, start: int, end: int) -> None:
        """Lets the kernel write what is dirty, without waiting: the final fsync then finds little to do."""
        first, last = self._dirty
        first, last = (start, end) if start != last else (first, end)
        if last - first >= WRITEBACK_NBYTES:
            os.posix_fadvise(self._fd, first, last - first, os.POSIX_FADV_DONTNEED)
            first = last
        self._dirty = [first, last]

    def read(self, offset: int, nbytes: int) -> bytes:
        data = os.pread(self._fd, nbytes, offset)
        if not data:
            raise StorageError(f"{self.name}: ends at byte {offset}; something else wrote to it.")
        return data

    def passed(self, end: int) -> None:
        """Nothing is held."""

    def finish(self, nbytes: int) -> None:
        size = os.fstat(self._fd).st_size
        if size != nbytes:
            raise StorageError(f"{self.name}: {size} bytes were written, the plan has {nbytes}.")
        os.fsync(self._fd)
        self.close()
        os.rename(self._part, self._path)

    def close(self) -> None:
        self._file.close()
        self._fd = -1
