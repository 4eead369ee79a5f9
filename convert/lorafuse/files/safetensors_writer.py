"""Writes one safetensors file: tensors in any order, each byte once, hashed on the way."""

import hashlib
from collections.abc import Sequence
from typing import Protocol

from lorafuse.errors import StorageError
from lorafuse.files.safetensors_file import header_of
from lorafuse.files.tensors import StoredTensor

READ_NBYTES = 1 << 20  # read back at once, where bytes came before those that the hash waits for


class OutFile(Protocol):
    """A file in the making. It has its name once it is finished, and not before. Errors of the file system
    pass through."""

    name: str  # of the file in its directory, for messages

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes at a place of the file."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes that were written."""

    def passed(self, end: int) -> None:
        """A hint: nothing before the byte `end` is read again."""

    def finish(self, nbytes: int) -> None:
        """Make the file, of `nbytes` bytes, durable and give it its name. Raises StorageError when it has
        another size."""

    def close(self) -> None:
        """Give the file up, unless it is finished."""


class ShardWriter:
    """One safetensors file in the making. `nbytes`: written so far."""

    def __init__(self, file: OutFile, tensors: Sequence[StoredTensor]) -> None:
        self._file = file
        self._sha256 = hashlib.sha256()
        header = header_of(tensors)
        self._starts: dict[str, int] = {}
        self._expected = len(header)
        for tensor in tensors:
            self._starts[tensor.name] = self._expected
            self._expected += tensor.nbytes
        self.nbytes = 0
        self._hashed = 0  # bytes from the start
        # Start → end of what was written further on, without gaps, and the reverse.
        self._ahead: dict[int, int] = {}
        self._starts_by_end: dict[int, int] = {}
        try:
            self._put(0, header)
        except BaseException:
            self.close()
            raise

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Put bytes of a tensor, from its byte `offset` on, into the file."""
        self._put(self._starts[tensor] + offset, data)

    def _put(self, start: int, data: bytes | memoryview) -> None:
        self._file.write(start, data)
        self.nbytes += len(data)
        if start != self._hashed:
            self._remember(start, start + len(data))
            return
        self._sha256.update(data)
        self._hashed += len(data)
        end = self._ahead.pop(self._hashed, self._hashed)
        self._starts_by_end.pop(end, None)
        while self._hashed < end:
            data = self._file.read(self._hashed, min(READ_NBYTES, end - self._hashed))
            self._sha256.update(data)
            self._hashed += len(data)
        self._file.passed(self._hashed)

    def _remember(self, start: int, end: int) -> None:
        """One entry for bytes without a gap: a matrix may come in hundreds of thousands of pieces."""
        start = self._starts_by_end.pop(start, start)
        end = self._ahead.pop(end, end)
        self._ahead[start], self._starts_by_end[end] = end, start

    @property
    def is_complete(self) -> bool:
        """All bytes of all tensors are written."""
        return self.nbytes == self._expected

    def finish(self) -> str:
        """Give the file its name. Returns its sha256. Raises StorageError unless every byte was written,
        once."""
        if not self.is_complete or self._hashed != self._expected:
            raise StorageError(
                f"{self._file.name}: {self.nbytes} bytes were written, the plan has {self._expected}."
            )
        self._file.finish(self._expected)
        return self._sha256.hexdigest()

    def close(self) -> None:
        """Give the file up, unless it is finished."""
        self._file.close()
