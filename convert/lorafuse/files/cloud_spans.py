"""What was read ahead of objects: few ranges, so that many short reads make few requests, and a bounded
number of bytes, whatever reads and from how many threads."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from threading import Condition

from lorafuse.files.folder import Buffer

# A request takes some 30 ms before its first byte, and then a megabyte each 10 to 20 ms.
SHORT_NBYTES = 1 << 17  # where nothing says that what follows is wanted: a header, a small tensor
LONG_NBYTES = 1 << 20
N_SPANS = 8
N_AHEAD = 4  # requests that nobody waits for yet
OLD = 200  # reads ago: what was not read since then is in nobody's way

Fetch = Callable[[int, memoryview], None]  # fills a buffer with the bytes of an object from a place on


@dataclass(eq=False)
class Span:
    """Bytes [start, stop) of the object that `fetch` reads, in a buffer once they are `here`. `left`: those
    that nobody has read."""

    fetch: Fetch
    start: int
    stop: int
    buffer: memoryview
    here: bool = False
    left: int = 0
    used: int = 0  # the number of reads when it was read last


class Spans:
    """The ranges of all objects, in buffers that are made once. Any number of threads may read."""

    def __init__(self) -> None:
        self._clock = 0
        self._spans: list[Span] = []
        self._buffers: list[memoryview] = []  # of no range
        self._changed = Condition()
        self._executor: ThreadPoolExecutor | None = None
        self._n_ahead = 0

    def read_into(self, fetch: Fetch, nbytes: int, start: int, buffer: Buffer) -> int:
        """Bytes of an object of `nbytes` from `start` on; or fewer than fit. Raises what `fetch` does."""
        view = memoryview(buffer).cast("B")
        wanted = min(len(view), nbytes - start)
        if wanted <= 0:
            return 0
        while True:
            with self._changed:
                span = self._find(fetch, start)
                if span and span.here:
                    return self._copied(span, start, view[:wanted])
                mine = None if span else self._new(fetch, start, self._stop(fetch, start, wanted, nbytes))
                if mine is None:
                    self._changed.wait()
                    continue
            self._fetch(mine)

    def will_need(self, fetch: Fetch, nbytes: int, start: int, wanted: int) -> None:
        """Ask for bytes that are read soon, where there is room for them."""
        stop = min(start + wanted, nbytes)
        with self._changed:
            while start < stop and (span := self._find(fetch, start)):
                start = span.stop
            if start >= stop or self._n_ahead >= N_AHEAD:
                return
            mine = self._new(fetch, start, min(start + LONG_NBYTES, nbytes), only_read=True)
            if mine is None:
                return
            self._n_ahead += 1
            self._executor = self._executor or ThreadPoolExecutor(N_AHEAD, "ahead")
            self._executor.submit(self._fetch_ahead, mine)

    def forget(self, fetch: Fetch) -> None:
        """The object is not read any more."""
        with self._changed:
            for span in [span for span in self._spans if span.fetch == fetch and span.here]:
                self._drop(span)

    def _find(self, fetch: Fetch, start: int) -> Span | None:
        return next((s for s in self._spans if s.start <= start < s.stop and s.fetch == fetch), None)

    def _stop(self, fetch: Fetch, start: int, wanted: int, nbytes: int) -> int:
        """How far to read: farther where it goes on from what was read before."""
        follows = any(span.stop == start and span.fetch == fetch for span in self._spans)
        return min(start + max(LONG_NBYTES if follows else SHORT_NBYTES, min(wanted, LONG_NBYTES)), nbytes)

    def _new(self, fetch: Fetch, start: int, stop: int, *, only_read: bool = False) -> Span | None:
        """A range that is about to be fetched. None where there is no buffer: a range that is here gives way,
        first of all one that was read to its end; with `only_read` no other but an old one."""
        if len(self._spans) + len(self._buffers) < N_SPANS:
            self._buffers.append(memoryview(bytearray(LONG_NBYTES)))
        if not self._buffers:
            here = [span for span in self._spans if span.here]
            idle = min(here, key=lambda span: (span.left > 0, span.used), default=None)
            if idle is None or (only_read and idle.left > 0 and self._clock - idle.used < OLD):
                return None
            self._drop(idle)
        # Not beyond what is there or on its way already.
        starts = [span.start for span in self._spans if span.fetch == fetch and start < span.start < stop]
        stop = min([stop, *starts])
        span = Span(fetch, start, stop, self._buffers.pop(), left=stop - start, used=self._clock)
        self._spans.append(span)
        return span

    def _drop(self, span: Span) -> None:
        self._spans.remove(span)
        self._buffers.append(span.buffer)

    def _copied(self, span: Span, start: int, view: memoryview) -> int:
        piece = span.buffer[start - span.start : span.stop - span.start][: len(view)]
        view[: len(piece)] = piece
        self._clock += 1
        span.left, span.used = span.left - len(piece), self._clock
        return len(piece)

    def _fetch(self, span: Span) -> None:
        """Raises what `fetch` does; whoever else waits for the range then asks for it."""
        try:
            span.fetch(span.start, span.buffer[: span.stop - span.start])
        except BaseException:
            with self._changed:
                self._drop(span)
                self._changed.notify_all()
            raise
        with self._changed:
            span.here = True
            self._changed.notify_all()

    def _fetch_ahead(self, span: Span) -> None:
        try:
            self._fetch(span)
        except Exception:  # whoever reads it asks again, and is told
            pass
        finally:
            with self._changed:
                self._n_ahead -= 1
