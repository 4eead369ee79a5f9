"""Buffers in which bytes wait for their turn to be hashed, so that the thread that made them need not."""

from threading import Lock


class Spares:
    """At most `n` buffers of at most `nbytes` bytes each, made when they are needed and then kept. Any number
    of threads and files may use them."""

    def __init__(self, n: int, nbytes: int) -> None:
        self.n, self.nbytes = n, nbytes
        self._lock, self._n_out = Lock(), 0
        self._here: list[bytearray] = []

    def copy(self, data: bytes | memoryview) -> memoryview | None:
        """A copy of the bytes, which `release` takes back; None where there is no room for them."""
        with self._lock:
            if len(data) > self.nbytes or self._n_out == self.n:
                return None
            self._n_out += 1
            buffer = self._here.pop() if self._here else bytearray()
        if len(buffer) < len(data):
            buffer = bytearray(len(data))
        copied = memoryview(buffer)[: len(data)]
        copied[:] = data
        return copied

    def release(self, copied: memoryview) -> None:
        """Nobody needs this copy any more."""
        buffer = copied.obj
        assert isinstance(buffer, bytearray)
        with self._lock:
            self._n_out -= 1
            self._here.append(buffer)


SPARES = Spares(2, 2 << 20)
