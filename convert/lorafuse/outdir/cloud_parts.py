"""The bytes of a file on their way into an object store, which takes them in order and in parts, while they
come in any order.

The first parts that are not sent yet lie in memory. What comes for later parts, and what is sent before it
was hashed, lies in a temporary file without a name. So memory is bounded, whatever the order.
"""

import os
import tempfile
from collections.abc import Callable
from threading import Lock
from typing import BinaryIO

from lorafuse.errors import StorageError, shown

MIB = 1 << 20
SMALLEST_PART_NBYTES = 5 * MIB  # of all but the last, says S3
MOST_PARTS = 9_000  # S3 takes 10,000
N_PARTS = 1  # in memory, beside the one that is being sent


def part_nbytes_of(file_nbytes: int) -> int:
    """How large the parts of a file are, so that it has few enough: whole MiB."""
    return max(SMALLEST_PART_NBYTES, -(-file_nbytes // MOST_PARTS // MIB) * MIB)


def held_nbytes_of(file_nbytes: int) -> int:
    """What a file in the making takes in memory at most."""
    return (N_PARTS + 1) * part_nbytes_of(file_nbytes)


class Parts:
    """A file of `nbytes`, each byte of which is written once, by one thread at a time, while others read.
    `send` is called with each part when all before it were sent and it is complete; the part does not change
    any more."""

    def __init__(self, nbytes: int, part_nbytes: int, send: Callable[[bytearray], object]) -> None:
        self._nbytes, self._part_nbytes, self._send = nbytes, part_nbytes, send
        self._n_sent = 0  # parts
        self._lock = Lock()  # not held while a part is sent
        self._passed = 0  # bytes that nobody reads again
        self._in_memory: dict[int, bytearray] = {}  # by number, from the first that is not sent
        self._sent: tuple[int, bytearray] | None = None  # the last, until nobody reads it
        self._filled: dict[int, int] = {}  # part → bytes that were written
        self._on_disk: set[int] = set()  # parts of which the file on disk has some
        self._file: BinaryIO | None = None

    @property
    def is_complete(self) -> bool:
        """Whether all parts were sent."""
        return self._n_sent * self._part_nbytes >= self._nbytes

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Bytes of the file. Raises StorageError for bytes beyond its end, OSError where the disk for
        temporary files is full, and what `send` does."""
        if offset + len(data) > self._nbytes:
            raise StorageError(f"{offset + len(data)} bytes were written, the plan has {self._nbytes}.")
        view = memoryview(data).cast("B")
        while view:
            number, at = divmod(offset, self._part_nbytes)
            piece = view[: self._part_nbytes - at]
            self._put(number, at, piece)
            view, offset = view[len(piece) :], offset + len(piece)

    def _put(self, number: int, at: int, piece: memoryview) -> None:
        with self._lock:
            if number < self._n_sent + N_PARTS:
                self._part(number)[at : at + len(piece)] = piece
            else:
                self._to_disk(number, at, piece)
            self._filled[number] = self._filled.get(number, 0) + len(piece)
        while self._filled.get(self._n_sent) == self._size(self._n_sent):
            self._send_first()

    def _size(self, number: int) -> int:
        return min(self._part_nbytes, self._nbytes - number * self._part_nbytes)

    def _part(self, number: int) -> bytearray:
        """A part that lies in memory, with what the disk has of it."""
        part = self._in_memory.get(number)
        if part is None:
            size, start = self._size(number), number * self._part_nbytes
            part = self._in_memory[number] = bytearray(size)
            if number in self._on_disk:
                assert self._file is not None
                self._on_disk.discard(number)
                os.preadv(self._file.fileno(), [part], start)
        return part

    def _send_first(self) -> None:
        number = self._n_sent
        with self._lock:
            part = self._part(number)
            self._keep_sent()
        self._send(part)
        with self._lock:
            del self._in_memory[number], self._filled[number]
            self._n_sent += 1
            self._sent = number, part
            self._forget_passed()

    def _keep_sent(self) -> None:
        """The part that was sent before, if it may be read again: on disk."""
        if self._sent:
            number, part = self._sent
            self._to_disk(number, 0, memoryview(part))
            self._sent = None

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes that were written and not passed; perhaps fewer, none at the end of what was written."""
        number, at = divmod(offset, self._part_nbytes)
        nbytes = min(nbytes, self._part_nbytes - at)
        with self._lock:
            part = self._sent[1] if self._sent and self._sent[0] == number else self._in_memory.get(number)
            return bytes(part[at : at + nbytes]) if part is not None else self._from_disk(offset, nbytes)

    def passed(self, end: int) -> None:
        """The bytes before are not read again."""
        with self._lock:
            self._passed = max(self._passed, end)
            self._forget_passed()

    def _forget_passed(self) -> None:
        if self._sent and self._passed >= self._sent[0] * self._part_nbytes + len(self._sent[1]):
            self._sent = None

    def _to_disk(self, number: int, at: int, piece: memoryview) -> None:
        if self._file is None:
            self._file = tempfile.TemporaryFile(prefix="lorafuse-", buffering=0)
        self._on_disk.add(number)
        offset, fd = number * self._part_nbytes + at, self._file.fileno()
        while piece:
            n = os.pwrite(fd, piece, offset)
            piece, offset = piece[n:], offset + n

    def _from_disk(self, offset: int, nbytes: int) -> bytes:
        return os.pread(self._file.fileno(), nbytes, offset) if self._file else b""

    def close(self) -> None:
        """Nothing is written or read any more."""
        with self._lock:
            self._in_memory.clear()
            self._sent = None
            if self._file:
                self._file.close()
                self._file = None


def named(error: OSError) -> StorageError:
    """A full disk of temporary files, in words."""
    return StorageError(
        f"{shown(tempfile.gettempdir())}: {error.strerror}; what comes out of order lies there until it is "
        "uploaded. Free some space, or set TMPDIR."
    )
