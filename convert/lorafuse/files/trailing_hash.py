"""The sha256 of a file that any threads write, in any order: it follows the lowest byte that is not written.

Bytes that are the next ones are hashed by the thread that wrote them, while they are in its cache. Reading
them back, as all others have to be, costs a quarter of hashing.
"""

import hashlib
from collections.abc import Callable
from threading import Lock

READ_NBYTES = 1 << 18  # read back at once


class TrailingHash:
    """`nbytes` are hashed, from the start on, of `n_added`. `read_back(start, n)` has at most n bytes that
    were added."""

    def __init__(self, read_back: Callable[[int, int], bytes]) -> None:
        self._read_back, self._sha256 = read_back, hashlib.sha256()
        self._lock = Lock()
        self._busy = False  # a thread hashes
        self._stopped = False
        self.nbytes = self.n_added = 0
        # Start → end of what was added further on, without gaps, and the reverse.
        self._ahead: dict[int, int] = {}
        self._starts_by_end: dict[int, int] = {}

    def add(self, start: int, data: bytes | memoryview) -> bool:
        """Bytes of the file from `start` on, at least one. Returns whether bytes wait that `catch_up` alone
        hashes: then it has to be called, once, by any thread."""
        with self._lock:
            self.n_added += len(data)
            if self._busy or start != self.nbytes:
                self._remember(start, start + len(data))
                return False
            self._busy = True
        self._sha256.update(data)
        return self._passed(len(data))

    def catch_up(self) -> None:
        """Hash what waits, and what is added meanwhile, up to the lowest byte that is missing."""
        waits = True
        while waits and not self._stopped:
            with self._lock:
                end = self._ahead.pop(self.nbytes)
                del self._starts_by_end[end]
            at = self.nbytes
            while at < end and not self._stopped:
                data = self._read_back(at, min(READ_NBYTES, end - at))
                self._sha256.update(data)
                at += len(data)
            waits = self._passed(at - self.nbytes)

    def stop(self) -> None:
        """Nobody wants to know any more."""
        self._stopped = True

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()

    def _passed(self, nbytes: int) -> bool:
        """So many more bytes are hashed. Returns whether more wait; if not, whoever adds the next may hash
        them."""
        with self._lock:
            self.nbytes += nbytes
            self._busy = self.nbytes in self._ahead
            return self._busy

    def _remember(self, start: int, end: int) -> None:
        """One entry for bytes without a gap: a matrix may come in hundreds of thousands of pieces."""
        start = self._starts_by_end.pop(start, start)
        end = self._ahead.pop(end, end)
        self._ahead[start], self._starts_by_end[end] = end, start
