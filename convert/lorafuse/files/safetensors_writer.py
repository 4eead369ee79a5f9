"""Writes one safetensors file: tensors in any order, by any threads, each byte once, hashed on the way."""

import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from threading import Lock
from typing import Protocol

from lorafuse.errors import StorageError
from lorafuse.files.safetensors_file import header_of
from lorafuse.files.tensors import StoredTensor
from lorafuse.files.trailing_hash import TrailingHash

Behind = Callable[[Callable[[], None]], "Future[None]"]
"""Runs a function in another thread, beside those that write."""


class OutFile(Protocol):
    """A file in the making. It has its name once it is finished, and not before. Any thread may write, in any
    order, at places of its own, while another one reads what was written. Errors of the file system pass
    through."""

    name: str  # of the file in its directory, for messages

    def write(self, offset: int, data: bytes | memoryview) -> None:
        """Put bytes at a place of the file."""

    def read(self, offset: int, nbytes: int) -> bytes:
        """Bytes that were written."""

    def passed(self, end: int) -> None:
        """A hint: nothing before the byte `end` is read again."""

    def finish(self, nbytes: int) -> None:
        """Make the file, of `nbytes` bytes, durable and give it its name; nobody writes any more. Raises
        StorageError when it has another size."""

    def close(self) -> None:
        """Give the file up, unless it is finished."""


class ShardWriter:
    """One safetensors file in the making. `nbytes`: written so far; `seconds`: spent on it, over all threads.
    Bytes that have to be read back for the hash are read by a thread of `behind`, or by the one that writes.
    Who writes waits for the hash, unless more than `wait_nbytes` are to be hashed before."""

    def __init__(
        self,
        file: OutFile,
        tensors: Sequence[StoredTensor],
        behind: Behind | None = None,
        wait_nbytes: int = sys.maxsize,
    ) -> None:
        self._file, self._behind = file, behind
        self._hash = TrailingHash(file.read, wait_nbytes)
        self._catching_up: Future[None] | None = None
        self._lock, self.seconds, self.nbytes = Lock(), 0.0, 0
        header = header_of(tensors)
        self._starts: dict[str, int] = {}
        self._expected = len(header)
        for tensor in tensors:
            self._starts[tensor.name] = self._expected
            self._expected += tensor.nbytes
        try:
            self._put(0, header)
        except BaseException:
            self.close()
            raise

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Put bytes of a tensor, from its byte `offset` on, into the file. Any thread may."""
        if data:
            self._put(self._starts[tensor] + offset, data)

    def _put(self, start: int, data: bytes | memoryview) -> None:
        began = time.perf_counter()
        # A file takes bytes from one thread at a time, as the hash does: while one of them hashes, another
        # writes.
        waits = self._hash.add_early(start, data)
        self._file.write(start, data)
        if waits is None:
            waits = self._hash.add(start, data)
        self._file.passed(self._hash.nbytes)
        self._spent(began, len(data))
        if waits and self._behind:
            self._catching_up = self._behind(self._catch_up)
        elif waits:
            self._catch_up()

    def _catch_up(self) -> None:
        began = time.perf_counter()
        self._hash.catch_up()
        self._spent(began)

    def _spent(self, began: float, nbytes: int = 0) -> None:
        with self._lock:
            self.nbytes += nbytes
            self.seconds += time.perf_counter() - began

    def finish(self) -> str:
        """Give the file its name, when nobody writes any more. Returns its sha256. Raises StorageError unless
        every byte was written, once."""
        if self._catching_up:
            self._catching_up.result()
        began = time.perf_counter()
        if not self.nbytes == self._hash.nbytes == self._expected:
            raise StorageError(
                f"{self._file.name}: {self.nbytes} bytes were written, the plan has {self._expected}."
            )
        self._file.finish(self._expected)
        self._spent(began)
        return self._hash.hexdigest()

    def stop(self) -> None:
        """The file is going to be given up: what runs behind ends soon."""
        self._hash.stop()

    def close(self) -> None:
        """Give the file up, unless it is finished; nobody writes any more."""
        self._hash.stop()
        self._file.close()
