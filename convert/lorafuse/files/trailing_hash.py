"""The sha256 of a file that any threads write, in any order: it follows the lowest byte that is not written.

Bytes that nothing is missing before are hashed by the thread that wrote them, while they are in its cache.
When another thread hashes just then, or bytes before them are missing, a copy of them waits in a spare
buffer, and whoever hashes the bytes before goes on with it. Where no buffer is free, a thread waits for its
turn; what came too early is read back then, which costs a quarter of hashing.
"""

import hashlib
from collections.abc import Callable
from threading import Condition

from lorafuse.files.spares import SPARES, Spares

READ_NBYTES = 1 << 17  # read back at once


class TrailingHash:
    """`nbytes` are hashed, from the start on, of `n_added`. `read_back(start, n)` has at most n bytes that
    were added. A thread does not wait for its turn when more than `wait_nbytes` are before its own bytes."""

    def __init__(
        self, read_back: Callable[[int, int], bytes], wait_nbytes: int, spares: Spares = SPARES
    ) -> None:
        self._read_back, self._spares, self._sha256 = read_back, spares, hashlib.sha256()
        self._wait_nbytes = wait_nbytes
        self._turn = Condition()
        self._busy = False  # a thread hashes, or is going to: so it is whenever bytes up to `_end` wait
        self._stopped = False
        self.nbytes = self.n_added = 0
        self._end = 0  # no byte before it is missing
        self._waiting: set[int] = set()  # starts of what is hashed by the threads that wrote it
        self._copies: dict[int, memoryview] = {}  # start → bytes that wait in a spare buffer
        # Start → end of what was added further on, without gaps, and the reverse.
        self._ahead: dict[int, int] = {}
        self._starts_by_end: dict[int, int] = {}

    def add(self, start: int, data: bytes | memoryview) -> bool:
        """Bytes of the file from `start` on, at least one. Returns whether bytes wait that `catch_up` alone
        hashes: then it has to be called, once, by any thread."""
        with self._turn:
            is_next = self._add(start, start + len(data))
            if (self._busy or not is_next) and self._left_to_others(start, data, is_next):
                return False
            self._busy = True
        return self._hashed(data)

    def add_early(self, start: int, data: bytes | memoryview) -> bool | None:
        """The same for bytes that this thread is going to write: nobody reads them back. None, and nothing is
        added, where they are not the next ones or another thread hashes."""
        with self._turn:
            if self._busy or start != self._end:
                return None
            self._busy = self._add(start, start + len(data))
        return self._hashed(data)

    def _hashed(self, data: bytes | memoryview) -> bool:
        """Hash the next bytes, and copies that follow. Returns whether what comes then is to be read back."""
        self._sha256.update(data)
        copied, waits = self._passed(len(data))
        while copied is not None:
            self._sha256.update(copied)
            n = len(copied)
            self._spares.release(copied)
            copied, waits = self._passed(n)
        return waits

    def _left_to_others(self, start: int, data: bytes | memoryview, is_next: bool) -> bool:
        """Whether another thread hashes these bytes. Waits for their turn where none will."""
        return self._copied(start, data) or not is_next or not self._waited(start)

    def _copied(self, start: int, data: bytes | memoryview) -> bool:
        """Whether a copy of the bytes waits in a spare buffer now."""
        copied = None if self._stopped else self._spares.copy(data)
        if copied is not None:
            self._copies[start] = copied
        return copied is not None

    def _waited(self, start: int) -> bool:
        """Waits until all before `start` is hashed, unless that is much. Returns whether it is."""
        if start - self.nbytes > self._wait_nbytes:
            return False
        self._waiting.add(start)
        self._turn.wait_for(lambda: self._stopped or self.nbytes == start)
        self._waiting.remove(start)
        return self.nbytes == start

    def catch_up(self) -> None:
        """Hash what waits, and what is added meanwhile, up to the lowest byte that is missing."""
        try:
            waits = True
            while waits and not self._stopped:
                with self._turn:
                    start, end = self.nbytes, min([self._end, *self._waiting, *self._copies])
                waits = self._hashed(self._read_back(start, min(READ_NBYTES, end - start)))
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """Nobody wants to know any more."""
        with self._turn:
            self._stopped = True
            while self._copies:
                self._spares.release(self._copies.popitem()[1])
            self._turn.notify_all()

    def hexdigest(self) -> str:
        return self._sha256.hexdigest()

    def _passed(self, nbytes: int) -> tuple[memoryview | None, bool]:
        """So many more bytes are hashed. Returns the copy that is next, and whether the next bytes are to be
        read back."""
        with self._turn:
            self.nbytes += nbytes
            copied = self._copies.pop(self.nbytes, None)
            if self.nbytes in self._waiting:
                self._turn.notify_all()
                return None, False
            self._busy = self.nbytes < self._end
            return copied, self._busy and copied is None

    def _add(self, start: int, end: int) -> bool:
        """Whether no byte before these is missing. Of others, one entry for bytes without a gap: a matrix may
        come in hundreds of thousands of pieces."""
        self.n_added += end - start
        end, is_next = self._ahead.pop(end, end), start == self._end
        if is_next:
            self._starts_by_end.pop(end, None)
            self._end = end
        else:
            start = self._starts_by_end.pop(start, start)
            self._ahead[start], self._starts_by_end[end] = end, start
        return is_next
