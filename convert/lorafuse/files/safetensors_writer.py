"""Writes one safetensors file."""

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path

from lorafuse.errors import StorageError
from lorafuse.files.safetensors_file import header_of
from lorafuse.files.tensors import TensorSpec


class ShardWriter:
    """Writes one safetensors file front to back, hashing on the way.

    The file is `PATH.part` until `finish`, which fsyncs it and gives it its name. Errors of the file system
    pass through.
    """

    WRITEBACK_NBYTES = 32 << 20

    def __init__(self, path: Path, tensors: Sequence[tuple[str, TensorSpec]]) -> None:
        self.path = path
        self._part = path.with_name(path.name + ".part")
        # 0o666 less the umask, as every other program's files; save_file's 0600 surprises those who share a
        # directory.
        self._fd = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o666)
        self._sha256 = hashlib.sha256()
        header = header_of(tensors)
        self.nbytes = 0
        self._flushed = 0
        self._expected = len(header) + sum(spec.nbytes for _, spec in tensors)
        try:
            self.write(header)
        except BaseException:
            self.close()
            raise

    def write(self, data: bytes | memoryview) -> None:
        """Append bytes. The order of calls must be the order of the tensors."""
        self._sha256.update(data)
        view = memoryview(data)
        while view:
            view = view[os.write(self._fd, view) :]
        self.nbytes += len(data)
        if self.nbytes - self._flushed >= self.WRITEBACK_NBYTES:
            # Starts the writeback of what is dirty, without waiting: the final fsync then finds little to do.
            os.posix_fadvise(self._fd, self._flushed, self.nbytes - self._flushed, os.POSIX_FADV_DONTNEED)
            self._flushed = self.nbytes

    @property
    def is_complete(self) -> bool:
        """All bytes of all tensors are written."""
        return self.nbytes == self._expected

    def finish(self) -> str:
        """fsync, close and rename. Returns the file's sha256."""
        if not self.is_complete or os.fstat(self._fd).st_size != self._expected:
            raise StorageError(
                f"{self.path}: {self.nbytes} bytes were written, the plan has {self._expected}."
            )
        os.fsync(self._fd)
        self.close()
        os.rename(self._part, self.path)
        return self._sha256.hexdigest()

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1
