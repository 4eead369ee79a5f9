"""Tables of many tensors are made, and torch is imported, without Python's search for cyclic garbage.

Both make a million objects that stay. The search would go through them again and again meanwhile: a third of
the time of a plan of 250,000 tensors.

What was needed meanwhile goes back to the system afterwards: of 69,000 tensors 13 MB, which glibc would keep
beside what is allocated later.
"""

import ctypes
import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock


class _Process:
    """How many are at work, and whether the search was on before the first."""

    def __init__(self) -> None:
        self._lock, self._inside, self._was_on = Lock(), set[object](), False

    def enter(self, who: object) -> None:
        with self._lock:
            if not self._inside:
                self._was_on = gc.isenabled()
            self._inside.add(who)
            gc.disable()

    def leave(self, who: object) -> None:
        """Also for `who` was interrupted on the way in."""
        with self._lock:
            self._inside.discard(who)
            is_last = not self._inside
            if is_last and self._was_on:
                self._was_on = False
                gc.enable()
        if is_last:
            _give_back_free_memory()


def _give_back_free_memory() -> None:
    """Pages of the heap that hold nothing. Does nothing without glibc."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim:
        trim(ctypes.c_size_t(0))


_PROCESS = _Process()


@contextmanager
def uncollected() -> Iterator[None]:
    """The search rests, in the whole process; afterwards it is as it was. May be nested, and entered by
    several threads at once; also a decorator."""
    who = object()
    try:
        _PROCESS.enter(who)
        yield
    finally:
        _PROCESS.leave(who)
