"""What sources hold for more than one tile: values that are computed once, and windows that are read once.
Any worker may ask. The first worker that asks makes the values; the others wait for them."""

import mmap
from collections.abc import Callable, Iterator
from functools import partial
from threading import Lock

import torch

from lorafuse.arithmetic.arena import Arena, host_view
from lorafuse.codecs.sources import Raw
from lorafuse.files.stores import Store

# Tiles come in order, so those in the making are in one window, or in two next to each other.
N_WINDOWS_HELD = 2
# Bytes of all windows that are held: more would mean fewer and longer reads. While the next window is read,
# tiles may still be made of a window that is held no more: then half as many again are there.
WINDOWS_NBYTES = 10_000_000
TURNED_NBYTES = 1 << 20  # of a window, transposed at a time
# Pages of its own, all there at once where the system can do that: a fault for each takes longer than
# reading.
_OWN_PAGES = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_POPULATE", 0)


class ComputedOnce:
    """What the first thread to ask for it computes, and what lasts until it is dropped."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._value: Raw | None = None

    def get(self, make: Callable[[], Raw]) -> Raw:
        with self._lock:
            if self._value is None:
                self._value = make()
            return self._value

    def drop(self) -> None:
        with self._lock:
            self._value = None


class Windows:
    """Runs of a weight's rows that are read at once, since a tile's own bytes are scattered over what is
    stored.

    A window is dropped when all its rows have been asked for, or when others were asked for after it: it is
    read again then when it is needed again.
    """

    def __init__(self, n_rows: int, rows_per_window: int, read: Callable[[range, Arena], Raw]) -> None:
        self.n_rows, self.rows_per_window, self._read = n_rows, rows_per_window, read
        self.n_held = min(N_WINDOWS_HELD, -(-n_rows // rows_per_window))
        self._lock = Lock()
        # First row → the window and how many of its rows nobody asked for yet; the last one asked for comes
        # last.
        self._held: dict[int, tuple[ComputedOnce, int]] = {}

    def around(self, rows: range) -> Iterator[tuple[range, range]]:
        """(rows of a window, those of `rows` in it) for each window that holds some of `rows`."""
        size = self.rows_per_window
        for first in range(rows.start // size * size, rows.stop, size):
            window = range(first, min(first + size, self.n_rows))
            yield window, range(max(first, rows.start), min(window.stop, rows.stop))

    def get(self, rows: range, arena: Arena) -> Iterator[Raw]:
        """What was read for each window around `rows`; the caller's references keep it from going away."""
        for window, part in self.around(rows):
            yield self._asked(window, len(part)).get(partial(self._read, window, arena))

    def _asked(self, window: range, n_rows: int) -> ComputedOnce:
        with self._lock:
            content, n_left = self._held.pop(window.start, (ComputedOnce(), len(window)))
            if n_left > n_rows:
                if len(self._held) == N_WINDOWS_HELD:
                    del self._held[next(iter(self._held))]
                self._held[window.start] = content, n_left - n_rows
            return content

    def drop(self) -> None:
        with self._lock:
            self._held.clear()


def read_runs(store: Store, name: str, starts: list[int], nbytes: int) -> torch.Tensor:
    """uint8 [len(starts), nbytes]: of each byte in `starts`, the `nbytes` of a stored tensor from there on;
    zeros beyond its end."""
    runs = mapped(len(starts), nbytes)
    _read_into(runs, store, name, starts)
    return runs


def read_turned(store: Store, name: str, starts: list[int], n_words: int, arena: Arena) -> torch.Tensor:
    """int32 [n_words, len(starts)]: of each byte in `starts`, so many words from there on, transposed. The
    arena's scratch takes 2 · TURNED_NBYTES, or what a run has."""
    made = mapped(n_words, 4 * len(starts)).view(torch.int32)
    step = max(TURNED_NBYTES // (4 * n_words), 1)
    for first in range(0, len(starts), step):
        part = starts[first : first + step]
        rows = arena.host.get("held.rows", 4 * n_words * len(part), torch.uint8).view(len(part), -1)
        _read_into(rows, store, name, part)
        # As a whole, which torch turns in blocks that fit in cache.
        turned = arena.host.get("held.turned", n_words * len(part), torch.int32).view(n_words, -1)
        turned.copy_(rows.view(torch.int32).T)
        made[:, first : first + len(part)].copy_(turned)
    return made


def mapped(n_rows: int, nbytes: int) -> torch.Tensor:
    """uint8 [n_rows, nbytes]: zeros. Not by malloc, which keeps what is freed, some megabytes in the arena of
    every thread that asked for them."""
    pages = mmap.mmap(-1, n_rows * nbytes, flags=_OWN_PAGES)
    return torch.frombuffer(pages, dtype=torch.uint8).view(n_rows, nbytes)


def _read_into(runs: torch.Tensor, store: Store, name: str, starts: list[int]) -> None:
    nbytes = runs.shape[1]
    view, end = host_view(runs.view(-1)), store.tensors[name].spec.nbytes
    if starts == list(range(starts[0], starts[0] + len(starts) * nbytes, nbytes)):  # they are one run
        store.read_into(name, starts[0], view[: end - starts[0]])
        return
    for number, start in enumerate(starts):
        store.read_into(name, start, view[number * nbytes : (number + 1) * nbytes][: end - start])
